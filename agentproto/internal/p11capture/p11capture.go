// Package p11capture reads the captures of p11rpc/testdata, for the tests of the
// packages that speak p11-kit's RPC protocol.
package p11capture

import (
	"encoding/binary"
	"encoding/hex"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// Message is a request or a response.
type Message struct {
	Request bool
	Code    uint64 // of the frame: the same for a request and its response
	Call    uint32
	Sig     string
	Body    []byte // with call and signature, as on the wire
}

// Conn is what one connection carried, in order.
type Conn struct {
	File     string // with the number of the connection in it
	Version  byte   // what the client said first
	Messages []Message
}

var (
	headLine    = regexp.MustCompile(`^version byte client=(\d) server=\d; (\d+) requests (\d+) responses$`)
	messageLine = regexp.MustCompile(`^(REQ |RESP) code=0x([0-9a-f]+) opts=b'[a-z]*' [A-Za-z_]+\((\d+)\) sig=(\w*)$`)
)

// Read returns every connection of every capture in a directory. It fails the
// test where one lacks messages, or where there are fewer connections than ever.
func Read(t testing.TB, dir string) []Conn {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.decoded.txt"))
	if err != nil || len(files) != 9 {
		t.Fatalf("%d captures found in %s (%v), want 9", len(files), dir, err)
	}
	var out []Conn
	for _, file := range files {
		out = append(out, readFile(t, file)...)
	}
	if len(out) != 11 {
		t.Fatalf("%d connections captured in %s, want 11", len(out), dir)
	}
	return out
}

func readFile(t testing.TB, file string) []Conn {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	number := func(s string, base int) uint64 {
		n, err := strconv.ParseUint(s, base, 32)
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		return n
	}
	var out []Conn
	var missing []uint64 // messages of each connection
	lines := strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
	for i := 0; i < len(lines); i++ {
		if m := headLine.FindStringSubmatch(lines[i]); m != nil {
			out = append(out, Conn{File: filepath.Base(file) + "#" + strconv.Itoa(len(out)), Version: byte(number(m[1], 10))})
			missing = append(missing, number(m[2], 10)+number(m[3], 10))
			continue
		}
		m := messageLine.FindStringSubmatch(lines[i])
		if m == nil || len(out) == 0 || i+1 == len(lines) {
			t.Fatalf("%s:%d: %q", file, i+1, lines[i])
		}
		i++
		args, err := hex.DecodeString(strings.TrimSpace(lines[i]))
		if err != nil {
			t.Fatalf("%s:%d: %v", file, i+1, err)
		}
		msg := Message{Request: m[1] == "REQ ", Code: number(m[2], 16), Call: uint32(number(m[3], 10)), Sig: m[4]}
		msg.Body = Body(msg.Call, msg.Sig, args)
		last := len(out) - 1
		out[last].Messages = append(out[last].Messages, msg)
		missing[last]--
	}
	for i, n := range missing {
		if n != 0 {
			t.Fatalf("%s: connection %d lacks %d messages", file, i, n)
		}
	}
	return out
}

// Body is the body of a message with those arguments.
func Body(call uint32, sig string, args []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, call)
	b = binary.BigEndian.AppendUint32(b, uint32(len(sig)))
	return append(append(b, sig...), args...)
}
