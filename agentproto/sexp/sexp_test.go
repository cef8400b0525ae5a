package sexp_test

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/signwarden/signwarden/agentproto/sexp"
)

func TestParse(t *testing.T) {
	a := sexp.Atom[string]
	tests := []struct {
		in   string
		want sexp.Expr
	}{
		{"()", sexp.List()},
		{"(0:)", sexp.List(a(""))},
		{"(3:a b())", sexp.List(a("a b"), sexp.List())},
		{"(7:sig-val(3:rsa(1:s3:\x00):)))", sexp.List(a("sig-val"), sexp.List(a("rsa"), sexp.List(a("s"), a("\x00):"))))},
		{"(10:0123456789)", sexp.List(a("0123456789"))},
		{strings.Repeat("(", sexp.MaxDepth) + strings.Repeat(")", sexp.MaxDepth), nested(sexp.MaxDepth)},
	}
	for _, tt := range tests {
		t.Run(tt.in, func(t *testing.T) {
			got, err := sexp.Parse([]byte(tt.in))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
			if string(got.Bytes()) != tt.in {
				t.Errorf("written as %q", got.Bytes())
			}
		})
	}
}

func nested(depth int) sexp.Expr {
	e := sexp.List()
	for range depth - 1 {
		e = sexp.List(e)
	}
	return e
}

func TestParseRefuses(t *testing.T) {
	tests := []struct{ name, in string }{
		{"empty", ""},
		{"an atom", "3:abc"},
		{"open list", "(3:abc"},
		{"closed too often", "(3:abc))"},
		{"data after the end", "()x"},
		{"leading zero", "(03:abc)"},
		{"two zeros", "(00:)"},
		{"sign", "(+3:abc)"},
		{"length beyond the end", "(9:abc)"},
		{"length that eats the bracket's place", "(4:abc"},
		{"huge length", "(99999999999999999999999:abc)"},
		{"no colon", "(3abc)"},
		{"no length", "(:abc)"},
		{"blank", "(3:abc )"},
		{"display hint", "([1:x]3:abc)"},
		{"token", "(abc)"},
		{"too deep", strings.Repeat("(", sexp.MaxDepth+1) + strings.Repeat(")", sexp.MaxDepth+1)},
		{"much too deep", strings.Repeat("(", sexp.MaxLen)},
		{"too long", "(" + strings.Repeat("0:", sexp.MaxLen/2) + ")"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			e, err := sexp.Parse([]byte(tt.in))
			if err == nil {
				t.Errorf("taken as %v", e)
			}
		})
	}
}

var escaped = regexp.MustCompile(`%[0-9A-F]{2}|\\x[0-9a-f]{2}`)

// captured gives the expressions that a real agent sent in the transcripts of gpgagent.
func captured(f *testing.F) [][]byte {
	files, err := filepath.Glob("../gpgagent/testdata/transcripts/*.txt")
	if err != nil {
		f.Fatal(err)
	}
	var found [][]byte
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			_, d, ok := strings.Cut(line, "S< D (")
			if !ok {
				continue
			}
			d = strings.ReplaceAll("("+strings.TrimSuffix(d, "\n"), `\\`, `\x5c`)
			d = escaped.ReplaceAllStringFunc(d, func(e string) string {
				b, _ := strconv.ParseUint(e[len(e)-2:], 16, 8)
				return string([]byte{byte(b)})
			})
			found = append(found, []byte(d))
		}
	}
	return found
}

func FuzzSexp(f *testing.F) {
	valid := 0
	for _, seed := range captured(f) {
		_, err := sexp.Parse(seed)
		if err == nil {
			valid++ // long lines of a transcript are cut
		}
		f.Add(seed)
	}
	if valid < 3 {
		f.Fatalf("only %d valid expressions found in the transcripts", valid)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := sexp.Parse(b)
		if err != nil {
			if diff := cmp.Diff(sexp.Expr{}, e); diff != "" {
				t.Errorf("an expression beside an error: %s", diff)
			}
			return
		}
		if !bytes.Equal(e.Bytes(), b) {
			t.Errorf("%q is written as %q", b, e.Bytes())
		}
	})
}
