package softhsm_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// engineDgst signs msg in dir with OpenSSL's engine and verifies it.
func engineDgst(t *testing.T, env []string, dir, key string) result {
	t.Helper()
	env = append(append([]string(nil), env...), "PKCS11_MODULE_PATH="+p11Module(t))
	return runEnv(t, env, "openssl", "dgst", "-sha256", "-engine", "pkcs11", "-keyform", "engine", "-sign", p11URI(key), "-out", dir+"/sig", dir+"/msg")
}

// With --p11-socket auto tools need no address: the socket is where p11-kit's client looks.
func TestP11AgentAuto(t *testing.T) {
	g := newGateway(t)
	g.must(t, "signwarden", "key", "create", "kmod", "--algorithm", "rsa2048")
	g.must(t, "signwarden", "key", "create", "boot", "--algorithm", "p256")
	g.must(t, "signwarden", "key", "cert", "kmod", "--self-signed", "--subject", "CN=kmod")
	dir := shortDir(t)
	writeFile(t, dir+"/msg", "to be signed\n")
	writeFile(t, dir+"/cert.pem", g.must(t, "signwarden", "key", "export", "kmod", "--format", "x509"))
	mustEnv(t, os.Environ(), "openssl", "x509", "-in", dir+"/cert.pem", "-noout", "-pubkey", "-out", dir+"/pub")
	env := append(append([]string(nil), g.env...), "XDG_RUNTIME_DIR="+dir)
	socket := dir + "/p11-kit/pkcs11"
	agent := background(t, env, "signwarden", "agent", "--p11-socket", "auto", "--p11-token", "signwarden=kmod")
	agent.await(t, "PKCS#11 socket "+socket)
	if info, err := os.Stat(socket); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if r := engineDgst(t, env, dir, "kmod"); r.code != 0 {
		t.Fatalf("openssl: exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	mustEnv(t, os.Environ(), "openssl", "dgst", "-sha256", "-verify", dir+"/pub", "-signature", dir+"/sig", dir+"/msg")
	if r := engineDgst(t, env, dir, "boot"); r.code == 0 {
		t.Error("a key of no token signs")
	}
	if r := runEnv(t, env, "signwarden", "agent", "--p11-socket", "auto"); r.code == 0 || !strings.Contains(r.stderr, "another agent is listening") {
		t.Errorf("a second agent: exit code %d: %s", r.code, r.stderr)
	}

	// The socket goes away under a program: it is told so, and a new one is served by the next agent.
	c := startSteps(t, env, "kmod")
	c.step(t, "init", "ok")
	c.step(t, "sign", "ok")
	c.step(t, "init", "ok")
	if code := agent.stop(unix.SIGTERM); code != 0 {
		t.Errorf("the agent ended with exit code %d", code)
	}
	c.step(t, "sign", "CKR_DEVICE_ERROR") // p11-kit's client on a connection that is gone
	if _, err := os.Stat(socket); !os.IsNotExist(err) {
		t.Errorf("the socket is left: %v", err)
	}
	background(t, env, "signwarden", "agent", "--p11-socket", "auto").await(t, "PKCS#11 socket "+socket)
	if r := engineDgst(t, env, dir, "kmod"); r.code != 0 {
		t.Errorf("after a restart: exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	for _, args := range [][]string{nil, {"--p11-token", "a=x", "--gpg-socket", dir + "/gpg"}, {"--p11-socket", dir + "/s", "--p11-token", "a"}} {
		if r := runEnv(t, env, "signwarden", append([]string{"agent"}, args...)...); r.code != 2 {
			t.Errorf("agent %q: exit code %d: %s", args, r.code, r.stderr)
		}
	}
}

// A socket of systemd's is served with the bounds of its name in agent.yaml, and the
// agent begins without its gateway.
func TestP11AgentSystemd(t *testing.T) {
	g := newGateway(t)
	for _, name := range []string{"kmod", "boot"} {
		g.must(t, "signwarden", "key", "create", name, "--algorithm", "rsa2048")
	}
	g.stop(unix.SIGTERM)
	dir := shortDir(t)
	writeFile(t, dir+"/msg", "to be signed\n")
	socket := dir + "/p11"
	writeFile(t, filepath.Join(filepath.Dir(g.profile("admin")), "agent.yaml"), "sockets:\n  - {p11_socket: \"fd:p11\", keys: [\"k*\"], signatures: 1}\n")
	background(t, g.env, "systemd-socket-activate", "-l", socket, "--fdname=p11",
		"-E", "PATH", "-E", "SIGNWARDEN_PROFILE", filepath.Join(bin, "signwarden"), "agent", "--systemd")
	waitFor(t, "the socket", func() bool { _, err := os.Stat(socket); return err == nil })
	env := append(append([]string(nil), g.env...), "P11_KIT_SERVER_ADDRESS=unix:path="+socket)
	if r := runEnv(t, env, "pkcs11-tool", "--module", p11Module(t), "--token-label", "signwarden", "-O"); r.code == 0 || !strings.Contains(r.stderr, "CKR_DEVICE_REMOVED") {
		t.Errorf("without a gateway: exit code %d: %s", r.code, r.stderr)
	}
	g.serve(t)
	waitFor(t, "the agent to see the gateway", func() bool {
		return runEnv(t, env, "pkcs11-tool", "--module", p11Module(t), "--token-label", "signwarden", "-O").code == 0
	})
	if r := engineDgst(t, env, dir, "boot"); r.code == 0 {
		t.Error("a key that the bounds do not name signs")
	}
	if r := engineDgst(t, env, dir, "kmod"); r.code != 0 {
		t.Errorf("exit code %d: %s", r.code, r.stderr)
	}
	if r := engineDgst(t, env, dir, "kmod"); r.code == 0 {
		t.Error("it signs more often than the bounds say")
	}
}

// The daemon serves a PKCS#11 socket to the users of its host that the configuration
// names, as the principal that it names, beside a gpg-agent socket, and to nobody else.
func TestP11LocalUsers(t *testing.T) {
	g := newGateway(t)
	for _, name := range []string{"kmod", "boot", "other"} {
		g.must(t, "signwarden", "key", "create", name, "--algorithm", "rsa2048")
	}
	g.policy(t, "  - {name: local, principals: [local-builds], keys: [kmod, boot], may: [sign], formats: [pkcs11], blind: true}\n")
	g.must(t, "signwarden", "key", "cert", "kmod", "--self-signed", "--subject", "CN=kmod")
	dir := shortDir(t)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	sockets := dir + "/run"
	user := dir + "/user"
	if err := os.Mkdir(user, 0o700); err != nil {
		t.Fatal(err)
	}
	writeFile(t, user+"/msg", "to be signed\n")
	writeFile(t, dir+"/cert.pem", g.must(t, "signwarden", "key", "export", "kmod", "--format", "x509"))
	mustEnv(t, os.Environ(), "openssl", "x509", "-in", dir+"/cert.pem", "-noout", "-pubkey", "-out", dir+"/pub")
	mustEnv(t, os.Environ(), "chown", "-R", fmt.Sprint(nobody), user)
	yaml, err := os.ReadFile(g.dir + "/signwardend.yaml")
	if err != nil {
		t.Fatal(err)
	}
	reload := func(agents, socket string, up bool) {
		t.Helper()
		writeFile(t, g.dir+"/signwardend.yaml", string(yaml)+agents)
		if err := g.cmd.Process.Signal(unix.SIGHUP); err != nil {
			t.Fatal(err)
		}
		waitFor(t, fmt.Sprintf("%s is there: %v", socket, up), func() bool { _, err := os.Stat(socket); return (err == nil) == up })
	}
	const entry = "agents:\n  - {gpg_socket: %[1]s/gpg, principal: local-builds, uids: [%[2]d]}\n  - {p11_socket: %[1]s/p11, principal: local-builds, uids: [%[2]d], p11_tokens: [{label: signwarden, keys: [kmod, other]}, {label: boot, keys: [b*]}]}\n"
	reload(fmt.Sprintf(entry, sockets, nobody), sockets+"/p11", true)
	if _, err := os.Stat(sockets + "/gpg"); err != nil {
		t.Error(err)
	}
	as := func(uid uint32, args ...string) (string, int) {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Env, cmd.Dir = append(os.Environ(), "HOME="+user, "P11_KIT_SERVER_ADDRESS=unix:path="+sockets+"/p11", "PKCS11_MODULE_PATH="+p11Module(t)), "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		out, _ := cmd.CombinedOutput()
		return string(out), cmd.ProcessState.ExitCode()
	}
	sign := func(uid uint32, token, key string) (string, int) {
		return as(uid, "openssl", "dgst", "-sha256", "-engine", "pkcs11", "-keyform", "engine", "-sign", "pkcs11:token="+token+";object="+key+";type=private", "-out", user+"/sig", user+"/msg")
	}
	if out, code := sign(nobody, "signwarden", "kmod"); code != 0 {
		t.Fatalf("openssl as nobody: exit code %d\n%s", code, out)
	}
	mustEnv(t, os.Environ(), "openssl", "dgst", "-sha256", "-verify", dir+"/pub", "-signature", user+"/sig", user+"/msg")
	e := g.audit(t, 1)[0].Entry
	if e["principal"] != "local-builds" || e["via"] != fmt.Sprintf("unix:%d", nobody) || e["front_end"] != "pkcs11" || e["format"] != "pkcs11" || e["outcome"] != "signed" {
		t.Errorf("audit entry %v", e)
	}
	if out, code := sign(nobody, "boot", "boot"); code != 0 {
		t.Errorf("with the key of the other token: exit code %d\n%s", code, out)
	}
	rows := len(g.audit(t, 1000))
	for _, bad := range [][2]string{{"signwarden", "other"}, {"signwarden", "boot"}, {"boot", "kmod"}} {
		if out, code := sign(nobody, bad[0], bad[1]); code == 0 {
			t.Errorf("%s signs in token %s:\n%s", bad[1], bad[0], out)
		}
	}
	if out, code := sign(12345, "signwarden", "kmod"); code == 0 {
		t.Errorf("uid 12345 signs:\n%s", out)
	}
	if now := len(g.audit(t, 1000)); now != rows {
		t.Errorf("%d requests reached the gateway", now-rows)
	}

	// What is wrong in the configuration leaves the sockets as they are.
	writeFile(t, g.dir+"/signwardend.yaml", string(yaml)+strings.Replace(fmt.Sprintf(entry, sockets, nobody), "label: boot", "label: signwarden-boot", 1))
	if r := g.try(t, "signwardend", "check", "--dir", g.dir); r.code == 0 || !strings.Contains(r.stdout+r.stderr, "p11_tokens") {
		t.Errorf("check: exit code %d: %s%s", r.code, r.stdout, r.stderr)
	}
	reload("", sockets+"/p11", false)
}
