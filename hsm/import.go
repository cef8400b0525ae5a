package hsm

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"slices"

	"github.com/miekg/pkcs11"
)

// Import brings a private key into the token: *rsa.PrivateKey of 2048, 3072 or 4096
// bits, *ecdsa.PrivateKey of P-256 or P-384, or ed25519.PrivateKey. In the token the
// private half is sensitive, not extractable, and can sign and nothing else; both
// halves carry the label and the id. An id or a label that any object of the token
// has is refused with ErrExists. It returns the public key, read from the token.
//
// Before it does, what the token made is read back, and a signature by it is
// verified with the public half of what was given. Whatever fails, and when ctx ends
// first, both halves are destroyed, as with Generate.
//
// The token gets the key by C_CreateObject, in the clear within this process. One
// that takes no private key so refuses, and the error says what else there is.
func (p *Pool) Import(ctx context.Context, label string, id []byte, private crypto.PrivateKey) (crypto.PublicKey, error) {
	id = bytes.Clone(id) // the call may outlive the caller
	if label == "" || len(id) == 0 {
		return nil, refuse("import", "a key wants a label and an id")
	}
	parts, err := partsOf(private)
	if err != nil {
		return nil, err
	}
	return p.create(ctx, "import", id, creation{
		vacant:  func(w *worker) error { return w.vacant(label, id) },
		make:    func(w *worker) (crypto.PublicKey, error) { return w.importKey(label, id, parts) },
		classes: pairClasses,
	})
}

// Algorithm names the type and size of a public key as Generate does; "" where it
// is none that Generate and Import know.
func Algorithm(public crypto.PublicKey) string {
	switch k := public.(type) {
	case *rsa.PublicKey:
		for name, bits := range rsaBits {
			if k.N.BitLen() == bits {
				return name
			}
		}
	case *ecdsa.PublicKey:
		for _, c := range curves {
			if c.nist != nil && c.nist == k.Curve {
				return c.algorithm
			}
		}
	case ed25519.PublicKey:
		return "ed25519"
	}
	return ""
}

// keyParts are the attributes that a key is made of.
type keyParts struct {
	public          crypto.PublicKey
	common          []*pkcs11.Attribute // of both halves
	open, sensitive []*pkcs11.Attribute // of the public half, and of the private one
}

// Importable refuses what Import would, whatever the token.
func Importable(private crypto.PrivateKey) error {
	_, err := partsOf(private)
	return err
}

// partsOf checks a private key: one whose halves do not belong together would
// sign what nobody can verify, and may give itself away by it.
func partsOf(private crypto.PrivateKey) (keyParts, error) {
	switch k := private.(type) {
	case *rsa.PrivateKey:
		return rsaParts(k)
	case *ecdsa.PrivateKey:
		i := slices.IndexFunc(curves, func(c curve) bool { return c.nist != nil && c.nist == k.Curve })
		if i < 0 {
			return keyParts{}, refuse("import", "an EC key is of P-256 or P-384")
		}
		c := curves[i]
		scalar, err := k.Bytes()
		if err != nil {
			return keyParts{}, refuse("import", "EC key: %v", err)
		}
		again, err := ecdsa.ParseRawPrivateKey(c.nist, scalar)
		if err != nil || !again.PublicKey.Equal(&k.PublicKey) {
			return keyParts{}, refuse("import", "the two halves of the EC key do not belong together")
		}
		point, err := k.PublicKey.Bytes()
		if err != nil {
			return keyParts{}, refuse("import", "EC key: %v", err)
		}
		return curveParts(c, &k.PublicKey, point, scalar)
	case ed25519.PrivateKey:
		if len(k) != ed25519.PrivateKeySize || !ed25519.NewKeyFromSeed(k.Seed()).Equal(k) {
			return keyParts{}, refuse("import", "the two halves of the Ed25519 key do not belong together")
		}
		pub := k.Public().(ed25519.PublicKey)
		return curveParts(curves[len(curves)-1], pub, pub, k.Seed())
	}
	return keyParts{}, refuse("import", "a key of type %T: RSA, P-256, P-384 and Ed25519 can be imported", private)
}

