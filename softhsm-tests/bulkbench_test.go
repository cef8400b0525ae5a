//go:build bench

package softhsm_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signwarden/signwarden/gateway/keys"
)

// A package of 5 GB: the client's memory, what goes over the wire, and signing it
// again beside rpmsign.
func TestBenchHugeRPM(t *testing.T) {
	g := newGateway(t)
	g.key(t, "rel", "rsa4096")
	file := hugeRPM(t)
	gpg := strings.TrimSpace(mustEnv(t, os.Environ(), "sh", "-c", "command -v gpg"))
	real := realAgent(t, "rsa4096")
	// Signed once, so that all that follows signs again; and read once.
	g.must(t, "signwarden", "sign", "rpm", "--key", "rel", file)

	proxy := newProxy(t, g.address)
	profile := filepath.Join(g.dir, "clients", "admin", "proxied.yaml")
	writeFile(t, profile, strings.Replace(string(readFile(t, g.profile("admin"))), g.address, proxy.address, 1))
	cmd := exec.Command(filepath.Join(bin, "signwarden"), "--profile", profile, "sign", "rpm", "--key", "rel", file)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	rss := cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss // KiB
	proxy.stop()
	fmt.Printf("5 GB package: client's memory %d KiB, %d bytes both ways\n", rss, proxy.bytes.Load())
	if rss >= 32<<10 {
		t.Errorf("the client took %d KiB, want under %d", rss, 32<<10)
	}
	if n := proxy.bytes.Load(); n >= 64<<10 || n == 0 {
		t.Errorf("%d bytes were moved, want under %d", n, 64<<10)
	}

	var checked, unread, theirs []time.Duration
	for range 3 {
		theirs = append(theirs, timed(func() {
			mustEnv(t, real, "rpmsign", "--define", "__gpg "+gpg, "--define", "_gpg_name real@example.org", "--resign", file)
		}))
		checked = append(checked, timed(func() { g.must(t, "signwarden", "sign", "rpm", "--key", "rel", file) }))
		unread = append(unread, timed(func() { g.must(t, "signwarden", "sign", "rpm", "--key", "rel", "--no-payload-check", file) }))
	}
	mustEnv(t, os.Environ(), "rpmkeys", "--dbpath", g.rpmdb(t, "rel"), "-K", file)
	r, c, u := median(theirs), median(checked), median(unread)
	fmt.Printf("5 GB package signed again, RSA-4096: rpmsign %.2f s; ours %.2f s, %.1f times as fast; without reading the payload %.3f s, %.0f times\n",
		r.Seconds(), c.Seconds(), r.Seconds()/c.Seconds(), u.Seconds(), r.Seconds()/u.Seconds())
	if r < 2*c || r < 20*u {
		t.Error("want at least 2 and 20 times as fast")
	}
}

// hugeRPM is a package with a payload of 5 GB, which is not compressed.
func hugeRPM(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	spec := filepath.Join(dir, "huge.spec")
	writeFile(t, spec, `Name: huge
Version: 1.0
Release: 1
Summary: A large package
License: Apache-2.0
BuildArch: noarch
%define _binary_payload w.ufdio
%description
A large package.
%install
mkdir -p %{buildroot}/usr/share/huge
for i in 1 2 3 4 5; do truncate -s 1000000000 %{buildroot}/usr/share/huge/$i; done
%files
/usr/share/huge
`)
	mustEnv(t, os.Environ(), "rpmbuild", "-bb", "--quiet", "--define", "_topdir "+dir, "--define", "__os_install_post %{nil}", spec)
	file := filepath.Join(dir, "RPMS", "noarch", "huge-1.0-1.noarch.rpm")
	if info, err := os.Stat(file); err != nil || info.Size() < 5_000_000_000 {
		t.Fatalf("the package is %v, %v", info, err)
	}
	return file
}

// The packages of a mass rebuild.
const bulkPackages = 4168

