package softhsm_test

import (
	"crypto"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signwarden/signwarden/gateway/client"
	"github.com/signwarden/signwarden/softhsm-tests/faultp11"
)

// twoTokens is a gateway with a key "rel" in two SoftHSM tokens, which is served, and
// the modules by which it reaches them.
func twoTokens(t *testing.T) (*gateway, [2]*faultp11.Module) {
	t.Helper()
	so, err := faultp11.Build(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	g := initGateway(t, shortDir(t)+"/gw")
	var modules [2]*faultp11.Module
	var list strings.Builder
	for i, name := range []string{"a", "b"} {
		m := faultp11.New(t, softhsmModule(t))
		modules[i] = m
		fmt.Fprintf(&list, "  - name: %s\n    primary: %v\n    module: %s\n    label: signwarden-dev\n    pin_file: token/user.pin\n    workers: 1\n    environment:\n      SOFTHSM2_CONF: ./%s/softhsm2.conf\n", name, i == 0, so, name)
		for k, v := range m.Env {
			fmt.Fprintf(&list, "      %s: %s\n", k, v)
		}
	}
	g.serve(t)
	g.must(t, "signwarden", "key", "create", "rel", "--algorithm", "p256")
	g.stop(unix.SIGTERM)
	// As a vendor's tool would replicate a token: a copy of it, keys and all.
	for _, name := range []string{"a", "b"} {
		copyToken(t, g.dir, name)
	}
	b, err := os.ReadFile(g.dir + "/signwardend.yaml")
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, g.dir+"/signwardend.yaml", withTokens(t, string(b), list.String()))
	edit(t, g.dir, "listen: ", "metrics: {listen: unix:metrics.sock}\nlisten: ")
	return g, modules
}

// copyToken makes DIR/NAME a SoftHSM token like DIR/token.
func copyToken(t *testing.T, dir, name string) {
	t.Helper()
	mustEnv(t, os.Environ(), "rm", "-rf", filepath.Join(dir, name))
	mustEnv(t, os.Environ(), "cp", "-a", dir+"/token", filepath.Join(dir, name))
	conf := filepath.Join(dir, name, "softhsm2.conf")
	b, err := os.ReadFile(conf)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, conf, strings.ReplaceAll(string(b), dir+"/token", filepath.Join(dir, name)))
}

// withTokens is a configuration with a list in place of its token.
func withTokens(t *testing.T, text, list string) string {
	t.Helper()
	var out strings.Builder
	in, done := false, false
	for line := range strings.Lines(text) {
		switch {
		case strings.HasPrefix(line, "token:"):
			in, done = true, true
			out.WriteString("tokens:\n" + list)
		case in && strings.HasPrefix(line, " "):
		default:
			in = false
			out.WriteString(line)
		}
	}
	if !done {
		t.Fatalf("no token in %s", text)
	}
	return out.String()
}

// flow signs with "rel" on n goroutines until end, and keeps how long each took.
type flow struct {
	stop atomic.Bool
	wg   sync.WaitGroup
	mu   sync.Mutex
	took []time.Duration
}

func startFlow(t *testing.T, c *client.Client, n int) *flow {
	f := &flow{}
	for i := range n {
		f.wg.Go(func() {
			for j := 0; !f.stop.Load(); j++ {
				sum := sha256.Sum256(fmt.Append(nil, i, j))
				began := time.Now()
				_, err := c.Sign(t.Context(), client.Request{Key: "rel", Digest: sum[:], Hash: crypto.SHA256, Format: "openpgp"})
				if err != nil {
					t.Errorf("signature %d: %v", j, err)
				}
				f.mu.Lock()
				f.took = append(f.took, time.Since(began))
				f.mu.Unlock()
			}
		})
	}
	return f
}

// slowest is the longest of what ended since it was last asked, of count.
func (f *flow) slowest() (d time.Duration, count int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	d, count = slices.Max(append(f.took, 0)), len(f.took)
	f.took = nil
	return d, count
}

// wait returns when n more were signed.
func (f *flow) wait(t *testing.T, n int) {
	t.Helper()
	until(t, "more is signed", func() bool { f.mu.Lock(); defer f.mu.Unlock(); return len(f.took) >= n })
}

