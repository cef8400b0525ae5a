package worker

import (
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/signwarden/signwarden/hsm"
)

// As many starts may fail as there are workers, in a row and within hopeFor, before those
// who wait are told; none where an operator has to act.
func TestHopeful(t *testing.T) {
	gone := &hsm.Error{Class: hsm.ClassGone}
	tok := &Token{c: Config{Workers: 2}}
	for i, want := range []bool{true, true, false} {
		if tok.hopeful(gone) != want {
			t.Errorf("after %d failed starts: %v", i+1, !want)
		}
	}
	tok = &Token{c: Config{Workers: 2}, misses: 1, missed: time.Now().Add(-hopeFor)}
	if tok.hopeful(gone) {
		t.Errorf("%v after the first that failed", hopeFor)
	}
	tok = &Token{c: Config{Workers: 2}}
	if tok.hopeful(fmt.Errorf("starting: %w", &hsm.Error{Class: hsm.ClassOperator})) {
		t.Error("where the PIN is refused")
	}
}

// What lends its sessions is a worker that answers, and of those the one with the least to do.
func TestBorrow(t *testing.T) {
	tok := &Token{closing: t.Context(), c: Config{Workers: 4}}
	for _, p := range []*process{{draining: true}, {stalled: true}, {inFlight: make([]*call, 2)}, {inFlight: make([]*call, 1)}, {inFlight: make([]*call, 2)}} {
		p.t, p.log, p.retire, p.dead = tok, slog.New(slog.DiscardHandler), make(chan struct{}, 1), make(chan struct{})
		close(p.dead)
		tok.live = append(tok.live, p)
	}
	giveBack := tok.borrow(t.Context())
	for i, p := range tok.live {
		if (p.lent != nil) != (i == 3) {
			t.Errorf("worker %d lends: %v", i, p.lent != nil)
		}
	}
	giveBack()
	select {
	case <-tok.live[3].lent:
	default:
		t.Error("they are not given back")
	}
}

// The PIN that was read last is the one that counts, however long it took to read another.
func TestPINReadLast(t *testing.T) {
	entered, reloaded := make(chan struct{}), make(chan struct{})
	first := true
	tok := &Token{pin: hsm.NewPIN("first"), log: slog.New(slog.DiscardHandler)}
	tok.c.ReadPIN = func() (hsm.PIN, error) {
		if !first {
			return hsm.NewPIN("last"), nil
		}
		first = false
		close(entered)
		select {
		case <-reloaded: // which waits for us, or should
		case <-time.After(50 * time.Millisecond):
		}
		return hsm.NewPIN("old"), nil
	}
	var both sync.WaitGroup
	both.Go(func() { _ = tok.ReadPIN() })
	<-entered
	both.Go(func() { _ = tok.ReadPIN(); close(reloaded) })
	both.Wait()
	if tok.pin.Reveal() != "last" {
		t.Errorf("the PIN is %q", tok.pin.Reveal())
	}
}
