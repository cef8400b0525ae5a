package openpgp_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/signwarden/signwarden/formats/hostiletest"
	"github.com/signwarden/signwarden/formats/openpgp"
)

// Certificates, detached signatures and clear-signed messages, by gpg, sq and us. A certificate that is taken signs, and
// the signature verifies with it; one that is not reaches no signer.
func TestMutations(t *testing.T) {
	hostiletest.Run(t, func(t *testing.T) hostiletest.Files {
		s := newSubject(t, ed, true)
		cert := s.parsed(t)
		var armored bytes.Buffer
		err := cert.Armor(&armored)
		if err != nil {
			t.Fatal(err)
		}
		seeds := [][]byte{s.cert, armored.Bytes(), newSubject(t, rsa2048, false).cert, detach(t, s, []byte(gpgSigned), openpgp.SignOptions{})}
		by := map[*byte]*openpgp.Certificate{}
		for i := range seeds {
			by[&seeds[i][0]] = cert
		}
		add := func(b []byte, c *openpgp.Certificate) {
			seeds = append(seeds, b)
			by[&b[0]] = c
		}
		for _, name := range certificates {
			b := read(t, "testdata/"+name)
			c, err := openpgp.ParseCertificate(b)
			if err != nil {
				t.Fatal(err)
			}
			add(b, c)
		}
		for _, path := range captures(t, "*.sig", 4) {
			c, err := openpgp.ParseCertificate(read(t, strings.TrimSuffix(path, ".sig")+".asc"))
			if err != nil {
				t.Fatal(err)
			}
			add(read(t, path), c)
		}
		messages, certs := clearSeeds(t)
		for i, m := range messages {
			add(m, certs[i])
		}
		return hostiletest.Files{Seeds: seeds, Try: func(t testing.TB, seed, b []byte) error {
			certErr := tryCertificate(t, s, b)
			_, sigErr := openpgp.VerifyDetached(by[&seed[0]], strings.NewReader(gpgSigned), bytes.NewReader(b))
			if sigErr != nil && !errors.Is(sigErr, openpgp.ErrBadSignature) && !errors.Is(sigErr, openpgp.ErrMalformed) {
				t.Errorf("VerifyDetached: got %v", sigErr)
			}
			clearErr := verifyClear(t, by[&seed[0]], b, s)
			for _, err := range []error{certErr, sigErr, clearErr} {
				if err == nil {
					return nil
				}
				hostiletest.Clear(t, err)
			}
			return certErr
		}}
	})
}

// tryCertificate reads b as a certificate and signs with s's key if it is in it.
func tryCertificate(t testing.TB, s subject, b []byte) error {
	t.Helper()
	c, err := openpgp.ParseCertificate(b)
	if err != nil {
		if !errors.Is(err, openpgp.ErrMalformed) {
			t.Errorf("ParseCertificate: got %v", err)
		}
		return err
	}
	key, err := c.SigningKey(s.signer.Public())
	if err != nil {
		if !errors.Is(err, openpgp.ErrKeyNotFound) && !errors.Is(err, openpgp.ErrKeyUnusable) {
			t.Errorf("SigningKey: got %v", err)
		}
		return err
	}
	var sig bytes.Buffer
	err = openpgp.DetachSign(&sig, strings.NewReader("text"), key, s.signer, openpgp.SignOptions{})
	if err != nil {
		t.Fatalf("DetachSign: %v", err)
	}
	_, err = openpgp.VerifyDetached(c, strings.NewReader("text"), &sig)
	if err != nil {
		t.Errorf("what was signed does not verify: %v", err)
	}
	return nil
}
