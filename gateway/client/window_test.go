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

func (g *busyGateway) sign(w *window) (err error) {
	number, err := w.enter(context.Background())
	if err != nil {
		return err
	}
	defer func() { w.leave(number, err) }()
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
		var clients [2]window
		var shares [2]int
		var callers sync.WaitGroup
		var mu sync.Mutex
		began := time.Now()
		for i := range 1000 {
			callers.Go(func() {
				for time.Since(began) < time.Minute {
					if g.sign(&clients[i%2]) != nil {
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
			if w := &clients[i]; w.size != 0 || w.underWay != 0 || w.waiting.Len() != 0 {
				t.Errorf("client %d: %d under way of %v when all are done", i, w.underWay, w.size)
			}
		}
	})
}

// Nothing waits before something was refused; then in turn; who goes away does so at
// once, and takes no place.
func TestWindowPlaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var w window
		enter := func(ctx context.Context) int64 {
			t.Helper()
			n, err := w.enter(ctx)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
		var in []int64
		for range 8 {
			in = append(in, enter(t.Context()))
		}
		w.leave(in[0], sigerr.Overloaded) // 6 of 8, and 7 are under way
		w.leave(in[1], sigerr.Overloaded) // tells nothing new
		w.leave(in[2], sigerr.Unavailable)
		if w.size != 6 || w.underWay != 5 {
			t.Fatalf("%v of %v", w.underWay, w.size)
		}
		in = append(in[3:], enter(t.Context()))
		var order []int
		var waiting sync.WaitGroup
		gone, leave := context.WithCancel(t.Context())
		for i, ctx := range []context.Context{t.Context(), gone, t.Context()} {
			waiting.Go(func() {
				n, err := w.enter(ctx)
				if (ctx == gone) != errors.Is(err, sigerr.Canceled) {
					t.Errorf("waiter %d: %v", i, err)
				}
				if err == nil {
					order = append(order, i) // one has a place at a time
					w.leave(n, nil)
				}
			})
			synctest.Wait()
		}
		leave()
		synctest.Wait()
		if len(order) != 0 || w.waiting.Len() != 2 {
			t.Errorf("%v entered a full window, %d wait", order, w.waiting.Len())
		}
		w.leave(in[0], nil)
		waiting.Wait()
		if len(order) != 2 || order[0] != 0 || order[1] != 2 {
			t.Errorf("entered in the order %v", order)
		}
		if w.underWay != 5 || w.size <= 6 || w.size > 7 {
			t.Errorf("%d under way of %v; one answer while it is full makes it a little wider", w.underWay, w.size)
		}
		for _, n := range in[1:] {
			w.leave(n, nil)
		}
		if w.size != 0 || w.underWay != 0 {
			t.Errorf("%d under way of %v, when all is over", w.underWay, w.size)
		}
		for range 20 { // whatever is asked is refused: one at a time is let through
			a, b := enter(t.Context()), enter(t.Context())
			w.leave(a, sigerr.Overloaded)
			w.leave(b, sigerr.Overloaded)
		}
	})
}
