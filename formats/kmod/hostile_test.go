package kmod_test

import (
	"bytes"
	"compress/gzip"
	"crypto"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/signwarden/signwarden/formats/cms"
	"github.com/signwarden/signwarden/formats/hostiletest"
	"github.com/signwarden/signwarden/formats/kmod"
)

// put returns a copy of b with some bytes at a place changed.
func put(b []byte, at int, with ...byte) []byte {
	b = bytes.Clone(b)
	copy(b[at:], with)
	return b
}

func TestRefused(t *testing.T) {
	s, other := newSubject(t, "rsa"), newSubject(t, "p256")
	good := newELF(1000)
	signed := sign(t, s, good, kmod.Options{})
	layers := signed
	for range 3 {
		layers = append(bytes.Clone(layers), signed[len(good):]...)
	}
	trailer := len(signed) - 28 - 12
	large := sign(t, s, newELF(100000), kmod.Options{})
	for _, tt := range []struct {
		name   string
		module []byte
		o      kmod.Options
		want   error
	}{
		{"empty", nil, kmod.Options{}, kmod.ErrMalformed},
		{"text", []byte("#!/bin/sh\n"), kmod.Options{}, kmod.ErrMalformed},
		{"half a header", good[:40], kmod.Options{}, kmod.ErrMalformed},
		{"truncated", good[:len(good)-1], kmod.Options{}, kmod.ErrMalformed},
		{"an executable", put(good, 16, 2), kmod.Options{}, kmod.ErrMalformed},
		{"no section headers", put(good, 40, 0, 0, 0, 0, 0, 0, 0, 0), kmod.Options{}, kmod.ErrMalformed},
		{"section headers out of reach", put(good, 47, 0xff), kmod.Options{}, kmod.ErrMalformed},
		{"text in gzip", pack(t, kmod.Gzip, []byte("text")), kmod.Options{}, kmod.ErrMalformed},
		{"truncated xz", cut(pack(t, kmod.XZ, good)), kmod.Options{}, kmod.ErrMalformed},
		{"truncated zstd", cut(pack(t, kmod.Zstd, good)), kmod.Options{}, kmod.ErrMalformed},
		{"truncated gzip", cut(pack(t, kmod.Gzip, good)), kmod.Options{}, kmod.ErrMalformed},
		{"two xz streams", append(pack(t, kmod.XZ, good), pack(t, kmod.XZ, good)...), kmod.Options{}, kmod.ErrMalformed},
		{"trailer of PGP", put(signed, trailer+2, 0), kmod.Options{Replace: true}, kmod.ErrMalformed},
		{"trailer with a name", put(signed, trailer+3, 1), kmod.Options{Replace: true}, kmod.ErrMalformed},
		{"signature longer than the file", put(signed, trailer+8, 0, 0, 0x20), kmod.Options{Replace: true}, kmod.ErrMalformed},
		{"signature longer than 4 GiB", put(signed, trailer+8, 0xff, 0xff, 0xff, 0xff), kmod.Options{Replace: true}, kmod.ErrMalformed},
		{"signature of 40960 bytes", put(large, len(large)-28-4, 0, 0, 0xa0, 0), kmod.Options{Replace: true}, kmod.ErrMalformed},
		{"window of 128 MiB", longWindow(t, good), kmod.Options{}, kmod.ErrMalformed},
		{"signature of no length", put(signed, trailer+8, 0, 0, 0, 0), kmod.Options{Replace: true}, kmod.ErrMalformed},
		{"signature into the module", put(signed, trailer+8, 0, 0, 3), kmod.Options{Replace: true}, kmod.ErrMalformed},
		{"four signatures", layers, kmod.Options{Replace: true}, kmod.ErrMalformed},
		{"only magic", []byte("\x7fELF~Module signature appended~\n"), kmod.Options{Replace: true}, kmod.ErrMalformed},
		{"SHA-1", good, kmod.Options{Hash: crypto.SHA1}, cms.ErrUnsupported},
		{"MD5", good, kmod.Options{Hash: crypto.MD5}, cms.ErrUnsupported},
		{"another key's certificate", good, kmod.Options{Certificate: other.cert}, cms.ErrWrongKey},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.o.Certificate == nil {
				tt.o.Certificate = s.cert
			}
			s.calls = 0
			var out bytes.Buffer
			err := kmod.Sign(&out, bytes.NewReader(tt.module), int64(len(tt.module)), s, tt.o)
			if !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
			if s.calls != 0 || out.Len() != 0 {
				t.Errorf("%d calls of the signer and %d bytes written", s.calls, out.Len())
			}
		})
	}
}

