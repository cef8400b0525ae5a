package p11rpc

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Message is a request or a response: a call, and its arguments or results.
type Message struct {
	Call   CallID
	Values []Value
}

var (
	errMalformed = errors.New("malformed message")
	// ErrUnknownCall says that a call has no number or signature that we know.
	ErrUnknownCall = errors.New("unknown call")
)

// ParseRequest decodes the body of a request. Bytes in it alias body.
func ParseRequest(body []byte) (Message, error) {
	m, err := parse(body, func(c call) string { return c.request })
	if err == nil && m.Call == errorCall {
		return Message{}, fmt.Errorf("%w: a request that is an error", ErrUnknownCall)
	}
	return m, err
}

// ParseResponse decodes the body of a response. One that is an error is returned as its RV.
func ParseResponse(body []byte) (Message, error) {
	m, err := parse(body, func(c call) string { return c.response })
	if err == nil && m.Call == errorCall {
		return m, RV(m.Values[0].Num)
	}
	return m, err
}

func parse(body []byte, of func(call) string) (Message, error) {
	id, sig, rest, err := parseHead(body)
	if err != nil {
		return Message{}, err
	}
	c, ok := calls[id]
	if !ok || of(c) != sig {
		return Message{}, fmt.Errorf("%w: %v with signature %q", ErrUnknownCall, id, sig)
	}
	values, err := parseValues(sig, rest)
	if err != nil {
		return Message{}, fmt.Errorf("%v: %w", id, err)
	}
	return Message{id, values}, nil
}

// parseHead reads what begins every body: the call and its signature.
func parseHead(body []byte) (id CallID, sig string, rest []byte, err error) {
	d := decoder{b: body}
	id = CallID(d.uint32())
	n := d.uint32()
	if n > maxSignature {
		d.fail("signature of %d bytes", n)
	}
	sig = string(d.take(n))
	return id, sig, d.b, d.err
}

// parseValues reads values by their signature, and nothing after them.
func parseValues(sig string, b []byte) ([]Value, error) {
	d := decoder{b: b}
	var out []Value
	for sig != "" && d.err == nil {
		kind, rest, err := nextKind(sig)
		if err != nil {
			return nil, err
		}
		out = append(out, d.value(kind, rest))
		sig = rest
	}
	if d.err == nil && len(d.b) > 0 {
		d.fail("%d bytes follow", len(d.b))
	}
	return out, d.err
}

// decoder reads from the front of b. After an error it gives zeros, and err stays.
type decoder struct {
	b          []byte
	err        error
	attributes int // read so far
}

func (d *decoder) fail(format string, args ...any) {
	if d.err == nil {
		d.err = fmt.Errorf("%w: %s", errMalformed, fmt.Sprintf(format, args...))
	}
	d.b = nil
}

func (d *decoder) take(n uint32) []byte {
	if d.err == nil && uint64(n) > uint64(len(d.b)) {
		d.fail("%d bytes where %d should be", len(d.b), n)
	}
	if d.err != nil {
		return nil
	}
	b := d.b[:n:n]
	d.b = d.b[n:]
	return b
}

func (d *decoder) uint8() uint8 {
	b := d.take(1)
	if len(b) == 0 {
		return 0
	}
	return b[0]
}

func (d *decoder) uint32() uint32 {
	b := d.take(4)
	if len(b) == 0 {
		return 0
	}
	return binary.BigEndian.Uint32(b)
}

func (d *decoder) uint64() uint64 {
	b := d.take(8)
	if len(b) == 0 {
		return 0
	}
	return binary.BigEndian.Uint64(b)
}

// flag reads a byte that has one form for each of its meanings.
func (d *decoder) flag() bool {
	b := d.uint8()
	if b > 1 {
		d.fail("flag %d", b)
	}
	return b == 1
}

// text reads a length and as many bytes; null is the length -1.
func (d *decoder) text() (b []byte, null bool) {
	n := d.uint32()
	if n == nullLength && d.err == nil {
		return nil, true
	}
	return d.take(n), false
}

// count reads a number of things that have at least size bytes each.
func (d *decoder) count(size int) int {
	n := d.uint32()
	if uint64(n)*uint64(size) > uint64(len(d.b)) {
		d.fail("%d elements in %d bytes", n, len(d.b))
	}
	if d.err != nil {
		return 0
	}
	return int(n)
}

