// Package worker runs a PKCS#11 module in child processes.
//
// A module is foreign code that can crash, hang and leak, and a call into it
// cannot be cancelled. So the process that serves never loads it: a [Token]
// starts children of its own binary, which load it, log in and sign, and
// replaces those that fail. The program calls [Main] where its first argument
// is [Command].
//
// What is promised:
//
//  1. A child that crashes or hangs costs latency and no request. What it was
//     asked and did not answer is asked of another one. Of that, what two
//     have died over is asked of no third, for it may be what crashed them;
//     signing has no side effect that would forbid it.
//  2. A PIN that the token refuses is not tried again before an operator has
//     acted: children log in one at a time and once each, one that loses its
//     login is replaced, and after a refusal none starts (pin.go). Config.Tries
//     keeps this over restarts.
//  3. The children that sign have read-only sessions and know no request that
//     writes. What writes (generate, import, delete) is done by a child that starts
//     for this one act and then ends, and so is what lists the token; one at a time.
//     A private key that is imported goes to that child through its socket pair.
//  4. The PIN goes to a child through its socket pair; it is in no argument
//     list and no environment. Nor does a child inherit our environment.
//  5. Children end with the process that started them, however it ends.
//
// Whoever can run code in a child, such as the module, has the PIN and the
// token, and gets nothing else by the pipe: the parent reads frames of bounded
// size, and kills a child that sends another.
package worker

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"sync"
	"time"

	"github.com/signwarden/signwarden/hsm"
)

// Command is the first argument with which a Token starts its own binary.
const Command = "hsm-worker"

// Config says which token to open, and with how many children. Zero values of
// what is not required are the defaults.
type Config struct {
	Module     string            // path of the PKCS#11 module; required
	Env        map[string]string // environment of the module, e.g. SOFTHSM2_CONF
	TokenLabel string            // label of the token; required
	Profile    string            // as in hsm.Config
	PIN        hsm.PIN           // the user PIN; required

	// ReadPIN, where it is set, reads the PIN anew: at [Token.ReadPIN], and while
	// PIN is refused. Another one than before is taken for an operator's act.
	ReadPIN func() (hsm.PIN, error)
	Tries   Tries // nil: what was refused is remembered until Close

	Workers  int // children that sign; one for each CPU
	Sessions int // sessions of each of them, used at the same time; 1
	Depth    int // requests that a session has at the most, the one it works on included, and an urgent one; DefaultDepth

	// Queue bounds the requests that wait for a worker with room; DefaultQueue. One
	// caller has half of it at the most, times its weight.
	Queue int

	// CallTimeout is how long a child may work on requests without answering
	// one, before it is taken for hung and killed. What it has is asked of others
	// earlier, when it is much later than the slowest answer of the last seconds.
	CallTimeout time.Duration
	// StartTimeout bounds the start of a child: loading the module, and the login.
	// One that takes much longer than those before is ended earlier; of those that
	// follow, some have all of StartTimeout.
	StartTimeout time.Duration
	// KeepAlive is how long a child may be idle before it is made to use its token;
	// 0: as the token's profile has it. Negative: for ever.
	KeepAlive time.Duration
	// RecycleAge and RecycleOps end a child that is as old, or has answered as
	// much: modules leak. Its successor starts first. Negative: never.
	RecycleAge time.Duration
	RecycleOps int64

	Logger   *slog.Logger // nil logs nothing
	Observer Observer     // nil: nobody is told
}

// Defaults of Config.
const (
	// DefaultDepth lets a session find its next request when it has answered
	// one, and is small: what is in a child is out of the queue's hands, and
	// waits for its watchdog (docs/PERFORMANCE.md has figures).
	DefaultDepth        = 8
	DefaultCallTimeout  = 2 * time.Second
	DefaultStartTimeout = 30 * time.Second
	DefaultRecycleAge   = 24 * time.Hour
	DefaultRecycleOps   = 10_000_000
)

