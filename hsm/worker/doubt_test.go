package worker_test

import (
	"crypto"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/signwarden/signwarden/hsm"
	"github.com/signwarden/signwarden/hsm/worker"
)

// Workers are replaced where one does not find a key, and those that come after them not
// before they are twice as old: the key may be gone for good.
func TestDoubt(t *testing.T) {
	const first = 200 * time.Millisecond
	worker.SetReplacePause(t, time.Millisecond)
	worker.SetMinDoubt(t, first)
	tok := open(t, newToken(t))
	pub := generate(t, tok, "k", "p256")
	pids := func() (pids []int) {
		for _, w := range tok.Workers() {
			pids = append(pids, w.PID)
		}
		slices.Sort(pids)
		return pids
	}
	until(t, "two workers serve", func() bool { return len(pids()) == 2 })
	miss := func() {
		t.Helper()
		if _, err := tok.Sign(t.Context(), "", 1, []byte("missing"), digest(1), crypto.SHA256); !errors.Is(err, hsm.ErrNotFound) {
			t.Errorf("got %v, want ErrNotFound", err)
		}
	}
	replaced := func(was []int) (n int) {
		for _, pid := range was {
			if !slices.Contains(pids(), pid) {
				n++
			}
		}
		return n
	}
	time.Sleep(2 * first)
	was := pids()
	for range 10 {
		if err := signNow(t, tok, pub, 1); err != nil {
			t.Error(err)
		}
	}
	if n := replaced(was); n != 0 {
		t.Errorf("%d workers replaced that found their keys", n)
	}
	began := time.Now()
	until(t, "both are replaced", func() bool { miss(); return replaced(was) == 2 })
	until(t, "two workers serve", func() bool { return len(pids()) == 2 })
	was = pids()
	until(t, "both are replaced", func() bool { miss(); return replaced(was) == 2 })
	if took := time.Since(began); took < 2*first {
		t.Errorf("replaced again after %v", took)
	}
	// And whose signatures are somebody else's.
	until(t, "two workers serve", func() bool { return len(pids()) == 2 })
	was = pids()
	until(t, "both are replaced", func() bool { tok.Doubt(nil); return replaced(was) == 2 })
	if err := signNow(t, tok, pub, 1); err != nil {
		t.Error(err)
	}
}
