package openpgp_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
	"github.com/google/go-cmp/cmp"
	"github.com/signwarden/signwarden/formats/openpgp"
)

// captures returns files that gpg 2.2.40 and sq 0.27 made, and fails if there are none: a lost folder must not pass.
func captures(t testing.TB, pattern string, atLeast int) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("testdata", pattern))
	if err != nil || len(files) < atLeast {
		t.Fatalf("%d captures of %s (%v), want at least %d", len(files), pattern, err, atLeast)
	}
	return files
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

var certificates = []string{
	"gpg-ed25519.asc", "gpg-nistp256.asc", "gpg-nistp384.asc", "gpg-rsa2048.asc", "sq-default.asc",
}

func TestParsePeers(t *testing.T) {
	for _, name := range certificates {
		t.Run(name, func(t *testing.T) {
			b := read(t, filepath.Join("testdata", name))
			c, err := openpgp.ParseCertificate(b)
			if err != nil {
				t.Fatal(err)
			}
			if len(c.UserIDs()) != 1 || !strings.Contains(c.UserIDs()[0], "peer") {
				t.Errorf("user IDs: %q", c.UserIDs())
			}
			g := newGPG(t)
			g.must(c.Bytes(), "--import")
			list, _ := g.must(nil, "--list-keys", "--with-colons")
			if got, want := c.Fingerprint().String(), colons(t, list, "fpr")[9]; got != want {
				t.Errorf("fingerprint: got %s, gpg has %s", got, want)
			}
		})
	}
}

// packets cuts a certificate made here into its packets.
func packets(t testing.TB, b []byte) [][]byte {
	t.Helper()
	var all [][]byte
	for len(b) > 0 {
		n := 2 + int(b[1])
		if b[1] >= 192 && b[1] < 224 {
			n = 3 + (int(b[1])-192)<<8 + int(b[2]) + 192
		}
		if n > len(b) {
			t.Fatalf("packet of %d bytes in %d", n, len(b))
		}
		all = append(all, b[:n])
		b = b[n:]
	}
	return all
}

func TestParseRefuses(t *testing.T) {
	s := newSubject(t, ed, false)
	p := packets(t, s.cert)
	var armored bytes.Buffer
	err := s.parsed(t).Armor(&armored)
	if err != nil {
		t.Fatal(err)
	}
	var wrongBlock bytes.Buffer
	err = openpgp.Armor(&wrongBlock, openpgp.BlockSignature, s.cert)
	if err != nil {
		t.Fatal(err)
	}
	g := newGPG(t)
	g.must(nil, "--passphrase", "", "--quick-gen-key", "s@example.org", "ed25519", "sign", "never")
	secret, _ := g.must(nil, "--passphrase", "", "--export-secret-keys")
	g = newGPG(t)
	g.must(nil, "--passphrase", "", "--cert-digest-algo", "SHA1",
		"--quick-gen-key", "s@example.org", "rsa2048", "sign", "never")
	weak, _ := g.must(nil, "--export")
	badSelf := bytes.Clone(s.cert)
	badSelf[len(p[0])+2] ^= 1 // in the user ID
	tests := []struct {
		name string
		b    []byte
	}{
		{"empty", nil},
		{"text", []byte("hello\n")},
		{"cut in a packet", s.cert[:len(s.cert)-1]},
		{"cut armor", armored.Bytes()[:armored.Len()/2]},
		{"signature armor", wrongBlock.Bytes()},
		{"two keys", append(bytes.Clone(s.cert), newSubject(t, p256, true).cert...)},
		{"trailing octet", append(bytes.Clone(s.cert), 0)},
		{"no user ID", p[0]},
		{"no self-signature", slices.Concat(p[0], p[1])},
		{"changed user ID", badSelf},
		{"first packet no key", slices.Concat(p[1], p[2])},
		{"secret key", []byte(secret)},
		{"sha1 self-signature", []byte(weak)},
		{"too large", append(bytes.Clone(s.cert), make([]byte, openpgp.MaxCertificate)...)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := openpgp.ParseCertificate(tt.b)
			if !errors.Is(err, openpgp.ErrMalformed) {
				t.Errorf("got %v, want ErrMalformed", err)
			}
		})
	}
}

