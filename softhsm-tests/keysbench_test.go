//go:build bench

package softhsm_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/signwarden/signwarden/gateway/audit"
	"github.com/signwarden/signwarden/gateway/client"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/store"
)

const manyKeys = 1000

// TestBenchKeys compares, with P-256, one key with a thousand, and one and eight
// callers with 128: all in turn, beside bare C_Sign in this process. A thousand
// keys have nine tenths of the rate of one, at least.
func TestBenchKeys(t *testing.T) {
	g := initGateway(t, shortDir(t)+"/gw")
	raw := newRaw(t, g)
	began := time.Now()
	first := raw.makeKeys(t, g, manyKeys)
	fmt.Printf("%d P-256 keys made in %v\n", manyKeys, time.Since(began).Round(time.Second))
	g.serve(t)
	c := g.client(t, "admin")
	load := keyLoad{t: t, c: c}
	load.warm()
	bare := raw.signer(t, keys.P256, hex.EncodeToString(first.ID))
	var ids []string
	for i := range manyKeys {
		ids = append(ids, hex.EncodeToString(benchKeyID(i)))
	}
	bareMany := raw.signer(t, keys.P256, ids...)

	const turn = time.Second
	type result struct {
		callers, keys int
		rates         []float64
	}
	results := []*result{{128, 1, nil}, {128, manyKeys, nil}, {8, 1, nil}, {8, manyKeys, nil}, {1, 1, nil}, {1, manyKeys, nil}}
	var bares, baresMany []float64
	for range rounds {
		bares, baresMany = append(bares, bare(turn)), append(baresMany, bareMany(turn))
		for _, r := range results {
			r.rates = append(r.rates, load.rate(r.callers, r.keys, turn))
		}
	}
	middle := func(v []float64) float64 { slices.Sort(v); return v[len(v)/2] }
	of := middle(bares)
	fmt.Printf("bare C_Sign, P-256, %d sessions of one process: %.0f/s; with %d keys in turn %.0f/s, %.2f of that\n",
		len(raw.sessions), of, manyKeys, middle(baresMany), middle(baresMany)/of)
	for i, r := range results {
		m := middle(r.rates)
		fmt.Printf("%3d callers, %4d keys: %6.0f/s, of bare C_Sign %.2f\n", r.callers, r.keys, m, m/of)
		if one := middle(results[i&^1].rates); r.keys > 1 {
			fmt.Printf("%3d callers: %d keys have %.2f of the rate of one\n", r.callers, r.keys, m/one)
			if m < 0.9*one {
				t.Errorf("%d callers: %d keys: %.0f/s, one key: %.0f/s", r.callers, r.keys, m, one)
			}
		}
	}
}

// makeKeys makes keys k0, k1 and so on in the token of a gateway that does not
// serve, and registers them in its store: a process for each, as key create
// starts one, would take minutes more.
func (r *raw) makeKeys(t *testing.T, g *gateway, n int) (first keys.Key) {
	t.Helper()
	slots, err := r.ctx.GetSlotList(true)
	if err != nil {
		t.Fatal(err)
	}
	sh, err := r.ctx.OpenSession(slots[0], pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	defer r.ctx.CloseSession(sh)
	s, err := store.OpenSQLite(t.Context(), g.dir+"/signwarden.db")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for i := range n {
		k := keys.Key{
			Name: fmt.Sprint("k", i), Algorithm: keys.P256, State: keys.Enabled, Token: "signwarden-dev",
			ID: benchKeyID(i), Created: time.Now().UTC().Truncate(time.Second),
		}
		k.Public = r.makeKey(t, sh, k)
		e := audit.Entry{Time: k.Created, Action: "key.create", Outcome: audit.Done, Principal: "bench", FrontEnd: "test", Key: k.Name}
		if _, err := s.Commit(t.Context(), store.Change{CreateKey: &k, Audit: [][]byte{e.Canonical()}}); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			first = k
		}
	}
	return first
}

func benchKeyID(i int) []byte { return fmt.Appendf(nil, "bench-key-%06d", i) }

func (r *raw) makeKey(t *testing.T, sh pkcs11.SessionHandle, k keys.Key) (spki []byte) {
	t.Helper()
	half := func(attrs ...*pkcs11.Attribute) []*pkcs11.Attribute {
		return append(attrs, pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_ID, k.ID), pkcs11.NewAttribute(pkcs11.CKA_LABEL, k.Name))
	}
	p256, err := asn1.Marshal(asn1.ObjectIdentifier{1, 2, 840, 10045, 3, 1, 7})
	if err != nil {
		t.Fatal(err)
	}
	pub, _, err := r.ctx.GenerateKeyPair(sh, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil)},
		half(pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, p256), pkcs11.NewAttribute(pkcs11.CKA_VERIFY, true)),
		half(pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true), pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
			pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false), pkcs11.NewAttribute(pkcs11.CKA_SIGN, true)))
	if err != nil {
		t.Fatal(err)
	}
	as, err := r.ctx.GetAttributeValue(sh, pub, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_EC_POINT, nil)})
	if err != nil {
		t.Fatal(err)
	}
	var point []byte
	if _, err := asn1.Unmarshal(as[0].Value, &point); err != nil {
		t.Fatal(err)
	}
	public, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point)
	if err != nil {
		t.Fatal(err)
	}
	if spki, err = x509.MarshalPKIXPublicKey(public); err != nil {
		t.Fatal(err)
	}
	return spki
}

// keyLoad signs with keys k0, k1 and so on, over one stream.
type keyLoad struct {
	t *testing.T
	c *client.Client
}

func (l keyLoad) sign(ctx context.Context, i, of int64) error {
	sum := sha256.Sum256(fmt.Append(nil, i))
	_, err := l.c.Sign(ctx, client.Request{Key: fmt.Sprint("k", i%of), Digest: sum[:], Hash: crypto.SHA256, Format: "openpgp"})
	return err
}

// warm has each worker find each key, which takes it some 10 ms in a token of so many: who
// gets which key is chance.
func (l keyLoad) warm() { l.run(128, manyKeys, func(i int64) bool { return i < 40*manyKeys }) }

// rate is how many signatures a second so many callers get for d.
func (l keyLoad) rate(callers, of int, d time.Duration) float64 {
	start := time.Now()
	n := l.run(callers, of, func(int64) bool { return time.Since(start) < d })
	return float64(n) / time.Since(start).Seconds()
}

func (l keyLoad) run(callers, of int, more func(i int64) bool) int64 {
	var next atomic.Int64
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			for {
				i := next.Add(1) - 1
				if !more(i) {
					return
				}
				if err := l.sign(l.t.Context(), i, int64(of)); err != nil {
					l.t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	return next.Load()
}
