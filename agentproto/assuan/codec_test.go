package assuan

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// decodeData reads D lines back and checks the form of each.
func decodeData(t *testing.T, wire []byte) []byte {
	t.Helper()
	if len(wire) == 0 {
		return nil
	}
	if wire[len(wire)-1] != '\n' {
		t.Fatalf("no line feed at the end of %q", wire)
	}
	var data []byte
	for _, line := range bytes.Split(wire[:len(wire)-1], []byte("\n")) {
		if len(line) > MaxReply || !bytes.HasPrefix(line, []byte("D ")) || len(line) == 2 || bytes.ContainsRune(line, '\r') {
			t.Fatalf("bad line of %d bytes: %q", len(line), line)
		}
		var err error
		data, err = unescape(data, line[2:]) // fails on an escape that is split
		if err != nil {
			t.Fatal(err)
		}
	}
	return data
}

func TestDataLines(t *testing.T) {
	const room = MaxReply - 2
	x := strings.Repeat("x", room)
	tests := []struct{ name, in, want string }{
		{"empty", "", ""},
		{"plain", "abc", "D abc\n"},
		{"escapes", "a%\r\nb", "D a%25%0D%0Ab\n"},
		{"raw", "\x00\x01\x7f\xff", "D \x00\x01\x7f\xff\n"},
		{"full line", x, "D " + x + "\n"},
		{"one over", x + "y", "D " + x + "\nD y\n"},
		{"escape at the end", x[3:] + "%", "D " + x[3:] + "%25\n"},
		{"escape that would be split", x[2:] + "%", "D " + x[2:] + "\nD %25\n"},
		{"escape that would be split after two", x[1:] + "\nz", "D " + x[1:] + "\nD %0Az\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := appendData(nil, []byte(tt.in))
			if string(got) != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
			if back := decodeData(t, got); string(back) != tt.in {
				t.Errorf("read back as %q", back)
			}
		})
	}
}

func TestDataLinesRandom(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		b := make([]byte, rng.IntN(3*MaxReply))
		for i := range b {
			b[i] = "%\r\nx\x00"[rng.IntN(5)]
		}
		if !bytes.Equal(decodeData(t, appendData(nil, b)), b) {
			t.Fatalf("%q is not read back", b)
		}
	}
}

func TestUnescape(t *testing.T) {
	tests := []struct {
		in, want string
		ok       bool
	}{
		{"a%41%4a%4Ab", "aAJJb", true},
		{"%2541", "%41", true}, // decoded once
		{"%", "", false},
		{"%4", "", false},
		{"%zz", "", false},
		{"%+1", "", false},
	}
	for _, tt := range tests {
		got, err := unescape(nil, []byte(tt.in))
		if string(got) != tt.want || (err == nil) != tt.ok {
			t.Errorf("%q: got %q, %v", tt.in, got, err)
		}
	}
}

func TestErrorLines(t *testing.T) {
	tests := []struct {
		err  Error
		want string
	}{
		{Error{67109115, "Forbidden"}, "ERR 67109115 Forbidden\n"},
		{Error{0, "nothing"}, "ERR 67108865 nothing\n"},
		{Error{1, "two\r\nOK lines\x00"}, "ERR 1 two  OK lines \n"},
		{Error{1, strings.Repeat("x", 2000)}, "ERR 1 " + strings.Repeat("x", MaxReply-6) + "\n"},
	}
	for _, tt := range tests {
		got := string(appendLine(nil, tt.err.line()))
		if got != tt.want {
			t.Errorf("got %q, want %q", got, tt.want)
		}
	}
}

func FuzzAssuanLine(f *testing.F) {
	files, err := filepath.Glob("../gpgagent/testdata/transcripts/*.txt")
	if err != nil {
		f.Fatal(err)
	}
	seeds := 0
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			_, request, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "C> ")
			if ok {
				seeds++
				f.Add([]byte(request))
			}
		}
	}
	if seeds < 100 {
		f.Fatalf("only %d client lines found in the transcripts", seeds)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		name, args, skip, err := parseRequest(b)
		if (err != nil || skip) && (name != "" || args != nil) {
			t.Errorf("%q: %q %q beside an error or nothing", b, name, args)
		}
		if err == nil && !skip && (name == "" || strings.ContainsAny(name, " \t") || !bytes.Contains(b, args)) {
			t.Errorf("%q: command %q, arguments %q", b, name, args)
		}
		if !bytes.Equal(decodeData(t, appendData(nil, b)), b) {
			t.Errorf("%q is not read back", b)
		}
		data, err := unescape(nil, b)
		if err == nil && len(data) > len(b) || err != nil && data != nil {
			t.Errorf("%q: decoded to %q, %v", b, data, err)
		}
		line := appendLine(nil, string(b))
		if len(line) > MaxReply+1 || bytes.IndexByte(line, '\n') != len(line)-1 || bytes.ContainsAny(line, "\r\x00") {
			t.Errorf("%q: bad line %q", b, line)
		}
	})
}
