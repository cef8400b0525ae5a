package worker_test

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/signwarden/signwarden/hsm/worker"
)

// stopped opens a token with one worker that stands still until the returned
// function is called, and has a key "k".
func stopped(t *testing.T, c worker.Config) (*worker.Token, func()) {
	t.Helper()
	c.Workers, c.Depth, c.CallTimeout = 1, 1, time.Hour
	tok := open(t, c)
	generate(t, tok, "k", "p256")
	pid := tok.Workers()[0].PID
	stop(t, pid)
	resume := sync.OnceFunc(func() {
		if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(resume)
	return tok, resume
}

// stop stops a process, and returns when each of its threads has stopped: until the first
// has taken the signal the others go on.
func stop(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	until(t, "all its threads have stopped", func() bool {
		stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		return err == nil && len(stats) > 0 && !slices.ContainsFunc(stats, func(name string) bool {
			b, err := os.ReadFile(name)
			return err == nil && !strings.Contains(string(b), ") T ")
		})
	})
}

// Somebody who floods the token is served in turn with others, by weight.
func TestFair(t *testing.T) {
	tok, resume := stopped(t, newToken(t))
	var mu sync.Mutex
	var order []string
	var wg sync.WaitGroup
	ask := func(by string, weight, n int) {
		before := tok.Stats()
		for range n {
			wg.Go(func() {
				_, err := tok.Sign(t.Context(), by, weight, []byte("k"), digest(1), crypto.SHA256)
				if err != nil {
					t.Errorf("%s: %v", by, err)
				}
				mu.Lock()
				order = append(order, by)
				mu.Unlock()
			})
		}
		until(t, "all wait", func() bool {
			s := tok.Stats()
			return s.Waiting+s.InFlight == before.Waiting+before.InFlight+n
		})
	}
	ask("flood", 1, 100)
	ask("lone", 1, 2)
	ask("heavy", 10, 20)
	resume()
	wg.Wait()
	// Of the first 40, by a wide margin: goroutines are told in no order.
	first := order[:40]
	count := func(by string) (n int) {
		for _, o := range first {
			if o == by {
				n++
			}
		}
		return n
	}
	if count("lone") != 2 || count("heavy") != 20 {
		t.Errorf("of the first 40 answers %d were to lone and %d to heavy, want 2 and 20: %q", count("lone"), count("heavy"), first)
	}
	if i := slices.Index(order, "lone"); i > 15 {
		t.Errorf("who asked once was answered as number %d", i+1)
	}
}

// In a child what is urgent goes first, but for what may have crashed another, and does
// not keep the rest out.
func TestUrgentOrder(t *testing.T) {
	for kinds, want := range map[string][]uint32{
		"":             nil,
		"sss":          {0, 1, 2},
		"ssu":          {2, 0, 1},
		"susu":         {1, 3, 0, 2},
		"uss":          {0, 1, 2},
		"xsu":          {0, 2, 1},
		"sxsu":         {0, 1, 3, 2},
		"suxu":         {1, 0, 2, 3},
		"suuuuuuuuuus": {1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 10, 11},
		"uuuuuuuuuus":  {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10},
	} {
		if got := worker.Order(kinds); !slices.Equal(got, want) {
			t.Errorf("%q: %v, want %v", kinds, got, want)
		}
	}
}

// The parent knows in which order a child works: it blames the first for a crash, where
// that has met one before.
func TestUrgentPlaces(t *testing.T) {
	for range 2000 {
		kinds := make([]byte, 1+rand.IntN(8)) // of 9, all urgent, one of the rest would be done between
		for i := range kinds {
			kinds[i] = "ssuux"[rand.IntN(5)]
		}
		want := []uint32{0} // begun before the others came
		for _, n := range worker.Order(string(kinds[1:])) {
			want = append(want, n+1)
		}
		if got := worker.Placed(string(kinds)); !slices.Equal(got, want) {
			t.Fatalf("%s: the parent has %v, the child does %v", kinds, got, want)
		}
	}
}

// Who asks for one at a time does not wait behind what a worker has, and has read already,
// of somebody who floods.
func TestUrgent(t *testing.T) {
	c := countingToken(t)
	c.Workers, c.CallTimeout, c.Env["COUNT_SIGNS"] = 1, time.Hour, "1"
	tok := open(t, c)
	generate(t, tok, "k", "p256")
	sign := func(by string, n byte) {
		if _, err := tok.Sign(t.Context(), by, 1, []byte("k"), slices.Concat([]byte{n}, digest(1)[1:]), crypto.SHA256); err != nil {
			t.Errorf("%s: %v", by, err)
		}
	}
	const warm, n = 50, 200
	for range warm { // so that the key has a price
		sign("flood", 1)
	}
	worker.Cheap(tok)
	worker.NeverLate(tok)
	pid := tok.Workers()[0].PID
	stop(t, pid)
	resume := sync.OnceFunc(func() { _ = syscall.Kill(pid, syscall.SIGCONT) })
	defer resume()
	goOn := func() {
		if err := os.WriteFile(filepath.Join(c.Env["COUNT_DIR"], "Sign.go"), nil, 0o600); err != nil {
			t.Error(err)
		}
	}
	defer goOn()
	order(t, c, "Sign", "wait")
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() { sign("flood", 1) })
	}
	until(t, "all wait", func() bool {
		s := tok.Stats()
		return s.Waiting+s.InFlight == n && worker.Flushed(tok)
	})
	has := tok.Stats().InFlight
	if has < 8 {
		t.Fatalf("the worker has only %d", has)
	}
	resume()
	taken(t, c, "Sign") // it has read all, and begun the first
	wg.Go(func() { sign("lone", 2) })
	until(t, "one more is with the worker", func() bool { return tok.Stats().InFlight == has+1 && worker.Flushed(tok) })
	// But one for each session, no more.
	wg.Go(func() { sign("second", 3) })
	until(t, "another one waits", func() bool { s := tok.Stats(); return s.Waiting+s.InFlight == n+2 })
	if got := tok.Stats().InFlight; got != has+1 {
		t.Errorf("the worker has %d, want %d", got, has+1)
	}
	goOn()
	wg.Wait()
	b, err := os.ReadFile(filepath.Join(c.Env["COUNT_DIR"], "calls"))
	if err != nil {
		t.Fatal(err)
	}
	var signs []string
	for _, line := range strings.Split(string(b), "\n") {
		if what, ok := strings.CutPrefix(line, "C_Sign "); ok {
			signs = append(signs, what)
		}
	}
	// Each is two calls, of which the first asks how long it will be.
	if at := slices.Index(signs, "02")/2 - warm; at != 1 {
		t.Errorf("it was signed for who asked once after %d, of %d that the worker had, want 1", at, has)
	}
}

