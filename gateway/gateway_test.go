package gateway_test

import (
	"context"
	"crypto"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/signwarden/signwarden/gateway"
	"github.com/signwarden/signwarden/gateway/audit"
	"github.com/signwarden/signwarden/gateway/gatewaytest"
	"github.com/signwarden/signwarden/gateway/ident"
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
			f.Key(t, "k", a)
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

func TestIdempotency(t *testing.T) {
	f := gatewaytest.New(t, "")
	f.Key(t, "k", keys.P256) // ECDSA: signing twice gives two signatures
	r := gatewaytest.Request("k", "text")
	r.ID = "once"
	rows := len(f.Store.Entries(t))
	var wg sync.WaitGroup
	sigs := make([]gateway.Signature, 8)
	for i := range sigs {
		wg.Go(func() { sigs[i], _ = f.Sign(t.Context(), f.Root, r) })
	}
	wg.Wait()
	for _, s := range sigs {
		if string(s.Bytes) != string(sigs[0].Bytes) || s.AuditRow != sigs[0].AuditRow || len(s.Bytes) == 0 {
			t.Errorf("got %x in row %d and %x in row %d; want one signature", s.Bytes, s.AuditRow, sigs[0].Bytes, sigs[0].AuditRow)
		}
	}
	if got := len(f.Store.Entries(t)) - rows; got != 1 || f.Token.Signs() != 1 {
		t.Errorf("%d audit rows and %d signatures, want 1 of each", got, f.Token.Signs())
	}
	other := gatewaytest.Request("k", "other")
	other.ID = "once"
	if _, err := f.Sign(t.Context(), f.Root, other); !errors.Is(err, sigerr.Conflict) {
		t.Errorf("the same id for another digest: got %v, want Conflict", err)
	}
	if e := f.Store.Last(t); e.Outcome != audit.Denied || e.Request != "once" {
		t.Errorf("audit entry %+v, want denied", e)
	}
	// After a failure the same id may be sent again.
	f.Token.Before = func(context.Context, []byte) error { return errors.New("down") }
	r.ID = "again"
	if _, err := f.Sign(t.Context(), f.Root, r); !errors.Is(err, sigerr.TokenFailed) {
		t.Fatalf("got %v, want a token failure", err)
	}
	f.Token.Before = nil
	if _, err := f.Sign(t.Context(), f.Root, r); err != nil {
		t.Errorf("sent again: %v", err)
	}
	// A key that has been disabled gives no old signature away either.
	if _, err := f.SetKeyState(t.Context(), f.Root, "test", "k", keys.Disabled); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Sign(t.Context(), f.Root, r); !errors.Is(err, sigerr.Disabled) {
		t.Errorf("an id of before the key was disabled: got %v, want Disabled", err)
	}
}

// A caller that hangs up and comes back with its id finds the work done once.
func TestIdempotencyAcrossHangUp(t *testing.T) {
	f := gatewaytest.New(t, "")
	f.Key(t, "k", keys.P256)
	entered, release := make(chan struct{}), make(chan struct{})
	f.Token.Before = func(ctx context.Context, _ []byte) error {
		close(entered)
		<-release
		return ctx.Err()
	}
	r := gatewaytest.Request("k", "text")
	r.ID = "id"
	ctx, hangUp := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var first, second gateway.Signature
	wg.Go(func() { first, _ = f.Sign(ctx, f.Root, r) })
	<-entered
	hangUp()
	wg.Go(func() { second, _ = f.Sign(t.Context(), f.Root, r) })
	close(release)
	wg.Wait()
	if len(second.Bytes) == 0 || string(first.Bytes) != string(second.Bytes) || f.Token.Signs() != 1 {
		t.Errorf("got %x and %x with %d signatures; want one signature twice", first.Bytes, second.Bytes, f.Token.Signs())
	}
}

// Ids are forgotten after a minute or two, and not before one minute.
func TestIdempotencyExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := gatewaytest.New(t, "")
		f.Key(t, "k", keys.P256)
		r := gatewaytest.Request("k", "text")
		r.ID = "id"
		var want []byte
		for _, step := range []struct {
			wait time.Duration
			same bool
		}{{0, true}, {59 * time.Second, true}, {3 * time.Minute, false}} {
			time.Sleep(step.wait)
			other := r
			other.ID = "tick" // makes time pass for the table
			if _, err := f.Sign(t.Context(), f.Root, other); err != nil {
				t.Fatal(err)
			}
			sig, err := f.Sign(t.Context(), f.Root, r)
			if err != nil {
				t.Fatal(err)
			}
			if want != nil && (string(want) == string(sig.Bytes)) != step.same {
				t.Errorf("after %v more: the same signature %v, want %v", step.wait, !step.same, step.same)
			}
			want = sig.Bytes
		}
		f.Close()
	})
}

