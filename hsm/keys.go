package hsm

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/asn1"
	"encoding/binary"
	"fmt"
	"math/big"
	"slices"

	"github.com/miekg/pkcs11"
)

// A key is a private key's handle and what signing with it needs to know.
type key struct {
	handle pkcs11.ObjectHandle
	epoch  uint64 // in which the handle is good
	typ    uint   // CKK_RSA, CKK_EC, ckkECEdwards
	size   int    // bytes of an RSA modulus or of a curve's order
}

// A curve is one we know, by its CKA_EC_PARAMS.
type curve struct {
	algorithm string // Generate's name of it
	typ       uint
	size      int // bytes of the order
	params    [][]byte
	nist      elliptic.Curve // nil for Ed25519
}

var curves = []curve{
	{"p256", pkcs11.CKK_EC, 32, [][]byte{{0x06, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7}}, elliptic.P256()},
	{"p384", pkcs11.CKK_EC, 48, [][]byte{{0x06, 5, 0x2b, 0x81, 4, 0, 0x22}}, elliptic.P384()},
	// RFC 8410's id-Ed25519 is what we ask for; PKCS#11 3.0 also allows the
	// name as a PrintableString. SoftHSM 2.6.1 generates with either, and gives
	// back the one it was asked with.
	{"ed25519", ckkECEdwards, 32, [][]byte{{0x06, 3, 0x2b, 0x65, 0x70}, append([]byte{0x13, 12}, "edwards25519"...)}, nil},
}

func curveOf(typ uint, params []byte) (curve, error) {
	for _, c := range curves {
		if c.typ == typ && slices.ContainsFunc(c.params, func(p []byte) bool { return bytes.Equal(p, params) }) {
			return c, nil
		}
	}
	return curve{}, refuse("key", "curve with CKA_EC_PARAMS %x is not one of P-256, P-384, Ed25519", params)
}

// key returns the private key of an id, found once an epoch: a search costs
// SoftHSM 20 to 45 µs for each object of the token.
func (w *worker) key(id []byte) (key, error) {
	p := w.p
	p.keysMu.RLock()
	k, ok := p.keys[string(id)]
	p.keysMu.RUnlock()
	if ok && k.epoch == w.epoch {
		return k, nil
	}
	k, err := w.findKey(id)
	if err != nil {
		return key{}, err
	}
	p.keysMu.Lock()
	p.keys[string(id)] = k
	p.keysMu.Unlock()
	return k, nil
}

func (p *Pool) forget(id []byte) {
	p.keysMu.Lock()
	defer p.keysMu.Unlock()
	delete(p.keys, string(id))
}

func (w *worker) findKey(id []byte) (key, error) {
	h, err := w.only(id, pkcs11.CKO_PRIVATE_KEY)
	if err != nil {
		return key{}, err
	}
	typ, err := w.number(h, pkcs11.CKA_KEY_TYPE)
	if err != nil {
		return key{}, err
	}
	k := key{handle: h, epoch: w.epoch, typ: typ}
	switch typ {
	case pkcs11.CKK_RSA:
		n, err := w.attribute(h, pkcs11.CKA_MODULUS)
		if err != nil {
			return key{}, err
		}
		k.size = len(bytes.TrimLeft(n, "\x00"))
	case pkcs11.CKK_EC, ckkECEdwards:
		params, err := w.attribute(h, pkcs11.CKA_EC_PARAMS)
		if err != nil {
			return key{}, err
		}
		c, err := curveOf(typ, params)
		if err != nil {
			return key{}, err
		}
		k.size = c.size
	default:
		return key{}, refuse("key", "CKA_KEY_TYPE 0x%X is not one of RSA, EC, EC_EDWARDS", typ)
	}
	return k, nil
}

// only returns the one object of this class and id.
func (w *worker) only(id []byte, class uint) (pkcs11.ObjectHandle, error) {
	hs, err := w.find(pkcs11.NewAttribute(pkcs11.CKA_CLASS, class), pkcs11.NewAttribute(pkcs11.CKA_ID, id))
	switch {
	case err != nil:
		return 0, err
	case len(hs) > 1:
		return 0, refuse("key", "%d keys of one kind share the id %x: which one is meant cannot be told", len(hs), id)
	case len(hs) == 1:
		return hs[0], nil
	}
	// A token does not refuse a search when the login is lost: it finds no
	// private object. So make sure before we say that there is none.
	in, err := w.p.loggedIn(w.sh)
	if err != nil {
		return 0, err
	}
	if !in {
		return 0, &Error{Op: "C_FindObjects", Code: pkcs11.CKR_USER_NOT_LOGGED_IN, Class: ClassLogin}
	}
	return 0, fmt.Errorf("key %x: %w", id, ErrNotFound)
}

// maxFound bounds a search; we never look for more than the halves of one key
// and what may clash with them.
const maxFound = 16

