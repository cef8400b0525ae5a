package softhsm_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// manyFiles builds a package of n files, each with a content of its own, and one
// more that is the same as the first.
func manyFiles(t testing.TB, n int) string {
	t.Helper()
	dir := t.TempDir()
	spec := filepath.Join(dir, "many.spec")
	writeFile(t, spec, fmt.Sprintf(`Name: many
Version: 1
Release: 1
Summary: Many files
License: Apache-2.0
BuildArch: noarch
%%description
Many files.
%%prep
%%build
%%install
mkdir -p %%{buildroot}/usr/share/many
for i in $(seq 1 %d); do echo $i >%%{buildroot}/usr/share/many/$i; done
cp %%{buildroot}/usr/share/many/1 %%{buildroot}/usr/share/many/same
%%files
/usr/share/many
`, n))
	mustEnv(t, os.Environ(), "rpmbuild", "-bb", "--quiet", "--define", "_topdir "+dir, spec)
	return filepath.Join(dir, "RPMS", "noarch", "many-1-1.noarch.rpm")
}

// The files of a package are signed many at a time: one request for each content,
// each recorded, and rpm reads a signature for every file. Where one is refused no
// more are begun, and the package stays.
func TestSignIMA(t *testing.T) {
	const files = 700 // more than are asked for at a time
	g := newGateway(t)
	g.key(t, "rel", "ed25519")
	g.must(t, "signwarden", "key", "create", "ima", "--algorithm", "rsa2048")
	g.must(t, "signwardend", "client", "create", "ci", "--dir", g.dir)
	g.policy(t, `  - {name: ci, principals: [ci], keys: [rel], may: [sign], formats: [rpm], blind: true}
  - {name: ci-sees, principals: [ci], keys: [ima], may: [read]}
`)
	pkg := manyFiles(t, files)
	before, err := os.ReadFile(pkg)
	if err != nil {
		t.Fatal(err)
	}
	formats := func() map[string]int {
		t.Helper()
		n := map[string]int{}
		for _, e := range g.audit(t, 1000) {
			n[e.Entry["outcome"]+" "+e.Entry["format"]]++
		}
		return n
	}
	args := []string{"sign", "rpm", "--key", "rel", "--ima", "ima", pkg}
	if r := g.as("ci").try(t, "signwarden", args...); r.code != 4 || strings.Count(r.stderr, "\n") != 2 {
		t.Errorf("a key that may not sign: exit code %d, want 4 and one line with a hint:\n%s", r.code, r.stderr)
	}
	if now, err := os.ReadFile(pkg); err != nil || !bytes.Equal(now, before) {
		t.Errorf("the package was changed (%v)", err)
	}
	if n := formats()["denied ima"]; n == 0 || n > 512 {
		t.Errorf("%d denied requests for files, want at most 512", n)
	}

	g.must(t, "signwarden", args...)
	if now := formats(); now["signed rpm"] < 1 || now["signed ima"] != files {
		t.Errorf("recorded %v, want %d signatures of files", now, files)
	}
	list := mustEnv(t, os.Environ(), "rpm", "-qp", "--nosignature", "--qf", "[%{FILENAMES} %{FILESIGNATURES}\n]", pkg)
	signed, of := 0, map[string]string{}
	for line := range strings.Lines(list) {
		name, sig, _ := strings.Cut(strings.TrimSpace(line), " ")
		if strings.HasPrefix(sig, "030204") && len(sig) == 2*(9+256) {
			signed++
		}
		of[filepath.Base(name)] = sig
	}
	if signed != files+1 || of["1"] == "" || of["1"] != of["same"] || of["1"] == of["2"] {
		t.Errorf("rpm finds %d files signed, want %d", signed, files+1)
	}
	allOK(t, g.rpmdb(t, "rel"), []string{pkg})
}
