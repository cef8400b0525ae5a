// Package softhsm_test drives the built programs end to end: a SoftHSM2 token,
// unmodified gpg, rpmsign and git, and the other project's verifier. Nothing is
// skipped: a tool that is missing fails the run (install-deps.sh gets them).
package softhsm_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signwarden/signwarden/gateway/client"
	"github.com/signwarden/signwarden/hsm/worker"
	"github.com/signwarden/signwarden/softhsm-tests/faultp11"
)

// bin is where TestMain builds the programs, and faulty the module that fails as it is
// told (faultp11).
var bin, faulty string

// TestMain is also the program that a worker.Token of a test starts.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == worker.Command {
		os.Exit(worker.Main())
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	for _, tool := range []string{"fsverity", "veritysetup", "time", "gpg", "gpgconf", "rpm", "rpmbuild", "rpmsign", "rpmkeys", "xorriso", "git", "pkcs11-tool", "sq", "openssl", "sqlite3",
		"gpgsm", "debsign", "dscverify", "dpkg-buildpackage", "apt-ftparchive", "createrepo_c", "ssh", "/usr/sbin/sshd", "systemd-socket-activate", "nsenter", "setpriv",
		"p11tool", "certtool", "jarsigner", "modutil", "evmctl"} {
		if _, err := exec.LookPath(tool); err != nil {
			fmt.Fprintf(os.Stderr, "%v: run softhsm-tests/install-deps.sh\n", err)
			return 1
		}
	}
	dir, err := os.MkdirTemp("", "sw")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	// Users other than root run the programs too.
	if err := os.Chmod(dir, 0o755); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	bin = dir
	for name, cgo := range map[string]string{"signwarden": "CGO_ENABLED=0", "signwardend": "CGO_ENABLED=1"} {
		cmd := exec.Command("go", "build", "-o", filepath.Join(dir, name), "../cmd/"+name)
		cmd.Env = append(os.Environ(), cgo)
		if out, err := cmd.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "building %s: %v\n%s", name, err, out)
			return 1
		}
	}
	if faulty, err = faultp11.Build(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// shortDir is a temporary directory whose path leaves room for a socket's.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "sw")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// gateway is a signwardend with a token of its own.
type gateway struct {
	dir, address string
	env          []string // for clients
	cmd          *exec.Cmd
	stderr       *stderrLog
	done         chan struct{} // closed when cmd has ended
}

// newGateway makes a gateway in a new directory and serves it.
func newGateway(t testing.TB) *gateway {
	t.Helper()
	g := initGateway(t, shortDir(t)+"/gw")
	g.serve(t)
	return g
}

// freeAddress is an address of this machine that nothing listens on.
func freeAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func initGateway(t testing.TB, dir string) *gateway {
	t.Helper()
	g := &gateway{dir: dir, address: freeAddress(t)}
	g.env = append(os.Environ(), "SIGNWARDEN_PROFILE="+g.profile("admin"), "PATH="+bin+":"+os.Getenv("PATH"))
	g.must(t, "signwardend", "init", "--dir", dir, "--dev", "--listen", g.address)
	return g
}

func (g *gateway) profile(name string) string {
	return filepath.Join(g.dir, "clients", name, "client.yaml")
}

// serve starts the gateway and waits until it answers.
func (g *gateway) serve(t testing.TB) {
	t.Helper()
	g.start(t)
	g.must(t, "signwarden", "ping", "--wait", "30s")
}

// stderrLog is what a process has said so far.
type stderrLog struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *stderrLog) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(b)
}
func (o *stderrLog) String() string { o.mu.Lock(); defer o.mu.Unlock(); return o.b.String() }

// log is what the gateway has said since its last start.
func (g *gateway) log() string { return g.stderr.String() }

// start starts the gateway; it ends with the test.
func (g *gateway) start(t testing.TB) {
	t.Helper()
	g.stderr = &stderrLog{}
	g.cmd = exec.Command(filepath.Join(bin, "signwardend"), "serve", "--dir", g.dir)
	g.cmd.Stderr = g.stderr
	if err := g.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done, cmd, stderr := make(chan struct{}), g.cmd, g.stderr
	g.done = done
	go func() { _ = cmd.Wait(); close(done) }()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(unix.SIGTERM)
		select {
		case <-done:
		case <-time.After(40 * time.Second):
			_ = cmd.Process.Kill()
			<-done
			t.Error("the gateway did not end within 40 s of SIGTERM")
		}
		if strings.Contains(stderr.String(), "panic") {
			t.Errorf("the gateway's log has a panic:\n%s", stderr)
		}
		if t.Failed() {
			t.Logf("gateway's log:\n%s", stderr)
		}
	})
}

// stop ends the gateway with sig and waits.
func (g *gateway) stop(sig os.Signal) {
	_ = g.cmd.Process.Signal(sig)
	<-g.done
}

// result is how a command ended.
type result struct {
	code           int
	stdout, stderr string
}

// try runs a command with the clients' environment.
func (g *gateway) try(t testing.TB, name string, args ...string) result {
	t.Helper()
	return runEnv(t, g.env, name, args...)
}

// must runs a command that must succeed and returns its standard output.
func (g *gateway) must(t testing.TB, name string, args ...string) string {
	t.Helper()
	return mustEnv(t, g.env, name, args...)
}

