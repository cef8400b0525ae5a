package rpm_test

import (
	"bytes"
	"crypto/rsa"
	"encoding/binary"
	"errors"
	"io"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/signwarden/signwarden/formats/hostiletest"
	"github.com/signwarden/signwarden/formats/openpgp"
	"github.com/signwarden/signwarden/formats/rpm"
)

// ourErrors are all that a reader of foreign bytes may meet with.
var ourErrors = []error{
	rpm.ErrMalformed, rpm.ErrDigest, rpm.ErrNoDigest, rpm.ErrUnsupported, rpm.ErrNotSigned,
	openpgp.ErrBadSignature, openpgp.ErrMalformed,
}

func expected(err error) bool {
	return err == nil || slices.ContainsFunc(ourErrors, func(want error) bool { return errors.Is(err, want) })
}

// exercise does with b what is done with packages. It returns whether the signer was asked, and else what is wrong with b.
func exercise(t testing.TB, b []byte) (asked bool, wrong error) {
	p, err := rpm.ReadPackage(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		if p != nil || !expected(err) {
			t.Errorf("ReadPackage: %v, and %v", err, p)
		}
		return false, err
	}
	_, err = p.Signatures()
	if !expected(err) {
		t.Errorf("Signatures: %v", err)
	}
	_, err = p.FileSignatures()
	if !expected(err) {
		t.Errorf("FileSignatures: %v", err)
	}
	_, err = p.Verify(ed().cert, true)
	if !expected(err) {
		t.Errorf("Verify: %v", err)
	}
	u, err := rpm.DeleteSignatures(p, true)
	if err == nil {
		_, err = rpm.ReadPackage(bytes.NewReader(apply(t, u, b)), u.Size())
	}
	if err != nil {
		t.Errorf("DeleteSignatures: %v", err)
	}
	signing, err := rpm.Prepare(p, ed().key, rpm.Options{Files: imaKey()})
	if err != nil { // its lists of files may be what is wrong
		if signing != nil || !expected(err) {
			t.Errorf("Prepare, with file signatures: %v", err)
		}
		signing, err = rpm.Prepare(p, ed().key, rpm.Options{})
	}
	if err != nil {
		if signing != nil || !expected(err) {
			t.Errorf("Prepare: %v", err)
		}
		return false, err
	}
	u, err = signing.Sign(ed().signer, rsa2048().signer)
	if err != nil {
		t.Fatalf("signing: %v", err)
	}
	_, err = open(t, apply(t, u, b)).Verify(ed().cert, true)
	if err != nil {
		t.Errorf("what was signed does not verify: %v", err)
	}
	return true, nil
}

// imaKey is the key of file signatures.
func imaKey() *rsa.PublicKey { return rsa2048().signer.Public().(*rsa.PublicKey) }

// mutate changes some bytes, most of them where they hurt: in the intros and the indexes.
func mutate(r *rand.Rand, b []byte) []byte {
	b = bytes.Clone(b)
	at := headerOffset(b)
	for range 1 + r.IntN(4) {
		i := r.IntN(len(b))
		switch r.IntN(8) {
		case 0, 1:
			i = 96 + r.IntN(16+16*8)
		case 2, 3, 4:
			i = at + r.IntN(16+16*40)
		case 5:
			i = r.IntN(at)
		}
		if i+4 > len(b) {
			continue
		}
		switch r.IntN(4) {
		case 0:
			b[i] ^= 1 << r.IntN(8)
		case 1:
			b[i] = byte(r.IntN(256))
		case 2:
			edge := []uint32{0, 1, 0x7fffffff, 0x80000000, 0xffffffff, 0xfffffff0, uint32(len(b))}
			binary.BigEndian.PutUint32(b[i&^3:], edge[r.IntN(len(edge))])
		case 3:
			binary.BigEndian.PutUint32(b[i&^3:], binary.BigEndian.Uint32(b[i&^3:])+uint32(r.IntN(64))-32)
		}
	}
	if r.IntN(10) == 0 {
		b = b[:r.IntN(len(b))]
	}
	return b
}

