package p11rpc

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
)

// header begins a frame: which request it is, or answers, and how much follows.
type header struct {
	code          uint32 // not 0
	options, body uint32 // lengths
}

const headerSize = 12

func readHeader(r io.Reader) (header, error) {
	var b [headerSize]byte
	_, err := io.ReadFull(r, b[:])
	if err != nil {
		return header{}, err
	}
	h := header{
		code:    binary.BigEndian.Uint32(b[0:]),
		options: binary.BigEndian.Uint32(b[4:]),
		body:    binary.BigEndian.Uint32(b[8:]),
	}
	if h.code == 0 || h.options > maxOptions || h.body > maxSkip {
		return h, fmt.Errorf("%w: frame with number %d, options of %d bytes and a body of %d", errMalformed, h.code, h.options, h.body)
	}
	return h, nil
}

// appendHeader appends the header of a frame without options.
func appendHeader(b []byte, code uint32, body int) []byte {
	b = binary.BigEndian.AppendUint32(b, code)
	b = binary.BigEndian.AppendUint32(b, 0)
	return binary.BigEndian.AppendUint32(b, uint32(body))
}

// atOnce is how much is allocated for a body on the word of its header.
const atOnce = 16 << 10

// readBody reads past the options and returns the body. For a long one memory grows
// with what arrives, not with what was announced.
func readBody(r io.Reader, h header) ([]byte, error) {
	err := skip(r, h.options)
	if err != nil {
		return nil, err
	}
	if h.body <= atOnce {
		b := make([]byte, h.body)
		_, err := io.ReadFull(r, b)
		return b, noEOF(err)
	}
	var b bytes.Buffer
	n, err := io.CopyN(&b, r, int64(h.body))
	if err == io.EOF {
		err = fmt.Errorf("%w after %d of %d bytes", io.ErrUnexpectedEOF, n, h.body)
	}
	return b.Bytes(), err
}

func skip(r io.Reader, n uint32) error {
	_, err := io.CopyN(io.Discard, r, int64(n))
	return noEOF(err)
}

// noEOF is for the end of the input where it may not be.
func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
