package cms_test

import (
	"bytes"
	"crypto"
	crand "crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"maps"
	"math/big"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"

	"github.com/signwarden/signwarden/formats/cms"
	"github.com/signwarden/signwarden/formats/hostiletest"
)

// seeds are messages of every form.
func seeds(t testing.TB) ([][]byte, []*x509.Certificate) {
	t.Helper()
	var all [][]byte
	var certs []*x509.Certificate
	for _, key := range []string{"rsa", "p256"} {
		s := newSubject(t, key, nil)
		certs = append(certs, s.cert)
		forms := variants(s)
		for _, name := range slices.Sorted(maps.Keys(forms)) {
			o := forms[name]
			all = append(all, sign(t, s, o))
			o.Bare = true
			all = append(all, sign(t, s, o))
		}
		for _, args := range [][]string{nil, {"-noattr", "-nocerts"}, {"-keyid"}, {"-nodetach"}} {
			out := file(t, "theirs", nil)
			text, err := run(t, "openssl", append([]string{"cms", "-sign", "-binary", "-outform", "DER", "-in", file(t, "content", message),
				"-signer", s.certFile(t), "-inkey", s.keyFile(t), "-out", out}, args...)...)
			if err != nil {
				t.Fatalf("openssl: %v\n%s", err, text)
			}
			b, err := os.ReadFile(out)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, b)
		}
		if key == "rsa" {
			all = append(all, sign(t, s, cms.Options{PSS: true}))
		}
	}
	if len(all) != 49 {
		t.Fatalf("got %d seeds, want 49", len(all))
	}
	return all, certs
}

// checkParsed asserts what holds for any input, and returns what is wrong with it.
func checkParsed(t testing.TB, b []byte, certs []*x509.Certificate) error {
	t.Helper()
	p, err := cms.Parse(b)
	if err != nil {
		if p != nil || !errors.Is(err, cms.ErrMalformed) && !errors.Is(err, cms.ErrUnsupported) {
			t.Errorf("Parse: got %v and %v", p, err)
		}
		return err
	}
	digest := digestOf(message)
	if p.Content != nil {
		digest = p.ContentDigest
	}
	who, err := p.Verify(digest, certs)
	if err != nil {
		if who != nil || !errors.Is(err, cms.ErrBadSignature) && !errors.Is(err, cms.ErrMalformed) {
			t.Errorf("Verify: got %v and %v", who, err)
		}
		return err
	}
	if p.Content != nil && !bytes.Contains(p.Content, message) {
		t.Errorf("a good signature over %q", p.Content)
	}
	return nil
}

// damage changes some bytes and leaves the lengths of DER alone, for most of what is found then is found later.
func damage(r *rand.Rand, seed []byte) []byte {
	b := bytes.Clone(seed)
	for range 1 + r.IntN(3) {
		b[r.IntN(len(b))] = byte(r.Uint32())
	}
	return b
}

func TestMutations(t *testing.T) {
	hostiletest.Run(t, func(t *testing.T) hostiletest.Files {
		all, certs := seeds(t)
		return hostiletest.Files{Seeds: all, Mutate: damage, Try: func(t testing.TB, _, b []byte) error { return checkParsed(t, b, certs) }}
	})
}

func FuzzParse(f *testing.F) {
	all, certs := seeds(f)
	for _, b := range all {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) { _ = checkParsed(t, b, certs) })
}

func FuzzParseDigestAlgorithm(f *testing.F) {
	for _, h := range []crypto.Hash{crypto.SHA256, crypto.SHA384, crypto.SHA512} {
		der := cms.DigestAlgorithm(h)
		got, err := cms.ParseDigestAlgorithm(der)
		if err != nil || got != h {
			f.Fatalf("%v: got %v, %v", h, got, err)
		}
		f.Add(der)
		f.Add(append([]byte{0x30, der[1] - 2}, der[2:len(der)-2]...)) // parameters absent
	}
	f.Fuzz(func(t *testing.T, der []byte) {
		h, err := cms.ParseDigestAlgorithm(der)
		if err != nil {
			if h != 0 || !errors.Is(err, cms.ErrMalformed) && !errors.Is(err, cms.ErrUnsupported) {
				t.Errorf("got %v and %v", h, err)
			}
			return
		}
		if h != crypto.SHA1 && !bytes.HasPrefix(cms.DigestAlgorithm(h)[2:], der[2:]) {
			t.Errorf("%x was read as %v", der, h)
		}
	})
}

