//go:build bench

package softhsm_test

import (
	"crypto"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
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
	g := initGateway(t, shortDir(t)+"/gw")
	b := newAgentBench(t, g)
	for _, a := range []string{"rsa4096", "rsa2048", "p256", "ed25519"} {
		g.key(t, "bench-"+a, a)
	}
	t.Run("rpmsign", b.rpmsign)
	t.Run("gpg", b.gpg)
	t.Run("stream", func(t *testing.T) { benchStream(t, g) })
}

// median of durations.
func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

// alternate takes the measurements in turn, so many rounds of them, and returns the
// median of each.
func alternate(measure ...func() time.Duration) []time.Duration {
	all := make([][]time.Duration, len(measure))
	for range rounds {
		for i, m := range measure {
			all[i] = append(all[i], m())
		}
	}
	out := make([]time.Duration, len(measure))
	for i := range all {
		out[i] = median(all[i])
	}
	return out
}

func timed(f func()) time.Duration {
	start := time.Now()
	f()
	return time.Since(start)
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
		callers := []int{1, 8, 128, 400}
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

// find is the handle of the private key with an id.
func (r *raw) find(t *testing.T, hexID string) pkcs11.ObjectHandle {
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
	return found[0]
}

// signer finds keys and returns a loop that signs with each in turn, for d on every session, and
// tells the rate.
func (r *raw) signer(t *testing.T, a keys.Algorithm, hexIDs ...string) func(d time.Duration) float64 {
	t.Helper()
	var found []pkcs11.ObjectHandle
	for _, hexID := range hexIDs {
		found = append(found, r.find(t, hexID))
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
					if err := r.ctx.SignInit(s, []*pkcs11.Mechanism{mechanism}, found[(counts[i]*len(r.sessions)+i)%len(found)]); err != nil {
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
