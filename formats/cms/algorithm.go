package cms

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// RSA bounds: below 2048 bits a key is too weak, above 8192 nothing in use verifies it in reasonable time.
const (
	minRSABits = 2048
	maxRSABits = 8192
)

var (
	oidData          = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 1}
	oidSignedData    = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 2}
	oidContentType   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 3}
	oidMessageDigest = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 4}
	oidSigningTime   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 5}
	oidRSA           = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1}
	oidMGF1          = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 8}
	oidPSS           = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 10}
	oidECPublicKey   = asn1.ObjectIdentifier{1, 2, 840, 10045, 2, 1}
)

// algorithms has a line for each hash: its own OID, and the OIDs of the signatures that name it.
var algorithms = []struct {
	hash       crypto.Hash
	oid        asn1.ObjectIdentifier
	rsa, ecdsa asn1.ObjectIdentifier
	signs      bool // else it is known only so that an old signature can be shown
}{
	{crypto.SHA256, asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1},
		asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 11}, asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}, true},
	{crypto.SHA384, asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 2},
		asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 12}, asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 3}, true},
	{crypto.SHA512, asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 3},
		asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 13}, asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 4}, true},
	{crypto.SHA1, asn1.ObjectIdentifier{1, 3, 14, 3, 2, 26},
		asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 5}, asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 1}, false},
}

func hashOID(h crypto.Hash) asn1.ObjectIdentifier {
	for _, a := range algorithms {
		if a.hash == h {
			return a.oid
		}
	}
	return nil
}

func oidHash(oid asn1.ObjectIdentifier) crypto.Hash {
	for _, a := range algorithms {
		if a.oid.Equal(oid) {
			return a.hash
		}
	}
	return 0
}

// Signs reports whether h is a hash that this package signs and verifies with.
func Signs(h crypto.Hash) bool {
	for _, a := range algorithms {
		if a.hash == h {
			return a.signs
		}
	}
	return false
}

// DefaultHash is the hash used with the key when none is asked for: SHA-256, or with a larger curve the hash that
// FIPS 186-5 pairs with it.
func DefaultHash(pub crypto.PublicKey) (crypto.Hash, error) {
	hashes, err := hashesOf(pub)
	if err != nil {
		return 0, err
	}
	return hashes[0], nil
}

// hashesOf returns the hashes allowed with a key, the default first.
func hashesOf(pub crypto.PublicKey) ([]crypto.Hash, error) {
	switch pub := pub.(type) {
	case *rsa.PublicKey:
		if pub.N == nil {
			return nil, fmt.Errorf("%w: empty RSA key", ErrUnsupported)
		}
		if n := pub.N.BitLen(); n < minRSABits || n > maxRSABits {
			return nil, fmt.Errorf("%w: RSA key of %d bits, not %d to %d", ErrUnsupported, n, minRSABits, maxRSABits)
		}
		return []crypto.Hash{crypto.SHA256, crypto.SHA384, crypto.SHA512}, nil
	case *ecdsa.PublicKey:
		switch pub.Curve {
		case elliptic.P256():
			return []crypto.Hash{crypto.SHA256, crypto.SHA384, crypto.SHA512}, nil
		case elliptic.P384():
			return []crypto.Hash{crypto.SHA384, crypto.SHA512}, nil
		case elliptic.P521():
			return []crypto.Hash{crypto.SHA512}, nil
		}
		return nil, fmt.Errorf("%w: ECDSA curve", ErrUnsupported)
	default:
		return nil, fmt.Errorf("%w: key of type %T", ErrUnsupported, pub)
	}
}

// checkHash returns h if the key may sign with it, or the default for zero.
func checkHash(pub crypto.PublicKey, h crypto.Hash) (crypto.Hash, error) {
	hashes, err := hashesOf(pub)
	if err != nil {
		return 0, err
	}
	if h == 0 {
		return hashes[0], nil
	}
	if !slices.Contains(hashes, h) {
		return 0, fmt.Errorf("%w: hash %v with %s", ErrUnsupported, h, keyName(pub))
	}
	return h, nil
}

