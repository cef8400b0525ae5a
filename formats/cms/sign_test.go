package cms_test

import (
	"bytes"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signwarden/signwarden/formats/cms"
	"golang.org/x/crypto/cryptobyte"
)

var message = []byte("a binary\r\nmessage\x00 of any \xff bytes\n")

func sum(h crypto.Hash, b []byte) []byte {
	w := h.New()
	w.Write(b)
	return w.Sum(nil)
}

func digestOf(content []byte) func(crypto.Hash) ([]byte, error) {
	return func(h crypto.Hash) ([]byte, error) { return sum(h, content), nil }
}

// sign signs message and fails the test on an error.
func sign(t testing.TB, s subject, o cms.Options) []byte {
	t.Helper()
	o.Certificate = s.cert
	h := o.Hash
	if h == 0 {
		var err error
		h, err = cms.DefaultHash(s.cert.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
	}
	der, err := cms.Sign(s, sum(h, message), o)
	if err != nil {
		t.Fatalf("Sign: %v", err)
	}
	return der
}

// variants are the switches, each alone and as the formats set them.
func variants(s subject) map[string]cms.Options {
	now := time.Now()
	certs := []*x509.Certificate{s.cert}
	return map[string]cms.Options{
		"kernel":             {},
		"kernel -k":          {SubjectKeyID: true},
		"fsverity":           {HashNULL: true},
		"attributes":         {Attributes: true},
		"time":               {Attributes: true, SigningTime: now},
		"time after 2049":    {Attributes: true, SigningTime: now.AddDate(50, 0, 0)},
		"certificate":        {Certificates: certs},
		"everything":         {Attributes: true, SigningTime: now, Certificates: certs, SubjectKeyID: true, HashNULL: true},
		"content":            {Content: message, Certificates: certs},
		"content attributes": {Content: message, Attributes: true, SubjectKeyID: true, Certificates: certs},
	}
}

func TestOpenSSLVerifies(t *testing.T) {
	content := file(t, "content", message)
	for _, key := range []string{"rsa", "p256", "p384", "p521"} {
		s := newSubject(t, key, nil)
		cert := s.certFile(t)
		for name, o := range variants(s) {
			for _, pss := range []bool{false, true} {
				if pss && key != "rsa" {
					continue
				}
				for _, h := range []crypto.Hash{0, crypto.SHA512} {
					if h != 0 && name != "kernel" && name != "attributes" {
						continue
					}
					t.Run(fmt.Sprintf("%s/%s/pss=%v/%v", key, name, pss, h), func(t *testing.T) {
						o := o
						o.PSS, o.Hash = pss, h
						der := sign(t, s, o)
						args := []string{"cms", "-verify", "-binary", "-inform", "DER", "-in", file(t, "sig", der),
							"-noverify", "-certfile", cert, "-out", t.TempDir() + "/out"}
						if o.Content == nil {
							args = append(args, "-content", content)
						}
						if o.Certificates == nil {
							args = append(args, "-nointern")
						}
						out, err := run(t, "openssl", args...)
						if err != nil {
							t.Errorf("openssl: %v\n%s", err, out)
						}
						checkOwn(t, s, o, der)
					})
				}
			}
		}
	}
}

// checkOwn asserts what this package makes of its own message.
func checkOwn(t *testing.T, s subject, o cms.Options, der []byte) {
	t.Helper()
	p, err := cms.Parse(der)
	if err != nil {
		t.Fatalf("Parse: %v", err)
	}
	digest := digestOf(message)
	if o.Content != nil {
		digest = p.ContentDigest
	}
	who, err := p.Verify(digest, []*x509.Certificate{s.cert})
	if err != nil {
		t.Fatalf("Verify: %v", err)
	}
	if len(who) != 1 || !who[0].Certificate.Equal(s.cert) || who[0].PSS != o.PSS || who[0].Attributes != o.Attributes {
		t.Errorf("Verify: got %+v", who)
	}
	if want := o.SigningTime.UTC().Truncate(time.Second); !who[0].SigningTime.Equal(want) {
		t.Errorf("signing time: got %s, want %s", who[0].SigningTime, want)
	}
	if (p.Content != nil) != (o.Content != nil) || len(p.Certificates) != len(o.Certificates) {
		t.Errorf("got content %v and %d certificates", p.Content != nil, len(p.Certificates))
	}
	other := newSubject(t, "p256", nil)
	_, err = p.Verify(digest, []*x509.Certificate{other.cert})
	if !errors.Is(err, cms.ErrBadSignature) {
		t.Errorf("by a stranger: got %v, want ErrBadSignature", err)
	}
	_, err = p.Verify(digestOf([]byte("other")), []*x509.Certificate{s.cert})
	if !errors.Is(err, cms.ErrBadSignature) {
		t.Errorf("of another content: got %v, want ErrBadSignature", err)
	}
}

// What openssl signs, this package verifies, and makes the same of: RSA PKCS #1 v1.5 is deterministic.
func TestSameAsOpenSSL(t *testing.T) {
	s := newSubject(t, "rsa", nil)
	cert, key, content := s.certFile(t), s.keyFile(t), file(t, "content", message)
	for _, tt := range []struct {
		name string
		args []string
		o    cms.Options
		same bool
	}{
		{"bare", []string{"-noattr", "-nocerts"}, cms.Options{}, true},
		{"keyid", []string{"-noattr", "-nocerts", "-keyid"}, cms.Options{SubjectKeyID: true}, true},
		{"certificate", []string{"-noattr"}, cms.Options{Certificates: []*x509.Certificate{s.cert}}, true},
		{"sha512", []string{"-noattr", "-nocerts", "-md", "sha512"}, cms.Options{Hash: crypto.SHA512}, true},
		{"content", []string{"-noattr", "-nocerts", "-nodetach"}, cms.Options{Content: message}, true},
		{"attributes", []string{"-nocerts", "-nosmimecap"}, cms.Options{}, false},
		{"pss", []string{"-nocerts", "-keyopt", "rsa_padding_mode:pss"}, cms.Options{PSS: true}, false},
		{"pss noattr", []string{"-nocerts", "-noattr", "-keyopt", "rsa_padding_mode:pss", "-keyopt", "rsa_pss_saltlen:digest"},
			cms.Options{PSS: true}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := t.TempDir() + "/sig"
			args := append([]string{"cms", "-sign", "-binary", "-outform", "DER", "-in", content, "-out", path,
				"-signer", cert, "-inkey", key}, tt.args...)
			out, err := run(t, "openssl", args...)
			if err != nil {
				t.Fatalf("openssl: %v\n%s", err, out)
			}
			theirs, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if tt.same {
				if ours := sign(t, s, tt.o); !bytes.Equal(ours, theirs) {
					t.Errorf("got %x\nwant %x", ours, theirs)
				}
			}
			p, err := cms.Parse(theirs)
			if err != nil {
				t.Fatalf("Parse: %v", err)
			}
			digest := digestOf(message)
			if p.Content != nil {
				digest = p.ContentDigest
			}
			_, err = p.Verify(digest, []*x509.Certificate{s.cert})
			if err != nil {
				t.Errorf("Verify: %v", err)
			}
		})
	}
}