func rsaParts(k *rsa.PrivateKey) (keyParts, error) {
	if Algorithm(&k.PublicKey) == "" {
		return keyParts{}, refuse("import", "an RSA key of %d bits: one of 2048, 3072 or 4096 can be imported", k.N.BitLen())
	}
	if len(k.Primes) != 2 {
		return keyParts{}, refuse("import", "an RSA key of %d primes: tokens take those of two", len(k.Primes))
	}
	if err := k.Validate(); err != nil {
		return keyParts{}, refuse("import", "RSA key: %v", err)
	}
	k.Precompute()
	secret := []*pkcs11.Attribute{}
	for _, a := range []struct {
		typ uint
		n   *big.Int
	}{
		{pkcs11.CKA_PRIVATE_EXPONENT, k.D}, {pkcs11.CKA_PRIME_1, k.Primes[0]}, {pkcs11.CKA_PRIME_2, k.Primes[1]},
		{pkcs11.CKA_EXPONENT_1, k.Precomputed.Dp}, {pkcs11.CKA_EXPONENT_2, k.Precomputed.Dq}, {pkcs11.CKA_COEFFICIENT, k.Precomputed.Qinv},
	} {
		secret = append(secret, set(a.typ, a.n.Bytes()))
	}
	return keyParts{
		public: &k.PublicKey,
		common: []*pkcs11.Attribute{
			set(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA), set(pkcs11.CKA_MODULUS, k.N.Bytes()),
			set(pkcs11.CKA_PUBLIC_EXPONENT, big.NewInt(int64(k.E)).Bytes()),
		},
		sensitive: secret,
	}, nil
}

func curveParts(c curve, public crypto.PublicKey, point, scalar []byte) (keyParts, error) {
	der, err := asn1.Marshal(point) // CKA_EC_POINT is a DER OCTET STRING
	if err != nil {
		return keyParts{}, err
	}
	return keyParts{
		public:    public,
		common:    []*pkcs11.Attribute{set(pkcs11.CKA_KEY_TYPE, c.typ), set(pkcs11.CKA_EC_PARAMS, c.params[0])},
		open:      []*pkcs11.Attribute{set(pkcs11.CKA_EC_POINT, der)},
		sensitive: []*pkcs11.Attribute{set(pkcs11.CKA_VALUE, scalar)},
	}, nil
}

func (w *worker) importKey(label string, id []byte, k keyParts) (crypto.PublicKey, error) {
	public, private := halves(label, id)
	// The public half first: a token that does not take the key's type says so before
	// it has seen the private one.
	pub, err := w.p.api.CreateObject(w.sh, slices.Concat(public, k.common, k.open))
	if err != nil {
		return nil, w.p.profile.fail("C_CreateObject", err)
	}
	priv, err := w.p.api.CreateObject(w.sh, slices.Concat(private, k.common, k.sensitive))
	if err != nil {
		return nil, notInTheClear(w.p.profile.fail("C_CreateObject", err))
	}
	if err := w.inspect("import", priv, promised...); err != nil {
		return nil, err
	}
	got, err := w.publicKey(pub)
	if err != nil {
		return nil, err
	}
	if !equalKeys(got, k.public) {
		return nil, malformed("the public key that was imported is another one in the token; it was not kept")
	}
	if err := w.trySign(id, k.public); err != nil {
		return nil, err
	}
	return got, nil
}

// notInTheClear adds what to do where a token refuses the template of a private key.
func notInTheClear(err error) error {
	if e, ok := errors.AsType[*Error](err); ok && e.Class == ClassRefused && e.Code != pkcs11.CKR_SESSION_READ_ONLY && e.Code != pkcs11.CKR_TOKEN_WRITE_PROTECTED {
		e.Detail = "the token does not take such a private key in the clear: generate a key in it instead, or bring this one in by the vendor's own tool"
	}
	return err
}

func equalKeys(a, b crypto.PublicKey) bool {
	x, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && x.Equal(b)
}

