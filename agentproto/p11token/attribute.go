package p11token

import (
	"bytes"
	"context"
	"crypto/rsa"
	"crypto/sha1"
	"encoding/asn1"
	"math/big"

	"github.com/signwarden/signwarden/agentproto/p11rpc"
)

// Types of attributes.
const (
	ckaClass               = 0x000
	ckaToken               = 0x001
	ckaPrivate             = 0x002
	ckaLabel               = 0x003
	ckaValue               = 0x011
	ckaCertificateType     = 0x080
	ckaIssuer              = 0x081
	ckaSerialNumber        = 0x082
	ckaTrusted             = 0x086
	ckaCertificateCategory = 0x087
	ckaCheckValue          = 0x090
	ckaKeyType             = 0x100
	ckaSubject             = 0x101
	ckaID                  = 0x102
	ckaSensitive           = 0x103
	ckaEncrypt             = 0x104
	ckaDecrypt             = 0x105
	ckaWrap                = 0x106
	ckaUnwrap              = 0x107
	ckaSign                = 0x108
	ckaSignRecover         = 0x109
	ckaVerify              = 0x10a
	ckaVerifyRecover       = 0x10b
	ckaDerive              = 0x10c
	ckaStartDate           = 0x110
	ckaEndDate             = 0x111
	ckaModulus             = 0x120
	ckaModulusBits         = 0x121
	ckaPublicExponent      = 0x122
	ckaPrivateExponent     = 0x123
	ckaCoefficient         = 0x128
	ckaPublicKeyInfo       = 0x129
	ckaExtractable         = 0x162
	ckaNeverExtractable    = 0x164
	ckaAlwaysSensitive     = 0x165
	ckaModifiable          = 0x170
	ckaCopyable            = 0x171
	ckaDestroyable         = 0x172
	ckaECParams            = 0x180
	ckaECPoint             = 0x181
	ckaAlwaysAuthenticate  = 0x202
	ckaWrapWithTrusted     = 0x210
)

// getter is the value of an attribute; ok is false where the object has none such.
type getter func(o *object) (a p11rpc.Attribute, ok bool)

// attributes has for each class of objects what can be read of them.
var attributes = map[uint64]map[uint64]getter{
	ckoPrivateKey: with(keyAttributes, map[uint64]getter{
		ckaSensitive:          flag(true),
		ckaAlwaysSensitive:    flag(true),
		ckaExtractable:        flag(false),
		ckaNeverExtractable:   flag(true),
		ckaAlwaysAuthenticate: flag(false), // libp11 asks for it before each signature
		ckaWrapWithTrusted:    flag(false),
		ckaSign:               flag(true),
		ckaSignRecover:        flag(false),
		ckaDecrypt:            flag(false),
		ckaUnwrap:             flag(false),
	}),
	ckoPublicKey: with(keyAttributes, map[uint64]getter{
		ckaVerify:        flag(true), // the key is good for it; tools verify by themselves
		ckaVerifyRecover: flag(false),
		ckaEncrypt:       flag(false),
		ckaWrap:          flag(false),
		ckaTrusted:       flag(false),
		ckaModulusBits:   modulusBits,
		ckaECPoint:       func(o *object) (p11rpc.Attribute, bool) { return octets(o.key.point), o.key.point != nil },
	}),
	ckoCertificate: with(commonAttributes, map[uint64]getter{
		ckaCertificateType:     number(0), // CKC_X_509
		ckaCertificateCategory: category,
		ckaTrusted:             flag(false),
		ckaValue:               func(o *object) (p11rpc.Attribute, bool) { return octets(o.cert.Raw), true },
		ckaSubject:             func(o *object) (p11rpc.Attribute, bool) { return octets(o.cert.RawSubject), true },
		ckaIssuer:              func(o *object) (p11rpc.Attribute, bool) { return octets(o.cert.RawIssuer), true },
		ckaSerialNumber:        serialNumber,
		ckaCheckValue:          checkValue,
		ckaStartDate: func(o *object) (p11rpc.Attribute, bool) {
			return octets([]byte(o.cert.NotBefore.UTC().Format("20060102"))), true
		},
		ckaEndDate: func(o *object) (p11rpc.Attribute, bool) {
			return octets([]byte(o.cert.NotAfter.UTC().Format("20060102"))), true
		},
		ckaPublicKeyInfo: func(o *object) (p11rpc.Attribute, bool) { return octets(o.cert.RawSubjectPublicKeyInfo), true },
	}),
}