// Bytes after a message, too many, and forms that are not DER.
func TestParseRefuses(t *testing.T) {
	s := newSubject(t, "p256", nil)
	good := sign(t, s, cms.Options{})
	// 33 certificates: 32 are signed, and one more is put in, with four lengths that grow.
	many := make([]*x509.Certificate, 32)
	for i := range many {
		many[i] = newSubject(t, "p256", nil).cert
	}
	full := sign(t, s, cms.Options{Certificates: many})
	one := many[0].Raw
	over := bytes.Replace(full, one, append(bytes.Clone(one), one...), 1)
	grown := 0
	for i := 0; i < bytes.Index(full, one) && grown < 4; i++ {
		n := int(over[i+2])<<8 | int(over[i+3])
		if (over[i] == 0x30 || over[i] == 0xa0) && over[i+1] == 0x82 && n > 32*len(one)/2 {
			binary.BigEndian.PutUint16(over[i+2:], uint16(n+len(one)))
			grown++
			i += 3
		}
	}
	if grown != 4 {
		t.Fatalf("found %d lengths, want 4", grown)
	}
	for name, b := range map[string][]byte{
		"empty":             nil,
		"trailing":          append(bytes.Clone(good), 0),
		"twice":             append(bytes.Clone(good), good...),
		"indefinite length": {0x30, 0x80, 0, 0},
		"too long":          append([]byte{0x30, 0x83, 0x10, 0, 0}, make([]byte, 1<<20)...),
		"33 certificates":   over,
		"not SignedData":    bytes.Replace(good, []byte{7, 2, 0xa0}, []byte{7, 3, 0xa0}, 1),
	} {
		p, err := cms.Parse(b)
		if !errors.Is(err, cms.ErrMalformed) || p != nil {
			t.Errorf("%s: got %v, want ErrMalformed", name, err)
		}
	}
	_, err := cms.Parse(full)
	if err != nil {
		t.Errorf("32 certificates: %v", err)
	}
}

// A signer whose certificate comes along is trusted through whoever issued it, however long the way, and no other.
func TestChain(t *testing.T) {
	root := newSubject(t, "rsa", nil)
	mid := newSubject(t, "p256", &root)
	leaf := newSubject(t, "p384", &mid)
	for _, tt := range []struct {
		name    string
		certs   []*x509.Certificate
		trusted []*x509.Certificate
		ok      bool
	}{
		{"leaf given", nil, []*x509.Certificate{leaf.cert}, true},
		{"root given, chain along", []*x509.Certificate{leaf.cert, mid.cert}, []*x509.Certificate{root.cert}, true},
		{"issuer given", []*x509.Certificate{leaf.cert}, []*x509.Certificate{mid.cert}, true},
		{"gap", []*x509.Certificate{leaf.cert}, []*x509.Certificate{root.cert}, false},
		{"nothing along", nil, []*x509.Certificate{mid.cert}, false},
		{"nothing given", []*x509.Certificate{leaf.cert, mid.cert, root.cert}, nil, false},
		{"stranger given", []*x509.Certificate{leaf.cert, mid.cert}, []*x509.Certificate{newSubject(t, "p256", nil).cert}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, err := cms.Parse(sign(t, leaf, cms.Options{Certificates: tt.certs}))
			if err != nil {
				t.Fatal(err)
			}
			who, err := p.Verify(digestOf(message), tt.trusted)
			if (err == nil) != tt.ok || tt.ok && !who[0].Certificate.Equal(leaf.cert) {
				t.Errorf("got %v, %v", who, err)
			}
		})
	}
}

// The error of whoever hashes the content comes through.
func TestDigestFails(t *testing.T) {
	s := newSubject(t, "p256", nil)
	p, err := cms.Parse(sign(t, s, cms.Options{}))
	if err != nil {
		t.Fatal(err)
	}
	_, err = p.Verify(func(crypto.Hash) ([]byte, error) { return nil, errToken }, []*x509.Certificate{s.cert})
	if !errors.Is(err, errToken) {
		t.Errorf("got %v", err)
	}
	_, err = p.Verify(func(crypto.Hash) ([]byte, error) { return []byte("short"), nil }, []*x509.Certificate{s.cert})
	if !errors.Is(err, cms.ErrBadSignature) {
		t.Errorf("short digest: got %v", err)
	}
	_, err = p.ContentDigest(crypto.SHA256)
	if !errors.Is(err, cms.ErrMalformed) {
		t.Errorf("no content: got %v", err)
	}
}