// Every part of an xz file is checked, as xz itself checks it.
func TestXZDamaged(t *testing.T) {
	packed := pack(t, kmod.XZ, newELF(1000))
	index := len(packed) - 12 - 4*(1+int(binary.LittleEndian.Uint32(packed[len(packed)-8:])))
	for name, at := range map[string]int{
		"stream header": 8, "block header": 14, "data": 40, "check": index - 1, "index": index + 2, "index check": len(packed) - 13,
		"footer check": len(packed) - 12, "backward size": len(packed) - 8, "footer flags": len(packed) - 3, "end": len(packed) - 1,
	} {
		b := bytes.Clone(packed)
		b[at] ^= 1
		_, err := kmod.Inspect(bytes.NewReader(b), int64(len(b)))
		if !errors.Is(err, kmod.ErrMalformed) {
			t.Errorf("%s: got %v, want ErrMalformed", name, err)
		}
	}
}

// longWindow packs with a window that zstd asks for where it does not know the size.
func longWindow(t *testing.T, module []byte) []byte {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "zstd", "--long=27", "-c")
	cmd.Stdin = bytes.NewReader(module)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("required peer: zstd: %v", err)
	}
	return out
}

// A CMS message that brings its own content is not a signature of the module.
func TestOwnContent(t *testing.T) {
	s := newSubject(t, "rsa")
	module := newELF(100)
	sig, err := cms.Sign(s, nil, cms.Options{Certificate: s.cert, Content: module})
	if err != nil {
		t.Fatal(err)
	}
	signed := append(bytes.Clone(module), sig...)
	signed = append(signed, 0, 0, 2, 0, 0, 0, 0, 0)
	signed = binary.BigEndian.AppendUint32(signed, uint32(len(sig)))
	signed = append(signed, "~Module signature appended~\n"...)
	_, err = verify(signed, s.cert)
	if !errors.Is(err, cms.ErrMalformed) {
		t.Errorf("got %v, want cms.ErrMalformed", err)
	}
}

// blocksXZ is an xz file of empty blocks, each with a dictionary of its own.
func blocksXZ(blocks int, dict byte) []byte {
	stream := []byte{0xfd, '7', 'z', 'X', 'Z', 0, 0, 1}
	stream = binary.LittleEndian.AppendUint32(stream, crc32.ChecksumIEEE(stream[6:]))
	block := []byte{2, 0, 0x21, 1, dict, 0, 0, 0}
	block = binary.LittleEndian.AppendUint32(block, crc32.ChecksumIEEE(block))
	block = append(block, 0, 0, 0, 0, 0, 0, 0, 0) // the end of LZMA2, padding, the check of nothing
	return append(stream, bytes.Repeat(block, blocks)...)
}

// What an xz file claims to need is allocated only as far as its size can use it, and not for each of its blocks.
func TestDictionaries(t *testing.T) {
	for _, tt := range []struct {
		name string
		b    []byte
		want string
		most uint64
	}{
		{"8 MiB for little", blocksXZ(1, 22), "unexpected EOF", 3 << 20},
		{"4 GiB for little", blocksXZ(1, 40), "unexpected EOF", 3 << 20},
		{"4 GiB for a lot", append(blocksXZ(1, 40), make([]byte, 100<<10)...), "over 8388608", 2 << 20},
		{"8 MiB for each of many", blocksXZ(8000, 22), "smaller than their dictionaries", 40 << 20},
		{"4 KiB for each of many", blocksXZ(8000, 0), "over 4096 blocks", 60 << 20},
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := kmod.Inspect(bytes.NewReader(tt.b), int64(len(tt.b)))
		runtime.ReadMemStats(&after)
		if !errors.Is(err, kmod.ErrMalformed) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want %q", tt.name, err, tt.want)
		}
		if n := after.TotalAlloc - before.TotalAlloc; n > tt.most {
			t.Errorf("%s: %d KiB allocated, want at most %d", tt.name, n>>10, tt.most>>10)
		}
	}
}

func cut(b []byte) []byte { return b[:len(b)-1] }