var commonAttributes = map[uint64]getter{
	ckaClass:       func(o *object) (p11rpc.Attribute, bool) { return ulong(o.class), true },
	ckaToken:       flag(true),
	ckaPrivate:     flag(false), // else tools look for keys only after a login
	ckaModifiable:  flag(false),
	ckaCopyable:    flag(false),
	ckaDestroyable: func(*object) (p11rpc.Attribute, bool) { return octets([]byte{0}), true },
	ckaLabel:       func(o *object) (p11rpc.Attribute, bool) { return octets([]byte(o.label)), true },
	ckaID:          func(o *object) (p11rpc.Attribute, bool) { return octets(o.id), true },
}

// keyAttributes are those of private and public keys alike. The private key has the
// public numbers too: libp11 reads them there.
var keyAttributes = with(commonAttributes, map[uint64]getter{
	ckaKeyType:        func(o *object) (p11rpc.Attribute, bool) { return ulong(o.key.keyType), true },
	ckaDerive:         flag(false),
	ckaSubject:        subject,
	ckaModulus:        modulus,
	ckaPublicExponent: publicExponent,
	ckaECParams:       func(o *object) (p11rpc.Attribute, bool) { return octets(o.key.params), o.key.params != nil },
	ckaPublicKeyInfo:  func(o *object) (p11rpc.Attribute, bool) { return octets(o.key.spki), true },
})

func with(base, more map[uint64]getter) map[uint64]getter {
	out := make(map[uint64]getter, len(base)+len(more))
	for _, m := range []map[uint64]getter{base, more} {
		for typ, get := range m {
			out[typ] = get
		}
	}
	return out
}

func octets(b []byte) p11rpc.Attribute { return p11rpc.Attribute{Len: uint32(len(b)), Bytes: b} }

func ulong(n uint64) p11rpc.Attribute { return p11rpc.Attribute{Len: 8, Num: n} }

func flag(set bool) getter {
	a := p11rpc.Attribute{Len: 1}
	if set {
		a.Num = 1
	}
	return func(*object) (p11rpc.Attribute, bool) { return a, true }
}

func number(n uint64) getter {
	return func(*object) (p11rpc.Attribute, bool) { return ulong(n), true }
}

func subject(o *object) (p11rpc.Attribute, bool) {
	if o.cert == nil {
		return p11rpc.Attribute{}, false
	}
	return octets(o.cert.RawSubject), true
}

func modulus(o *object) (p11rpc.Attribute, bool) {
	pub, ok := o.key.public.(*rsa.PublicKey)
	if !ok {
		return p11rpc.Attribute{}, false
	}
	return octets(pub.N.Bytes()), true
}

func modulusBits(o *object) (p11rpc.Attribute, bool) {
	pub, ok := o.key.public.(*rsa.PublicKey)
	if !ok {
		return p11rpc.Attribute{}, false
	}
	return ulong(uint64(pub.N.BitLen())), true
}

func publicExponent(o *object) (p11rpc.Attribute, bool) {
	pub, ok := o.key.public.(*rsa.PublicKey)
	if !ok {
		return p11rpc.Attribute{}, false
	}
	return octets(big.NewInt(int64(pub.E)).Bytes()), true
}

// category is token user or authority (PKCS#11 v2.40, section 4.6.2).
func category(o *object) (p11rpc.Attribute, bool) {
	if o.key == nil {
		return ulong(2), true
	}
	return ulong(1), true
}

func serialNumber(o *object) (p11rpc.Attribute, bool) {
	der, err := asn1.Marshal(o.cert.SerialNumber)
	return octets(der), err == nil
}

// checkValue is by its definition made with SHA-1; it is no signature.
func checkValue(o *object) (p11rpc.Attribute, bool) {
	sum := sha1.Sum(o.cert.Raw)
	return octets(sum[:3]), true
}

