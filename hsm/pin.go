package hsm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
)

// maxPIN bounds a PIN file; no token takes a PIN near as long.
const maxPIN = 256

// A PIN is a token's PIN. It shows itself to no formatter, encoder or logger;
// only Reveal gives it away. The zero PIN is empty and never sent to a token.
type PIN struct {
	// A pointer, because fmt reads an unexported field of another struct by
	// reflection, past the methods below, and would print a string.
	s *string
}

const redacted = "[redacted]"

// NewPIN holds a PIN that was read elsewhere, such as from the pipe of a
// supervisor.
func NewPIN(s string) PIN { return PIN{&s} }

// ReadPIN reads a PIN from a file or a descriptor (/dev/fd/3). One newline at
// the end is cut off. It refuses a file that the group or others can read, an
// empty one, one of several lines, and one longer than 256 bytes: a wrong PIN
// costs one of the few tries a token grants.
func ReadPIN(path string) (PIN, error) {
	f, err := os.Open(path)
	if err != nil {
		return PIN{}, fmt.Errorf("opening PIN file: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return PIN{}, fmt.Errorf("opening PIN file: %w", err)
	}
	if st.Mode().Perm()&0o077 != 0 {
		return PIN{}, fmt.Errorf("PIN file %q has mode %#o: others than its owner can read or change it; chmod 0400", path, st.Mode().Perm())
	}
	b, err := io.ReadAll(io.LimitReader(f, maxPIN+3)) // the PIN, its newline, and one too many
	if err != nil {
		return PIN{}, fmt.Errorf("reading PIN file %q: %w", path, err)
	}
	b = bytes.TrimSuffix(b, []byte("\n"))
	b = bytes.TrimSuffix(b, []byte("\r"))
	switch {
	case len(b) == 0:
		return PIN{}, fmt.Errorf("PIN file %q is empty", path)
	case len(b) > maxPIN:
		return PIN{}, fmt.Errorf("PIN file %q is longer than %d bytes", path, maxPIN)
	case bytes.ContainsAny(b, "\r\n\x00"):
		return PIN{}, fmt.Errorf("PIN file %q has more than one line", path)
	}
	return NewPIN(string(b)), nil
}

// Reveal returns the PIN itself: for C_Login, and for the pipe to a worker.
func (p PIN) Reveal() string {
	if p.s == nil {
		return ""
	}
	return *p.s
}

func (p PIN) String() string               { return redacted }
func (p PIN) GoString() string             { return redacted }
func (p PIN) Format(f fmt.State, _ rune)   { io.WriteString(f, redacted) }
func (p PIN) MarshalText() ([]byte, error) { return []byte(redacted), nil }
func (p PIN) LogValue() slog.Value         { return slog.StringValue(redacted) }

var errNoPIN = errors.New("no PIN given")