func (c *Config) defaults() {
	if c.Workers <= 0 {
		c.Workers = runtime.NumCPU()
	}
	c.Sessions = max(c.Sessions, 1)
	if c.Depth <= 0 {
		c.Depth = DefaultDepth
	}
	if c.Queue <= 0 {
		c.Queue = DefaultQueue
	}
	if c.CallTimeout <= 0 {
		c.CallTimeout = DefaultCallTimeout
	}
	if c.StartTimeout <= 0 {
		c.StartTimeout = DefaultStartTimeout
	}
	if c.RecycleAge == 0 {
		c.RecycleAge = DefaultRecycleAge
	}
	if c.RecycleOps == 0 {
		c.RecycleOps = DefaultRecycleOps
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

// Token is a PKCS#11 token behind worker processes. Safe for concurrent use.
type Token struct {
	c       Config
	log     *slog.Logger
	info    hsm.Info
	threads *thread // starts every child

	closing context.Context // ends when Close is called
	stop    context.CancelFunc
	running sync.WaitGroup // every goroutine of the token but the watchdog

	watching sync.WaitGroup
	unwatch  func() // ends the watchdog; called once

	// reading is held while the PIN is read anew and taken: what was read last counts.
	reading sync.Mutex

	starting chan struct{} // held (a value in it) while a child starts: one login at a time
	admin    chan struct{} // held while an administrative child lives

	// mu guards what follows, the lists of requests and the output buffers of
	// children included. It is held for a few instructions, never across a
	// system call.
	mu      sync.Mutex
	live    []*process // those that sign; in a fixed order, so that a lone caller finds a warm one
	waiting *queue
	prices  map[string]*price // of keys, by their id
	usual   price             // of signatures
	pin     hsm.PIN
	refused error         // why the PIN is not tried: nothing starts before an operator has acted
	mended  chan struct{} // closed when refused is no more
	down    error         // why the last starts failed; nil where one has succeeded since
	misses  int           // starts that failed, since one that did not
	missed  time.Time     // when the first of those did
	closed  bool
	slowest time.Duration // time between two answers, of the last while
	lastly  time.Time     // when there was an answer
	begins  startTimes

	hurriedAt, hurryFailed time.Time // when a successor of one that stalls was last started, and did not come up

	doubts doubts // of what workers see of the token
}

// Open starts a first worker and returns when it is logged in; the others
// start then, one after the other. The PIN is tried once. An error of the
// child comes back with its text and class, as from [hsm.Open].
func Open(ctx context.Context, c Config) (*Token, error) {
	t := newToken(ctx, c)
	first, err := t.start(ctx, modeSign)
	if err != nil {
		t.stop()
		t.running.Wait()
		t.threads.end()
		return nil, err
	}
	t.info = first.info
	t.info.Sessions *= c.Workers
	if profile, err := hsm.ProfileNamed(t.info.Profile); err == nil && c.KeepAlive == 0 {
		t.c.KeepAlive = profile.KeepAlive
	}
	t.admit(first)
	unwatch := make(chan struct{})
	t.unwatch = func() { close(unwatch) }
	t.watching.Go(func() { t.watch(unwatch) })
	t.running.Go(func() { t.keep(first) })
	for range c.Workers - 1 {
		t.running.Go(func() { t.keep(nil) })
	}
	return t, nil
}

// newToken is a token without a worker.
func newToken(ctx context.Context, c Config) *Token {
	c.defaults()
	t := &Token{
		c: c, log: c.Logger, threads: newThread(), pin: c.PIN, unwatch: func() {},
		starting: make(chan struct{}, 1), admin: make(chan struct{}, 1),
		waiting: newQueue(), prices: map[string]*price{},
	}
	t.closing, t.stop = context.WithCancel(context.WithoutCancel(ctx))
	return t
}

// Info returns what the module and the token said of themselves; Sessions are
// those of all workers.
func (t *Token) Info() hsm.Info { return t.info }

// Sign is [hsm.Pool.Sign], done by a worker. When ctx ends first, the error is
// ctx's.
//
// Where it has to wait, callers take turns: by whom the request is, and with a
// weight of 1 to MaxWeight, in proportion to which each gets of the token's time. What finds
// no place in the queue, or cannot be done before ctx's deadline as fast as the
// token is now, is refused at once: by an error with the methods Busy, true, and
// RetryAfter, a time.Duration.
func (t *Token) Sign(ctx context.Context, by string, weight int, id, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	c := newCall(kindSign)
	c.body = appendSign(c.body, id, digest, opts)
	return t.do(ctx, "sign", c, by, weight, id)
}

// PublicKey is [hsm.Pool.PublicKey], done by a worker.
func (t *Token) PublicKey(ctx context.Context, id []byte) (crypto.PublicKey, error) {
	c := newCall(kindPublic)
	c.body = append(c.body, id...)
	b, err := t.do(ctx, "public key", c, "", 1, nil)
	if err != nil {
		return nil, err
	}
	return parsePublic(b)
}

// Ping is [hsm.Pool.Ping] of one of the workers.
func (t *Token) Ping(ctx context.Context) error {
	_, err := t.do(ctx, "ping", newCall(kindPing), "", 1, nil)
	return err
}

// Worker is one child that signs.
type Worker struct {
	PID      int
	Answered int64 // requests
	InFlight int
	Ending   bool // it gets no more
}

// Workers are the children that sign, at this moment.
func (t *Token) Workers() []Worker {
	t.mu.Lock()
	defer t.mu.Unlock()
	ws := make([]Worker, len(t.live))
	for i, p := range t.live {
		ws[i] = Worker{p.pid(), p.answered, len(p.inFlight), p.draining}
	}
	return ws
}

// Close fails what waits with [hsm.ErrClosed], waits for what the workers do,
// no longer than CallTimeout, and for an act that writes, no longer than
// actTimeout, and ends them.
func (t *Token) Close() error {
	t.mu.Lock()
	was := t.closed
	t.closed = true
	t.failWaiting(hsm.ErrClosed)
	t.mu.Unlock()
	t.stop()
	t.running.Wait()
	if was {
		return nil
	}
	t.unwatch()
	t.watching.Wait()
	t.threads.end()
	return nil
}

// ErrCrashed is the error of a request over which two workers in turn have crashed or
// hung. It says more of the request than of the token.
var ErrCrashed error = &hsm.Error{Op: "worker", Class: hsm.ClassCrashed,
	Detail: "two workers in turn crashed or hung at this request; the log has what they said"}

var errTooLong = errors.New("request is too long for a worker")

// tooLong refuses what would not fit into a frame.
func tooLong(op string, n int) error {
	return &hsm.Error{Op: op, Class: hsm.ClassRefused, Detail: fmt.Sprintf("%v: %d bytes, of at most %d", errTooLong, n, maxBody)}
}
