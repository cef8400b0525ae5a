package openpgp

import (
	"bufio"
	"bytes"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
)

// maxClearLine is the longest line, line end included. gpg 2.2.40 signs only the first 19995 bytes of a longer one, with
// a warning, and finds a good signature over one of 20000 bytes, dash escape included, BAD.
const maxClearLine = 19994

var crlf = []byte("\r\n")

// hashNames are the values of the Hash armor header (section 9.5).
var hashNames = map[crypto.Hash]string{crypto.SHA256: "SHA256", crypto.SHA384: "SHA384", crypto.SHA512: "SHA512"}

// ClearSign writes message in the cleartext signature framework (section 7) to w, as gpg --clearsign does: lines keep
// their blanks and line ends in the output, are hashed without trailing blanks and with CRLF between them, and the last
// line end is not hashed. o.Armor is ignored.
//
// The message is read twice, from where it stands and a line at a time: for the signature, and when that has been
// verified for the output. If it has changed in between the error is ErrChanged, and what was written is to be thrown
// away, as after an error of w. A text whose lines verifiers would not read alike is refused with ErrMalformed.
func ClearSign(w io.Writer, message io.ReadSeeker, key Key, signer crypto.Signer, o SignOptions) error {
	err := key.holds(signer)
	if err != nil {
		return err
	}
	sig, err := NewSignature(key, SigText, o)
	if err != nil {
		return err
	}
	start, err := message.Seek(0, io.SeekCurrent)
	if err != nil {
		return fmt.Errorf("reading the text: %w", err)
	}
	before := sha256.New()
	err = clearText(bufio.NewWriter(io.Discard), io.MultiWriter(sig, before), message)
	if err != nil {
		return fmt.Errorf("clear-signing: %w", err)
	}
	pkt, err := sig.Finish(signer)
	if err != nil {
		return err
	}
	_, err = message.Seek(start, io.SeekStart)
	if err != nil {
		return fmt.Errorf("reading the text: %w", err)
	}
	out := bufio.NewWriterSize(w, 64<<10)
	// The Hash header is for verifiers of RFC 4880, which assume MD5 without it (its section 7).
	fmt.Fprintf(out, "-----BEGIN PGP SIGNED MESSAGE-----\nHash: %s\n\n", hashNames[sig.HashFunc()])
	after := sha256.New()
	err = clearText(out, after, message)
	if err != nil {
		return fmt.Errorf("clear-signing: %w", err)
	}
	if !bytes.Equal(before.Sum(nil), after.Sum(nil)) {
		return ErrChanged
	}
	err = Armor(out, BlockSignature, pkt)
	if err == nil {
		err = out.Flush()
	}
	if err != nil {
		return fmt.Errorf("writing the signed text: %w", err)
	}
	return nil
}

// clearText writes the dash-escaped message to out, whose errors stay in it, and what is signed of it to hash.
func clearText(out *bufio.Writer, hash io.Writer, message io.Reader) error {
	r := bufio.NewReaderSize(message, maxClearLine)
	for n := 1; ; n++ {
		line, err := r.ReadSlice('\n')
		if err != nil && err != io.EOF && !errors.Is(err, bufio.ErrBufferFull) {
			return fmt.Errorf("reading the text: %w", err)
		}
		if errors.Is(err, bufio.ErrBufferFull) {
			return fmt.Errorf("%w: line %d is over %d bytes", ErrMalformed, n, maxClearLine)
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
func clearLine(out *bufio.Writer, hash io.Writer, line []byte, first bool) error {
	text := trimLine(line) // section 7.2
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
		_, err := hash.Write(crlf)
		if err != nil {
			return err
		}
	}
	_, err := hash.Write(text)
	return err
}
