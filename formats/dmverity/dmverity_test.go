package dmverity_test

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"errors"
	"strings"
	"testing"

	"github.com/signwarden/signwarden/formats/cms"
	"github.com/signwarden/signwarden/formats/dmverity"
)

// rootHash is of a small device, by veritysetup, as the file that it writes.
func rootHash(t testing.TB, hash string) []byte {
	t.Helper()
	data := file(t, "data", bytes.Repeat([]byte("0123456789abcdef"), 4096))
	out := file(t, "roothash", nil)
	run(t, "veritysetup", "format", "--hash="+hash, "--root-hash-file="+out, data, file(t, "tree", nil))
	return read(t, out)
}

func certs(s subject) []*x509.Certificate { return []*x509.Certificate{s.cert} }

// With RSA the signature is the one that the kernel's documentation has openssl make, byte for byte, over what
// veritysetup computes.
func TestSameAsOpenSSL(t *testing.T) {
	s := newSubject(t, "rsa")
	for name, h := range map[string]crypto.Hash{"sha256": crypto.SHA256, "sha512": crypto.SHA512} {
		b := rootHash(t, name)
		text, err := dmverity.ParseRootHash(b)
		if err != nil || len(text) != 2*h.Size() || text != strings.TrimSpace(string(b)) {
			t.Fatalf("%q: got %q, %v", b, text, err)
		}
		for md, o := range map[string]crypto.Hash{"sha256": crypto.SHA256, "sha384": crypto.SHA384, "sha512": crypto.SHA512, "": 0} {
			args := []string{"smime", "-sign", "-nocerts", "-noattr", "-binary", "-inkey", s.keyFile, "-signer", s.certFile, "-outform", "der",
				"-in", file(t, "content", []byte(text)), "-out"}
			if md != "" {
				args = append([]string{args[0], "-md", md}, args[1:]...)
			}
			out := file(t, "p7s", nil)
			run(t, "openssl", append(args, out)...)
			got, err := dmverity.Sign(text, s, s.cert, o)
			if want := read(t, out); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s, signed with %q: got %x, %v\nwant %x", name, md, got, err, want)
			}
			who, err := dmverity.Verify(text, got, certs(s))
			if err != nil || len(who) != 1 {
				t.Errorf("%s, signed with %q: Verify: %v", name, md, err)
			}
		}
	}
}

// openssl verifies every kind of key.
func TestOpenSSLVerifies(t *testing.T) {
	text, err := dmverity.ParseRootHash(rootHash(t, "sha256"))
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"rsa", "p256", "p384", "p521"} {
		s := newSubject(t, key)
		sig, err := dmverity.Sign(text, s, s.cert, 0)
		if err != nil {
			t.Fatalf("%s: %v", key, err)
		}
		openssl := func(content string) (string, error) {
			return try(t, "openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", file(t, "sig", sig), "-noverify",
				"-certfile", s.certFile, "-content", file(t, "content", []byte(content)), "-out", "/dev/null")
		}
		out, err := openssl(text)
		if err != nil {
			t.Errorf("%s: %v\n%s", key, err, out)
		}
		out, err = openssl(text + "\n")
		if err == nil {
			t.Errorf("openssl verifies a line too: this test could not fail\n%s", out)
		}
	}
}

func TestParseRootHash(t *testing.T) {
	digits := strings.Repeat("0123456789abcdef", 8)
	for _, n := range []int{64, 96, 128} {
		for _, end := range []string{"", "\n", "\r\n"} {
			got, err := dmverity.ParseRootHash([]byte(digits[:n] + end))
			if err != nil || got != digits[:n] {
				t.Errorf("%d digits and %q: got %q, %v", n, end, got, err)
			}
		}
	}
	for _, bad := range []string{
		"", "\n", digits[:40], digits[:63], digits[:65], digits + "0", digits + "\n\n", digits[:64] + "\n\n", " " + digits[:63],
		digits[:63] + " ", digits[:63] + "g", strings.ToUpper(digits[:64]), digits[:63] + "\x00", "0x" + digits[:62], strings.Repeat("0", 1000),
	} {
		got, err := dmverity.ParseRootHash([]byte(bad))
		if !errors.Is(err, dmverity.ErrMalformed) || got != "" {
			t.Errorf("%q: got %q, %v; want ErrMalformed", bad, got, err)
		}
	}
}

func TestRefused(t *testing.T) {
	s, other := newSubject(t, "rsa"), newSubject(t, "other")
	text := strings.Repeat("ab", 32)
	errToken := errors.New("token on fire")
	for _, tt := range []struct {
		name string
		text string
		cert *x509.Certificate
		hash crypto.Hash
		want error
	}{
		{"no hash", "", s.cert, 0, dmverity.ErrMalformed},
		{"upper case", strings.ToUpper(text), s.cert, 0, dmverity.ErrMalformed},
		{"SHA-1", text, s.cert, crypto.SHA1, cms.ErrUnsupported},
		{"MD5", text, s.cert, crypto.MD5, cms.ErrUnsupported},
		{"another's certificate", text, other.cert, 0, cms.ErrWrongKey},
		{"no certificate", text, nil, 0, cms.ErrUnsupported},
	} {
		s.calls = 0
		sig, err := dmverity.Sign(tt.text, s, tt.cert, tt.hash)
		if !errors.Is(err, tt.want) || sig != nil || s.calls != 0 {
			t.Errorf("%s: got %v, %d bytes and %d calls, want %v", tt.name, err, len(sig), s.calls, tt.want)
		}
	}
	s.change = func(b []byte) ([]byte, error) { return b, errToken }
	if sig, err := dmverity.Sign(text, s, s.cert, 0); !errors.Is(err, errToken) || sig != nil {
		t.Errorf("an error of the signer: got %v and %d bytes", err, len(sig))
	}
	s.change = func(b []byte) ([]byte, error) { b[9] ^= 1; return b, nil }
	if sig, err := dmverity.Sign(text, s, s.cert, 0); !errors.Is(err, cms.ErrSignerOutput) || sig != nil {
		t.Errorf("a lie of the signer: got %v and %d bytes", err, len(sig))
	}
}

func TestTamper(t *testing.T) {
	s, other := newSubject(t, "rsa"), newSubject(t, "other")
	text := strings.Repeat("ab", 32)
	sig, err := dmverity.Sign(text, s, s.cert, 0)
	if err != nil {
		t.Fatal(err)
	}
	own, err := cms.Sign(s, nil, cms.Options{Certificate: s.cert, Content: []byte(text)})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name  string
		text  string
		sig   []byte
		certs []*x509.Certificate
		want  error
	}{
		{"as it was", text, sig, certs(s), nil},
		{"another hash", strings.Repeat("ac", 32), sig, certs(s), cms.ErrBadSignature},
		{"a longer hash", text + text, sig, certs(s), cms.ErrBadSignature},
		{"no hash", "ab", sig, certs(s), dmverity.ErrMalformed},
		{"another signer", text, sig, certs(other), cms.ErrBadSignature},
		{"nobody", text, sig, nil, cms.ErrBadSignature},
		{"content of its own", text, own, certs(s), cms.ErrMalformed},
		{"no signature", text, nil, certs(s), cms.ErrMalformed},
	} {
		who, err := dmverity.Verify(tt.text, tt.sig, tt.certs)
		if !errors.Is(err, tt.want) || (who == nil) != (tt.want != nil) {
			t.Errorf("%s: got %v, want %v", tt.name, err, tt.want)
		}
	}
}
