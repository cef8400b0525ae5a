package gpgagent_test

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signwarden/signwarden/agentproto/gpgagent"
)

// Who is refused over and over fills no log; the next line says how many were left out.
func TestRefusalsInTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer // written in the session's goroutine, before each reply
		c := connect(t, gpgagent.Config{Keys: keysFor(&softKeys{}), Logger: slog.New(slog.NewTextHandler(&log, nil))})
		for range 1000 {
			talk(t, c, "PKDECRYPT")
		}
		if n := strings.Count(log.String(), "command refused"); n != 100 {
			t.Errorf("%d lines for 1000 refusals at once, want 100", n)
		}
		time.Sleep(time.Second)
		talk(t, c, "PKDECRYPT")
		if !strings.Contains(log.String(), "left_out_before=900") {
			t.Error("the log does not say how many lines were left out")
		}
	})
}
