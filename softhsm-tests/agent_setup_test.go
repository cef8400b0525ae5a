package softhsm_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// namespace is a mount namespace of its own, prepared by a shell script; it goes
// with the test.
func namespace(t testing.TB, script string) (prefix []string) {
	t.Helper()
	p := background(t, os.Environ(), "unshare", "-m", "sh", "-ec", script+"; echo up; exec cat")
	p.await(t, "up")
	return []string{"-t", fmt.Sprint(p.cmd.Process.Pid), "-m", "--"}
}

// runUser is a namespace in which /run/user is as systemd-logind makes it for root.
func runUser(t testing.TB) []string {
	t.Helper()
	return namespace(t, "mkdir -p /run/user; mount -t tmpfs tmpfs /run/user; mkdir -m 700 /run/user/0")
}

// agent setup makes a home ready that has things of its own in it, says what it did,
// and takes back that and no more. /run/user and systemd's unit files are there.
func TestAgentSetup(t *testing.T) {
	g := newGateway(t)
	g.key(t, "rel", "ed25519")
	g.key(t, "known", "ed25519")
	for _, name := range []string{"sm", "issued"} {
		g.must(t, "signwarden", "key", "create", name, "--algorithm", "p256")
	}
	g.must(t, "signwarden", "key", "cert", "sm", "--self-signed", "--subject", "CN=sm,O=Example")
	issueCertificate(t, g, filepath.Join(t.TempDir(), "ca"), "issued")
	user := shortDir(t)
	home := filepath.Join(user, ".gnupg")
	ns := runUser(t)
	env := append(append([]string(nil), g.env...), "HOME="+user, "XDG_CONFIG_HOME="+user+"/.config", "LC_ALL=C")
	in := func(args ...string) string {
		t.Helper()
		r := runEnv(t, env, "nsenter", append(append([]string(nil), ns...), args...)...)
		if r.code != 0 {
			t.Fatalf("%q: exit code %d\n%s%s", args, r.code, r.stdout, r.stderr)
		}
		return r.stdout + r.stderr
	}

	// What is there before: options, a certificate that is known and trusted a bit, a unit
	// that somebody has masked.
	if err := os.Mkdir(home, 0o700); err != nil {
		t.Fatal(err)
	}
	writeFile(t, home+"/gpg.conf", "# mine\npersonal-digest-preferences SHA512") // no line feed at the end
	writeFile(t, home+"/gpgsm.conf", "no-autostart\n")
	writeFile(t, user+"/known.asc", g.must(t, "signwarden", "key", "export", "known"))
	in("gpg", "--batch", "--quiet", "--no-autostart", "--import", user+"/known.asc")
	fpr := fingerprint(t, append(env, "GNUPGHOME="+home), "known@example.org")
	in("sh", "-c", "echo "+fpr+":4: | gpg --batch --quiet --import-ownertrust")
	in("systemctl", "--user", "mask", "gpg-agent-browser.socket")
	state := func() string {
		t.Helper()
		return in("sh", "-c", `cd "$HOME"; find .gnupg .config -name '*.conf' -o -name '*.json' -o -type l | sort; cat .gnupg/*.conf
gpg --batch --no-autostart --with-colons --list-keys 2>/dev/null | grep ^fpr; gpgsm --batch --list-keys --with-colons | grep ^fpr
gpg --batch --export-ownertrust | grep -v '^#'`)
	}
	before := state()

	said := in(filepath.Join(bin, "signwarden"), "agent", "setup")
	for _, want := range []string{
		"gpg.conf: added no-autostart", "rel: certificate ", "known: certificate ", "sm: X.509 certificate ",
		"issued: X.509 certificate", "--trusted-root FILE", "masked gpg-agent.socket", "masked gpg-agent.service", "ready",
	} {
		if !strings.Contains(said, want) {
			t.Errorf("it does not say %q:\n%s", want, said)
		}
	}
	for _, no := range []string{"gpgsm.conf", "masked gpg-agent-browser.socket"} {
		if strings.Contains(said, no) {
			t.Errorf("it says %q:\n%s", no, said)
		}
	}
	if again := in(filepath.Join(bin, "signwarden"), "agent", "setup"); strings.Contains(again, "added") || strings.Contains(again, "masked") {
		t.Errorf("the second time it does things again:\n%s", again)
	}
	if link := in("sh", "-c", "readlink $HOME/.config/systemd/user/gpg-agent.socket"); strings.TrimSpace(link) != "/dev/null" {
		t.Errorf("gpg-agent.socket is linked to %s", link)
	}

	// It is ready: gpg and gpgsm sign, and gpg finds its key trusted.
	agent := background(t, env, "nsenter", append(ns, filepath.Join(bin, "signwarden"), "agent", "--gpg-socket", "auto", "--gpg-socket", "extra")...)
	agent.await(t, "gpg-agent socket /run/user/0/gnupg/S.gpg-agent\n")
	agent.await(t, "gpg-agent socket /run/user/0/gnupg/S.gpg-agent.extra\n")
	writeFile(t, user+"/file", "text")
	in("gpg", "--batch", "-u", "rel@example.org", "--detach-sign", user+"/file")
	if out := in("gpg", "--batch", "--status-fd", "1", "--verify", user+"/file.sig", user+"/file"); !strings.Contains(out, "TRUST_ULTIMATE") {
		t.Errorf("the certificate is not trusted:\n%s", out)
	}
	in("gpgsm", "--batch", "-u", "sm", "--output", user+"/file.p7s", "--detach-sign", user+"/file")
	in("gpg-connect-agent", "--no-autostart", "-S", "/run/user/0/gnupg/S.gpg-agent.extra", "KEYINFO --list", "/bye")
	agent.stop(unix.SIGTERM)

	in(filepath.Join(bin, "signwarden"), "agent", "setup", "--remove")
	if after := state(); after != before {
		t.Errorf("after --remove:\n%s\nand before setup:\n%s", after, before)
	}
	if said := in(filepath.Join(bin, "signwarden"), "agent", "setup", "--remove"); !strings.Contains(said, "nothing here") {
		t.Errorf("the second time: %s", said)
	}
}

