//go:build systemd

package softhsm_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// userManager is a systemd --user of nobody's, in a mount namespace of its own: what
// systemd-logind starts for each user. It returns how a command is run there.
func userManager(t *testing.T, home string) (in func(args ...string) string) {
	t.Helper()
	cgroup := "signwarden-" + filepath.Base(home)
	as := fmt.Sprintf("--reuid=%[1]d --regid=%[1]d --clear-groups", nobody)
	runtime := fmt.Sprintf("/run/user/%d", nobody)
	t.Cleanup(func() {
		script := "mount -t cgroup2 cgroup2 /sys/fs/cgroup; find /sys/fs/cgroup/" + cgroup + " -depth -type d -exec rmdir {} +"
		if out, err := exec.Command("unshare", "-m", "sh", "-ec", script).CombinedOutput(); err != nil {
			t.Errorf("removing the control group: %v: %s", err, out)
		}
	})
	ns := namespace(t, fmt.Sprintf(`
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir /sys/fs/cgroup/%[1]s
chown %[2]d /sys/fs/cgroup/%[1]s /sys/fs/cgroup/%[1]s/cgroup.procs
echo $$ >/sys/fs/cgroup/%[1]s/cgroup.procs
mount -t tmpfs tmpfs /run
mkdir -p %[3]s /run/systemd/system
chown %[2]d %[3]s
chmod 700 %[3]s`, cgroup, nobody, runtime))
	enter := func(more ...string) []string {
		return slices.Concat(ns, []string{"setpriv"}, strings.Fields(as), []string{"env", "-i", "HOME=" + home, "XDG_RUNTIME_DIR=" + runtime, "LC_ALL=C", "PATH=" + bin + ":/usr/bin:/bin"}, more)
	}
	// In the cgroup that the namespace's first process is in.
	join := slices.Concat(ns, []string{"sh", "-ec", `echo $$ >/sys/fs/cgroup/` + cgroup + `/cgroup.procs; exec "$@"`, "sh"}, enter("/lib/systemd/systemd", "--user")[len(ns):])
	background(t, os.Environ(), "nsenter", join...)
	in = func(args ...string) string {
		t.Helper()
		r := runEnv(t, os.Environ(), "nsenter", enter(args...)...)
		if r.code != 0 {
			t.Fatalf("%q: exit code %d\n%s%s", args, r.code, r.stdout, r.stderr)
		}
		return r.stdout + r.stderr
	}
	waitFor(t, "systemd --user", func() bool {
		return runEnv(t, os.Environ(), "nsenter", enter("systemctl", "--user", "is-active", "basic.target")...).code == 0
	})
	return in
}

// Under a systemd that runs, agent setup stops gpg-agent and keeps it from coming back; our
// sockets take its place, and the first gpg starts the agent; --remove puts gpg-agent back.
func TestAgentSetupSystemd(t *testing.T) {
	g := newGateway(t)
	g.key(t, "rel", "ed25519")
	home := shortDir(t)
	// The profile is where it is looked for, and the units are where a user puts his own.
	conf, units := filepath.Join(home, ".config/signwarden"), filepath.Join(home, ".config/systemd/user")
	override := filepath.Join(units, "signwarden-agent.service.d/path.conf")
	for _, dir := range []string{conf, filepath.Dir(override)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	mustEnv(t, os.Environ(), "sh", "-ec", "cp ../packaging/systemd/user/* "+units+"; cp "+filepath.Dir(g.profile("admin"))+"/* "+conf)
	writeFile(t, override, "[Service]\nExecStart=\nExecStart="+filepath.Join(bin, "signwarden")+" agent --systemd\n")
	mustEnv(t, os.Environ(), "chown", "-R", fmt.Sprint(nobody), home)
	mustEnv(t, os.Environ(), "chmod", "-R", "a+rX", bin)

	in := userManager(t, home)
	state := func(unit string) string {
		t.Helper()
		return strings.TrimSpace(in("sh", "-c", "systemctl --user is-active "+unit+"; systemctl --user is-enabled "+unit+" 2>&1; true"))
	}
	in("systemctl", "--user", "start", "gpg-agent.socket", "gpg-agent-extra.socket")
	agent := func() string {
		t.Helper()
		return in("gpg-connect-agent", "--no-autostart", "GETINFO version", "/bye")
	}
	real := agent()
	for _, unit := range []string{"gpg-agent.socket", "gpg-agent.service"} {
		if s := state(unit); !strings.HasPrefix(s, "active\n") {
			t.Fatalf("before: %s is %s", unit, s)
		}
	}

	said := in("signwarden", "agent", "setup")
	for _, unit := range []string{"gpg-agent.socket", "gpg-agent-extra.socket", "gpg-agent.service"} {
		if s := state(unit); s != "inactive\nmasked" {
			t.Errorf("after setup %s is %q", unit, s)
		}
		// The service ends with its socket.
		if !strings.Contains(said, "masked "+unit) || strings.HasSuffix(unit, ".socket") && !strings.Contains(said, "stopped "+unit) {
			t.Errorf("it does not say what it did to %s:\n%s", unit, said)
		}
	}
	in("systemctl", "--user", "enable", "--now", "signwarden-agent.socket")
	in("sh", "-ec", "cd; echo text >file; gpg --batch -u rel@example.org --detach-sign file; gpg --batch --verify file.sig file")
	if s := state("signwarden-agent.service"); !strings.HasPrefix(s, "active") {
		t.Errorf("gpg has signed, and signwarden-agent.service is %s", s)
	}
	if ours := agent(); ours == real {
		t.Errorf("the agent is %s", ours)
	}

	in("systemctl", "--user", "disable", "--now", "signwarden-agent.socket")
	in("systemctl", "--user", "stop", "signwarden-agent.service")
	said = in("signwarden", "agent", "setup", "--remove")
	if !strings.Contains(said, "unmasked gpg-agent.socket") || !strings.Contains(said, "started gpg-agent.socket") {
		t.Errorf("--remove says:\n%s", said)
	}
	if s := state("gpg-agent.socket"); !strings.HasPrefix(s, "active\n") || strings.Contains(s, "masked") {
		t.Errorf("after --remove gpg-agent.socket is %s", s)
	}
	if after := agent(); after != real {
		t.Errorf("after --remove the agent is %s, was %s", after, real)
	}
}
