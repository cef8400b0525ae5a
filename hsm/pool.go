// Package hsm signs with keys that stay in a PKCS#11 token.
//
// A [Pool] owns a bounded number of read-only sessions of one token and signs
// on them. It finds a key once, not once per signature; it knows for each
// CK_RV what to do next (errors.go); and it tries a PIN that the token calls
// wrong exactly once. It knows nothing of who asks and why, and it never
// returns a private key nor reads a part of one: [Pool.Generate] makes keys in the
// token, [Pool.Import] brings one into it, and neither can leave it.
//
// Concurrency, in short:
//
//  1. A Pool is safe for concurrent use.
//  2. A call into a module cannot be cancelled. A caller whose context ends
//     leaves at once; the call runs on, and its session comes back when it
//     ends. A module that hangs therefore costs a session, and when all hang
//     every caller times out: only killing the process helps.
//     A context that never ends (context.Background) spares a hand-off between
//     goroutines: it is for a process that is killed when it hangs.
//  3. Close waits for every call, also for those whose caller has left.
//  4. C_Initialize, the login and the environment belong to the process. Two
//     pools of one token share a login.
package hsm

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"
)

// Pool is a token, logged in. Safe for concurrent use.
type Pool struct {
	api  api
	mod  *module
	slot uint
	pin  PIN
	ask  func(Info) (PIN, error) // nil: the pool logs in whenever it has to; else once
	log  *slog.Logger
	info Info

	writes bool // the workers' sessions are read-write

	profile Profile

	workers []*worker
	running sync.WaitGroup // the workers' goroutines, and callers that run a worker

	epoch    atomic.Uint64         // counts the losses of sessions and handles
	live     atomic.Int64          // workers' sessions that are open
	operator atomic.Pointer[Error] // the ClassOperator error that ended it all; set once

	// mu guards who works on what. It is held for a few instructions, never
	// across a call into the module.
	mu       sync.Mutex
	idle     []*worker // a stack: the session used last is used next
	queue    list.List // of *job, first come first served; not empty only while idle is
	parked   []*worker // the token would not give them a session
	parkedAt time.Time // when the last of them was parked
	closed   bool

	// loginMu makes C_Login one goroutine's business. It is held across
	// C_Login, only by workers (and by Open): callers never wait for it.
	loginMu     sync.Mutex
	relogin     bool                 // the token said that we are not logged in
	entered     bool                 // a login has succeeded
	spare       bool                 // the token grants a session beyond the workers'
	keeper      pkcs11.SessionHandle // never used but to hold the login
	keeping     bool                 // keeper is open
	keeperEpoch uint64

	keysMu sync.RWMutex   // guards keys; held for a map access
	keys   map[string]key // by CKA_ID
}

// unparkAfter is how long a worker that got no session from the token waits
// until it asks again.
const unparkAfter = 10 * time.Second

// Backoff of ClassBusy: drawn from the upper half of a bound that doubles.
const (
	minBackoff = 10 * time.Millisecond
	maxBackoff = 200 * time.Millisecond
)

// callLogin is the Op of a login's error.
const callLogin = "C_Login"

// errNoRoom: the token grants no session to this worker, and others have some.
var errNoRoom = errors.New("no session left for this worker")

// do runs an operation on a session, and again as the class of its error
// allows, but where that is a login's. The attempts follow each other; one may start on a new session.
func (p *Pool) do(ctx context.Context, op string, run func(*job, *worker) error) error {
	tried := map[Class]int(nil)
	for {
		err := p.once(ctx, op, run)
		e, ok := errors.AsType[*Error](err)
		if !ok {
			return err
		}
		r := rules[e.Class]
		// A login is not repeated, whatever the code and the profile: it may be how this
		// token tells of a wrong PIN.
		if tried[e.Class] >= r.retries || e.Op == callLogin {
			return err
		}
		if tried == nil {
			tried = map[Class]int{}
		}
		tried[e.Class]++
		if r.backoff {
			if cerr := wait(ctx, backoff(tried[e.Class])); cerr != nil {
				return fmt.Errorf("%s: %w, after %w", op, cerr, err)
			}
		}
	}
}

