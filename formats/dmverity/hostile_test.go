package dmverity_test

import (
	"bytes"
	"crypto/x509"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/signwarden/signwarden/formats/cms"
	"github.com/signwarden/signwarden/formats/dmverity"
	"github.com/signwarden/signwarden/formats/hostiletest"
)

// files are those that veritysetup writes.
func files(t testing.TB) [][]byte {
	t.Helper()
	all := [][]byte{rootHash(t, "sha256"), rootHash(t, "sha512")}
	for _, b := range all {
		_, err := dmverity.ParseRootHash(b)
		if err != nil {
			t.Fatal(err)
		}
	}
	return all
}

// check has a file with a root hash signed, or refused. It returns why.
func check(t testing.TB, s subject, b []byte) error {
	t.Helper()
	s.calls = 0
	text, err := dmverity.ParseRootHash(b)
	if err != nil {
		if text != "" || !errors.Is(err, dmverity.ErrMalformed) {
			t.Errorf("got %q, %v, want ErrMalformed", text, err)
		}
		sig, serr := dmverity.Sign(string(b), s, s.cert, 0)
		if !errors.Is(serr, dmverity.ErrMalformed) || sig != nil || s.calls != 0 {
			t.Errorf("got %v and %d calls, want ErrMalformed", serr, s.calls)
		}
		return err
	}
	if end := strings.TrimPrefix(string(b), text); !slices.Contains([]string{"", "\n", "\r\n"}, end) {
		t.Errorf("%q was read as %q", b, text)
	}
	sig, err := dmverity.Sign(text, s, s.cert, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = dmverity.Verify(text, sig, certs(s))
	if err != nil || s.calls != 1 {
		t.Errorf("what was signed does not verify: %v, %d calls", err, s.calls)
	}
	return nil
}

// Files with root hashes, and the signatures of one.
func TestMutations(t *testing.T) {
	hostiletest.Run(t, func(t *testing.T) hostiletest.Files {
		s := newSubject(t, "p256")
		return hostiletest.Files{Seeds: files(t), Try: func(t testing.TB, _, b []byte) error { return check(t, s, b) }}
	})
}

func TestMutatedSignatures(t *testing.T) {
	hostiletest.Run(t, func(t *testing.T) hostiletest.Files {
		text := strings.Repeat("ab", 32)
		var seeds [][]byte
		var trusted []*x509.Certificate
		for _, key := range []string{"rsa", "p256"} {
			s := newSubject(t, key)
			sig, err := dmverity.Sign(text, s, s.cert, 0)
			if err != nil {
				t.Fatal(err)
			}
			seeds, trusted = append(seeds, sig), append(trusted, s.cert)
		}
		return hostiletest.Files{Seeds: seeds, Try: func(t testing.TB, _, b []byte) error {
			who, err := dmverity.Verify(text, b, trusted)
			if err != nil && (who != nil || !errors.Is(err, cms.ErrMalformed) && !errors.Is(err, cms.ErrUnsupported) && !errors.Is(err, cms.ErrBadSignature)) {
				t.Errorf("got %v", err)
			}
			return err
		}}
	})
}

func FuzzParseRootHash(f *testing.F) {
	s := newSubject(f, "p256")
	for _, b := range files(f) {
		f.Add(b)
		f.Add(bytes.TrimSpace(b))
	}
	f.Fuzz(func(t *testing.T, b []byte) { _ = check(t, s, b) })
}
