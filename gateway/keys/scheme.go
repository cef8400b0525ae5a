package keys

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"

	"github.com/signwarden/signwarden/gateway/sigerr"
	"github.com/signwarden/signwarden/internal/rsaverify"
)

// Scheme is how a key signs a digest.
type Scheme string

// The schemes. EdDSA signs the digest's bytes as its message, as OpenPGP wants
// it (RFC 9580 section 5.2.3.3); EdDSAMessage the message itself, as SSH does
// (RFC 8709 section 6). Nobody can ask for EdDSAMessage: it is how the gateway signs
// what it has read as a message that cannot be taken for a digest.
const (
	PKCS1v15     Scheme = "rsa-pkcs1v15"
	PSS          Scheme = "rsa-pss"
	ECDSA        Scheme = "ecdsa"
	EdDSA        Scheme = "eddsa"
	EdDSAMessage Scheme = "eddsa-message"
)

// schemes lists what each algorithm can do, its usual scheme first.
var schemes = map[Algorithm][]Scheme{
	RSA2048: {PKCS1v15, PSS},
	RSA3072: {PKCS1v15, PSS},
	RSA4096: {PKCS1v15, PSS},
	P256:    {ECDSA},
	P384:    {ECDSA},
	Ed25519: {EdDSA},
}

// SchemeFor returns want where a can do it, a's usual scheme where want is
// empty, and else an error that wraps [sigerr.Invalid].
func SchemeFor(a Algorithm, want Scheme) (Scheme, error) {
	can := schemes[a]
	if want == "" && len(can) > 0 {
		return can[0], nil
	}
	for _, s := range can {
		if s == want {
			return s, nil
		}
	}
	return "", fmt.Errorf("%w: a key of algorithm %s cannot sign with scheme %q; it can with %v", sigerr.Invalid, a, want, can)
}

// Hashes are the hashes that are signed, by the names used in policies. SHA-1
// and everything else is refused everywhere.
var Hashes = map[string]crypto.Hash{
	"sha256": crypto.SHA256,
	"sha384": crypto.SHA384,
	"sha512": crypto.SHA512,
}

// HashName returns the name of a hash that is signed, or "".
func HashName(h crypto.Hash) string {
	for name, hh := range Hashes {
		if hh == h {
			return name
		}
	}
	return ""
}

// Options returns what to pass to a token for scheme s over a digest of h.
func (s Scheme) Options(h crypto.Hash) crypto.SignerOpts { return s.SaltedOptions(h, 0) }

// SaltedOptions is Options with the length of PSS's salt in bytes; 0: as long as
// the hash.
func (s Scheme) SaltedOptions(h crypto.Hash, salt int) crypto.SignerOpts {
	switch s {
	case PSS:
		if salt == 0 {
			salt = rsa.PSSSaltLengthEqualsHash
		}
		return &rsa.PSSOptions{Hash: h, SaltLength: salt}
	case EdDSA, EdDSAMessage:
		return crypto.Hash(0)
	}
	return h
}

// SaltLength is the length of PSS's salt that opts name, in bytes; 0: as long as
// the hash. That the salt be as long as the key allows cannot be asked for.
func SaltLength(opts *rsa.PSSOptions) (int, error) {
	switch {
	case opts.SaltLength == rsa.PSSSaltLengthEqualsHash:
		return 0, nil
	case opts.SaltLength > 0:
		return opts.SaltLength, nil
	}
	return 0, fmt.Errorf("%w: PSS salt length %d; say how many bytes, or that it is as long as the hash", sigerr.Invalid, opts.SaltLength)
}

// CheckSalt refuses a length of PSS's salt that a scheme or a key has no use for.
// 0 is as long as the hash; there is no way to ask for none.
func CheckSalt(pub crypto.PublicKey, s Scheme, h crypto.Hash, salt int) error {
	k, ok := pub.(*rsa.PublicKey)
	switch {
	case salt == 0:
		return nil
	case s != PSS || !ok:
		return fmt.Errorf("%w: only RSA-PSS has a salt", sigerr.Invalid)
	}
	// RFC 8017 section 9.1.1: the encoded message has one bit less than the modulus.
	if most := (k.N.BitLen()-1+7)/8 - h.Size() - 2; salt < 0 || salt > most {
		return fmt.Errorf("%w: PSS salt of %d bytes; with this key and hash it has 1 to %d", sigerr.Invalid, salt, most)
	}
	return nil
}

// Verify checks a signature as it leaves the gateway, with a PSS salt as long as
// the hash. See VerifySalted.
func Verify(pub crypto.PublicKey, s Scheme, h crypto.Hash, digest, sig []byte) error {
	return VerifySalted(pub, s, h, 0, digest, sig)
}

// VerifySalted checks a signature as it leaves the gateway: RSA as long as the
// modulus, ECDSA as r||s of equal width, Ed25519 in 64 bytes. The digest must be
// one of h, and h one of [Hashes]: crypto/rsa would take any bytes with a hash
// of 0, and crypto/ecdsa a digest of any length. EdDSA and EdDSAMessage have no use for
// h, and with EdDSAMessage digest is the message.
func VerifySalted(pub crypto.PublicKey, s Scheme, h crypto.Hash, salt int, digest, sig []byte) error {
	if s != EdDSA && s != EdDSAMessage && (HashName(h) == "" || len(digest) != h.Size()) {
		return fmt.Errorf("%d bytes are no digest of a hash that is signed (crypto.Hash %d)", len(digest), h)
	}
	switch k := pub.(type) {
	case *rsa.PublicKey:
		if len(sig) != k.Size() {
			return fmt.Errorf("signature has %d bytes, the modulus %d", len(sig), k.Size())
		}
		switch s {
		case PKCS1v15:
			return rsaverify.PKCS1v15(k, h, digest, sig)
		case PSS:
			if salt == 0 {
				salt = rsa.PSSSaltLengthEqualsHash
			}
			return rsa.VerifyPSS(k, h, digest, sig, &rsa.PSSOptions{SaltLength: salt})
		}
	case *ecdsa.PublicKey:
		if s != ECDSA {
			break
		}
		der, err := ECDSAToASN1(k, sig)
		if err != nil {
			return err
		}
		if !ecdsa.VerifyASN1(k, digest, der) {
			return errors.New("signature does not verify")
		}
		return nil
	case ed25519.PublicKey:
		if s != EdDSA && s != EdDSAMessage {
			break
		}
		if !ed25519.Verify(k, digest, sig) {
			return errors.New("signature does not verify")
		}
		return nil
	}
	return fmt.Errorf("scheme %q does not fit a %T", s, pub)
}

// ECDSAToASN1 turns r||s into the DER that [crypto.Signer] is to return
// (RFC 3279 section 2.2.3).
func ECDSAToASN1(pub *ecdsa.PublicKey, raw []byte) ([]byte, error) {
	n := (pub.Curve.Params().N.BitLen() + 7) / 8
	if len(raw) != 2*n {
		return nil, fmt.Errorf("signature has %d bytes, want r and s of %d each", len(raw), n)
	}
	return asn1.Marshal(struct{ R, S *big.Int }{
		new(big.Int).SetBytes(raw[:n]), new(big.Int).SetBytes(raw[n:]),
	})
}
