package worker_test

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/signwarden/signwarden/hsm"
	"github.com/signwarden/signwarden/hsm/worker"
	"github.com/signwarden/signwarden/softhsm-tests/faultp11"
)

// faultyToken is a token behind the module that fails as it is told.
func faultyToken(t *testing.T, change func(*worker.Config)) (*worker.Token, *faultp11.Module, crypto.PublicKey) {
	t.Helper()
	so, err := faultp11.Build(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	c, m := newToken(t), faultp11.New(t, softhsm)
	m.Env["SOFTHSM2_CONF"] = c.Env["SOFTHSM2_CONF"]
	c.Module, c.Env = so, m.Env
	change(&c)
	tok := open(t, c)
	return tok, m, generate(t, tok, "k", "p256")
}

// signNow signs something with key k and verifies it.
func signNow(t *testing.T, tok *worker.Token, pub crypto.PublicKey, n int64) error {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	sig, err := tok.Sign(ctx, "", 1, []byte("k"), digest(n), crypto.SHA256)
	if err != nil {
		return err
	}
	return check(pub, digest(n), sig, crypto.SHA256)
}

// Who is with a worker that hangs does not wait until it is killed: here that would be
// for ever. Its successor starts meanwhile.
func TestStalled(t *testing.T) {
	for _, workers := range []int{1, 2} {
		t.Run(fmt.Sprint(workers), func(t *testing.T) {
			tok, m, pub := faultyToken(t, func(c *worker.Config) { c.Workers, c.CallTimeout = workers, time.Hour })
			if err := signNow(t, tok, pub, 0); err != nil {
				t.Fatal(err)
			}
			before := map[int]bool{}
			for _, w := range tok.Workers() {
				before[w.PID] = true
			}
			m.Set(t, "C_Sign nth=1 hang")
			var wg sync.WaitGroup
			for i := range int64(20) {
				wg.Go(func() {
					if err := signNow(t, tok, pub, i); err != nil {
						t.Errorf("request %d: %v", i, err)
					}
				})
			}
			wg.Wait()
			until(t, "there is a successor", func() bool {
				for _, w := range tok.Workers() {
					if !before[w.PID] {
						return true
					}
				}
				return false
			})
			for _, w := range tok.Workers() { // or Close would wait for it as long as it may take
				if w.InFlight > 0 {
					if err := syscall.Kill(w.PID, syscall.SIGKILL); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
}

// A worker that is slow and not hung: whose answer comes first counts, and nothing is
// killed or lost.
func TestSlow(t *testing.T) {
	tok, m, pub := faultyToken(t, func(c *worker.Config) { c.CallTimeout = time.Hour })
	for _, rules := range [][]string{
		{"C_SignInit nth=1 delay=700"},         // the other one is first
		{"C_SignInit times=2 delay=600"},       // both are slow, the first one answers first
		{"C_SignInit p=0.2 delay=500 times=9"}, // some of many
	} {
		m.Set(t, rules...)
		var wg sync.WaitGroup
		for i := range int64(40) {
			wg.Go(func() {
				if err := signNow(t, tok, pub, i); err != nil {
					t.Errorf("%q: request %d: %v", rules, i, err)
				}
			})
		}
		wg.Wait()
	}
	// A caller who leaves while his request is with two workers.
	m.Set(t, "C_SignInit delay=1000")
	ctx, cancel := context.WithTimeout(t.Context(), 700*time.Millisecond)
	defer cancel()
	if _, err := tok.Sign(ctx, "", 1, []byte("k"), digest(1), crypto.SHA256); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a caller who left: %v", err)
	}
	m.Set(t)
	for i := range int64(20) {
		if err := signNow(t, tok, pub, i); err != nil {
			t.Errorf("afterwards: %v", err)
		}
	}
}

// A request that hangs each worker is asked of two that are killed for it, and then fails.
func TestHangsEach(t *testing.T) {
	tok, m, pub := faultyToken(t, func(c *worker.Config) { c.CallTimeout = 700 * time.Millisecond })
	m.Set(t, "C_Sign hang")
	err := signNow(t, tok, pub, 1)
	if e, ok := errors.AsType[*hsm.Error](err); !ok || e.Class != hsm.ClassCrashed {
		t.Errorf("got %v, want class H", err)
	}
	if n := m.Calls("C_Sign"); n > 4 {
		t.Errorf("asked of %d workers", n)
	}
	m.Set(t)
	if err := signNow(t, tok, pub, 2); err != nil {
		t.Errorf("the next one: %v", err)
	}
}

// The first start may take StartTimeout; a later one that hangs is ended long before, and
// a token that is slow to start from now on comes up in the end.
func TestStartHangs(t *testing.T) {
	tok, m, pub := faultyToken(t, func(c *worker.Config) { c.Workers, c.StartTimeout = 1, time.Hour })
	for _, rule := range []string{"C_Login nth=1 hang", "C_Initialize nth=1 hang", "C_Login delay=2500"} {
		m.Set(t, rule)
		for _, w := range tok.Workers() {
			if err := syscall.Kill(w.PID, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
		until(t, "it signs after "+rule, func() bool { return m.Injected(0) > 0 && signNow(t, tok, pub, 1) == nil })
	}
}

// signing has some callers sign until the end, and returns that.
func signing(t *testing.T, tok *worker.Token, pub crypto.PublicKey) (end func()) {
	var wg sync.WaitGroup
	var stop atomic.Bool
	for range 8 {
		wg.Go(func() {
			for n := int64(0); !stop.Load(); n++ {
				if err := signNow(t, tok, pub, n); err != nil {
					t.Errorf("signature %d: %v", n, err)
				}
			}
		})
	}
	return func() { stop.Store(true); wg.Wait() }
}

// A token of which some calls are slow costs a login when that is new, and not for each
// such call: what is late follows from what was slow.
func TestSlowLogins(t *testing.T) {
	tok, m, pub := faultyToken(t, func(c *worker.Config) { c.CallTimeout = 10 * time.Second })
	end := signing(t, tok, pub)
	until(t, "it signs", func() bool { return m.Calls("C_Sign") > 200 })
	before := m.Calls("C_Login")
	m.Set(t, "C_Sign every=50 delay=2500")
	until(t, "some were slow", func() bool { return m.Injected(0) >= 8 })
	first := m.Calls("C_Login") - before
	until(t, "many were slow", func() bool { return m.Injected(0) >= 16 })
	later := m.Calls("C_Login") - before - first
	m.Set(t)
	end()
	t.Logf("%d logins, then %d", first, later)
	// One for each worker, and one a second until the first slow answer is there.
	if first > 2+3 || later > 0 {
		t.Errorf("%d logins of two workers, then %d", first, later)
	}
}

// Workers that stall again and again have no more successors than one for each.
func TestStallsOften(t *testing.T) {
	tok, m, pub := faultyToken(t, func(c *worker.Config) { c.CallTimeout = time.Hour })
	end := signing(t, tok, pub)
	until(t, "it signs", func() bool { return m.Calls("C_Sign") > 200 })
	before := m.Calls("C_Login")
	m.Set(t, "C_Sign every=20 hang")
	until(t, "all workers hang", func() bool { return m.Injected(0) >= 4 })
	if n := m.Calls("C_Login") - before; n > 2 {
		t.Errorf("%d logins of two workers, when the fourth hangs", n)
	}
	m.Set(t)
	signed := m.Calls("C_Sign")
	until(t, "it signs again", func() bool { return m.Calls("C_Sign") > signed+100 }) // beyond those, one starts after a pause
	end()
	for _, w := range tok.Workers() { // or Close would wait for it as long as it may take
		if w.InFlight > 0 {
			if err := syscall.Kill(w.PID, syscall.SIGKILL); err != nil {
				t.Error(err)
			}
		}
	}
}

// A token that has no session left for an act gets one of a worker's, and gives it back.
func TestLends(t *testing.T) {
	tok, m, pub := faultyToken(t, func(*worker.Config) {})
	m.Set(t, "sessions_total 4")
	l := newLoad(t, tok, pub, 8)
	for i := range 3 {
		id := fmt.Sprint("other ", i)
		generate(t, tok, id, "p256")
		if err := tok.Delete(t.Context(), []byte(id)); err != nil {
			t.Errorf("Delete: %v", err)
		}
		l.wait(t, 100)
	}
	l.end()
	until(t, "there are two workers", func() bool { return len(tok.Workers()) == 2 })
	if n := m.Sessions(); n > 4 {
		t.Errorf("%d sessions", n)
	}
	// None to be had from anybody: it is said, and not waited for.
	m.Set(t, "C_OpenSession rv=0xb1")
	if _, err := tok.Generate(t.Context(), "none", []byte("none"), "p256"); err == nil {
		t.Error("a key was made without a session")
	}
	m.Set(t)
	until(t, "there are two workers", func() bool { return len(tok.Workers()) == 2 })
	generate(t, tok, "last", "p256")
}

// One session that is left is enough for every act: it is the one of the login, so that
// there is one C_Login, and no worker lends any.
func TestLastSession(t *testing.T) {
	tok, m, _ := faultyToken(t, func(c *worker.Config) { c.Sessions = 1 })
	until(t, "each worker has a session and one for the login", func() bool { return m.Sessions() == 4 })
	m.Set(t, "sessions_total 5")
	workers := tok.Workers()
	for _, act := range []struct {
		name string
		do   func() error
	}{
		{"generate", func() error { _, err := tok.Generate(t.Context(), "other", []byte("other"), "p256"); return err }},
		{"import", func() error { _, err := tok.Import(t.Context(), "imported", []byte("imported"), newKey(t)); return err }},
		{"list", func() error { _, err := tok.List(t.Context()); return err }},
		{"delete", func() error { return tok.Delete(t.Context(), []byte("other")) }},
	} {
		logins := m.Calls("C_Login")
		if err := act.do(); err != nil {
			t.Errorf("%s: %v", act.name, err)
		}
		if n := m.Calls("C_Login") - logins; n != 1 {
			t.Errorf("%s: %d logins", act.name, n)
		}
	}
	if got := tok.Workers(); !slices.EqualFunc(got, workers, func(a, b worker.Worker) bool { return a.PID == b.PID }) {
		t.Errorf("workers %+v, before the acts %+v", got, workers)
	}
}

// Sessions that would end while nobody asks anything are kept alive.
func TestKeptAlive(t *testing.T) {
	tok, m, pub := faultyToken(t, func(c *worker.Config) { c.KeepAlive = 50 * time.Millisecond })
	if err := signNow(t, tok, pub, 1); err != nil {
		t.Fatal(err)
	}
	before := m.Calls("C_GetSessionInfo")
	until(t, "they are asked", func() bool { return m.Calls("C_GetSessionInfo") >= before+8 })
	if err := signNow(t, tok, pub, 2); err != nil {
		t.Error(err)
	}
}
