package gateway_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signwarden/signwarden/gateway"
	"github.com/signwarden/signwarden/gateway/audit"
	"github.com/signwarden/signwarden/gateway/gatewaytest"
	"github.com/signwarden/signwarden/gateway/ident"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// held is a gateway whose token answers nothing before release is closed.
type held struct {
	*gatewaytest.Fixture
	alice, bob ident.Principal // with keys a-1 and b-1
	entered    chan struct{}   // a request has reached the token
	release    chan struct{}
	under      sync.WaitGroup
}

func newHeld(t *testing.T, change func(*gateway.Config)) *held {
	t.Helper()
	h := &held{
		Fixture: gatewaytest.New(t, twoTeams, change), alice: gatewaytest.Principal(t, "alice"), bob: gatewaytest.Principal(t, "bob"),
		entered: make(chan struct{}), release: make(chan struct{}),
	}
	h.Key(t, "a-1", keys.Ed25519)
	h.Key(t, "b-1", keys.Ed25519)
	h.Token.Before = func(context.Context, []byte) error {
		select {
		case h.entered <- struct{}{}:
		case <-h.release:
		}
		<-h.release
		return nil
	}
	return h
}

func (h *held) try(t *testing.T, p ident.Principal, key string) error {
	_, err := h.Sign(t.Context(), p, gatewaytest.Request(key, "text"))
	return err
}

// begin has a request reach the token, where it stays.
func (h *held) begin(t *testing.T, p ident.Principal, key string) {
	t.Helper()
	h.under.Go(func() {
		if err := h.try(t, p, key); err != nil {
			t.Errorf("within the bounds: %v", err)
		}
	})
	<-h.entered
}

// overloaded asserts that a request is refused at once, and returns after how long it
// may be sent again.
func (h *held) overloaded(t *testing.T, p ident.Principal, key string) time.Duration {
	t.Helper()
	err := h.try(t, p, key)
	r, ok := errors.AsType[interface {
		error
		RetryAfter() time.Duration
	}](err)
	if !errors.Is(err, sigerr.Overloaded) || !ok {
		t.Fatalf("got %v, want Overloaded, and when to try again", err)
	}
	return r.RetryAfter()
}

// Those who flood leave places for who has none.
func TestBoundsReserve(t *testing.T) {
	h := newHeld(t, func(c *gateway.Config) { c.MaxInFlight = 16 })
	for range 14 {
		h.begin(t, h.alice, "a-1")
	}
	h.overloaded(t, h.alice, "a-1") // the fifteenth of sixteen
	h.begin(t, h.bob, "b-1")
	close(h.release)
	h.under.Wait()
}

func TestBounds(t *testing.T) {
	h := newHeld(t, func(c *gateway.Config) { c.MaxInFlight, c.MaxPerPrincipal = 3, 2 })
	h.begin(t, h.alice, "a-1")
	h.begin(t, h.alice, "a-1")
	if after := h.overloaded(t, h.alice, "a-1"); after != 50*time.Millisecond {
		t.Errorf("alice's third: try again after %v, and nothing is known of how long hers take", after)
	}
	h.begin(t, h.bob, "b-1")
	h.overloaded(t, h.bob, "b-1") // the fourth of all
	close(h.release)
	h.under.Wait()
	if err := h.try(t, h.alice, "a-1"); err != nil {
		t.Errorf("after the others have ended: %v", err)
	}
}

// Who is refused is told to wait for half of what his requests take: from the first that
// has ended, and no longer than a second.
func TestRetryAfter(t *testing.T) {
	for took, want := range map[time.Duration]time.Duration{
		10 * time.Millisecond: 50 * time.Millisecond, 400 * time.Millisecond: 200 * time.Millisecond, 10 * time.Second: time.Second,
	} {
		synctest.Test(t, func(t *testing.T) {
			h := newHeld(t, func(c *gateway.Config) { c.MaxPerPrincipal = 2 })
			rest := make(chan struct{})
			first := true
			h.Token.Before = func(context.Context, []byte) error {
				if first {
					first = false
					time.Sleep(took)
					return nil
				}
				<-rest
				return nil
			}
			one := make(chan error)
			go func() { one <- h.try(t, h.alice, "a-1") }()
			synctest.Wait()
			another := func() {
				h.under.Go(func() {
					if err := h.try(t, h.alice, "a-1"); err != nil {
						t.Error(err)
					}
				})
				synctest.Wait()
			}
			another()
			if err := <-one; err != nil {
				t.Error(err)
			}
			another()
			if after := h.overloaded(t, h.alice, "a-1"); after != want {
				t.Errorf("where one took %v: try again after %v, want %v", took, after, want)
			}
			close(rest)
			h.under.Wait()
			h.Close()
		})
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