// openssl prints what a message holds, which is compared with what was asked for.
func TestOpenSSLPrints(t *testing.T) {
	s := newSubject(t, "rsa", nil)
	for _, tt := range []struct {
		name       string
		o          cms.Options
		want, none []string
	}{
		{"kernel", cms.Options{}, []string{"issuerAndSerialNumber", "certificates:\n      <ABSENT>",
			"signedAttrs:\n          <ABSENT>", "parameter: <ABSENT>", "rsaEncryption"}, []string{"signingTime"}},
		{"fsverity", cms.Options{HashNULL: true}, []string{"sha256 (2.16.840.1.101.3.4.2.1)\n        parameter: NULL"},
			[]string{"parameter: <ABSENT>"}},
		{"keyid", cms.Options{SubjectKeyID: true}, []string{"subjectKeyIdentifier"}, []string{"issuerAndSerialNumber"}},
		{"attributes", cms.Options{Attributes: true}, []string{"contentType", "messageDigest"}, []string{"signingTime"}},
		{"pss", cms.Options{PSS: true}, []string{"rsassaPss", "INTEGER :20"}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out, err := run(t, "openssl", "cms", "-cmsout", "-print", "-inform", "DER", "-noout", "-in", file(t, "sig", sign(t, s, tt.o)))
			if err != nil {
				t.Fatalf("openssl: %v\n%s", err, out)
			}
			flat := strings.Join(strings.Fields(out), " ")
			for _, w := range tt.want {
				if !strings.Contains(flat, strings.Join(strings.Fields(w), " ")) {
					t.Errorf("no %q in\n%s", w, out)
				}
			}
			for _, w := range tt.none {
				if strings.Contains(flat, w) {
					t.Errorf("%q in\n%s", w, out)
				}
			}
		})
	}
}

