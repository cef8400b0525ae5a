package softhsm_test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// sshKeys are a key of each kind that SSH knows.
var sshKeys = []string{"rsa2048", "p256", "p384", "ed25519"}

// sshBench is a gateway with those keys, an agent at socket, and what ssh-keygen needs.
type sshBench struct {
	g           *gateway
	dir, socket string
	env         []string
	agent       *process
}

// newSSHBench lets alice sign with all keys, for git and files.
func newSSHBench(t testing.TB, rules string) *sshBench {
	t.Helper()
	b := &sshBench{g: newGateway(t), dir: shortDir(t)}
	for _, name := range sshKeys {
		b.g.must(t, "signwarden", "key", "create", name, "--algorithm", name)
	}
	b.g.must(t, "signwardend", "client", "create", "alice", "--dir", b.g.dir)
	b.g.policy(t, "  - {name: ssh, principals: [alice], keys: [\"*\"], may: [sign, read], formats: [ssh-sig], namespaces: [git, file]}\n"+rules)
	var allowed strings.Builder
	for _, name := range sshKeys {
		writeFile(t, b.pub(name), b.g.must(t, "signwarden", "key", "export", name, "--format", "ssh"))
		allowed.WriteString(b.g.must(t, "signwarden", "key", "export", name, "--format", "ssh", "--signer", name+"@example.org", "--namespaces", "git,file"))
	}
	writeFile(t, b.dir+"/allowed", allowed.String())
	writeFile(t, b.dir+"/file", "to be signed\n")
	b.socket = b.dir + "/agent/ssh"
	b.agent = background(t, b.g.as("alice").env, "signwarden", "agent", "--ssh-socket", b.socket)
	b.agent.await(t, "ssh-agent socket "+b.socket)
	b.env = append(os.Environ(), "SSH_AUTH_SOCK="+b.socket, "HOME="+b.dir)
	return b
}

func (b *sshBench) pub(name string) string { return b.dir + "/" + name + ".pub" }

// sign signs a file with ssh-keygen and returns how that ended.
func (b *sshBench) sign(t testing.TB, env []string, key, namespace, file string) result {
	t.Helper()
	os.Remove(file + ".sig")
	return runEnv(t, env, "ssh-keygen", "-Y", "sign", "-n", namespace, "-f", b.pub(key), file)
}

// verify has ssh-keygen verify the signature of a file.
func (b *sshBench) verify(t testing.TB, key, namespace, file string) {
	t.Helper()
	out := mustEnv(t, b.env, "sh", "-c", `ssh-keygen -Y verify -f "$0" -I "$1" -n "$2" -s "$3.sig" <"$3"`, b.dir+"/allowed", key+"@example.org", namespace, file)
	if !strings.Contains(out, "Good \""+namespace+"\" signature for "+key+"@example.org") {
		t.Errorf("%s: %s", key, out)
	}
}

