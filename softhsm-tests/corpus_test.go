//go:build corpus

package softhsm_test

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signwarden/signwarden/formats/kmod"
)

// hostileFiles with the real files at hand: ten thousand of each format.
const hostileFiles = 10_000

// corpusRoot is where corpus.sh has unpacked packages of the distribution.
func corpusRoot(t testing.TB) string {
	t.Helper()
	root := os.Getenv("SIGNWARDEN_CORPUS")
	if root == "" {
		t.Fatal("SIGNWARDEN_CORPUS is not set: make corpus")
	}
	return root
}

// gather copies the files below the corpus that want says into a new directory.
func gather(t testing.TB, want func(path string) bool) (dir string, from map[string]string) {
	t.Helper()
	dir, from = t.TempDir(), map[string]string{}
	err := filepath.WalkDir(corpusRoot(t), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || !want(path) {
			return err
		}
		to := filepath.Join(dir, fmt.Sprintf("%05d-%s", len(from), filepath.Base(path)))
		from[to] = path
		return os.WriteFile(to, readFile(t, path), 0o644)
	})
	if err != nil {
		t.Fatal(err)
	}
	return dir, from
}

// All modules of a kernel in one run, through the gateway: openssl and modinfo find
// each signature right, over the module without the one that it had.
func TestCorpusKMod(t *testing.T) {
	g := newGateway(t)
	cert := g.x509Key(t, "modules", "rsa2048")
	dir, from := gather(t, func(path string) bool { return strings.HasSuffix(path, ".ko") })
	if len(from) < 900 {
		t.Fatalf("%d modules under %s", len(from), corpusRoot(t))
	}
	row := g.audit(t, 1)[0].Row
	start := time.Now()
	g.must(t, "signwarden", "sign", "kmod", "--key", "modules", "-r", dir)
	took := time.Since(start)
	for to, path := range from {
		plain, b := readFile(t, path), readFile(t, to)
		was, err := kmod.Inspect(bytes.NewReader(plain), int64(len(plain)))
		if err != nil {
			t.Fatal(err)
		}
		is, err := kmod.Inspect(bytes.NewReader(b), int64(len(b)))
		if err != nil || is.Size != was.Size || !bytes.Equal(b[:is.Size], plain[:was.Size]) {
			t.Fatalf("%s: another module: %v", to, err)
		}
		sig := filepath.Join(t.TempDir(), "sig")
		writeFile(t, sig, string(is.Signature))
		if !opensslVerifies(t, sig, cert, plain[:was.Size]) {
			t.Errorf("%s: openssl does not verify it", to)
		}
		if out := mustEnv(t, os.Environ(), "/sbin/modinfo", to); !strings.Contains(out, "sig_id:         PKCS#7") {
			t.Errorf("modinfo:\n%s", out)
		}
	}
	if rows := g.audit(t, 1)[0].Row - row; rows != int64(len(from)) {
		t.Errorf("%d rows for %d modules", rows, len(from))
	}
	t.Logf("%d modules signed with RSA-2048 in %v, %.0f/s, and verified by openssl and modinfo", len(from), took.Round(time.Millisecond), float64(len(from))/took.Seconds())
}

// 300 of the distribution's own modules, by the kernel's sign-file through the PKCS#11 socket.
func TestCorpusSignFile(t *testing.T) {
	s := newP11Site(t)
	signFile := signFileByEngine(t, s.dir)
	n := 0
	dir, from := gather(t, func(path string) bool {
		if !strings.HasSuffix(path, ".ko") || n == 300 {
			return false
		}
		n++
		return true
	})
	before := map[string][]byte{}
	for to := range from {
		b := readFile(t, to)
		info, err := kmod.Inspect(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			t.Fatal(err)
		}
		before[to] = b[:info.Size]
		writeFile(t, to, string(b[:info.Size])) // sign-file puts a second signature behind a first
	}
	if len(from) != 300 {
		t.Fatalf("%d modules under %s", len(from), corpusRoot(t))
	}
	s.exec(t, "sh", "-ec", `for m in "$2"/*.ko; do "$0" sha256 pkcs11:object=kmod "$1" "$m"; done`, signFile, s.at("kmod.pem"), dir)
	s.signedModules(t, s.at("kmod.pem"), "kmod", before)
}

// All EFI images in one run, through the gateway, by sbverify; osslsigncode where
// ours is the only signature; then sbsign's beside ours, and ours detached.
func TestCorpusEFI(t *testing.T) {
	g := newGateway(t)
	cert := g.x509Key(t, "boot", "rsa2048")
	theirs := filepath.Join(t.TempDir(), "theirs")
	mustEnv(t, os.Environ(), "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", theirs+".key", "-out", theirs+".pem", "-subj", "/CN=theirs", "-days", "2")
	_, from := gather(t, func(path string) bool {
		name := filepath.Base(path)
		return strings.Contains(path, "/usr/lib/") && strings.Contains(name, ".efi") || strings.HasPrefix(name, "vmlinuz-")
	})
	if len(from) < 20 {
		t.Fatalf("%d images under %s", len(from), corpusRoot(t))
	}
	var files []string
	for to := range from {
		files = append(files, to)
	}
	g.must(t, "signwarden", append([]string{"sign", "efi", "--key", "boot"}, files...)...)
	alone := 0
	for _, f := range files {
		mustEnv(t, os.Environ(), "sbverify", "--cert", cert, f)
		if strings.Count(mustEnv(t, os.Environ(), "sbverify", "--list", f), "image signature issuers") == 1 {
			alone++
			mustEnv(t, os.Environ(), "osslsigncode", "verify", "-CAfile", cert, "-TSA-CAfile", cert, "-in", f)
			mustEnv(t, os.Environ(), "sbattach", "--detach", f+".p7s", f)
			mustEnv(t, os.Environ(), "openssl", "pkcs7", "-inform", "DER", "-in", f+".p7s", "-noout")
		}
		mustEnv(t, os.Environ(), "sbsign", "--key", theirs+".key", "--cert", theirs+".pem", "--output", f, f)
		mustEnv(t, os.Environ(), "sbverify", "--cert", cert, f)
		mustEnv(t, os.Environ(), "sbverify", "--cert", theirs+".pem", f)
	}
	g.must(t, "signwarden", append([]string{"verify", "efi", "--key", "boot"}, files...)...)
	if alone == 0 || alone == len(files) {
		t.Errorf("%d of %d images were unsigned", alone, len(files))
	}
	t.Logf("%d images signed and verified by sbverify, %d of them by osslsigncode and detached by sbattach; sbsign's beside ours on all", len(files), alone)
}
