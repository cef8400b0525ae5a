package pe_test

import (
	"bytes"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"testing"

	"github.com/signwarden/signwarden/formats/cms"
	"github.com/signwarden/signwarden/formats/hostiletest"
	"github.com/signwarden/signwarden/formats/pe"
)

// Offsets in newPE's images.
const (
	atCOFF     = 0x80 + 4
	atOptional = 0x80 + 24
	atDirs     = atOptional + 112
	atSections = atOptional + 240
)

// put16 and put32 return a copy of b with a field changed.
func put16(b []byte, at int, v uint16) []byte {
	b = bytes.Clone(b)
	binary.LittleEndian.PutUint16(b[at:], v)
	return b
}

func put32(b []byte, at int, v uint32) []byte {
	b = bytes.Clone(b)
	binary.LittleEndian.PutUint32(b[at:], v)
	return b
}

func TestRefused(t *testing.T) {
	s := newSubject(t, "rsa")
	good := newPE(shapes["plain"])
	signed := sign(t, s, good, pe.Options{})
	n := uint32(len(good))
	for _, tt := range []struct {
		name  string
		image []byte
		want  error
	}{
		{"empty", nil, pe.ErrMalformed},
		{"text", []byte("#!/bin/sh\n"), pe.ErrMalformed},
		{"only a DOS header", good[:64], pe.ErrMalformed},
		{"no MZ", put16(good, 0, 0), pe.ErrMalformed},
		{"PE header out of reach", put32(good, 60, 1<<31), pe.ErrMalformed},
		{"no PE", put16(good, 0x80, 0), pe.ErrMalformed},
		{"no machine", put16(good, atCOFF, 0), pe.ErrMalformed},
		{"unknown machine", put16(good, atCOFF, 0x8665), pe.ErrMalformed},
		{"no sections", put16(good, atCOFF+2, 0), pe.ErrMalformed},
		{"65535 sections", put16(good, atCOFF+2, 0xffff), pe.ErrMalformed},
		{"no optional header", put16(good, atCOFF+16, 0), pe.ErrMalformed},
		{"optional header out of reach", put16(good, atCOFF+16, 0xffff), pe.ErrMalformed},
		{"unknown magic", put16(good, atOptional, 0x107), pe.ErrMalformed},
		{"four directories", put32(good, atDirs-4, 4), pe.ErrMalformed},
		{"headers shorter than they are", put32(good, atOptional+60, 0x100), pe.ErrMalformed},
		{"headers longer than the file", put32(good, atOptional+60, 0xffffffff), pe.ErrMalformed},
		{"truncated", good[:len(good)-1], pe.ErrMalformed},
		{"section out of reach", put32(good, atSections+40+16, 0x7fffffff), pe.ErrMalformed},
		{"gap behind the headers", put32(good, atOptional+60, 0x3ff), pe.ErrLayout},
		{"gap", newPE(shape{sections: []int{0x200, 0x200}, gap: 8}), pe.ErrLayout},
		{"overlap", newPE(shape{sections: []int{0x200, 0x200}, gap: -8}), pe.ErrLayout},
		{"section in the headers", put32(good, atSections+20, 0x200), pe.ErrLayout},
		{"bytes behind the table", append(bytes.Clone(signed), make([]byte, 8)...), pe.ErrMalformed},
		{"table cut", signed[:len(signed)-8], pe.ErrMalformed},
		{"table in a section", put32(put32(signed, atDirs+32, n-8), atDirs+36, uint32(len(signed))-n+8), pe.ErrMalformed},
		{"table at an odd place", put32(put32(signed, atDirs+32, n+1), atDirs+36, uint32(len(signed))-n-1), pe.ErrMalformed},
		{"table of no length", put32(signed, atDirs+36, 0), pe.ErrMalformed},
		{"table at zero", put32(signed, atDirs+32, 0), pe.ErrMalformed},
		{"certificate longer than the table", put32(signed, len(good), uint32(len(signed))), pe.ErrMalformed},
		{"certificate of no length", put32(signed, len(good), 0), pe.ErrMalformed},
		{"certificate of 8 bytes", put32(signed, len(good), 8), pe.ErrMalformed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m, err := pe.Parse(bytes.NewReader(tt.image), int64(len(tt.image)))
			if !errors.Is(err, tt.want) || m != nil {
				t.Errorf("got %v, want %v", err, tt.want)
			}
			want := len(tt.image) > 0x100 && tt.name != "no MZ" && tt.name != "no PE" && tt.name != "PE header out of reach"
			if got := pe.Recognize(bytes.NewReader(tt.image), int64(len(tt.image))); got != want {
				t.Errorf("recognised: %v, want %v", got, want)
			}
		})
	}
}

