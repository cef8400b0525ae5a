package rpm_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/signwarden/signwarden/formats/openpgp"
	"github.com/signwarden/signwarden/formats/rpm"
)

// created is in the past, so that a signature of now is younger than its key.
var created = time.Date(2024, 2, 29, 12, 34, 56, 0, time.UTC)

// A subject is a certificate under test and its signing key.
type subject struct {
	name   string
	signer crypto.Signer
	key    openpgp.Key
	cert   *openpgp.Certificate
}

func newSubject(name string, gen func() (crypto.Signer, error)) func() subject {
	return sync.OnceValue(func() subject {
		signer, err := gen()
		if err != nil {
			panic(err)
		}
		raw, err := openpgp.NewCertificate(openpgp.CertificateSpec{
			UserID: name + " <sign@example.org>", Created: created, Primary: signer,
		})
		if err != nil {
			panic(err)
		}
		cert, err := openpgp.ParseCertificate(raw)
		if err != nil {
			panic(err)
		}
		key, err := cert.SigningKey(signer.Public())
		if err != nil {
			panic(err)
		}
		return subject{name, signer, key, cert}
	})
}

func rsaKey(bits int) func() (crypto.Signer, error) {
	return func() (crypto.Signer, error) { return rsa.GenerateKey(rand.Reader, bits) }
}

func edKey() (crypto.Signer, error) {
	_, k, err := ed25519.GenerateKey(rand.Reader)
	return k, err
}

func ecKey() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

var (
	rsa2048 = newSubject("rsa2048", rsaKey(2048))
	rsa4096 = newSubject("rsa4096", rsaKey(4096))
	ed      = newSubject("ed25519", edKey)
	other   = newSubject("other", edKey)
	p256    = newSubject("p256", ecKey)
)

// countingSigner counts what a signer is asked. With fail it fails, with lie it signs something else.
type countingSigner struct {
	crypto.Signer
	asked int
	fail  error
	lie   bool
}

func (s *countingSigner) Sign(r io.Reader, digest []byte, o crypto.SignerOpts) ([]byte, error) {
	s.asked++
	if s.fail != nil {
		return nil, s.fail
	}
	if s.lie {
		digest = bytes.Repeat([]byte{1}, len(digest))
	}
	return s.Signer.Sign(r, digest, o)
}

// open reads a package in memory.
func open(t testing.TB, b []byte) *rpm.Package {
	t.Helper()
	p, err := rpm.ReadPackage(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatalf("ReadPackage: %v", err)
	}
	return p
}

// apply is the package b with the update.
func apply(t testing.TB, u *rpm.Update, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	err := u.Copy(&out, bytes.NewReader(b))
	if err != nil {
		t.Fatalf("Copy: %v", err)
	}
	if int64(out.Len()) != u.Size() {
		t.Fatalf("the new package has %d bytes, Size says %d", out.Len(), u.Size())
	}
	return out.Bytes()
}

// sign signs a package in memory.
func sign(t testing.TB, b []byte, s subject, o rpm.Options) []byte {
	t.Helper()
	signing, err := rpm.Prepare(open(t, b), s.key, o)
	if err != nil {
		t.Fatalf("Prepare: %v", err)
	}
	u, err := signing.Sign(s.signer, s.signer)
	if err != nil {
		t.Fatalf("Sign: %v", err)
	}
	return apply(t, u, b)
}

// update signs a package in memory and returns the Update.
func update(t testing.TB, b []byte, s subject) *rpm.Update {
	t.Helper()
	signing, err := rpm.Prepare(open(t, b), s.key, rpm.Options{})
	if err != nil {
		t.Fatalf("Prepare: %v", err)
	}
	u, err := signing.Sign(s.signer, nil)
	if err != nil {
		t.Fatalf("Sign: %v", err)
	}
	return u
}

func remove(t testing.TB, b []byte, files bool) []byte {
	t.Helper()
	u, err := rpm.DeleteSignatures(open(t, b), files)
	if err != nil {
		t.Fatalf("DeleteSignatures: %v", err)
	}
	return apply(t, u, b)
}