// Those who flood leave places for who has none.
func TestBoundsReserve(t *testing.T) {
	f := gatewaytest.New(t, twoTeams, func(c *gateway.Config) { c.MaxInFlight = 16 })
	f.Key(t, "a-1", keys.Ed25519)
	f.Key(t, "b-1", keys.Ed25519)
	alice, bob := gatewaytest.Principal(t, "alice"), gatewaytest.Principal(t, "bob")
	entered, release := make(chan struct{}, 16), make(chan struct{})
	f.Token.Before = func(context.Context, []byte) error {
		entered <- struct{}{}
		<-release
		return nil
	}
	var wg sync.WaitGroup
	sign := func(p ident.Principal, key string) {
		wg.Go(func() {
			if _, err := f.Sign(t.Context(), p, gatewaytest.Request(key, "text")); err != nil {
				t.Errorf("within the bounds: %v", err)
			}
		})
		<-entered
	}
	for range 14 {
		sign(alice, "a-1")
	}
	if _, err := f.Sign(t.Context(), alice, gatewaytest.Request("a-1", "text")); !errors.Is(err, sigerr.Overloaded) {
		t.Errorf("alice's fifteenth of sixteen: got %v, want Overloaded", err)
	}
	sign(bob, "b-1")
	close(release)
	wg.Wait()
}

func TestBounds(t *testing.T) {
	f := gatewaytest.New(t, twoTeams, func(c *gateway.Config) { c.MaxInFlight, c.MaxPerPrincipal = 3, 2 })
	f.Key(t, "a-1", keys.Ed25519)
	f.Key(t, "b-1", keys.Ed25519)
	alice, bob := gatewaytest.Principal(t, "alice"), gatewaytest.Principal(t, "bob")
	entered, release := make(chan struct{}, 4), make(chan struct{})
	f.Token.Before = func(context.Context, []byte) error {
		entered <- struct{}{}
		<-release
		return nil
	}
	var wg sync.WaitGroup
	sign := func(p ident.Principal, key string) {
		wg.Go(func() {
			if _, err := f.Sign(t.Context(), p, gatewaytest.Request(key, "text")); err != nil {
				t.Errorf("within the bounds: %v", err)
			}
		})
		<-entered
	}
	sign(alice, "a-1")
	sign(alice, "a-1")
	if _, err := f.Sign(t.Context(), alice, gatewaytest.Request("a-1", "text")); !errors.Is(err, sigerr.Overloaded) {
		t.Errorf("alice's third: got %v, want Overloaded", err)
	} else if r, ok := errors.AsType[interface {
		error
		RetryAfter() time.Duration
	}](err); !ok || r.RetryAfter() < 50*time.Millisecond || r.RetryAfter() > time.Second {
		t.Errorf("alice's third: got %v, want when to try again", err)
	}
	sign(bob, "b-1")
	if _, err := f.Sign(t.Context(), bob, gatewaytest.Request("b-1", "text")); !errors.Is(err, sigerr.Overloaded) {
		t.Errorf("the fourth of all: got %v, want Overloaded", err)
	}
	close(release)
	wg.Wait()
	if _, err := f.Sign(t.Context(), alice, gatewaytest.Request("a-1", "text")); err != nil {
		t.Errorf("after the others have ended: %v", err)
	}
}

func TestRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := gatewaytest.New(t, gatewaytest.Policy+`
  - {name: slow, principals: [alice], keys: [k], may: [sign], formats: [openpgp], blind: true, rate: 2/m}
`)
		f.Key(t, "k", keys.Ed25519)
		alice := gatewaytest.Principal(t, "alice")
		sign := func() error {
			_, err := f.Sign(t.Context(), alice, gatewaytest.Request("k", "text"))
			return err
		}
		for range 2 {
			if err := sign(); err != nil {
				t.Fatal(err)
			}
		}
		err := sign()
		r, ok := errors.AsType[interface {
			error
			RetryAfter() time.Duration
		}](err)
		if !errors.Is(err, sigerr.Overloaded) || !ok || r.RetryAfter() != 30*time.Second || !strings.Contains(err.Error(), "2/m") {
			t.Errorf("the third within a minute: got %v, want Overloaded for 30 s by the rate 2/m", err)
		}
		if e := f.Store.Last(t); e.Outcome != audit.Denied || e.Rule != "slow" {
			t.Errorf("audit entry %+v, want denied by rule slow", e)
		}
		// Another administrative act does not refill the bucket.
		f.Key(t, "other", keys.Ed25519)
		if err := sign(); !errors.Is(err, sigerr.Overloaded) {
			t.Errorf("after another key was created: got %v, want Overloaded", err)
		}
		time.Sleep(30 * time.Second)
		if err := sign(); err != nil {
			t.Errorf("half a minute later: %v", err)
		}
		f.Close()
	})
}