// bulkRPMs builds the packages, each with content of its own. Their sizes are
// distributed as those of a distribution's packages, scaled down by about 20: most
// have a few kilobytes, a few have a thousand times as many.
func bulkRPMs(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	var b strings.Builder
	b.WriteString(`Name: bulk
Version: 1.0
Release: 1
Summary: Many packages
License: Apache-2.0
BuildArch: noarch
%description
Many packages.
%install
mkdir -p %{buildroot}/usr/share/bulk
for i in $(seq ` + fmt.Sprint(bulkPackages) + `); do
    case $i in *00) kb=1000;; *0) kb=40;; *5) kb=15;; *) kb=3;; esac
    head -c $((kb * 1000 + i)) /dev/urandom >%{buildroot}/usr/share/bulk/$i
done
`)
	for i := range bulkPackages {
		fmt.Fprintf(&b, "%%package -n b%[1]d\nSummary: Number %[1]d\n%%description -n b%[1]d\nNumber %[1]d.\n%%files -n b%[1]d\n/usr/share/bulk/%[1]d\n", i+1)
	}
	spec := filepath.Join(dir, "bulk.spec")
	writeFile(t, spec, b.String())
	mustEnv(t, os.Environ(), "rpmbuild", "-bb", "--quiet", "--define", "_topdir "+dir, spec)
	return filepath.Join(dir, "RPMS", "noarch")
}

// 4,168 packages in one command, beside the token's raw rate with the same key, and
// beside rpmsign with a real gpg-agent on some of them.
func TestBenchBulkRPM(t *testing.T) {
	g := newGateway(t)
	raw := newRaw(t, g)
	dir := bulkRPMs(t)
	files, err := filepath.Glob(filepath.Join(dir, "*.rpm"))
	if err != nil || len(files) != bulkPackages {
		t.Fatalf("%d packages, %v", len(files), err)
	}
	mustEnv(t, os.Environ(), "sh", "-c", "cat "+dir+"/* >"+filepath.Join(t.TempDir(), "read")) // into the cache
	gpg := strings.TrimSpace(mustEnv(t, os.Environ(), "sh", "-c", "command -v gpg"))
	real := realAgent(t, "rsa4096")

	for _, a := range []string{"rsa4096", "p256", "ed25519"} {
		g.key(t, "k-"+a, a)
		var key struct {
			TokenID string `json:"token_id"`
		}
		if err := json.Unmarshal([]byte(g.must(t, "signwarden", "key", "show", "k-"+a, "-o", "json")), &key); err != nil {
			t.Fatal(err)
		}
		sign := raw.signer(t, keys.Algorithm(a), key.TokenID)
		before := sign(3 * time.Second)
		took := timed(func() { g.must(t, "signwarden", "sign", "rpm", "--key", "k-"+a, "-r", dir) })
		after := sign(3 * time.Second)
		rate, rawRate := bulkPackages/took.Seconds(), (before+after)/2
		fmt.Printf("%d packages, %s: %.0f packages/s; raw C_Sign %.0f/s before and %.0f/s after: ratio %.2f\n", bulkPackages, a, rate, before, after, rate/rawRate)
		g.must(t, "signwarden", append([]string{"verify", "rpm", "--key", "k-" + a}, files...)...)
		switch {
		case a == "rsa4096" && rate < 0.9*rawRate:
			t.Errorf("%s: %.2f of the raw rate, want 0.9", a, rate/rawRate)
		case a != "rsa4096" && rate < 1000:
			t.Errorf("%s: %.0f packages/s, want 1,000", a, rate)
		}
	}
	some := files[:500]
	took := timed(func() {
		mustEnv(t, real, "rpmsign", append([]string{"--define", "__gpg " + gpg, "--define", "_gpg_name real@example.org", "--resign"}, some...)...)
	})
	fmt.Printf("beside it, rpmsign with a real gpg-agent, RSA-4096: %.0f packages/s\n", float64(len(some))/took.Seconds())
}
