package gateway_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signwarden/signwarden/gateway"
	"github.com/signwarden/signwarden/gateway/audit"
	"github.com/signwarden/signwarden/gateway/gatewaytest"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

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
