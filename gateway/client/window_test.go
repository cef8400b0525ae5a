package client

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signwarden/signwarden/gateway/sigerr"
)

// busyGateway answers one request after the other, 1 ms each, and refuses when it has
// 300. Not safe without its mutex.
type busyGateway struct {
	mu       sync.Mutex
	turn     chan struct{} // capacity 1
	has      int
	refused  int
	answered int
}

func (g *busyGateway) sign() error {
	g.mu.Lock()
	if g.has == 300 {
		g.refused++
		g.mu.Unlock()
		return sigerr.Overloaded
	}
	g.has++
	g.mu.Unlock()
	g.turn <- struct{}{}
	time.Sleep(time.Millisecond)
	<-g.turn
	g.mu.Lock()
	g.has--
	g.answered++
	g.mu.Unlock()
	return nil
}

// A thousand callers of a gateway that has room for 300: it always has work, refuses few
// of them, and the two clients that they come from have like shares.
func TestWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &busyGateway{turn: make(chan struct{}, 1)}
		var clients [2]windows
		var shares [2]int
		var callers sync.WaitGroup
		var mu sync.Mutex
		began := time.Now()
		for i := range 1000 {
			callers.Go(func() {
				for time.Since(began) < time.Minute {
					if clients[i%2].do(t.Context(), "k", g.sign) != nil {
						time.Sleep(100 * time.Millisecond)
						continue
					}
					mu.Lock()
					shares[i%2]++
					mu.Unlock()
				}
			})
		}
		callers.Wait()
		if g.answered < 59_000 || g.answered > 61_000 {
			t.Errorf("%d answered in a minute, want nearly 60,000: it was idle", g.answered)
		}
		if g.refused > g.answered/50 {
			t.Errorf("%d refused of %d", g.refused, g.answered)
		}
		if a, b := shares[0], shares[1]; a > 2*b || b > 2*a {
			t.Errorf("the clients had %d and %d", a, b)
		}
		for i := range clients {
			if n := len(clients[i].byKey); n != 0 {
				t.Errorf("client %d remembers %d keys when all are done", i, n)
			}
		}
	})
}

// Nothing waits before something was refused; then in turn, with other keys not; who goes
// away does so at once, and takes no place.
func TestWindowPlaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ws windows
		var w *window
		enter := func() int64 {
			t.Helper()
			var n int64
			var err error
			if w, n, err = ws.enter(t.Context(), "k"); err != nil {
				t.Fatal(err)
			}
			return n
		}
		leave := func(n int64, err error) { ws.leave(w, "k", n, err) }
		var in []int64
		for range 8 {
			in = append(in, enter())
		}
		leave(in[0], sigerr.Overloaded) // 6 of 8, and 7 are under way
		leave(in[1], sigerr.Overloaded) // tells nothing new
		leave(in[2], sigerr.Unavailable)
		leave(in[3], nil) // wider it becomes only where it is full
		if w.size != 6 || w.underWay != 4 {
			t.Fatalf("%v of %v", w.underWay, w.size)
		}
		in = append(in[4:], enter(), enter())
		if other, n, err := ws.enter(t.Context(), "another"); err != nil {
			t.Errorf("another key: %v", err)
		} else {
			ws.leave(other, "another", n, nil)
		}

		soon, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		gone, goAway := context.WithCancel(t.Context())
		var order []int
		var waiting sync.WaitGroup
		for i, ctx := range []context.Context{t.Context(), gone, soon, t.Context()} {
			waiting.Go(func() {
				err := ws.do(ctx, "k", func() error { order = append(order, i); return nil }) // one has a place at a time
				if want := []error{nil, sigerr.Canceled, sigerr.Overloaded, nil}[i]; !errors.Is(err, want) {
					t.Errorf("waiter %d: %v, want %v", i, err, want)
				}
			})
			synctest.Wait()
		}
		goAway()
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if len(order) != 0 || w.waiting.Len() != 2 {
			t.Errorf("%v entered a full window, %d wait", order, w.waiting.Len())
		}
		leave(in[0], nil)
		waiting.Wait()
		if len(order) != 2 || order[0] != 0 || order[1] != 3 {
			t.Errorf("entered in the order %v", order)
		}
		if w.underWay != 5 || w.size <= 6 || w.size > 7 {
			t.Errorf("%d under way of %v; one answer while it is full makes it a little wider", w.underWay, w.size)
		}
		for _, n := range in[1:] {
			leave(n, nil)
		}
		if len(ws.byKey) != 0 {
			t.Error("it is remembered when all is over")
		}
	})
}

// Where every request is refused, one at a time is let through all the same.
func TestWindowOfOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ws windows
		var mu sync.Mutex
		most, now := 0, 0
		var callers sync.WaitGroup
		for range 5 {
			callers.Go(func() {
				for i := range 20 {
					ws.do(t.Context(), "k", func() error {
						mu.Lock()
						now++
						if i > 15 { // by then it has become small
							most = max(most, now)
						}
						mu.Unlock()
						time.Sleep(time.Millisecond)
						mu.Lock()
						now--
						mu.Unlock()
						return sigerr.Overloaded
					})
				}
			})
		}
		callers.Wait()
		if most != 1 {
			t.Errorf("%d at a time", most)
		}
	})
}
