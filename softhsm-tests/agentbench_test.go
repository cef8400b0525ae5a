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

// compare measures what each caller does, in turn, and prints the ratios to the first.
func compare(what string, callers []caller, do func(c caller) func() time.Duration) []time.Duration {
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
	return took
}

// ofPossible prints how fast an agent would be that takes no time itself: what remains is
// the programs' own time, which is what they take of a real gpg-agent with Ed25519, that
// signs in 0.1 ms, and the token's. With the gateway's socket it must be nearly that.
func ofPossible(t *testing.T, what string, took []time.Duration, programs, token time.Duration) {
	t.Helper()
	possible := programs + token
	of := possible.Seconds() / took[1].Seconds()
	fmt.Printf("%s: an agent that takes no time, before this token, would be %.2f times as fast as the real one; the gateway's socket reaches %.2f of that\n",
		what, took[0].Seconds()/possible.Seconds(), of)
	if of < 0.8 {
		t.Errorf("%s: %.2f of what is possible, and should be at least 0.8", what, of)
	}
}

// 100 small packages in one rpmsign.
func (b *agentBench) rpmsign(t *testing.T) {
	files := hundredRPMs(t)
	raw := newRaw(t, b.g)
	sign := func(c caller) func() time.Duration {
		args := append([]string{"--define", "__gpg /usr/bin/gpg", "--define", "_gpg_name " + c.user, "--resign"}, files...)
		return func() time.Duration { return timed(func() { mustEnv(t, c.env, "rpmsign", args...) }) }
	}
	var programs time.Duration
	for _, algorithm := range []string{"ed25519", "rsa2048", "rsa4096"} {
		what := "rpmsign of 100 packages, " + algorithm
		took := compare(what, b.callers(t, algorithm), sign)
		allOK(t, b.g.rpmdb(t, "bench-"+algorithm), files)
		if programs == 0 {
			programs = took[0]
		}
		ofPossible(t, what, took, programs, raw.takes(t, b.g, "bench-"+algorithm, 1, len(files)))
	}
	callers := b.callers(t, "rsa4096")
	compare("rpmsign of 100 packages, rsa4096, the making of exec's home included", callers[:2], func(c caller) func() time.Duration {
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

// One gpg --detach-sign for each file: one after another, and 40 at a time.
func (b *agentBench) gpg(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	writeFile(t, file, "to be signed")
	dir := t.TempDir()
	raw := newRaw(t, b.g)
	for _, parallel := range []int{1, 40} {
		const count = 200
		burst := func(c caller) func() time.Duration {
			return func() time.Duration {
				return timed(func() {
					var wg sync.WaitGroup
					for i := range parallel {
						wg.Go(func() {
							for range count / parallel {
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
		}
		what := fmt.Sprintf("%d gpg --detach-sign, %d at a time, ", count, parallel)
		programs := compare(what+"ed25519", b.callers(t, "ed25519"), burst)[0]
		took := compare(what+"rsa4096", b.callers(t, "rsa4096"), burst)
		ofPossible(t, what+"rsa4096", took, programs, raw.takes(t, b.g, "bench-rsa4096", min(parallel, len(raw.sessions)), count))
	}
}

// takes is how long the module takes for n signatures with a key, in so many sessions at a time.
func (r *raw) takes(t *testing.T, g *gateway, key string, sessions, n int) time.Duration {
	t.Helper()
	var k struct {
		Algorithm keys.Algorithm `json:"algorithm"`
		TokenID   string         `json:"token_id"`
	}
	if err := json.Unmarshal([]byte(g.must(t, "signwarden", "key", "show", key, "-o", "json")), &k); err != nil {
		t.Fatal(err)
	}
	some := &raw{ctx: r.ctx, sessions: r.sessions[:sessions]}
	rates := []float64{}
	for range rounds {
		rates = append(rates, some.signer(t, k.Algorithm, k.TokenID)(time.Second))
	}
	slices.Sort(rates)
	return time.Duration(float64(n) / rates[rounds/2] * float64(time.Second))
}
