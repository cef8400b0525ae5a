package main

import "sync"

// budget is memory that files under way share. It is safe for concurrent use.
type budget struct {
	size int64

	turn sync.Mutex // held by who waits for memory: the others wait their turn behind it
	mu   sync.Mutex // guards left; held for arithmetic only
	more *sync.Cond // left has grown
	left int64
}

func newBudget(size int64) *budget {
	b := &budget{size: size, left: size}
	b.more = sync.NewCond(&b.mu)
	return b
}

// take waits until there are n bytes, all there are if it is more, and returns
// what gives them back.
func (b *budget) take(n int64) (release func()) {
	n = min(n, b.size)
	b.turn.Lock()
	defer b.turn.Unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.left < n {
		b.more.Wait()
	}
	b.left -= n
	return func() {
		b.mu.Lock()
		b.left += n
		b.mu.Unlock()
		b.more.Signal() // only who has the turn waits
	}
}