// until waits for a state that comes by itself.
func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	for !done() {
		select {
		case <-t.Context().Done():
			t.Fatalf("waiting until %s: %v", what, t.Context().Err())
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// One of two tokens with the same key fails, under load: nobody is refused, and all is
// signed in the other. When it returns it is used again. Times are in the output.
func TestTokenDies(t *testing.T) {
	for _, tt := range []struct{ name, rule string }{
		{"removed", "rv=0x32"},
		{"hung", "hang"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g, modules := twoTokens(t)
			g.serve(t)
			f := startFlow(t, g.client(t, "admin"), 16)
			defer func() { f.stop.Store(true); f.wg.Wait() }()
			both := func(n int) {
				a, b := modules[0].Calls("C_Sign"), modules[1].Calls("C_Sign")
				until(t, "both tokens sign", func() bool {
					return modules[0].Calls("C_Sign") >= a+n && modules[1].Calls("C_Sign") >= b+n
				})
			}
			both(100)
			f.slowest()
			var rules []string
			for _, fn := range []string{"C_Sign", "C_SignInit", "C_GetSessionInfo", "C_OpenSession", "C_FindObjectsInit", "C_Login", "C_GetTokenInfo"} {
				rules = append(rules, fn+" "+tt.rule)
			}
			died := time.Now()
			modules[1].Set(t, rules...)
			until(t, "the gateway has seen it", func() bool { return strings.Contains(g.log(), "gets no requests") })
			seen := time.Since(died)
			f.slowest()
			f.wait(t, 500)
			after, _ := f.slowest()
			calls := modules[1].Injected(0)
			f.wait(t, 2000)
			d, n := f.slowest()
			t.Logf("%s: seen after %v; slowest answer just after it %v; then of %d the slowest took %v, and the dead token was asked to sign %d times more",
				tt.name, seen.Round(time.Millisecond), after.Round(time.Millisecond), n, d.Round(time.Millisecond), modules[1].Injected(0)-calls)
			if got := modules[1].Injected(0) - calls; got > 0 && tt.name == "removed" {
				t.Errorf("the token that was found dead was asked to sign %d times", got)
			}
			modules[1].Set(t)
			back := time.Now()
			both(100)
			t.Logf("%s: back after %v", tt.name, time.Since(back).Round(time.Millisecond))
		})
	}
}

// Tokens that are slow are no tokens that hang, from the first signature on: each signs,
// and neither is taken for broken.
func TestTokensAreSlow(t *testing.T) {
	g, modules := twoTokens(t)
	for _, m := range modules {
		m.Set(t, "C_Sign delay=200")
	}
	g.serve(t)
	f := startFlow(t, g.client(t, "admin"), 4)
	f.wait(t, 40)
	f.stop.Store(true)
	f.wg.Wait()
	for i, m := range modules {
		if n := m.Calls("C_Sign"); n == 0 {
			t.Errorf("token %d got no request", i)
		}
	}
	if log := g.log(); strings.Contains(log, "gets no requests") {
		t.Errorf("a slow token was taken for broken:\n%s", log)
	}
}

// A token that is not there when the gateway starts keeps it from nothing, and is
// used when it is there. One with another key under the id is not, and the log says so.
func TestTokenComesLate(t *testing.T) {
	g, modules := twoTokens(t)
	modules[1].Set(t, "C_GetSlotList rv=0x32")
	g.serve(t)
	f := startFlow(t, g.client(t, "admin"), 8)
	f.wait(t, 100)
	g.tells(t, `signwarden_token_up{token="a"} 1`, `signwarden_token_up{token="b"} 0`, `signwarden_token_breaker{state="open",token="b"} 1`,
		`signwarden_worker_ends_total{cause="crash",token="b"} 0`, `signwarden_ready 1`)
	modules[1].Set(t)
	until(t, "the other token signs", func() bool { return modules[1].Calls("C_Sign") > 100 })
	g.tells(t, `signwarden_token_up{token="b"} 1`, `signwarden_token_breaker{state="closed",token="b"} 1`, `signwarden_token_keys{token="b"} 1`)
	f.stop.Store(true)
	f.wg.Wait()
	g.stop(unix.SIGTERM)

	// The same id, another key.
	id := keyID(t, g, "rel")
	g.deleteKey(t, "b", id)
	g.pkcs11Tool(t, "b", "--keypairgen", "--key-type", "EC:prime256v1", "--id", id, "--label", "rel")
	before := modules[1].Calls("C_Sign")
	g.serve(t)
	f = startFlow(t, g.client(t, "admin"), 8)
	f.wait(t, 500)
	f.stop.Store(true)
	f.wg.Wait()
	if n := modules[1].Calls("C_Sign") - before; n > 0 {
		t.Errorf("a token with another key under the id was asked to sign %d times", n)
	}
	if !strings.Contains(g.log(), "another key under a registered id") {
		t.Error("there is no alarm in the log")
	}
	g.tells(t, `signwarden_token_other_keys{token="a"} 0`, `signwarden_token_other_keys{token="b"} 1`)
}

// A key is deleted in one of two tokens, under load, and the token is put back: nobody is
// refused, and it is found there again without a word to the gateway, whatever its workers
// saw meanwhile.
func TestTokenLosesKey(t *testing.T) {
	g, modules := twoTokens(t)
	tokens := filepath.Join(g.dir, "b", "tokens")
	copyAll(t, tokens, tokens+".backup")
	g.serve(t)
	f := startFlow(t, g.client(t, "admin"), 8)
	defer func() { f.stop.Store(true); f.wg.Wait() }()
	signs := func() {
		t.Helper()
		before := modules[1].Calls("C_Sign")
		until(t, "the second token signs", func() bool { return modules[1].Calls("C_Sign") >= before+100 })
	}
	signs()
	g.deleteKey(t, "b", keyID(t, g, "rel"))
	g.tells(t, `signwarden_token_keys{token="b"} 0`, `signwarden_token_up{token="b"} 1`)
	copyAll(t, tokens+".backup", tokens)
	signs()
	g.tells(t, `signwarden_token_keys{token="b"} 1`)
}

// tells waits until /metrics has each of these lines.
func (g *gateway) tells(t *testing.T, lines ...string) {
	t.Helper()
	for _, l := range lines {
		until(t, "the metrics tell "+l, func() bool { _, text := g.http(t, "/metrics"); return strings.Contains(text, "\n"+l+"\n") })
	}
}

// pkcs11Tool is logged in to the token in DIR/NAME.
func (g *gateway) pkcs11Tool(t *testing.T, name string, args ...string) {
	t.Helper()
	pin := strings.TrimSpace(string(readFile(t, g.dir+"/token/user.pin")))
	env := append(os.Environ(), "SOFTHSM2_CONF="+filepath.Join(g.dir, name, "softhsm2.conf"), "PIN="+pin)
	mustEnv(t, env, "pkcs11-tool", append([]string{"--module", softhsmModule(t), "--token-label", "signwarden-dev", "--login", "--pin", "env:PIN"}, args...)...)
}

// deleteKey takes both halves of a key out of the token in DIR/NAME.
func (g *gateway) deleteKey(t *testing.T, name, id string) {
	t.Helper()
	for _, half := range []string{"privkey", "pubkey"} {
		g.pkcs11Tool(t, name, "--delete-object", "--type", half, "--id", id)
	}
}

// A key that one of the tokens has is well, and what the others lack for it is no
// failure. One that none has is.
func TestCheckTokens(t *testing.T) {
	g, modules := twoTokens(t)
	id := keyID(t, g, "rel")
	g.deleteKey(t, "b", id)
	modules[1].Set(t, "hide 0x1041") // CKM_ECDSA
	out := g.must(t, "signwardend", "check", "--dir", g.dir)
	for _, want := range []string{"ok    key rel", "note  key rel        not in this token", "note  mechanism      the token does not offer CKM_ECDSA"} {
		if !strings.Contains(out, want) {
			t.Errorf("check does not say %q:\n%s", want, out)
		}
	}
	g.deleteKey(t, "a", id)
	r := g.try(t, "signwardend", "check", "--dir", g.dir)
	if r.code == 0 || strings.Count(r.stdout, "FAIL") != 1 || !strings.Contains(r.stdout, "FAIL  key rel        in none of the tokens") {
		t.Errorf("exit code %d of a check without the key:\n%s", r.code, r.stdout)
	}
}

// keyID is the CKA_ID of a key, in hexadecimal; of before g is stopped.
func keyID(t *testing.T, g *gateway, name string) string {
	t.Helper()
	g.serve(t)
	defer g.stop(unix.SIGTERM)
	var key struct {
		TokenID string `json:"token_id"`
	}
	if err := json.Unmarshal([]byte(g.must(t, "signwarden", "key", "show", name, "-o", "json")), &key); err != nil {
		t.Fatal(err)
	}
	return key.TokenID
}
