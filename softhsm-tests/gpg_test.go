package softhsm_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// Stock gpg signs the checksum file of an ISO image with every type of key, and
// gpg and sq verify it.
func TestGPGSignsISO(t *testing.T) {
	g := newGateway(t)
	algorithms := []string{"rsa2048", "rsa4096", "p256", "p384", "ed25519"}
	for _, a := range algorithms {
		g.key(t, a, a)
	}
	g.key(t, "single", "ed25519", "--layout", "single")
	names := append(algorithms, "single")
	dir := t.TempDir()
	iso := makeISO(t, dir)
	sums := filepath.Join(dir, "SHA256SUMS")
	writeFile(t, sums, mustEnv(t, os.Environ(), "sha256sum", iso))
	verify := g.verifier(t, names...)
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			sig := filepath.Join(dir, name+".sig")
			g.must(t, "signwarden", "exec", "--", "gpg", "--batch", "-u", name+"@example.org", "--output", sig, "--detach-sign", sums)
			mustEnv(t, verify, "gpg", "--batch", "--verify", sig, sums)
			cert := filepath.Join(dir, name+".cert")
			writeFile(t, cert, g.must(t, "signwarden", "key", "export", name))
			sqVerify(t, cert, sig, sums)

			clear := filepath.Join(dir, name+".asc")
			g.must(t, "signwarden", "exec", "--", "gpg", "--batch", "-u", name+"@example.org", "--output", clear, "--clearsign", sums)
			mustEnv(t, verify, "gpg", "--batch", "--verify", clear)

			// Our own signatures, by the same verifiers.
			for _, f := range [][]string{{"--armor"}, {"--clearsign"}, {}} {
				out := filepath.Join(dir, name+".own")
				g.must(t, "signwarden", append([]string{"sign", "openpgp", "--key", name, "--force", "--output", out, sums}, f...)...)
				args := []string{"--batch", "--verify", out, sums}
				if len(f) > 0 && f[0] == "--clearsign" {
					args = args[:3]
				}
				mustEnv(t, verify, "gpg", args...)
				if args[1] == "--verify" && len(args) == 3 {
					g.must(t, "signwarden", "verify", "openpgp", "--key", name, out)
				} else {
					g.must(t, "signwarden", "verify", "openpgp", "--key", name, "--signature", out, sums)
				}
			}
		})
	}
	writeFile(t, sums, "tampered")
	if r := runEnv(t, verify, "gpg", "--batch", "--verify", filepath.Join(dir, "p256.sig"), sums); r.code == 0 {
		t.Error("gpg accepts a signature over another file: this test could not fail")
	}
}

// sqVerify verifies with sq, whose options have other names since 0.30.
func sqVerify(t testing.TB, cert, sig, file string) {
	t.Helper()
	args := []string{"verify", "--signer-file", cert, "--signature-file", sig, file}
	if strings.Contains(mustEnv(t, os.Environ(), "sq", "verify", "--help"), "--signer-cert") {
		args = []string{"verify", "--signer-cert", cert, "--detached", sig, file}
	}
	mustEnv(t, os.Environ(), "sq", args...)
}

func makeISO(t testing.TB, dir string) string {
	t.Helper()
	tree := filepath.Join(dir, "tree")
	if err := os.Mkdir(tree, 0o755); err != nil {
		t.Fatal(err)
	}
	mustEnv(t, os.Environ(), "cp", "/bin/sh", "/etc/os-release", tree)
	iso := filepath.Join(dir, "disc.iso")
	mustEnv(t, os.Environ(), "xorriso", "-as", "mkisofs", "-quiet", "-o", iso, tree)
	return iso
}

// 40 gpg processes at once: 40 good signatures. A real gpg-agent with a
// passphrase-protected RSA-4096 key fails some of them.
func TestGPGParallel(t *testing.T) {
	g := newGateway(t)
	g.key(t, "rel", "rsa4096")
	home, stop := g.agent(t, "rel")
	defer stop()
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	writeFile(t, file, "to be signed")
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() {
			cmd := exec.Command("gpg", "--batch", "-u", "rel@example.org", "--output", filepath.Join(dir, fmt.Sprint(i)), "--detach-sign", file)
			cmd.Env = home
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("gpg %d: %v: %s", i, err, out)
			}
		})
	}
	wg.Wait()
	verify := g.verifier(t, "rel")
	for i := range 40 {
		if r := runEnv(t, verify, "gpg", "--batch", "--verify", filepath.Join(dir, fmt.Sprint(i)), file); r.code != 0 {
			t.Errorf("signature %d: %s", i, r.stderr)
		}
	}
	signed := 0
	for _, e := range g.audit(t, 100) {
		if e.Entry["outcome"] == "signed" && e.Entry["key"] == "rel" {
			signed++
		}
	}
	if signed != 40 {
		t.Errorf("the audit log holds %d signatures, want 40", signed)
	}
}

