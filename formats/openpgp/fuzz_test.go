package openpgp_test

import (
	"bytes"
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/signwarden/signwarden/formats/openpgp"
)

func FuzzParseCertificate(f *testing.F) {
	for _, path := range captures(f, "*.asc", 8) {
		b := read(f, path)
		f.Add(b)
		c, err := openpgp.ParseCertificate(b)
		if err == nil {
			f.Add(c.Bytes())
		}
	}
	f.Add(newSubject(f, p384, false).cert)
	f.Add(newSubject(f, ed, true).cert)
	pub := ed.primary().Public()
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := openpgp.ParseCertificate(b)
		if err != nil {
			if !errors.Is(err, openpgp.ErrMalformed) {
				t.Errorf("got %v, want ErrMalformed", err)
			}
			return
		}
		if b[0]&0x80 != 0 && !bytes.Equal(c.Bytes(), b) {
			t.Error("binary certificate came back changed")
		}
		var armored bytes.Buffer
		err = c.Armor(&armored)
		if err != nil {
			t.Fatal(err)
		}
		// The armor of a certificate near the limit may be over it.
		again, err := openpgp.ParseCertificate(armored.Bytes())
		if err != nil && armored.Len() <= openpgp.MaxCertificate {
			t.Fatalf("reading it again: %v", err)
		}
		if err == nil && (again.Fingerprint() != c.Fingerprint() || !bytes.Equal(again.Bytes(), c.Bytes())) {
			t.Error("came back as another certificate")
		}
		_, err = c.SigningKey(pub)
		if err != nil && !errors.Is(err, openpgp.ErrKeyNotFound) && !errors.Is(err, openpgp.ErrKeyUnusable) {
			t.Errorf("SigningKey: %v", err)
		}
	})
}

// Whatever ClearSign signs, go-crypto reads as the text that section 7 says, and verifies.
func FuzzClearSign(f *testing.F) {
	if len(clearTexts) == 0 {
		f.Fatal("no seeds")
	}
	for _, tt := range clearTexts {
		f.Add(tt.text)
	}
	s := newSubject(f, ed, true)
	f.Fuzz(func(t *testing.T, text string) {
		var out bytes.Buffer
		err := openpgp.ClearSign(&out, strings.NewReader(text), s.key, s.signer, openpgp.SignOptions{})
		if err != nil {
			if !errors.Is(err, openpgp.ErrMalformed) || out.Len() != 0 {
				t.Errorf("got %v and %d bytes, want ErrMalformed and none", err, out.Len())
			}
			return
		}
		checkClear(t, s, text, out.Bytes())
	})
}

// No signature but of the signed text is good, whatever is done to it.
func FuzzVerifyDetached(f *testing.F) {
	var certs []*openpgp.Certificate
	for i, path := range captures(f, "*.sig", 4) {
		c, err := openpgp.ParseCertificate(read(f, strings.TrimSuffix(path, ".sig")+".asc"))
		if err != nil {
			f.Fatal(err)
		}
		certs = append(certs, c)
		f.Add(uint8(i), []byte(gpgSigned), read(f, path))
		f.Add(uint8(i), []byte("other"), read(f, path))
		if filepath.Base(path) == "gpg-rsa2048.sig" {
			f.Add(uint8(i), []byte(gpgSigned), read(f, "testdata/gpg-rsa2048-text.asc"))
		}
	}
	f.Fuzz(func(t *testing.T, i uint8, message, sig []byte) {
		c := certs[int(i)%len(certs)]
		info, err := openpgp.VerifyDetached(c, bytes.NewReader(message), bytes.NewReader(sig))
		if err != nil {
			if !errors.Is(err, openpgp.ErrBadSignature) && !errors.Is(err, openpgp.ErrMalformed) {
				t.Errorf("got %v", err)
			}
			return
		}
		got := string(message)
		if info.Type == openpgp.SigText {
			got = strings.ReplaceAll(got, "\r\n", "\n")
		}
		if got != gpgSigned || info.Primary != c.Fingerprint() {
			t.Errorf("a good signature over %q: %+v", message, info)
		}
	})
}

// clearSeeds are clear-signed messages of the peers and of ours, with the certificates that they are by.
func clearSeeds(t testing.TB) (messages [][]byte, certs []*openpgp.Certificate) {
	t.Helper()
	for _, path := range captures(t, "*-clear.asc", 4) {
		c, err := openpgp.ParseCertificate(read(t, strings.TrimSuffix(path, "-clear.asc")+".asc"))
		if err != nil {
			t.Fatal(err)
		}
		messages, certs = append(messages, read(t, path)), append(certs, c)
	}
	s := newSubject(t, ed, true)
	for _, tt := range clearTexts {
		if len(tt.text) < 1000 {
			messages, certs = append(messages, clearSign(t, s, tt.text)), append(certs, s.parsed(t))
		}
	}
	return messages, certs
}

// verifyClear asserts what holds for any message: what verifies is a text that, signed again, verifies as the same.
func verifyClear(t testing.TB, c *openpgp.Certificate, message []byte, again subject) error {
	t.Helper()
	var text bytes.Buffer
	_, err := openpgp.VerifyClear(c, bytes.NewReader(message), &text)
	if err != nil {
		if !errors.Is(err, openpgp.ErrBadSignature) && !errors.Is(err, openpgp.ErrMalformed) {
			t.Errorf("VerifyClear: got %v", err)
		}
		return err
	}
	var second bytes.Buffer
	_, err = openpgp.VerifyClear(again.parsed(t), bytes.NewReader(clearSign(t, again, text.String()+"\n")), &second)
	if err != nil || second.String() != text.String() {
		t.Errorf("the text %q came back as %q, %v", text.String(), second.String(), err)
	}
	return nil
}

func FuzzVerifyClear(f *testing.F) {
	messages, certs := clearSeeds(f)
	for i, m := range messages {
		f.Add(uint8(i), m)
	}
	s := newSubject(f, ed, true)
	f.Fuzz(func(t *testing.T, i uint8, message []byte) { _ = verifyClear(t, certs[int(i)%len(certs)], message, s) })
}