// Damaged packages: the signer is asked only for those whose header and payload are still what they were.
func TestMutations(t *testing.T) {
	hostiletest.Run(t, func(t *testing.T) hostiletest.Files {
		all := corpus(t)
		var seeds [][]byte
		for _, name := range slices.Sorted(maps.Keys(all)) {
			if len(all[name]) < 20<<10 {
				seeds = append(seeds, all[name])
			}
		}
		seeds = append(seeds, sign(t, all["empty-0.1-1.x86_64.rpm"], ed(), rpm.Options{Payload: true, OpenPGP: true}),
			sign(t, small(t), rsa2048(), rpm.Options{Files: imaKey()}))
		if len(seeds) < 10 {
			t.Fatalf("%d seeds", len(seeds))
		}
		return hostiletest.Files{Seeds: seeds, Mutate: mutate, Try: func(t testing.TB, seed, b []byte) error {
			asked, err := exercise(t, b)
			if asked && !bytes.HasSuffix(b, seed[headerOffset(seed):]) {
				t.Error("the signer was asked for a damaged package")
			}
			return err
		}}
	})
}

// small is a package of rpmbuild with some files in it.
func small(t testing.TB) []byte {
	t.Helper()
	var best []byte
	all, err := built()
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range all {
		if best == nil || len(b) < len(best) {
			best = b
		}
	}
	return best
}

// A claim of a length beyond the file costs nothing.
func TestClaims(t *testing.T) {
	for _, field := range []int{104, 108, headerOffset(demo(t)) + 8, headerOffset(demo(t)) + 12} {
		for _, v := range []uint32{0xffffffff, 0x7fffffff, 0x01ffff00, 0x0000ffff, 0} {
			b := bytes.Clone(demo(t))
			binary.BigEndian.PutUint32(b[field:], v)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			_, err := rpm.ReadPackage(bytes.NewReader(b), int64(len(b)))
			runtime.ReadMemStats(&after)
			wantError(t, err, rpm.ErrMalformed)
			if n := after.TotalAlloc - before.TotalAlloc; n > 1<<20 {
				t.Errorf("%#x at %d: %d bytes allocated", v, field, n)
			}
		}
	}
}

// Headers that are large together are refused before they are read; a large one alone is read, and told of before.
func TestMemory(t *testing.T) {
	large := func(main, sig int) []byte {
		h := header(63, str(1000, "large"), str(1001, "1"), str(1002, "1"), str(1005, strings.Repeat("x", main)), str(1022, "noarch"),
			str(1044, "large-1-1.src.rpm"), tag{5092, 8, 1, append([]byte(sha256Hex(nil)), 0)}, num(5093, 8))
		return pack(header(62, str(273, sha256Hex(h)), tag{1008, 7, 2000 + sig, make([]byte, 2000+sig)}), h, nil)
	}
	for _, tt := range []struct {
		main, sig int // MiB
		want      error
	}{
		{0, 0, nil}, {31, 0, nil}, {31, 2, nil}, {3, 11, nil},
		{31, 3, rpm.ErrMalformed}, {10, 11, rpm.ErrMalformed}, {0, 12, rpm.ErrMalformed}, {33, 0, rpm.ErrMalformed},
	} {
		b := large(tt.main<<20, tt.sig<<20)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		n, err := rpm.Memory(bytes.NewReader(b), int64(len(b)))
		wantError(t, err, tt.want)
		p, rerr := rpm.ReadPackage(bytes.NewReader(b), int64(len(b)))
		wantError(t, rerr, tt.want)
		runtime.ReadMemStats(&after)
		used := int64(after.TotalAlloc - before.TotalAlloc)
		if tt.want != nil {
			if used > 64<<10 {
				t.Errorf("%d and %d MiB: %d bytes allocated to refuse them", tt.main, tt.sig, used)
			}
			continue
		}
		signing, err := rpm.Prepare(p, ed().key, rpm.Options{})
		if err != nil {
			t.Fatal(err)
		}
		_, err = signing.Sign(ed().signer, nil)
		if err != nil {
			t.Fatal(err)
		}
		runtime.ReadMemStats(&after)
		used = int64(after.TotalAlloc - before.TotalAlloc)
		// Signing takes what it says, but for the undo record, and some buffers.
		if used > n+2<<20 || n < int64(tt.main+3*tt.sig)<<20 {
			t.Errorf("%d and %d MiB: %d bytes are told of, and %d allocated", tt.main, tt.sig, n, used)
		}
	}
}

// zeros is a payload without end.
type zeros struct{ head []byte }

func (z zeros) ReadAt(b []byte, off int64) (int, error) {
	clear(b)
	if off < int64(len(z.head)) {
		copy(b, z.head[off:])
	}
	return len(b), nil
}

