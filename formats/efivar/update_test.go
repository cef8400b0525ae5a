package efivar_test

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf16"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"

	"github.com/signwarden/signwarden/formats/cms"
	"github.com/signwarden/signwarden/formats/efivar"
	"github.com/signwarden/signwarden/formats/pe"
)

const ownerText = "11111111-2222-3333-4444-123456789abc"

var when = time.Date(2026, 11, 23, 10, 11, 12, 0, time.UTC)

func owner(t testing.TB) efivar.GUID {
	t.Helper()
	g, err := efivar.ParseGUID(ownerText)
	if err != nil {
		t.Fatal(err)
	}
	if g.String() != ownerText {
		t.Fatalf("GUID: got %s, want %s", g, ownerText)
	}
	return g
}

func marshal(t testing.TB, lists ...efivar.List) []byte {
	t.Helper()
	b, err := efivar.Marshal(lists...)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// sign signs and fails the test on an error.
func sign(t testing.TB, s subject, v efivar.Variable, data []byte, o efivar.Options) []byte {
	t.Helper()
	o.Certificate = s.cert
	b, err := efivar.Sign(s, v, data, o)
	if err != nil {
		t.Fatalf("Sign: %v", err)
	}
	return b
}

// verify parses an update and verifies it.
func verify(t testing.TB, b []byte, v efivar.Variable, attributes uint32, certs ...*x509.Certificate) error {
	t.Helper()
	u, err := efivar.Parse(b)
	if err != nil {
		t.Fatalf("Parse: %v", err)
	}
	_, err = u.Verify(v, attributes, certs)
	return err
}

var variables = []efivar.Variable{efivar.PK, efivar.KEK, efivar.DB, efivar.DBX}

func TestSameAsEfitools(t *testing.T) {
	s := newSubject(t, "rsa")
	esl := file(t, "list.esl", nil)
	run(t, "cert-to-efi-sig-list", "-g", ownerText, s.certFile, esl)
	data := marshal(t, efivar.X509(owner(t), s.cert))
	if want := read(t, esl); !bytes.Equal(data, want) {
		t.Fatalf("signature list: got  %x\nwant %x", data, want)
	}
	for _, v := range variables {
		for _, tt := range []struct {
			name string
			args []string
			esl  []byte
			o    efivar.Options
		}{
			{"replace", []string{"-t", "2026-11-23 10:11:12"}, data, efivar.Options{Time: when}},
			{"append", []string{"-a"}, data, efivar.Options{Attributes: efivar.Appending}},
			{"delete", []string{"-t", "2026-11-23 10:11:12"}, nil, efivar.Options{Time: when}},
		} {
			t.Run(v.Name+"/"+tt.name, func(t *testing.T) {
				out := file(t, "out.auth", nil)
				run(t, "sign-efi-sig-list", append(tt.args, "-k", s.keyFile, "-c", s.certFile, v.Name, file(t, "in.esl", tt.esl), out)...)
				theirs := read(t, out)
				ours := sign(t, s, v, tt.esl, tt.o)
				if !bytes.Equal(ours, theirs) {
					t.Errorf("got  %x\nwant %x", ours, theirs)
				}
				attributes := tt.o.Attributes
				if attributes == 0 {
					attributes = efivar.Replacing
				}
				err := verify(t, theirs, v, attributes, s.cert)
				if err != nil {
					t.Errorf("Verify: %v", err)
				}
			})
		}
	}
}

// sbvarsign signs attributes, with another time in a month of its own: what it makes is read and verifies.
func TestSbvarsign(t *testing.T) {
	s := newSubject(t, "rsa")
	data := marshal(t, efivar.X509(owner(t), s.cert))
	for attr, attributes := range map[string]uint32{
		"NON_VOLATILE,BOOTSERVICE_ACCESS,RUNTIME_ACCESS": efivar.Replacing,
		"": efivar.Appending,
	} {
		out := file(t, "out.auth", nil)
		args := []string{"--key", s.keyFile, "--cert", s.certFile, "--output", out}
		if attr != "" {
			args = append(args, "--attr", attr)
		}
		run(t, "sbvarsign", append(args, "db", file(t, "in.esl", data))...)
		theirs := read(t, out)
		err := verify(t, theirs, efivar.DB, attributes, s.cert)
		if err != nil {
			t.Errorf("attributes %#x: %v", attributes, err)
		}
		u, err := efivar.Parse(theirs)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(u.Data, data) {
			t.Errorf("contents: got %x", u.Data)
		}
		ours := sign(t, s, efivar.DB, data, efivar.Options{Time: when, Attributes: attributes})
		// From the header of the certificate to its GUID, and from the signed data to its content type.
		if !bytes.Equal(ours[20:40], theirs[20:40]) || !bytes.Equal(ours[44:79], theirs[44:79]) {
			t.Errorf("ours   %x\ntheirs %x", ours[:80], theirs[:80])
		}
	}
}

// A variable of another vendor holds what its vendor likes; one of Secure Boot holds signature lists, whoever signed.
func TestOtherVendors(t *testing.T) {
	s := newSubject(t, "rsa")
	for _, tt := range []struct {
		v    efivar.Variable
		want error
	}{
		{efivar.Variable{Name: "Setting", Vendor: owner(t)}, nil},
		{efivar.Variable{Name: "db", Vendor: owner(t)}, nil}, // a namesake
		{efivar.DB, efivar.ErrMalformed},
		{efivar.KEK, efivar.ErrMalformed},
		{efivar.PK, efivar.ErrMalformed},
		{efivar.Variable{Name: "dbt", Vendor: efivar.DB.Vendor}, efivar.ErrMalformed},
	} {
		out := file(t, "out.auth", nil)
		run(t, "sbvarsign", "--key", s.keyFile, "--cert", s.certFile, "--output", out, "--guid", tt.v.Vendor.String(),
			tt.v.Name, file(t, "in", []byte("no signature list")))
		err := verify(t, read(t, out), tt.v, efivar.Appending, s.cert)
		if !errors.Is(err, tt.want) {
			t.Errorf("%s-%s: got %v, want %v", tt.v.Name, tt.v.Vendor, err, tt.want)
		}
	}
}

// openssl verifies the signature over what the specification says is signed, put together anew.
func TestOpenSSLVerifies(t *testing.T) {
	for _, key := range []string{"rsa", "p256"} {
		s := newSubject(t, key)
		data := marshal(t, efivar.SHA256(owner(t), sha256.Sum256([]byte("a")), sha256.Sum256([]byte("b"))))
		update := sign(t, s, efivar.DBX, data, efivar.Options{Time: when, Attributes: efivar.Appending})
		u, err := efivar.Parse(update)
		if err != nil {
			t.Fatal(err)
		}
		if !u.Time.Equal(when) || !bytes.Equal(u.Data, data) || !bytes.HasSuffix(update, data) {
			t.Errorf("got time %s and %d bytes", u.Time, len(u.Data))
		}
		var signed []byte
		for _, c := range utf16.Encode([]rune("dbx")) {
			signed = append(signed, byte(c), byte(c>>8))
		}
		signed = append(signed, 0xcb, 0xb2, 0x19, 0xd7, 0x3a, 0x3d, 0x96, 0x45, 0xa3, 0xbc, 0xda, 0xd0, 0x0e, 0x67, 0x65, 0x6f)
		signed = append(signed, 0x67, 0, 0, 0)
		signed = append(signed, 0xea, 0x07, 11, 23, 10, 11, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0)
		signed = append(signed, data...)
		var wrapped cryptobyte.Builder
		wrapped.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1ObjectIdentifier(asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 2})
			b.AddASN1(cbasn1.Tag(0).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) { b.AddBytes(u.Signature) })
		})
		out := run(t, "openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", file(t, "sig", wrapped.BytesOrPanic()),
			"-noverify", "-content", file(t, "signed", signed), "-out", os.DevNull)
		if !strings.Contains(out, "CMS Verification successful") {
			t.Errorf("openssl: %s", out)
		}
	}
}