// The signed attributes must be of this content type and digest, each once, and without them the type must be id-data.
func TestAttributesDecide(t *testing.T) {
	s := newSubject(t, "p256", nil)
	second, err := cms.Attribute(asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 6}, func(b *cryptobyte.Builder) {
		b.AddASN1OctetString(sum(crypto.SHA256, []byte("another content")))
	})
	if err != nil {
		t.Fatal(err)
	}
	id := func(last ...byte) []byte { return append([]byte{0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01}, last...) }
	typed := cms.Options{Attributes: true, ContentType: asn1.ObjectIdentifier{1, 2, 3}}
	for _, tt := range []struct {
		name     string
		o        cms.Options
		from, to []byte
		want     error
	}{
		{"another type than signed", typed, []byte{6, 2, 0x2a, 3}, []byte{6, 2, 0x2a, 4}, cms.ErrBadSignature},
		{"no id-data without attributes", cms.Options{}, id(7, 1), id(7, 5), cms.ErrBadSignature},
		{"second digest", cms.Options{Attributes: true, More: [][]byte{second}}, id(9, 6), id(9, 4), cms.ErrMalformed},
		{"second content type", cms.Options{Attributes: true, More: [][]byte{second}}, id(9, 6), id(9, 3), cms.ErrMalformed},
		{"signature of another hash", cms.Options{}, []byte{4, 3, 2, 4}, []byte{4, 3, 3, 4}, cms.ErrMalformed},
		{"no digest", cms.Options{Attributes: true}, id(9, 4), id(9, 6), cms.ErrMalformed},
		{"no content type", cms.Options{Attributes: true}, id(9, 3), id(9, 6), cms.ErrMalformed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			good := sign(t, s, tt.o)
			verify := func(b []byte) error {
				p, err := cms.Parse(b)
				if err != nil {
					return err
				}
				_, err = p.Verify(digestOf(message), []*x509.Certificate{s.cert})
				return err
			}
			err := verify(good)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Contains(good, tt.from) {
				t.Fatalf("no %x in %x", tt.from, good)
			}
			err = verify(bytes.Replace(good, tt.from, tt.to, 1))
			if !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
}

// PSS with another hash inside than outside is not understood.
func TestPSSHashes(t *testing.T) {
	good := sign(t, newSubject(t, "rsa", nil), cms.Options{PSS: true})
	mgf := []byte{1, 1, 8, 0x30, 13, 6, 9, 0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 1}
	bad := bytes.Replace(good, mgf, append(bytes.Clone(mgf[:15]), 2), 1)
	_, err := cms.Parse(bad)
	if bytes.Equal(bad, good) || !errors.Is(err, cms.ErrUnsupported) {
		t.Errorf("got %v, want ErrUnsupported", err)
	}
}

// Whoever makes a certificate in the name of a trusted one is not trusted for it, nor is another of its certificates.
func TestForgedNames(t *testing.T) {
	root, other := newSubject(t, "rsa", nil), newSubject(t, "p256", nil)
	for _, tt := range []struct {
		name    string
		issuer  string // of the forged certificate
		serial  *big.Int
		trusted *x509.Certificate
	}{
		{"issued in its name", root.cert.Subject.CommonName, big.NewInt(5), root.cert},
		{"its serial number", "other", root.cert.SerialNumber, root.cert},
		{"its issuer", other.cert.Subject.CommonName, big.NewInt(5), other.cert},
	} {
		t.Run(tt.name, func(t *testing.T) {
			forger := newSubject(t, "p256", nil)
			template, parent := *forger.cert, *forger.cert
			template.SerialNumber = tt.serial
			template.AuthorityKeyId, parent.SubjectKeyId = nil, nil
			parent.Subject, parent.RawSubject = pkix.Name{CommonName: tt.issuer}, nil
			der, err := x509.CreateCertificate(crand.Reader, &template, &parent, forger.Public(), forger.Signer)
			if err != nil {
				t.Fatal(err)
			}
			forger.cert, err = x509.ParseCertificate(der)
			if err != nil {
				t.Fatal(err)
			}
			p, err := cms.Parse(sign(t, forger, cms.Options{Certificates: []*x509.Certificate{forger.cert}}))
			if err != nil {
				t.Fatal(err)
			}
			_, err = p.Verify(digestOf(message), []*x509.Certificate{tt.trusted})
			if !errors.Is(err, cms.ErrBadSignature) || !strings.Contains(err.Error(), "none of 1") {
				t.Errorf("got %v, want no signature by a certificate given", err)
			}
		})
	}
}

// Sixteen signers are read, and must all be good.
func TestManySigners(t *testing.T) {
	s, other := newSubject(t, "p256", nil), newSubject(t, "p384", nil)
	info := func(der []byte) cryptobyte.String { // the one SignerInfo of a bare message
		in := cryptobyte.String(der)
		var body, skip, infos cryptobyte.String
		var version int
		if !in.ReadASN1(&body, cbasn1.SEQUENCE) || !body.ReadASN1Integer(&version) || !body.ReadASN1(&skip, cbasn1.SET) ||
			!body.ReadASN1(&skip, cbasn1.SEQUENCE) || !body.ReadASN1(&infos, cbasn1.SET) {
			t.Fatalf("cannot read %x", der)
		}
		return infos
	}
	build := func(infos ...cryptobyte.String) []byte {
		var b cryptobyte.Builder
		b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1Int64(1)
			b.AddASN1(cbasn1.SET, func(b *cryptobyte.Builder) {})
			b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
				b.AddASN1ObjectIdentifier(asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 1})
			})
			b.AddASN1(cbasn1.SET, func(b *cryptobyte.Builder) {
				for _, i := range infos {
					b.AddBytes(i)
				}
			})
		})
		return b.BytesOrPanic()
	}
	good := info(sign(t, s, cms.Options{Bare: true}))
	stranger := info(sign(t, other, cms.Options{Bare: true}))
	bad := bytes.Clone(good)
	bad[len(bad)-1] ^= 1
	for _, tt := range []struct {
		name  string
		infos []cryptobyte.String
		who   int // zero: ErrBadSignature
	}{
		{"one", []cryptobyte.String{good}, 1},
		{"none", nil, 0},
		{"with a stranger", []cryptobyte.String{stranger, good}, 1},
		{"with a bad one", []cryptobyte.String{good, bad}, 0},
		{"sixteen", slices.Repeat([]cryptobyte.String{good}, 16), 16},
	} {
		p, err := cms.Parse(build(tt.infos...))
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		who, err := p.Verify(digestOf(message), []*x509.Certificate{s.cert})
		if len(who) != tt.who || (tt.who == 0) != errors.Is(err, cms.ErrBadSignature) {
			t.Errorf("%s: got %d signers, %v, want %d", tt.name, len(who), err, tt.who)
		}
	}
	_, err := cms.Parse(build(slices.Repeat([]cryptobyte.String{good}, 17)...))
	if !errors.Is(err, cms.ErrMalformed) {
		t.Errorf("seventeen: got %v, want ErrMalformed", err)
	}
}

