package pe_test

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/signwarden/signwarden/formats/cms"
	"github.com/signwarden/signwarden/formats/pe"
)

func parse(t testing.TB, image []byte) *pe.Image {
	t.Helper()
	m, err := pe.Parse(bytes.NewReader(image), int64(len(image)))
	if err != nil {
		t.Fatalf("Parse: %v", err)
	}
	return m
}

// sign signs and fails the test on an error.
func sign(t testing.TB, s subject, image []byte, o pe.Options) []byte {
	t.Helper()
	o.Certificate = s.cert
	var out bytes.Buffer
	err := parse(t, image).Sign(&out, s, o)
	if err != nil {
		t.Fatalf("Sign: %v", err)
	}
	return out.Bytes()
}

func remove(t testing.TB, image []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	err := parse(t, image).Remove(&out)
	if err != nil {
		t.Fatalf("Remove: %v", err)
	}
	return out.Bytes()
}

// checkDigest asserts that pesign makes the same digest of the image.
func checkDigest(t testing.TB, image []byte) {
	t.Helper()
	got, err := parse(t, image).Digest(crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"-h", "-i", file(t, "image.efi", image)}
	if len(image)%8 != 0 {
		args = append(args, "-P") // with padding
	}
	out := run(t, "pesign", args...)
	if !strings.Contains(out, hex.EncodeToString(got)) {
		t.Errorf("got %x, pesign says %s", got, out)
	}
}

// checkPeers asserts that all tools find the signature of s good. osslsigncode 2.9 reads one signature only.
func checkPeers(t testing.TB, s subject, signed []byte, only bool) {
	t.Helper()
	path := file(t, "signed.efi", signed)
	run(t, "sbverify", "--cert", s.certFile, path)
	if out := run(t, "pesign", "-S", "-i", path); !strings.Contains(out, "EFI key "+s.name) {
		t.Errorf("pesign -S:\n%s", out)
	}
	if !only {
		return
	}
	out := run(t, "osslsigncode", "verify", "-CAfile", s.certFile, "-TSA-CAfile", s.certFile, "-in", path)
	if !strings.Contains(out, "Signature verification: ok") {
		t.Errorf("osslsigncode:\n%s", out)
	}
	// 2.5 prints the file's checksum and the one it calculates; 2.9 the second only where they differ.
	sums := checksums.FindAllStringSubmatch(out, -1)
	if len(sums) == 0 || len(sums) == 2 && sums[0][1] != sums[1][1] || len(sums) > 2 ||
		len(sums) == 1 && strings.Contains(out, "Calculated PE checksum") {
		t.Errorf("the checksum is wrong:\n%s", out)
	}
}

var checksums = regexp.MustCompile(`PE checksum\s*:\s*([0-9A-Fa-f]+)`)

func TestPeersVerify(t *testing.T) {
	for _, key := range []string{"rsa", "p256"} {
		s := newSubject(t, key)
		for name, o := range shapes {
			t.Run(key+"/"+name, func(t *testing.T) {
				image := newPE(o)
				// pesign 0.112 hashes sections in the order of the table, not of the file as EDK2 does, and forgets the
				// padding where nothing is behind the last section.
				if o.order == nil && name != "odd section" {
					checkDigest(t, image)
				}
				signed := sign(t, s, image, pe.Options{SigningTime: time.Now()})
				checkPeers(t, s, signed, true)
				if o.order == nil {
					checkDigest(t, signed)
				}
				all, err := parse(t, signed).Verify([]*x509.Certificate{s.cert})
				if err != nil || len(all) != 1 || all[0].Hash != crypto.SHA256 || !all[0].Signers[0].Certificate.Equal(s.cert) {
					t.Errorf("Verify: got %+v, %v", all, err)
				}
				for _, at := range []int{2, 0x80 + 24 + 16, 0x400, len(image) - 1} {
					bad := bytes.Clone(signed)
					bad[at] ^= 1
					_, err := parse(t, bad).Verify([]*x509.Certificate{s.cert})
					if !errors.Is(err, cms.ErrBadSignature) {
						t.Errorf("byte %#x changed: got %v, want ErrBadSignature", at, err)
					}
				}
				if got := remove(t, signed); len(got) != (len(image)+7)&^7 || len(parse(t, got).Signatures()) != 0 {
					t.Errorf("removed: %d bytes of %d", len(got), len(image))
				}
			})
		}
	}
}