// Sixteen signatures fit.
func TestManySignatures(t *testing.T) {
	image := newPE(shapes["plain"])
	var s subject
	for range 16 {
		s = newSubject(t, "p256")
		image = sign(t, s, image, pe.Options{})
	}
	s.calls = 0
	var out bytes.Buffer
	next := newSubject(t, "p256")
	err := parse(t, image).Sign(&out, next, pe.Options{Certificate: next.cert})
	if !errors.Is(err, pe.ErrMalformed) || out.Len() != 0 || next.calls != 0 {
		t.Errorf("the 17th: got %v, %d bytes and %d calls, want ErrMalformed", err, out.Len(), next.calls)
	}
	if n := len(parse(t, sign(t, s, image, pe.Options{})).Signatures()); n != 16 {
		t.Errorf("the 16th again: %d signatures, want 16", n)
	}
}

// seeds are images of every kind, unsigned, signed, and signed twice.
func seeds(t testing.TB, s subject) [][]byte {
	t.Helper()
	images := [][]byte{smallest(t, "/usr/lib/systemd/boot/efi/*.efi"), smallest(t, "/usr/lib/efitools/*/*.efi", "/usr/share/efitools/efi/*.efi")}
	for _, name := range slices.Sorted(maps.Keys(shapes)) {
		images = append(images, newPE(shapes[name]))
	}
	var all [][]byte
	first := newSubject(t, "other")
	for _, image := range images {
		once := sign(t, first, image, pe.Options{})
		all = append(all, image, once, sign(t, s, once, pe.Options{}))
	}
	if len(all) != 27 {
		t.Fatalf("got %d seeds, want 27", len(all))
	}
	return all
}

// smallest is the smallest image of a package.
func smallest(t testing.TB, patterns ...string) []byte {
	t.Helper()
	var best []byte
	for _, p := range patterns {
		found, err := filepath.Glob(p)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range found {
			if b := read(t, f); best == nil || len(b) < len(best) {
				best = b
			}
		}
	}
	if best == nil {
		t.Fatalf("required images: none of %q: run softhsm-tests/install-deps.sh", patterns)
	}
	return best
}

// check asserts what holds for any input: no panic; what can be signed verifies then, and if again is set comes off and
// can be signed again. It returns what is wrong with the input.
func check(t testing.TB, s subject, b []byte, again bool) error {
	t.Helper()
	m, err := pe.Parse(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		if m != nil || !errors.Is(err, pe.ErrMalformed) && !errors.Is(err, pe.ErrLayout) {
			t.Errorf("Parse: got %v", err)
		}
		return err
	}
	if !pe.Recognize(bytes.NewReader(b), int64(len(b))) {
		t.Error("parsed, and not recognised")
	}
	trusted := []*x509.Certificate{s.cert}
	_, err = m.Verify(trusted)
	if err != nil && !errors.Is(err, pe.ErrNotSigned) && !errors.Is(err, pe.ErrMalformed) &&
		!errors.Is(err, cms.ErrBadSignature) && !errors.Is(err, cms.ErrMalformed) && !errors.Is(err, cms.ErrUnsupported) {
		t.Errorf("Verify: got %v", err)
	}
	s.calls = 0
	var out bytes.Buffer
	err = m.Sign(&out, s, pe.Options{Certificate: s.cert})
	if err != nil {
		if !errors.Is(err, pe.ErrMalformed) || s.calls != 0 || out.Len() != 0 {
			t.Errorf("Sign: got %v, %d calls and %d bytes", err, s.calls, out.Len())
		}
		return err
	}
	signed := parse(t, out.Bytes())
	_, err = signed.Verify(trusted)
	if err != nil || s.calls != 1 {
		t.Errorf("what was signed does not verify: %v, %d calls", err, s.calls)
	}
	if !again {
		return nil
	}
	if got := remove(t, out.Bytes()); !bytes.Equal(remove(t, sign(t, s, got, pe.Options{})), got) {
		t.Error("signed and removed, an image is another")
	}
	return nil
}

// damage changes the headers of an image: they are small, and matter most.
func damage(r *rand.Rand, seed []byte) []byte {
	b := bytes.Clone(seed)
	at := int(binary.LittleEndian.Uint32(b[60:])) + r.IntN(400)
	if r.IntN(2) == 0 {
		b[at] = byte(r.Uint32())
	} else {
		binary.LittleEndian.PutUint32(b[at:], r.Uint32()>>r.IntN(32))
	}
	return b
}

func TestMutations(t *testing.T) {
	hostiletest.Run(t, func(t *testing.T) hostiletest.Files {
		s := newSubject(t, "p256")
		n := 0
		return hostiletest.Files{Seeds: seeds(t, s), Mutate: damage, Try: func(t testing.TB, _, b []byte) error {
			n++
			return check(t, s, b, n%10 == 0)
		}}
	})
}

func FuzzParse(f *testing.F) {
	s := newSubject(f, "p256")
	for _, b := range seeds(f, s) {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) { _ = check(t, s, b, true) })
}
