package rpm_test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// peer finds a tool of the other side. Its absence fails the test: these tests are worth nothing without it.
func peer(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("required peer: %v", err)
	}
	return path
}

// run runs a tool and returns all its output.
func run(t testing.TB, env []string, name string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), peer(t, name), args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "TZ=UTC")
	cmd.Env = append(cmd.Env, env...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// must runs a tool and fails the test if the tool fails.
func must(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := run(t, nil, name, args...)
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return out
}

// file writes data to a file of the test and returns its path.
func file(t testing.TB, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	err := os.WriteFile(path, data, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// rpmDB is a fresh database of rpm's with the subjects' certificates.
func rpmDB(t testing.TB, subjects ...subject) string {
	t.Helper()
	db := t.TempDir()
	for _, s := range subjects {
		var armored bytes.Buffer
		err := s.cert.Armor(&armored)
		if err != nil {
			t.Fatal(err)
		}
		must(t, "rpmkeys", "--dbpath", db, "--import", file(t, "cert.asc", armored.Bytes()))
	}
	return db
}

// rpmkeysOK has rpm verify a package, which must be signed.
func rpmkeysOK(t testing.TB, db string, b []byte) {
	t.Helper()
	out, err := run(t, nil, "rpmkeys", "--dbpath", db, "-K", file(t, "x.rpm", b))
	if err != nil || !strings.HasSuffix(strings.TrimSpace(out), "digests signatures OK") {
		verbose, _ := run(t, nil, "rpmkeys", "--dbpath", db, "-Kv", file(t, "x.rpm", b))
		t.Errorf("rpmkeys -K: %v\n%s%s", err, out, verbose)
	}
}

// rpmkeysUnsigned has rpm verify a package that must not be signed.
func rpmkeysUnsigned(t testing.TB, db string, b []byte) {
	t.Helper()
	out, err := run(t, nil, "rpmkeys", "--dbpath", db, "-K", file(t, "x.rpm", b))
	if err != nil || !strings.HasSuffix(strings.TrimSpace(out), ": digests OK") {
		t.Errorf("rpmkeys -K: %v\n%s", err, out)
	}
}

// moduleDir is where Go's module cache has a module that is none of our dependencies.
func moduleDir(t testing.TB, module string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), peer(t, "go"), "mod", "download", "-json", module)
	cmd.Dir = t.TempDir() // outside our module
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go mod download %s: %v\n%s", module, err, out)
	}
	var mod struct{ Dir string }
	err = json.Unmarshal(out, &mod)
	if err != nil {
		t.Fatal(err)
	}
	return mod.Dir
}
