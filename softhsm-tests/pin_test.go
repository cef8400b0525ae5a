package softhsm_test

import (
	"context"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/signwarden/signwarden/gateway/client"
	"github.com/signwarden/signwarden/gateway/sigerr"
	"github.com/signwarden/signwarden/softhsm-tests/faultp11"
)

var buildFaultp11 = sync.OnceValues(func() (string, error) { return faultp11.Build(bin) })

// counted puts the module that counts before that of the gateway, and has it tell
// of its health at a socket.
func (g *gateway) counted(t testing.TB) *faultp11.Module {
	t.Helper()
	so, err := buildFaultp11()
	if err != nil {
		t.Fatal(err)
	}
	m := faultp11.New(t, softhsmModule(t))
	edit(t, g.dir, "module: "+softhsmModule(t), "module: "+so)
	env := ""
	for name, value := range m.Env {
		env += fmt.Sprintf("    %s: %s\n", name, value)
	}
	edit(t, g.dir, "  environment:\n", "  environment:\n"+env)
	edit(t, g.dir, "listen: ", "metrics: {listen: unix:metrics.sock}\nlisten: ")
	return m
}

// http reads a path of the gateway's metrics listener.
func (g *gateway) http(t testing.TB, path string) (int, string) {
	t.Helper()
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", g.dir+"/metrics.sock")
	}}
	defer tr.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), "GET", "http://gateway"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// workers are the pids of the gateway's children.
func (g *gateway) workers(t testing.TB) []int {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // it has ended
		}
		_, after, _ := strings.Cut(string(b), ") ") // behind the name: state, parent
		var state string
		var pid, parent int
		if _, err := fmt.Sscan(after, &state, &parent); err != nil {
			t.Fatal(err)
		}
		if _, err := fmt.Sscan(string(b), &pid); err != nil {
			t.Fatal(err)
		}
		if parent == g.cmd.Process.Pid && state != "Z" {
			pids = append(pids, pid)
		}
	}
	return pids
}