// ssh-add lists the keys, ssh-keygen signs with each, and verifies; what rules do not
// name, and what is no signature, is refused before the token, and recorded.
func TestSSHAgent(t *testing.T) {
	b := newSSHBench(t, "")
	g := b.g
	list := mustEnv(t, b.env, "ssh-add", "-l")
	for _, name := range sshKeys {
		if !strings.Contains(list, " "+name+" (") {
			t.Errorf("ssh-add -l does not list %s:\n%s", name, list)
		}
		for _, namespace := range []string{"git", "file"} {
			if r := b.sign(t, b.env, name, namespace, b.dir+"/file"); r.code != 0 {
				t.Fatalf("%s: exit code %d: %s\n%s", name, r.code, r.stderr, b.agent.log)
			}
			b.verify(t, name, namespace, b.dir+"/file")
			e := g.audit(t, 1)[0].Entry
			scheme := map[string]string{"rsa2048": "rsa-pkcs1v15", "p256": "ecdsa", "p384": "ecdsa", "ed25519": "eddsa-message"}[name]
			if e["outcome"] != "signed" || e["namespace"] != namespace || e["format"] != "ssh-sig" || e["key"] != name || e["rule"] != "ssh" || e["scheme"] != scheme ||
				!strings.Contains(e["claim_note"], "ssh-keygen") {
				t.Errorf("audit entry %v", e)
			}
		}
		// A blob with SHA-256 in it, of 64 bytes.
		os.Remove(b.dir + "/file.sig")
		mustEnv(t, b.env, "ssh-keygen", "-Y", "sign", "-O", "hashalg=sha256", "-n", "file", "-f", b.pub(name), b.dir+"/file")
		b.verify(t, name, "file", b.dir+"/file")
	}

	// Another namespace: the record says what was seen, and nothing is signed.
	rows := len(g.audit(t, 1000))
	for _, name := range sshKeys {
		if r := b.sign(t, b.env, name, "email", b.dir+"/file"); r.code == 0 || !strings.Contains(r.stderr, "agent refused operation") {
			t.Errorf("%s: exit code %d: %s", name, r.code, r.stderr)
		}
		e := g.audit(t, 1)[0].Entry
		if e["outcome"] != "denied" || e["namespace"] != "email" || e["signature"] != "" || !strings.Contains(e["reason"], `its namespaces are git, file, not "email"`) {
			t.Errorf("audit entry %v", e)
		}
	}
	if n := len(g.audit(t, 1000)) - rows; n != len(sshKeys) {
		t.Errorf("%d rows of %d refusals", n, len(sshKeys))
	}
	b.agent.await(t, `not \"email\"`)

	// Nothing is added, removed or locked, and none of it reaches the gateway.
	mustEnv(t, b.env, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", b.dir+"/own")
	for _, args := range [][]string{{b.dir + "/own"}, {"-d", b.pub("p256")}, {"-D"}} {
		if r := runEnv(t, b.env, "ssh-add", args...); r.code == 0 {
			t.Errorf("ssh-add %q: %s%s", args, r.stdout, r.stderr)
		}
	}
	if again := mustEnv(t, b.env, "ssh-add", "-l"); again != list {
		t.Errorf("the list was\n%sand is\n%s", list, again)
	}

	// What policy test says is what happens.
	for namespace, want := range map[string]int{"git": 0, "email": 4} {
		if r := g.try(t, "signwarden", "policy", "test", "--principal", "alice", "--key", "p256", "--namespace", namespace); r.code != want {
			t.Errorf("policy test of %s: exit code %d: %s%s", namespace, r.code, r.stdout, r.stderr)
		}
	}
	if r := g.try(t, "signwarden", "policy", "test", "--key", "p256", "--login", "root"); r.code != 4 || !strings.Contains(r.stdout, "ssh-auth") {
		t.Errorf("policy test of a login: exit code %d: %s%s", r.code, r.stdout, r.stderr)
	}

	// 16 at once.
	var wg sync.WaitGroup
	for i := range 16 {
		file := fmt.Sprintf("%s/file%d", b.dir, i)
		writeFile(t, file, file)
		wg.Go(func() {
			cmd := exec.Command("ssh-keygen", "-Y", "sign", "-n", "file", "-f", b.pub(sshKeys[i%4]), file)
			cmd.Env = b.env
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%d: %v: %s", i, err, out)
			}
		})
	}
	wg.Wait()
	for i := range 16 {
		b.verify(t, sshKeys[i%4], "file", fmt.Sprintf("%s/file%d", b.dir, i))
	}

	// The gateway goes away: the tool fails, and the agent says why.
	g.stop(unix.SIGTERM)
	if r := b.sign(t, b.env, "ed25519", "git", b.dir+"/file"); r.code == 0 || !strings.Contains(r.stderr, "agent refused operation") {
		t.Errorf("without a gateway: exit code %d: %s", r.code, r.stderr)
	}
	b.agent.await(t, "unavailable")
}