// trySign makes one signature and verifies it with the public key.
func (w *worker) trySign(id []byte, public crypto.PublicKey) error {
	digest := make([]byte, sha256.Size)
	rand.Read(digest)
	k, err := w.findKey(id)
	if err != nil {
		return err
	}
	r, err := newRequest(digest, crypto.SHA256)
	if err != nil {
		return err
	}
	sig, err := w.sign(k, r)
	if err != nil {
		return err
	}
	ok := false
	switch pub := public.(type) {
	case *rsa.PublicKey:
		ok = rsa.VerifyPKCS1v15(pub, crypto.SHA256, digest, sig) == nil
	case *ecdsa.PublicKey:
		n := len(sig) / 2
		ok = ecdsa.Verify(pub, digest, new(big.Int).SetBytes(sig[:n]), new(big.Int).SetBytes(sig[n:]))
	case ed25519.PublicKey:
		ok = ed25519.Verify(pub, digest, sig)
	}
	if !ok {
		return malformed("a signature by the key that was imported does not verify; the key was not kept")
	}
	return nil
}

// MaxCertificate bounds a certificate, in bytes.
const MaxCertificate = 16 << 10

// ImportCertificate puts the certificate of a key beside it, under the key's id and
// label, so that tools which look for it find it. It is DER, and its public key is
// that of the key with this id: anything else is refused, and so is with ErrExists
// an id that has a certificate. It is read back, and destroyed where anything fails
// or ctx ends first.
func (p *Pool) ImportCertificate(ctx context.Context, id, der []byte) error {
	id, der = bytes.Clone(id), bytes.Clone(der)
	if len(der) > MaxCertificate {
		return refuse("import certificate", "%d bytes, of at most %d", len(der), MaxCertificate)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return refuse("import certificate", "%v", err)
	}
	serial, err := asn1.Marshal(cert.SerialNumber)
	if err != nil {
		return refuse("import certificate", "serial number: %v", err)
	}
	label := ""
	_, err = p.create(ctx, "import certificate", id, creation{
		vacant: func(w *worker) error {
			l, err := w.belongs(id, cert)
			label = l
			return err
		},
		make: func(w *worker) (crypto.PublicKey, error) {
			return nil, w.createCertificate([]*pkcs11.Attribute{
				set(pkcs11.CKA_CLASS, pkcs11.CKO_CERTIFICATE), set(pkcs11.CKA_CERTIFICATE_TYPE, pkcs11.CKC_X_509),
				set(pkcs11.CKA_TOKEN, true), set(pkcs11.CKA_PRIVATE, false),
				set(pkcs11.CKA_LABEL, label), set(pkcs11.CKA_ID, id),
				set(pkcs11.CKA_SUBJECT, cert.RawSubject), set(pkcs11.CKA_ISSUER, cert.RawIssuer),
				set(pkcs11.CKA_SERIAL_NUMBER, serial), set(pkcs11.CKA_VALUE, der),
			}, der)
		},
		classes: []uint{pkcs11.CKO_CERTIFICATE},
	})
	return err
}

// belongs sees that a certificate is of the key with this id, which has none yet,
// and returns the key's label.
func (w *worker) belongs(id []byte, cert *x509.Certificate) (label string, err error) {
	priv, err := w.only(id, pkcs11.CKO_PRIVATE_KEY)
	if err != nil {
		return "", err
	}
	pub, err := w.only(id, pkcs11.CKO_PUBLIC_KEY)
	if err != nil {
		return "", err
	}
	key, err := w.publicKey(pub)
	if err != nil {
		return "", err
	}
	if !equalKeys(key, cert.PublicKey) {
		return "", refuse("import certificate", "the certificate of %q is for another key than that with id %x", cert.Subject, id)
	}
	hs, err := w.find(pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_CERTIFICATE), pkcs11.NewAttribute(pkcs11.CKA_ID, id))
	if err != nil {
		return "", err
	}
	if len(hs) > 0 {
		return "", fmt.Errorf("a certificate with id %x: %w", id, ErrExists)
	}
	b, err := w.attribute(priv, pkcs11.CKA_LABEL)
	return string(b), err
}

func (w *worker) createCertificate(t []*pkcs11.Attribute, der []byte) error {
	h, err := w.p.api.CreateObject(w.sh, t)
	if err != nil {
		return w.p.profile.fail("C_CreateObject", err)
	}
	got, err := w.attribute(h, pkcs11.CKA_VALUE)
	if err == nil && !bytes.Equal(got, der) {
		err = malformed("the certificate that was imported is another one in the token; it was not kept")
	}
	return err
}