// A package over 4 GiB, with the size in 64 bits, is signed without memory for it.
func TestHuge(t *testing.T) {
	const payload = 5 << 30
	main := header(63, str(1000, "huge"), str(1001, "1"), str(1002, "1"), str(1022, "noarch"), str(1044, "huge-1-1.src.rpm"),
		tag{5092, 8, 1, append([]byte(sha256Hex(nil)), 0)}, num(5093, 8))
	size := binary.BigEndian.AppendUint64(nil, uint64(len(main))+payload)
	// 270 is of eight bytes, and is here at an offset that is not a multiple of 8 if it were not for the padding.
	sig := header(62, tag{270, 5, 1, size}, str(273, sha256Hex(main)), tag{1008, 7, 2000, make([]byte, 2000)})
	z := zeros{pack(sig, main, nil)}
	total := int64(len(z.head)) + payload
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	p, err := rpm.ReadPackage(z, total)
	if err != nil {
		t.Fatal(err)
	}
	signing, err := rpm.Prepare(p, rsa2048().key, rpm.Options{NoPayloadCheck: true})
	if err != nil {
		t.Fatal(err)
	}
	u, err := signing.Sign(rsa2048().signer, nil)
	if err != nil {
		t.Fatal(err)
	}
	if !u.InPlace() || u.Size() != total {
		t.Errorf("in place %t, %d bytes", u.InPlace(), u.Size())
	}
	z.head = append(u.Prefix(), main...)
	p, err = rpm.ReadPackage(z, total)
	if err != nil {
		t.Fatal(err)
	}
	_, err = p.Verify(rsa2048().cert, false)
	if err != nil {
		t.Errorf("Verify: %v", err)
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 4<<20 {
		t.Errorf("%d bytes allocated", n)
	}
	_, err = rpm.ReadPackage(z, total-1)
	if err != nil {
		t.Fatal(err)
	}
	p, err = rpm.ReadPackage(z, total-1)
	if err != nil {
		t.Fatal(err)
	}
	wantError(t, p.CheckDigests(false), rpm.ErrDigest)
}

// zerosSHA256 is of 256 MiB of zeros.
const zerosSHA256 = "a6d72ac7690f53be6ae46ba88506bd97302a093f7108472bd9efc3cefda06484"

// A payload of 256 MiB goes through a fixed buffer.
func TestConstantMemory(t *testing.T) {
	const payload = 256 << 20
	main := header(63, str(1000, "large"), str(1001, "1"), str(1002, "1"), str(1022, "noarch"), str(1044, "large-1-1.src.rpm"),
		tag{5092, 8, 1, append([]byte(zerosSHA256), 0)}, num(5093, 8))
	z := zeros{pack(header(62, str(273, sha256Hex(main))), main, nil)}
	p, err := rpm.ReadPackage(z, int64(len(z.head))+payload)
	if err != nil {
		t.Fatal(err)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err = rpm.Prepare(p, rsa2048().key, rpm.Options{Payload: true})
	runtime.ReadMemStats(&after)
	if err != nil {
		t.Fatal(err)
	}
	if n := after.TotalAlloc - before.TotalAlloc; n > 1<<20 {
		t.Errorf("%d bytes allocated", n)
	}
}

// A reader's own error comes through.
func TestReaderFails(t *testing.T) {
	broken := errors.New("broken disk")
	good := demo(t)
	for limit := int64(0); limit < int64(len(good)); limit += 500 {
		r := failing{bytes.NewReader(good), limit, broken}
		p, err := rpm.ReadPackage(r, int64(len(good)))
		if err == nil {
			_, err = rpm.Prepare(p, ed().key, rpm.Options{})
		}
		wantError(t, err, broken)
	}
}

type failing struct {
	io.ReaderAt
	limit int64
	err   error
}

func (f failing) ReadAt(b []byte, off int64) (int, error) {
	if off+int64(len(b)) > f.limit {
		return 0, f.err
	}
	return f.ReaderAt.ReadAt(b, off)
}

func FuzzReadPackage(f *testing.F) {
	n := 0
	for _, b := range corpus(f) {
		if len(b) < 100<<10 {
			f.Add(b)
			f.Add(sign(f, b, ed(), rpm.Options{OpenPGP: true}))
			n++
		}
	}
	if n < 13 {
		f.Fatalf("%d seeds", n)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _ = exercise(t, b)
	})
}

func FuzzParseHeader(f *testing.F) {
	n := 0
	for _, b := range corpus(f) {
		if len(b) < 100<<10 {
			f.Add(b[headerOffset(b):])
			n++
		}
	}
	if n < 13 {
		f.Fatalf("%d seeds", n)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		h, rest, err := rpm.ParseHeader(b)
		if err != nil {
			if h != nil || rest != nil || !expected(err) {
				t.Errorf("got %v, and %v", err, h)
			}
			return
		}
		if !bytes.Equal(append(bytes.Clone(h.Bytes()), rest...), b) {
			t.Error("header and rest are not what was read")
		}
	})
}