// The digest of an image goes into dbx as hash-to-efi-sig-list puts it there.
func TestImageDigest(t *testing.T) {
	var path string // of efitools, as the tool
	for _, pattern := range []string{"/usr/lib/efitools/*/HelloWorld.efi", "/usr/share/efitools/efi/HelloWorld.efi"} {
		found, err := filepath.Glob(pattern)
		if err == nil && len(found) > 0 {
			path = found[0]
		}
	}
	image := read(t, path)
	m, err := pe.Parse(bytes.NewReader(image), int64(len(image)))
	if err != nil {
		t.Fatal(err)
	}
	digest, err := m.Digest(crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	out := file(t, "hash.esl", nil)
	run(t, "hash-to-efi-sig-list", path, out)
	theirs, err := efivar.ParseLists(read(t, out))
	if err != nil || len(theirs) != 1 || len(theirs[0].Entries) != 1 {
		t.Fatalf("got %+v, %v", theirs, err)
	}
	ours := efivar.SHA256(theirs[0].Entries[0].Owner, [32]byte(digest))
	if got := marshal(t, ours); !bytes.Equal(got, read(t, out)) {
		t.Errorf("got  %x\nwant %x", got, read(t, out))
	}
}

// Every part of an update is covered.
func TestTamper(t *testing.T) {
	s, other := newSubject(t, "rsa"), newSubject(t, "p256")
	data := marshal(t, efivar.SHA256(owner(t), sha256.Sum256([]byte("a"))))
	good := sign(t, s, efivar.DB, data, efivar.Options{Time: when})
	err := verify(t, good, efivar.DB, efivar.Replacing, s.cert)
	if err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"other variable":   verify(t, good, efivar.DBX, efivar.Replacing, s.cert),
		"other attributes": verify(t, good, efivar.DB, efivar.Appending, s.cert),
		"other vendor":     verify(t, good, efivar.Variable{Name: "db", Vendor: efivar.PK.Vendor}, efivar.Replacing, s.cert),
		"other signer":     verify(t, good, efivar.DB, efivar.Replacing, other.cert),
		"other time":       verify(t, flip(good, 2), efivar.DB, efivar.Replacing, s.cert),
		"other contents":   verify(t, flip(good, len(good)-1), efivar.DB, efivar.Replacing, s.cert),
		"other owner":      verify(t, flip(good, len(good)-33), efivar.DB, efivar.Replacing, s.cert),
	} {
		if !errors.Is(err, cms.ErrBadSignature) {
			t.Errorf("%s: got %v, want ErrBadSignature", name, err)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	s := newSubject(t, "p256")
	good := sign(t, s, efivar.DB, nil, efivar.Options{Time: when})
	for name, b := range map[string][]byte{
		"empty":              nil,
		"cut":                good[:len(good)-1],
		"only a time":        good[:16],
		"padding in time":    flip(good, 7),
		"nanoseconds":        flip(good, 8),
		"time zone":          flip(good, 12),
		"daylight":           flip(good, 14),
		"length of no bytes": put32(good, 16, 0),
		"length too short":   put32(good, 16, 24),
		"length too long":    put32(good, 16, 0xffffffff),
		"revision":           flip(good, 20),
		"type":               flip(good, 22),
		"GUID":               flip(good, 24),
		"contents too long":  append(bytes.Clone(good), make([]byte, 1<<20+1)...),
	} {
		u, err := efivar.Parse(b)
		if !errors.Is(err, efivar.ErrMalformed) || u != nil {
			t.Errorf("%s: got %v, want ErrMalformed", name, err)
		}
	}
}

// A signature with contents of its own is none of the update's.
func TestOwnContent(t *testing.T) {
	s := newSubject(t, "rsa")
	good := sign(t, s, efivar.DB, nil, efivar.Options{Time: when})
	signed := append([]byte("d\x00b\x00"), efivar.DB.Vendor[:]...)
	signed = binary.LittleEndian.AppendUint32(signed, efivar.Replacing)
	signed = append(signed, good[:16]...)
	for _, content := range [][]byte{nil, signed} {
		h := sha256.Sum256(signed)
		sig, err := cms.Sign(s, h[:], cms.Options{Certificate: s.cert, Content: content, Bare: true})
		if err != nil {
			t.Fatal(err)
		}
		update := append(put32(good[:40], 16, uint32(24+len(sig))), sig...)
		err = verify(t, update, efivar.DB, efivar.Replacing, s.cert)
		if content == nil && err != nil || content != nil && !errors.Is(err, efivar.ErrMalformed) {
			t.Errorf("content of %d bytes: got %v", len(content), err)
		}
	}
}

func flip(b []byte, at int) []byte {
	b = bytes.Clone(b)
	b[at] ^= 1
	return b
}

func TestRefused(t *testing.T) {
	s, other := newSubject(t, "rsa"), newSubject(t, "p256")
	cert := marshal(t, efivar.X509(owner(t), s.cert))
	hash := marshal(t, efivar.SHA256(owner(t), sha256.Sum256([]byte("a"))))
	good := efivar.Options{Certificate: s.cert, Time: when}
	with := func(change func(*efivar.Options)) efivar.Options {
		o := good
		change(&o)
		return o
	}
	for _, tt := range []struct {
		name string
		v    efivar.Variable
		data []byte
		o    efivar.Options
		want error
	}{
		{"no time", efivar.DB, cert, with(func(o *efivar.Options) { o.Time = time.Time{} }), efivar.ErrMalformed},
		{"time before 1900", efivar.DB, cert, with(func(o *efivar.Options) { o.Time = when.AddDate(-200, 0, 0) }), efivar.ErrMalformed},
		{"no authentication", efivar.DB, cert, with(func(o *efivar.Options) { o.Attributes = 7 }), efivar.ErrMalformed},
		{"unknown attributes", efivar.DB, cert, with(func(o *efivar.Options) { o.Attributes = 0x37 }), efivar.ErrMalformed},
		{"no name", efivar.Variable{}, cert, good, efivar.ErrMalformed},
		{"not a list", efivar.DB, []byte("certificate"), good, efivar.ErrMalformed},
		{"cut list", efivar.DB, cert[:len(cert)-1], good, efivar.ErrMalformed},
		{"bytes behind", efivar.DB, append(bytes.Clone(cert), 0), good, efivar.ErrMalformed},
		{"list of no size", efivar.DB, put32(cert, 16, 0), good, efivar.ErrMalformed},
		{"list too long", efivar.DB, put32(cert, 16, 0xffffffff), good, efivar.ErrMalformed},
		{"header too long", efivar.DB, put32(cert, 20, 0xffffffff), good, efivar.ErrMalformed},
		{"entries of no size", efivar.DB, put32(cert, 24, 0), good, efivar.ErrMalformed},
		{"entries without data", efivar.DB, put32(cert, 24, 16), good, efivar.ErrMalformed},
		{"entries of another size", efivar.DB, put32(cert, 24, 17), good, efivar.ErrMalformed},
		{"not a certificate", efivar.DB, flip(cert, 28+16), good, efivar.ErrMalformed},
		{"short digest", efivar.DB, append(put32(put32(hash[:28], 16, 28+16+31), 24, 16+31), hash[28:28+16+31]...), good, efivar.ErrMalformed},
		{"PK of a digest", efivar.PK, hash, good, efivar.ErrMalformed},
		{"two PKs", efivar.PK, append(bytes.Clone(cert), cert...), good, efivar.ErrMalformed},
		{"two PKs in a list", efivar.PK, append(put32(cert, 16, uint32(2*len(cert)-28)), cert[28:]...), good, efivar.ErrMalformed},
		{"SHA-1", efivar.DB, cert, with(func(o *efivar.Options) { o.Hash = crypto.SHA1 }), cms.ErrUnsupported},
		{"other key", efivar.DB, cert, with(func(o *efivar.Options) { o.Certificate = other.cert }), cms.ErrWrongKey},
		{"no certificate", efivar.DB, cert, with(func(o *efivar.Options) { o.Certificate = nil }), cms.ErrUnsupported},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s.calls = 0
			b, err := efivar.Sign(s, tt.v, tt.data, tt.o)
			if !errors.Is(err, tt.want) || b != nil || s.calls != 0 {
				t.Errorf("got %v, %d bytes and %d calls, want %v", err, len(b), s.calls, tt.want)
			}
		})
	}
}