func keyName(pub crypto.PublicKey) string {
	switch pub := pub.(type) {
	case *rsa.PublicKey:
		return fmt.Sprintf("RSA-%d", pub.N.BitLen())
	case *ecdsa.PublicKey:
		return pub.Curve.Params().Name
	default:
		return fmt.Sprintf("%T", pub)
	}
}

// A scheme is what a SignerInfo says of its signature.
type scheme struct {
	hash crypto.Hash
	pss  bool
	salt int // of PSS
}

// verify checks a signature as it stands in a SignerInfo.
func (s scheme) verify(pub crypto.PublicKey, digest, sig []byte) error {
	switch pub := pub.(type) {
	case *rsa.PublicKey:
		if len(sig) != pub.Size() {
			return fmt.Errorf("the RSA signature has %d bytes, not %d", len(sig), pub.Size())
		}
		if s.pss {
			return rsa.VerifyPSS(pub, s.hash, digest, sig, &rsa.PSSOptions{SaltLength: s.salt, Hash: s.hash})
		}
		return rsa.VerifyPKCS1v15(pub, s.hash, digest, sig)
	case *ecdsa.PublicKey:
		if s.pss {
			return errors.New("PSS with an ECDSA key")
		}
		if !ecdsa.VerifyASN1(pub, digest, sig) {
			return errors.New("the ECDSA signature does not verify")
		}
		return nil
	default:
		return fmt.Errorf("key of type %T", pub)
	}
}

// addDigestAlgorithm adds the AlgorithmIdentifier of a hash. RFC 5754, section 2: parameters are absent, and NULL is
// to be understood too. The kernel's sign-file leaves them out, fsverity and Authenticode write NULL.
func addDigestAlgorithm(b *cryptobyte.Builder, h crypto.Hash, null bool) {
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(hashOID(h))
		if null {
			b.AddASN1NULL()
		}
	})
}

// DigestAlgorithm returns the AlgorithmIdentifier of a hash that Signs, with NULL parameters.
func DigestAlgorithm(h crypto.Hash) []byte {
	var b cryptobyte.Builder
	addDigestAlgorithm(&b, h, true)
	return b.BytesOrPanic() // an OID of the table above is always encoded
}

// ParseDigestAlgorithm reads the AlgorithmIdentifier of a hash, one of those that Signs or SHA-1.
func ParseDigestAlgorithm(der []byte) (crypto.Hash, error) {
	in := cryptobyte.String(der)
	var body cryptobyte.String
	if !in.ReadASN1(&body, cbasn1.SEQUENCE) || !in.Empty() {
		return 0, fmt.Errorf("%w: digest algorithm", ErrMalformed)
	}
	return parseDigestAlgorithm(body)
}

// addSignatureAlgorithm adds the AlgorithmIdentifier of a signature by pub.
func addSignatureAlgorithm(b *cryptobyte.Builder, pub crypto.PublicKey, s scheme) {
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		if _, ok := pub.(*ecdsa.PublicKey); ok {
			for _, a := range algorithms {
				if a.hash == s.hash {
					b.AddASN1ObjectIdentifier(a.ecdsa) // RFC 5754, section 3.3: parameters absent
				}
			}
			return
		}
		if !s.pss {
			b.AddASN1ObjectIdentifier(oidRSA) // RFC 3370, section 3.2: NULL
			b.AddASN1NULL()
			return
		}
		// RFC 4055, section 3.1. The default of each field is SHA-1, so all are there but the trailer.
		b.AddASN1ObjectIdentifier(oidPSS)
		b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1(context(0), func(b *cryptobyte.Builder) { addDigestAlgorithm(b, s.hash, true) })
			b.AddASN1(context(1), func(b *cryptobyte.Builder) {
				b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
					b.AddASN1ObjectIdentifier(oidMGF1)
					addDigestAlgorithm(b, s.hash, true)
				})
			})
			b.AddASN1(context(2), func(b *cryptobyte.Builder) { b.AddASN1Int64(int64(s.salt)) })
		})
	})
}

// context is the tag [n] of something constructed.
func context(n uint8) cbasn1.Tag { return cbasn1.Tag(n).ContextSpecific().Constructed() }
