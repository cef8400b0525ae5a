package gateway_test

import (
	"context"
	"crypto"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/signwarden/signwarden/gateway"
	"github.com/signwarden/signwarden/gateway/audit"
	"github.com/signwarden/signwarden/gateway/gatewaytest"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
	"github.com/signwarden/signwarden/gateway/store"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// twoTeams: alice signs with a-*, bob with b-*; neither sees the other's keys.
const twoTeams = gatewaytest.Policy + `
  - {name: team-a, principals: [alice], keys: ["a-*"], may: [sign, read], formats: [openpgp], blind: true}
  - {name: team-b, principals: [bob], keys: ["b-*"], may: [sign, read], formats: ["*"], blind: true}
  - {name: readers, principals: [carol], keys: ["*"], may: [read]}
`

func TestSign(t *testing.T) {
	f := gatewaytest.New(t, twoTeams)
	for _, a := range keys.Algorithms {
		t.Run(string(a), func(t *testing.T) {
			k := f.Key(t, "a-"+string(a), a)
			reg, err := keys.NewRegistry([]keys.Key{k})
			if err != nil {
				t.Fatal(err)
			}
			r := gatewaytest.Request(k.Name, "text")
			r.ID, r.Claim.File = "id-"+string(a), "disc.iso"
			before := f.Token.Signs()
			sig, err := f.Sign(t.Context(), gatewaytest.Principal(t, "alice"), r)
			if err != nil {
				t.Fatal(err)
			}
			err = keys.Verify(reg.Get(k.Name).PublicKey, sig.Scheme, r.Hash, r.Digest, sig.Bytes)
			if err != nil {
				t.Errorf("signature: %v", err)
			}
			if got := f.Token.Signs() - before; got != 1 {
				t.Errorf("the token signed %d times, want 1", got)
			}
			e := f.Store.Last(t)
			sum := sha256.Sum256(sig.Bytes)
			want := audit.Entry{
				Time: e.Time, Action: "sign", Outcome: audit.Signed, Principal: "alice", Via: "unix:0", FrontEnd: "test",
				Request: r.ID, Key: k.Name, KeyFingerprint: k.Fingerprint(), Format: "openpgp", Hash: "sha256",
				Digest: hex.EncodeToString(r.Digest), Scheme: string(sig.Scheme), Rule: "team-a",
				Signature: hex.EncodeToString(sum[:]), ClaimFile: "disc.iso",
			}
			if e != want {
				t.Errorf("audit entry\n got %+v\nwant %+v", e, want)
			}
			if rows := f.Store.Entries(t); int(sig.AuditRow) != len(rows)-1 {
				t.Errorf("audit row %d, want %d", sig.AuditRow, len(rows)-1)
			}
		})
	}
}

// Property 1: what no rule allows never reaches the token, and is recorded.
func TestSignDenied(t *testing.T) {
	f := gatewaytest.New(t, twoTeams)
	f.Key(t, "a-1", keys.P256)
	f.Key(t, "b-1", keys.Ed25519)
	if _, err := f.SetKeyState(t.Context(), f.Root, "test", "b-1", keys.Disabled); err != nil {
		t.Fatal(err)
	}
	sum1 := sha1.Sum([]byte("x"))
	edit := func(change func(*gateway.Request)) func(string) gateway.Request {
		return func(key string) gateway.Request {
			r := gatewaytest.Request(key, "text")
			change(&r)
			return r
		}
	}
	plain := edit(func(*gateway.Request) {})
	tests := []struct {
		name, who, key string
		request        func(string) gateway.Request
		want           error
		reason         string // in the audit log
	}{
		{"unknown key", "alice", "a-none", plain, sigerr.NotFound, "no such key"},
		{"another's key", "alice", "b-1", plain, sigerr.NotFound, "not the caller's"},
		{"impossible name", "alice", "../etc", plain, sigerr.NotFound, ""},
		{"nobody's rule", "mallory", "a-1", plain, sigerr.NotFound, "not the caller's"},
		{"reader", "carol", "a-1", plain, sigerr.Denied, `"readers" does not give sign`},
		{"format", "alice", "a-1", edit(func(r *gateway.Request) { r.Format = "rpm" }), sigerr.Denied, `does not allow the format "rpm"`},
		{"no such format", "alice", "a-1", edit(func(r *gateway.Request) { r.Format = "tarball" }), sigerr.Invalid, "tarball"},
		{"disabled", "bob", "b-1", plain, sigerr.Disabled, "b-1"},
		{"sha-1", "alice", "a-1", edit(func(r *gateway.Request) { r.Digest, r.Hash = sum1[:], crypto.SHA1 }), sigerr.Invalid, "SHA-1"},
		{"no hash", "alice", "a-1", edit(func(r *gateway.Request) { r.Hash = 0 }), sigerr.Invalid, ""},
		{"digest length", "alice", "a-1", edit(func(r *gateway.Request) { r.Hash = crypto.SHA512 }), sigerr.Invalid, "32 bytes"},
		{"no digest", "alice", "a-1", edit(func(r *gateway.Request) { r.Digest = nil }), sigerr.Invalid, "0 bytes"},
		{"scheme", "alice", "a-1", edit(func(r *gateway.Request) { r.Scheme = keys.PSS }), sigerr.Invalid, "rsa-pss"},
		{"salt", "alice", "a-1", edit(func(r *gateway.Request) { r.SaltLength = 32 }), sigerr.Invalid, "only RSA-PSS has a salt"},
		{"id", "alice", "a-1", edit(func(r *gateway.Request) { r.ID = "a b" }), sigerr.Invalid, "idempotency id"},
		{"long id", "alice", "a-1", edit(func(r *gateway.Request) { r.ID = strings.Repeat("x", 65) }), sigerr.Invalid, "idempotency id"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			rows := len(f.Store.Entries(t))
			before := f.Token.Signs()
			sig, err := f.Sign(t.Context(), gatewaytest.Principal(t, tt.who), tt.request(tt.key))
			if !errors.Is(err, tt.want) {
				t.Errorf("got error %v, want %v", err, tt.want)
			}
			if sig.Bytes != nil {
				t.Error("a signature came with the error")
			}
			if got := f.Token.Signs(); got != before {
				t.Errorf("the token was asked %d times, want 0", got-before)
			}
			all := f.Store.Entries(t)
			if len(all) != rows+1 {
				t.Fatalf("%d audit entries were added, want 1", len(all)-rows)
			}
			e := all[rows]
			if e.Outcome != audit.Denied || e.Principal != tt.who || e.Key != tt.key || !strings.Contains(e.Reason, tt.reason) {
				t.Errorf("audit entry %+v; want denied, with the reason %q", e, tt.reason)
			}
		})
	}
}

