package softhsm_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// rpmTag is an entry of a package header.
type rpmTag struct {
	tag, typ, count uint32
	data            []byte
}

func rpmString(tag uint32, s string) rpmTag { return rpmTag{tag, 6, 1, append([]byte(s), 0)} }

// rpmHeader writes a header of a package, of strings and bytes alone.
func rpmHeader(region uint32, tags ...rpmTag) []byte {
	entry := func(b []byte, f ...uint32) []byte {
		for _, v := range f {
			b = binary.BigEndian.AppendUint32(b, v)
		}
		return b
	}
	var index, data []byte
	for _, t := range tags {
		for t.typ == 4 && len(data)%4 != 0 {
			data = append(data, 0)
		}
		index = entry(index, t.tag, t.typ, uint32(len(data)), t.count)
		data = append(data, t.data...)
	}
	n := uint32(len(tags) + 1)
	index = append(entry(nil, region, 7, uint32(len(data)), 16), index...)
	data = entry(data, region, 7, -(16 * n), 16)
	h := entry([]byte{0x8e, 0xad, 0xe8, 1, 0, 0, 0, 0}, n, uint32(len(data)))
	return append(append(h, index...), data...)
}

// largeHeaders is a good package whose headers have so many bytes more.
func largeHeaders(main, sig int) []byte {
	sum := func(b []byte) string { return fmt.Sprintf("%x", sha256.Sum256(b)) }
	h := rpmHeader(63, rpmString(1000, "large"), rpmString(1001, "1"), rpmString(1002, "1"), rpmString(1005, strings.Repeat("x", main)),
		rpmString(1022, "noarch"), rpmString(1044, "large-1-1.src.rpm"), rpmTag{5092, 8, 1, append([]byte(sum(nil)), 0)},
		rpmTag{5093, 4, 1, []byte{0, 0, 0, 8}})
	b := make([]byte, 96)
	copy(b, "\xed\xab\xee\xdb\x03\x00")
	copy(b[10:], "large-1-1")
	b[77], b[79] = 1, 5
	b = append(b, rpmHeader(62, rpmString(273, sum(h)), rpmTag{1008, 7, uint32(2000 + sig), make([]byte, 2000+sig)})...)
	for len(b)%8 != 0 {
		b = append(b, 0)
	}
	return append(b, h...)
}

// dictionary is an xz file that claims a dictionary of 8 MiB, and is large enough
// to use it: it begins as a module does, and is cut short.
func dictionary() []byte {
	stream := []byte{0xfd, '7', 'z', 'X', 'Z', 0, 0, 1}
	stream = binary.LittleEndian.AppendUint32(stream, crc32.ChecksumIEEE(stream[6:]))
	block := []byte{2, 0, 0x21, 1, 22, 0, 0, 0}
	stream = append(stream, binary.LittleEndian.AppendUint32(block, crc32.ChecksumIEEE(block))...)
	elf := make([]byte, 60000)
	copy(elf, "\x7fELF\x02\x01\x01")
	elf[16] = 1
	for i := range 3 { // LZMA2 chunks that are not compressed
		stream = append(stream, byte(1+min(i, 1)))
		stream = binary.BigEndian.AppendUint16(stream, uint16(len(elf)-1))
		stream = append(stream, elf...)
	}
	return stream
}

// Many files at a time, each of which alone takes much memory: the client takes no
// more for all, on two processors. What is good is signed.
func TestMemoryTogether(t *testing.T) {
	g := newGateway(t)
	g.key(t, "ed", "ed25519")
	g.must(t, "signwarden", "key", "create", "ima", "--algorithm", "rsa2048")
	g.x509Key(t, "p256", "p256")
	many := readFile(t, manyFiles(t, 1000))
	module := filepath.Join(t.TempDir(), "m.ko")
	blob := make([]byte, 5<<18)
	rand.NewChaCha8([32]byte{1}).Read(blob)
	for i := range blob { // half as random as it was
		blob[i] &= 0x0f
	}
	writeFile(t, module+".blob", string(blob))
	writeFile(t, module+".c", "__asm__(\".data\\n.incbin \\\""+module+".blob\\\"\"); int init_module(void) { return 0; }\n")
	mustEnv(t, os.Environ(), "gcc", "-c", "-o", module, module+".c")
	mustEnv(t, os.Environ(), "xz", "-k", "--check=crc32", "--lzma2=dict=1MiB", module)
	mustEnv(t, os.Environ(), "zstd", "-q", "-19", module)

	for _, tt := range []struct {
		name  string
		b     []byte
		ext   string
		files int
		args  []string
		code  int
	}{
		{"main headers", largeHeaders(8<<20, 0), ".rpm", 16, []string{"rpm", "--key", "ed"}, 0},
		{"signature headers", largeHeaders(0, 6<<20), ".rpm", 16, []string{"rpm", "--key", "ed"}, 0},
		{"a main header", largeHeaders(31<<20, 2<<20), ".rpm", 1, []string{"rpm", "--key", "ed"}, 0},
		{"headers too large", largeHeaders(31<<20, 5<<20), ".rpm", 16, []string{"rpm", "--key", "ed"}, 1},
		{"file signatures", many, ".rpm", 4, []string{"rpm", "--key", "ed", "--ima", "ima"}, 0},
		{"xz", readFile(t, module+".xz"), ".ko.xz", 6, []string{"kmod", "--key", "p256"}, 0},
		{"zstd", readFile(t, module+".zst"), ".ko.zst", 16, []string{"kmod", "--key", "p256"}, 0},
		{"dictionaries", dictionary(), ".ko.xz", 64, []string{"kmod", "--key", "p256"}, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := &hostile{g: g, dir: t.TempDir(), before: map[string][32]byte{}}
			for i := range tt.files {
				h.add(t, fmt.Sprintf("%02d%s", i, tt.ext), tt.b)
			}
			r := h.run(t, append(append([]string{"sign"}, tt.args...), "-r", h.dir))
			if r.code != tt.code {
				t.Errorf("exit code %d, want %d: %.1000s", r.code, tt.code, r.stderr)
			}
			for f := range h.before {
				if changed := !bytes.Equal(readFile(t, f), tt.b); changed != (tt.code == 0) {
					t.Errorf("%s: changed %t", f, changed)
				}
			}
		})
	}
}
