package gateway

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/signwarden/signwarden/gateway/policy"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// gate bounds the requests under way, in all and of each principal.
type gate struct {
	max, maxEach int

	mu  sync.Mutex // guards the counts; held for a few instructions
	all int
	of  map[string]*inside // no entry for a principal with none under way
}

// inside is what one principal has under way.
type inside struct {
	n    int
	took time.Duration // what its requests have taken lately; 0: none has ended
}

func newGate(all, each int) *gate {
	return &gate{max: all, maxEach: each, of: map[string]*inside{}}
}

// enter takes a place and returns what gives it back when the request has ended, or
// refuses at once. An eighth of the places is for those who have none: some that
// flood do not keep the others out.
func (g *gate) enter(principal string) (leave func(took time.Duration), err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	in := g.of[principal]
	if in == nil {
		in = &inside{} // kept where it enters
	}
	if g.all >= g.max || in.n >= g.maxEach || in.n > 0 && g.all >= g.max-g.max/8 {
		return nil, &overQueue{
			fmt.Sprintf("%d of yours are under way; wait for answers before sending more", in.n),
			// When half of those have been answered.
			min(max(in.took/2, minRetry), maxRetry),
		}
	}
	g.all++
	in.n++
	g.of[principal] = in
	return func(took time.Duration) { g.leave(principal, took) }, nil
}

// Bounds of what one is told to wait who is refused here.
const (
	minRetry = 50 * time.Millisecond
	maxRetry = time.Second
)

func (g *gate) leave(principal string, took time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.all--
	in := g.of[principal]
	if in.took == 0 {
		in.took = took
	}
	in.took += (took - in.took) / 8
	if in.n--; in.n == 0 {
		delete(g.of, principal)
	}
}

// limiters are the token buckets of the rules that have a rate: one for each
// rule, principal and key. They are as many as rules allow; their names come
// from certificates and the registry, not from what a client says.
type limiters struct {
	mu sync.Mutex // guards by and what is in it; held for a look-up
	by map[limiterKey]*bucket
}

type limiterKey struct{ rule, principal, key string }

// bucket has how many signatures are allowed at a moment.
type bucket struct {
	left float64
	at   time.Time
}

func newLimiters() *limiters { return &limiters{by: map[limiterKey]*bucket{}} }

// take uses up one signature of the decision's rate, or refuses. giveBack is for one
// that was not asked for in the end; it is called at most once.
func (l *limiters) take(principal, key string, d policy.Decision, now time.Time) (giveBack func(), err error) {
	if d.Rate.Count == 0 {
		return func() {}, nil
	}
	id := limiterKey{d.Rule, principal, key}
	full, second := float64(d.Rate.Count), float64(d.Rate.Count)/d.Rate.Per.Seconds()
	l.mu.Lock()
	defer l.mu.Unlock()
	b := l.by[id]
	if b == nil {
		b = &bucket{full, now}
		l.by[id] = b
	}
	if passed := now.Sub(b.at); passed > 0 {
		b.left, b.at = min(full, b.left+passed.Seconds()*second), now
	}
	if b.left < 1-1e-6 { // less by rounding, for who has waited as long as was told
		return nil, &overRate{rule: d.Rule, rate: d.Rate, wait: time.Duration((1 - b.left) / second * float64(time.Second))}
	}
	b.left--
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		b.left = min(full, b.left+1)
	}, nil
}

// overRate refuses what a rule allows later. It is sigerr.Overloaded, and its
// method RetryAfter tells a front-end when.
type overRate struct {
	rule string
	rate policy.Rate
	wait time.Duration
}

func (o *overRate) Error() string {
	return fmt.Sprintf("%v: rule %q allows %v; the next in %v", sigerr.Overloaded, o.rule, o.rate, o.wait.Round(time.Millisecond))
}
func (o *overRate) Unwrap() error             { return sigerr.Overloaded }
func (o *overRate) RetryAfter() time.Duration { return o.wait }

// The denials of one caller that are recorded: so many at once, and then so many
// a second.
const (
	denialBurst = 1000
	denialRate  = 20
)

// denials bounds the recorded denials of each principal. Principals come from
// certificates and configuration, so they are as many as those.
type denials struct {
	mu sync.Mutex // guards of; held for a look-up
	of map[string]*denied
}

type denied struct {
	limit   *rate.Limiter
	dropped int // since the last that was recorded
}

func newDenials() *denials { return &denials{of: map[string]*denied{}} }

// take reports whether a denial is to be recorded, and how many were not since
// the last that was.
func (d *denials) take(principal string, now time.Time) (dropped int, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	p := d.of[principal]
	if p == nil {
		p = &denied{limit: rate.NewLimiter(denialRate, denialBurst)}
		d.of[principal] = p
	}
	if !p.limit.AllowN(now, 1) {
		p.dropped++
		return 0, false
	}
	dropped, p.dropped = p.dropped, 0
	return dropped, true
}

