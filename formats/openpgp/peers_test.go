package openpgp_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
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

// run runs a tool and returns its output, standard error after standard output.
func run(t testing.TB, stdin []byte, env []string, name string, args ...string) (string, string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), peer(t, name), args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "TZ=UTC")
	cmd.Env = append(cmd.Env, env...)
	cmd.Stdin = bytes.NewReader(stdin)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	return out.String(), errOut.String(), err
}

// A gpg is a fresh GnuPG home.
type gpg struct {
	t   testing.TB
	env []string
}

// newGPG makes the home under /tmp, because a path to its agent's socket may have 107 bytes.
func newGPG(t testing.TB) gpg {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "g")
	if err != nil {
		t.Fatal(err)
	}
	g := gpg{t, []string{"GNUPGHOME=" + dir}}
	t.Cleanup(func() {
		kill := exec.Command("gpgconf", "--kill", "all")
		kill.Env = append(os.Environ(), g.env...)
		kill.Run()
		os.RemoveAll(dir)
	})
	return g
}

func (g gpg) run(stdin []byte, args ...string) (string, string, error) {
	g.t.Helper()
	args = append([]string{"--batch", "--no-tty", "--quiet", "--trust-model", "always"}, args...)
	return run(g.t, stdin, g.env, "gpg", args...)
}

// must runs gpg and fails the test if gpg fails.
func (g gpg) must(stdin []byte, args ...string) (string, string) {
	g.t.Helper()
	out, errOut, err := g.run(stdin, args...)
	if err != nil {
		g.t.Fatalf("gpg %q: %v\n%s%s", args, err, out, errOut)
	}
	return out, errOut
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
