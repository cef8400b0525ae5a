package p11token_test

import (
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signwarden/signwarden/agentproto"
	"github.com/signwarden/signwarden/agentproto/p11token"
)

// clientModule is the distribution's own p11-kit-client.so.
func clientModule(t testing.TB) string {
	t.Helper()
	for _, pattern := range []string{"/usr/lib/*/pkcs11/p11-kit-client.so", "/usr/lib64/pkcs11/p11-kit-client.so", "/usr/lib/pkcs11/p11-kit-client.so"} {
		found, err := filepath.Glob(pattern)
		if err == nil && len(found) > 0 {
			return found[0]
		}
	}
	t.Fatal("this test needs the real peer, p11-kit-client.so: run softhsm-tests/install-deps.sh")
	return ""
}

// host is a socket with our token behind it, and the environment in which tools find it.
type host struct {
	dir    string
	module string
	env    []string
	keys   *softKeys
	// answers counts responses and versions: every one is one write.
	answers, conns atomic.Int64
	procs          int64 // that run has started
}

// newHost serves keys on a socket until the test ends. The private keys are in this process only.
func newHost(t *testing.T, keys *softKeys) *host {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "sw") // short, as a socket's path must be
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	h := &host{dir: dir, module: clientModule(t), keys: keys}
	l, err := agentproto.Listen(agentproto.Config{Path: dir + "/p11", Logger: testLogger(t)})
	if err != nil {
		t.Fatal(err)
	}
	srv, err := p11token.New(p11token.Config{Keys: keysFor(keys), Logger: testLogger(t)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		err := l.Serve(ctx, func(ctx context.Context, c net.Conn, p agentproto.Peer) {
			h.conns.Add(1)
			srv.ServeConn(ctx, countingConn{c, &h.answers}, p)
		})
		if err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
	h.env = append(os.Environ(), "P11_KIT_SERVER_ADDRESS=unix:path="+l.Path(), "PKCS11_MODULE_PATH="+h.module, "HOME="+dir, "LC_ALL=C")
	for name, chain := range keys.chains {
		for i, der := range chain {
			h.write(t, fmt.Sprintf("%s.%d.pem", name, i), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
		}
	}
	h.write(t, "msg", "to be signed\n")
	return h
}

type countingConn struct {
	net.Conn
	writes *atomic.Int64
}

func (c countingConn) Write(b []byte) (int, error) {
	c.writes.Add(1)
	return c.Conn.Write(b)
}

func (h *host) path(name string) string { return filepath.Join(h.dir, name) }

func (h *host) write(t testing.TB, name, text string) string {
	t.Helper()
	err := os.WriteFile(h.path(name), []byte(text), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	return h.path(name)
}

func (h *host) read(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(h.path(name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// run runs a tool in the host's directory, without a terminal, and returns its exit status and output.
func (h *host) run(t testing.TB, name string, args ...string) (int, string) {
	t.Helper()
	h.procs++
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env, cmd.Dir = h.env, h.dir
	out, err := cmd.CombinedOutput()
	if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited {
		t.Fatalf("this test needs the real peer: %v: run softhsm-tests/install-deps.sh", err)
	}
	return cmd.ProcessState.ExitCode(), string(out)
}

func (h *host) must(t testing.TB, name string, args ...string) string {
	t.Helper()
	code, out := h.run(t, name, args...)
	if code != 0 {
		t.Fatalf("%s %q: exit status %d\n%s", name, args, code, out)
	}
	return out
}

// signed asserts that so many signatures were asked for since the last time.
func (h *host) signed(t testing.TB, want int) {
	t.Helper()
	if calls := h.keys.takeCalls(); len(calls) != want {
		t.Errorf("%d requests for signatures, want %d: %+v", len(calls), want, calls)
	}
}

// keyID is the CKA_ID of a key in hex, by which pkcs11-tool 0.23 finds the key to sign with.
func keyID(t *testing.T, keys *softKeys, name string) string {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(keys.signers[name].Public())
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:20])
}

func TestPKCS11Tool(t *testing.T) {
	h := newHost(t, newSoftKeys("rsa", "p256", "p384", "ed"))
	tool := func(args ...string) string {
		t.Helper()
		return h.must(t, "pkcs11-tool", append([]string{"--module", h.module}, args...)...)
	}
	list := tool("-L")
	for _, words := range []string{": signwarden\n", ": ed25519-signwarden\n", "token initialized"} {
		if !strings.Contains(list, words) || strings.Contains(list, "login required") || strings.Contains(list, "PIN initialized") {
			t.Errorf("-L lacks %q, or wants a login:\n%s", words, list)
		}
	}
	mechanisms := tool("-M", "--token-label", "signwarden")
	if !strings.Contains(mechanisms, "RSA-PKCS-PSS") || strings.Contains(mechanisms, "RSA-X-509") {
		t.Errorf("-M:\n%s", mechanisms)
	}
	objects := tool("-O", "--token-label", "signwarden")
	for what, want := range map[string]int{"Private Key Object": 3, "Public Key Object": 3, "Certificate Object": 4} {
		if n := strings.Count(objects, what); n != want {
			t.Errorf("%d of %s, want %d:\n%s", n, what, want, objects)
		}
	}
	h.signed(t, 0)

	digest := sha256.Sum256(h.read(t, "msg"))
	h.write(t, "info", string(digestInfo(t, crypto.SHA256, digest[:])))
	h.write(t, "digest", string(digest[:]))
	rsaKey, p256 := h.keys.signers["rsa"].Public(), h.keys.signers["p256"].Public()
	for _, tt := range []struct {
		label, mech, in string
		pub             crypto.PublicKey
		salt            int
	}{
		{"rsa", "RSA-PKCS", "info", rsaKey, -1},
		{"rsa", "SHA256-RSA-PKCS", "msg", rsaKey, -1},
		{"rsa", "RSA-PKCS-PSS", "digest", rsaKey, 32},
		{"p256", "ECDSA", "digest", p256, -1},
	} {
		for _, login := range [][]string{nil, {"--login", "--pin", "1234"}} {
			args := append([]string{"--token-label", "signwarden", "--sign", "-m", tt.mech, "--id", keyID(t, h.keys, tt.label), "-i", h.path(tt.in), "-o", h.path("sig")}, login...)
			if tt.salt >= 0 {
				args = append(args, "--hash-algorithm", "SHA256")
			}
			tool(args...)
			h.signed(t, 1)
			verify(t, tt.pub, crypto.SHA256, tt.salt, digest[:], h.read(t, "sig"))
		}
	}
	code, out := h.run(t, "pkcs11-tool", "--module", h.module, "--token-label", "signwarden", "--sign", "-m", "RSA-PKCS", "--id", keyID(t, h.keys, "rsa"), "-i", h.path("digest"), "-o", h.path("sig"))
	if code == 0 { // it calls C_SignUpdate when C_Sign has failed, and tells of that
		t.Errorf("a bare digest was signed: %s", out)
	}
	code, out = h.run(t, "pkcs11-tool", "--module", h.module, "--token-label", "signwarden", "--keypairgen", "--key-type", "rsa:2048")
	if code == 0 {
		t.Errorf("a key was made: %s", out)
	}
	h.signed(t, 0)
}

func TestGnuTLS(t *testing.T) {
	h := newHost(t, newSoftKeys("rsa", "p256", "ed"))
	out := h.must(t, "p11tool", "--provider", h.module, "--list-all", "pkcs11:token=signwarden")
	for what, want := range map[string]int{"Type: Private key": 2, "Type: Public key": 2, "Type: X.509 Certificate": 3} {
		if n := strings.Count(out, what); n != want {
			t.Errorf("%d of %s, want %d:\n%s", n, what, want, out)
		}
	}
	for _, name := range []string{"rsa", "p256"} {
		h.must(t, "certtool", "--provider", h.module, "--p7-detached-sign", "--load-certificate", h.path(name+".0.pem"),
			"--load-privkey", "pkcs11:token=signwarden;object="+name+";type=private", "--hash", "SHA256", "--infile", h.path("msg"), "--outfile", h.path("p7"))
		h.signed(t, 1)
		h.must(t, "openssl", "cms", "-verify", "-binary", "-inform", "pem", "-in", h.path("p7"), "-content", h.path("msg"), "-CAfile", h.path("rsa.1.pem"), "-purpose", "any", "-out", "/dev/null")
	}
}

func TestOpenSSLEngine(t *testing.T) {
	h := newHost(t, newSoftKeys("rsa", "rsa3", "p256", "p384", "ed"))
	engine := func(name string) []string {
		return []string{"-engine", "pkcs11", "-keyform", "engine", "-sign", "pkcs11:token=signwarden;object=" + name + ";type=private"}
	}
	for _, tt := range []struct {
		name, hash string
		opts       []string
	}{
		{"rsa", "sha256", nil},
		{"rsa", "sha512", nil},
		{"rsa", "sha256", []string{"-sigopt", "rsa_padding_mode:pss"}}, // with the longest salt
		{"rsa", "sha384", []string{"-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:digest"}},
		{"rsa3", "sha256", nil},
		{"p256", "sha256", nil},
		{"p256", "sha512", nil}, // cut to 32 bytes by libp11
		{"p384", "sha384", nil},
	} {
		h.must(t, "openssl", append(append([]string{"dgst", "-" + tt.hash, "-out", h.path("sig")}, append(engine(tt.name), tt.opts...)...), h.path("msg"))...)
		h.signed(t, 1)
		h.must(t, "openssl", "x509", "-in", h.path(tt.name+".0.pem"), "-noout", "-pubkey", "-out", h.path("pub"))
		out := h.must(t, "openssl", append(append([]string{"dgst", "-" + tt.hash, "-verify", h.path("pub"), "-signature", h.path("sig")}, tt.opts...), h.path("msg"))...)
		if !strings.Contains(out, "Verified OK") {
			t.Errorf("%s %s: %s", tt.name, tt.hash, out)
		}
	}
	for _, name := range []string{"rsa", "p256"} {
		h.must(t, "openssl", "cms", "-sign", "-binary", "-in", h.path("msg"), "-signer", h.path(name+".0.pem"), "-certfile", h.path(name+".1.pem"),
			"-inkey", "pkcs11:token=signwarden;object="+name+";type=private", "-engine", "pkcs11", "-keyform", "engine", "-outform", "der", "-out", h.path("p7"))
		h.signed(t, 1)
		h.must(t, "openssl", "cms", "-verify", "-binary", "-inform", "der", "-in", h.path("p7"), "-content", h.path("msg"), "-CAfile", h.path("rsa.1.pem"), "-purpose", "any", "-out", "/dev/null")
	}
	code, out := h.run(t, "openssl", append([]string{"dgst", "-sha1", "-out", h.path("sig"), "-sign"}, "pkcs11:token=signwarden;object=rsa;type=private", "-engine", "pkcs11", "-keyform", "engine", h.path("msg"))...)
	if code == 0 {
		t.Errorf("SHA-1 was signed: %s", out)
	}
	h.signed(t, 0)
}

// With 100 keys the engine, which looks at each of them, makes so many calls and no
// request for anything but the signature.
func TestHundredKeys(t *testing.T) {
	keys := newSoftKeys("rsa")
	for i := range 99 {
		keys.signers[fmt.Sprintf("key%d", i)] = newSigners()["rsa3"]
	}
	h := newHost(t, keys)
	start := time.Now()
	h.must(t, "openssl", "dgst", "-sha256", "-engine", "pkcs11", "-keyform", "engine", "-sign", "pkcs11:token=signwarden;object=rsa;type=private", "-out", h.path("sig"), h.path("msg"))
	t.Logf("100 keys: %d answers in %v", h.answers.Load(), time.Since(start))
	h.signed(t, 1)
	if n := h.answers.Load(); n > 25+8*100 {
		t.Errorf("%d answers; libp11 0.4.12 makes 25 calls and 7 for each key", n)
	}
	if n := h.conns.Load(); n != 1 {
		t.Errorf("%d connections", n)
	}
	if keys.lists > 5 {
		t.Errorf("the keys were listed %d times", keys.lists)
	}
	if !rsaVerifies(h.keys.signers["rsa"].Public(), h.read(t, "msg"), h.read(t, "sig")) {
		t.Error("the signature does not verify")
	}
}

func rsaVerifies(pub crypto.PublicKey, message, sig []byte) bool {
	digest := sha256.Sum256(message)
	return rsa.VerifyPKCS1v15(pub.(*rsa.PublicKey), crypto.SHA256, digest[:], sig) == nil
}

// buildLoad builds testdata/p11load.
func buildLoad(t *testing.T) string {
	t.Helper()
	tool := filepath.Join(t.TempDir(), "p11load")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", tool, "./testdata/p11load")
	build.Env = append(os.Environ(), "CGO_ENABLED=1")
	out, err := build.CombinedOutput()
	if err != nil {
		t.Fatalf("building p11load: %v\n%s", err, out)
	}
	return tool
}

// Eight threads of one client, whose signatures take 20 ms each at the gateway, get at
// least six times as many as one.
func TestThreads(t *testing.T) {
	const latency, count = 20 * time.Millisecond, 25
	load := buildLoad(t)
	h := newHost(t, newSoftKeys("p256"))
	h.keys.set(func(k *softKeys) { k.before = func(context.Context) error { <-time.After(latency); return nil } })
	rate := func(threads int) float64 {
		t.Helper()
		out := h.must(t, load, h.module, "p256", strconv.Itoa(threads), strconv.Itoa(count))
		seconds, err := strconv.ParseFloat(strings.TrimSpace(out), 64)
		if err != nil {
			t.Fatal(err)
		}
		h.signed(t, threads*count)
		return float64(threads*count) / seconds
	}
	best := 0.0
	for round := 0; round < 3 && best < 6; round++ { // whatever else runs here can only lower it
		one, eight := rate(1), rate(8)
		t.Logf("%.0f signatures a second by one thread, %.0f by eight: %.1f times", one, eight, eight/one)
		best = max(best, eight/one)
	}
	if best < 6 {
		t.Errorf("eight threads make %.1f times the signatures of one, want 6", best)
	}
	if n, procs := h.conns.Load(), h.procs; n != procs {
		t.Errorf("%d connections by %d processes", n, procs)
	}
}

// All of a client's threads are at the gateway at a time.
func TestThreadsAtOnce(t *testing.T) {
	const threads = 8
	load := buildLoad(t)
	h := newHost(t, newSoftKeys("p256"))
	var all sync.WaitGroup
	all.Add(threads)
	h.keys.set(func(k *softKeys) { k.before = func(context.Context) error { all.Done(); all.Wait(); return nil } })
	h.must(t, load, h.module, "p256", strconv.Itoa(threads), "1")
	h.signed(t, threads)
}