// once makes one attempt and waits for it no longer than ctx.
func (p *Pool) once(ctx context.Context, op string, run func(*job, *worker) error) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	if e := p.operator.Load(); e != nil {
		return e
	}
	j := &job{done: make(chan error, 1)}
	j.run = func(w *worker) error { return run(j, w) }
	if ctx.Done() == nil {
		if w := p.borrow(); w != nil {
			p.giveBack(w, w.serve(j))
			return <-j.done // there already, unless the worker was parked
		}
	}
	at, err := p.submit(j)
	if err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	select {
	case err := <-j.done:
		return err
	case <-ctx.Done():
	}
	if !j.abandon() {
		return <-j.done // the worker was first: the result is a moment away
	}
	p.withdraw(at)
	return fmt.Errorf("%s: %w", op, ctx.Err())
}

// submit gives j to the worker that was idle for the shortest time, or queues
// it. The queue holds no more jobs than there are callers in it.
func (p *Pool) submit(j *job) (*list.Element, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, ErrClosed
	}
	if len(p.idle) == 0 && len(p.parked) > 0 && time.Since(p.parkedAt) > unparkAfter {
		p.idle, p.parked = p.parked, nil
	}
	at := p.queue.PushBack(j)
	p.assign()
	return at, nil
}

// borrow takes an idle worker, for a caller to run; nil if there is none.
func (p *Pool) borrow() *worker {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := len(p.idle)
	if n == 0 || p.closed {
		return nil
	}
	w := p.idle[n-1]
	p.idle = p.idle[:n-1]
	p.running.Add(1)
	return w
}

// giveBack ends a borrow; j is the next job that serve came away with.
func (p *Pool) giveBack(w *worker, j *job) {
	defer p.running.Done()
	if j == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		j.fail(ErrClosed)
		return
	}
	w.jobs <- j
}

// withdraw takes an abandoned job out of the queue, if it is still there.
func (p *Pool) withdraw(at *list.Element) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.queue.Remove(at) // does nothing if it was taken out already
}

// next is called by a worker that is free.
func (p *Pool) next(w *worker) *job {
	p.mu.Lock()
	defer p.mu.Unlock()
	if at := p.queue.Front(); at != nil {
		return p.queue.Remove(at).(*job)
	}
	p.idle = append(p.idle, w)
	return nil
}

// park sets w aside, for whom the token has no session, and hands its job on.
// It returns the job where every other worker has gone the same way meanwhile.
func (p *Pool) park(w *worker, j *job) *job {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.live.Load() == 0 {
		return j
	}
	p.parked, p.parkedAt = append(p.parked, w), time.Now()
	if p.closed {
		j.fail(ErrClosed)
		return nil
	}
	p.queue.PushFront(j)
	p.assign()
	return nil
}

// assign gives queued jobs to idle workers. Called with mu held, and only
// while the pool is not closed: a worker's channel is closed with it.
func (p *Pool) assign() {
	for p.queue.Len() > 0 && len(p.idle) > 0 {
		n := len(p.idle) - 1
		p.idle[n].jobs <- p.queue.Remove(p.queue.Front()).(*job)
		p.idle = p.idle[:n]
	}
}

// unpark lets the parked workers ask for a session again; one was given back.
func (p *Pool) unpark() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.parked) > 0 && !p.closed {
		p.idle, p.parked = append(p.parked, p.idle...), nil
		p.assign()
	}
}

// Ping asks the token whether a session of the pool is alive, and so whether
// Sign would work; it recovers what Sign would. Cheap enough for every few
// seconds. Where the token drops what is idle, the device itself is asked.
func (p *Pool) Ping(ctx context.Context) error {
	return p.do(ctx, "ping", func(_ *job, w *worker) error {
		_, err := p.api.GetSessionInfo(w.sh)
		if err == nil && p.profile.KeepAlive > 0 {
			_, err = p.api.GenerateRandom(w.sh, 8)
			return p.profile.fail("C_GenerateRandom", err)
		}
		return p.profile.fail("C_GetSessionInfo", err)
	})
}

// Close fails what waits with ErrClosed, waits for the calls that run, and
// closes the sessions. The last pool of a module in this process finalises it.
// Close waits for ever where the module hangs.
func (p *Pool) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		p.running.Wait()
		return nil
	}
	p.closed = true
	for at := p.queue.Front(); at != nil; at = p.queue.Front() {
		p.queue.Remove(at).(*job).fail(ErrClosed)
	}
	for _, w := range p.workers {
		close(w.jobs)
	}
	p.mu.Unlock()
	p.running.Wait()
	for _, w := range p.workers {
		w.drop()
	}
	if p.keeping {
		p.api.CloseSession(p.keeper)
	}
	return p.mod.release()
}

func backoff(attempt int) time.Duration {
	bound := min(minBackoff<<attempt, maxBackoff)
	return bound/2 + rand.N(bound/2)
}

func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
