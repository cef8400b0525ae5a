package softhsm_test

import (
	"bufio"
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// p11Client is a program in the middle of its PKCS#11 calls.
type p11Client struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *bufio.Scanner
	stderr bytes.Buffer
}

// startSteps runs testdata/p11steps by way of a command, such as signwarden exec.
func startSteps(t *testing.T, env []string, key string, command ...string) *p11Client {
	t.Helper()
	steps := filepath.Join(t.TempDir(), "p11steps")
	build := exec.Command("go", "build", "-o", steps, "./testdata/p11steps")
	build.Env = append(os.Environ(), "CGO_ENABLED=1")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building p11steps: %v\n%s", err, out)
	}
	command = append(command, steps, p11Module(t), "signwarden", key)
	c := &p11Client{cmd: exec.Command(command[0], command[1:]...)}
	c.cmd.Env, c.cmd.Stderr = env, &c.stderr
	in, err := c.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	c.in, c.out = in, bufio.NewScanner(out)
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.in.Close()
		_ = c.cmd.Wait()
		if t.Failed() {
			t.Logf("the client's standard error:\n%s", &c.stderr)
		}
	})
	if got := c.read(t); got != "ready" {
		t.Fatalf("the client says %q", got)
	}
	return c
}

func (c *p11Client) read(t *testing.T) string {
	t.Helper()
	if !c.out.Scan() {
		t.Fatalf("the client ended: %v\n%s", c.out.Err(), &c.stderr)
	}
	return c.out.Text()
}

// step has the client make one call, and wants words in how it ended.
func (c *p11Client) step(t *testing.T, call, want string) {
	t.Helper()
	if _, err := io.WriteString(c.in, call+"\n"); err != nil {
		t.Fatal(err)
	}
	if got := c.read(t); got != want && !strings.HasSuffix(got, " "+want) {
		t.Errorf("%s: %q, want %s", call, got, want)
	}
}

// What happens between two calls of one process ends each in its own CK_RV, and the same
// session signs again when it is over.
func TestP11BetweenCalls(t *testing.T) {
	g := newGateway(t)
	g.must(t, "signwarden", "key", "create", "kmod", "--algorithm", "rsa2048")
	c := startSteps(t, g.env, "kmod", filepath.Join(bin, "signwarden"), "exec", "--")
	works := func() {
		t.Helper()
		c.step(t, "init", "ok")
		c.step(t, "sign", "ok")
	}
	works()

	c.step(t, "init", "ok")
	g.must(t, "signwarden", "key", "disable", "kmod")
	c.step(t, "sign", "CKR_KEY_FUNCTION_NOT_PERMITTED")
	c.step(t, "sign", "CKR_OPERATION_NOT_INITIALIZED")
	denied := g.audit(t, 1)[0].Entry
	g.must(t, "signwarden", "key", "enable", "kmod")
	works()

	policy := filepath.Join(t.TempDir(), "policy.yaml")
	apply := func(text string) {
		t.Helper()
		writeFile(t, policy, text)
		g.must(t, "signwarden", "policy", "apply", "-f", policy)
	}
	before := g.must(t, "signwarden", "policy", "show")
	const admin = "rules:\n  - {name: a, principals: [admin], keys: [\"*\"], may: [admin, read]}\n"
	c.step(t, "init", "ok")
	apply(admin)
	c.step(t, "sign", "CKR_FUNCTION_REJECTED")
	apply(admin + "  - {name: r, principals: [admin], keys: [kmod], may: [sign], formats: [pkcs11], blind: true, rate: 1/h}\n")
	works()
	c.step(t, "init", "ok")
	c.step(t, "sign", "CKR_DEVICE_MEMORY") // beyond the rate
	apply(admin + "  - {name: r, principals: [admin], keys: [kmod], may: [sign], formats: [cms], blind: true}\n")
	c.step(t, "init", "ok")
	c.step(t, "sign", "CKR_FUNCTION_REJECTED") // for another format only
	apply(before)
	works()

	c.step(t, "init", "ok")
	g.stop(unix.SIGKILL)
	c.step(t, "sign", "CKR_DEVICE_REMOVED")
	c.step(t, "find", "1") // from memory
	g.serve(t)
	works()

	// The refusal can be found by its request's id in both logs.
	id, _, _ := strings.Cut(strings.TrimPrefix(denied["claim_note"], "request "), ",")
	if denied["outcome"] != "denied" || len(id) < 20 {
		t.Fatalf("audit entry %v", denied)
	}
	c.in.Close()
	if err := c.cmd.Wait(); err != nil {
		t.Errorf("the client ended with %v", err)
	}
	if log := c.stderr.String(); !strings.Contains(log, "request="+id) || !strings.Contains(log, "key is disabled") {
		t.Errorf("no line about request %s in\n%s", id, log)
	}
}