// git signs commits and tags with the key of an agent, and verifies them.
func TestSSHGit(t *testing.T) {
	b := newSSHBench(t, "")
	repo := b.dir + "/repo"
	git := func(args ...string) string {
		t.Helper()
		return mustEnv(t, b.env, "git", append([]string{"-C", repo, "-c", "gpg.format=ssh", "-c", "gpg.ssh.allowedSignersFile=" + b.dir + "/allowed",
			"-c", "user.name=A", "-c", "user.email=a@example.org"}, args...)...)
	}
	mustEnv(t, b.env, "git", "init", "-q", repo)
	for _, name := range sshKeys {
		git("-c", "user.signingkey="+b.pub(name), "commit", "-q", "--allow-empty", "-S", "-m", name)
		git("verify-commit", "HEAD")
		git("-c", "user.signingkey="+b.pub(name), "tag", "-s", "-m", name, "v-"+name)
		git("verify-tag", "v-"+name)
		if e := b.g.audit(t, 1)[0].Entry; e["namespace"] != "git" || e["key"] != name {
			t.Errorf("audit entry %v", e)
		}
	}
	// exec is the whole job.
	out := mustEnv(t, b.g.as("alice").env, "signwarden", "exec", "--", "git", "-C", repo, "-c", "gpg.format=ssh", "-c", "user.signingkey="+b.pub("p384"),
		"-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "--allow-empty", "-S", "-m", "exec")
	git("verify-commit", "HEAD")
	if !strings.Contains(out, "exec") {
		t.Errorf("git said %q", out)
	}
}

// ssh logs in with a key of the agent only where a rule names logins; a socket that is
// forwarded signs, too.
func TestSSHLogin(t *testing.T) {
	b := newSSHBench(t, "")
	g := b.g
	host := newSSHHost(t)
	var authorized strings.Builder
	for _, name := range sshKeys {
		authorized.WriteString(string(readFile(t, b.pub(name))))
	}
	writeFile(t, host.dir+"/authorized", authorized.String())
	login := func(key string) result {
		t.Helper()
		// On the command line the key comes before that of the file, and there is no other.
		return runEnv(t, b.env, "ssh", "-F", "none", "-o", "HostName="+host.option(t, "HostName"), "-o", "Port="+host.option(t, "Port"), "-o", "User=root",
			"-o", "UserKnownHostsFile="+host.dir+"/known_hosts", "-o", "StrictHostKeyChecking=accept-new", "-o", "BatchMode=yes",
			"-o", "IdentitiesOnly=yes", "-o", "IdentityFile="+b.pub(key), "build", "echo logged in")
	}
	for _, key := range sshKeys {
		if r := login(key); r.code == 0 || !strings.Contains(r.stderr, "agent refused operation") {
			t.Errorf("%s: exit code %d: %s%s", key, r.code, r.stdout, r.stderr)
		}
		if e := g.audit(t, 1)[0].Entry; e["outcome"] != "denied" || e["format"] != "ssh-auth" || e["user"] != "root" || e["signature"] != "" || !strings.Contains(e["reason"], `does not allow the format "ssh-auth"`) {
			t.Errorf("audit entry %v", e)
		}
	}
	g.policy(t, "  - {name: logins, principals: [alice], keys: [\"*\"], may: [sign], formats: [ssh-auth]}\n")
	for _, key := range sshKeys {
		if r := login(key); r.code != 0 || r.stdout != "logged in\n" {
			t.Errorf("%s: exit code %d: %s%s", key, r.code, r.stdout, r.stderr)
		}
		if e := g.audit(t, 1)[0].Entry; e["outcome"] != "signed" || e["format"] != "ssh-auth" || e["user"] != "root" || e["rule"] != "logins" {
			t.Errorf("audit entry %v", e)
		}
	}

	// By a path of ours, and as ssh -A does it.
	remote := host.dir + "/agent"
	host.forward(t, remote, b.socket)
	there := append(os.Environ(), "SSH_AUTH_SOCK="+remote, "HOME="+b.dir)
	if r := b.sign(t, there, "ed25519", "git", b.dir+"/file"); r.code != 0 {
		t.Fatalf("forwarded: exit code %d: %s", r.code, r.stderr)
	}
	b.verify(t, "ed25519", "git", b.dir+"/file")
	os.Remove(b.dir + "/file.sig")
	mustEnv(t, b.env, "ssh", "-A", "-F", host.config, "build", "ssh-keygen -Y sign -n file -f "+b.pub("p256")+" "+b.dir+"/file")
	b.verify(t, "p256", "file", b.dir+"/file")
}

// option reads one of the client's settings.
func (h *sshHost) option(t testing.TB, name string) string {
	t.Helper()
	for line := range strings.Lines(string(readFile(t, h.config))) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == name {
			return f[1]
		}
	}
	t.Fatalf("no %s", name)
	return ""
}

