package efivar_test

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"math/rand/v2"
	"runtime"
	"testing"

	"github.com/signwarden/signwarden/formats/cms"
	"github.com/signwarden/signwarden/formats/efivar"
)

// seeds are updates of every kind.
func seeds(t testing.TB, s subject) [][]byte {
	t.Helper()
	var all [][]byte
	cert := efivar.X509(owner(t), s.cert)
	hashes := efivar.SHA256(owner(t), sha256.Sum256([]byte("a")), sha256.Sum256([]byte("b")))
	for _, lists := range [][]efivar.List{{cert}, {hashes}, {cert, hashes}, nil} {
		data := marshal(t, lists...)
		all = append(all, sign(t, s, efivar.DB, data, efivar.Options{Time: when}),
			sign(t, s, efivar.DB, data, efivar.Options{Attributes: efivar.Appending}))
	}
	if len(all) != 8 {
		t.Fatalf("got %d seeds, want 8", len(all))
	}
	return all
}

// check asserts what holds for any input.
func check(t testing.TB, s subject, b []byte) {
	t.Helper()
	u, err := efivar.Parse(b)
	if err != nil {
		if u != nil || !errors.Is(err, efivar.ErrMalformed) {
			t.Errorf("Parse: got %v", err)
		}
		return
	}
	lists, err := u.Lists()
	if err != nil {
		if lists != nil || !errors.Is(err, efivar.ErrMalformed) {
			t.Errorf("Lists: got %v", err)
		}
	} else if again, err := efivar.Marshal(lists...); err != nil || !bytes.Equal(again, u.Data) {
		t.Errorf("lists came back as %x, were %x: %v", again, u.Data, err)
	}
	who, err := u.Verify(efivar.DB, efivar.Replacing, []*x509.Certificate{s.cert})
	if err != nil && (who != nil || !errors.Is(err, efivar.ErrMalformed) && !errors.Is(err, cms.ErrMalformed) &&
		!errors.Is(err, cms.ErrUnsupported) && !errors.Is(err, cms.ErrBadSignature)) {
		t.Errorf("Verify: got %v", err)
	}
}

func TestMutations(t *testing.T) {
	s := newSubject(t, "p256")
	all := seeds(t, s)
	r := rand.New(rand.NewPCG(1, 2))
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range 10000 {
		b := bytes.Clone(all[r.IntN(len(all))])
		switch r.IntN(3) {
		case 0:
			b = b[:r.IntN(len(b))]
		case 1: // the last list, where there is one
			from := max(0, len(b)-150)
			b[from+r.IntN(len(b)-from)] = byte(r.Uint32())
		default:
			b[r.IntN(len(b))] = byte(r.Uint32())
		}
		check(t, s, b)
	}
	runtime.ReadMemStats(&after)
	if per := (after.TotalAlloc - before.TotalAlloc) / 10000; per > 256<<10 {
		t.Errorf("%d KiB allocated per input", per>>10)
	}
}

func FuzzParse(f *testing.F) {
	s := newSubject(f, "p256")
	for _, b := range seeds(f, s) {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) { check(t, s, b) })
}
