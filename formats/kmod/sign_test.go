package kmod_test

import (
	"bytes"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/signwarden/signwarden/formats/cms"
	"github.com/signwarden/signwarden/formats/kmod"
)

// sign signs and fails the test on an error.
func sign(t testing.TB, s subject, module []byte, o kmod.Options) []byte {
	t.Helper()
	o.Certificate = s.cert
	var out bytes.Buffer
	err := kmod.Sign(&out, bytes.NewReader(module), int64(len(module)), s, o)
	if err != nil {
		t.Fatalf("Sign: %v", err)
	}
	return out.Bytes()
}

func verify(module []byte, certs ...*x509.Certificate) ([]cms.Signer, error) {
	return kmod.Verify(bytes.NewReader(module), int64(len(module)), certs)
}

var hashes = map[string]crypto.Hash{"sha256": crypto.SHA256, "sha384": crypto.SHA384, "sha512": crypto.SHA512}

func TestSameAsSignFile(t *testing.T) {
	s := newSubject(t, "rsa")
	for _, size := range []int{0, 1, 40000, 300000} {
		module := newELF(size)
		for name, h := range hashes {
			for _, keyID := range []bool{false, true} {
				t.Run(fmt.Sprintf("%d/%s/-k=%v", size, name, keyID), func(t *testing.T) {
					var flags []string
					if keyID {
						flags = []string{"-k"}
					}
					want := signFile(t, s, name, module, flags...)
					got := sign(t, s, module, kmod.Options{Hash: h, SubjectKeyID: keyID})
					if !bytes.Equal(got, want) {
						t.Errorf("got %d bytes unlike sign-file's %d: ends %x, want %x", len(got), len(want), got[len(module):], want[len(module):])
					}
					again := sign(t, s, want, kmod.Options{Hash: h, SubjectKeyID: keyID, Replace: true})
					if !bytes.Equal(again, want) {
						t.Error("signing again made another file")
					}
					who, err := verify(want, s.cert)
					if err != nil || len(who) != 1 || who[0].Hash != h {
						t.Errorf("Verify: got %+v, %v", who, err)
					}
				})
			}
		}
	}
}

// ECDSA signatures are random: all but they must be what sign-file makes, and openssl must verify them.
func TestECDSA(t *testing.T) {
	s := newSubject(t, "p256")
	module := newELF(1000)
	theirs := signFile(t, s, "sha256", module)
	ours := sign(t, s, module, kmod.Options{})
	for who, signed := range map[string][]byte{"theirs": theirs, "ours": ours} {
		_, err := verify(signed, s.cert)
		if err != nil {
			t.Errorf("%s: %v", who, err)
		}
		openssl(t, s, module, signed)
	}
	blank := func(signed []byte) []byte {
		info, err := kmod.Inspect(bytes.NewReader(signed), int64(len(signed)))
		if err != nil {
			t.Fatal(err)
		}
		body, sig, ok := bytes.Cut(info.Signature, []byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02, 0x04})
		if !ok || int(sig[0]) != len(sig)-1 {
			t.Fatalf("no ecdsa-with-SHA256 in %x", info.Signature)
		}
		return body[bytes.Index(body, []byte{0x02, 0x01, 0x01}):]
	}
	zeroLengths := func(b []byte) []byte { // of the SET and the SEQUENCE that hold the signature
		b = bytes.Clone(b)
		i := bytes.LastIndex(b, []byte{0x02, 0x01, 0x01})
		copy(b[i-6:i], make([]byte, 6))
		return b
	}
	if got, want := zeroLengths(blank(ours)), zeroLengths(blank(theirs)); !bytes.Equal(got, want) {
		t.Errorf("got  %x\nwant %x", got, want)
	}
}

// openssl verifies the CMS message at the end of a signed module.
func openssl(t testing.TB, s subject, module, signed []byte) {
	t.Helper()
	info, err := kmod.Inspect(bytes.NewReader(signed), int64(len(signed)))
	if err != nil {
		t.Fatalf("Inspect: %v", err)
	}
	run(t, "openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", file(t, "sig", info.Signature), "-noverify",
		"-nointern", "-certfile", s.certFile, "-content", file(t, "module", module), "-out", os.DevNull)
}