// fingerprint is that of a certificate's primary key.
func fingerprint(t testing.TB, env []string, uid string) string {
	t.Helper()
	for line := range strings.Lines(mustEnv(t, env, "gpg", "--batch", "--with-colons", "--list-keys", uid)) {
		if f := strings.Split(line, ":"); f[0] == "fpr" {
			return f[9]
		}
	}
	t.Fatalf("no certificate of %s", uid)
	return ""
}

// A home with secret keys of its own is not taken over, unless that is wanted; and
// without a gateway nothing is begun.
func TestAgentSetupRefuses(t *testing.T) {
	g := newGateway(t)
	home := shortDir(t)
	env := append(append([]string(nil), g.env...), "GNUPGHOME="+home)
	mustEnv(t, env, "gpg", "--batch", "--quiet", "--passphrase", "", "--quick-generate-key", "own@example.org", "ed25519")
	mustEnv(t, env, "gpgconf", "--kill", "gpg-agent")
	if r := runEnv(t, env, "signwarden", "agent", "setup"); r.code != 1 || !strings.Contains(r.stderr, "has 1 secret keys of its own") || !strings.Contains(r.stderr, "--force") {
		t.Errorf("exit code %d: %s", r.code, r.stderr)
	}
	mustEnv(t, env, "signwarden", "agent", "setup", "--force")
	mustEnv(t, env, "signwarden", "agent", "setup", "--remove")
	if _, err := os.Stat(home + "/gpg.conf"); err == nil {
		t.Error("gpg.conf stays")
	}
	if out := mustEnv(t, env, "gpg", "--batch", "-K"); !strings.Contains(out, "own@example.org") {
		t.Errorf("the home's own key is gone:\n%s", out)
	}
	mustEnv(t, env, "gpgconf", "--kill", "gpg-agent")
	g.stop(unix.SIGTERM)
	empty := filepath.Join(home, "new")
	if r := runEnv(t, append(env, "GNUPGHOME="+empty), "signwarden", "agent", "setup"); r.code != 5 {
		t.Errorf("without a gateway: exit code %d: %s", r.code, r.stderr)
	}
	if _, err := os.Stat(empty); err == nil {
		t.Error("without a gateway a home was made")
	}
}

// The agent starts before the gateway, and finds it when it is there.
func TestAgentStartsFirst(t *testing.T) {
	g := newGateway(t)
	g.key(t, "rel", "ed25519")
	env, socket := g.home(t, "rel")
	g.stop(unix.SIGTERM)
	g.agentAt(t, socket)
	file := filepath.Join(t.TempDir(), "file")
	writeFile(t, file, "text")
	gpgTry(t, env, "-u", "rel@example.org", "--detach-sign", file).failure(t, 67109040, "Not operational")
	g.serve(t)
	waitFor(t, "gpg signs", func() bool { return gpgTry(t, env, "-u", "rel@example.org", "--detach-sign", file).code == 0 })
}