func TestArmorRoundTrip(t *testing.T) {
	s := newSubject(t, rsa2048, false)
	var armored bytes.Buffer
	err := s.parsed(t).Armor(&armored)
	if err != nil {
		t.Fatal(err)
	}
	c, err := openpgp.ParseCertificate(armored.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(s.cert, c.Bytes()); diff != "" {
		t.Error(diff)
	}
	err = openpgp.Armor(io.Discard, "PGP PRIVATE KEY BLOCK", nil)
	if !errors.Is(err, openpgp.ErrUnsupported) {
		t.Errorf("private key block: got %v, want ErrUnsupported", err)
	}
}

func TestSigningKey(t *testing.T) {
	day := 24 * time.Hour
	past := openpgp.CertificateSpec{UserID: userID, Created: created, Expires: created.Add(day)}
	future := openpgp.CertificateSpec{UserID: userID, Created: time.Now().Add(day).Truncate(time.Second)}
	single, sub := newSubject(t, ed, true), newSubject(t, ed, false)
	expired, expiredSub := makeSubject(t, ed, true, past), makeSubject(t, ed, false, past)
	p := packets(t, sub.cert)
	spliced := slices.Concat(newSubject(t, p256, true).cert, p[3], p[4]) // another's subkey, claimed
	tests := []struct {
		name string
		cert []byte
		pub  crypto.PublicKey
		at   time.Time
		want error
	}{
		{"single", single.cert, ed.primary().Public(), time.Now(), nil},
		{"subkey", sub.cert, ed.subkey().Public(), time.Now(), nil},
		{"primary may only certify", sub.cert, ed.primary().Public(), time.Now(), openpgp.ErrKeyUnusable},
		{"not in it", sub.cert, p256.primary().Public(), time.Now(), openpgp.ErrKeyNotFound},
		{"subkey not in it", single.cert, ed.subkey().Public(), time.Now(), openpgp.ErrKeyNotFound},
		{"unknown kind of key", single.cert, "key", time.Now(), openpgp.ErrUnsupported},
		{"expired", expired.cert, ed.primary().Public(), time.Now(), openpgp.ErrKeyUnusable},
		{"expired subkey", expiredSub.cert, ed.subkey().Public(), time.Now(), openpgp.ErrKeyUnusable},
		{"at creation", expired.cert, ed.primary().Public(), created, nil},
		{"before expiry", expiredSub.cert, ed.subkey().Public(), created.Add(day - time.Second), nil},
		{"at expiry", expiredSub.cert, ed.subkey().Public(), created.Add(day), openpgp.ErrKeyUnusable},
		{"before creation", single.cert, ed.primary().Public(), created.Add(-time.Second), openpgp.ErrKeyUnusable},
		{"from the future", makeSubject(t, ed, false, future).cert, ed.subkey().Public(), time.Now(), openpgp.ErrKeyUnusable},
		{"another's subkey", spliced, ed.subkey().Public(), time.Now(), openpgp.ErrKeyUnusable},
		{"binding lost", slices.Concat(p[:4]...), ed.subkey().Public(), time.Now(), openpgp.ErrKeyUnusable},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c, err := openpgp.ParseCertificate(tt.cert)
			if err != nil {
				t.Fatal(err)
			}
			k, err := c.SigningKeyAt(tt.pub, tt.at)
			if !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
			if err != nil && k.Public != nil {
				t.Errorf("an error and the key %s", k.Fingerprint)
			}
		})
	}
	_, err := expired.parsed(t).SigningKey(ed.primary().Public())
	if !errors.Is(err, openpgp.ErrKeyUnusable) {
		t.Errorf("SigningKey, expired: got %v, want ErrKeyUnusable", err)
	}
}

// rsaKeys are the RSA keys of a certificate, primary first.
func rsaKeys(t *testing.T, cert []byte) []*rsa.PublicKey {
	t.Helper()
	var keys []*rsa.PublicKey
	r := packet.NewReader(bytes.NewReader(cert))
	for {
		p, err := r.Next()
		if err == io.EOF {
			return keys
		}
		if err != nil {
			t.Fatal(err)
		}
		if pk, ok := p.(*packet.PublicKey); ok {
			keys = append(keys, pk.PublicKey.(*rsa.PublicKey))
		}
	}
}