// A program that forks: the child has to begin anew, with a connection of its own, and
// the parent's goes on. Nobody calls C_Finalize.
func TestP11Fork(t *testing.T) {
	g := newGateway(t)
	g.must(t, "signwarden", "key", "create", "kmod", "--algorithm", "rsa2048")
	program := filepath.Join(t.TempDir(), "p11fork")
	mustEnv(t, os.Environ(), "gcc", "-Wall", "-Wextra", "-Werror", "-I/usr/include/p11-kit-1", "-o", program, "testdata/p11fork.c", "-ldl")
	rows := len(g.audit(t, 1000))
	got := g.must(t, "signwarden", "exec", "--", program, p11Module(t), "kmod")
	want := "initialize 0x0\nfind 0x0\nsign 0x0\n" +
		"child-sign 0x190\n" + // CKR_CRYPTOKI_NOT_INITIALIZED
		"child-initialize 0x0\nchild-find 0x0\nchild-sign-again 0x0\nparent-sign 0x0\n"
	if got != want {
		t.Errorf("it says\n%s\nwant\n%s", got, want)
	}
	if n := len(g.audit(t, 1000)) - rows; n != 3 {
		t.Errorf("%d signatures are recorded, want 3", n)
	}
}

// p11-kit runs `signwarden p11 --stdio` for every program that uses it, as its module file
// says: no daemon, no environment variable.
func TestP11Stdio(t *testing.T) {
	g := newGateway(t)
	g.must(t, "signwarden", "key", "create", "kmod", "--algorithm", "rsa2048")
	g.must(t, "signwarden", "key", "create", "boot", "--algorithm", "rsa2048")
	g.must(t, "signwarden", "key", "cert", "kmod", "--self-signed", "--subject", "CN=kmod")
	home := shortDir(t)
	writeFile(t, home+"/msg", "to be signed\n")
	writeFile(t, home+"/cert.pem", g.must(t, "signwarden", "key", "export", "kmod", "--format", "x509"))
	mustEnv(t, os.Environ(), "openssl", "x509", "-in", home+"/cert.pem", "-noout", "-pubkey", "-out", home+"/pub")
	mustEnv(t, os.Environ(), "cp", "-a", filepath.Dir(g.profile("admin")), home+"/profile")
	mustEnv(t, os.Environ(), "cp", g.dir+"/tls/ca.crt", home+"/ca.crt")
	mustEnv(t, os.Environ(), "sed", "-i", "s|^ca: .*|ca: "+home+"/ca.crt|", home+"/profile/client.yaml")
	mustEnv(t, os.Environ(), "mkdir", "-p", home+"/.config/pkcs11/modules")
	writeFile(t, home+"/.config/pkcs11/modules/signwarden.module",
		"remote: |"+filepath.Join(bin, "signwarden")+" p11 --stdio --profile "+home+"/profile/client.yaml --p11-token signwarden=kmod --p11-token boot=b*\n")
	mustEnv(t, os.Environ(), "chown", "-R", "65534:65534", home)
	as := func(args ...string) result { // p11-kit does not read root's own configuration
		t.Helper()
		return runEnv(t, append(os.Environ(), "HOME="+home), "setpriv", append([]string{"--reuid=65534", "--regid=65534", "--clear-groups"}, args...)...)
	}
	if r := as("p11tool", "--list-tokens"); r.code != 0 || !strings.Contains(r.stdout, "Label: signwarden") || !strings.Contains(r.stdout, "Label: boot") {
		t.Fatalf("p11tool: exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	if r := as("p11tool", "--list-all", "pkcs11:token=signwarden"); strings.Count(r.stdout, "Type: Private key") != 1 || !strings.Contains(r.stdout, "Label: kmod") {
		t.Errorf("p11tool: exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	proxies, err := filepath.Glob("/usr/lib/*/p11-kit-proxy.so")
	if err != nil || len(proxies) == 0 {
		t.Fatal("p11-kit-proxy.so is not installed: run softhsm-tests/install-deps.sh")
	}
	rows := len(g.audit(t, 1000))
	r := as("env", "PKCS11_MODULE_PATH="+proxies[0], "openssl", "dgst", "-sha256", "-engine", "pkcs11", "-keyform", "engine", "-sign", p11URI("kmod"), "-out", home+"/sig", home+"/msg")
	if r.code != 0 {
		t.Fatalf("openssl: exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	mustEnv(t, os.Environ(), "openssl", "dgst", "-sha256", "-verify", home+"/pub", "-signature", home+"/sig", home+"/msg")
	if all := g.audit(t, 1000); len(all) != rows+1 || all[rows].Entry["format"] != "pkcs11" || !strings.Contains(all[rows].Entry["claim_note"], "openssl") {
		t.Errorf("audit %v", all[rows:])
	}
	// Nobody is left when its program has ended.
	if out, _ := exec.Command("pgrep", "-f", home+"/profile/client.yaml").Output(); len(out) != 0 {
		t.Errorf("processes are left: %s", out)
	}
	for _, args := range [][]string{{"p11"}, {"p11", "--stdio", "--p11-token", "x"}, {"p11", "--stdio", "--p11-token", "a=x", "--p11-token", "ab=y"}} {
		if r := g.try(t, "signwarden", args...); r.code != 2 {
			t.Errorf("%q: exit code %d: %s", args, r.code, r.stderr)
		}
	}
}
