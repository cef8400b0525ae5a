package gpgagent

import (
	"strconv"
	"strings"
	"unicode"
)

// maxNote bounds what is kept of a description, in bytes.
const maxNote = 512

// decodeNote makes a SETKEYDESC fit for an audit record: plus- and
// percent-decoded, on one line, without characters that hide or reorder others.
// It is the client's word and proves nothing.
func decodeNote(escaped []byte) string {
	raw := make([]byte, 0, len(escaped))
	for i := 0; i < len(escaped); i++ {
		b := escaped[i]
		if b == '+' {
			b = ' '
		}
		if b == '%' && i+2 < len(escaped) {
			v, err := strconv.ParseUint(string(escaped[i+1:i+3]), 16, 8)
			if err == nil {
				b = byte(v)
				i += 2
			}
		}
		raw = append(raw, b)
	}
	var out strings.Builder
	for _, r := range strings.ToValidUTF8(string(raw), "\uFFFD") {
		switch {
		case unicode.IsSpace(r): // gpg's descriptions have line feeds
			r = ' '
		case !unicode.IsGraphic(r): // controls, and formats such as the bidirectional ones
			continue
		}
		if out.Len()+len(string(r)) > maxNote {
			break
		}
		out.WriteRune(r)
	}
	return strings.TrimSpace(out.String())
}
