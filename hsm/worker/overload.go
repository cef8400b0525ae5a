package worker

import (
	"cmp"
	"context"
	"fmt"
	"time"
)

// DefaultQueue is how many requests wait for a token at the most.
const DefaultQueue = 4096

// MaxWeight bounds the weight of a request.
const MaxWeight = 100

// ahead is how much a worker has to do, by time and no less than two requests of a
// session, so that it always has its next request: one whose answer has to reach the
// parent before it has another stands still for some 50 µs, little of the 5 ms of RSA-4096
// and half of a P-256 signature.
const ahead = 10 * time.Millisecond

// roomy says whether a worker takes a further request. What is urgent does not wait
// behind what the worker has: for that there is room where it has no other that is. mu is held.
func (t *Token) roomy(p *process, urgent bool) bool {
	n, sessions := len(p.inFlight), t.c.Sessions
	if urgent {
		return p.urgent() < sessions
	}
	return n < sessions*min(2, t.c.Depth) ||
		n < sessions*t.c.Depth && p.load < ahead*time.Duration(sessions)
}

// A price is what requests for one key have taken lately, of one session.
type price struct {
	id string // of the key
	d  time.Duration
	n  int // answers that it has learned from, up to young
}

const (
	firstPrice = time.Millisecond // before any signature
	minPrice   = time.Microsecond
	maxPrices  = 8192 // keys
	// young is the number of answers of which a price is the mean.
	young = 4
	// guessed is what a first signature takes at the most, as a part of CallTimeout,
	// so that a token of which nothing is known is not taken for silent.
	guessed = 16
)

// price is that of a key; "" is of what is for none. mu is held.
func (t *Token) price(key []byte) *price {
	p := t.prices[string(key)]
	if p == nil {
		if len(t.prices) >= maxPrices {
			clear(t.prices) // learned anew within a few requests
		}
		p = &price{id: string(key), d: cmp.Or(t.usual.d, firstPrice)}
		t.prices[p.id] = p
	}
	return p
}

// learn takes note that a request took d. One that took long because something
// stood still says little of the next, unless nothing else is known.
func (p *price) learn(d time.Duration) {
	if p.n < young {
		p.n++
		p.d = max(p.d+(d-p.d)/time.Duration(p.n), minPrice)
		return
	}
	p.d = max(p.d+(min(d, 4*p.d)-p.d)/8, minPrice)
}

// A lesson is a signature that was made, whether anybody waited for it or not.
type lesson struct {
	price *price
	cost  time.Duration
}

// learned is told that a worker has answered requests, which by their prices are worth
// so much, in the time since it last answered, or had nothing to do. mu is held.
func (t *Token) learned(p *process, lessons []lesson, worth time.Duration, now time.Time, busy int) {
	if worth <= 0 {
		return
	}
	took := float64(now.Sub(p.progress)) * float64(min(busy, t.c.Sessions)) / float64(worth)
	for _, l := range lessons {
		d := time.Duration(float64(l.cost) * took)
		l.price.learn(d)
		t.usual.learn(d)
	}
}

// place says whether a call that has to wait may do so: where there is a place for
// it, and its turn comes before its deadline, as fast as the token is now. mu is held.
func (t *Token) place(ctx context.Context, c *call) error {
	q, f := t.waiting, c.flow
	// In proportion to what is free, so that there always is a place for who has
	// few: two that take what they can get have a third of the queue each, and
	// leave a third (dynamic thresholds: Choudhury, Hahne 1998).
	if f.waiting >= c.weight*(t.c.Queue-q.waiting) {
		return &overload{
			text:  fmt.Sprintf("%d requests wait for the token, %d of them of this caller, and no more are taken", q.waiting, f.waiting),
			after: t.turn(c) / 2,
		}
	}
	until, bound := ctx.Deadline()
	if !bound {
		return nil
	}
	if wait, left := t.turn(c), time.Until(until); wait > left {
		return &overload{
			text:  fmt.Sprintf("it would be signed in %v, and is to be in %v", wait.Round(time.Millisecond), left.Round(time.Millisecond)),
			after: wait - left,
		}
	}
	return nil
}

// turn estimates how long a call will take that has to wait, behind what its flow
// has waiting and what others get to have done meanwhile; 0 where no worker is
// there to tell by. mu is held.
func (t *Token) turn(c *call) time.Duration {
	q, f := t.waiting, c.flow
	sessions, ahead := 0, time.Duration(0)
	for _, p := range t.live {
		if !p.draining {
			sessions += t.c.Sessions
			ahead += p.load
		}
	}
	if sessions == 0 {
		return 0
	}
	weights := q.weights
	if f.at < 0 {
		weights += c.weight
	}
	ahead += min(q.work, f.work*time.Duration(weights)/time.Duration(c.weight))
	return ahead/time.Duration(sessions) + c.cost
}

// pace is what the slowest request takes that a worker has, by estimate; mu is held.
func (t *Token) pace(p *process) time.Duration {
	slowest := time.Duration(0)
	if t.usual.n == 0 {
		slowest = t.c.CallTimeout / guessed
	}
	for _, c := range p.inFlight {
		if c.price != nil {
			slowest = max(slowest, c.price.d)
		}
	}
	return slowest
}

// Bounds of what a refused caller is told to wait.
const (
	minRetry = 10 * time.Millisecond
	maxRetry = time.Second
)

// overload refuses what cannot be done in time, or finds no place to wait. Callers
// that cannot import this package tell it by its methods.
type overload struct {
	text  string
	after time.Duration
}

func (o *overload) Error() string { return o.text }

// Busy says that the same request may succeed later, and RetryAfter when.
func (o *overload) Busy() bool { return true }

func (o *overload) RetryAfter() time.Duration { return min(max(o.after, minRetry), maxRetry) }
