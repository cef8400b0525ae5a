//go:build bench

package softhsm_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signwarden/signwarden/gateway/keys"
)

// agentBench is a gateway with a gpg-agent socket of its own, for programs of its host,
// and a signwarden agent for those of others.
type agentBench struct {
	g             *gateway
	local, remote string // the two sockets
}

// newAgentBench starts the gateway.
func newAgentBench(t *testing.T, g *gateway) *agentBench {
	t.Helper()
	b := &agentBench{g, filepath.Join(shortDir(t), "S"), filepath.Join(shortDir(t), "S")}
	conf := g.dir + "/signwardend.yaml"
	writeFile(t, conf, fmt.Sprintf("%sagents:\n  - {gpg_socket: %s, principal: admin, uids: [%d]}\n", readFile(t, conf), b.local, os.Getuid()))
	g.serve(t)
	g.agentAt(t, b.remote)
	return b
}

// A caller is a GNUPGHOME with a key, and what to call it.
type caller struct {
	name string
	env  []string
	user string // of the key
}

// callers are three with keys of one type, each a certifying primary key and a signing
// subkey: behind a real gpg-agent, behind the gateway's socket, and behind the agent.
func (b *agentBench) callers(t *testing.T, algorithm string) []caller {
	t.Helper()
	out := []caller{{"real gpg-agent", realAgent(t, algorithm), "real@example.org"}}
	for _, at := range []struct{ name, socket string }{{"gateway's socket", b.local}, {"signwarden agent", b.remote}} {
		env, socket := b.g.home(t, "bench-"+algorithm)
		// What libassuan takes for a socket elsewhere.
		writeFile(t, socket, "%Assuan%\nsocket="+at.socket+"\n")
		out = append(out, caller{at.name, env, "bench-" + algorithm + "@example.org"})
	}
	return out
}

// realAgent makes a GNUPGHOME with a key of its own behind a real gpg-agent, which
// has been started. The key has no passphrase: the agent's best case.
func realAgent(t *testing.T, algorithm string) []string {
	t.Helper()
	home := shortDir(t)
	env := append(os.Environ(), "GNUPGHOME="+home)
	mustEnv(t, env, "gpg", "--batch", "--quiet", "--passphrase", "", "--quick-generate-key", "real <real@example.org>", algorithm, "cert", "never")
	_, listed, _ := strings.Cut(mustEnv(t, env, "gpg", "--batch", "--with-colons", "--list-keys"), "\nfpr:::::::::")
	primary, _, _ := strings.Cut(listed, ":")
	mustEnv(t, env, "gpg", "--batch", "--quiet", "--passphrase", "", "--quick-add-key", primary, algorithm, "sign", "never")
	t.Cleanup(func() {
		kill := exec.Command("gpgconf", "--kill", "gpg-agent")
		kill.Env = env
		if err := kill.Run(); err != nil {
			t.Error(err)
		}
	})
	return env
}

// compare measures what each caller does, in turn, and prints the ratios. That of the
// gateway's socket must be at least so much.
func compare(t *testing.T, what string, callers []caller, atLeast float64, do func(c caller) func() time.Duration) []time.Duration {
	t.Helper()
	var measure []func() time.Duration
	for _, c := range callers {
		measure = append(measure, do(c))
	}
	took := alternate(measure...)
	fmt.Printf("%s:", what)
	for i, c := range callers {
		fmt.Printf(" %s %.2f s (%.2f times as fast)", c.name, took[i].Seconds(), took[0].Seconds()/took[i].Seconds())
	}
	fmt.Println()
	if ratio := took[0].Seconds() / took[1].Seconds(); ratio < atLeast {
		t.Errorf("%s: with the %s it is %.2f times as fast, and should be at least %.1f times", what, callers[1].name, ratio, atLeast)
	}
	return took
}