func (g *gateway) killWorkers(t testing.TB) {
	t.Helper()
	pids := g.workers(t)
	if len(pids) == 0 {
		t.Fatal("there are no workers")
	}
	for _, pid := range pids {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	waitFor(t, "they are gone", func() bool {
		for _, pid := range pids {
			if unix.Kill(pid, 0) == nil {
				return false
			}
		}
		return true
	})
}

func (g *gateway) setPINFile(t testing.TB, pin string) {
	t.Helper()
	path := g.dir + "/token/user.pin"
	if err := os.WriteFile(path+".new", []byte(pin+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// changePIN changes the PIN in the token, by other software.
func (g *gateway) changePIN(t testing.TB, from, to string) {
	t.Helper()
	env := append(os.Environ(), "SOFTHSM2_CONF="+g.dir+"/token/softhsm2.conf", "WAS="+from, "IS="+to)
	mustEnv(t, env, "pkcs11-tool", "--module", softhsmModule(t), "--token-label", "signwarden-dev",
		"--login", "--pin", "env:WAS", "--change-pin", "--new-pin", "env:IS")
}

// A service manager starts the gateway twenty times with a wrong PIN, and people
// look with check: the token sees one try. Each act of an operator is one more.
func TestWrongPINRestarts(t *testing.T) {
	g := initGateway(t, shortDir(t)+"/gw")
	right := strings.TrimSpace(string(readFile(t, g.dir+"/token/user.pin")))
	m := g.counted(t)
	refused := func(want int, args ...string) string {
		t.Helper()
		r := g.try(t, "signwardend", append(args, "--dir", g.dir)...)
		if r.code != 1 {
			t.Errorf("%q: exit code %d: %s", args, r.code, r.stderr)
		}
		if n := m.Calls("C_Login"); n != want {
			t.Fatalf("%q: the token saw %d tries, want %d", args, n, want)
		}
		if strings.Contains(r.stdout+r.stderr, "wrong-pin") {
			t.Error("the PIN is told")
		}
		return r.stdout + r.stderr
	}
	g.setPINFile(t, "wrong-pin")
	for i := range 20 {
		said := refused(1, "serve")
		if i > 0 && (!strings.Contains(said, "CKR_PIN_INCORRECT") || !strings.Contains(said, "token retry-pin")) {
			t.Errorf("it does not say what happened and what to do: %s", said)
		}
	}
	if said := refused(1, "check"); !strings.Contains(said, "FAIL  token") || !strings.Contains(said, "token retry-pin") {
		t.Errorf("check: %s", said)
	}
	if out := g.must(t, "signwardend", "token", "retry-pin", "--dir", g.dir); !strings.Contains(out, "CKR_PIN_INCORRECT") {
		t.Errorf("retry-pin: %s", out)
	}
	refused(2, "check")
	refused(2, "serve")
	g.setPINFile(t, "another-wrong-pin")
	refused(3, "serve")
	refused(3, "serve")
	g.setPINFile(t, right)
	g.serve(t)
	g.key(t, "rel", "ed25519")
	if out := g.must(t, "signwardend", "token", "retry-pin", "--dir", g.dir); !strings.Contains(out, "no refusal") {
		t.Errorf("retry-pin, when all is well: %s", out)
	}
}

// The PIN is changed in the token while the gateway serves, and its workers die:
// it says why it signs nothing, is not ready and lives, has tried the old PIN once,
// and goes on by itself when the file has the new one.
func TestPINChangedWhileServing(t *testing.T) {
	g := initGateway(t, shortDir(t)+"/gw")
	old := strings.TrimSpace(string(readFile(t, g.dir+"/token/user.pin")))
	m := g.counted(t)
	edit(t, g.dir, "token:\n", "token:\n  workers: 2\n")
	g.serve(t)
	g.key(t, "rel", "p256")
	c := g.client(t, "admin")
	sum := sha256.Sum256([]byte("text"))
	sign := func() error {
		_, err := c.Sign(t.Context(), client.Request{Key: "rel", Digest: sum[:], Hash: crypto.SHA256, Format: "openpgp"})
		return err
	}
	waitReady := func(want int) {
		t.Helper()
		waitFor(t, fmt.Sprintf("/readyz is %d", want), func() bool { code, _ := g.http(t, "/readyz"); return code == want })
		if code, _ := g.http(t, "/healthz"); code != 200 {
			t.Errorf("/healthz: %d", code)
		}
	}
	waitReady(200)

	// The operator has told the gateway in time: nobody sees anything.
	tries := m.Calls("C_Login")
	g.changePIN(t, old, "second-pin")
	g.setPINFile(t, "second-pin")
	socket := g.dir + "/reloaded"
	yaml := string(readFile(t, g.dir+"/signwardend.yaml"))
	writeFile(t, g.dir+"/signwardend.yaml", yaml+fmt.Sprintf("agents:\n  - {gpg_socket: %s, principal: nobody, uids: [%d]}\n", socket, nobody))
	if err := g.cmd.Process.Signal(unix.SIGHUP); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "it has reloaded", func() bool { _, err := os.Stat(socket); return err == nil })
	g.killWorkers(t)
	if err := sign(); err != nil {
		t.Errorf("after SIGHUP: %v", err)
	}
	waitFor(t, "all workers serve", func() bool { return len(g.workers(t)) == 2 && m.Calls("C_Login") == tries+2 })

	// The operator has forgotten the file.
	g.changePIN(t, "second-pin", "third-pin")
	g.killWorkers(t)
	waitFor(t, "it is refused", func() bool { return sign() != nil })
	if err := sign(); !errors.Is(err, sigerr.TokenFailed) {
		t.Errorf("got %v, want TokenFailed", err)
	}
	if reason := g.audit(t, 1)[0].Entry["reason"]; !strings.Contains(reason, "CKR_PIN_INCORRECT") {
		t.Errorf("the audit log says %q", reason)
	}
	waitReady(503)
	if _, text := g.http(t, "/readyz"); text != "pin\n" {
		t.Errorf("/readyz says %q, want the part and nothing of it", text)
	}
	if !strings.Contains(g.log(), "not ready") || !strings.Contains(g.log(), "CKR_PIN_INCORRECT") {
		t.Errorf("the log does not say why")
	}
	if _, text := g.http(t, "/metrics"); !strings.Contains(text, `signwarden_token_up{token="signwarden-dev"} 0`) || !strings.Contains(text, "signwarden_ready 0") {
		t.Errorf("the metrics say that all is well:\n%s", text)
	}
	if n := m.Calls("C_Login") - tries - 2; n != 1 {
		t.Errorf("%d tries with the old PIN, want 1", n)
	}
	g.setPINFile(t, "third-pin")
	waitFor(t, "it signs again", func() bool { return sign() == nil })
	waitReady(200)
	waitFor(t, "all workers serve", func() bool { return m.Calls("C_Login") == tries+2+1+2 })
	select {
	case <-g.done:
		t.Error("the gateway has ended")
	default:
	}
}

// When each worker has used a key it is not searched for again.
func TestNoSearchWhileSigning(t *testing.T) {
	g := initGateway(t, shortDir(t)+"/gw")
	m := g.counted(t)
	edit(t, g.dir, "token:\n", "token:\n  workers: 1\n")
	g.serve(t)
	c := g.client(t, "admin")
	sign := func(i int) {
		sum := sha256.Sum256(fmt.Append(nil, i))
		if _, err := c.Sign(t.Context(), client.Request{Key: fmt.Sprint("k", i%10), Digest: sum[:], Hash: crypto.SHA256, Format: "openpgp"}); err != nil {
			t.Error(err)
		}
	}
	for i := range 10 {
		g.must(t, "signwarden", "key", "create", fmt.Sprint("k", i), "--algorithm", "p256")
		sign(i)
	}
	searches, signatures := m.Calls("C_FindObjectsInit"), m.Calls("C_Sign")
	if searches < 10 || signatures < 10 {
		t.Fatalf("%d searches and %d signatures were counted", searches, signatures)
	}
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := range 100 {
				sign(100*w + i)
			}
		})
	}
	wg.Wait()
	if n := m.Calls("C_FindObjectsInit") - searches; n != 0 {
		t.Errorf("%d searches for %d signatures", n, m.Calls("C_Sign")-signatures)
	}
}