// The hash of the image is in the content, and sbsign's content is the same, byte for byte.
func TestSameContentAsSbsign(t *testing.T) {
	s := newSubject(t, "rsa")
	image := newPE(shapes["plain"])
	path := file(t, "image.efi", image)
	run(t, "sbsign", "--key", s.keyFile, "--cert", s.certFile, "--output", path+".signed", path)
	theirs := read(t, path+".signed")
	var content [2][]byte
	for i, signed := range [][]byte{theirs, sign(t, s, image, pe.Options{SigningTime: time.Now()})} {
		p, err := cms.Parse(parse(t, signed).Signatures()[0])
		if err != nil {
			t.Fatal(err)
		}
		if p.Version != 1 || len(p.Certificates) != 1 || len(p.Signers) != 1 {
			t.Errorf("got version %d, %d certificates, %d signers", p.Version, len(p.Certificates), len(p.Signers))
		}
		content[i] = p.Content
		_, err = parse(t, signed).Verify([]*x509.Certificate{s.cert})
		if err != nil {
			t.Errorf("Verify: %v", err)
		}
	}
	if !bytes.Equal(content[0], content[1]) {
		t.Errorf("got  %x\nwant %x", content[1], content[0])
	}
}

// Ours and sbsign's beside each other, in both orders.
func TestBesideSbsign(t *testing.T) {
	ours, theirs := newSubject(t, "rsa"), newSubject(t, "other")
	image := newPE(shapes["unpadded"])
	sbsign := func(image []byte) []byte {
		path := file(t, "image.efi", image)
		run(t, "sbsign", "--key", theirs.keyFile, "--cert", theirs.certFile, "--output", path+".signed", path)
		return read(t, path+".signed")
	}
	for name, both := range map[string][]byte{
		"ours second": sign(t, ours, sbsign(image), pe.Options{}),
		"ours first":  sbsign(sign(t, ours, image, pe.Options{})),
	} {
		t.Run(name, func(t *testing.T) {
			checkPeers(t, ours, both, false)
			checkPeers(t, theirs, both, false)
			all, err := parse(t, both).Verify([]*x509.Certificate{ours.cert, theirs.cert})
			if err != nil || len(all) != 2 || all[0].Err != nil || all[1].Err != nil {
				t.Errorf("Verify: got %+v, %v", all, err)
			}
			again := sign(t, ours, both, pe.Options{})
			if n := len(parse(t, again).Signatures()); n != 2 {
				t.Errorf("signed again by the same key: %d signatures, want 2", n)
			}
			checkPeers(t, theirs, again, false)
			alone := sign(t, ours, both, pe.Options{Replace: true})
			if n := len(parse(t, alone).Signatures()); n != 1 {
				t.Errorf("replaced: %d signatures, want 1", n)
			}
			checkPeers(t, ours, alone, true)
		})
	}
}

// sbattach detaches ours, and what is left is what Remove leaves.
func TestSbattach(t *testing.T) {
	s := newSubject(t, "rsa")
	signed := sign(t, s, newPE(shapes["plain"]), pe.Options{})
	path := file(t, "signed.efi", signed)
	run(t, "sbattach", "--detach", path+".sig", path)
	sig := read(t, path+".sig")
	if want := parse(t, signed).Signatures()[0]; !bytes.HasPrefix(sig, want) || len(sig)-len(want) > 7 {
		t.Errorf("detached %d bytes, Signatures says %d", len(sig), len(want))
	}
	run(t, "sbattach", "--remove", path)
	got := read(t, path)
	want := remove(t, signed)
	// sbattach leaves the checksum of the signed image.
	copy(got[0x80+24+64:], want[0x80+24+64:][:4])
	if !bytes.Equal(got, want) {
		t.Errorf("sbattach leaves %d bytes, Remove %d", len(got), len(want))
	}
	checkDigest(t, want)
}