// bomb is a module that unpacks to 20 MiB, from some 20 KiB or less.
func bomb(t *testing.T, pack func(io.Writer) io.WriteCloser) []byte {
	t.Helper()
	var out bytes.Buffer
	w := pack(&out)
	_, err := w.Write(newELF(100))
	if err != nil {
		t.Fatal(err)
	}
	zeros := make([]byte, 1<<20)
	for range 20 {
		_, err = w.Write(zeros)
		if err != nil {
			t.Fatal(err)
		}
	}
	err = w.Close()
	if err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestBombs(t *testing.T) {
	s := newSubject(t, "rsa")
	for name, b := range map[string][]byte{
		"gzip": bomb(t, func(w io.Writer) io.WriteCloser { return gzip.NewWriter(w) }),
		"zstd": bomb(t, func(w io.Writer) io.WriteCloser {
			z, err := zstd.NewWriter(w)
			if err != nil {
				t.Fatal(err)
			}
			return z
		}),
		"xz": pack(t, kmod.XZ, append(newELF(100), make([]byte, 20<<20)...)),
	} {
		t.Run(name, func(t *testing.T) {
			s.calls = 0
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			err := kmod.Sign(io.Discard, bytes.NewReader(b), int64(len(b)), s, kmod.Options{Certificate: s.cert})
			runtime.ReadMemStats(&after)
			if !errors.Is(err, kmod.ErrMalformed) || s.calls != 0 {
				t.Errorf("got %v and %d calls, want ErrMalformed", err, s.calls)
			}
			if got := after.TotalAlloc - before.TotalAlloc; got > 32<<20 {
				t.Errorf("%d MiB were allocated", got>>20)
			}
		})
	}
}

// compiled is a module as the compiler makes it.
func compiled(t testing.TB) []byte {
	t.Helper()
	dir := t.TempDir()
	source := file(t, "m.c", []byte(`
__attribute__((section(".modinfo"), used)) static const char license[] = "license=GPL";
static int table[2000] = {1, 2, 3};
int init_module(void) { return table[1]; }
void cleanup_module(void) { table[2]++; }
`))
	run(t, "gcc", "-c", "-g", "-o", dir+"/m.ko", source)
	b, err := os.ReadFile(dir + "/m.ko")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// seeds are modules of every kind.
func seeds(t testing.TB, s subject) [][]byte {
	t.Helper()
	var all [][]byte
	for _, module := range [][]byte{newELF(200), compiled(t)} {
		for _, c := range []kmod.Compression{kmod.Plain, kmod.XZ, kmod.Zstd, kmod.Gzip} {
			packed := pack(t, c, module)
			all = append(all, packed, sign(t, s, packed, kmod.Options{}))
		}
	}
	big := newELF(200)
	big[5] = 2 // big-endian: e_type 0x0100, refused
	all = append(all, big, put(big, 16, 0, 1))
	if len(all) != 18 {
		t.Fatalf("got %d seeds, want 18", len(all))
	}
	return all
}

// check asserts what holds for any input: no panic; if the signer was asked, the result verifies. It returns what is
// wrong with the input.
func check(t testing.TB, s subject, b []byte) error {
	t.Helper()
	_, err := verify(b, s.cert)
	if err != nil && !errors.Is(err, kmod.ErrMalformed) && !errors.Is(err, kmod.ErrNotSigned) && !errors.Is(err, cms.ErrMalformed) &&
		!errors.Is(err, cms.ErrBadSignature) && !errors.Is(err, cms.ErrUnsupported) {
		t.Errorf("Verify: got %v", err)
	}
	s.calls = 0
	var out bytes.Buffer
	err = kmod.Sign(&out, bytes.NewReader(b), int64(len(b)), s, kmod.Options{Certificate: s.cert, Replace: true})
	if err != nil {
		if !errors.Is(err, kmod.ErrMalformed) || s.calls != 0 || out.Len() != 0 {
			t.Errorf("got %v, %d calls and %d bytes, want ErrMalformed", err, s.calls, out.Len())
		}
		return err
	}
	_, err = verify(out.Bytes(), s.cert)
	if err != nil || s.calls != 1 {
		t.Errorf("what was signed does not verify: %v, %d calls", err, s.calls)
	}
	return nil
}

// damage changes a module at its end, where the trailer is, and the end of what is packed.
func damage(r *rand.Rand, seed []byte) []byte {
	b := bytes.Clone(seed)
	from := max(0, len(b)-100)
	b[from+r.IntN(len(b)-from)] ^= byte(1 + r.IntN(255))
	return b
}

func TestMutations(t *testing.T) {
	hostiletest.Run(t, func(t *testing.T) hostiletest.Files {
		s := newSubject(t, "p256")
		return hostiletest.Files{Seeds: seeds(t, s), Mutate: damage, Try: func(t testing.TB, _, b []byte) error { return check(t, s, b) }}
	})
}

func FuzzSign(f *testing.F) {
	s := newSubject(f, "p256")
	for _, b := range seeds(f, s) {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) { _ = check(t, s, b) })
}
