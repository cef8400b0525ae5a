package openpgp

import (
	"bytes"
	"fmt"
	"io"
	"strings"
)

// Lines of the cleartext signature framework (section 7).
const (
	clearBegin = "-----BEGIN PGP SIGNED MESSAGE-----"
	sigBegin   = "-----BEGIN " + BlockSignature + "-----"
	sigEnd     = "-----END " + BlockSignature + "-----"
)

// VerifyClear checks a cleartext signature as VerifyDetached does, and returns the text it covers: without trailing
// blanks, with \n between lines and none at the end. It refuses anything but blank lines around the signed message,
// for a reader could take it as signed. The whole message is kept in memory, at most MaxClearText and its signature.
func VerifyClear(cert *Certificate, message io.Reader) ([]byte, SignatureInfo, error) {
	const limit = MaxClearText + MaxSignature
	b, err := io.ReadAll(io.LimitReader(message, limit+1))
	if err != nil {
		return nil, SignatureInfo{}, fmt.Errorf("reading the signed text: %w", err)
	}
	if len(b) > limit {
		return nil, SignatureInfo{}, fmt.Errorf("%w: signed text over %d bytes", ErrMalformed, limit)
	}
	text, sig, err := splitClear(b)
	if err != nil {
		return nil, SignatureInfo{}, fmt.Errorf("cleartext signature: %w", err)
	}
	signed := bytes.ReplaceAll(text, []byte("\n"), []byte("\r\n"))
	info, err := VerifyDetached(cert, bytes.NewReader(signed), bytes.NewReader(sig))
	if err != nil {
		return nil, SignatureInfo{}, err
	}
	return text, info, nil
}

// splitClear takes the frame apart. It is our own because go-crypto's clearsign drags in package net, and skips what
// stands before the frame.
func splitClear(b []byte) (text, sig []byte, err error) {
	b = bytes.TrimLeft(b, "\r\n")
	line, b := cutLine(b)
	if string(line) != clearBegin {
		return nil, nil, fmt.Errorf("%w: it does not begin with %q", ErrMalformed, clearBegin)
	}
	for {
		line, b = cutLine(b)
		if len(line) == 0 {
			break
		}
		// Other headers, and other values, were used to show a reader text that is not signed.
		value, ok := strings.CutPrefix(string(line), "Hash: ")
		if !ok || !knownHashes(value) {
			return nil, nil, fmt.Errorf("%w: header %q", ErrMalformed, line)
		}
	}
	var out bytes.Buffer
	for first := true; !bytes.HasPrefix(b, []byte(sigBegin)); first = false {
		if len(b) == 0 {
			return nil, nil, fmt.Errorf("%w: no signature after the text", ErrMalformed)
		}
		line, b, _ = bytes.Cut(b, []byte("\n"))
		line, escaped := bytes.CutPrefix(line, []byte("- ")) // before blanks go: an empty line may be escaped too
		line = trimLine(line)
		if bytes.ContainsRune(line, '\r') || !escaped && bytes.HasPrefix(line, []byte("-")) {
			return nil, nil, fmt.Errorf("%w: line %q", ErrMalformed, line)
		}
		if !first {
			out.WriteByte('\n')
		}
		out.Write(line)
	}
	sig = bytes.TrimRight(b, " \t\r\n")
	if !bytes.HasSuffix(sig, []byte("\n"+sigEnd)) || bytes.Count(sig, []byte("-----END")) != 1 {
		return nil, nil, fmt.Errorf("%w: it does not end with one %q", ErrMalformed, sigEnd)
	}
	return out.Bytes(), sig, nil
}

// cutLine returns the first line, without its line end and trailing blanks, and what follows.
func cutLine(b []byte) (line, rest []byte) {
	line, rest, _ = bytes.Cut(b, []byte("\n"))
	return trimLine(line), rest
}

// trimLine removes what is not signed: the carriage return of a line end, and trailing blanks.
func trimLine(line []byte) []byte {
	return bytes.TrimRight(bytes.TrimSuffix(line, []byte("\r")), " \t")
}

// knownHashes says whether the value of a Hash header is a list of hashes we sign with.
func knownHashes(list string) bool {
	for name := range strings.SplitSeq(list, ",") {
		name = strings.TrimSpace(name)
		if name != "SHA256" && name != "SHA384" && name != "SHA512" {
			return false
		}
	}
	return true
}