func (w *worker) find(t ...*pkcs11.Attribute) ([]pkcs11.ObjectHandle, error) {
	if err := w.p.api.FindObjectsInit(w.sh, t); err != nil {
		return nil, w.p.profile.fail("C_FindObjectsInit", err)
	}
	hs, _, err := w.p.api.FindObjects(w.sh, maxFound)
	ferr := w.p.api.FindObjectsFinal(w.sh)
	if err != nil {
		return nil, w.p.profile.fail("C_FindObjects", err)
	}
	return hs, w.p.profile.fail("C_FindObjectsFinal", ferr)
}

func (w *worker) attribute(h pkcs11.ObjectHandle, a uint) ([]byte, error) {
	as, err := w.p.api.GetAttributeValue(w.sh, h, []*pkcs11.Attribute{pkcs11.NewAttribute(a, nil)})
	if err != nil {
		return nil, w.p.profile.fail("C_GetAttributeValue", err)
	}
	return as[0].Value, nil
}

// number reads a CK_ULONG, which is in the machine's order.
func (w *worker) number(h pkcs11.ObjectHandle, a uint) (uint, error) {
	b, err := w.attribute(h, a)
	switch {
	case err != nil:
		return 0, err
	case len(b) == 8:
		return uint(binary.NativeEndian.Uint64(b)), nil
	case len(b) == 4:
		return uint(binary.NativeEndian.Uint32(b)), nil
	}
	return 0, malformed("attribute 0x%X has %d bytes, which is no CK_ULONG", a, len(b))
}

// malformed is the error of a token that answers nonsense: it is not to be
// trusted with more.
func malformed(format string, a ...any) error {
	return &Error{Op: "token", Class: ClassGone, Detail: fmt.Sprintf(format, a...)}
}

// PublicKey reads the public half of a key from the token: *rsa.PublicKey,
// *ecdsa.PublicKey or ed25519.PublicKey.
func (p *Pool) PublicKey(ctx context.Context, id []byte) (crypto.PublicKey, error) {
	id = bytes.Clone(id) // the call may outlive the caller
	var pub crypto.PublicKey
	err := p.do(ctx, "public key", func(_ *job, w *worker) error {
		h, err := w.only(id, pkcs11.CKO_PUBLIC_KEY)
		if err != nil {
			return err
		}
		pub, err = w.publicKey(h)
		return err
	})
	if err != nil {
		return nil, err
	}
	return pub, nil
}

func (w *worker) publicKey(h pkcs11.ObjectHandle) (crypto.PublicKey, error) {
	typ, err := w.number(h, pkcs11.CKA_KEY_TYPE)
	if err != nil {
		return nil, err
	}
	first, second := uint(pkcs11.CKA_EC_PARAMS), uint(pkcs11.CKA_EC_POINT)
	if typ == pkcs11.CKK_RSA {
		first, second = pkcs11.CKA_MODULUS, pkcs11.CKA_PUBLIC_EXPONENT
	}
	a, err := w.attribute(h, first)
	if err != nil {
		return nil, err
	}
	b, err := w.attribute(h, second)
	if err != nil {
		return nil, err
	}
	if typ == pkcs11.CKK_RSA {
		return parseRSA(a, b)
	}
	c, err := curveOf(typ, a)
	if err != nil {
		return nil, err
	}
	return parsePoint(c, b)
}

func parseRSA(modulus, exponent []byte) (crypto.PublicKey, error) {
	n, e := new(big.Int).SetBytes(modulus), new(big.Int).SetBytes(exponent)
	if n.BitLen() < 1024 || n.BitLen() > 16384 || e.BitLen() > 31 || e.Cmp(big.NewInt(3)) < 0 || e.Bit(0) == 0 {
		return nil, malformed("RSA modulus of %d bits with exponent %v", n.BitLen(), e)
	}
	return &rsa.PublicKey{N: n, E: int(e.Int64())}, nil
}

// parsePoint takes CKA_EC_POINT as the standard has it, in a DER OCTET
// STRING, and as some tokens give it, bare. A bare one of the right length is
// never also a DER string of that length: 0x04 0x41 starts a P-256 point of 65
// bytes or a string of 67.
func parsePoint(c curve, point []byte) (crypto.PublicKey, error) {
	want := c.size
	if c.nist != nil {
		want = 1 + 2*c.size
	}
	if len(point) != want {
		var inner []byte
		rest, err := asn1.Unmarshal(point, &inner)
		if err != nil || len(rest) > 0 || len(inner) != want {
			return nil, malformed("CKA_EC_POINT of %d bytes is no %s point", len(point), c.algorithm)
		}
		point = inner
	}
	if c.nist == nil {
		return ed25519.PublicKey(point), nil
	}
	pub, err := ecdsa.ParseUncompressedPublicKey(c.nist, point)
	if err != nil {
		return nil, malformed("CKA_EC_POINT: %v", err)
	}
	return pub, nil
}
