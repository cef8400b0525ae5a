package openpgp_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/signwarden/signwarden/formats/openpgp"
)

// created is in the past, so that a signature of now is younger than its key.
var created = time.Date(2024, 2, 29, 12, 34, 56, 0, time.UTC)

const userID = "Test Vendor (packages) <sign@example.org>"

func rsaKey(bits int) func() (crypto.Signer, error) {
	return func() (crypto.Signer, error) { return rsa.GenerateKey(rand.Reader, bits) }
}

func ecKey(c elliptic.Curve) func() (crypto.Signer, error) {
	return func() (crypto.Signer, error) { return ecdsa.GenerateKey(c, rand.Reader) }
}

// A keyKind is a kind of key under test. Two keys of each are made once, for primary and subkey.
type keyKind struct {
	name    string
	algo    int // OpenPGP's number
	hash    crypto.Hash
	primary func() crypto.Signer
	subkey  func() crypto.Signer
}

func kind(name string, algo int, hash crypto.Hash, gen func() (crypto.Signer, error)) keyKind {
	once := func() func() crypto.Signer {
		return sync.OnceValue(func() crypto.Signer {
			k, err := gen()
			if err != nil {
				panic(err)
			}
			return k
		})
	}
	return keyKind{name, algo, hash, once(), once()}
}

var (
	rsa2048 = kind("rsa2048", 1, crypto.SHA256, rsaKey(2048))
	ed      = kind("ed25519", 22, crypto.SHA512, func() (crypto.Signer, error) {
		_, k, err := ed25519.GenerateKey(rand.Reader)
		return k, err
	})
	p256  = kind("p256", 19, crypto.SHA256, ecKey(elliptic.P256()))
	p384  = kind("p384", 19, crypto.SHA384, ecKey(elliptic.P384()))
	kinds = []keyKind{
		rsa2048, kind("rsa3072", 1, crypto.SHA256, rsaKey(3072)), kind("rsa4096", 1, crypto.SHA256, rsaKey(4096)),
		p256, p384, ed,
	}
)

// A subject is a certificate under test and its signing key.
type subject struct {
	keyKind
	single bool
	cert   []byte
	key    openpgp.Key
	signer crypto.Signer
}

// newSubject makes a certificate that never expires.
func newSubject(t testing.TB, k keyKind, single bool) subject {
	t.Helper()
	return makeSubject(t, k, single, openpgp.CertificateSpec{UserID: userID, Created: created})
}

func makeSubject(t testing.TB, k keyKind, single bool, spec openpgp.CertificateSpec) subject {
	t.Helper()
	s := subject{keyKind: k, single: single, signer: k.primary()}
	spec.Primary = k.primary()
	if !single {
		spec.Subkey = k.subkey()
		s.signer = spec.Subkey
	}
	var err error
	s.cert, err = openpgp.NewCertificate(spec)
	if err != nil {
		t.Fatalf("NewCertificate: %v", err)
	}
	at := spec.Signed
	if at.IsZero() {
		at = spec.Created
	}
	s.key, err = s.parsed(t).SigningKeyAt(s.signer.Public(), at)
	if err != nil {
		t.Fatalf("SigningKeyAt: %v", err)
	}
	return s
}

func (s subject) parsed(t testing.TB) *openpgp.Certificate {
	t.Helper()
	c, err := openpgp.ParseCertificate(s.cert)
	if err != nil {
		t.Fatalf("ParseCertificate: %v", err)
	}
	return c
}

// eachSubject runs a test for every kind of key in both layouts.
func eachSubject(t *testing.T, f func(t *testing.T, s subject)) {
	for _, k := range kinds {
		for _, single := range []bool{true, false} {
			name := map[bool]string{true: "single", false: "subkey"}[single]
			t.Run(fmt.Sprintf("%s/%s", k.name, name), func(t *testing.T) { f(t, newSubject(t, k, single)) })
		}
	}
}
