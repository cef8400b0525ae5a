package openpgp_test

import (
	"bytes"
	"crypto"
	"errors"
	"io"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signwarden/signwarden/formats/openpgp"
)

// gpgSigned is what gpg signed for the captures.
const gpgSigned = "one \n- two\nFrom three\n"

func TestVerifyPeers(t *testing.T) {
	for _, path := range captures(t, "*.sig", 4) {
		t.Run(filepath.Base(path), func(t *testing.T) {
			c, err := openpgp.ParseCertificate(read(t, strings.TrimSuffix(path, ".sig")+".asc"))
			if err != nil {
				t.Fatal(err)
			}
			sig := read(t, path)
			info, err := openpgp.VerifyDetached(c, strings.NewReader(gpgSigned), bytes.NewReader(sig))
			if err != nil || info.Primary != c.Fingerprint() || info.Signer == c.Fingerprint() {
				t.Errorf("got %+v, %v", info, err)
			}
			_, err = openpgp.VerifyDetached(c, strings.NewReader(gpgSigned+"x"), bytes.NewReader(sig))
			if !errors.Is(err, openpgp.ErrBadSignature) {
				t.Errorf("changed: got %v, want ErrBadSignature", err)
			}
		})
	}
}

func TestVerifyText(t *testing.T) {
	c, err := openpgp.ParseCertificate(read(t, "testdata/gpg-rsa2048.asc"))
	if err != nil {
		t.Fatal(err)
	}
	sig := read(t, "testdata/gpg-rsa2048-text.asc")
	for _, text := range []string{gpgSigned, strings.ReplaceAll(gpgSigned, "\n", "\r\n")} {
		info, err := openpgp.VerifyDetached(c, strings.NewReader(text), bytes.NewReader(sig))
		if err != nil || info.Type != openpgp.SigText {
			t.Errorf("%q: got %+v, %v", text, info, err)
		}
	}
}

func TestVerifyDetachedRefuses(t *testing.T) {
	s, other := newSubject(t, ed, false), newSubject(t, p256, false)
	c := s.parsed(t)
	message := []byte("message")
	good := detach(t, s, message, openpgp.SignOptions{})
	foreign := detach(t, other, message, openpgp.SignOptions{})
	spec := openpgp.CertificateSpec{UserID: userID, Created: created, Expires: created.Add(time.Hour)}
	short := makeSubject(t, ed, false, spec)
	unbounded := short.key
	unbounded.Expires = time.Time{}
	late := short
	late.key = unbounded
	signedAt := func(s subject, at time.Time) []byte {
		return detach(t, s, message, openpgp.SignOptions{Time: at})
	}
	cause := errors.New("net: reset")
	tests := []struct {
		name string
		cert *openpgp.Certificate
		sig  []byte
		want error
	}{
		{"good", c, good, nil},
		{"good among others", c, append(bytes.Clone(foreign), good...), nil},
		{"of another", c, foreign, openpgp.ErrBadSignature},
		{"empty", c, nil, openpgp.ErrMalformed},
		{"text", c, []byte("sig"), openpgp.ErrMalformed},
		{"cut", c, good[:len(good)-1], openpgp.ErrMalformed},
		{"trailing octet", c, append(bytes.Clone(good), 0), openpgp.ErrMalformed},
		{"certificate", c, s.cert, openpgp.ErrMalformed},
		{"too many", c, bytes.Repeat(foreign, 17), openpgp.ErrMalformed},
		{"too large", c, bytes.Repeat(good, 600), openpgp.ErrMalformed},
		{"from the future", c, signedAt(s, time.Now().Add(time.Hour)), openpgp.ErrBadSignature},
		{"before expiry", short.parsed(t), signedAt(short, created.Add(time.Minute)), nil},
		{"after expiry", short.parsed(t), signedAt(late, time.Now()), openpgp.ErrBadSignature},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			info, err := openpgp.VerifyDetached(tt.cert, bytes.NewReader(message), bytes.NewReader(tt.sig))
			if !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
			if err != nil && info != (openpgp.SignatureInfo{}) {
				t.Errorf("an error and %+v", info)
			}
		})
	}
	_, err := openpgp.VerifyDetached(c, io.MultiReader(bytes.NewReader(message), failAfter{cause}), bytes.NewReader(good))
	if !errors.Is(err, cause) {
		t.Errorf("message that breaks off: got %v, want %v", err, cause)
	}
	_, err = openpgp.VerifyDetached(c, bytes.NewReader(message), failAfter{cause})
	if !errors.Is(err, cause) {
		t.Errorf("signature that breaks off: got %v, want %v", err, cause)
	}
}

// SHA-1 signatures of gpg's are refused.
func TestVerifyWeakHash(t *testing.T) {
	g := newGPG(t)
	g.must(nil, "--passphrase", "", "--quick-gen-key", "w@example.org", "rsa2048", "sign", "never")
	cert, _ := g.must(nil, "--export")
	c, err := openpgp.ParseCertificate([]byte(cert))
	if err != nil {
		t.Fatal(err)
	}
	bad := openpgp.ErrBadSignature
	for hash, want := range map[string]error{"SHA1": bad, "SHA224": bad, "SHA256": nil} {
		sig, _ := g.must([]byte("message"), "--digest-algo", hash, "--detach-sign")
		_, err := openpgp.VerifyDetached(c, strings.NewReader("message"), strings.NewReader(sig))
		if !errors.Is(err, want) {
			t.Errorf("%s: got %v, want %v", hash, err, want)
		}
	}
}

// Certificate and Key say they are safe for concurrent use; the race detector listens.
func TestConcurrentUse(t *testing.T) {
	s := newSubject(t, ed, false)
	c := s.parsed(t)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			var sig bytes.Buffer
			k, err := c.SigningKey(s.signer.Public())
			if err != nil {
				t.Error(err)
				return
			}
			err = openpgp.DetachSign(&sig, strings.NewReader("x"), s.key, s.signer, openpgp.SignOptions{Hash: crypto.SHA256})
			if err != nil {
				t.Error(err)
				return
			}
			info, err := openpgp.VerifyDetached(c, strings.NewReader("x"), &sig)
			if err != nil || info.Signer != k.Fingerprint {
				t.Errorf("%+v, %v", info, err)
			}
		})
	}
	wg.Wait()
}
