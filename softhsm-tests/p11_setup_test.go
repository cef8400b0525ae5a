package softhsm_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// user is somebody without privileges, who has a home, a runtime directory and a profile.
type user struct {
	home string
	env  []string
}

func newUser(t *testing.T, g *gateway) *user {
	t.Helper()
	u := &user{home: shortDir(t)}
	mustEnv(t, os.Environ(), "cp", "-r", filepath.Dir(g.profile("admin")), filepath.Join(u.home, "profile"))
	if err := os.Mkdir(filepath.Join(u.home, "run"), 0o700); err != nil {
		t.Fatal(err)
	}
	mustEnv(t, os.Environ(), "chown", "-R", "65534:65534", u.home)
	u.env = append(append([]string(nil), g.env...), "HOME="+u.home, "XDG_CONFIG_HOME=", "XDG_RUNTIME_DIR="+u.home+"/run", "SIGNWARDEN_PROFILE="+u.home+"/profile/client.yaml")
	return u
}

// try runs a program as the user, in the home; env comes last.
func (u *user) try(t *testing.T, env []string, name string, args ...string) result {
	t.Helper()
	if name == "signwarden" {
		name = filepath.Join(bin, name)
	}
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir, cmd.Env = u.home, append(append([]string(nil), u.env...), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	_ = cmd.Run()
	return result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

func (u *user) must(t *testing.T, env []string, name string, args ...string) string {
	t.Helper()
	r := u.try(t, env, name, args...)
	if r.code != 0 {
		t.Fatalf("%s %q: exit code %d\n%s%s", name, args, r.code, r.stdout, r.stderr)
	}
	return r.stdout + r.stderr
}

// tree lists all files and directories of the home, with what is in them.
func (u *user) tree(t *testing.T) string {
	t.Helper()
	return mustEnv(t, os.Environ(), "sh", "-c", "cd "+u.home+"; find . | sort; find . -type f | sort | xargs sha256sum")
}

// agent setup --p11 has p11-kit's programs and OpenSSL find the keys, takes back what it made
// and nothing else, and leaves files of others alone.
func TestP11Setup(t *testing.T) {
	s := newP11Site(t)
	u := newUser(t, s.gateway)
	before := u.tree(t)

	said := u.must(t, nil, "signwarden", "agent", "setup", "--p11")
	for _, want := range []string{".config/pkcs11/modules/signwarden.module: made", "openssl-engine.cnf: made", "p11tool --list-all", "object=kmod;type=private", "key show ec --howto", "export OPENSSL_CONF="} {
		if !strings.Contains(said, want) {
			t.Errorf("it does not say %q:\n%s", want, said)
		}
	}
	if strings.Contains(said, "key ed:") {
		t.Errorf("it tells of an Ed25519 key:\n%s", said)
	}
	if again := u.must(t, nil, "signwarden", "agent", "setup", "--p11"); strings.Contains(again, "made") {
		t.Errorf("the second time it makes things again:\n%s", again)
	}

	// No variable, no daemon.
	if list := u.must(t, nil, "p11tool", "--list-all", "pkcs11:token=signwarden"); strings.Count(list, "Type: Private key") != 2 {
		t.Errorf("p11tool lists\n%s", list)
	}
	conf := u.home + "/.config/signwarden/openssl-engine.cnf"
	agent := exec.CommandContext(t.Context(), filepath.Join(bin, "signwarden"), "agent", "--p11-socket", "auto")
	agent.Env, agent.SysProcAttr = u.env, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the socket", func() bool { _, err := os.Stat(u.home + "/run/p11-kit/pkcs11"); return err == nil })
	s.host(t, "cp", s.at("kmod.pem"), s.at("msg"), u.home)
	u.must(t, []string{"OPENSSL_CONF=" + conf}, "openssl", "cms", "-sign", "-binary", "-in", "msg", "-signer", "kmod.pem", "-inkey", p11URI("kmod"),
		"-engine", "pkcs11", "-keyform", "engine", "-outform", "der", "-out", "p7")
	s.host(t, "openssl", "cms", "-verify", "-binary", "-inform", "der", "-in", u.home+"/p7", "-content", s.at("msg"), "-CAfile", s.at("kmod.pem"), "-purpose", "any", "-out", s.at("verified"))
	_ = agent.Process.Signal(unix.SIGTERM)
	_ = agent.Wait()
	// With our own configuration in use it is not included in itself.
	u.must(t, []string{"OPENSSL_CONF=" + conf}, "signwarden", "agent", "setup", "--p11")
	for _, name := range []string{"kmod.pem", "msg", "p7", "run/p11-kit"} {
		if err := os.RemoveAll(filepath.Join(u.home, name)); err != nil {
			t.Fatal(err)
		}
	}
	u.must(t, nil, "signwarden", "agent", "setup", "--p11", "--remove")
	if after := u.tree(t); after != before {
		t.Errorf("after --remove:\n%s\nand before setup:\n%s", after, before)
	}
	if said := u.must(t, nil, "signwarden", "agent", "setup", "--p11", "--remove"); !strings.Contains(said, "nothing here") {
		t.Errorf("the second time: %s", said)
	}

	// What somebody else has put there, or changed, stays.
	u.must(t, nil, "mkdir", "-p", ".config/pkcs11/modules")
	module := u.home + "/.config/pkcs11/modules/signwarden.module"
	u.must(t, nil, "sh", "-c", "echo '# mine' >"+module)
	foreign := u.tree(t)
	if r := u.try(t, nil, "signwarden", "agent", "setup", "--p11"); r.code != 1 || !strings.Contains(r.stderr, "stays as it is") || !strings.Contains(r.stderr, "hint: ") {
		t.Errorf("with a file of somebody else: exit code %d: %s", r.code, r.stderr)
	}
	if now := u.tree(t); now != foreign {
		t.Errorf("a file of somebody else: it was\n%s\nand is\n%s", foreign, now)
	}
	u.must(t, nil, "rm", module)
	u.must(t, nil, "signwarden", "agent", "setup", "--p11")
	u.must(t, nil, "sh", "-c", "echo '# more' >>"+module)
	if said := u.must(t, nil, "signwarden", "agent", "setup", "--p11", "--remove"); !strings.Contains(said, "it has been changed, and stays") {
		t.Errorf("--remove with a changed file: %s", said)
	}
	if !slices.Contains(strings.Split(string(readFile(t, module)), "\n"), "# more") {
		t.Error("--remove has removed a changed file")
	}

	// Without a gateway nothing is begun.
	s.stop(unix.SIGTERM)
	was := u.tree(t)
	if r := u.try(t, nil, "signwarden", "agent", "setup", "--p11"); r.code != 5 || u.tree(t) != was {
		t.Errorf("without a gateway: exit code %d: %s", r.code, r.stderr)
	}
}
