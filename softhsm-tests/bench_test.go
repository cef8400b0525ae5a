//go:build bench

package softhsm_test

import (
	"crypto"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/signwarden/signwarden/gateway/keys"
)

// rounds is how often each pair of measurements is taken, alternating, so that
// what else the machine does meets both sides alike. Medians are compared.
const rounds = 5

// TestBench measures and prints; it fails where a claim of the README does not
// hold. Figures are ratios: the machine's own speed cancels out.
func TestBench(t *testing.T) {
	g := newGateway(t)
	for _, a := range []string{"rsa4096", "rsa2048", "p256", "ed25519"} {
		g.key(t, "bench-"+a, a)
	}
	t.Run("rpmsign", func(t *testing.T) { benchRPMSign(t, g) })
	t.Run("gpg", func(t *testing.T) { benchGPG(t, g) })
	t.Run("stream", func(t *testing.T) { benchStream(t, g) })
}

// median of durations.
func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

// alternate takes both measurements in turn and returns their medians.
func alternate(t *testing.T, ours, theirs func() time.Duration) (time.Duration, time.Duration) {
	t.Helper()
	var a, b []time.Duration
	for range rounds {
		b = append(b, theirs())
		a = append(a, ours())
	}
	return median(a), median(b)
}

func timed(f func()) time.Duration {
	start := time.Now()
	f()
	return time.Since(start)
}

// realAgent makes a GNUPGHOME with a key of its own behind a real gpg-agent, which
// has been started. The key has no passphrase: the agent's best case.
func realAgent(t *testing.T, algorithm string) []string {
	t.Helper()
	home := shortDir(t)
	env := append(os.Environ(), "GNUPGHOME="+home)
	mustEnv(t, env, "gpg", "--batch", "--quiet", "--passphrase", "", "--quick-generate-key", "real <real@example.org>", algorithm, "sign", "never")
	t.Cleanup(func() {
		kill := exec.Command("gpgconf", "--kill", "gpg-agent")
		kill.Env = env
		if err := kill.Run(); err != nil {
			t.Error(err)
		}
	})
	return env
}

// bothAgents are the environments of a gpg with our agent and of one with its own, for
// keys of one type.
func bothAgents(t *testing.T, g *gateway, algorithm string) (ours, theirs []string) {
	t.Helper()
	ours, socket := g.home(t, "bench-"+algorithm)
	g.agentAt(t, socket)
	return ours, realAgent(t, algorithm)
}

// 100 small packages in one rpmsign, with its own agent and with ours.
func benchRPMSign(t *testing.T, g *gateway) {
	files := hundredRPMs(t)
	for _, b := range []struct {
		algorithm string
		atLeast   float64
	}{{"rsa4096", 2}, {"rsa2048", 1}, {"ed25519", 1}} {
		ourEnv, real := bothAgents(t, g, b.algorithm)
		sign := func(env []string, user string) func() time.Duration {
			args := append([]string{"--define", "__gpg /usr/bin/gpg", "--define", "_gpg_name " + user, "--resign"}, files...)
			return func() time.Duration { return timed(func() { mustEnv(t, env, "rpmsign", args...) }) }
		}
		ours, theirs := alternate(t, sign(ourEnv, "bench-"+b.algorithm+"@example.org"), sign(real, "real@example.org"))
		allOK(t, g.rpmdb(t, "bench-"+b.algorithm), files)
		report(t, "rpmsign of 100 packages, "+b.algorithm, ours, theirs, b.atLeast)
	}
	real := realAgent(t, "rsa4096")
	ours, theirs := alternate(t,
		func() time.Duration {
			return timed(func() {
				g.must(t, "signwarden", append([]string{"exec", "--", "rpmsign", "--define", "_gpg_name bench-rsa4096@example.org", "--resign"}, files...)...)
			})
		},
		func() time.Duration {
			return timed(func() {
				mustEnv(t, real, "rpmsign", append([]string{"--define", "__gpg /usr/bin/gpg", "--define", "_gpg_name real@example.org", "--resign"}, files...)...)
			})
		})
	report(t, "rpmsign of 100 packages, rsa4096, the making of exec's home included", ours, theirs, 1)
}

// 100 files, one gpg --detach-sign each: one after another, and 40 at a time.
func benchGPG(t *testing.T, g *gateway) {
	file := filepath.Join(t.TempDir(), "file")
	writeFile(t, file, "to be signed")
	ourEnv, real := bothAgents(t, g, "rsa4096")
	const user, realUser = "bench-rsa4096@example.org", "real@example.org"
	loop := func(env []string, user string) func() time.Duration {
		return func() time.Duration {
			return timed(func() {
				for range 100 {
					mustEnv(t, env, "gpg", "--batch", "--yes", "-u", user, "--detach-sign", file)
				}
			})
		}
	}
	ours, theirs := alternate(t, loop(ourEnv, user), loop(real, realUser))
	report(t, "100 times gpg --detach-sign, rsa4096", ours, theirs, 1)

	const parallel, each = 40, 5
	dir := t.TempDir()
	burst := func(env []string, user string) func() time.Duration {
		return func() time.Duration {
			return timed(func() {
				var wg sync.WaitGroup
				for i := range parallel {
					wg.Go(func() {
						for range each {
							cmd := exec.Command("gpg", "--batch", "--yes", "-u", user, "-o", filepath.Join(dir, fmt.Sprint(i)), "--detach-sign", file)
							cmd.Env = env
							if out, err := cmd.CombinedOutput(); err != nil {
								t.Errorf("gpg as %s: %v: %s", user, err, out)
							}
						}
					})
				}
				wg.Wait()
			})
		}
	}
	ours, theirs = alternate(t, burst(ourEnv, user), burst(real, realUser))
	report(t, fmt.Sprintf("%d gpg --detach-sign, %d at a time, rsa4096", parallel*each, parallel), ours, theirs, 1.8)
}

