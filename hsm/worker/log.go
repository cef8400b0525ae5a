package worker

import (
	"bufio"
	"io"
	"log/slog"
	"strings"
	"time"
)

// Bounds on what a child's standard error adds to the log: the length of a
// line, lines at once (the traces of a crash have some 80), and then a second.
const (
	maxLine   = 512
	lineBurst = 200
	lineRate  = 2
)

// logLines logs what a child says until all who could say more are gone.
func logLines(log *slog.Logger, from io.Reader) {
	r := bufio.NewReaderSize(from, maxLine)
	tokens, at, dropped := float64(lineBurst), time.Now(), 0
	for {
		line, long, err := r.ReadLine()
		text := strings.ToValidUTF8(string(line), "?")
		for more := long; more && err == nil; {
			_, more, err = r.ReadLine() // the rest of a line that was cut
		}
		if err != nil {
			return
		}
		now := time.Now()
		tokens, at = min(tokens+lineRate*now.Sub(at).Seconds(), lineBurst), now
		if tokens < 1 {
			dropped++
			continue
		}
		tokens--
		log.Warn("worker says", slog.String("line", text), slog.Int("left_out", dropped))
		dropped = 0
	}
}
