package fsverity_test

import (
	"bytes"
	"crypto"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/signwarden/signwarden/formats/cms"
	"github.com/signwarden/signwarden/formats/fsverity"
)

var hashes = map[string]crypto.Hash{"sha256": crypto.SHA256, "sha512": crypto.SHA512}

// content is a file of a size, no two blocks of it the same.
func content(size int) []byte {
	b := make([]byte, size)
	r := rand.NewChaCha8([32]byte{byte(size), byte(size >> 8), byte(size >> 16)})
	r.Read(b)
	return b
}

// flags are those of fsverity that mean p.
func flags(hash string, p fsverity.Parameters) []string {
	args := []string{"--hash-alg=" + hash}
	if p.BlockSize != 0 {
		args = append(args, fmt.Sprintf("--block-size=%d", p.BlockSize))
	}
	if len(p.Salt) > 0 {
		args = append(args, "--salt="+hex.EncodeToString(p.Salt))
	}
	return args
}

// sizes are those of files where something about the tree changes: blocks and levels begin, end and are filled. The
// last is of four levels.
func sizes(hash crypto.Hash, blockSize int) []int {
	if blockSize == 0 {
		blockSize = fsverity.DefaultBlockSize
	}
	all := []int{0, 1, 100}
	per := blockSize / hash.Size()
	for _, n := range []int{1, 2, per, per + 1, per * per, per*per + per} {
		if n*blockSize < 1<<20 {
			all = append(all, n*blockSize-1, n*blockSize, n*blockSize+1)
		}
	}
	return append(all, 1<<20+12345)
}

// The digest is that of fsverity, of every size, hash, block size and salt.
func TestDigest(t *testing.T) {
	for name, h := range hashes {
		for _, p := range []fsverity.Parameters{
			{}, {BlockSize: 1024}, {BlockSize: 8192}, {BlockSize: 65536}, {Salt: []byte("s")},
			{BlockSize: 1024, Salt: bytes.Repeat([]byte{0xfe}, fsverity.MaxSalt)},
		} {
			p.Hash = h
			args := append([]string{"digest", "--compact"}, flags(name, p)...)
			var files []string
			var all [][]byte
			for _, n := range sizes(h, p.BlockSize) {
				all = append(all, content(n))
				files = append(files, file(t, "f", content(n)))
			}
			lines := strings.Fields(run(t, "fsverity", append(args, files...)...))
			if len(lines) != len(all) {
				t.Fatalf("fsverity prints %d digests of %d files", len(lines), len(all))
			}
			for i, b := range all {
				got, err := fsverity.Digest(bytes.NewReader(b), p)
				if err != nil || hex.EncodeToString(got) != lines[i] {
					t.Errorf("%s %+v, %d bytes: got %x, %v; want %s", name, p, len(b), got, err, lines[i])
				}
			}
		}
	}
	// The zero value.
	got, err := fsverity.Digest(bytes.NewReader(content(5000)), fsverity.Parameters{})
	want := strings.TrimSpace(run(t, "fsverity", "digest", "--compact", file(t, "f", content(5000))))
	if err != nil || hex.EncodeToString(got) != want {
		t.Errorf("got %x, %v; want %s", got, err, want)
	}
}

// However the bytes come, the digest is the same.
func TestDigestOfPieces(t *testing.T) {
	p := fsverity.Parameters{Hash: crypto.SHA512, BlockSize: 1024}
	b := content(300_000)
	want, err := fsverity.Digest(bytes.NewReader(b), p)
	if err != nil {
		t.Fatal(err)
	}
	for name, r := range map[string]io.Reader{
		"one byte":      iotest.OneByteReader(bytes.NewReader(b)),
		"half":          iotest.HalfReader(bytes.NewReader(b)),
		"data with EOF": iotest.DataErrReader(bytes.NewReader(b)),
		"odd pieces":    pieces{bytes.NewReader(b)},
	} {
		got, err := fsverity.Digest(r, p)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: got %x, %v", name, got, err)
		}
	}
}

type pieces struct{ r io.Reader }

func (p pieces) Read(b []byte) (int, error) { return p.r.Read(b[:min(len(b), 1+rand.IntN(3000))]) }