// Property 2: what the token returns is verified.
func TestSignVerifies(t *testing.T) {
	for _, a := range []keys.Algorithm{keys.RSA2048, keys.P256, keys.Ed25519} {
		t.Run(string(a), func(t *testing.T) {
			f := gatewaytest.New(t, "")
			id := string(f.Key(t, "k", a).ID)
			f.Token.After = func(sig []byte) []byte { sig[len(sig)-1] ^= 1; return sig }
			sig, err := f.Sign(t.Context(), f.Root, gatewaytest.Request("k", "text"))
			if !errors.Is(err, sigerr.TokenFailed) || sig.Bytes != nil {
				t.Errorf("got %x, %v; want no signature and a token failure", sig.Bytes, err)
			}
			if e := f.Store.Last(t); e.Outcome != audit.Failed || e.Signature != "" || !strings.Contains(e.Reason, "does not verify") {
				t.Errorf("audit entry %+v", e)
			}
			f.Token.After = func(sig []byte) []byte { return sig[1:] }
			if _, err := f.Sign(t.Context(), f.Root, gatewaytest.Request("k", "text")); !errors.Is(err, sigerr.TokenFailed) {
				t.Errorf("a short signature: got %v, want a token failure", err)
			}
			if got := f.Token.Doubted(); !slices.Equal(got, []string{id, id}) {
				t.Errorf("the token is told to look again at %q, want twice the key", got)
			}
		})
	}
}

