package openpgp_test

import (
	"bytes"
	"crypto"
	"encoding/binary"
	"errors"
	"testing"
	"time"

	"github.com/signwarden/signwarden/formats/openpgp"
)

// trailerOf is the trailer of a signature that s makes, and what it should say.
func trailerOf(t testing.TB, s subject, typ openpgp.SigType, h crypto.Hash) ([]byte, openpgp.Trailer) {
	t.Helper()
	at := time.Now().Truncate(time.Second).UTC()
	sig, err := openpgp.NewSignature(s.key, typ, openpgp.SignOptions{Hash: h, Time: at})
	if err != nil {
		t.Fatal(err)
	}
	return sig.Trailer(), openpgp.Trailer{Type: typ, Hash: h, Created: at, Issuer: s.key.Fingerprint}
}

func TestParseTrailer(t *testing.T) {
	eachSubject(t, func(t *testing.T, s subject) {
		for _, typ := range []openpgp.SigType{openpgp.SigBinary, openpgp.SigText} {
			for _, h := range []crypto.Hash{crypto.SHA384, crypto.SHA512} {
				b, want := trailerOf(t, s, typ, h)
				got, err := openpgp.ParseTrailer(b)
				if err != nil || got != want {
					t.Errorf("got %+v, %v; want %+v", got, err, want)
				}
			}
		}
	})
}

// trailer makes one with these subpackets.
func trailer(subpackets ...byte) []byte {
	b := binary.BigEndian.AppendUint16([]byte{4, 0, 1, 8}, uint16(len(subpackets)))
	b = append(b, subpackets...)
	return binary.BigEndian.AppendUint32(append(b, 4, 0xff), uint32(len(b)))
}

func TestParseTrailerErrors(t *testing.T) {
	created := []byte{5, 2, 0, 0, 0, 1}
	good := trailer(created...)
	if _, err := openpgp.ParseTrailer(good); err != nil {
		t.Fatal(err)
	}
	unknown := append(created[:6:6], 2, 100, 7)
	if _, err := openpgp.ParseTrailer(trailer(unknown...)); err != nil {
		t.Errorf("a subpacket that is not critical: %v", err)
	}
	edit := func(at int, v byte) []byte {
		b := bytes.Clone(good)
		b[(at+len(b))%len(b)] = v
		return b
	}
	for name, b := range map[string][]byte{
		"empty":                nil,
		"short":                good[:11],
		"cut":                  good[:len(good)-1],
		"data before":          append([]byte{0}, good...),
		"data after":           append(bytes.Clone(good), 0),
		"version 3":            edit(0, 3),
		"version 6":            edit(-6, 6),
		"another length":       edit(-1, good[len(good)-1]+1),
		"sha-1":                edit(3, 2),
		"sha-224":              edit(3, 11),
		"subpackets' length":   edit(5, 5),
		"empty subpacket":      trailer(append(created[:6:6], 0)...),
		"subpacket cut":        trailer(append(created[:6:6], 3, 100, 7)...),
		"length cut":           trailer(append(created[:6:6], 200)...),
		"long length cut":      trailer(append(created[:6:6], 255, 0, 0)...),
		"huge length":          trailer(append(created[:6:6], 255, 255, 255, 255, 255, 0)...),
		"no time":              trailer(2, 100, 7),
		"two times":            trailer(append(created[:6:6], created...)...),
		"short time":           trailer(4, 2, 0, 0, 1),
		"critical":             trailer(append(created[:6:6], 2, 0x80|100, 7)...),
		"fingerprint of six":   trailer(append(append(created[:6:6], 22, 33, 6), make([]byte, 20)...)...),
		"fingerprint too long": trailer(append(append(created[:6:6], 23, 33, 4), make([]byte, 21)...)...),
	} {
		if got, err := openpgp.ParseTrailer(b); !errors.Is(err, openpgp.ErrMalformed) || got != (openpgp.Trailer{}) {
			t.Errorf("%s: got %+v, %v; want ErrMalformed", name, got, err)
		}
	}
}

func FuzzParseTrailer(f *testing.F) {
	for _, k := range []keyKind{rsa2048, ed, p384} {
		s := newSubject(f, k, false)
		b, _ := trailerOf(f, s, openpgp.SigBinary, crypto.SHA512)
		f.Add(b)
	}
	f.Add(trailer(5, 0x82, 0, 0, 0, 1))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := openpgp.ParseTrailer(b)
		if err != nil && (!errors.Is(err, openpgp.ErrMalformed) || got != (openpgp.Trailer{})) {
			t.Errorf("got %+v, %v", got, err)
		}
		if err == nil && (got.Hash.Size() < 32 || got.Created.IsZero()) {
			t.Errorf("got %+v", got)
		}
	})
}
