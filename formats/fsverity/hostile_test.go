package fsverity_test

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/signwarden/signwarden/formats/cms"
	"github.com/signwarden/signwarden/formats/fsverity"
	"github.com/signwarden/signwarden/formats/hostiletest"
)

func certs(s subject) []*x509.Certificate { return []*x509.Certificate{s.cert} }

// untouched fails the test when it is read.
type untouched struct{ t *testing.T }

func (u untouched) Read([]byte) (int, error) {
	u.t.Error("the file was read")
	return 0, io.EOF
}

// What cannot be signed is found out before the file is read and the signer asked.
func TestRefused(t *testing.T) {
	s, other := newSubject(t, "rsa"), newSubject(t, "other")
	for _, tt := range []struct {
		name string
		p    fsverity.Parameters
		cert *x509.Certificate
		want error
	}{
		{"SHA-1", fsverity.Parameters{Hash: crypto.SHA1}, s.cert, fsverity.ErrParameters},
		{"SHA-384", fsverity.Parameters{Hash: crypto.SHA384}, s.cert, fsverity.ErrParameters},
		{"block of 512", fsverity.Parameters{BlockSize: 512}, s.cert, fsverity.ErrParameters},
		{"block of 128 KiB", fsverity.Parameters{BlockSize: 128 << 10}, s.cert, fsverity.ErrParameters},
		{"block of 5000", fsverity.Parameters{BlockSize: 5000}, s.cert, fsverity.ErrParameters},
		{"block of less than nothing", fsverity.Parameters{BlockSize: -4096}, s.cert, fsverity.ErrParameters},
		{"long salt", fsverity.Parameters{Salt: make([]byte, 33)}, s.cert, fsverity.ErrParameters},
		{"another's certificate", fsverity.Parameters{}, other.cert, cms.ErrWrongKey},
		{"no certificate", fsverity.Parameters{}, nil, cms.ErrUnsupported},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s.calls = 0
			sig, err := fsverity.Sign(untouched{t}, s, tt.cert, tt.p)
			if !errors.Is(err, tt.want) || sig != nil || s.calls != 0 {
				t.Errorf("got %v, %d bytes and %d calls, want %v", err, len(sig), s.calls, tt.want)
			}
			if errors.Is(tt.want, fsverity.ErrParameters) {
				_, err = fsverity.Digest(untouched{t}, tt.p)
				if !errors.Is(err, tt.want) {
					t.Errorf("Digest: got %v", err)
				}
				_, err = fsverity.Verify(untouched{t}, nil, nil, tt.p)
				if !errors.Is(err, tt.want) {
					t.Errorf("Verify: got %v", err)
				}
			}
		})
	}
	broken := errors.New("broken disk")
	s.calls = 0
	_, err := fsverity.Sign(io.MultiReader(bytes.NewReader(content(9000)), iotest.ErrReader(broken)), s, s.cert, fsverity.Parameters{})
	if !errors.Is(err, broken) || s.calls != 0 {
		t.Errorf("got %v and %d calls, want %v", err, s.calls, broken)
	}
}

func TestSignerFaults(t *testing.T) {
	errToken := errors.New("token on fire")
	s := newSubject(t, "rsa")
	for _, tt := range []struct {
		name   string
		change func([]byte) ([]byte, error)
		want   error
	}{
		{"error", func([]byte) ([]byte, error) { return nil, errToken }, errToken},
		{"error and a good signature", func(b []byte) ([]byte, error) { return b, errToken }, errToken},
		{"a lie", func(b []byte) ([]byte, error) { b[9] ^= 1; return b, nil }, cms.ErrSignerOutput},
	} {
		s.change = tt.change
		b, err := fsverity.Sign(bytes.NewReader(nil), s, s.cert, fsverity.Parameters{})
		if !errors.Is(err, tt.want) || b != nil {
			t.Errorf("%s: got %v and %d bytes, want %v", tt.name, err, len(b), tt.want)
		}
	}
}