func TestRefused(t *testing.T) {
	rsaSubject, p384 := newSubject(t, "rsa", nil), newSubject(t, "p384", nil)
	p224, ed := newSubject(t, "p224", nil), newSubject(t, "ed25519", nil)
	other := newSubject(t, "p256", nil)
	noID := *rsaSubject.cert
	noID.SubjectKeyId = nil
	digest := sum(crypto.SHA256, message)
	for _, tt := range []struct {
		name   string
		s      subject
		digest []byte
		o      cms.Options
		want   error
	}{
		{"no certificate", rsaSubject, digest, cms.Options{}, cms.ErrUnsupported},
		{"another key's certificate", rsaSubject, digest, cms.Options{Certificate: other.cert}, cms.ErrWrongKey},
		{"SHA-1", rsaSubject, sum(crypto.SHA1, message), cms.Options{Certificate: rsaSubject.cert, Hash: crypto.SHA1}, cms.ErrUnsupported},
		{"short digest", rsaSubject, digest[1:], cms.Options{Certificate: rsaSubject.cert}, cms.ErrMalformed},
		{"digest of another hash", rsaSubject, digest, cms.Options{Certificate: rsaSubject.cert, Hash: crypto.SHA512}, cms.ErrMalformed},
		{"P-384 with SHA-256", p384, digest, cms.Options{Certificate: p384.cert, Hash: crypto.SHA256}, cms.ErrUnsupported},
		{"P-224", p224, digest, cms.Options{Certificate: p224.cert}, cms.ErrUnsupported},
		{"Ed25519", ed, digest, cms.Options{Certificate: ed.cert, Hash: crypto.SHA256}, cms.ErrUnsupported},
		{"PSS with ECDSA", p384, sum(crypto.SHA384, message), cms.Options{Certificate: p384.cert, PSS: true}, cms.ErrUnsupported},
		{"no key id", rsaSubject, digest, cms.Options{Certificate: &noID, SubjectKeyID: true}, cms.ErrUnsupported},
		{"time without attributes", rsaSubject, digest, cms.Options{Certificate: rsaSubject.cert, SigningTime: time.Now()}, cms.ErrUnsupported},
		{"type without attributes", rsaSubject, digest, cms.Options{Certificate: rsaSubject.cert, ContentType: asn1.ObjectIdentifier{1, 2, 3}}, cms.ErrUnsupported},
		{"another content", rsaSubject, digest, cms.Options{Certificate: rsaSubject.cert, Content: []byte("other")}, cms.ErrMalformed},
		{"content is no DER", rsaSubject, nil, cms.Options{Certificate: rsaSubject.cert, Content: []byte{4, 3, 1}, ContentDER: true}, cms.ErrMalformed},
		{"33 certificates", rsaSubject, digest, cms.Options{Certificate: rsaSubject.cert, Certificates: make([]*x509.Certificate, 33)}, cms.ErrUnsupported},
		{"digest attribute of the caller's", rsaSubject, digest, cms.Options{Certificate: rsaSubject.cert, Attributes: true,
			More: [][]byte{{0x30, 17, 6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 9, 4, 0x31, 4, 4, 2, 1, 2}}}, cms.ErrMalformed},
		{"attribute that is none", rsaSubject, digest, cms.Options{Certificate: rsaSubject.cert, Attributes: true, More: [][]byte{{1, 2, 3}}}, cms.ErrMalformed},
		{"65 attributes", rsaSubject, digest, cms.Options{Certificate: rsaSubject.cert, Attributes: true,
			More: slices.Repeat([][]byte{mustAttribute(t)}, 63)}, cms.ErrMalformed},
		{"time out of range", rsaSubject, digest, cms.Options{Certificate: rsaSubject.cert, Attributes: true, SigningTime: time.Unix(-1<<40, 0)}, cms.ErrMalformed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.s.calls = 0
			der, err := cms.Sign(tt.s, tt.digest, tt.o)
			if !errors.Is(err, tt.want) || der != nil {
				t.Errorf("got %v and %d bytes, want %v", err, len(der), tt.want)
			}
			if tt.s.calls != 0 {
				t.Errorf("the signer was asked %d times", tt.s.calls)
			}
		})
	}
}

var errToken = errors.New("token on fire")

func TestSignerFaults(t *testing.T) {
	for _, key := range []string{"rsa", "p256"} {
		s := newSubject(t, key, nil)
		for _, tt := range []struct {
			name   string
			change func([]byte) ([]byte, error)
			want   error
		}{
			{"error", func([]byte) ([]byte, error) { return nil, errToken }, errToken},
			{"error and a good signature", func(b []byte) ([]byte, error) { return b, errToken }, errToken},
			{"nothing", func([]byte) ([]byte, error) { return nil, nil }, cms.ErrSignerOutput},
			{"a flipped bit", func(b []byte) ([]byte, error) { b[len(b)-1] ^= 1; return b, nil }, cms.ErrSignerOutput},
			{"too long", func(b []byte) ([]byte, error) { return append(b, 0), nil }, cms.ErrSignerOutput},
			{"too long in front", func(b []byte) ([]byte, error) { return append([]byte{0}, b...), nil }, cms.ErrSignerOutput},
			{"cut", func(b []byte) ([]byte, error) { return b[:len(b)-1], nil }, cms.ErrSignerOutput},
		} {
			t.Run(key+"/"+tt.name, func(t *testing.T) {
				s.change = tt.change
				der, err := cms.Sign(s, sum(crypto.SHA256, message), cms.Options{Certificate: s.cert})
				if !errors.Is(err, tt.want) || der != nil {
					t.Errorf("got %v and %d bytes, want %v", err, len(der), tt.want)
				}
			})
		}
	}
}