// A certificate that another one issued is trusted through it, by sbverify as by us.
func TestChain(t *testing.T) {
	ca, s := newSubject(t, "other"), newSubject(t, "rsa")
	template := *s.cert
	template.Raw, template.RawIssuer, template.AuthorityKeyId = nil, nil, nil
	template.Subject.CommonName = "leaf"
	template.RawSubject = nil
	issuer := *ca.cert
	issuer.IsCA, issuer.BasicConstraintsValid, issuer.KeyUsage = true, true, x509.KeyUsageCertSign
	issuer.RawSubject = nil
	caDER, err := x509.CreateCertificate(rand.Reader, &issuer, &issuer, ca.Public(), ca.Signer)
	if err != nil {
		t.Fatal(err)
	}
	caCert, err := x509.ParseCertificate(caDER)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &template, caCert, s.Public(), ca.Signer)
	if err != nil {
		t.Fatal(err)
	}
	s.cert, err = x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	signed := sign(t, s, newPE(shapes["plain"]), pe.Options{Chain: []*x509.Certificate{caCert}})
	caFile := file(t, "ca.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER}))
	run(t, "sbverify", "--cert", caFile, file(t, "signed.efi", signed))
	all, err := parse(t, signed).Verify([]*x509.Certificate{caCert})
	if err != nil || !all[0].Signers[0].Certificate.Equal(s.cert) {
		t.Errorf("Verify: got %+v, %v", all, err)
	}
	_, err = parse(t, signed).Verify([]*x509.Certificate{newSubject(t, "p256").cert})
	if !errors.Is(err, cms.ErrBadSignature) {
		t.Errorf("by a stranger: got %v", err)
	}
}

func TestOtherHashes(t *testing.T) {
	s := newSubject(t, "rsa")
	for _, h := range []crypto.Hash{crypto.SHA384, crypto.SHA512} {
		signed := sign(t, s, newPE(shapes["plain"]), pe.Options{Hash: h})
		out := run(t, "osslsigncode", "verify", "-CAfile", s.certFile, "-in", file(t, "signed.efi", signed))
		if !strings.Contains(out, "Signature verification: ok") {
			t.Errorf("%v: osslsigncode:\n%s", h, out)
		}
		all, err := parse(t, signed).Verify([]*x509.Certificate{s.cert})
		if err != nil || all[0].Hash != h {
			t.Errorf("%v: got %+v, %v", h, all, err)
		}
	}
}

func TestSignerFaults(t *testing.T) {
	errToken := errors.New("token on fire")
	s := newSubject(t, "rsa")
	image := newPE(shapes["plain"])
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
		var out bytes.Buffer
		err := parse(t, image).Sign(&out, s, pe.Options{Certificate: s.cert})
		if !errors.Is(err, tt.want) || out.Len() != 0 {
			t.Errorf("%s: got %v and %d bytes, want %v", tt.name, err, out.Len(), tt.want)
		}
	}
}

func TestSignRefuses(t *testing.T) {
	s, other := newSubject(t, "rsa"), newSubject(t, "p256")
	for name, tt := range map[string]struct {
		o    pe.Options
		want error
	}{
		"SHA-1":          {pe.Options{Certificate: s.cert, Hash: crypto.SHA1}, cms.ErrUnsupported},
		"other key":      {pe.Options{Certificate: other.cert}, cms.ErrWrongKey},
		"no certificate": {pe.Options{}, cms.ErrUnsupported},
	} {
		var out bytes.Buffer
		err := parse(t, newPE(shapes["plain"])).Sign(&out, s, tt.o)
		if !errors.Is(err, tt.want) || out.Len() != 0 || s.calls != 0 {
			t.Errorf("%s: got %v, %d bytes and %d calls, want %v", name, err, out.Len(), s.calls, tt.want)
		}
	}
}

// changing is a file that changes after it was read once, or fails.
type changing struct {
	*bytes.Reader
	limit int
	err   error
}

func (c *changing) ReadAt(p []byte, off int64) (int, error) {
	n, err := c.Reader.ReadAt(p, off)
	if c.limit--; c.limit < 0 && off+int64(n) > 0x500 && off <= 0x500 {
		if c.err != nil {
			return 0, c.err
		}
		p[0x500-off] ^= 1
	}
	return n, err
}

