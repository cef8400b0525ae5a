package p11rpc

import (
	"errors"
	"fmt"
)

// Kind is the type of a value on the wire, by the letters that signatures have for it.
type Kind string

// The kinds. An integer is big-endian.
const (
	Byte       Kind = "y"  // Num
	Ulong      Kind = "u"  // Num: a CK_ULONG, 8 bytes
	Version    Kind = "v"  // Num: major in the high byte, minor in the low
	Padded     Kind = "s"  // Bytes: text of fixed length, padded with blanks
	Text       Kind = "z"  // Bytes, or Null
	Bytes      Kind = "ay" // Bytes or Null, or only their length: Num
	ByteRoom   Kind = "fy" // Num: the room that the caller has for bytes
	Ulongs     Kind = "au" // List, or only their count: Num
	UlongRoom  Kind = "fu" // Num: the room that the caller has for numbers
	Attributes Kind = "aA" // Attributes
	Wanted     Kind = "fA" // Wanted: attributes that are asked for
	Mech       Kind = "M"  // Mechanism

	updatedMechanism Kind = "P" // of a response that we never send
)

// NullRoom is the room of a pointer that is not NULL and has no space behind it; that
// of a NULL pointer, which asks for the length, is 0.
const NullRoom = 1<<32 - 1

// Value is one argument or result. Which fields count depends on Kind.
type Value struct {
	Kind       Kind
	Num        uint64
	Bytes      []byte
	Null       bool // no bytes: the pointer is NULL
	Short      bool // of Bytes and Ulongs: there is only a length, Num
	List       []uint64
	Attributes []Attribute
	Wanted     []WantedAttribute
	Mechanism  Mechanism
}

// Attribute is a CK_ATTRIBUTE. Its class, by which its value is written, follows from
// its type.
type Attribute struct {
	Type    uint64
	Missing bool   // ulValueLen is -1: there is no value
	Len     uint32 // ulValueLen as its sender counts it: a CK_ULONG has 4 in a 32-bit process

	Num        uint64      // of class ClassByte or ClassUlong
	Bytes      []byte      // of ClassBytes
	Null       bool        // of ClassBytes: pValue is NULL
	List       []uint64    // of ClassMechanisms
	Attributes []Attribute // of ClassTemplate
}

// WantedAttribute is an attribute that is asked for, and the room for it; 0 asks
// for the length.
type WantedAttribute struct {
	Type   uint64
	Room   uint32
	Nested []WantedAttribute // of a template with room (0.25.4)
}

// Mechanism is a CK_MECHANISM, with its parameter as it came: which form that
// has, the client does not tell. See PSS.
type Mechanism struct {
	Type  uint64
	Null  bool   // the pointer is NULL, which cancels an operation (0.25.3)
	Param []byte // on the wire
}

// PSSParams is a CK_RSA_PKCS_PSS_PARAMS.
type PSSParams struct {
	Hash, MGF, SaltLen uint64
}

var errParam = errors.New("no known form of a mechanism's parameter")

// PSS returns the parameter of a mechanism that takes that of PSS, or none.
//
// Clients up to 0.25.5 write a missing parameter as the length of a byte array
// (-1, or 0 where the pointer is not NULL), and that of PSS bare; those from
// 0.25.6 write nothing, or a byte that says whether a parameter follows. They do
// so whatever version was settled on, so the length has to tell the forms apart.
func (m Mechanism) PSS() (p PSSParams, ok bool, err error) {
	b := m.Param
	switch {
	case len(b) == 0, len(b) == 1 && b[0] == 0:
		return p, false, nil
	case string(b) == "\xff\xff\xff\xff" || string(b) == "\x00\x00\x00\x00":
		return p, false, nil
	case len(b) == 25 && b[0] == 1:
		b = b[1:]
	case len(b) != 24:
		return p, false, fmt.Errorf("%w: %d bytes", errParam, len(b))
	}
	d := decoder{b: b}
	return PSSParams{d.uint64(), d.uint64(), d.uint64()}, true, nil
}

// Class is how the value of an attribute is written.
type Class int

