package client

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/signwarden/signwarden/gateway/sigerr"
)

// windows bound how many of a client's requests for a key are under way, once the gateway
// has refused one because it has too many: the others wait here, where they cost nothing, in
// the order in which they came. It is TCP's way (RFC 5681): where one is refused the window
// becomes three quarters of what was under way, once in a round trip; where one is answered
// it becomes wider by its share of one. It is forgotten when nothing is under way any more.
// Each key has its own: it may be in another token, and its rules may have a rate.
// The zero value is ready.
type windows struct {
	mu    sync.Mutex
	byKey map[string]*window // of those with requests under way
}

type window struct {
	size     float64 // 0: no bound
	underWay int
	number   int64     // of the last request that entered
	cut      int64     // the last one when the window was last made smaller
	waiting  list.List // of chan int64 (capacity 1), which are told their number
}

// do runs f, for one request for a key, when there is a place for it. Where ctx ends first
// the error is Overloaded, or Canceled.
func (ws *windows) do(ctx context.Context, key string, f func() error) error {
	w, number, err := ws.enter(ctx, key)
	if err != nil {
		return err
	}
	defer func() { ws.leave(w, key, number, err) }()
	err = f()
	return err
}

func (ws *windows) enter(ctx context.Context, key string) (*window, int64, error) {
	ws.mu.Lock()
	w := ws.byKey[key]
	if w == nil {
		if ws.byKey == nil {
			ws.byKey = map[string]*window{}
		}
		w = &window{}
		ws.byKey[key] = w
	}
	if w.room() { // then nobody waits
		defer ws.mu.Unlock()
		return w, w.admit(), nil
	}
	entered := make(chan int64, 1)
	at := w.waiting.PushBack(entered)
	ws.mu.Unlock()
	select {
	case number := <-entered:
		return w, number, nil
	case <-ctx.Done():
	}
	ws.mu.Lock()
	defer ws.mu.Unlock()
	select {
	case number := <-entered: // it was first
		return w, number, nil
	default:
	}
	w.waiting.Remove(at)
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return nil, 0, fmt.Errorf("%w: the gateway takes no more than %d requests of this client at a time; this one waited for those before it, and was not sent",
			sigerr.Overloaded, w.underWay)
	}
	return nil, 0, contextError(ctx)
}

// leave ends a request that had the outcome err.
func (ws *windows) leave(w *window, key string, number int64, err error) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	switch {
	case errors.Is(err, sigerr.Overloaded) && number > w.cut: // others of this round trip tell the same
		w.size, w.cut = max(1, float64(w.underWay)*3/4), w.number
	case err == nil && w.size > 0 && !w.room():
		w.size += 1 / w.size
	}
	w.underWay--
	for w.waiting.Len() > 0 && w.room() {
		w.waiting.Remove(w.waiting.Front()).(chan int64) <- w.admit()
	}
	if w.underWay == 0 {
		delete(ws.byKey, key)
	}
}

// room and admit are called with windows.mu held.
func (w *window) room() bool { return w.size == 0 || w.underWay < int(w.size) }

func (w *window) admit() int64 {
	w.underWay++
	w.number++
	return w.number
}
