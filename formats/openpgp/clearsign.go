package openpgp

import (
	"bufio"
	"bytes"
	"crypto"
	"errors"
	"fmt"
	"io"
)

// MaxClearText is the longest text ClearSign takes, in bytes. Debian's largest InRelease has some hundred kilobytes.
const MaxClearText = 64 << 20

// maxClearLine is the longest line, line end included. gpg 2.2.40 signs only the first 19995 bytes of a longer one, with
// a warning, and finds a good signature over one of 20000 bytes, dash escape included, BAD.
const maxClearLine = 19994

// hashNames are the values of the Hash armor header (section 9.5).
var hashNames = map[crypto.Hash]string{crypto.SHA256: "SHA256", crypto.SHA384: "SHA384", crypto.SHA512: "SHA512"}

// ClearSign writes message in the cleartext signature framework (section 7) to w, as gpg --clearsign does: lines keep
// their blanks and line ends in the output, are hashed without trailing blanks and with CRLF between them, and the last
// line end is not hashed. o.Armor is ignored.
//
// The whole text is kept in memory, at most MaxClearText of it, because it comes before its signature and nothing is
// written unless that verified. A text whose lines verifiers would not read alike is refused with ErrMalformed.
func ClearSign(w io.Writer, message io.Reader, key Key, signer crypto.Signer, o SignOptions) error {
	err := key.holds(signer)
	if err != nil {
		return err
	}
	sig, err := NewSignature(key, SigText, o)
	if err != nil {
		return err
	}
	var out bytes.Buffer
	// The Hash header is for verifiers of RFC 4880, which assume MD5 without it (its section 7).
	fmt.Fprintf(&out, "-----BEGIN PGP SIGNED MESSAGE-----\nHash: %s\n\n", hashNames[sig.HashFunc()])
	err = clearText(&out, sig, message)
	if err != nil {
		return fmt.Errorf("clear-signing: %w", err)
	}
	pkt, err := sig.Finish(signer)
	if err != nil {
		return err
	}
	err = Armor(&out, BlockSignature, pkt)
	if err != nil {
		return err
	}
	_, err = w.Write(out.Bytes())
	if err != nil {
		return fmt.Errorf("writing the signed text: %w", err)
	}
	return nil
}

// clearText writes the dash-escaped message to out and what is signed of it to hash.
func clearText(out *bytes.Buffer, hash io.Writer, message io.Reader) error {
	r := bufio.NewReaderSize(io.LimitReader(message, MaxClearText+1), maxClearLine)
	total := 0
	for n := 1; ; n++ {
		line, err := r.ReadSlice('\n')
		if err != nil && err != io.EOF && !errors.Is(err, bufio.ErrBufferFull) {
			return fmt.Errorf("reading the text: %w", err)
		}
		if errors.Is(err, bufio.ErrBufferFull) {
			return fmt.Errorf("%w: line %d is over %d bytes", ErrMalformed, n, maxClearLine)
		}
		total += len(line)
		if total > MaxClearText {
			return fmt.Errorf("%w: text over %d bytes", ErrMalformed, MaxClearText)
		}
		if err == io.EOF && len(line) == 0 && n > 1 {
			return nil
		}
		werr := clearLine(out, hash, line, n == 1)
		if werr != nil {
			return fmt.Errorf("line %d: %w", n, werr)
		}
		if err == io.EOF {
			// The signature's armor must begin a line. Section 7.1: the line end before it is not signed.
			out.WriteByte('\n')
			return nil
		}
	}
}

// clearLine handles one line, with its line end if it has one.
func clearLine(out *bytes.Buffer, hash io.Writer, line []byte, first bool) error {
	text := trimLine(bytes.TrimSuffix(line, []byte("\n"))) // section 7.2
	// A carriage return is a line end to some verifiers and part of the text to others (gpg 2.2 strips a row of
	// them at the end of a line, go-crypto one).
	if bytes.ContainsRune(text, '\r') {
		return fmt.Errorf("%w: carriage return inside the line", ErrMalformed)
	}
	// Section 7.2: lines with a dash must be escaped, those with "From " should, for mail transport.
	if bytes.HasPrefix(line, []byte("-")) || bytes.HasPrefix(line, []byte("From ")) {
		out.WriteString("- ")
	}
	out.Write(line)
	if !first {
		_, err := io.WriteString(hash, "\r\n")
		if err != nil {
			return err
		}
	}
	_, err := hash.Write(text)
	return err
}
