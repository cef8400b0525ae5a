//go:build corpus

package kmod_test

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/signwarden/signwarden/formats/kmod"
)

// corpus is where packages are unpacked, if not in the system itself: dpkg -x linux-image-....deb $SIGNWARDEN_CORPUS.
func corpus() string {
	if dir := os.Getenv("SIGNWARDEN_CORPUS"); dir != "" {
		return dir
	}
	return "/"
}

// modules returns real modules, signed or not.
func modules(t *testing.T, atLeast int) []string {
	t.Helper()
	var all []string
	for _, dir := range []string{"lib/modules", "usr/lib/modules"} {
		err := filepath.WalkDir(filepath.Join(corpus(), dir), func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() && strings.Contains(filepath.Base(path), ".ko") {
				all = append(all, path)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(all) < atLeast {
		t.Fatalf("required corpus: %d modules under %s, want %d (Debian: linux-image-cloud-amd64)", len(all), corpus(), atLeast)
	}
	step := len(all) / atLeast
	for i := range atLeast {
		all[i] = all[i*step]
	}
	return all[:atLeast]
}

// 300 modules of the distribution, made as sign-file makes them of what is in them without their own signature.
func TestCorpus(t *testing.T) {
	s := newSubject(t, "rsa")
	signed := 0
	for i, path := range modules(t, 300) {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		info, err := kmod.Inspect(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			t.Errorf("%s: %v", path, err)
			continue
		}
		if info.Signature != nil {
			signed++
		}
		name := []string{"sha256", "sha384", "sha512"}[i%3]
		o := kmod.Options{Hash: hashes[name], Replace: true, SubjectKeyID: i%2 == 1}
		var flags []string
		if o.SubjectKeyID {
			flags = []string{"-k"}
		}
		plain := unpack(t, info.Compression, b)[:info.Size]
		want := signFile(t, s, name, plain, flags...)
		got := sign(t, s, b, o)
		if !bytes.Equal(unpack(t, info.Compression, got), want) {
			t.Errorf("%s: unlike sign-file", path)
		}
		_, err = verify(got, s.cert)
		if err != nil {
			t.Errorf("%s: %v", path, err)
		}
		if i%10 == 0 {
			openssl(t, s, plain, got)
		}
		if i%30 == 0 {
			corpusPacked(t, s, plain, want)
		}
	}
	t.Logf("of 300 modules %d were signed", signed)
}

// corpusPacked signs a real module in every packing.
func corpusPacked(t *testing.T, s subject, plain, want []byte) {
	t.Helper()
	who, err := kmod.Inspect(bytes.NewReader(want), int64(len(want)))
	if err != nil || who.Size != int64(len(plain)) {
		t.Fatalf("Inspect: got %+v, %v", who, err)
	}
	for c, suffix := range suffixes {
		if c == kmod.Plain {
			continue
		}
		theirs := pack(t, c, plain)
		packed := sign(t, s, theirs, kmod.Options{})
		if got := unpack(t, c, packed); !bytes.HasPrefix(got, plain) {
			t.Errorf("%s: unpacks to something else", c)
		}
		if len(packed) > len(theirs)*5/4+2000 {
			t.Errorf("%s: packs to %d bytes, its own tool to %d", c, len(packed), len(theirs))
		}
		if c != kmod.Gzip {
			if out := run(t, "/sbin/modinfo", file(t, "m.ko"+suffix, packed)); !strings.Contains(out, "sig_id:         PKCS#7") {
				t.Errorf("%s: modinfo:\n%s", c, out)
			}
		}
	}
}