// The attributes are in the order of DER, in which they were hashed.
func TestAttributeOrder(t *testing.T) {
	der := sign(t, newSubject(t, "p256", nil), cms.Options{Attributes: true, SigningTime: time.Now()})
	last := 0
	for _, n := range []byte{3, 5, 4} { // content type, time, digest: by their lengths
		at := bytes.Index(der, []byte{0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 9, n})
		if at < last {
			t.Errorf("attribute 1.9.%d at %d, want after %d", n, at, last)
		}
		last = at
	}
}

// SHA-1 can be seen, and is not good.
func TestSHA1(t *testing.T) {
	s := newSubject(t, "rsa", nil)
	path := t.TempDir() + "/sig"
	out, err := run(t, "openssl", "cms", "-sign", "-binary", "-outform", "DER", "-md", "sha1", "-in", file(t, "content", message),
		"-out", path, "-signer", s.certFile(t), "-inkey", s.keyFile(t))
	if err != nil {
		t.Fatalf("openssl: %v\n%s", err, out)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	p, err := cms.Parse(b)
	if err != nil || p.Signers[0].Hash != crypto.SHA1 {
		t.Fatalf("Parse: got %v", err)
	}
	_, err = p.Verify(digestOf(message), []*x509.Certificate{s.cert})
	if !errors.Is(err, cms.ErrBadSignature) {
		t.Errorf("Verify: got %v, want ErrBadSignature", err)
	}
}