// agent serves a gpg-agent socket for a GNUPGHOME with the certificates of keys,
// and returns gpg's environment.
func (g *gateway) agent(t testing.TB, names ...string) (env []string, stop func()) {
	t.Helper()
	env = g.verifier(t, names...)
	home := strings.TrimPrefix(env[len(env)-1], "GNUPGHOME=")
	cmd := exec.Command(filepath.Join(bin, "signwarden"), "agent", "--gpg-socket", "auto")
	cmd.Env = append(append([]string(nil), g.env...), "GNUPGHOME="+home)
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// It says so when it listens.
	line := make([]byte, 256)
	n, err := stderr.Read(line)
	if err != nil || !strings.Contains(string(line[:n]), "gpg-agent socket") {
		t.Fatalf("signwarden agent: %q, %v", line[:n], err)
	}
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		_, _ = os.Stderr.ReadFrom(stderr)
	}()
	return env, func() {
		_ = cmd.Process.Signal(os.Interrupt)
		<-drained
		if err := cmd.Wait(); err != nil {
			t.Errorf("signwarden agent ended with %v", err)
		}
		if _, err := os.Stat(strings.TrimSpace(mustEnv(t, env, "gpgconf", "--list-dirs", "agent-socket"))); err == nil {
			t.Error("the socket stays")
		}
	}
}

func TestGitTag(t *testing.T) {
	g := newGateway(t)
	g.key(t, "rel", "ed25519")
	repo := t.TempDir()
	git := func(env []string, args ...string) {
		t.Helper()
		mustEnv(t, env, "git", append([]string{"-C", repo, "-c", "user.name=R", "-c", "user.email=rel@example.org"}, args...)...)
	}
	git(g.env, "init", "-q")
	git(g.env, "commit", "-q", "--allow-empty", "-m", "first")
	for _, args := range [][]string{
		{"commit", "-q", "--allow-empty", "-S", "-m", "signed"},
		{"tag", "-s", "-m", "one", "v1"},
	} {
		full := append([]string{"exec", "--", "git", "-C", repo, "-c", "user.name=rel", "-c", "user.email=rel@example.org"}, args...)
		g.must(t, "signwarden", full...)
	}
	verify := g.verifier(t, "rel")
	git(verify, "tag", "-v", "v1")
	git(verify, "verify-commit", "HEAD")
}

// What exec brings up it takes down, and the exit code and signals are the command's.
func TestExec(t *testing.T) {
	g := newGateway(t)
	g.key(t, "rel", "ed25519")
	home := strings.TrimSpace(g.must(t, "signwarden", "exec", "--", "sh", "-c", "echo $GNUPGHOME; gpgconf --list-dirs agent-socket"))
	lines := strings.Split(home, "\n")
	if len(lines) != 2 || lines[0] == "" {
		t.Fatalf("got %q", home)
	}
	for _, path := range lines {
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%s stays", path)
		}
	}
	for _, tt := range []struct {
		name string
		args []string
		want int
	}{
		{"exit code", []string{"sh", "-c", "exit 42"}, 42},
		{"signal", []string{"sh", "-c", "kill -9 $$"}, 137},
		{"not found", []string{"no-such-command-anywhere"}, 127},
		{"not executable", []string{"/etc/passwd"}, 126},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if r := g.try(t, "signwarden", append([]string{"exec", "--"}, tt.args...)...); r.code != tt.want {
				t.Errorf("exit code %d, want %d: %s", r.code, tt.want, r.stderr)
			}
		})
	}
	t.Run("long TMPDIR", func(t *testing.T) {
		long := *g
		long.env = append(append([]string(nil), g.env...), "TMPDIR="+filepath.Join(t.TempDir(), strings.Repeat("x", 100)))
		file := filepath.Join(t.TempDir(), "file")
		writeFile(t, file, "text")
		long.must(t, "signwarden", "exec", "--", "gpg", "--batch", "-u", "rel@example.org", "--detach-sign", file)
	})
	t.Run("a signal is passed on", func(t *testing.T) {
		dir := t.TempDir()
		cmd := exec.Command(filepath.Join(bin, "signwarden"), "exec", "--", "sh", "-c",
			`trap 'echo got > "$0/got"; exit 7' TERM; touch "$0/up"; while :; do sleep 0.05; done`, dir)
		cmd.Env = g.env
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "the command is up", func() bool { _, err := os.Stat(dir + "/up"); return err == nil })
		_ = cmd.Process.Signal(unix.SIGTERM)
		_ = cmd.Wait()
		if code := cmd.ProcessState.ExitCode(); code != 7 {
			t.Errorf("exit code %d, want 7", code)
		}
		if _, err := os.Stat(dir + "/got"); err != nil {
			t.Error(err)
		}
	})
}