// Property 3: without a record nothing is released, whether the commit failed
// or only seemed to; and the gateway works again when the store does.
func TestSignUnrecorded(t *testing.T) {
	boom := errors.New("disk full")
	for name, fail := range map[string]func(store.Change) (error, error){
		"failed":               func(store.Change) (error, error) { return boom, nil },
		"failed but persisted": func(store.Change) (error, error) { return nil, boom },
	} {
		t.Run(name, func(t *testing.T) {
			f := gatewaytest.New(t, twoTeams)
			f.Key(t, "a-1", keys.P256)
			f.Store.SetFail(fail, nil)
			sig, err := f.Sign(t.Context(), f.Root, gatewaytest.Request("a-1", "text"))
			if !errors.Is(err, sigerr.Unavailable) || sig.Bytes != nil {
				t.Errorf("got %x, %v; want no signature and Unavailable", sig.Bytes, err)
			}
			if strings.Contains(err.Error(), boom.Error()) {
				t.Errorf("the store's words reach the caller: %v", err)
			}
			// A denial that cannot be recorded tells no more than that.
			_, err = f.Sign(t.Context(), gatewaytest.Principal(t, "alice"), gatewaytest.Request("b-1", "text"))
			if !errors.Is(err, sigerr.Unavailable) || errors.Is(err, sigerr.NotFound) {
				t.Errorf("denial: got %v, want Unavailable", err)
			}
			f.Store.SetFail(nil, nil)
			if _, err := f.Sign(t.Context(), f.Root, gatewaytest.Request("a-1", "text")); err != nil {
				t.Errorf("after the store recovered: %v", err)
			}
		})
	}
}

// The record is durable before Sign returns, not after.
func TestSignWaitsForRecord(t *testing.T) {
	f := gatewaytest.New(t, "")
	f.Key(t, "k", keys.Ed25519)
	committing, release := make(chan struct{}), make(chan struct{})
	f.Store.SetFail(func(store.Change) (error, error) {
		close(committing)
		<-release
		return nil, nil
	}, nil)
	ctx, hangUp := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := f.Sign(ctx, f.Root, gatewaytest.Request("k", "text"))
		done <- err
	}()
	<-committing
	select {
	case err := <-done:
		t.Fatalf("Sign returned (%v) before the record was durable", err)
	default:
	}
	hangUp() // too late to cancel the record
	close(release)
	if err := <-done; err != nil {
		t.Errorf("got %v; a caller that hangs up must not cancel the record", err)
	}
	f.Store.SetFail(nil, nil)
	if e := f.Store.Last(t); e.Outcome != audit.Signed {
		t.Errorf("audit entry %+v, want signed", e)
	}
}

// Property 4: a key that one may not use and one that does not exist are told
// in the same words, whatever else the request says.
func TestSignTellsNothingOfOthersKeys(t *testing.T) {
	f := gatewaytest.New(t, twoTeams)
	f.Key(t, "b-1", keys.Ed25519)
	alice := gatewaytest.Principal(t, "alice")
	for _, change := range []func(*gateway.Request){
		func(*gateway.Request) {},
		func(r *gateway.Request) { r.Format = "kmod" },
		func(r *gateway.Request) { r.Scheme = keys.PSS },
		func(r *gateway.Request) { r.Scheme, r.SaltLength = keys.PSS, 1<<20 },
		func(r *gateway.Request) { r.ID = "same" },
		func(r *gateway.Request) { r.Digest = nil },
	} {
		var texts []string
		for _, key := range []string{"b-1", "b-none"} {
			r := gatewaytest.Request(key, "text")
			change(&r)
			_, err := f.Sign(t.Context(), alice, r)
			if err == nil {
				t.Fatal("allowed")
			}
			texts = append(texts, err.Error())
		}
		if texts[0] != texts[1] {
			t.Errorf("existing: %q; absent: %q", texts[0], texts[1])
		}
	}
	_, err1 := f.SetKeyState(t.Context(), alice, "test", "b-1", keys.Disabled)
	_, err2 := f.SetKeyState(t.Context(), alice, "test", "b-none", keys.Disabled)
	_, err3 := f.Gateway.Key(t.Context(), alice, "b-1")
	_, err4 := f.Gateway.Key(t.Context(), alice, "b-none")
	for _, err := range []error{err1, err2, err3, err4} {
		if err == nil || err.Error() != sigerr.NotFound.Error() {
			t.Errorf("got %v, want the words of sigerr.NotFound alone", err)
		}
	}
}

// A key that is disabled while the token works signs, and is not released.
func TestDisabledWhileSigning(t *testing.T) {
	f := gatewaytest.New(t, "")
	f.Key(t, "k", keys.Ed25519)
	f.Token.Before = func(context.Context, []byte) error {
		_, err := f.SetKeyState(t.Context(), f.Root, "test", "k", keys.Disabled)
		return err
	}
	_, err := f.Sign(t.Context(), f.Root, gatewaytest.Request("k", "text"))
	if !errors.Is(err, sigerr.Disabled) {
		t.Errorf("got %v, want Disabled", err)
	}
	if e := f.Store.Last(t); e.Outcome != audit.Denied || !strings.Contains(e.Reason, "while the token worked") {
		t.Errorf("audit entry %+v", e)
	}
}