// The classes.
const (
	ClassBytes Class = iota // of every type that p11-kit does not know
	ClassByte
	ClassUlong
	ClassMechanisms
	ClassTemplate
)

// ClassOf is the class of an attribute type. The table is p11-kit's, with its
// gaps: CKA_DESTROYABLE (0x172) is a boolean, and is written as bytes.
func ClassOf(attribute uint64) Class { return classes[attribute] }

var classes = map[uint64]Class{
	0x001: ClassByte, 0x002: ClassByte, 0x086: ClassByte, // token, private, trusted
	0x103: ClassByte, 0x104: ClassByte, 0x105: ClassByte, 0x106: ClassByte, // sensitive, encrypt, decrypt, wrap
	0x107: ClassByte, 0x108: ClassByte, 0x109: ClassByte, 0x10a: ClassByte, // unwrap, sign, sign recover, verify
	0x10b: ClassByte, 0x10c: ClassByte, 0x162: ClassByte, 0x163: ClassByte, // verify recover, derive, extractable, local
	0x164: ClassByte, 0x165: ClassByte, 0x170: ClassByte, 0x171: ClassByte, // never ext., always sens., modifiable, copyable
	0x200: ClassByte, 0x202: ClassByte, 0x210: ClassByte, // secondary auth, always authenticate, wrap with trusted
	0x301: ClassByte, 0x302: ClassByte, 0x406: ClassByte, // reset on init, has reset, color

	0x000: ClassUlong, 0x080: ClassUlong, 0x087: ClassUlong, 0x088: ClassUlong, // class, cert. type, cert. category, MIDP
	0x100: ClassUlong, 0x121: ClassUlong, 0x133: ClassUlong, 0x134: ClassUlong, // key type, bits of modulus, prime, sub-prime
	0x160: ClassUlong, 0x161: ClassUlong, 0x166: ClassUlong, 0x201: ClassUlong, // value bits, value length, gen. mechanism, PIN flags
	0x300: ClassUlong, 0x400: ClassUlong, 0x401: ClassUlong, 0x402: ClassUlong, // hardware feature type, display
	0x403: ClassUlong, 0x404: ClassUlong, 0x405: ClassUlong, 0x500: ClassUlong, // display, mechanism type

	0x40000600: ClassMechanisms,                                                     // allowed mechanisms
	0x40000211: ClassTemplate, 0x40000212: ClassTemplate, 0x40000213: ClassTemplate, // wrap, unwrap, derive
}

// nextKind takes the first kind off a signature.
func nextKind(sig string) (Kind, string, error) {
	n := 1
	if sig[0] == 'a' || sig[0] == 'f' {
		n = 2
	}
	if len(sig) >= n {
		switch k := Kind(sig[:n]); k {
		case Byte, Ulong, Version, Padded, Text, Bytes, ByteRoom, Ulongs, UlongRoom, Attributes, Wanted, Mech, updatedMechanism:
			return k, sig[n:], nil
		}
	}
	return "", "", fmt.Errorf("signature %q has an unknown letter", sig)
}

// U is the value of a CK_ULONG.
func U(n uint64) Value { return Value{Kind: Ulong, Num: n} }

// V is the value of a CK_VERSION.
func V(major, minor byte) Value {
	return Value{Kind: Version, Num: uint64(major)<<8 | uint64(minor)}
}

// S is a text cut or padded with blanks to n bytes.
func S(text string, n int) Value {
	b := make([]byte, n)
	for i := copy(b, text); i < n; i++ {
		b[i] = ' '
	}
	return Value{Kind: Padded, Bytes: b}
}

// B is the value of bytes.
func B(b []byte) Value { return Value{Kind: Bytes, Bytes: b} }

// Length is what is answered for bytes where only their length was asked for, or the room
// is too small. The client finds out which.
func Length(n int) Value { return Value{Kind: Bytes, Short: true, Num: uint64(n)} }

// List is numbers where there is room for them, and else their count.
func List(list []uint64, room uint64) Value {
	if room < uint64(len(list)) || room == 0 {
		return Value{Kind: Ulongs, Short: true, Num: uint64(len(list))}
	}
	return Value{Kind: Ulongs, List: list}
}
