package openpgp

import (
	"bufio"
	"bytes"
	"errors"
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

// maxFramedLine is the longest line of a signed message that is read: gpg makes none longer than maxClearLine and a
// dash escape.
const maxFramedLine = 32 << 10

// VerifyClear checks a cleartext signature as VerifyDetached does. The message is read twice, from where it stands and
// a line at a time. It refuses anything but blank lines around the signed message, for a reader could take it as
// signed.
//
// The text that is covered goes to text, which may be nil: without trailing blanks, with \n between lines and none at
// the end. It is to be thrown away if there is an error.
func VerifyClear(cert *Certificate, message io.ReadSeeker, text io.Writer) (SignatureInfo, error) {
	start, err := message.Seek(0, io.SeekCurrent)
	if err != nil {
		return SignatureInfo{}, fmt.Errorf("reading the signed text: %w", err)
	}
	f, err := readFrame(message)
	if err != nil {
		return SignatureInfo{}, fmt.Errorf("cleartext signature: %w", err)
	}
	_, err = message.Seek(start+f.text, io.SeekStart)
	if err != nil {
		return SignatureInfo{}, fmt.Errorf("reading the signed text: %w", err)
	}
	if text == nil {
		text = io.Discard
	}
	signed := &signedText{lines: newLines(io.LimitReader(message, f.end-f.text)), text: text}
	return VerifyDetached(cert, signed, bytes.NewReader(f.signature))
}

// lines reads a message line by line.
type lines struct {
	r  *bufio.Reader
	at int64 // where the next line begins
}

func newLines(r io.Reader) *lines { return &lines{r: bufio.NewReaderSize(r, maxFramedLine)} }

// next returns a line with its line end, which the last one may lack, until the next call; io.EOF where there is none.
func (l *lines) next() ([]byte, error) {
	line, err := l.r.ReadSlice('\n')
	if errors.Is(err, bufio.ErrBufferFull) {
		return nil, fmt.Errorf("%w: line of over %d bytes", ErrMalformed, maxFramedLine)
	}
	l.at += int64(len(line))
	if err == io.EOF && len(line) > 0 {
		err = nil
	}
	return line, err
}

// frame says where in a message things are.
type frame struct {
	text, end int64 // the text, escaped, and where it ends
	signature []byte
}

// readFrame takes a message apart. It is our own because go-crypto's clearsign drags in package net, and skips what
// stands before the frame.
func readFrame(r io.Reader) (frame, error) {
	var f frame
	l := newLines(r)
	// truncated says that the message must not end here.
	truncated := func(err error, where string) error {
		if err == io.EOF {
			return fmt.Errorf("%w: %s", ErrMalformed, where)
		}
		return err
	}
	line, err := l.next()
	for err == nil && len(bytes.Trim(line, "\r\n")) == 0 {
		line, err = l.next()
	}
	if err != nil {
		return f, truncated(err, "it is empty")
	}
	if string(trimLine(line)) != clearBegin {
		return f, fmt.Errorf("%w: it does not begin with %q", ErrMalformed, clearBegin)
	}
	for {
		line, err = l.next()
		if err != nil {
			return f, truncated(err, "it ends in its headers")
		}
		line = trimLine(line)
		if len(line) == 0 {
			break
		}
		// Other headers, and other values, were used to show a reader text that is not signed.
		value, ok := strings.CutPrefix(string(line), "Hash: ")
		if !ok || !knownHashes(value) {
			return f, fmt.Errorf("%w: header %.60q", ErrMalformed, line)
		}
	}
	f.text = l.at
	for {
		f.end = l.at
		line, err = l.next()
		if err != nil {
			return f, truncated(err, "no signature after the text")
		}
		if bytes.HasPrefix(line, []byte(sigBegin)) {
			break
		}
		_, err = unescape(line)
		if err != nil {
			return f, err
		}
	}
	f.signature, err = readArmor(l.r, line)
	return f, err
}

// readArmor reads the signature, whose first line has been read, to the end of the message.
func readArmor(r io.Reader, line []byte) ([]byte, error) {
	sig := bytes.Clone(line)
	rest, err := io.ReadAll(io.LimitReader(r, MaxSignature+1))
	if err != nil {
		return nil, err
	}
	sig = append(sig, rest...)
	if len(sig) > MaxSignature {
		return nil, fmt.Errorf("%w: signature of over %d bytes", ErrMalformed, MaxSignature)
	}
	sig = bytes.TrimRight(sig, " \t\r\n")
	if !bytes.HasSuffix(sig, []byte("\n"+sigEnd)) || bytes.Count(sig, []byte("-----END")) != 1 {
		return nil, fmt.Errorf("%w: it does not end with one %q", ErrMalformed, sigEnd)
	}
	return sig, nil
}

// unescape returns what is signed of a line of the text.
func unescape(line []byte) ([]byte, error) {
	line, escaped := bytes.CutPrefix(line, []byte("- ")) // before blanks go: an empty line may be escaped too
	line = trimLine(line)
	if bytes.ContainsRune(line, '\r') || !escaped && bytes.HasPrefix(line, []byte("-")) {
		return nil, fmt.Errorf("%w: line %.60q", ErrMalformed, line)
	}
	return line, nil
}

// signedText reads the text as it was signed (section 7.2), and writes it down.
type signedText struct {
	lines *lines
	text  io.Writer
	later bool   // not the first line
	buf   []byte // for left
	left  []byte // to be read
}

func (s *signedText) Read(p []byte) (int, error) {
	for len(s.left) == 0 {
		line, err := s.lines.next()
		if err != nil {
			return 0, err
		}
		line, err = unescape(line)
		if err != nil {
			return 0, err
		}
		s.buf = s.buf[:0]
		if s.later {
			_, err = io.WriteString(s.text, "\n")
			s.buf = append(s.buf, "\r\n"...)
		}
		if err == nil {
			_, err = s.text.Write(line)
		}
		if err != nil {
			return 0, fmt.Errorf("writing the text: %w", err)
		}
		s.buf, s.later = append(s.buf, line...), true
		s.left = s.buf
	}
	n := copy(p, s.left)
	s.left = s.left[n:]
	return n, nil
}

// trimLine removes what is not signed: the line end, and trailing blanks.
func trimLine(line []byte) []byte {
	return bytes.TrimRight(bytes.TrimSuffix(bytes.TrimSuffix(line, []byte("\n")), []byte("\r")), " \t")
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