// pack packs as the kernel's modules_install does.
func pack(t testing.TB, c kmod.Compression, module []byte) []byte {
	t.Helper()
	path := file(t, "module.ko", module)
	switch c {
	case kmod.XZ:
		run(t, "xz", "--check=crc32", "--lzma2=dict=1MiB", path)
		path += ".xz"
	case kmod.Zstd:
		run(t, "zstd", "-T0", "--rm", "-f", "-q", path)
		path += ".zst"
	case kmod.Gzip:
		run(t, "gzip", "-n", path)
		path += ".gz"
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func unpack(t testing.TB, c kmod.Compression, packed []byte) []byte {
	t.Helper()
	name := map[kmod.Compression]string{kmod.Plain: "cat", kmod.XZ: "xzcat", kmod.Zstd: "zstdcat", kmod.Gzip: "zcat"}[c]
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("required peer: %v", err)
	}
	cmd := exec.CommandContext(t.Context(), path)
	cmd.Stdin = bytes.NewReader(packed)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return out
}

var suffixes = map[kmod.Compression]string{kmod.Plain: "", kmod.XZ: ".xz", kmod.Zstd: ".zst", kmod.Gzip: ".gz"}

func TestCompressed(t *testing.T) {
	s := newSubject(t, "rsa")
	module := newELF(1_500_000)
	want := signFile(t, s, "sha256", module)
	for c, suffix := range suffixes {
		t.Run(string(c), func(t *testing.T) {
			packed := sign(t, s, pack(t, c, module), kmod.Options{})
			if got := unpack(t, c, packed); !bytes.Equal(got, want) {
				t.Errorf("unpacks to %d bytes unlike sign-file's %d", len(got), len(want))
			}
			name, shown := "test.ko"+suffix, packed
			if c == kmod.Gzip { // Debian's kmod 30 is built without zlib
				name, shown = "test.ko", unpack(t, c, packed)
			}
			if out := run(t, "/sbin/modinfo", file(t, name, shown)); !strings.Contains(out, "sig_id:         PKCS#7") {
				t.Errorf("modinfo:\n%s", out)
			}
			if c == kmod.XZ {
				if out := run(t, "xz", "-lvv", file(t, "a.xz", packed)); !strings.Contains(out, "CRC32") || !strings.Contains(out, "dict=1MiB") {
					t.Errorf("xz -l:\n%s", out)
				}
			}
			if len(packed) > len(module)*2/3 && c != kmod.Plain {
				t.Errorf("packed %d bytes to %d", len(module), len(packed))
			}
			info, err := kmod.Inspect(bytes.NewReader(packed), int64(len(packed)))
			if err != nil || info.Compression != c || info.Size != int64(len(module)) || info.Signature == nil {
				t.Errorf("Inspect: got %+v, %v", info, err)
			}
			if !kmod.Recognize(bytes.NewReader(packed), int64(len(packed))) {
				t.Error("not recognised")
			}
			_, err = verify(packed, s.cert)
			if err != nil {
				t.Errorf("Verify: %v", err)
			}
			// What the other packers write is read: their signed module again.
			again := sign(t, s, pack(t, c, want), kmod.Options{Replace: true})
			if got := unpack(t, c, again); !bytes.Equal(got, want) {
				t.Error("replaced, it unpacks to something else")
			}
		})
	}
}

// xz of any settings is read, but no memory is spent on a large dictionary.
func TestXZ(t *testing.T) {
	s := newSubject(t, "rsa")
	module := newELF(200000)
	for _, tt := range []struct {
		args []string
		ok   bool
	}{
		{[]string{"-0"}, true},
		{[]string{"-6", "--check=crc64"}, true},
		{[]string{"--check=sha256"}, true},
		{[]string{"--check=none"}, true},
		{[]string{"--block-size=65536", "-T2"}, true},
		{[]string{"-9"}, true}, // a dictionary of 64 MiB, of which the file can use one
		{[]string{"--x86", "--lzma2=dict=1MiB"}, false},
	} {
		path := file(t, "m", module)
		run(t, "xz", append(tt.args, path)...)
		packed, err := os.ReadFile(path + ".xz")
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		err = kmod.Sign(&out, bytes.NewReader(packed), int64(len(packed)), s, kmod.Options{Certificate: s.cert})
		if tt.ok && (err != nil || !bytes.HasPrefix(unpack(t, kmod.XZ, out.Bytes()), module)) {
			t.Errorf("xz %q: %v", tt.args, err)
		}
		if !tt.ok && (!errors.Is(err, kmod.ErrMalformed) || out.Len() != 0) {
			t.Errorf("xz %q: got %v, want ErrMalformed", tt.args, err)
		}
	}
}

func TestAlreadySigned(t *testing.T) {
	s, old := newSubject(t, "rsa"), newSubject(t, "p256")
	module := newELF(100)
	want := sign(t, s, module, kmod.Options{})
	once := signFile(t, old, "sha256", module)
	twice := signFile(t, s, "sha256", once)
	for name, signed := range map[string][]byte{"once": once, "twice": twice} {
		s.calls = 0
		var out bytes.Buffer
		err := kmod.Sign(&out, bytes.NewReader(signed), int64(len(signed)), s, kmod.Options{Certificate: s.cert})
		if !errors.Is(err, kmod.ErrSigned) || out.Len() != 0 || s.calls != 0 {
			t.Errorf("%s: got %v, %d bytes and %d calls, want ErrSigned", name, err, out.Len(), s.calls)
		}
		if got := sign(t, s, signed, kmod.Options{Replace: true}); !bytes.Equal(got, want) {
			t.Errorf("%s: the old signature left traces", name)
		}
	}
	// The kernel takes off one signature and checks it over what is before, another signature or not.
	_, err := verify(twice, s.cert)
	if err != nil {
		t.Errorf("the last of two: %v", err)
	}
	_, err = verify(twice, old.cert)
	if !errors.Is(err, cms.ErrBadSignature) {
		t.Errorf("the first of two: got %v, want ErrBadSignature", err)
	}
	_, err = verify(module, s.cert)
	if !errors.Is(err, kmod.ErrNotSigned) {
		t.Errorf("unsigned: got %v, want ErrNotSigned", err)
	}
}

// Signatures whose first byte is zero keep it (Debian bug 1012741).
func TestLeadingZero(t *testing.T) {
	s := newSubject(t, "rsa")
	key := rsaKey()
	for i := 0; ; i++ {
		if i == 5000 {
			t.Fatal("no signature with a leading zero in 5000")
		}
		module := newELF(10)
		binary.LittleEndian.PutUint32(module[24:], uint32(i)) // e_entry, which is of no use here
		digest := sha256.Sum256(module)
		raw, err := rsa.SignPKCS1v15(nil, key, crypto.SHA256, digest[:])
		if err != nil {
			t.Fatal(err)
		}
		if raw[0] != 0 {
			continue
		}
		want := signFile(t, s, "sha256", module)
		for name, change := range map[string]func([]byte) ([]byte, error){
			"kept":    func(b []byte) ([]byte, error) { return b, nil },
			"cut off": func(b []byte) ([]byte, error) { return bytes.TrimLeft(b, "\x00"), nil },
		} {
			s.change = change
			if got := sign(t, s, module, kmod.Options{}); !bytes.Equal(got, want) {
				t.Errorf("%s: unlike sign-file", name)
			}
		}
		return
	}
}

func TestSignerFaults(t *testing.T) {
	errToken := errors.New("token on fire")
	s := newSubject(t, "rsa")
	module := newELF(100)
	for c := range suffixes {
		packed := pack(t, c, module)
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
			err := kmod.Sign(&out, bytes.NewReader(packed), int64(len(packed)), s, kmod.Options{Certificate: s.cert})
			if !errors.Is(err, tt.want) || out.Len() != 0 {
				t.Errorf("%s %s: got %v and %d bytes, want %v", c, tt.name, err, out.Len(), tt.want)
			}
		}
	}
}