// 100 small packages in one rpmsign.
func (b *agentBench) rpmsign(t *testing.T) {
	files := hundredRPMs(t)
	sign := func(c caller) func() time.Duration {
		args := append([]string{"--define", "__gpg /usr/bin/gpg", "--define", "_gpg_name " + c.user, "--resign"}, files...)
		return func() time.Duration { return timed(func() { mustEnv(t, c.env, "rpmsign", args...) }) }
	}
	took := map[string][]time.Duration{}
	for _, k := range []struct {
		algorithm string
		atLeast   float64
	}{{"ed25519", 1}, {"rsa2048", 1}, {"rsa4096", 2}} {
		took[k.algorithm] = compare(t, "rpmsign of 100 packages, "+k.algorithm, b.callers(t, k.algorithm), k.atLeast, sign)
		allOK(t, b.g.rpmdb(t, "bench-"+k.algorithm), files)
	}
	// What rpmsign and gpg take themselves is what they take of a real gpg-agent with Ed25519,
	// which signs in 0.1 ms. No agent is faster than that and the token.
	raw := newRaw(t, b.g)
	for _, algorithm := range []string{"rsa2048", "rsa4096"} {
		token := time.Duration(float64(len(files)) / raw.one(t, b.g, "bench-"+algorithm) * float64(time.Second))
		fmt.Printf("rpmsign of 100 packages, %s: an agent that takes no time, before this token, would be %.2f times as fast as the real one\n",
			algorithm, took[algorithm][0].Seconds()/(took["ed25519"][0]+token).Seconds())
	}
	callers := b.callers(t, "rsa4096")
	compare(t, "rpmsign of 100 packages, rsa4096, the making of exec's home included", callers[:2], 1, func(c caller) func() time.Duration {
		if c.name == callers[0].name {
			return sign(c)
		}
		return func() time.Duration {
			return timed(func() {
				b.g.must(t, "signwarden", append([]string{"exec", "--", "rpmsign", "--define", "_gpg_name bench-rsa4096@example.org", "--resign"}, files...)...)
			})
		}
	})
}

// 100 files, one gpg --detach-sign each: one after another, and 40 at a time.
func (b *agentBench) gpg(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	writeFile(t, file, "to be signed")
	callers := b.callers(t, "rsa4096")
	compare(t, "100 times gpg --detach-sign, rsa4096", callers, 1, func(c caller) func() time.Duration {
		return func() time.Duration {
			return timed(func() {
				for range 100 {
					mustEnv(t, c.env, "gpg", "--batch", "--yes", "-u", c.user, "--detach-sign", file)
				}
			})
		}
	})
	const parallel, each = 40, 5
	dir := t.TempDir()
	compare(t, fmt.Sprintf("%d gpg --detach-sign, %d at a time, rsa4096", parallel*each, parallel), callers, 1.8, func(c caller) func() time.Duration {
		return func() time.Duration {
			return timed(func() {
				var wg sync.WaitGroup
				for i := range parallel {
					wg.Go(func() {
						for range each {
							cmd := exec.Command("gpg", "--batch", "--yes", "-u", c.user, "-o", filepath.Join(dir, fmt.Sprint(i)), "--detach-sign", file)
							cmd.Env = c.env
							if out, err := cmd.CombinedOutput(); err != nil {
								t.Errorf("gpg with the %s: %v: %s", c.name, err, out)
							}
						}
					})
				}
				wg.Wait()
			})
		}
	})
}

// one is the rate of one session of the module with a key.
func (r *raw) one(t *testing.T, g *gateway, key string) float64 {
	t.Helper()
	var k struct {
		Algorithm keys.Algorithm `json:"algorithm"`
		TokenID   string         `json:"token_id"`
	}
	if err := json.Unmarshal([]byte(g.must(t, "signwarden", "key", "show", key, "-o", "json")), &k); err != nil {
		t.Fatal(err)
	}
	alone := &raw{ctx: r.ctx, sessions: r.sessions[:1]}
	rates := []float64{}
	for range rounds {
		rates = append(rates, alone.signer(t, k.Algorithm, k.TokenID)(time.Second))
	}
	slices.Sort(rates)
	return rates[rounds/2]
}