// A certificate of gpg's with what ours never have: subkeys of several uses and expiries, a revocation.
func TestSigningKeyOfGPG(t *testing.T) {
	g := newGPG(t)
	g.must(nil, "--passphrase", "", "--quick-gen-key", "v@example.org", "rsa2048", "cert", "2y")
	list, _ := g.must(nil, "--list-keys", "--with-colons")
	fpr := colons(t, list, "fpr")[9]
	for _, add := range [][]string{{"sign", "1y"}, {"encr", "1y"}, {"sign", "3y"}} {
		g.must(nil, "--passphrase", "", "--quick-add-key", fpr, "rsa2048", add[0], add[1])
	}
	export, _ := g.must(nil, "--export")
	keys := rsaKeys(t, []byte(export))
	c, err := openpgp.ParseCertificate([]byte(export))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	for i, want := range []struct {
		err   error
		years int // until it expires
	}{{openpgp.ErrKeyUnusable, 0}, {nil, 1}, {openpgp.ErrKeyUnusable, 0}, {nil, 2}} {
		k, err := c.SigningKey(keys[i])
		if !errors.Is(err, want.err) {
			t.Errorf("key %d: got %v, want %v", i, err, want.err)
		}
		days := int(k.Expires.Sub(now).Hours() / 24)
		if err == nil && (days < 364*want.years || days > 366*want.years) {
			t.Errorf("key %d expires in %d days, want %d years", i, days, want.years)
		}
	}
	home := strings.TrimPrefix(g.env[0], "GNUPGHOME=")
	rev := bytes.Replace(read(t, filepath.Join(home, "openpgp-revocs.d", fpr+".rev")), []byte(":-----"), []byte("-----"), 1)
	g.must(rev, "--import")
	revoked, _ := g.must(nil, "--export")
	c, err = openpgp.ParseCertificate([]byte(revoked))
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.SigningKey(keys[1])
	if !errors.Is(err, openpgp.ErrKeyUnusable) {
		t.Errorf("revoked: got %v, want ErrKeyUnusable", err)
	}
}

func TestNewKey(t *testing.T) {
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	even := *rsa2048.primary().Public().(*rsa.PublicKey)
	even.E = 65536
	large := even
	large.E = 1<<24 + 1
	good := ed.primary().Public()
	tests := []struct {
		name    string
		pub     crypto.PublicKey
		created time.Time
		want    error
	}{
		{"good", good, created, nil},
		{"other zone", good, created.In(time.FixedZone("x", 3600)), nil},
		{"short rsa", &weak.PublicKey, created, openpgp.ErrUnsupported},
		{"even exponent", &even, created, openpgp.ErrUnsupported},
		{"large exponent", &large, created, openpgp.ErrUnsupported},
		{"p521", &p521.PublicKey, created, openpgp.ErrUnsupported},
		{"empty rsa", &rsa.PublicKey{}, created, openpgp.ErrUnsupported},
		{"nil", nil, created, openpgp.ErrUnsupported},
		{"zero time", good, time.Time{}, openpgp.ErrMalformed},
		{"fraction", good, created.Add(1), openpgp.ErrMalformed},
		{"after 2106", good, time.Unix(1<<32, 0), openpgp.ErrMalformed},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			k, err := openpgp.NewKey(tt.pub, tt.created)
			if !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
			if err == nil && k.Fingerprint != newSubject(t, ed, true).key.Fingerprint {
				t.Errorf("got key %s", k.Fingerprint)
			}
		})
	}
}

func TestFingerprint(t *testing.T) {
	f := newSubject(t, ed, true).key.Fingerprint
	for _, s := range []string{f.String(), strings.ToLower(f.String())} {
		got, err := openpgp.ParseFingerprint(s)
		if err != nil || got != f {
			t.Errorf("ParseFingerprint(%q): %s, %v", s, got, err)
		}
	}
	if got, want := fmt.Sprintf("%016X", f.KeyID()), f.String()[24:]; got != want {
		t.Errorf("key ID: got %s, want %s", got, want)
	}
	for _, s := range []string{"", f.String()[1:], f.String() + "00", "x" + f.String()[1:], "0x" + f.String()[2:]} {
		_, err := openpgp.ParseFingerprint(s)
		if !errors.Is(err, openpgp.ErrMalformed) {
			t.Errorf("ParseFingerprint(%q): %v, want ErrMalformed", s, err)
		}
	}
}

