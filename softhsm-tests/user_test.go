package softhsm_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// nobody is a user without privileges.
const nobody = 65534

// A user without privileges makes a gateway, serves it, signs with its own
// profile, and meets files that may not be read or written.
func TestOrdinaryUser(t *testing.T) {
	home := shortDir(t)
	if err := os.Chown(home, nobody, nobody); err != nil {
		t.Fatalf("this test wants root: %v", err)
	}
	as := func(dir string, args ...string) (string, int) {
		t.Helper()
		name := args[0]
		if strings.HasPrefix(name, "signwarden") {
			name = filepath.Join(bin, name)
		}
		cmd := exec.Command(name, args[1:]...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "HOME="+home, "PATH="+bin+":"+os.Getenv("PATH"), "SIGNWARDEN_PROFILE="+home+"/gw/clients/admin/client.yaml")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		out, _ := cmd.CombinedOutput()
		return string(out), cmd.ProcessState.ExitCode()
	}
	must := func(args ...string) {
		t.Helper()
		if out, code := as(home, args...); code != 0 {
			t.Fatalf("%q: exit code %d\n%s", args, code, out)
		}
	}
	address := freeAddress(t)
	must("signwardend", "init", "--dir", "gw", "--dev", "--listen", address)
	if info, err := os.Stat(home + "/gw"); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the gateway's directory has mode %v (%v), want 0700", info.Mode(), err)
	}
	for _, secret := range []string{"token/user.pin", "token/so.pin", "tls/ca.key", "tls/server.key", "clients/admin/client.key", "signwarden.db", "signwardend.yaml"} {
		if info, err := os.Stat(home + "/gw/" + secret); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v (%v), want 0600", secret, info.Mode(), err)
		}
	}
	serve := exec.Command(filepath.Join(bin, "signwardend"), "serve", "--dir", home+"/gw")
	serve.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	if err := serve.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = serve.Process.Signal(unix.SIGTERM); _ = serve.Wait() }()
	must("signwarden", "ping", "--wait", "30s")
	must("signwarden", "key", "create", "rel", "--algorithm", "ed25519", "--openpgp-uid", "rel <rel@example.org>")
	must("sh", "-c", "echo text > file")
	must("signwarden", "exec", "--", "gpg", "--batch", "-u", "rel@example.org", "--detach-sign", "file")
	must("signwarden", "exec", "--", "gpg", "--batch", "--verify", "file.sig", "file")
	must("signwarden", "exec", "--", "sh", "-c", `test "$(stat -c %a "$GNUPGHOME")" = 700`)

	public := shortDir(t)
	if err := os.Chmod(public, 0o755); err != nil {
		t.Fatal(err)
	}
	secret := filepath.Join(public, "secret")
	if err := os.WriteFile(secret, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, code := as(home, "signwarden", "sign", "openpgp", "--key", "rel", "--output", "s.sig", secret); code != 1 || !strings.Contains(out, "cannot be read: permission denied") {
		t.Errorf("an unreadable file: exit code %d: %s", code, out)
	}
	readOnly := filepath.Join(public, "public")
	writeFile(t, readOnly, "text")
	if out, code := as(home, "signwarden", "sign", "openpgp", "--key", "rel", readOnly); code != 1 || !strings.Contains(out, "cannot be written") {
		t.Errorf("a directory that may not be written: exit code %d: %s", code, out)
	}
	for _, path := range []string{home + "/s.sig", readOnly + ".sig"} {
		if _, err := os.Stat(path); err == nil {
			t.Errorf("%s was made", path)
		}
	}
}

// A disk that is full where the signature is to go: an error, and no part of a file.
func TestOutputFull(t *testing.T) {
	g := newGateway(t)
	g.key(t, "rel", "ed25519")
	disk := shortDir(t)
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=16k"); err != nil {
		t.Fatalf("mounting a tmpfs (this test wants root): %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(disk, unix.MNT_DETACH) })
	if err := os.WriteFile(disk+"/filler", make([]byte, 16<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "file")
	writeFile(t, file, "text")
	r := g.try(t, "signwarden", "sign", "openpgp", "--key", "rel", "--output", disk+"/file.sig", file)
	if r.code != 1 || !strings.Contains(r.stderr, "no space left") {
		t.Errorf("exit code %d: %s", r.code, r.stderr)
	}
	entries, err := os.ReadDir(disk)
	if err != nil || len(entries) != 1 {
		t.Errorf("the directory holds %v (%v), want the filler alone", entries, err)
	}
}

// --force replaces files, and no device: root's /dev/null is everybody's.
func TestForceSparesDevices(t *testing.T) {
	g := newGateway(t)
	g.key(t, "rel", "ed25519")
	device := filepath.Join(t.TempDir(), "null")
	if err := unix.Mknod(device, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))); err != nil {
		t.Fatalf("making a device (this test wants root): %v", err)
	}
	file := filepath.Join(t.TempDir(), "file")
	writeFile(t, file, "text")
	g.must(t, "signwarden", "sign", "openpgp", "--key", "rel", "--force", "--output", device, file)
	if r := g.try(t, "signwarden", "sign", "rpm", "--key", "rel", "--force", "--output", device, buildRPMs(t, 1)[0]); r.code != 1 || !strings.Contains(r.stderr, "no regular file") {
		t.Errorf("a package: exit code %d: %s", r.code, r.stderr)
	}
	if info, err := os.Lstat(device); err != nil || info.Mode()&os.ModeCharDevice == 0 {
		t.Errorf("the device is now %v, %v", info, err)
	}
}
