package p11rpc

import (
	"encoding/binary"
	"fmt"
)

// AppendRequest appends the body of a request.
func (m Message) AppendRequest(b []byte) ([]byte, error) {
	return m.append(b, calls[m.Call].request)
}

// AppendResponse appends the body of a response.
func (m Message) AppendResponse(b []byte) ([]byte, error) {
	return m.append(b, calls[m.Call].response)
}

// appendError appends the body of a response that is an error. CKR_OK is none.
func appendError(b []byte, rv RV) []byte {
	if rv == 0 {
		rv = GeneralError
	}
	b = appendHead(b, errorCall, "u")
	return binary.BigEndian.AppendUint64(b, uint64(rv))
}

func appendHead(b []byte, id CallID, sig string) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(id))
	return appendText(b, []byte(sig))
}

func appendText(b, text []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(text)))
	return append(b, text...)
}

func (m Message) append(b []byte, sig string) ([]byte, error) {
	b = appendHead(b, m.Call, sig)
	for _, v := range m.Values {
		if sig == "" {
			return nil, fmt.Errorf("%v: %d values are too many", m.Call, len(m.Values))
		}
		kind, rest, err := nextKind(sig)
		if err == nil && kind != v.Kind {
			err = fmt.Errorf("a value of kind %q where %q should be", v.Kind, kind)
		}
		if err == nil {
			b, err = v.append(b)
		}
		if err != nil {
			return nil, fmt.Errorf("%v: %w", m.Call, err)
		}
		sig = rest
	}
	if sig != "" {
		return nil, fmt.Errorf("%v: values of %q are missing", m.Call, sig)
	}
	return b, nil
}

func appendFlag(b []byte, set bool) []byte {
	if set {
		return append(b, 1)
	}
	return append(b, 0)
}

func appendBytes(b, text []byte, null bool) []byte {
	if null {
		return binary.BigEndian.AppendUint32(b, nullLength)
	}
	return appendText(b, text)
}

func appendNumbers(b []byte, list []uint64) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(list)))
	for _, n := range list {
		b = binary.BigEndian.AppendUint64(b, n)
	}
	return b
}

func (v Value) append(b []byte) ([]byte, error) {
	be := binary.BigEndian
	switch v.Kind {
	case Byte:
		return append(b, byte(v.Num)), nil
	case Ulong:
		return be.AppendUint64(b, v.Num), nil
	case Version:
		return be.AppendUint16(b, uint16(v.Num)), nil
	case Padded:
		return appendText(b, v.Bytes), nil
	case Text:
		return appendBytes(b, v.Bytes, v.Null), nil
	case Bytes:
		b = appendFlag(b, !v.Short)
		if v.Short {
			return be.AppendUint32(b, uint32(v.Num)), nil
		}
		return appendBytes(b, v.Bytes, v.Null), nil
	case Ulongs:
		b = appendFlag(b, !v.Short)
		if v.Short {
			return be.AppendUint32(b, uint32(v.Num)), nil
		}
		return appendNumbers(b, v.List), nil
	case ByteRoom, UlongRoom:
		return be.AppendUint32(b, uint32(v.Num)), nil
	case Attributes:
		return appendTemplate(b, v.Attributes), nil
	case Wanted:
		return appendWanted(b, v.Wanted), nil
	case Mech:
		return append(be.AppendUint32(b, uint32(v.Mechanism.Type)), v.Mechanism.Param...), nil
	}
	return nil, fmt.Errorf("values of kind %q are not written", v.Kind)
}

func appendTemplate(b []byte, list []Attribute) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(list)))
	for _, a := range list {
		b = binary.BigEndian.AppendUint32(b, uint32(a.Type))
		b = appendFlag(b, !a.Missing)
		if a.Missing {
			continue
		}
		b = binary.BigEndian.AppendUint32(b, a.Len)
		switch ClassOf(a.Type) {
		case ClassByte:
			b = append(b, byte(a.Num))
		case ClassUlong:
			b = binary.BigEndian.AppendUint64(b, a.Num)
		case ClassMechanisms:
			b = appendNumbers(b, a.List)
		case ClassTemplate:
			b = appendTemplate(b, a.Attributes)
		default:
			b = appendBytes(b, a.Bytes, a.Null)
		}
	}
	return b
}

func appendWanted(b []byte, list []WantedAttribute) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(list)))
	for _, w := range list {
		b = binary.BigEndian.AppendUint32(b, uint32(w.Type))
		b = binary.BigEndian.AppendUint32(b, w.Room)
		if ClassOf(w.Type) == ClassTemplate && w.Room != 0 {
			b = appendWanted(b, w.Nested)
		}
	}
	return b
}
