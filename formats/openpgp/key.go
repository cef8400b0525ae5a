package openpgp

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha1"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math"
	"math/big"
	"slices"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp/packet"
)

// Public-key algorithm IDs, section 9.1. Ed25519 keys use 22, not 27: gpg 2.2 and rpm 4.18 know only the former.
const (
	algoRSA     = 1
	algoECDSA   = 19
	algoEdDSA22 = 22
)

// RSA bounds: below 2048 bits a key is too weak, above 8192 nothing in use verifies it in reasonable time.
const (
	minRSABits = 2048
	maxRSABits = 8192
)

// Curve OIDs, section 9.2, without tag and length.
var (
	oidP256    = []byte{0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07}
	oidP384    = []byte{0x2b, 0x81, 0x04, 0x00, 0x22}
	oidEd25519 = []byte{0x2b, 0x06, 0x01, 0x04, 0x01, 0xda, 0x47, 0x0f, 0x01}
)

// hashIDs are the hashes this package signs with, and their IDs (section 9.5). SHA-224 and less are left out on purpose.
var hashIDs = map[crypto.Hash]byte{crypto.SHA256: 8, crypto.SHA384: 9, crypto.SHA512: 10}

// A Fingerprint names a version 4 key (section 5.5.4.2).
type Fingerprint [20]byte

// String returns the fingerprint as 40 upper-case hexadecimal digits, as gpg prints it.
func (f Fingerprint) String() string { return fmt.Sprintf("%X", f[:]) }

// KeyID returns the low 64 bits, the name that old parsers look for.
func (f Fingerprint) KeyID() uint64 { return binary.BigEndian.Uint64(f[12:]) }

// ParseFingerprint reads 40 hexadecimal digits of either case.
func ParseFingerprint(s string) (Fingerprint, error) {
	var f Fingerprint
	if len(s) != 2*len(f) {
		return Fingerprint{}, fmt.Errorf("%w: fingerprint %q is not 40 digits", ErrMalformed, s)
	}
	_, err := hex.Decode(f[:], []byte(s))
	if err != nil {
		return Fingerprint{}, fmt.Errorf("%w: fingerprint %q: %v", ErrMalformed, s, err)
	}
	return f, nil
}

// A Key is a public key as OpenPGP sees it: the key and the second it was created. It comes from NewKey or
// Certificate.SigningKey, is never changed, and is safe for concurrent use.
type Key struct {
	Fingerprint Fingerprint
	Created     time.Time // UTC, whole seconds
	Expires     time.Time // UTC; zero: never
	Public      crypto.PublicKey

	algo   byte
	hashes []crypto.Hash     // allowed with this key, the default first
	body   []byte            // of the public-key packet, which certifications hash
	parsed *packet.PublicKey // go-crypto's view of body, which verifies what we make
}

// NewKey returns the Key of pub created at that time, which is part of the fingerprint: the caller must keep it
// with the key, for another second makes another key. The time must be whole seconds. The Key never expires.
func NewKey(pub crypto.PublicKey, created time.Time) (Key, error) {
	secs, err := seconds(created)
	if err != nil {
		return Key{}, fmt.Errorf("key creation time: %w", err)
	}
	m, err := materialOf(pub)
	if err != nil {
		return Key{}, err
	}
	body := []byte{4} // section 5.5.2.2
	body = binary.BigEndian.AppendUint32(body, secs)
	body = append(body, m.algo)
	body = append(body, m.fields...)
	k := Key{
		Created: time.Unix(int64(secs), 0).UTC(),
		Public:  pub,
		algo:    m.algo,
		hashes:  m.hashes,
		body:    body,
	}
	k.Fingerprint = sha1.Sum(appendHashedKey(nil, body)) // section 5.5.4.2; an identifier, not a signature
	k.parsed, err = parseKey(body)
	if err != nil {
		return Key{}, err
	}
	if !bytes.Equal(k.parsed.Fingerprint, k.Fingerprint[:]) {
		return Key{}, fmt.Errorf("fingerprint %s: the parser makes it %X", k.Fingerprint, k.parsed.Fingerprint)
	}
	return k, nil
}

// DefaultHash is the hash used with the key when none is asked for:
//
//   - RSA and P-256: SHA-256, which every verifier still in use accepts and which matches their strength.
//   - P-384: SHA-384, as FIPS 186-5 pairs them.
//   - Ed25519: SHA-512, on which Ed25519 rests anyway, so that no second hash has to hold.
func (k Key) DefaultHash() crypto.Hash {
	if len(k.hashes) == 0 {
		return 0
	}
	return k.hashes[0]
}

// hash returns h if the key may sign with it, or the default for zero.
func (k Key) hash(h crypto.Hash) (crypto.Hash, error) {
	if h == 0 {
		return k.DefaultHash(), nil
	}
	if !slices.Contains(k.hashes, h) {
		return 0, fmt.Errorf("%w: hash %v with key %s", ErrUnsupported, h, k.Fingerprint)
	}
	return h, nil
}

// usableAt says why the key may not sign at t, or nil.
func (k Key) usableAt(t time.Time) error {
	if t.Before(k.Created) { // a verifier refuses a signature older than its key
		return fmt.Errorf("%w: %s is created %s, after %s", ErrKeyUnusable, k.Fingerprint, stamp(k.Created), stamp(t))
	}
	if !k.Expires.IsZero() && !t.Before(k.Expires) {
		return fmt.Errorf("%w: %s expired %s", ErrKeyUnusable, k.Fingerprint, stamp(k.Expires))
	}
	return nil
}