// A signature is of one file with one set of parameters.
func TestTamper(t *testing.T) {
	s, other := newSubject(t, "rsa"), newSubject(t, "other")
	p := fsverity.Parameters{Hash: crypto.SHA256, BlockSize: 1024, Salt: []byte("salt")}
	b := content(10_000)
	sig, err := fsverity.Sign(bytes.NewReader(b), s, s.cert, p)
	if err != nil {
		t.Fatal(err)
	}
	with := func(change func(*fsverity.Parameters)) fsverity.Parameters {
		q := p
		change(&q)
		return q
	}
	changed := bytes.Clone(b)
	changed[5000] ^= 1
	for _, tt := range []struct {
		name  string
		b     []byte
		certs []*x509.Certificate
		p     fsverity.Parameters
		good  bool
	}{
		{"as it was", b, certs(s), p, true},
		{"another byte", changed, certs(s), p, false},
		{"a byte less", b[:len(b)-1], certs(s), p, false},
		{"a zero more", append(bytes.Clone(b), 0), certs(s), p, false},
		{"another hash", b, certs(s), with(func(p *fsverity.Parameters) { p.Hash = crypto.SHA512 }), false},
		{"another block size", b, certs(s), with(func(p *fsverity.Parameters) { p.BlockSize = 4096 }), false},
		{"another salt", b, certs(s), with(func(p *fsverity.Parameters) { p.Salt = []byte("sal") }), false},
		{"a longer salt", b, certs(s), with(func(p *fsverity.Parameters) { p.Salt = []byte("salt\x00") }), false},
		{"another signer", b, certs(other), p, false},
		{"nobody", b, nil, p, false},
	} {
		_, err := fsverity.Verify(bytes.NewReader(tt.b), sig, tt.certs, tt.p)
		if tt.good && err != nil || !tt.good && !errors.Is(err, cms.ErrBadSignature) {
			t.Errorf("%s: got %v", tt.name, err)
		}
	}
	// A message with the right content in it is not a signature of the file.
	signed, err := hex.DecodeString(strings.TrimSpace(run(t, "fsverity", "digest", "--for-builtin-sig", "--compact", file(t, "f", b))))
	if err != nil {
		t.Fatal(err)
	}
	own, err := cms.Sign(s, nil, cms.Options{Certificate: s.cert, Content: signed})
	if err != nil {
		t.Fatal(err)
	}
	_, err = fsverity.Verify(bytes.NewReader(b), own, certs(s), fsverity.Parameters{})
	if !errors.Is(err, cms.ErrMalformed) {
		t.Errorf("content of its own: got %v", err)
	}
}

// seeds are signatures of a file: ours, and of fsverity.
func seeds(t testing.TB, b []byte) ([][]byte, []*x509.Certificate) {
	t.Helper()
	var all [][]byte
	var trusted []*x509.Certificate
	for _, key := range []string{"rsa", "p256", "p384"} {
		s := newSubject(t, key)
		trusted = append(trusted, s.cert)
		sig, err := fsverity.Sign(bytes.NewReader(b), s, s.cert, fsverity.Parameters{})
		if err != nil {
			t.Fatal(err)
		}
		out := file(t, "f.sig", nil)
		run(t, "fsverity", "sign", file(t, "f", b), out, "--key="+s.keyFile, "--cert="+s.certFile)
		all = append(all, sig, read(t, out))
	}
	return all, trusted
}

// tryVerify asserts what holds for any signature, and returns what is wrong with it.
func tryVerify(t testing.TB, b, sig []byte, trusted []*x509.Certificate) error {
	t.Helper()
	who, err := fsverity.Verify(bytes.NewReader(b), sig, trusted, fsverity.Parameters{})
	if err != nil && (who != nil || !errors.Is(err, cms.ErrMalformed) && !errors.Is(err, cms.ErrUnsupported) && !errors.Is(err, cms.ErrBadSignature)) {
		t.Errorf("got %v", err)
	}
	return err
}

func TestMutations(t *testing.T) {
	hostiletest.Run(t, func(t *testing.T) hostiletest.Files {
		b := content(5000)
		all, trusted := seeds(t, b)
		return hostiletest.Files{Seeds: all, Try: func(t testing.TB, _, sig []byte) error { return tryVerify(t, b, sig, trusted) }}
	})
}

func FuzzVerify(f *testing.F) {
	b := content(5000)
	all, trusted := seeds(f, b)
	for _, sig := range all {
		err := tryVerify(f, b, sig, trusted)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, sig)
	}
	f.Fuzz(func(t *testing.T, content, sig []byte) {
		err := tryVerify(t, content, sig, trusted)
		if err == nil && !bytes.Equal(content, b) {
			t.Errorf("a good signature over %x", content)
		}
	})
}
