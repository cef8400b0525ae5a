package gpgagent

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha1"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"sync"

	"github.com/signwarden/signwarden/agentproto/sexp"
)

// ErrNoKeygrip reports a key of a type that gpg-agent has no name for, or that is malformed.
var ErrNoKeygrip = errors.New("gpgagent: key has no keygrip")

// keygrip names a key by its public parameters, whatever its OpenPGP creation
// time; so it is not the fingerprint.
type keygrip [sha1.Size]byte

func (g keygrip) String() string { return strings.ToUpper(hex.EncodeToString(g[:])) }

// curveNames are libgcrypt's names of the curves that we know.
var curveNames = map[elliptic.Curve]string{
	elliptic.P256(): "NIST P-256",
	elliptic.P384(): "NIST P-384",
	elliptic.P521(): "NIST P-521",
}

// ed25519Params are the numbers that libgcrypt hashes, in hex. Its a and b are the absolute
// values of its own constants, not those of RFC 8032.
var ed25519Params = map[byte]string{
	'p': "7fffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffed",
	'a': "01",
	'b': "2dfc9311d490018c7338bf8688861767ff8ff5b2bebe27548a14b235eca6874a",
	'g': "04" +
		"216936d3cd6e53fec0a4e231fdd6dc5c692cc7609525a7b2c9562d608f25d51a" +
		"6666666666666666666666666666666666666666666666666666666666666658",
	'n': "1000000000000000000000000000000014def9dea2f79cd65812631a5cf5d3ed",
}

// Keygrip computes the keygrip of an RSA, NIST curve or Ed25519 public key.
func Keygrip(pub crypto.PublicKey) ([20]byte, error) {
	switch k := pub.(type) {
	case *rsa.PublicKey:
		if k == nil || k.N == nil || k.N.Sign() <= 0 {
			return keygrip{}, ErrNoKeygrip
		}
		return sha1.Sum(signedMPI(k.N)), nil // the exponent has no part in it
	case *ecdsa.PublicKey:
		point, _, err := ecPoint(k)
		if err != nil {
			return keygrip{}, err
		}
		c := k.Curve.Params()
		a := new(big.Int).Sub(c.P, big.NewInt(3))
		width := (c.BitSize + 7) / 8
		g := append([]byte{4}, c.Gx.FillBytes(make([]byte, width))...)
		g = append(g, c.Gy.FillBytes(make([]byte, width))...)
		return curveGrip(map[byte][]byte{
			'p': c.P.Bytes(), 'a': a.Bytes(), 'b': c.B.Bytes(), 'g': g, 'n': c.N.Bytes(), 'q': point,
		}), nil
	case ed25519.PublicKey:
		if len(k) != ed25519.PublicKeySize {
			return keygrip{}, ErrNoKeygrip
		}
		params := map[byte][]byte{'q': k} // without the 0x40 that OpenPGP puts in front
		for name, digits := range ed25519Params {
			value, err := hex.DecodeString(digits)
			if err != nil {
				return keygrip{}, err
			}
			params[name] = value
		}
		return curveGrip(params), nil
	}
	return keygrip{}, fmt.Errorf("%w: %T", ErrNoKeygrip, pub)
}

// curveGrip hashes the parameters in libgcrypt's order and form. The integers come
// unsigned and without leading zeros, the points in full width.
func curveGrip(params map[byte][]byte) keygrip {
	var b bytes.Buffer
	for _, name := range []byte("pabgnq") {
		fmt.Fprintf(&b, "(1:%c%d:%s)", name, len(params[name]), params[name])
	}
	return sha1.Sum(b.Bytes())
}

// ecPoint is the uncompressed point of a key on a curve that we know, and the curve's name.
func ecPoint(k *ecdsa.PublicKey) (point []byte, curve string, err error) {
	if k == nil || k.Curve == nil {
		return nil, "", ErrNoKeygrip
	}
	curve, ok := curveNames[k.Curve]
	if !ok {
		return nil, "", fmt.Errorf("%w: curve %q", ErrNoKeygrip, k.Curve.Params().Name)
	}
	point, err = k.Bytes()
	if err != nil {
		return nil, "", fmt.Errorf("%w: %w", ErrNoKeygrip, err)
	}
	return point, curve, nil
}

// signedMPI is n as libgcrypt's standard format has it: big-endian, with a zero
// byte in front where the top bit would be read as a sign.
func signedMPI(n *big.Int) []byte {
	b := n.Bytes()
	if len(b) > 0 && b[0]&0x80 != 0 {
		b = append([]byte{0}, b...)
	}
	return b
}

// publicKeyExpr is the public-key expression that READKEY answers.
func publicKeyExpr(pub crypto.PublicKey) (sexp.Expr, error) {
	param := func(name string, value []byte) sexp.Expr {
		return sexp.List(sexp.Atom(name), sexp.Atom(value))
	}
	var key sexp.Expr
	switch k := pub.(type) {
	case *rsa.PublicKey:
		key = sexp.List(sexp.Atom("rsa"),
			param("n", signedMPI(k.N)), param("e", signedMPI(big.NewInt(int64(k.E)))))
	case *ecdsa.PublicKey:
		point, curve, err := ecPoint(k)
		if err != nil {
			return sexp.Expr{}, err
		}
		key = sexp.List(sexp.Atom("ecc"), param("curve", []byte(curve)), param("q", point))
	case ed25519.PublicKey:
		key = sexp.List(sexp.Atom("ecc"), param("curve", []byte("Ed25519")),
			param("flags", []byte("eddsa")), param("q", append([]byte{0x40}, k...)))
	default:
		return sexp.Expr{}, fmt.Errorf("%w: %T", ErrNoKeygrip, pub)
	}
	return sexp.List(sexp.Atom("public-key"), key), nil
}

// maxCachedGrips bounds the cache; over it, it starts anew.
const maxCachedGrips = 1 << 16

// gripCache remembers the keygrip of the key that a name had last, for all
// connections: listing 1,000 keys then compares them instead of hashing them.
type gripCache struct {
	// mu guards byName. It is held while one list of keys is looked up, in memory.
	mu     sync.Mutex
	byName map[string]cachedGrip
}

type cachedGrip struct {
	pub  crypto.PublicKey
	grip keygrip
	err  error
}

// each calls yield for every key that has a keygrip, in no order.
func (g *gripCache) each(pubs map[string]crypto.PublicKey, yield func(name string, grip keygrip)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.byName == nil || len(g.byName) > maxCachedGrips {
		g.byName = make(map[string]cachedGrip, len(pubs))
	}
	for name, pub := range pubs {
		c, ok := g.byName[name]
		if !ok || c.err != nil || !equal(c.pub, pub) {
			c = cachedGrip{pub: pub}
			c.grip, c.err = Keygrip(pub)
			g.byName[name] = c
		}
		if c.err == nil {
			yield(name, c.grip)
		}
	}
}

func equal(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}