func TestFileFaults(t *testing.T) {
	errDisk := errors.New("disk on fire")
	s := newSubject(t, "rsa")
	image := newPE(shapes["plain"])
	try := func(limit int, fail error) (int, error) {
		m, err := pe.Parse(&changing{bytes.NewReader(image), limit, fail}, int64(len(image)))
		if err != nil {
			return 0, err
		}
		var out bytes.Buffer
		err = m.Sign(&out, s, pe.Options{Certificate: s.cert})
		return out.Len(), err
	}
	_, err := try(8, nil)
	if !errors.Is(err, pe.ErrChanged) {
		t.Errorf("a file that changes: got %v, want ErrChanged", err)
	}
	s.calls = 0
	n, err := try(0, errDisk)
	if !errors.Is(err, errDisk) || n != 0 || s.calls != 0 {
		t.Errorf("got %v, %d bytes and %d calls", err, n, s.calls)
	}
	_, err = pe.Parse(bytes.NewReader(image[:0x500]), int64(len(image)))
	if err != nil {
		t.Errorf("the headers are there: %v", err)
	}
	m, err := pe.Parse(bytes.NewReader(image[:0x500]), int64(len(image)))
	if err == nil {
		err = m.Sign(&bytes.Buffer{}, s, pe.Options{Certificate: s.cert})
	}
	if !errors.Is(err, pe.ErrMalformed) || s.calls != 0 {
		t.Errorf("a file shorter than said: got %v and %d calls", err, s.calls)
	}
}

// A signature that is not of a PE image, or not of this one, is not good.
func TestVerifyContent(t *testing.T) {
	s := newSubject(t, "rsa")
	signed := sign(t, s, newPE(shapes["plain"]), pe.Options{})
	other := sign(t, s, newPE(shapes["bss"]), pe.Options{})
	at := bytes.Index(signed, parse(t, signed).Signatures()[0])
	swapped := bytes.Clone(signed)
	copy(swapped[at:], parse(t, other).Signatures()[0])
	_, err := parse(t, swapped).Verify([]*x509.Certificate{s.cert})
	if !errors.Is(err, cms.ErrBadSignature) {
		t.Errorf("another image's signature: got %v", err)
	}
	digest := sha(newPE(shapes["plain"]))
	der, err := cms.Sign(s, digest, cms.Options{Certificate: s.cert, Certificates: []*x509.Certificate{s.cert}})
	if err != nil {
		t.Fatal(err)
	}
	for len(der) < len(signed)-at {
		der = append(der, 0)
	}
	copy(swapped[at:], der)
	binary.LittleEndian.PutUint32(swapped[at-8:], uint32(len(signed)-at+8))
	_, err = parse(t, swapped).Verify([]*x509.Certificate{s.cert})
	if err == nil {
		t.Error("a detached signature of a file verifies as that of an image")
	}
	// The right content under another type.
	p, err := cms.Parse(parse(t, signed).Signatures()[0])
	if err != nil {
		t.Fatal(err)
	}
	der, err = cms.Sign(s, nil, cms.Options{Certificate: s.cert, Attributes: true, Content: p.Content, ContentDER: true,
		Certificates: []*x509.Certificate{s.cert}, HashNULL: true,
		ContentType: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 311, 2, 1, 5}})
	if err != nil {
		t.Fatal(err)
	}
	typed := bytes.Clone(signed)
	clear(typed[at:])
	copy(typed[at:], der)
	_, err = parse(t, typed).Verify([]*x509.Certificate{s.cert})
	if !errors.Is(err, pe.ErrMalformed) {
		t.Errorf("another content type: got %v, want ErrMalformed", err)
	}
	_, err = parse(t, newPE(shapes["plain"])).Verify([]*x509.Certificate{s.cert})
	if !errors.Is(err, pe.ErrNotSigned) {
		t.Errorf("unsigned: got %v, want ErrNotSigned", err)
	}
}

func sha(b []byte) []byte {
	h := crypto.SHA256.New()
	h.Write(b)
	return h.Sum(nil)
}