func put32(b []byte, at int, v uint32) []byte {
	b = bytes.Clone(b)
	binary.LittleEndian.PutUint32(b[at:], v)
	return b
}

func TestSignerFaults(t *testing.T) {
	errToken := errors.New("token on fire")
	s := newSubject(t, "rsa")
	data := marshal(t, efivar.X509(owner(t), s.cert))
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
		b, err := efivar.Sign(s, efivar.DB, data, efivar.Options{Certificate: s.cert, Time: when})
		if !errors.Is(err, tt.want) || b != nil {
			t.Errorf("%s: got %v and %d bytes, want %v", tt.name, err, len(b), tt.want)
		}
	}
}

func TestMarshalRefuses(t *testing.T) {
	g := owner(t)
	for name, l := range map[string]efivar.List{
		"empty":             {Type: efivar.TypeSHA256},
		"entry of no bytes": {Type: efivar.TypeSHA256, Entries: []efivar.Entry{{Owner: g}}},
		"different sizes":   {Type: efivar.TypeSHA256, Entries: []efivar.Entry{{g, make([]byte, 32)}, {g, make([]byte, 31)}}},
		"too long":          {Type: efivar.TypeX509, Entries: []efivar.Entry{{g, make([]byte, 1<<20)}}},
	} {
		b, err := efivar.Marshal(l)
		if !errors.Is(err, efivar.ErrMalformed) || b != nil {
			t.Errorf("%s: got %v, want ErrMalformed", name, err)
		}
	}
}

func TestNames(t *testing.T) {
	for _, v := range variables {
		got, ok := efivar.Lookup(v.Name)
		if !ok || got != v {
			t.Errorf("%s: got %v, %v", v.Name, got, ok)
		}
	}
	_, ok := efivar.Lookup("Boot0000")
	if ok {
		t.Error("Boot0000 is no variable of Secure Boot")
	}
	for _, s := range []string{"", ownerText[1:], ownerText + "0", strings.ReplaceAll(ownerText, "-", "+"), strings.ReplaceAll(ownerText, "a", "g")} {
		_, err := efivar.ParseGUID(s)
		if !errors.Is(err, efivar.ErrMalformed) {
			t.Errorf("GUID %q: got %v", s, err)
		}
	}
	if !slices.Equal(efivar.DB.Vendor[:4], []byte{0xcb, 0xb2, 0x19, 0xd7}) {
		t.Errorf("the first field of a GUID is little-endian: got %x", efivar.DB.Vendor)
	}
}
