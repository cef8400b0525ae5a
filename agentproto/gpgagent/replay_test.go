package gpgagent_test

import (
	"crypto"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/signwarden/signwarden/agentproto/assuan"
	"github.com/signwarden/signwarden/agentproto/gpgagent"
)

// exchange is one client line of a transcript and the kinds of the lines that answered it.
type exchange struct {
	Command string
	Reply   string // such as "S OK"
}

var transcriptLine = regexp.MustCompile(`^\[(\d+)\] (C>|S<) (.*)`)

// readTranscript gives the exchanges of every connection in a transcript.
func readTranscript(t *testing.T, path string) map[string][]exchange {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	conns := make(map[string][]exchange)
	for line := range strings.Lines(string(text)) {
		m := transcriptLine.FindStringSubmatch(strings.TrimSuffix(line, "\n"))
		if m == nil || m[3] == "<EOF>" {
			continue
		}
		id, list := m[1], conns[m[1]]
		if m[2] == "C>" {
			conns[id] = append(list, exchange{Command: m[3]})
			continue
		}
		kind, _, _ := strings.Cut(m[3], " ")
		if len(list) == 0 {
			continue // the greeting
		}
		last := &list[len(list)-1]
		if kind != "D" || !strings.HasSuffix(last.Reply, "D") { // several D lines are one datum
			last.Reply = strings.TrimSpace(last.Reply + " " + kind)
		}
	}
	return conns
}

// shape is a reply in the form of exchange.Reply.
func shape(t *testing.T, r assuan.Reply, err error) string {
	t.Helper()
	parts := strings.Fields(strings.Repeat("S ", len(r.Status)))
	if len(r.Data) > 0 {
		parts = append(parts, "D")
	}
	_, isErr := errors.AsType[*assuan.Error](err)
	switch {
	case isErr:
		parts = append(parts, "ERR")
	case err != nil:
		t.Fatal(err)
	default:
		parts = append(parts, "OK")
	}
	return strings.Join(parts, " ")
}

// vectorKeys maps the keygrips of the transcripts to keys of ours of the same kind.
func vectorKeys(t *testing.T) (*strings.Replacer, map[string]crypto.Signer) {
	t.Helper()
	vectors, err := os.ReadFile("testdata/keygrip-vectors.txt")
	if err != nil {
		t.Fatal(err)
	}
	signers := make(map[string]crypto.Signer)
	var pairs []string
	vectors = append(vectors, "B0FBCFE601DAB23BCB9DEE40CF88691D7E9737E9 P256\n"...) // of rpmsign-418-p256.txt
	for line := range strings.Lines(string(vectors)) {
		var grip, kind string
		fmt.Sscan(line, &grip, &kind)
		name := map[string]string{"RSA": "rsa", "P256": "p256", "P384": "p384", "Ed25519": "ed"}[kind]
		if name == "" {
			continue
		}
		signers[name] = newSigners()[name]
		pairs = append(pairs, grip, gripOf(t, signers[name].Public()))
	}
	return strings.NewReplacer(pairs...), signers
}

// TestReplay feeds what real clients sent, and asserts that each line is answered
// with the same kinds of lines as the real agent answered.
func TestReplay(t *testing.T) {
	files, err := filepath.Glob("testdata/transcripts/*.txt")
	if err != nil {
		t.Fatal(err)
	}
	if len(files) < 20 {
		t.Fatalf("only %d transcripts found", len(files))
	}
	grips, signers := vectorKeys(t)
	signed := 0
	for _, file := range files {
		for id, exchanges := range readTranscript(t, file) {
			t.Run(filepath.Base(file)+"/"+id, func(t *testing.T) {
				keys := &softKeys{signers: signers}
				c := connect(t, gpgagent.Config{
					Keys:         keysFor(keys),
					TrustedRoots: []string{"298472EBF7B57DC4EB49419AD434404E06199AAB"}, // of gpgsm-sign.txt
				})
				for _, want := range exchanges {
					r, err := c.Transact(grips.Replace(want.Command))
					got := exchange{want.Command, shape(t, r, err)}
					if diff := cmp.Diff(want, got); diff != "" {
						t.Error(diff)
					}
				}
				signed += len(keys.takeCalls())
			})
		}
	}
	if signed < 20 {
		t.Errorf("the transcripts led to %d signatures only", signed)
	}
}