// With RSA the signature is the one of fsverity sign, byte for byte.
func TestSameAsFsverity(t *testing.T) {
	s := newSubject(t, "rsa")
	n := 0
	for name, h := range hashes {
		for _, p := range []fsverity.Parameters{{}, {BlockSize: 1024}, {Salt: []byte("salt")}} {
			p.Hash = h
			for _, size := range sizes(h, p.BlockSize) {
				b, out := content(size), file(t, "f.sig", nil)
				path := file(t, "f", b)
				run(t, "fsverity", append([]string{"sign", path, out, "--key=" + s.keyFile, "--cert=" + s.certFile}, flags(name, p)...)...)
				want := read(t, out)
				got, err := fsverity.Sign(bytes.NewReader(b), s, s.cert, p)
				if err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s %+v, %d bytes: got %x, %v\nwant %x", name, p, size, got, err, want)
				}
				who, err := fsverity.Verify(bytes.NewReader(b), want, certs(s), p)
				if err != nil || len(who) != 1 || !who[0].Certificate.Equal(s.cert) {
					t.Errorf("%s %+v, %d bytes: Verify: %v", name, p, size, err)
				}
				n++
			}
		}
	}
	t.Logf("%d signatures are the same", n)
}

// Other keys sign what fsverity says is to be signed, by openssl.
func TestOpenSSLVerifies(t *testing.T) {
	for _, tt := range []struct {
		key  string
		hash string
		want crypto.Hash // of the message
	}{
		{"p256", "sha256", crypto.SHA256}, {"p256", "sha512", crypto.SHA512}, {"p384", "sha256", crypto.SHA384},
		{"p384", "sha512", crypto.SHA512}, {"p521", "sha256", crypto.SHA512}, {"rsa", "sha512", crypto.SHA512},
	} {
		s := newSubject(t, tt.key)
		b := content(10_000)
		sig, err := fsverity.Sign(bytes.NewReader(b), s, s.cert, fsverity.Parameters{Hash: hashes[tt.hash]})
		if err != nil {
			t.Fatalf("%s: %v", tt.key, err)
		}
		m, err := cms.Parse(sig)
		if err != nil || m.Signers[0].Hash != tt.want {
			t.Errorf("%s %s: hash %v, want %v (%v)", tt.key, tt.hash, m.Signers[0].Hash, tt.want, err)
		}
		signed, err := hex.DecodeString(strings.TrimSpace(run(t, "fsverity", "digest", "--for-builtin-sig", "--compact",
			"--hash-alg="+tt.hash, file(t, "f", b))))
		if err != nil {
			t.Fatal(err)
		}
		openssl := func(content []byte) (string, error) {
			return try(t, "openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", file(t, "sig", sig), "-noverify",
				"-certfile", s.certFile, "-content", file(t, "content", content), "-out", "/dev/null")
		}
		out, err := openssl(signed)
		if err != nil {
			t.Errorf("%s %s: %v\n%s", tt.key, tt.hash, err, out)
		}
		out, err = openssl(b)
		if err == nil {
			t.Errorf("openssl verifies it over something else: this test could not fail\n%s", out)
		}
	}
}

// zeros is a file of so many bytes.
type zeros struct{ left int64 }

func (z *zeros) Read(b []byte) (int, error) {
	if z.left == 0 {
		return 0, io.EOF
	}
	n := min(int64(len(b)), z.left)
	clear(b[:n])
	z.left -= n
	return int(n), nil
}

// 512 MiB go through fixed buffers.
func TestConstantMemory(t *testing.T) {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err := fsverity.Digest(&zeros{1}, fsverity.Parameters{Hash: crypto.SHA512, BlockSize: 65536})
	if err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	small := after.TotalAlloc - before.TotalAlloc
	_, err = fsverity.Digest(&zeros{512 << 20}, fsverity.Parameters{BlockSize: 65536})
	if err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&before)
	large := before.TotalAlloc - after.TotalAlloc
	// A hash of each block is made, 32 bytes, and a second and third level.
	if limit := small + 512<<20/65536*64 + 4*65536; large > limit {
		t.Errorf("%d bytes allocated for 512 MiB, %d for one byte", large, small)
	}
}
