package assuan

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
)

// The limits of libassuan, as the GnuPG 2.2.40 agent was seen to apply them.
const (
	// MaxRequest is the longest request line, without its LF and an optional CR.
	// A HAVEKEY with many keygrips comes close to it.
	MaxRequest = 1001
	// MaxReply is the longest line that is sent, without its LF.
	MaxReply = 998
)

// ErrLineTooLong reports a line from the peer that is longer than the protocol allows.
var ErrLineTooLong = errors.New("assuan: line too long")

// parseRequest splits a request into its upper-case command and its arguments.
// skip is true for the lines that have no reply: empty ones and comments.
func parseRequest(line []byte) (command string, args []byte, skip bool, err error) {
	if len(line) == 0 || line[0] == '#' {
		return "", nil, true, nil
	}
	if line[0] == ' ' || line[0] == '\t' {
		return "", nil, false, errLeadingBlank
	}
	name, args := line, []byte(nil)
	i := bytes.IndexAny(line, " \t")
	if i >= 0 {
		name, args = line[:i], bytes.Trim(line[i:], " \t")
	}
	return strings.ToUpper(string(name)), args, false, nil
}

// appendData appends data as D lines. Only %, CR and LF are escaped: everything
// else, NUL and high bytes included, goes as it is, and a line is broken only
// between escapes. Empty data is no line.
func appendData(dst, data []byte) []byte {
	const hex = "0123456789ABCDEF"
	room := 0
	for i, b := range data {
		escape := b == '%' || b == '\r' || b == '\n'
		need := 1
		if escape {
			need = 3
		}
		if room < need {
			if i > 0 {
				dst = append(dst, '\n')
			}
			dst = append(dst, 'D', ' ')
			room = MaxReply - 2
		}
		if escape {
			dst = append(dst, '%', hex[b>>4], hex[b&15])
		} else {
			dst = append(dst, b)
		}
		room -= need
	}
	if len(data) > 0 {
		dst = append(dst, '\n')
	}
	return dst
}

// unescape decodes every %XX, in upper or lower case, and appends the result to dst.
func unescape(dst, line []byte) ([]byte, error) {
	for i := 0; i < len(line); i++ {
		if line[i] != '%' {
			dst = append(dst, line[i])
			continue
		}
		if i+2 >= len(line) {
			return nil, fmt.Errorf("assuan: cut-off escape in %q", line)
		}
		hi, ok1 := unhex(line[i+1])
		lo, ok2 := unhex(line[i+2])
		if !ok1 || !ok2 {
			return nil, fmt.Errorf("assuan: bad escape %q", line[i:i+3])
		}
		dst = append(dst, hi<<4|lo)
		i += 2
	}
	return dst, nil
}

func unhex(c byte) (byte, bool) {
	switch {
	case c >= '0' && c <= '9':
		return c - '0', true
	case c >= 'a' && c <= 'f':
		return c - 'a' + 10, true
	case c >= 'A' && c <= 'F':
		return c - 'A' + 10, true
	}
	return 0, false
}

// appendLine appends one line of text, made harmless: control characters become
// blanks, and what is too long is cut.
func appendLine(dst []byte, text string) []byte {
	for i := range min(len(text), MaxReply) {
		b := text[i]
		if b < ' ' || b == 0x7f {
			b = ' '
		}
		dst = append(dst, b)
	}
	return append(dst, '\n')
}
