package softhsm_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// start runs a client's command in the background and returns what waits for it.
func (g *gateway) background(t testing.TB, stdin *os.File, args ...string) (*exec.Cmd, func() result) {
	t.Helper()
	cmd := exec.Command(filepath.Join(bin, "signwarden"), args...)
	cmd.Env, cmd.Stdin = g.env, stdin
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }()
	t.Cleanup(func() { _ = cmd.Process.Kill(); <-done })
	return cmd, func() result {
		t.Helper()
		waitFor(t, strings.Join(args, " ")+" ends", func() bool {
			select {
			case <-done:
				return true
			default:
				return false
			}
		})
		return result{cmd.ProcessState.ExitCode(), out.String(), ""}
	}
}

// A signal ends what has no other end, and leaves no part of a file.
func TestInterrupt(t *testing.T) {
	g := newGateway(t)
	g.key(t, "rel", "ed25519")
	dir := t.TempDir()
	empty := func() {
		t.Helper()
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
			t.Errorf("the directory holds %v, %v", entries, err)
		}
	}
	r, w, err := os.Pipe() // that nobody writes to
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	for name, tt := range map[string]struct {
		stdin *os.File
		file  string
	}{"a file without an end": {nil, "/dev/zero"}, "a pipe that nobody writes to": {r, "-"}} {
		cmd, wait := g.background(t, tt.stdin, "sign", "openpgp", "--key", "rel", "--output", dir+"/out.sig", tt.file)
		waitFor(t, "it reads", func() bool {
			entries, _ := os.ReadDir(dir)
			return len(entries) == 1 // its temporary file
		})
		_ = cmd.Process.Signal(unix.SIGINT)
		if got := wait(); got.code == 0 || !strings.Contains(got.stdout, "interrupted") {
			t.Errorf("%s: exit code %d: %s", name, got.code, got.stdout)
		}
		empty()
	}
	// exec does not begin a command that a signal came before.
	if err := g.cmd.Process.Signal(unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	cmd, wait := g.background(t, nil, "exec", "--", "touch", dir+"/ran")
	waitFor(t, "it is connected", func() bool {
		links, _ := filepath.Glob("/proc/" + strconv.Itoa(cmd.Process.Pid) + "/fd/*")
		for _, l := range links {
			if to, _ := os.Readlink(l); strings.HasPrefix(to, "socket:") {
				return true
			}
		}
		return false
	})
	_ = cmd.Process.Signal(unix.SIGTERM)
	got := wait()
	if err := g.cmd.Process.Signal(unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if got.code != 128+int(unix.SIGTERM) {
		t.Errorf("exec: exit code %d, want 143: %s", got.code, got.stdout)
	}
	empty()
}

// A gateway that is killed while it makes a key: nothing of it stays, and the
// name is free.
func TestKilledWhileCreatingKey(t *testing.T) {
	g := newGateway(t)
	objects := func() int {
		t.Helper()
		all, err := filepath.Glob(g.dir + "/token/tokens/*/*.object")
		if err != nil {
			t.Fatal(err)
		}
		return len(all)
	}
	before := objects()
	_, wait := g.background(t, nil, "key", "create", "rel", "--algorithm", "rsa4096", "--openpgp-uid", "rel <rel@example.org>")
	waitFor(t, "the first pair is made", func() bool { return objects() > before })
	g.stop(unix.SIGKILL)
	if got := wait(); got.code == 0 {
		t.Fatalf("the key was made before the kill: %s", got.stdout)
	}
	g.serve(t)
	// By label: SoftHSM, killed while it writes an object, can leave one without any.
	if list := g.pkcs11(t, "--list-objects"); strings.Contains(list, "rel") {
		t.Errorf("the token holds\n%s", list)
	}
	g.key(t, "rel", "rsa4096")
	if list := g.pkcs11(t, "--list-objects"); strings.Count(list, "label:      rel") != 4 {
		t.Errorf("the token holds\n%s\nwant two pairs", list)
	}
	found := false
	for _, e := range g.audit(t, 20) {
		found = found || e.Entry["action"] == "key.create" && e.Entry["outcome"] == "failed" && e.Entry["key"] == "rel"
	}
	if !found {
		t.Error("the audit log does not tell of the key that was cut off")
	}
	if r := g.try(t, "signwardend", "check", "--dir", g.dir); r.code != 0 {
		t.Errorf("check: %s", r.stdout)
	}
}

// A row that somebody takes out of the audit log is missed.
func TestAuditGap(t *testing.T) {
	g := newGateway(t)
	g.key(t, "rel", "ed25519")
	g.must(t, "signwarden", "bench", "sign", "--key", "rel", "--count", "20")
	if out := g.must(t, "signwardend", "check", "--dir", g.dir); !strings.Contains(out, "rows without a gap") {
		t.Errorf("check: %s", out)
	}
	mustEnv(t, os.Environ(), "sqlite3", g.dir+"/signwarden.db", "DELETE FROM audit WHERE row = 10")
	if r := g.try(t, "signwardend", "check", "--dir", g.dir); r.code == 0 || !strings.Contains(r.stdout, "lacks row 10") {
		t.Errorf("check: exit code %d\n%s", r.code, r.stdout)
	}
	if r := g.try(t, "signwarden", "audit", "tail", "--limit", "20"); r.code == 0 {
		t.Errorf("audit tail numbers the rows anew:\n%s", r.stdout)
	}
}

// A directory that somebody else can change is not used, and a certificate does
// not become the local users of a socket.
func TestOthersDirectoriesAndNames(t *testing.T) {
	g := initGateway(t, shortDir(t)+"/gw")
	dir := shortDir(t)
	for name, prepare := range map[string]func(string) error{
		"of another user":    func(d string) error { return os.Chown(d, nobody, nobody) },
		"writable by others": func(d string) error { return os.Chmod(d, 0o777) },
		"behind a link":      func(d string) error { return os.Rename(d, d+".real") },
	} {
		d := filepath.Join(dir, strings.ReplaceAll(name, " ", "-"))
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := prepare(d); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(d); err != nil {
			if err := os.Symlink(d+".real", d); err != nil {
				t.Fatal(err)
			}
		}
		if r := g.try(t, "signwardend", "init", "--dir", d, "--dev"); r.code == 0 {
			t.Errorf("a directory %s is used", name)
		}
		if entries, err := os.ReadDir(d); err != nil || len(entries) != 0 {
			t.Errorf("a directory %s now holds %v, %v", name, entries, err)
		}
	}
	yaml, err := os.ReadFile(g.dir + "/signwardend.yaml")
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, g.dir+"/signwardend.yaml", string(yaml)+"agents:\n  - {gpg_socket: S, principal: local-builds, uids: [0]}\n")
	if r := g.try(t, "signwardend", "client", "create", "local-builds", "--dir", g.dir); r.code == 0 || !strings.Contains(r.stderr, "local users") {
		t.Errorf("a certificate of the local users' name: exit code %d: %s", r.code, r.stderr)
	}
}