// report prints a ratio and fails below what is claimed of it.
func report(t *testing.T, what string, ours, theirs time.Duration, atLeast float64) {
	t.Helper()
	ratio := theirs.Seconds() / ours.Seconds()
	fmt.Printf("%s: ours %.2f s, real gpg-agent %.2f s: %.2f times as fast\n", what, ours.Seconds(), theirs.Seconds(), ratio)
	if ratio < atLeast {
		t.Errorf("%s: ours is %.2f times as fast, and should be at least %.1f times", what, ratio, atLeast)
	}
}

// Signatures over one gRPC stream, client and server on this machine, beside a
// bare loop of C_SignInit and C_Sign on the same key of the same token.
func benchStream(t *testing.T, g *gateway) {
	raw := newRaw(t, g)
	for _, a := range []string{"rsa4096", "rsa2048", "p256", "ed25519"} {
		var key struct {
			TokenID string `json:"token_id"`
		}
		if err := json.Unmarshal([]byte(g.must(t, "signwarden", "key", "show", "bench-"+a, "-o", "json")), &key); err != nil {
			t.Fatal(err)
		}
		sign := raw.signer(t, keys.Algorithm(a), key.TokenID)
		ours, theirs := map[int][]float64{}, []float64(nil)
		callers := []int{1, 8, 128}
		for range rounds {
			theirs = append(theirs, sign(2*time.Second))
			for _, n := range callers {
				var r struct {
					PerSecond float64 `json:"signatures_per_second"`
				}
				out := g.must(t, "signwarden", "bench", "sign", "--key", "bench-"+a, "--concurrency", fmt.Sprint(n), "--duration", "2s", "-o", "json")
				if err := json.Unmarshal([]byte(out), &r); err != nil {
					t.Fatal(err)
				}
				ours[n] = append(ours[n], r.PerSecond)
			}
		}
		slices.Sort(theirs)
		for _, n := range callers {
			slices.Sort(ours[n])
			o, r := ours[n][rounds/2], theirs[rounds/2]
			fmt.Printf("one gRPC stream, %s, %d callers: %.0f/s, raw C_Sign %.0f/s: ratio %.2f\n", a, n, o, r, o/r)
		}
	}
}

// raw is the module loaded by this process, on the gateway's token.
type raw struct {
	ctx      *pkcs11.Ctx
	sessions []pkcs11.SessionHandle // one for each CPU
}

func newRaw(t *testing.T, g *gateway) *raw {
	t.Helper()
	t.Setenv("SOFTHSM2_CONF", g.dir+"/token/softhsm2.conf")
	pin, err := os.ReadFile(g.dir + "/token/user.pin")
	if err != nil {
		t.Fatal(err)
	}
	r := &raw{ctx: pkcs11.New(softhsmModule(t))}
	if err := r.ctx.Initialize(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.ctx.Finalize(); r.ctx.Destroy() })
	slots, err := r.ctx.GetSlotList(true)
	if err != nil {
		t.Fatal(err)
	}
	for i := range runtime.NumCPU() {
		s, err := r.ctx.OpenSession(slots[0], pkcs11.CKF_SERIAL_SESSION)
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			if err := r.ctx.Login(s, pkcs11.CKU_USER, strings.TrimSpace(string(pin))); err != nil {
				t.Fatal(err)
			}
		}
		r.sessions = append(r.sessions, s)
	}
	return r
}

// signer finds a key and returns a loop that signs for d on every session and
// tells the rate.
func (r *raw) signer(t *testing.T, a keys.Algorithm, hexID string) func(d time.Duration) float64 {
	t.Helper()
	id, err := hex.DecodeString(hexID)
	if err != nil {
		t.Fatal(err)
	}
	s := r.sessions[0]
	if err := r.ctx.FindObjectsInit(s, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), pkcs11.NewAttribute(pkcs11.CKA_ID, id),
	}); err != nil {
		t.Fatal(err)
	}
	found, _, err := r.ctx.FindObjects(s, 2)
	if err != nil || len(found) != 1 {
		t.Fatalf("the token has %d keys with id %s (%v)", len(found), hexID, err)
	}
	if err := r.ctx.FindObjectsFinal(s); err != nil {
		t.Fatal(err)
	}
	data := make([]byte, crypto.SHA256.Size())
	mechanism := pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil)
	switch a {
	case keys.RSA2048, keys.RSA4096:
		mechanism = pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS, nil)
		data = append([]byte("\x30\x31\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x01\x05\x00\x04\x20"), data...)
	case keys.Ed25519:
		mechanism = pkcs11.NewMechanism(0x1057, nil) // CKM_EDDSA, PKCS#11 v3.0
	}
	return func(d time.Duration) float64 {
		counts := make([]int, len(r.sessions))
		var wg sync.WaitGroup
		start := time.Now()
		for i, s := range r.sessions {
			wg.Go(func() {
				for time.Since(start) < d {
					if err := r.ctx.SignInit(s, []*pkcs11.Mechanism{mechanism}, found[0]); err != nil {
						t.Error(err)
						return
					}
					if _, err := r.ctx.Sign(s, data); err != nil {
						t.Error(err)
						return
					}
					counts[i]++
				}
			})
		}
		wg.Wait()
		n := 0
		for _, c := range counts {
			n += c
		}
		return float64(n) / time.Since(start).Seconds()
	}
}
