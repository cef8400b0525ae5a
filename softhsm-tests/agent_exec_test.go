package softhsm_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// exec works where gpg keeps its sockets elsewhere, or nowhere: with /run/user and
// without, where it may not be written, without a HOME or most of /run as in a
// container, and for a user who is not root.
func TestExecPlaces(t *testing.T) {
	g := newGateway(t)
	g.key(t, "rel", "ed25519")
	work := shortDir(t)
	file := filepath.Join(work, "file")
	writeFile(t, file, "text")
	sign := []string{filepath.Join(bin, "signwarden"), "exec", "--", "sh", "-ec",
		`gpgconf --list-dirs agent-socket; gpg --batch --yes -u rel@example.org --output "$0" --detach-sign "$1"`, "", file}
	verify := g.verifier(t, "rel")
	bare := []string{"PATH=" + os.Getenv("PATH"), "SIGNWARDEN_PROFILE=" + g.profile("admin")}
	for i, tt := range []struct {
		name   string
		script string // of the namespace
		env    []string
		want   string // where the socket is
	}{
		{"with /run/user", "mkdir -p /run/user; mount -t tmpfs tmpfs /run/user; mkdir -m 700 /run/user/0", g.env, "/run/user/0/gnupg/d."},
		{"/run/user cannot be written", "mkdir -p /run/user; mount -t tmpfs tmpfs /run/user; mkdir -m 700 /run/user/0; mount -o remount,ro /run/user", g.env, "/tmp/signwarden-"},
		{"container", "mount -t tmpfs tmpfs /run", bare, "/tmp/signwarden-"},
		{"no HOME that exists", "mount -t tmpfs tmpfs /run", append(bare, "HOME=/nonexistent"), "/tmp/signwarden-"},
		{"TMPDIR relative", "mount -t tmpfs tmpfs /run", append(bare, "TMPDIR=tmp"), "/tmp/signwarden-"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out := filepath.Join(work, fmt.Sprintf("%d.sig", i))
			args := append([]string(nil), sign...)
			args[6] = out
			r := runEnv(t, tt.env, "nsenter", append(namespace(t, tt.script), args...)...)
			if r.code != 0 || !strings.HasPrefix(r.stdout, tt.want) {
				t.Fatalf("exit code %d, socket %q, want it in %s: %s", r.code, r.stdout, tt.want, r.stderr)
			}
			mustEnv(t, verify, "gpg", "--batch", "--verify", out, file)
		})
	}

	// Where no directory will do, it says why and what would.
	for name, tt := range map[string]struct{ tmpdir, want string }{
		"TMPDIR too long, /tmp read-only": {work + "/" + strings.Repeat("x", 80), "too many for the sockets in it, so /tmp was tried"},
		"TMPDIR missing":                  {"/nonexistent", "TMPDIR must name a directory that you may write to"},
	} {
		t.Run(name, func(t *testing.T) {
			ns := namespace(t, "mount --bind /tmp /tmp; mount -o remount,ro,bind /tmp")
			r := runEnv(t, append(append([]string(nil), g.env...), "TMPDIR="+tt.tmpdir), "nsenter", append(ns, sign...)...)
			if r.code != 1 || !strings.Contains(r.stderr, "making a GNUPGHOME") || !strings.Contains(r.stderr, tt.want) {
				t.Errorf("exit code %d, want 1 with %q: %s", r.code, tt.want, r.stderr)
			}
		})
	}

	// An ordinary user, with a TMPDIR of his own.
	user := shortDir(t)
	mustEnv(t, os.Environ(), "cp", "-r", filepath.Dir(g.profile("admin")), user+"/profile")
	mustEnv(t, os.Environ(), "mkdir", user+"/tmp")
	mustEnv(t, os.Environ(), "chown", "-R", fmt.Sprint(nobody), user)
	mustEnv(t, os.Environ(), "chmod", "755", work)
	env := []string{"PATH=" + os.Getenv("PATH"), "SIGNWARDEN_PROFILE=" + user + "/profile/client.yaml", "TMPDIR=" + user + "/tmp"}
	args := append([]string(nil), sign...)
	args[6] = user + "/sig"
	r := runEnv(t, env, "setpriv", append([]string{"--reuid=" + fmt.Sprint(nobody), "--regid=" + fmt.Sprint(nobody), "--clear-groups"}, args...)...)
	if r.code != 0 || !strings.HasPrefix(r.stdout, user+"/tmp/signwarden-") {
		t.Errorf("as an ordinary user: exit code %d, %q: %s", r.code, r.stdout, r.stderr)
	}
	if left, err := os.ReadDir(user + "/tmp"); err != nil || len(left) > 0 {
		t.Errorf("it leaves %v, %v", left, err)
	}
}

// Jobs on one host, at one time, of one user, do not meet: each has a home, a socket
// and an end of its own.
func TestExecParallel(t *testing.T) {
	const jobs = 8
	g := newGateway(t)
	g.key(t, "rel", "ed25519")
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	writeFile(t, file, "text")
	var wg sync.WaitGroup
	homes := make([]string, jobs)
	for i := range jobs {
		wg.Go(func() {
			out := filepath.Join(dir, fmt.Sprint(i))
			cmd := exec.Command(filepath.Join(bin, "signwarden"), "exec", "--", "sh", "-ec",
				`echo "$GNUPGHOME"; gpg --batch -u rel@example.org --output "$0" --detach-sign "$1"`, out, file)
			cmd.Env = g.env
			cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
			got, err := cmd.Output()
			if err != nil {
				t.Errorf("job %d: %v", i, err)
			}
			homes[i] = strings.TrimSpace(string(got))
		})
	}
	wg.Wait()
	verify := g.verifier(t, "rel")
	seen := map[string]bool{}
	for i, home := range homes {
		if home == "" || seen[home] {
			t.Errorf("job %d has the home %q", i, home)
		}
		seen[home] = true
		if _, err := os.Stat(home); err == nil {
			t.Errorf("the home of job %d stays", i)
		}
		mustEnv(t, verify, "gpg", "--batch", "--verify", filepath.Join(dir, fmt.Sprint(i)), file)
	}
}