// Sockets with bounds: of systemd's, by the file beside the profile; and of the daemon,
// for a user of its host.
func TestSSHSockets(t *testing.T) {
	b := newSSHBench(t, "  - {name: local, principals: [local-builds], keys: [p256], may: [sign], formats: [ssh-sig]}\n")
	g := b.g
	bound := b.dir + "/bound"
	writeFile(t, filepath.Join(filepath.Dir(g.profile("alice")), "agent.yaml"), "sockets:\n  - {ssh_socket: \"fd:ssh\", keys: [\"p*\"], signatures: 1}\n")
	background(t, g.as("alice").env, "systemd-socket-activate", "-l", bound, "--fdname=ssh",
		"-E", "PATH", "-E", "SIGNWARDEN_PROFILE", filepath.Join(bin, "signwarden"), "agent", "--systemd")
	waitFor(t, "the socket", func() bool {
		c, err := net.Dial("unix", bound)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	env := append(append([]string(nil), b.env...), "SSH_AUTH_SOCK="+bound)
	if list := mustEnv(t, env, "ssh-add", "-l"); !strings.Contains(list, "p256") || strings.Contains(list, "ed25519") {
		t.Errorf("bound keys:\n%s", list)
	}
	if r := b.sign(t, env, "ed25519", "git", b.dir+"/file"); r.code == 0 {
		t.Error("a key that the bounds do not name signs")
	}
	if r := b.sign(t, env, "p384", "git", b.dir+"/file"); r.code != 0 {
		t.Errorf("exit code %d: %s", r.code, r.stderr)
	}
	if r := b.sign(t, env, "p384", "git", b.dir+"/file"); r.code == 0 {
		t.Error("it signs more often than the bounds say")
	}

	if err := os.Chmod(b.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	user, local := b.dir+"/user", b.dir+"/run/ssh"
	if err := os.Mkdir(user, 0o700); err != nil {
		t.Fatal(err)
	}
	writeFile(t, user+"/file", "to be signed\n")
	mustEnv(t, os.Environ(), "chown", "-R", fmt.Sprint(nobody), user)
	writeFile(t, g.dir+"/signwardend.yaml", string(readFile(t, g.dir+"/signwardend.yaml"))+
		fmt.Sprintf("agents:\n  - {ssh_socket: %s, principal: local-builds, uids: [%d]}\n", local, nobody))
	if err := g.cmd.Process.Signal(unix.SIGHUP); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the daemon's socket", func() bool { _, err := os.Stat(local); return err == nil })
	as := func(uid uint32, namespace, key string) (string, int) {
		os.Remove(user + "/file.sig")
		cmd := exec.Command("ssh-keygen", "-Y", "sign", "-n", namespace, "-f", b.pub(key), user+"/file")
		cmd.Env, cmd.Dir = append(os.Environ(), "HOME="+user, "SSH_AUTH_SOCK="+local), "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		out, _ := cmd.CombinedOutput()
		return string(out), cmd.ProcessState.ExitCode()
	}
	if out, code := as(nobody, "git", "p256"); code != 0 {
		t.Fatalf("as nobody: exit code %d: %s", code, out)
	}
	b.verify(t, "p256", "git", user+"/file")
	e := g.audit(t, 1)[0].Entry
	if e["principal"] != "local-builds" || e["via"] != fmt.Sprintf("unix:%d", nobody) || e["front_end"] != "ssh-agent" || e["namespace"] != "git" || e["outcome"] != "signed" {
		t.Errorf("audit entry %v", e)
	}
	rows := len(g.audit(t, 1000))
	if out, code := as(nobody, "git", "ed25519"); code == 0 {
		t.Errorf("another key: %s", out)
	}
	if out, code := as(12345, "git", "p256"); code == 0 {
		t.Errorf("another user: %s", out)
	}
	if now := len(g.audit(t, 1000)); now != rows {
		t.Errorf("%d requests reached the gateway", now-rows)
	}
}