func TestCertificateSpecRefused(t *testing.T) {
	good := openpgp.CertificateSpec{UserID: userID, Created: created, Primary: ed.primary()}
	tests := []struct {
		name   string
		change func(*openpgp.CertificateSpec)
		want   error
	}{
		{"good", func(*openpgp.CertificateSpec) {}, nil},
		{"no user ID", func(s *openpgp.CertificateSpec) { s.UserID = "" }, openpgp.ErrMalformed},
		{"blank user ID", func(s *openpgp.CertificateSpec) { s.UserID = " " }, openpgp.ErrMalformed},
		{"blank at the end", func(s *openpgp.CertificateSpec) { s.UserID = "a " }, openpgp.ErrMalformed},
		{"newline", func(s *openpgp.CertificateSpec) { s.UserID = "a\nuid:b" }, openpgp.ErrMalformed},
		{"escape", func(s *openpgp.CertificateSpec) { s.UserID = "a\x1b[2J" }, openpgp.ErrMalformed},
		{"c1 control", func(s *openpgp.CertificateSpec) { s.UserID = "a\u0085b" }, openpgp.ErrMalformed},
		{"bidi override", func(s *openpgp.CertificateSpec) { s.UserID = "a\u202eb" }, openpgp.ErrMalformed},
		{"line separator", func(s *openpgp.CertificateSpec) { s.UserID = "a\u2028b" }, openpgp.ErrMalformed},
		{"latin-1", func(s *openpgp.CertificateSpec) { s.UserID = "M\xfcller" }, openpgp.ErrMalformed},
		{"utf-8", func(s *openpgp.CertificateSpec) { s.UserID = "Müller 署名" }, nil},
		{"longest user ID", func(s *openpgp.CertificateSpec) { s.UserID = strings.Repeat("x", 255) }, nil},
		{"long user ID", func(s *openpgp.CertificateSpec) { s.UserID = strings.Repeat("x", 256) }, openpgp.ErrMalformed},
		{"no primary", func(s *openpgp.CertificateSpec) { s.Primary = nil }, openpgp.ErrMalformed},
		{"same key twice", func(s *openpgp.CertificateSpec) { s.Subkey = s.Primary }, openpgp.ErrMalformed},
		{"fraction", func(s *openpgp.CertificateSpec) { s.Created = created.Add(1) }, openpgp.ErrMalformed},
		{"expiry fraction", func(s *openpgp.CertificateSpec) { s.Expires = created.Add(time.Hour + 1) }, openpgp.ErrMalformed},
		{"expires at creation", func(s *openpgp.CertificateSpec) { s.Expires = created }, openpgp.ErrMalformed},
		{"expires before", func(s *openpgp.CertificateSpec) { s.Expires = created.Add(-time.Hour) }, openpgp.ErrMalformed},
		{"expires after 2106", func(s *openpgp.CertificateSpec) { s.Expires = time.Unix(1<<32, 0) }, openpgp.ErrMalformed},
		{"last second", func(s *openpgp.CertificateSpec) { s.Expires = time.Unix(1<<32-1, 0) }, nil},
		{"signed before", func(s *openpgp.CertificateSpec) { s.Signed = created.Add(-time.Second) }, openpgp.ErrKeyUnusable},
		{"mixed kinds", func(s *openpgp.CertificateSpec) { s.Subkey = rsa2048.subkey() }, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			spec := good
			tt.change(&spec)
			cert, err := openpgp.NewCertificate(spec)
			if !errors.Is(err, tt.want) || (err == nil) != (cert != nil) {
				t.Errorf("got %d bytes, %v, want %v", len(cert), err, tt.want)
			}
		})
	}
	// Ed25519 is deterministic, and so is all else in a certificate.
	a, errA := openpgp.NewCertificate(good)
	b, errB := openpgp.NewCertificate(good)
	if errA != nil || errB != nil || !bytes.Equal(a, b) {
		t.Errorf("same spec, other certificate: %v, %v", errA, errB)
	}
}

// go-crypto writes armor; its reader must find what rpm 4.18 needs, a checksum line.
func TestArmorChecksum(t *testing.T) {
	var b bytes.Buffer
	err := openpgp.Armor(&b, openpgp.BlockSignature, []byte("body"))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(b.String(), "\n=") {
		t.Errorf("no checksum in\n%s", b.String())
	}
	block, err := armor.Decode(&b)
	if err != nil || block.Type != openpgp.BlockSignature {
		t.Errorf("armor.Decode: %+v, %v", block, err)
	}
}