// read returns an attribute, or why there is none: it is a secret, or the object has none such.
func (o *object) read(typ uint64) (p11rpc.Attribute, p11rpc.RV) {
	if o.class == ckoPrivateKey && (typ == ckaValue || typ >= ckaPrivateExponent && typ <= ckaCoefficient) {
		return p11rpc.Attribute{}, ckrAttributeSensitive
	}
	get := attributes[o.class][typ]
	if get != nil {
		a, ok := get(o)
		if ok {
			a.Type = typ
			return a, 0
		}
	}
	return p11rpc.Attribute{}, ckrAttributeTypeInvalid
}

// room32 is the room of a CK_ULONG in a 32-bit client.
const room32 = 4

// fits reports whether a client has room for an attribute. Room 0 asks for the length,
// which it takes from the value.
func fits(a p11rpc.Attribute, room uint32) bool {
	if p11rpc.ClassOf(a.Type) == p11rpc.ClassUlong {
		return room == 0 || room >= room32
	}
	return room == 0 || room != p11rpc.NullRoom && room >= a.Len
}

// getAttributeValue answers each attribute that is asked for, in order, and one CK_RV for all.
func (c *conn) getAttributeValue(_ context.Context, s *session, args []p11rpc.Value) ([]p11rpc.Value, error) {
	o := c.seenObject(s, args[0].Num)
	if o == nil {
		return nil, ckrObjectHandleInvalid
	}
	var list []p11rpc.Attribute
	var all p11rpc.RV
	for _, w := range args[1].Wanted {
		a, rv := o.read(w.Type)
		if rv == 0 && !fits(a, w.Room) {
			rv = ckrBufferTooSmall
		}
		if rv != 0 {
			a, all = p11rpc.Attribute{Type: w.Type, Missing: true}, rv
		}
		list = append(list, a)
	}
	return []p11rpc.Value{{Kind: p11rpc.Attributes, Attributes: list}, p11rpc.U(uint64(all))}, nil
}

// matches reports whether an object has every attribute of a template, with its value.
func (o *object) matches(template []p11rpc.Attribute) bool {
	for _, want := range template {
		got, rv := o.read(want.Type)
		if rv != 0 || want.Missing || !equal(got, want) {
			return false
		}
	}
	return true
}

func equal(got, want p11rpc.Attribute) bool {
	switch p11rpc.ClassOf(want.Type) {
	case p11rpc.ClassByte:
		return want.Len == got.Len && (got.Num != 0) == (want.Num != 0)
	case p11rpc.ClassUlong:
		return (want.Len == got.Len || want.Len == room32) && got.Num == want.Num
	case p11rpc.ClassBytes:
		return bytes.Equal(got.Bytes, want.Bytes)
	}
	return false // we have no arrays
}

// findObjectsInit finds at once what FindObjects then gives out.
func (c *conn) findObjectsInit(ctx context.Context, s *session, args []p11rpc.Value) ([]p11rpc.Value, error) {
	if s.searching {
		return nil, ckrOperationActive
	}
	v, err := c.look(ctx)
	if err != nil {
		return nil, err
	}
	s.searching, s.found = true, nil
	for _, o := range v.objects {
		if o.slot == s.slot.id && o.matches(args[0].Attributes) {
			s.found = append(s.found, o.handle)
		}
	}
	return nil, nil
}

func (c *conn) findObjects(_ context.Context, s *session, args []p11rpc.Value) ([]p11rpc.Value, error) {
	if !s.searching {
		return nil, ckrOperationNotInitialized
	}
	n := min(args[0].Num, uint64(len(s.found)))
	list := s.found[:n]
	s.found = s.found[n:]
	return []p11rpc.Value{{Kind: p11rpc.Ulongs, List: list}}, nil
}

func (c *conn) findObjectsFinal(_ context.Context, s *session, _ []p11rpc.Value) ([]p11rpc.Value, error) {
	if !s.searching {
		return nil, ckrOperationNotInitialized
	}
	s.searching, s.found = false, nil
	return nil, nil
}