type busy interface {
	error
	Busy() bool
	RetryAfter() time.Duration
}

// What finds no place, or cannot be done in time, is refused at once and says when
// to try again; it takes no place from others.
func TestOverload(t *testing.T) {
	c := newToken(t)
	c.Queue = 30
	tok, resume := stopped(t, c)
	ctx, leave := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	sign := func(ctx context.Context, by string) error {
		_, err := tok.Sign(ctx, by, 1, []byte("k"), digest(1), crypto.SHA256)
		return err
	}
	fill := func(by string, want int) {
		t.Helper()
		refused := make(chan error, 40)
		for range 40 {
			wg.Go(func() { refused <- sign(ctx, by) })
		}
		n := 0
		for ; n < 40-want; n++ { // those that are not refused stay
			err := <-refused
			b, ok := errors.AsType[busy](err)
			if !ok || !b.Busy() || b.RetryAfter() < 10*time.Millisecond || b.RetryAfter() > time.Second {
				t.Errorf("%s: got %v, want busy and when to try again", by, err)
			}
		}
		if len(refused) > 0 {
			t.Errorf("%s: more than %d are refused", by, n)
		}
	}
	fill("a", 1+15) // one is with the worker
	if got := tok.Stats().Waiting; got != 15 {
		t.Errorf("%d wait, want half of the places", got)
	}
	fill("b", 1+8) // one goes before those that are there, and of what is free half
	if err := sign(context.Background(), "a"); err == nil {
		t.Error("who has half of the places gets another")
	}

	if got := tok.Stats().Waiting; got != 23 {
		t.Errorf("%d wait, want 23", got)
	}
	leave()
	wg.Wait()
	if got := tok.Stats().Waiting; got != 0 {
		t.Errorf("%d wait, and all have left", got)
	}
	resume()
	if err := sign(t.Context(), "a"); err != nil {
		t.Error(err)
	}
}
