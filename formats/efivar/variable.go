package efivar

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"
)

// A GUID is an EFI_GUID as it lies in memory (appendix A): its first three fields little-endian.
type GUID [16]byte

// ParseGUID reads the form 8be4df61-93ca-11d2-aa0d-00e098032b8c, in either case.
func ParseGUID(s string) (GUID, error) {
	var g GUID
	digits := strings.ReplaceAll(s, "-", "")
	b, err := hex.DecodeString(digits)
	if err != nil || len(b) != len(g) || len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return GUID{}, fmt.Errorf("%w: GUID %q", ErrMalformed, s)
	}
	binary.LittleEndian.PutUint32(g[:], binary.BigEndian.Uint32(b))
	binary.LittleEndian.PutUint16(g[4:], binary.BigEndian.Uint16(b[4:]))
	binary.LittleEndian.PutUint16(g[6:], binary.BigEndian.Uint16(b[6:]))
	copy(g[8:], b[8:])
	return g, nil
}

func mustGUID(s string) GUID {
	g, err := ParseGUID(s)
	if err != nil {
		panic(err)
	}
	return g
}

// String returns the GUID in lower case.
func (g GUID) String() string {
	le := binary.LittleEndian
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", le.Uint32(g[:]), le.Uint16(g[4:]), le.Uint16(g[6:]), g[8:10], g[10:])
}

// The vendor GUIDs of the variables (sections 3.3 and 32.6.1).
var (
	globalVariable   = mustGUID("8be4df61-93ca-11d2-aa0d-00e098032b8c")
	securityDatabase = mustGUID("d719b2cb-3d3a-4596-a3bc-dad00e67656f")
)

// A Variable is what a variable is called, which its signature covers.
type Variable struct {
	Name   string
	Vendor GUID
}

// The variables of Secure Boot.
var (
	PK  = Variable{"PK", globalVariable}
	KEK = Variable{"KEK", globalVariable}
	DB  = Variable{"db", securityDatabase}
	DBX = Variable{"dbx", securityDatabase}
)

// Lookup returns the variable of that name, which is PK, KEK, db or dbx.
func Lookup(name string) (Variable, bool) {
	for _, v := range []Variable{PK, KEK, DB, DBX} {
		if v.Name == name {
			return v, true
		}
	}
	return Variable{}, false
}

// Attributes of a variable (section 8.2.1).
const (
	NonVolatile       uint32 = 0x01
	BootServiceAccess uint32 = 0x02
	RuntimeAccess     uint32 = 0x04
	TimeBasedAuth     uint32 = 0x20
	AppendWrite       uint32 = 0x40

	// Replacing is what an update has that sets a Secure Boot variable, 0x27, and Appending, 0x67, one that adds to
	// it. Whoever writes the variable must pass the same, or firmware refuses the signature.
	Replacing = NonVolatile | BootServiceAccess | RuntimeAccess | TimeBasedAuth
	Appending = Replacing | AppendWrite
)

func checkAttributes(a uint32) error {
	if a&^Appending != 0 || a&TimeBasedAuth == 0 {
		return fmt.Errorf("%w: attributes %#x", ErrMalformed, a)
	}
	return nil
}
