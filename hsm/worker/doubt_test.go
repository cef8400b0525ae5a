package worker_test

import (
	"crypto"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/signwarden/signwarden/hsm"
	"github.com/signwarden/signwarden/hsm/worker"
)

// Workers are replaced where one does not find a key, all at once, and not again before
// twice the time has gone by: the key may be gone for good.
func TestDoubt(t *testing.T) {
	worker.SetReplacePause(t, time.Millisecond)
	c := newToken(t)
	c.Workers = 4
	tok := open(t, c)
	pub := generate(t, tok, "k", "p256")
	for range 2 {
		until(t, "four workers serve", func() bool { return len(pids(tok)) == 4 })
		was := pids(tok)
		for range 10 {
			if err := signNow(t, tok, pub, 1); err != nil {
				t.Error(err)
			}
		}
		if n := replaced(tok, was); n != 0 {
			t.Errorf("%d workers replaced that found their keys", n)
		}
		if _, err := tok.Sign(t.Context(), "", 1, []byte("missing"), digest(1), crypto.SHA256); !errors.Is(err, hsm.ErrNotFound) {
			t.Errorf("got %v, want ErrNotFound", err)
		}
		until(t, "all are replaced", func() bool { return replaced(tok, was) == 4 })
		worker.ForgetDoubts(tok)
	}
	// And where their signatures are somebody else's.
	until(t, "four workers serve", func() bool { return len(pids(tok)) == 4 })
	was := pids(tok)
	tok.Doubt(nil)
	until(t, "all are replaced", func() bool { return replaced(tok, was) == 4 })
	if err := signNow(t, tok, pub, 1); err != nil {
		t.Error(err)
	}
}

// Where the token has no session for a successor, who is in doubt ends first.
func TestDoubtWithoutSession(t *testing.T) {
	for _, workers := range []int{1, 2} {
		worker.SetReplacePause(t, time.Millisecond)
		tok, m, pub := faultyToken(t, func(c *worker.Config) { c.Sessions, c.Workers = 1, workers })
		until(t, "each worker has a session and one for the login", func() bool { return m.Sessions() == 2*workers })
		m.Set(t, fmt.Sprintf("sessions_total %d", 2*workers))
		was := pids(tok)
		starts := m.Calls("C_Initialize")
		tok.Doubt(nil)
		until(t, "all are replaced", func() bool { return replaced(tok, was) == workers && len(pids(tok)) == workers })
		if err := signNow(t, tok, pub, 1); err != nil {
			t.Error(err)
		}
		if n := m.Calls("C_Initialize") - starts; n > 4*workers {
			t.Errorf("%d processes started for %d workers", n, workers)
		}
	}
}

// A worker that is old ends before its successor has a session only while another serves.
func TestRecycledWithoutSession(t *testing.T) {
	worker.SetReplacePause(t, time.Millisecond)
	for _, workers := range []int{1, 2} {
		tok, m, pub := faultyToken(t, func(c *worker.Config) { c.Sessions, c.Workers, c.RecycleOps = 1, workers, 100 })
		until(t, "each worker has a session and one for the login", func() bool { return m.Sessions() == 2*workers })
		m.Set(t, fmt.Sprintf("sessions_total %d", 2*workers))
		was, starts := pids(tok), m.Calls("C_Initialize")
		end := signing(t, tok, pub)
		until(t, "a successor was tried", func() bool { return m.Calls("C_Initialize") > starts })
		if workers > 1 {
			until(t, "one is replaced", func() bool { return replaced(tok, was) > 0 && len(pids(tok)) == workers })
		}
		signed := m.Calls("C_Sign")
		until(t, "it signs on, and more were tried", func() bool { return m.Calls("C_Sign") > signed+500 && m.Calls("C_Initialize") > starts+3 })
		if workers == 1 && replaced(tok, was) > 0 {
			t.Error("the only worker ended before it had a successor")
		}
		end()
	}
}

func pids(tok *worker.Token) (pids []int) {
	for _, w := range tok.Workers() {
		pids = append(pids, w.PID)
	}
	return pids
}

// replaced is how many of these serve no more.
func replaced(tok *worker.Token, was []int) (n int) {
	now := pids(tok)
	for _, pid := range was {
		if !slices.Contains(now, pid) {
			n++
		}
	}
	return n
}

// The pauses: 5 s, then twice as long, up to 2 minutes; forgotten after 10.
func TestDoubtPauses(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	var got []time.Duration
	last := now
	due := worker.Doubts()
	for range 3600 { // asked once a second
		if due(now) {
			got = append(got, now.Sub(last))
			last = now
		}
		now = now.Add(time.Second)
	}
	want := []time.Duration{0, 5 * time.Second, 10 * time.Second, 20 * time.Second, 40 * time.Second, 80 * time.Second, 2 * time.Minute, 2 * time.Minute}
	if len(got) < len(want) || !slices.Equal(got[:len(want)], want) {
		t.Errorf("pauses %v, want %v and so on", got, want)
	}
	now = now.Add(11 * time.Minute)
	if !due(now) || due(now.Add(4*time.Second)) || !due(now.Add(5*time.Second)) {
		t.Error("what was 11 minutes ago is not forgotten")
	}
}
