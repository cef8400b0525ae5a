package worker

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// A frame is what the pipe carries, in either direction:
//
//	4 bytes  length of what follows, big-endian
//	1 byte   kind
//	4 bytes  number: an answer has that of its request
//	...      body
//
// Both ends are of the same binary, so there is no version.
type frame struct {
	kind   byte
	number uint32
	body   []byte // within the buffer that was parsed
}

const (
	lengthSize = 4
	headSize   = 1 + 4
	// maxBody bounds a frame: no request or answer has more than a few KiB.
	maxBody  = 64 << 10
	maxFrame = lengthSize + headSize + maxBody
)

// The kinds of frames.
const (
	kindHello       byte = iota + 1 // to the child, the first: hello
	kindAsk                         // its answer: hsm.Info; it would log in
	kindPIN                         // to the child, the answer to that: the PIN
	kindReady                       // it is logged in: hsm.Info
	kindSign                        // sign request; the answer is the signature
	kindSuspect                     // the same, of one that may have crashed a child: no answer is held over it
	kindUrgent                      // a sign request that goes before those that wait in the child, but for suspects
	kindPublic                      // an id; the answer is a public key
	kindPing                        // no body, nor has its answer
	kindGenerate                    // of an administrative child
	kindDelete                      // of an administrative child
	kindList                        // of an administrative child; the answer is parts, and one that is empty
	kindImport                      // of an administrative child; the answer is a public key
	kindCertificate                 // of an administrative child; the answer is empty
	kindPart                        // of an answer, which has more
	kindDone                        // an answer
	kindFailed                      // an answer: an error
	maxKind         = kindFailed
)

var errFrame = errors.New("malformed frame")

// appendFrame appends a frame whose body has at most maxBody bytes.
func appendFrame(dst []byte, kind byte, number uint32, body []byte) []byte {
	dst = binary.BigEndian.AppendUint32(dst, uint32(headSize+len(body)))
	dst = append(dst, kind)
	dst = binary.BigEndian.AppendUint32(dst, number)
	return append(dst, body...)
}

// parseFrame takes the first frame off b and returns its whole length: 0 where
// b does not hold all of it yet.
func parseFrame(b []byte) (f frame, n int, err error) {
	if len(b) < lengthSize {
		return frame{}, 0, nil
	}
	size := binary.BigEndian.Uint32(b)
	if size < headSize || size > headSize+maxBody {
		return frame{}, 0, fmt.Errorf("%w: length %d", errFrame, size)
	}
	n = lengthSize + int(size)
	if len(b) < n {
		return frame{}, 0, nil
	}
	f = frame{kind: b[lengthSize], number: binary.BigEndian.Uint32(b[lengthSize+1:]), body: b[lengthSize+headSize : n : n]}
	if f.kind == 0 || f.kind > maxKind {
		return frame{}, 0, fmt.Errorf("%w: kind %d", errFrame, f.kind)
	}
	return f, n, nil
}

// readFrame reads exactly one frame.
func readFrame(r io.Reader) (frame, error) {
	b := make([]byte, lengthSize, 512)
	if _, err := io.ReadFull(r, b); err != nil {
		return frame{}, err
	}
	size := binary.BigEndian.Uint32(b)
	if size > headSize+maxBody { // before it is allocated
		return frame{}, fmt.Errorf("%w: length %d", errFrame, size)
	}
	b = append(b, make([]byte, size)...)
	if _, err := io.ReadFull(r, b[lengthSize:]); err != nil {
		return frame{}, fmt.Errorf("reading a frame: %w", err)
	}
	f, n, err := parseFrame(b)
	if err == nil && n == 0 {
		err = errFrame
	}
	return f, err
}

// A decoder reads the fields of a body. Its error sticks, and is looked at
// once, by end.
type decoder struct {
	b   []byte
	bad bool
}

func (d *decoder) take(n int) []byte {
	if d.bad || n > len(d.b) {
		d.bad = true
		return nil
	}
	v := d.b[:n:n]
	d.b = d.b[n:]
	return v
}

func (d *decoder) byte() byte {
	if v := d.take(1); v != nil {
		return v[0]
	}
	return 0
}

func (d *decoder) uint16() uint16 {
	if v := d.take(2); v != nil {
		return binary.BigEndian.Uint16(v)
	}
	return 0
}

func (d *decoder) uint64() uint64 {
	if v := d.take(8); v != nil {
		return binary.BigEndian.Uint64(v)
	}
	return 0
}

// string reads 2 bytes of length and as many bytes.
func (d *decoder) bytes() []byte  { return d.take(int(d.uint16())) }
func (d *decoder) string() string { return string(d.bytes()) }

// bool is 0 or 1, so that what is encoded again is the same.
func (d *decoder) bool() bool {
	v := d.byte()
	d.bad = d.bad || v > 1
	return v == 1
}

// rest is what is left.
func (d *decoder) rest() []byte {
	if d.bad {
		return nil
	}
	return d.take(len(d.b))
}

// end refuses what is left over.
func (d *decoder) end(what string) error {
	if d.bad || len(d.b) > 0 {
		return fmt.Errorf("%w: %s", errFrame, what)
	}
	return nil
}

// maxString is what a length of two bytes can tell.
const maxString = 1<<16 - 1

func appendString[S []byte | string](dst []byte, s S) []byte {
	s = s[:min(len(s), maxString)]
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(s)))
	return append(dst, s...)
}

func appendBool(dst []byte, v bool) []byte {
	if v {
		return append(dst, 1)
	}
	return append(dst, 0)
}
