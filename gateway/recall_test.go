package gateway_test

import (
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signwarden/signwarden/gateway"
	"github.com/signwarden/signwarden/gateway/gatewaytest"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// again is a second gateway over the store and the token of f, as after a kill.
func again(t *testing.T, f *gatewaytest.Fixture, now func() time.Time) *gateway.Gateway {
	t.Helper()
	g, err := gateway.New(t.Context(), gateway.Config{Store: f.Store, Token: f.Token, TokenLabel: "memory", Now: now})
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// A request that was recorded and sent again after the gateway was killed gets
// the same signature, whatever the algorithm, and no second record.
func TestIdempotencyAcrossRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := gatewaytest.New(t, twoTeams)
		for _, a := range []keys.Algorithm{keys.RSA2048, keys.P256, keys.Ed25519} {
			f.Key(t, "b-"+string(a), a)
		}
		bob := gatewaytest.Principal(t, "bob")
		ask := func(key string, scheme keys.Scheme) gateway.Request {
			r := gatewaytest.Request("b-"+key, key)
			r.ID, r.Scheme = "id-"+key+string(scheme), scheme
			return r
		}
		requests := []gateway.Request{ask("rsa2048", ""), ask("rsa2048", keys.PSS), ask("p256", ""), ask("ed25519", "")}
		var first []gateway.Signature
		for _, r := range requests {
			sig, err := f.Sign(t.Context(), bob, r)
			if err != nil {
				t.Fatal(err)
			}
			first = append(first, sig)
		}
		if _, err := f.Sign(t.Context(), bob, gatewaytest.Request("b-p256", "no id")); err != nil {
			t.Fatal(err)
		}
		rows, signs := len(f.Store.Entries(t)), f.Token.Signs()

		g := again(t, f, nil)
		defer g.Close()
		for i, r := range requests {
			sig, err := g.Sign(t.Context(), bob, r)
			if err != nil || !slices.Equal(sig.Bytes, first[i].Bytes) || sig.Scheme != first[i].Scheme || sig.AuditRow != first[i].AuditRow {
				t.Errorf("%s: got %+v, %v; want the first answer", r.ID, sig, err)
			}
		}
		if got := len(f.Store.Entries(t)); got != rows || f.Token.Signs() != signs {
			t.Errorf("%d more records, %d more signatures; want none", got-rows, f.Token.Signs()-signs)
		}
		other := requests[0]
		other.Digest = slices.Clone(other.Digest)
		other.Digest[0] ^= 1
		if _, err := g.Sign(t.Context(), bob, other); !errors.Is(err, sigerr.Conflict) {
			t.Errorf("the id with other content: %v, want Conflict", err)
		}
		// Another principal's is another id, and what a rule no longer allows is not
		// answered from memory.
		if _, err := g.Sign(t.Context(), f.Root, requests[2]); err != nil || f.Token.Signs() != signs+1 {
			t.Errorf("another principal: %v, %d more signatures; want one", err, f.Token.Signs()-signs)
		}
		if _, err := g.SetKeyState(t.Context(), f.Root, "test", "b-p256", keys.Disabled); err != nil {
			t.Fatal(err)
		}
		if _, err := g.Sign(t.Context(), bob, requests[2]); !errors.Is(err, sigerr.Disabled) {
			t.Errorf("of a disabled key: %v, want Disabled", err)
		}

		// After a minute it is forgotten.
		late := again(t, f, func() time.Time { return time.Now().Add(time.Minute) })
		defer late.Close()
		if _, err := late.Sign(t.Context(), bob, requests[3]); err != nil || f.Token.Signs() != signs+2 {
			t.Errorf("a minute later: %v, %d more signatures; want two", err, f.Token.Signs()-signs)
		}
	})
}