func TestTokenErrors(t *testing.T) {
	for _, tt := range []struct {
		name string
		err  error
		want error
	}{
		{"failure", errors.New("CKR_DEVICE_ERROR in slot 7"), sigerr.TokenFailed},
		{"busy", busy{}, sigerr.Overloaded},
		{"taken", taken{}, sigerr.Conflict},
		{"deadline", context.DeadlineExceeded, sigerr.Timeout},
		{"hang up", context.Canceled, sigerr.Canceled},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := gatewaytest.New(t, "")
			f.Key(t, "k", keys.Ed25519)
			f.Token.Before = func(context.Context, []byte) error { return tt.err }
			_, err := f.Sign(t.Context(), f.Root, gatewaytest.Request("k", "text"))
			if !errors.Is(err, tt.want) || strings.Contains(err.Error(), "slot 7") {
				t.Errorf("got %v, want %v without the token's words", err, tt.want)
			}
			if e := f.Store.Last(t); e.Outcome != audit.Failed || e.Reason != tt.err.Error() {
				t.Errorf("audit entry %+v, want failed with %q", e, tt.err)
			}
		})
	}
}

// What the token's queue refuses is told as that, with when to try again, and not
// recorded: a flood of refusals must not become a flood of commits.
func TestTokenQueue(t *testing.T) {
	f := gatewaytest.New(t, gatewaytest.Policy+`
  - {name: heavy, principals: [alice], keys: [k], may: [sign], formats: [openpgp], blind: true, weight: 7}
`)
	f.Key(t, "k", keys.Ed25519)
	alice := gatewaytest.Principal(t, "alice")
	if _, err := f.Sign(t.Context(), alice, gatewaytest.Request("k", "text")); err != nil {
		t.Fatal(err)
	}
	if by, weight := f.Token.Last(); by != "alice" || weight != 7 {
		t.Errorf("the token was asked for %q with weight %d, want alice, 7", by, weight)
	}
	rows := len(f.Store.Entries(t))
	f.Token.Before = func(context.Context, []byte) error { return fmt.Errorf("sign: %w", full{}) }
	_, err := f.Sign(t.Context(), alice, gatewaytest.Request("k", "text"))
	r, ok := errors.AsType[interface {
		error
		RetryAfter() time.Duration
	}](err)
	if !errors.Is(err, sigerr.Overloaded) || !ok || r.RetryAfter() != 70*time.Millisecond || !strings.Contains(err.Error(), "no place") {
		t.Errorf("got %v, want Overloaded for 70 ms, and why", err)
	}
	if got := len(f.Store.Entries(t)); got != rows {
		t.Errorf("%d rows recorded", got-rows)
	}
}

type full struct{}

func (full) Error() string             { return "no place" }
func (full) Busy() bool                { return true }
func (full) RetryAfter() time.Duration { return 70 * time.Millisecond }

type taken struct{}

func (taken) Error() string { return "label is taken" }
func (taken) Exists() bool  { return true }

type busy struct{}

func (busy) Error() string { return "busy" }
func (busy) Busy() bool    { return true }

// A change that was stored and could not be read while the token worked: the
// signature is not released.
func TestStaleWhileSigning(t *testing.T) {
	boom := errors.New("disk")
	f := gatewaytest.New(t, "")
	f.Key(t, "k", keys.Ed25519)
	f.Token.Before = func(context.Context, []byte) error {
		f.Store.SetFail(func(store.Change) (error, error) { return nil, boom }, boom)
		if _, err := f.SetKeyState(t.Context(), f.Root, "test", "k", keys.Disabled); !errors.Is(err, sigerr.Unavailable) {
			t.Errorf("disabling: got %v, want Unavailable", err)
		}
		f.Store.SetFail(nil, nil)
		return nil
	}
	sig, err := f.Sign(t.Context(), f.Root, gatewaytest.Request("k", "text"))
	if !errors.Is(err, sigerr.Disabled) || sig.Bytes != nil {
		t.Errorf("got %x, %v; want no signature, and Disabled", sig.Bytes, err)
	}
}