func runEnv(t testing.TB, env []string, name string, args ...string) result {
	t.Helper()
	if name == "signwarden" || name == "signwardend" {
		name = filepath.Join(bin, name)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = env
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited {
		t.Fatalf("%s: %v", name, err)
	}
	return result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// measured runs the client and tells how much memory it had at most, in KiB. That
// is what time(1) is told by the kernel, which forks from a small process: our own
// memory would count as that of what we start. The client has two processors: with
// more it works on more files at a time.
func (g *gateway) measured(t testing.TB, args ...string) (result, int) {
	t.Helper()
	var cpus unix.CPUSet
	if err := unix.SchedGetaffinity(0, &cpus); err != nil {
		t.Fatal(err)
	}
	var two []string
	for i := 0; len(two) < min(2, cpus.Count()); i++ {
		if cpus.IsSet(i) {
			two = append(two, strconv.Itoa(i))
		}
	}
	out := filepath.Join(t.TempDir(), "kib")
	r := g.try(t, "taskset", append([]string{"--cpu-list", strings.Join(two, ","), "time", "--quiet", "--format=%M", "--output=" + out,
		filepath.Join(bin, "signwarden")}, args...)...)
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	kib, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatalf("time: %v", err)
	}
	return r, kib
}

func mustEnv(t testing.TB, env []string, name string, args ...string) string {
	t.Helper()
	r := runEnv(t, env, name, args...)
	if r.code != 0 {
		t.Fatalf("%s %q: exit code %d\n%s%s", name, args, r.code, r.stdout, r.stderr)
	}
	return r.stdout
}

// as is the gateway seen with another profile.
func (g *gateway) as(name string) *gateway {
	other := *g
	other.env = append(append([]string(nil), g.env...), "SIGNWARDEN_PROFILE="+g.profile(name))
	return &other
}

// key creates a key with an OpenPGP certificate for NAME@example.org.
func (g *gateway) key(t testing.TB, name, algorithm string, args ...string) {
	t.Helper()
	g.must(t, "signwarden", append([]string{"key", "create", name, "--algorithm", algorithm,
		"--openpgp-uid", fmt.Sprintf("%s <%s@example.org>", name, name)}, args...)...)
}

// verifier is the environment of a gpg that has imported the certificates of keys.
func (g *gateway) verifier(t testing.TB, names ...string) []string {
	t.Helper()
	home := shortDir(t)
	env := append(os.Environ(), "GNUPGHOME="+home)
	writeFile(t, filepath.Join(home, "gpg.conf"), "no-autostart\n") // else --import starts an agent
	for _, name := range names {
		cert := filepath.Join(home, name+".asc")
		writeFile(t, cert, g.must(t, "signwarden", "key", "export", name, "--format", "openpgp"))
		mustEnv(t, env, "gpg", "--batch", "--quiet", "--import", cert)
	}
	return env
}

// client is a Go client with a profile.
func (g *gateway) client(t testing.TB, profile string) *client.Client {
	t.Helper()
	conf, err := client.LoadProfile(g.profile(profile))
	if err != nil {
		t.Fatal(err)
	}
	c, err := client.Dial(conf)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// entry is an audit row as `audit tail -o json` prints it.
type entry struct {
	Row   int64             `json:"row"`
	Entry map[string]string `json:"entry"`
}

// audit reads the last rows of the audit log.
func (g *gateway) audit(t testing.TB, limit int) []entry {
	t.Helper()
	var out []entry
	dec := json.NewDecoder(strings.NewReader(g.must(t, "signwarden", "audit", "tail", "-o", "json", "--limit", fmt.Sprint(limit))))
	for dec.More() {
		var e entry
		if err := dec.Decode(&e); err != nil {
			t.Fatal(err)
		}
		out = append(out, e)
	}
	return out
}

// policy applies rules in addition to those of init --dev.
func (g *gateway) policy(t testing.TB, rules string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "policy.yaml")
	writeFile(t, path, g.must(t, "signwarden", "policy", "show")+rules)
	g.must(t, "signwarden", "policy", "apply", "-f", path)
}

func writeFile(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// softhsmModule is where the distribution keeps SoftHSM2's module.
func softhsmModule(t testing.TB) string {
	t.Helper()
	for _, m := range []string{"/usr/lib/softhsm/libsofthsm2.so", "/usr/lib64/pkcs11/libsofthsm2.so", "/usr/lib64/softhsm/libsofthsm2.so"} {
		if _, err := os.Stat(m); err == nil {
			return m
		}
	}
	t.Fatal("SoftHSM2's module is not installed: run softhsm-tests/install-deps.sh")
	return ""
}

// pkcs11 runs pkcs11-tool on the gateway's token, as other software would see it.
func (g *gateway) pkcs11(t testing.TB, args ...string) string {
	t.Helper()
	pin, err := os.ReadFile(g.dir + "/token/user.pin")
	if err != nil {
		t.Fatal(err)
	}
	env := append(os.Environ(), "SOFTHSM2_CONF="+g.dir+"/token/softhsm2.conf", "PIN="+strings.TrimSpace(string(pin)))
	return mustEnv(t, env, "pkcs11-tool", append([]string{"--module", softhsmModule(t), "--token-label", "signwarden-dev", "--login", "--pin", "env:PIN"}, args...)...)
}