// Signatures whose first byte is zero keep it, even from a signer that cuts it off.
func TestLeadingZero(t *testing.T) {
	s := newSubject(t, "rsa", nil)
	key := s.Signer.(*rsa.PrivateKey)
	for _, cut := range []bool{false, true} {
		found := false
		for i := 0; !found && i < 5000; i++ {
			content := fmt.Appendf(nil, "content %d", i)
			digest := sha256.Sum256(content)
			m, err := cms.Prepare(digest[:], cms.Options{Certificate: s.cert})
			if err != nil {
				t.Fatal(err)
			}
			raw, err := key.Sign(nil, m.Digest(), m.SignerOpts())
			if err != nil {
				t.Fatal(err)
			}
			if raw[0] != 0 {
				continue
			}
			found = true
			want := raw
			if cut {
				raw = bytes.TrimLeft(raw, "\x00")
			}
			der, err := m.Assemble(raw)
			if err != nil {
				t.Fatalf("cut=%v: %v", cut, err)
			}
			if !bytes.HasSuffix(der, want) {
				t.Errorf("cut=%v: the signature lost its zero", cut)
			}
			out, err := run(t, "openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", file(t, "sig", der),
				"-noverify", "-nointern", "-certfile", s.certFile(t), "-content", file(t, "content", content))
			if err != nil {
				t.Errorf("cut=%v: openssl: %v\n%s", cut, err, out)
			}
		}
		if !found {
			t.Error("no signature with a leading zero in 5000")
		}
	}
}

// A signer is told the hash, and by formats/openpgp's convention the digest's hash.
func TestSignerOpts(t *testing.T) {
	s := newSubject(t, "rsa", nil)
	digest := sum(crypto.SHA384, message)
	m, err := cms.Prepare(digest, cms.Options{Certificate: s.cert, Hash: crypto.SHA384})
	if err != nil {
		t.Fatal(err)
	}
	o, ok := m.SignerOpts().(interface{ DigestHash() crypto.Hash })
	if !ok || o.DigestHash() != crypto.SHA384 || m.SignerOpts().HashFunc() != crypto.SHA384 {
		t.Errorf("got %#v", m.SignerOpts())
	}
	if !bytes.Equal(m.Digest(), digest) {
		t.Error("without attributes it is the content's digest that is signed")
	}
	m, err = cms.Prepare(digest, cms.Options{Certificate: s.cert, Hash: crypto.SHA384, PSS: true, Attributes: true})
	if err != nil {
		t.Fatal(err)
	}
	pss, ok := m.SignerOpts().(*rsa.PSSOptions)
	if !ok || pss.Hash != crypto.SHA384 || pss.SaltLength != 48 {
		t.Errorf("got %#v", m.SignerOpts())
	}
	if bytes.Equal(m.Digest(), digest) {
		t.Error("with attributes it is not the content's digest that is signed")
	}
}

// PKCS #7 content is hashed without tag and length.
func TestContentDER(t *testing.T) {
	s := newSubject(t, "p256", nil)
	der, err := cms.Sign(s, sum(crypto.SHA256, []byte{2, 1, 5}), cms.Options{
		Certificate: s.cert, Attributes: true, ContentType: asn1.ObjectIdentifier{1, 2, 3},
		Content: []byte{0x30, 3, 2, 1, 5}, ContentDER: true,
		More: [][]byte{mustAttribute(t)},
	})
	if err != nil {
		t.Fatal(err)
	}
	p, err := cms.Parse(der)
	if err != nil {
		t.Fatal(err)
	}
	if p.Version != 1 || !bytes.Equal(p.Content, []byte{0x30, 3, 2, 1, 5}) {
		t.Errorf("got version %d and content %x", p.Version, p.Content)
	}
	_, err = p.Verify(p.ContentDigest, []*x509.Certificate{s.cert})
	if err != nil {
		t.Error(err)
	}
}

func mustAttribute(t *testing.T) []byte {
	t.Helper()
	a, err := cms.Attribute(asn1.ObjectIdentifier{1, 2, 4}, func(b *cryptobyte.Builder) { b.AddASN1Int64(7) })
	if err != nil {
		t.Fatal(err)
	}
	return a
}
