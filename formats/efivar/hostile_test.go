package efivar_test

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"strings"
	"testing"

	"github.com/signwarden/signwarden/formats/cms"
	"github.com/signwarden/signwarden/formats/efivar"
	"github.com/signwarden/signwarden/formats/hostiletest"
)

// contents are signature lists of every kind.
func contents(t testing.TB, s subject) [][]byte {
	t.Helper()
	cert := efivar.X509(owner(t), s.cert)
	hashes := efivar.SHA256(owner(t), sha256.Sum256([]byte("a")), sha256.Sum256([]byte("b")))
	all := [][]byte{marshal(t, cert), marshal(t, hashes), marshal(t, cert, hashes)}
	theirs := file(t, "list.esl", nil)
	run(t, "cert-to-efi-sig-list", "-g", ownerText, s.certFile, theirs)
	return append(all, read(t, theirs))
}

// seeds are updates of db, of every kind: ours, and of efitools and sbvarsign, and the certificates that they are by.
func seeds(t testing.TB, s subject) ([][]byte, []*x509.Certificate) {
	t.Helper()
	var all [][]byte
	for _, data := range append(contents(t, s), nil) {
		all = append(all, sign(t, s, efivar.DB, data, efivar.Options{Time: when}),
			sign(t, s, efivar.DB, data, efivar.Options{Attributes: efivar.Appending}))
	}
	rsa := newSubject(t, "rsa")
	esl := file(t, "in.esl", contents(t, rsa)[2])
	out := file(t, "out.auth", nil)
	run(t, "sign-efi-sig-list", "-k", rsa.keyFile, "-c", rsa.certFile, "db", esl, out)
	all = append(all, read(t, out))
	run(t, "sbvarsign", "--key", rsa.keyFile, "--cert", rsa.certFile, "--output", out, "db", esl)
	all = append(all, read(t, out))
	if len(all) != 12 {
		t.Fatalf("got %d seeds, want 12", len(all))
	}
	return all, []*x509.Certificate{s.cert, rsa.cert}
}

// check asserts what holds for any input, and returns what is wrong with it.
func check(t testing.TB, certs []*x509.Certificate, b []byte) error {
	t.Helper()
	u, err := efivar.Parse(b)
	if err != nil {
		if u != nil || !errors.Is(err, efivar.ErrMalformed) {
			t.Errorf("Parse: got %v", err)
		}
		return err
	}
	lists, err := u.Lists()
	if err != nil {
		if lists != nil || !errors.Is(err, efivar.ErrMalformed) {
			t.Errorf("Lists: got %v", err)
		}
	} else if again, err := efivar.Marshal(lists...); err != nil || !bytes.Equal(again, u.Data) {
		t.Errorf("lists came back as %x, were %x: %v", again, u.Data, err)
	}
	who, err := u.Verify(efivar.DB, efivar.Replacing, certs)
	if errors.Is(err, cms.ErrBadSignature) {
		who, err = u.Verify(efivar.DB, efivar.Appending, certs)
	}
	if err != nil && (who != nil || !errors.Is(err, efivar.ErrMalformed) && !errors.Is(err, cms.ErrMalformed) &&
		!errors.Is(err, cms.ErrUnsupported) && !errors.Is(err, cms.ErrBadSignature)) {
		t.Errorf("Verify: got %v", err)
	}
	return err
}

func TestMutations(t *testing.T) {
	hostiletest.Run(t, func(t *testing.T) hostiletest.Files {
		s := newSubject(t, "p256")
		all, certs := seeds(t, s)
		return hostiletest.Files{Seeds: all, Try: func(t testing.TB, _, b []byte) error { return check(t, certs, b) }}
	})
}

// checkContents has b signed as the contents of a variable, or refused. It returns why.
func checkContents(t testing.TB, s subject, b []byte) error {
	t.Helper()
	s.calls = 0
	out, err := efivar.Sign(s, efivar.DB, b, efivar.Options{Certificate: s.cert, Time: when})
	if err != nil {
		if !errors.Is(err, efivar.ErrMalformed) || out != nil || s.calls != 0 {
			t.Errorf("got %v, %d bytes and %d calls, want ErrMalformed", err, len(out), s.calls)
		}
		return err
	}
	err = verify(t, out, efivar.DB, efivar.Replacing, s.cert)
	if err != nil || s.calls != 1 {
		t.Errorf("what was signed does not verify: %v, %d calls", err, s.calls)
	}
	return nil
}

func TestMutatedContents(t *testing.T) {
	hostiletest.Run(t, func(t *testing.T) hostiletest.Files {
		s := newSubject(t, "p256")
		return hostiletest.Files{Seeds: contents(t, s), Try: func(t testing.TB, _, b []byte) error { return checkContents(t, s, b) }}
	})
}

func FuzzParse(f *testing.F) {
	s := newSubject(f, "p256")
	all, certs := seeds(f, s)
	for _, b := range all {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) { _ = check(t, certs, b) })
}

func FuzzParseLists(f *testing.F) {
	s := newSubject(f, "p256")
	for _, b := range contents(f, s) {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		lists, err := efivar.ParseLists(b)
		if err == nil {
			again, err := efivar.Marshal(lists...)
			if err != nil || !bytes.Equal(again, b) {
				t.Errorf("came back as %x, were %x: %v", again, b, err)
			}
		}
		_ = checkContents(t, s, b)
	})
}

func FuzzParseGUID(f *testing.F) {
	for _, v := range variables {
		f.Add(v.Vendor.String())
	}
	f.Fuzz(func(t *testing.T, s string) {
		g, err := efivar.ParseGUID(s)
		if err == nil && g.String() != strings.ToLower(s) {
			t.Errorf("%q came back as %s", s, g)
		}
	})
}