// A request that finds no place at the token does not count for its rule's rate.
func TestRateOfRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := gatewaytest.New(t, gatewaytest.Policy+`
  - {name: slow, principals: [alice], keys: [k], may: [sign], formats: [openpgp], blind: true, rate: 2/m}
`)
		f.Key(t, "k", keys.Ed25519)
		alice := gatewaytest.Principal(t, "alice")
		sign := func() error {
			_, err := f.Sign(t.Context(), alice, gatewaytest.Request("k", "text"))
			return err
		}
		f.Token.Before = func(context.Context, []byte) error { return full{} }
		for range 5 {
			if err := sign(); !errors.Is(err, sigerr.Overloaded) || strings.Contains(err.Error(), "2/m") {
				t.Errorf("no place: got %v, want Overloaded by the token", err)
			}
		}
		f.Token.Before = nil
		for range 2 {
			if err := sign(); err != nil {
				t.Errorf("one of two a minute: %v", err)
			}
		}
		if err := sign(); !errors.Is(err, sigerr.Overloaded) || !strings.Contains(err.Error(), "2/m") {
			t.Errorf("the third: got %v, want Overloaded by the rate", err)
		}
		f.Close()
	})
}

func TestSignTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := gatewaytest.New(t, "", func(c *gateway.Config) { c.SignTimeout = time.Second })
		f.Key(t, "k", keys.Ed25519)
		f.Token.Before = func(ctx context.Context, _ []byte) error { <-ctx.Done(); return ctx.Err() }
		for _, id := range []string{"", "with-id"} {
			r := gatewaytest.Request("k", "text")
			r.ID = id
			if _, err := f.Sign(t.Context(), f.Root, r); !errors.Is(err, sigerr.Timeout) {
				t.Errorf("id %q: got %v, want Timeout", id, err)
			}
		}
		f.Close()
	})
}

// The same id of another principal, or for another format, is another request.
func TestIdempotencyIsOfOnePrincipal(t *testing.T) {
	f := gatewaytest.New(t, gatewaytest.Policy+`
  - {name: both, principals: [alice, bob], keys: [k], may: [sign], formats: ["*"], blind: true}
`)
	f.Key(t, "k", keys.P256)
	r := gatewaytest.Request("k", "text")
	r.ID = "id"
	var sigs []gateway.Signature
	for _, who := range []string{"alice", "bob"} {
		sig, err := f.Sign(t.Context(), gatewaytest.Principal(t, who), r)
		if err != nil {
			t.Fatal(err)
		}
		sigs = append(sigs, sig)
	}
	if string(sigs[0].Bytes) == string(sigs[1].Bytes) || sigs[0].AuditRow == sigs[1].AuditRow {
		t.Error("bob got alice's signature")
	}
	r.Format = "rpm"
	if _, err := f.Sign(t.Context(), gatewaytest.Principal(t, "alice"), r); !errors.Is(err, sigerr.Conflict) {
		t.Errorf("the same id for another format: got %v, want Conflict", err)
	}
}

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

// One who may do nothing cannot fill the log, and others do not notice.
func TestDenialsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := gatewaytest.New(t, twoTeams)
		f.Key(t, "a-1", keys.Ed25519)
		mallory := gatewaytest.Principal(t, "mallory")
		before, told := len(f.Store.Entries(t)), 0
		for range 5000 {
			r := gatewaytest.Request("a-1", "text")
			r.Claim.Note = strings.Repeat("\x01", 4096)
			_, err := f.Sign(t.Context(), mallory, r)
			switch {
			case errors.Is(err, sigerr.Overloaded):
				told++
			case !errors.Is(err, sigerr.NotFound):
				t.Fatal(err)
			}
		}
		rows := len(f.Store.Entries(t)) - before
		if rows < 1000 || rows > 1100 || rows+told != 5000 {
			t.Errorf("5000 denials left %d rows, and %d were told of overload", rows, told)
		}
		if n := len(f.Store.Last(t).Canonical()); n > 8<<10 {
			t.Errorf("an entry has %d bytes", n)
		}
		if _, err := f.Sign(t.Context(), gatewaytest.Principal(t, "alice"), gatewaytest.Request("a-1", "text")); err != nil {
			t.Errorf("alice: %v", err)
		}
		time.Sleep(time.Minute)
		if _, err := f.Sign(t.Context(), mallory, gatewaytest.Request("a-1", "text")); !errors.Is(err, sigerr.NotFound) {
			t.Errorf("a minute later: got %v, want NotFound", err)
		}
		if e := f.Store.Last(t); !strings.Contains(e.Detail, "denials before this one were not recorded") {
			t.Errorf("audit entry %+v does not tell of the others", e)
		}
		f.Close()
	})
}