// check says how the token is taken, what is known of its module, and which keys a
// lacking mechanism leaves without one.
func TestCheckToken(t *testing.T) {
	g := initGateway(t, shortDir(t)+"/gw")
	m := g.counted(t)
	g.serve(t)
	g.key(t, "rel", "ed25519")
	out := g.must(t, "signwardend", "check", "--dir", g.dir)
	for _, want := range []string{"ok    profile        softhsm", "known fault", "#576", "ok    key rel"} {
		if !strings.Contains(out, want) {
			t.Errorf("check does not say %q:\n%s", want, out)
		}
	}
	m.Set(t, "hide 0x1057", "hide 0x000D") // CKM_EDDSA, CKM_RSA_PKCS_PSS
	r := g.try(t, "signwardend", "check", "--dir", g.dir)
	for _, want := range []string{"FAIL  mechanism", "CKM_EDDSA", `"rel"`, "note  mechanism", "CKM_RSA_PKCS_PSS: RSA keys cannot sign with PSS"} {
		if !strings.Contains(r.stdout, want) {
			t.Errorf("check does not say %q:\n%s", want, r.stdout)
		}
	}
	if r.code == 0 || strings.Count(r.stdout, "FAIL") != 1 {
		t.Errorf("exit code %d:\n%s", r.code, r.stdout)
	}
}