// Idempotency ids are remembered for dedupFor, but no more than dedupMax of
// them in each of two generations: at 290 bytes for P-256 and 740 for RSA-4096 that
// is 190 MiB at the very worst. Beyond that rate the oldest are forgotten early, and a retry of
// one of those is signed and recorded once more.
const (
	dedupFor = time.Minute
	dedupMax = 128 << 10
)

// dedup answers a repeated request with the signature of the first.
type dedup struct {
	now   func() time.Time
	ended chan struct{} // closed

	mu        sync.Mutex // guards what follows, and done of entries; held for look-ups, never while signing
	current   map[dedupKey]*dedupEntry
	previous  map[dedupKey]*dedupEntry
	rotatedAt time.Time
}

type dedupKey struct{ principal, id string }

type dedupEntry struct {
	content [sha256.Size]byte
	done    chan struct{} // closed when the first request has ended; then dedup.ended, to keep a third less
	sig     Signature
	err     error
}

func newDedup(now func() time.Time) *dedup {
	d := &dedup{now: now, ended: make(chan struct{}), current: map[dedupKey]*dedupEntry{}, rotatedAt: now()}
	close(d.ended)
	return d
}

var errPanic = errors.New("the request of this id panicked")

// do runs f for the first request with an id. A later one with the same content
// waits for that and gets its signature; with other content it is refused. A
// request that failed is forgotten, so that it can be sent again.
func (d *dedup) do(ctx context.Context, principal string, r Request, f func() (Signature, error)) (Signature, error) {
	id := dedupKey{principal, r.ID}
	content := r.content()
	e, done, first := d.enter(id, content)
	if e.content != content {
		return Signature{}, fmt.Errorf("%w: the idempotency id %q was used for another request", sigerr.Conflict, r.ID)
	}
	if first {
		// Deferred: were f to panic, those who wait must still be answered.
		e.err = errPanic
		defer func() {
			if e.err != nil {
				d.forget(id, e)
			}
			d.end(e)
		}()
		e.sig, e.err = f()
		return e.sig, e.err
	}
	select {
	case <-done:
		return e.sig, e.err
	case <-ctx.Done():
		return Signature{}, contextError(ctx)
	}
}

// recall makes sig the answer to the request of that id, before there are others.
func (d *dedup) recall(id dedupKey, content [sha256.Size]byte, sig Signature) {
	e := &dedupEntry{content: content, done: d.ended, sig: sig}
	if len(d.current) < dedupMax {
		d.current[id] = e
	}
}

func (d *dedup) enter(id dedupKey, content [sha256.Size]byte) (e *dedupEntry, done <-chan struct{}, first bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.now()
	if age := now.Sub(d.rotatedAt); age >= dedupFor || len(d.current) >= dedupMax {
		d.previous, d.current, d.rotatedAt = d.current, map[dedupKey]*dedupEntry{}, now
		if age >= 2*dedupFor { // even the youngest of them is too old
			d.previous = nil
		}
	}
	if e := d.current[id]; e != nil {
		return e, e.done, false
	}
	if e := d.previous[id]; e != nil {
		return e, e.done, false
	}
	e = &dedupEntry{content: content, done: make(chan struct{})}
	d.current[id] = e
	return e, e.done, true
}

// end has those who wait for e look at what it came to.
func (d *dedup) end(e *dedupEntry) {
	d.mu.Lock()
	done := e.done
	e.done = d.ended
	d.mu.Unlock()
	close(done)
}

func (d *dedup) forget(id dedupKey, e *dedupEntry) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, m := range []map[dedupKey]*dedupEntry{d.current, d.previous} {
		if m[id] == e {
			delete(m, id)
		}
	}
}

// answer is what is kept of an answered request: recall reads it.
func (r *Request) answer(sig []byte) []byte {
	content := r.content()
	return append(content[:], sig...)
}

// content is what must be the same in two requests with one id.
func (r *Request) content() [sha256.Size]byte {
	h := sha256.New()
	for _, field := range [][]byte{[]byte(r.Key), r.Digest, []byte(r.Hash.String()), []byte(r.Scheme), []byte(r.Format), []byte(strconv.Itoa(r.SaltLength))} {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(field)))
		h.Write(n[:])
		h.Write(field)
	}
	return [sha256.Size]byte(h.Sum(nil))
}

func contextError(ctx context.Context) error {
	if ctx.Err() == context.DeadlineExceeded {
		return sigerr.Timeout
	}
	return sigerr.Canceled
}
