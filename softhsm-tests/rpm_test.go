package softhsm_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sassoftware/go-rpmutils"
)

// buildRPMs builds n small packages with rpmbuild.
func buildRPMs(t testing.TB, n int) []string {
	t.Helper()
	dir := t.TempDir()
	spec := filepath.Join(dir, "p.spec")
	var b strings.Builder
	b.WriteString(`Name: p
Version: 1.0
Release: 1
Summary: A package to be signed
License: Apache-2.0
BuildArch: noarch
%description
A package to be signed.
%prep
%build
%install
mkdir -p %{buildroot}/usr/share/p
`)
	for i := range n {
		fmt.Fprintf(&b, "cp /etc/os-release %%{buildroot}/usr/share/p/%d\n", i)
	}
	for i := range n {
		fmt.Fprintf(&b, "%%package -n p%d\nSummary: Number %d\n%%description -n p%d\nNumber %d.\n%%files -n p%d\n/usr/share/p/%d\n", i, i, i, i, i, i)
	}
	writeFile(t, spec, b.String())
	mustEnv(t, os.Environ(), "rpmbuild", "-bb", "--quiet", "--define", "_topdir "+dir, spec)
	files, err := filepath.Glob(filepath.Join(dir, "RPMS", "noarch", "*.rpm"))
	if err != nil || len(files) != n {
		t.Fatalf("rpmbuild made %d packages, want %d (%v)", len(files), n, err)
	}
	return files
}

// distributionRPMs copies the real packages that come with go-rpmutils.
func distributionRPMs(t testing.TB) []string {
	t.Helper()
	src := strings.TrimSpace(mustEnv(t, os.Environ(), "go", "list", "-m", "-f", "{{.Dir}}", "github.com/sassoftware/go-rpmutils"))
	all, err := filepath.Glob(filepath.Join(src, "testdata", "*.rpm"))
	if err != nil || len(all) < 5 {
		t.Fatalf("found %d packages in %s (%v): run go mod download", len(all), src, err)
	}
	dir := t.TempDir()
	var out []string
	for _, f := range all {
		// Signed over the payload by keys that nobody has; rpmsign --resign
		// takes what rpm 4.18 can read at all, and that is asked of rpm.
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		to := filepath.Join(dir, filepath.Base(f))
		if err := os.WriteFile(to, b, 0o644); err != nil {
			t.Fatal(err)
		}
		if r := runEnv(t, os.Environ(), "rpmkeys", "--dbpath", t.TempDir(), "--nosignature", "-K", to); r.code == 0 {
			out = append(out, to)
		} else {
			t.Logf("%s: rpm itself finds it broken: %s", filepath.Base(f), strings.TrimSpace(r.stdout))
		}
	}
	if len(out) < 5 {
		t.Fatalf("rpm takes %d of %d packages; the test wants 5", len(out), len(all))
	}
	return out
}

// Stock rpmsign signs built and real packages through exec, and rpmkeys with a
// fresh database that holds only the exported certificate says OK.
func TestRPMSign(t *testing.T) {
	g := newGateway(t)
	g.key(t, "rsa", "rsa4096")
	g.key(t, "ed", "ed25519")
	for _, name := range []string{"rsa", "ed"} {
		t.Run(name, func(t *testing.T) {
			files := append(buildRPMs(t, 3), distributionRPMs(t)...)
			db := g.rpmdb(t, name)
			for _, f := range files {
				if r := runEnv(t, os.Environ(), "rpmkeys", "--dbpath", db, "-K", f); r.code == 0 && strings.Contains(r.stdout, "signatures OK") {
					t.Fatalf("%s is signed before it was signed: %s", f, r.stdout)
				}
			}
			before := len(g.audit(t, 1000))
			g.must(t, "signwarden", append([]string{"exec", "--", "rpmsign", "--define", "_gpg_name " + name + "@example.org", "--resign"}, files...)...)
			for _, f := range files {
				r := runEnv(t, os.Environ(), "rpmkeys", "--dbpath", db, "-K", f)
				if r.code != 0 || !strings.Contains(r.stdout, "digests signatures OK") {
					t.Errorf("rpmkeys -K: %s%s", r.stdout, r.stderr)
				}
				if nevra, err := readNEVRA(f); err != nil || nevra.Name == "" {
					t.Errorf("go-rpmutils on %s: %v, %v", f, nevra, err)
				}
			}
			if got := len(g.audit(t, 1000)) - before; got < len(files) {
				t.Errorf("%d audit rows for %d packages", got, len(files))
			}
			// Another database knows no such key.
			if r := runEnv(t, os.Environ(), "rpmkeys", "--dbpath", t.TempDir(), "-K", files[0]); r.code == 0 {
				t.Errorf("rpmkeys without the certificate: %s: this test could not fail", r.stdout)
			}
		})
	}
}

// readNEVRA reads a package by another implementation than rpm's.
func readNEVRA(path string) (*rpmutils.NEVRA, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p, err := rpmutils.ReadRpm(f)
	if err != nil {
		return nil, err
	}
	return p.Header.GetNEVRA()
}

// rpmdb makes an rpm database that holds the certificate of one key.
func (g *gateway) rpmdb(t testing.TB, name string) string {
	t.Helper()
	db := t.TempDir()
	cert := filepath.Join(db, "cert.asc")
	writeFile(t, cert, g.must(t, "signwarden", "key", "export", name, "--format", "openpgp"))
	mustEnv(t, os.Environ(), "rpmkeys", "--dbpath", db, "--import", cert)
	return db
}

// The line of the README is all that a CI job needs: --addsign, nothing defined
// but the name, and a client that may do nothing else.
func TestRPMSignAsCIClient(t *testing.T) {
	g := newGateway(t)
	g.key(t, "rel", "rsa2048")
	g.key(t, "other", "rsa2048")
	g.must(t, "signwardend", "client", "create", "ci", "--dir", g.dir)
	g.policy(t, `  - {name: ci, principals: [ci], keys: [rel], may: [sign], formats: [openpgp], blind: true}
`)
	ci := g.as("ci")
	file := buildRPMs(t, 1)[0]
	ci.must(t, "signwarden", "exec", "--", "rpmsign", "--define", "_gpg_name rel@example.org", "--addsign", file)
	if out := mustEnv(t, os.Environ(), "rpmkeys", "--dbpath", g.rpmdb(t, "rel"), "-K", file); !strings.Contains(out, "digests signatures OK") {
		t.Errorf("rpmkeys -K: %s", out)
	}
	r := ci.try(t, "signwarden", "exec", "--", "rpmsign", "--define", "_gpg_name other@example.org", "--resign", file)
	if r.code == 0 || !strings.Contains(r.stderr, "No secret key") {
		t.Errorf("with a key that is not its own: exit code %d: %s", r.code, r.stderr)
	}
	last := g.audit(t, 1)[0].Entry
	if last["principal"] != "ci" || last["outcome"] != "signed" || last["rule"] != "ci" {
		t.Errorf("audit entry %v", last)
	}
}
