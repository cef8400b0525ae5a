package rpm_test

import (
	"bytes"
	"crypto"
	"errors"
	"io"
	"slices"
	"testing"

	"github.com/signwarden/signwarden/formats/openpgp"
	"github.com/signwarden/signwarden/formats/rpm"
)

// messageSigner signs messages as a gateway does that hashes and looks for itself.
type messageSigner struct {
	subject
	t        testing.TB
	messages [][]byte
	digests  int
}

func (m *messageSigner) Public() crypto.PublicKey { return m.signer.Public() }

func (m *messageSigner) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	m.digests++
	return m.signer.Sign(rand, digest, opts)
}

func (m *messageSigner) SignMessage(rand io.Reader, message []byte, opts crypto.SignerOpts) ([]byte, error) {
	m.messages = append(m.messages, message)
	h := opts.HashFunc()
	if d, ok := opts.(interface{ DigestHash() crypto.Hash }); ok {
		h = d.DigestHash()
	}
	head, trailer, err := rpm.ReadMessage(message, h)
	if err != nil {
		m.t.Errorf("ReadMessage: %v", err)
		return nil, err
	}
	if head.NEVRA.Name == "" || trailer.Issuer != m.key.Fingerprint {
		m.t.Errorf("read %+v, %+v", head.NEVRA, trailer)
	}
	sum := h.New()
	sum.Write(message)
	return m.signer.Sign(rand, sum.Sum(nil), opts)
}

// A signer that is shown messages sees the package, and makes the same signature.
func TestSignMessage(t *testing.T) {
	subjects := []subject{rsa2048(), ed()}
	db := rpmDB(t, subjects...)
	for name, b := range corpus(t) {
		for _, s := range subjects {
			m := &messageSigner{subject: s, t: t}
			p := open(t, b)
			signing, err := rpm.Prepare(p, s.key, rpm.Options{})
			if err != nil {
				t.Fatal(err)
			}
			u, err := signing.Sign(m, nil)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			rpmkeysOK(t, db, apply(t, u, b))
			// What has no message, a digest of the payload too, goes as a digest.
			want := 0
			for _, r := range signing.Requests() {
				if r.Message() != nil {
					want++
				}
			}
			if len(m.messages) != want || m.digests != len(signing.Requests())-want {
				t.Errorf("%s: %d messages and %d digests, want %d of %d", name, len(m.messages), m.digests, want, len(signing.Requests()))
			}
			if want > 0 && !bytes.HasPrefix(m.messages[0], p.Header.Bytes()) {
				t.Errorf("%s: the message does not begin with the header", name)
			}
		}
	}
}

func TestReadMessageErrors(t *testing.T) {
	b := demo(t)
	signing, err := rpm.Prepare(open(t, b), rsa2048().key, rpm.Options{Hash: crypto.SHA256})
	if err != nil {
		t.Fatal(err)
	}
	good := signing.Requests()[0].Message()
	if _, _, err := rpm.ReadMessage(good, crypto.SHA256); err != nil {
		t.Fatal(err)
	}
	header := open(t, b).Header.Bytes()
	cert := bytes.Clone(good)
	cert[len(header)+1] = 0x13 // a certification
	for name, m := range map[string][]byte{
		"empty":          nil,
		"no trailer":     header,
		"cut":            good[:len(good)-1],
		"another type":   cert,
		"payload behind": slices.Concat(header, []byte("payload"), good[len(header):]),
		"something else": append([]byte("tree 4b825dc\n"), good...),
		"too long":       append(bytes.Clone(good), make([]byte, rpm.MaxMessage)...),
	} {
		h, _, err := rpm.ReadMessage(m, crypto.SHA256)
		if h != nil || !errors.Is(err, rpm.ErrMalformed) && !errors.Is(err, openpgp.ErrMalformed) {
			t.Errorf("%s: got %v, %v; want ErrMalformed", name, h, err)
		}
	}
	if _, _, err := rpm.ReadMessage(good, crypto.SHA512); !errors.Is(err, rpm.ErrMalformed) {
		t.Errorf("to be hashed with another hash: got %v", err)
	}
}

func FuzzReadMessage(f *testing.F) {
	n := 0
	for _, b := range corpus(f) {
		signing, err := rpm.Prepare(open(f, b), ed().key, rpm.Options{Hash: crypto.SHA256})
		if err != nil {
			f.Fatal(err)
		}
		if m := signing.Requests()[0].Message(); m != nil && len(m) < 100<<10 {
			f.Add(m)
			n++
		}
	}
	if n < 10 {
		f.Fatalf("%d seeds", n)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		h, trailer, err := rpm.ReadMessage(b, crypto.SHA256)
		if err != nil {
			if h != nil || !expected(err) {
				t.Errorf("got %v, %v", h, err)
			}
			return
		}
		if h.NEVRA.Name == "" || trailer.Hash != crypto.SHA256 || !bytes.HasPrefix(b, h.Bytes()) {
			t.Errorf("got %+v, %+v", h.NEVRA, trailer)
		}
	})
}