func (d *decoder) numbers() []uint64 {
	list := make([]uint64, d.count(8))
	for i := range list {
		list[i] = d.uint64()
	}
	return list
}

// value reads one value; after is the signature of what follows it.
func (d *decoder) value(kind Kind, after string) Value {
	v := Value{Kind: kind}
	switch kind {
	case Byte:
		v.Num = uint64(d.uint8())
	case Ulong:
		v.Num = d.uint64()
	case Version:
		v.Num = uint64(d.uint8())<<8 | uint64(d.uint8())
	case Padded:
		v.Bytes = d.take(d.uint32())
	case Text:
		v.Bytes, v.Null = d.text()
	case Bytes:
		if v.Short = !d.flag(); v.Short {
			v.Num = uint64(d.uint32())
		} else {
			v.Bytes, v.Null = d.text()
		}
	case Ulongs:
		if v.Short = !d.flag(); v.Short {
			v.Num = uint64(d.uint32())
		} else {
			v.List = d.numbers()
		}
	case ByteRoom, UlongRoom:
		v.Num = uint64(d.uint32())
	case Attributes:
		v.Attributes = d.template(1)
	case Wanted:
		v.Wanted = d.wanted(1)
	case Mech:
		v.Mechanism = d.mechanism(after)
	default:
		d.fail("values of kind %q are not read", kind)
	}
	return v
}

// mechanism takes for the parameter what what follows it leaves. What follows must
// therefore be of fixed length, as it is in every call that begins an operation.
func (d *decoder) mechanism(after string) Mechanism {
	m := Mechanism{Type: uint64(d.uint32())}
	m.Null = m.Type == nullMechanism
	size := 0
	for after != "" {
		kind, rest, err := nextKind(after)
		if err != nil || fixedSize[kind] == 0 {
			d.fail("a mechanism before %q cannot be told from it", after)
			return m
		}
		size += fixedSize[kind]
		after = rest
	}
	n := len(d.b) - size
	if n < 0 || m.Null && n > 0 {
		d.fail("%d bytes for a mechanism's parameter", n)
		return m
	}
	m.Param = d.take(uint32(n))
	return m
}

var fixedSize = map[Kind]int{Byte: 1, Ulong: 8, Version: 2}

const (
	nullLength    = 1<<32 - 1
	nullMechanism = 1<<32 - 1

	minAttribute = 5 // bytes: a type, and that there is no value
	minWanted    = 8
)

// enter counts n attributes at a depth.
func (d *decoder) enter(n, depth int) bool {
	d.attributes += n
	if depth > maxDepth || d.attributes > MaxAttributes {
		d.fail("a template of %d attributes, %d deep", d.attributes, depth)
	}
	return d.err == nil
}

func (d *decoder) template(depth int) []Attribute {
	n := d.count(minAttribute)
	if !d.enter(n, depth) {
		return nil
	}
	out := make([]Attribute, 0, n)
	for range n {
		out = append(out, d.attribute(depth))
	}
	return out
}

func (d *decoder) attribute(depth int) Attribute {
	a := Attribute{Type: uint64(d.uint32())}
	a.Missing = !d.flag()
	if a.Missing || d.err != nil {
		return a
	}
	a.Len = d.uint32()
	switch ClassOf(a.Type) {
	case ClassByte:
		a.Num = uint64(d.uint8())
	case ClassUlong:
		a.Num = d.uint64()
	case ClassMechanisms:
		a.List = d.numbers()
	case ClassTemplate:
		a.Attributes = d.template(depth + 1)
	default:
		a.Bytes, a.Null = d.text()
		if !a.Null && uint64(len(a.Bytes)) != uint64(a.Len) {
			d.fail("attribute 0x%x of %d bytes says that it has %d", a.Type, len(a.Bytes), a.Len)
		}
	}
	return a
}

func (d *decoder) wanted(depth int) []WantedAttribute {
	n := d.count(minWanted)
	if !d.enter(n, depth) {
		return nil
	}
	out := make([]WantedAttribute, 0, n)
	for range n {
		w := WantedAttribute{Type: uint64(d.uint32()), Room: d.uint32()}
		if ClassOf(w.Type) == ClassTemplate && w.Room != 0 {
			w.Nested = d.wanted(depth + 1)
		}
		out = append(out, w)
	}
	return out
}