// holds says whether signer's key is this one.
func (k Key) holds(signer crypto.Signer) error {
	pub, ok := k.Public.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || k.parsed == nil {
		return fmt.Errorf("%w: empty Key", ErrUnsupported)
	}
	if signer == nil || !pub.Equal(signer.Public()) {
		return fmt.Errorf("%w: signer holds another key than %s", ErrKeyNotFound, k.Fingerprint)
	}
	return nil
}

// material is the part of a key that depends on its algorithm.
type material struct {
	algo   byte
	fields []byte
	hashes []crypto.Hash
}

func materialOf(pub crypto.PublicKey) (material, error) {
	switch pub := pub.(type) {
	case *rsa.PublicKey:
		return rsaMaterial(pub)
	case *ecdsa.PublicKey:
		return ecdsaMaterial(pub)
	case ed25519.PublicKey:
		if len(pub) != ed25519.PublicKeySize {
			return material{}, fmt.Errorf("%w: Ed25519 key of %d bytes", ErrUnsupported, len(pub))
		}
		// Section 5.5.5.5: the OID, then the native point prefixed with 0x40.
		fields := append([]byte{byte(len(oidEd25519))}, oidEd25519...)
		fields = appendMPI(fields, append([]byte{0x40}, pub...))
		return material{algoEdDSA22, fields, []crypto.Hash{crypto.SHA512, crypto.SHA256, crypto.SHA384}}, nil
	default:
		return material{}, fmt.Errorf("%w: key of type %T", ErrUnsupported, pub)
	}
}

func rsaMaterial(pub *rsa.PublicKey) (material, error) {
	if pub == nil || pub.N == nil {
		return material{}, fmt.Errorf("%w: empty RSA key", ErrUnsupported)
	}
	n := pub.N.BitLen()
	if n < minRSABits || n > maxRSABits {
		return material{}, fmt.Errorf("%w: RSA key of %d bits, not %d to %d", ErrUnsupported, n, minRSABits, maxRSABits)
	}
	// go-crypto and rpm read no exponent over three octets; crypto/rsa wants an odd one.
	if pub.E < 3 || pub.E >= 1<<24 || pub.E%2 == 0 {
		return material{}, fmt.Errorf("%w: RSA exponent %d", ErrUnsupported, pub.E)
	}
	fields := appendMPI(nil, pub.N.Bytes()) // section 5.5.5.1
	fields = appendMPI(fields, big.NewInt(int64(pub.E)).Bytes())
	return material{algoRSA, fields, []crypto.Hash{crypto.SHA256, crypto.SHA512, crypto.SHA384}}, nil
}

func ecdsaMaterial(pub *ecdsa.PublicKey) (material, error) {
	if pub == nil {
		return material{}, fmt.Errorf("%w: empty ECDSA key", ErrUnsupported)
	}
	var oid []byte
	var hashes []crypto.Hash
	switch pub.Curve {
	case elliptic.P256():
		oid, hashes = oidP256, []crypto.Hash{crypto.SHA256, crypto.SHA384, crypto.SHA512}
	case elliptic.P384():
		// Section 5.2.3.2 asks for a digest at least as long as the order: SHA-256 would weaken the key.
		oid, hashes = oidP384, []crypto.Hash{crypto.SHA384, crypto.SHA512}
	default:
		return material{}, fmt.Errorf("%w: ECDSA curve", ErrUnsupported)
	}
	point, err := pub.Bytes() // 0x04 ‖ X ‖ Y, each of full width (section 11.2.1)
	if err != nil {
		return material{}, fmt.Errorf("%w: ECDSA key: %v", ErrUnsupported, err)
	}
	fields := append([]byte{byte(len(oid))}, oid...) // section 5.5.5.4
	return material{algoECDSA, appendMPI(fields, point), hashes}, nil
}

func parseKey(body []byte) (*packet.PublicKey, error) {
	p, err := packet.Read(bytes.NewReader(appendPacket(nil, tagPublicKey, body)))
	if err != nil {
		return nil, fmt.Errorf("reading back the public key: %w", err)
	}
	pk, ok := p.(*packet.PublicKey)
	if !ok {
		return nil, fmt.Errorf("reading back the public key: got a %T", p)
	}
	return pk, nil
}

// appendHashedKey adds a key as fingerprints and certifications hash it (section 5.2.4).
func appendHashedKey(b, body []byte) []byte {
	b = append(b, 0x99)
	b = binary.BigEndian.AppendUint16(b, uint16(len(body)))
	return append(b, body...)
}

// seconds returns t as the four-octet time of section 3.5.
func seconds(t time.Time) (uint32, error) {
	if t.Nanosecond() != 0 {
		return 0, fmt.Errorf("%w: %s has a fraction of a second", ErrMalformed, t.UTC().Format(time.RFC3339Nano))
	}
	if t.Unix() <= 0 || t.Unix() > math.MaxUint32 {
		return 0, fmt.Errorf("%w: %s is outside 1970 to 2106", ErrMalformed, stamp(t))
	}
	return uint32(t.Unix()), nil
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