// systemd's sockets: the first client starts the agent, each socket has the bounds of
// its name in agent.yaml, and the sockets stay when the agent ends. The units parse.
func TestAgentSystemd(t *testing.T) {
	g := newGateway(t)
	g.key(t, "rel", "ed25519")
	g.key(t, "nightly", "ed25519")
	env, socket := g.home(t, "rel", "nightly")
	extra := filepath.Join(shortDir(t), "S.gpg-agent.extra")
	conf := filepath.Join(filepath.Dir(g.profile("admin")), "agent.yaml")
	writeFile(t, conf, "sockets:\n  - {gpg_socket: \"fd:gpg-extra\", keys: [\"nightly*\"], signatures: 1}\n")
	activate := background(t, g.env, "systemd-socket-activate", "-l", socket, "-l", extra, "--fdname=gpg:gpg-extra",
		"-E", "PATH", "-E", "SIGNWARDEN_PROFILE", filepath.Join(bin, "signwarden"), "agent", "--systemd")
	waitFor(t, "the sockets", func() bool { _, err := os.Stat(extra); return err == nil })
	file := filepath.Join(t.TempDir(), "file")
	writeFile(t, file, "text")
	for _, key := range []string{"rel", "nightly"} {
		if r := gpgTry(t, env, "-u", key+"@example.org", "--detach-sign", file); r.code != 0 {
			t.Errorf("with %s: exit code %d: %s", key, r.code, r.stderr)
		}
	}
	activate.await(t, "gpg-agent socket "+extra+", keys nightly*, 1 signatures")
	c := dialAgent(t, extra)
	grips := keygrips(t, c)
	if len(grips) != 1 {
		t.Fatalf("the extra socket shows %d keys, want 1", len(grips))
	}
	sign := []string{"SIGKEY " + grips[0], "SETHASH 8 " + strings.Repeat("00", 32), "PKSIGN"}
	if _, code := transact(t, c, sign...); code != 0 {
		t.Errorf("PKSIGN: error %d", code)
	}
	if _, code := transact(t, c, sign...); code != 67108897 {
		t.Errorf("PKSIGN beyond the bound: error %d, want 67108897", code)
	}
	if code := activate.stop(unix.SIGTERM); code != 0 {
		t.Errorf("it ends with exit code %d", code)
	}
	for _, path := range []string{socket, extra} {
		if _, err := os.Stat(path); err != nil {
			t.Errorf("systemd's socket is gone: %v", err)
		}
	}

	units := t.TempDir()
	all, err := filepath.Glob("../packaging/systemd/user/*")
	if err != nil || len(all) != 5 {
		t.Fatalf("units %v, %v", all, err)
	}
	for _, unit := range all {
		text, err := os.ReadFile(unit)
		if err != nil {
			t.Fatal(err)
		}
		// The program and its manual are not installed here.
		text = []byte(strings.ReplaceAll(string(text), "/usr/bin/signwarden", "/bin/true"))
		writeFile(t, filepath.Join(units, filepath.Base(unit)), strings.ReplaceAll(string(text), "Documentation=man:signwarden(1)\n", ""))
	}
	copies, _ := filepath.Glob(units + "/*")
	if r := runEnv(t, os.Environ(), "systemd-analyze", append([]string{"verify"}, copies...)...); r.code != 0 || r.stderr != "" {
		t.Errorf("systemd-analyze verify: exit code %d: %s%s", r.code, r.stdout, r.stderr)
	}
}

// What cannot be served is told, with what to do, and nothing is left behind.
func TestAgentUsage(t *testing.T) {
	g := newGateway(t)
	dir := shortDir(t)
	writeFile(t, dir+"/bad.yaml", "sockets:\n  - {gpg_socket: auto, keyz: [a]}\n")
	writeFile(t, dir+"/fd.yaml", "sockets:\n  - {gpg_socket: \"fd:gpg\"}\n")
	long := dir + "/" + strings.Repeat("x", 120)
	for _, tt := range []struct {
		name string
		args []string
		code int
		want string
	}{
		{"no socket", nil, 2, "which sockets"},
		{"long path", []string{"--gpg-socket", long}, 2, "at most 107"},
		{"glob", []string{"--gpg-socket", dir + "/s", "--keys", "a["}, 2, "no name or glob"},
		{"bounds without a socket", []string{"--keys", "a"}, 2, "are for --gpg-socket"},
		{"unknown field", []string{"--config", dir + "/bad.yaml"}, 1, `unknown field "keyz"`},
		{"no such file", []string{"--config", dir + "/none.yaml"}, 1, "no such file"},
		{"descriptor without systemd", []string{"--config", dir + "/fd.yaml"}, 2, `no descriptor named "gpg"`},
		{"systemd without descriptors", []string{"--systemd"}, 2, "LISTEN_PID"},
		{"root that is none", []string{"--gpg-socket", dir + "/s", "--trusted-root", dir + "/bad.yaml"}, 1, "no PEM certificate"},
		{"second of two", []string{"--gpg-socket", dir + "/s", "--gpg-socket", dir + "/bad.yaml"}, 1, "not a socket"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := g.try(t, "signwarden", append([]string{"agent"}, tt.args...)...)
			if r.code != tt.code || !strings.Contains(r.stderr, tt.want) {
				t.Errorf("exit code %d, want %d with %q: %s", r.code, tt.code, tt.want, r.stderr)
			}
			if _, err := os.Lstat(dir + "/s"); err == nil {
				t.Error("a socket is left behind")
			}
		})
	}
}
