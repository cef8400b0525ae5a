package worker

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/signwarden/signwarden/hsm"
)

// A call is one request, from its caller to its answer. Token.mu guards it
// from when it is waiting or in flight, until done is sent to.
type call struct {
	kind   byte
	number uint32 // in the child that has it
	body   []byte
	done   chan struct{} // capacity 1: nobody waits for a caller
	answer []byte
	err    error

	at, given time.Time // when it came, and was given to a worker; where somebody observes

	suspect bool // it was with a worker that died
	urgent  bool // it was given to its worker as that

	tries int      // workers that failed while they worked on it
	gone  int      // workers that said that the token does not work
	outs  int      // workers whose login was lost when they worked on it
	shun  *process // the one that failed last

	flow   *flow
	weight int
	price  *price        // of its key
	cost   time.Duration // that price, when it came

	queued     bool
	again      bool  // it waits to be done again
	prev, next *call // in the queue

	// A call that was moved from a worker that stalls left a ghost there, of which
	// it is the twin: what the ghost is answered is the call's answer (stall.go).
	ghosts []*call
	twin   *call
}

var calls = sync.Pool{New: func() any { return &call{done: make(chan struct{}, 1)} }}

func newCall(kind byte) *call {
	c := calls.Get().(*call)
	*c = call{kind: kind, body: c.body[:0], done: c.done, ghosts: c.ghosts[:0]}
	return c
}

// finish gives the caller its answer. Called once.
func (c *call) finish(answer []byte, err error) {
	c.answer, c.err, c.shun, c.flow, c.price = answer, err, nil, nil, nil
	c.done <- struct{}{}
}

// do has a call of a flow answered by a worker, and waits for it no longer than
// ctx. key is what it is for.
func (t *Token) do(ctx context.Context, op string, c *call, flow string, weight int, key []byte) ([]byte, error) {
	if len(c.body) > maxBody {
		return nil, tooLong(op, len(c.body))
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("%s: %w", op, err)
	}
	if t.c.Observer != nil {
		c.at = time.Now()
	}
	t.mu.Lock()
	if err := t.unable(); err != nil {
		t.mu.Unlock()
		return nil, fmt.Errorf("%s: %w", op, err)
	}
	c.price = t.price(key)
	c.cost = c.price.d
	t.waiting.enter(c, flow, min(max(weight, 1), MaxWeight))
	var p *process
	if t.waiting.waiting == 0 || t.waiting.urgent(c) {
		p = t.pick(c)
	}
	if p != nil {
		t.waiting.begin(c)
		p.give(c)
	} else if err := t.place(ctx, c); err != nil {
		t.waiting.leave(c)
		t.mu.Unlock()
		return nil, fmt.Errorf("%s: %w", op, err)
	} else {
		t.waiting.push(c)
	}
	t.mu.Unlock()
	if p != nil {
		p.flush()
	}
	select {
	case <-c.done:
	case <-ctx.Done():
		if t.abandon(c) {
			return nil, fmt.Errorf("%s: %w", op, ctx.Err())
		}
		<-c.done // it was answered meanwhile
	}
	answer, err := c.answer, c.err
	c.answer, c.err = nil, nil
	calls.Put(c)
	return answer, err
}

// unable says why no request can be answered now or soon; mu is held.
func (t *Token) unable() error {
	switch {
	case t.closed:
		return hsm.ErrClosed
	case t.serving():
		return nil
	case t.refused != nil:
		return t.refused
	}
	return t.down
}

// serving says whether a worker takes requests; mu is held.
func (t *Token) serving() bool {
	return slices.ContainsFunc(t.live, func(p *process) bool { return !p.draining })
}

// abandon takes back a call whose caller leaves; false where it is answered.
// A child works on it all the same: its answer is thrown away.
func (t *Token) abandon(c *call) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.takeBack(c) {
		return false
	}
	t.waiting.leave(c)
	return true
}

// takeBack has nobody answer c any more; false where it is answered. mu is held.
func (t *Token) takeBack(c *call) bool {
	if c.queued {
		t.waiting.remove(c)
		c.layGhosts()
		return true
	}
	for _, p := range t.live {
		if p.disown(c) {
			c.layGhosts()
			return true
		}
	}
	return false
}

// pick returns the worker that a call is to be given to, or nil: none has room. mu is held.
func (t *Token) pick(c *call) *process {
	c.urgent = t.waiting.urgent(c)
	p := t.idlest(c)
	if p == nil && c.urgent {
		c.urgent = false
		p = t.idlest(c)
	}
	return p
}

// idlest is the worker with the least to do that has room for a call, or nil. It is one
// that answers, and is not shunned, where there is; one that stalls gets nothing.
func (t *Token) idlest(c *call) *process {
	var best, worse *process
	for _, p := range t.live {
		if p.draining || p.stalled || !t.roomy(p, c.urgent) {
			continue
		}
		to := &best
		if p == c.shun || len(p.inFlight) > 0 && time.Since(p.progress) > t.c.CallTimeout/4 {
			to = &worse
		}
		if *to == nil || p.load < (*to).load {
			*to = p
		}
	}
	if best == nil {
		return worse
	}
	return best
}

// feed gives what waits to workers that have room; mu is held. Flush those
// that it returns.
func (t *Token) feed(fed []*process) []*process {
	for c := t.waiting.peek(); c != nil; c = t.waiting.peek() {
		p := t.pick(c)
		if p == nil {
			break
		}
		t.waiting.pop()
		p.give(c)
		if len(fed) == 0 || fed[len(fed)-1] != p {
			fed = append(fed, p)
		}
	}
	return fed
}

// Evict ends with err what waits and what workers have, of signatures those with keys
// that movable says are elsewhere too: they are asked for there. Workers go on with
// what they have, and its answers are thrown away.
func (t *Token) Evict(err error, movable func(id []byte) bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var all []*call
	for _, p := range t.live {
		for _, c := range p.inFlight {
			if c.done != nil {
				all = append(all, c)
			}
		}
	}
	all = t.waiting.appendAll(all)
	for _, c := range all {
		if (c.kind != kindSign || movable([]byte(c.price.id))) && t.takeBack(c) {
			t.waiting.leave(c)
			c.finish(nil, err)
		}
	}
}

// failWaiting ends everything that waits; mu is held.
func (t *Token) failWaiting(err error) {
	for c := t.waiting.peek(); c != nil; c = t.waiting.peek() {
		t.waiting.remove(c)
		t.waiting.leave(c)
		c.layGhosts()
		c.finish(nil, err)
	}
}
