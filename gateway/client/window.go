package client

import (
	"container/list"
	"context"
	"errors"
	"sync"

	"github.com/signwarden/signwarden/gateway/sigerr"
)

// window bounds how many of a client's requests are under way, once the gateway has
// refused one because it has too many: the others wait here, where they cost nothing, in
// the order in which they came. It is TCP's way (RFC 5681): where one is refused the window
// becomes three quarters of what was under way, once in a round trip; where one is answered
// it becomes wider by its share of one. It is forgotten when nothing is under way any more.
// The zero value is ready.
type window struct {
	mu       sync.Mutex
	size     float64 // 0: no bound
	underWay int
	number   int64     // of the last request that entered
	cut      int64     // the last one when the window was last made smaller
	waiting  list.List // of chan int64 (capacity 1), which are told their number
}

// enter waits for a place, within ctx. Who has entered leaves, with the same number.
func (w *window) enter(ctx context.Context) (number int64, err error) {
	w.mu.Lock()
	if w.room() { // then nobody waits
		defer w.mu.Unlock()
		return w.admit(), nil
	}
	entered := make(chan int64, 1)
	at := w.waiting.PushBack(entered)
	w.mu.Unlock()
	select {
	case number := <-entered:
		return number, nil
	case <-ctx.Done():
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	select {
	case number := <-entered: // it was first
		return number, nil
	default:
		w.waiting.Remove(at)
		return 0, contextError(ctx)
	}
}

// room and admit are called with mu held.
func (w *window) room() bool { return w.size == 0 || w.underWay < int(w.size) }

func (w *window) admit() int64 {
	w.underWay++
	w.number++
	return w.number
}

// leave ends a request that had the outcome err.
func (w *window) leave(number int64, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case errors.Is(err, sigerr.Overloaded) && number > w.cut: // others of this round trip tell the same
		w.size, w.cut = max(1, float64(w.underWay)*3/4), w.number
	case err == nil && w.size > 0 && !w.room():
		w.size += 1 / w.size
	}
	w.underWay--
	if w.underWay == 0 && w.waiting.Len() == 0 {
		w.size = 0
	}
	for w.waiting.Len() > 0 && w.room() {
		w.waiting.Remove(w.waiting.Front()).(chan int64) <- w.admit()
	}
}