// failing is a file that cannot be read to its end, and then one that changes.
type failing struct {
	*bytes.Reader
	err   error
	reads int
}

func (f *failing) ReadAt(p []byte, off int64) (int, error) {
	f.reads++
	if f.err != nil && off+int64(len(p)) > 1000 {
		return 0, f.err
	}
	n, err := f.Reader.ReadAt(p, off)
	if f.err == nil && f.reads > 4 && n > 300 {
		p[200] ^= 1
	}
	return n, err
}

func TestFileFaults(t *testing.T) {
	errDisk := errors.New("disk on fire")
	s := newSubject(t, "rsa")
	module := newELF(200000)
	for c := range suffixes {
		packed := pack(t, c, module)
		s.calls = 0
		var out bytes.Buffer
		f := &failing{Reader: bytes.NewReader(packed), err: errDisk}
		err := kmod.Sign(&out, f, int64(len(packed)), s, kmod.Options{Certificate: s.cert})
		if !errors.Is(err, errDisk) || out.Len() != 0 || s.calls != 0 {
			t.Errorf("%s: got %v, %d bytes and %d calls", c, err, out.Len(), s.calls)
		}
	}
	f := &failing{Reader: bytes.NewReader(module)}
	err := kmod.Sign(&bytes.Buffer{}, f, int64(len(module)), s, kmod.Options{Certificate: s.cert})
	if !errors.Is(err, kmod.ErrChanged) {
		t.Errorf("a file that changes: got %v, want ErrChanged", err)
	}
	err = kmod.Sign(badWriter{errDisk}, bytes.NewReader(module), int64(len(module)), s, kmod.Options{Certificate: s.cert})
	if !errors.Is(err, errDisk) {
		t.Errorf("a disk that is full: got %v", err)
	}
}

type badWriter struct{ err error }

func (b badWriter) Write([]byte) (int, error) { return 0, b.err }
