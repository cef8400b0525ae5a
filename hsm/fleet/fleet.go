// Package fleet serves one set of keys from several PKCS#11 tokens.
//
// A key may be in more than one of them: the same CKA_ID with the same public
// key. A [Fleet] asks for a signature the token that is least busy, has the key,
// and works; and another one where that fails. How a key comes into a second
// token is between the tokens: nothing here can export or import one.
//
// What is promised:
//
//  1. A token signs with a pinned key only after it has shown that key's public
//     key, since it was last opened or readmitted. One that shows another is
//     refused for that key, and says so in the log and in Status.
//  2. A token that fails gets no more requests, but for a probe, until it
//     answers again. What it had is asked of another within the caller's
//     deadline; of each token once, and once more where one works again by then.
//  3. Where no token works, each is still asked: a fleet refuses nothing that
//     one of its tokens might do.
//  4. A PIN that a token has refused is not tried again before an operator has
//     acted; the others serve.
package fleet

import (
	"cmp"
	"context"
	"crypto"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/signwarden/signwarden/hsm"
	"github.com/signwarden/signwarden/hsm/worker"
)

// Token is what a Fleet needs of one: *worker.Token.
type Token interface {
	Sign(ctx context.Context, by string, weight int, id, digest []byte, opts crypto.SignerOpts) ([]byte, error)
	PublicKey(ctx context.Context, id []byte) (crypto.PublicKey, error)
	Generate(ctx context.Context, label string, id []byte, algorithm string) (crypto.PublicKey, error)
	Delete(ctx context.Context, id []byte) error
	Ping(ctx context.Context) error
	// Evict fails what waits and what is being worked on with err, where movable says
	// that another token has the key.
	Evict(err error, movable func(id []byte) bool)
	// Doubt says that it does not hold under id what it should.
	Doubt(id []byte)
	Stats() worker.Stats
	ReadPIN() error
	Close() error
}

var _ Token = (*worker.Token)(nil)

// A Member is a token of a fleet.
type Member struct {
	Name string
	// Open opens it; called again, with pauses, until it succeeds.
	Open func(ctx context.Context) (Token, error)
	// Mended says, after an error of class G, whether an operator has acted since.
	Mended func() bool
}

// Config is what a Fleet is made of.
type Config struct {
	// Members; keys are made in the first.
	Members []Member
	Logger  *slog.Logger // nil: discards
}

// maxMembers is as many as Sign can tell that they were tried.
const maxMembers = 64

// Bounds in time.
const (
	openGrace   = 5 * time.Second // for the other members, when one is open
	firstPause  = 100 * time.Millisecond
	maxPause    = time.Second // between probes, and attempts to open
	mendedEvery = time.Second
	probeFor    = time.Second // a probe, and then the check of keys
	watchEvery  = 25 * time.Millisecond
	// silence is how long a token may work without an answer while another has the
	// key: beyond, and ten times what its requests take.
	silence = 100 * time.Millisecond
	// lookEvery is how often a token is asked for registered keys that it does not have, for
	// an operator may have put them there, and lookFor for how long at a time: some of them, where they
	// are thousands.
	lookEvery = 10 * time.Second
	lookFor   = 500 * time.Millisecond
)

// Fleet is several tokens. It is safe for concurrent use.
type Fleet struct {
	log     *slog.Logger
	members []*member
	closing context.Context
	stop    context.CancelFunc
	running sync.WaitGroup

	// mu guards the pins and what members say of themselves. It is held for a
	// few look-ups, never while a token is asked.
	mu   sync.Mutex
	pins map[string]crypto.PublicKey // by CKA_ID
}

// Open opens every member, and returns when one serves and the others do, have
// failed, or take too long; those are opened in the background. Where none can be
// opened it returns all their errors.
func Open(ctx context.Context, c Config) (*Fleet, error) {
	if len(c.Members) == 0 || len(c.Members) > maxMembers {
		return nil, fmt.Errorf("a fleet of %d tokens: it has 1 to %d", len(c.Members), maxMembers)
	}
	f := &Fleet{log: c.Logger, pins: map[string]crypto.PublicKey{}}
	if f.log == nil {
		f.log = slog.New(slog.DiscardHandler)
	}
	f.closing, f.stop = context.WithCancel(context.WithoutCancel(ctx))
	tried := make(chan error, len(c.Members))
	for _, mc := range c.Members {
		m := &member{Member: mc, f: f, log: f.log.With("token", mc.Name), keys: map[string]location{}, lost: map[string]int{}, retry: make(chan struct{}, 1)}
		m.breaker.state = Broken
		f.members = append(f.members, m)
	}
	for _, m := range f.members {
		f.running.Go(func() { m.keep(ctx, tried) })
	}
	var errs []error
	var grace <-chan time.Time
	for range f.members {
		select {
		case err := <-tried:
			if err != nil {
				errs = append(errs, err)
			} else if grace == nil {
				grace = time.After(openGrace)
			}
			continue
		case <-grace:
		case <-ctx.Done():
			errs = append(errs, ctx.Err())
		}
		break
	}
	if grace == nil {
		f.Close()
		return nil, errors.Join(errs...)
	}
	f.running.Go(f.watch)
	return f, nil
}

// Close closes every token.
func (f *Fleet) Close() error {
	f.stop()
	f.running.Wait()
	var errs []error
	for _, m := range f.members {
		if m.token != nil {
			errs = append(errs, m.token.Close())
		}
	}
	return errors.Join(errs...)
}

// Pin says that a key is registered with this public key. Its locations are
// found before it is used, and soon.
func (f *Fleet) Pin(id []byte, public crypto.PublicKey) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if was := f.pins[string(id)]; was != nil && equal(was, public) {
		return
	}
	f.pins[string(id)] = public
	for _, m := range f.members {
		delete(m.keys, string(id))
		delete(m.lost, string(id))
		m.poke()
	}
}

// Doubt says that a signature by the key with this id was not that of the registered
// key: no token is used for it before it was asked what it holds.
func (f *Fleet) Doubt(id []byte) {
	f.mu.Lock()
	var doubted []Token
	for _, m := range f.members {
		if m.keys[string(id)] == here {
			m.keys[string(id)] = unknown
			doubted = append(doubted, m.token)
		}
	}
	f.mu.Unlock()
	for _, t := range doubted {
		t.Doubt(id)
	}
}

func equal(a, b crypto.PublicKey) bool {
	x, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && x.Equal(b)
}

// PublicKey is [worker.Token.PublicKey] of the tokens that are open and work; they agree
// on it, or it is an error.
func (f *Fleet) PublicKey(ctx context.Context, id []byte) (crypto.PublicKey, error) {
	var found crypto.PublicKey
	var at string
	var errs []error
	for _, m := range f.members {
		f.mu.Lock()
		t, works, why := m.token, m.breaker.works(), m.err
		f.mu.Unlock()
		if t == nil || !works {
			errs = append(errs, fmt.Errorf("token %s does not work: %w", m.Name, cmp.Or(why, error(errNone))))
			continue
		}
		pub, err := t.PublicKey(ctx, id)
		switch {
		case errors.Is(err, hsm.ErrNotFound):
		case err != nil:
			errs = append(errs, m.failed(t, err))
		case found != nil && !equal(found, pub):
			return nil, fmt.Errorf("public key: the tokens %s and %s have different keys with the id %x", at, m.Name, id)
		default:
			found, at = pub, m.Name
		}
	}
	switch {
	case found != nil:
		return found, nil
	case len(errs) > 0:
		return nil, errors.Join(errs...)
	}
	return nil, fmt.Errorf("public key: %w", hsm.ErrNotFound)
}

// Sign is [worker.Token.Sign] of a token that has the key. A key that is not pinned is
// that of a pair which Generate has just made, or one that is to be registered: the
// first token has it, or the first that does.
func (f *Fleet) Sign(ctx context.Context, by string, weight int, id, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	f.mu.Lock()
	_, pinned := f.pins[string(id)]
	f.mu.Unlock()
	if !pinned {
		return f.signUnpinned(ctx, by, weight, id, digest, opts)
	}
	var tried uint64
	var first error
	again := false
	for {
		m, t := f.pick(id, tried, again)
		if m == nil && !again && first != nil && broken(first) && !errors.Is(first, worker.ErrCrashed) {
			again, tried = true, 0
			continue
		}
		if m == nil {
			if first == nil {
				first = f.nowhere(id)
			}
			return nil, first
		}
		tried |= 1 << m.index()
		sig, err := m.sign(ctx, t, by, weight, id, digest, opts)
		if err == nil || ctx.Err() != nil || !elsewhere(err) {
			return sig, err
		}
		if errors.Is(err, worker.ErrCrashed) && errors.Is(first, worker.ErrCrashed) {
			return nil, err // two tokens are enough: it is the request
		}
		// The error that tells most: not that a token lacks the key, where another
		// has failed.
		if first == nil || errors.Is(first, hsm.ErrNotFound) {
			first = err
		}
	}
}

func (f *Fleet) signUnpinned(ctx context.Context, by string, weight int, id, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	t, err := f.primary()
	if err == nil {
		var sig []byte
		if sig, err = t.Sign(ctx, by, weight, id, digest, opts); err == nil {
			return sig, nil
		}
	}
	for _, m := range f.members[1:] {
		if ctx.Err() != nil || !errors.Is(err, hsm.ErrNotFound) && !broken(err) {
			break
		}
		f.mu.Lock()
		t, works := m.token, m.breaker.works()
		f.mu.Unlock()
		if t == nil || !works {
			continue
		}
		sig, other := t.Sign(ctx, by, weight, id, digest, opts)
		if other == nil {
			return sig, nil
		}
		if errors.Is(err, hsm.ErrNotFound) { // which tells least
			err = other
		}
	}
	return nil, err
}

// nowhere says why no token was asked.
func (f *Fleet) nowhere(id []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	var errs []error
	for _, m := range f.members {
		switch {
		case m.keys[string(id)] == other:
			errs = append(errs, fmt.Errorf("token %s: %w", m.Name, errOther))
		case m.token == nil:
			errs = append(errs, fmt.Errorf("token %s is not open: %w", m.Name, cmp.Or(m.err, error(errNone))))
		}
	}
	if len(errs) == 0 {
		return fmt.Errorf("sign: %w", hsm.ErrNotFound)
	}
	return errors.Join(errs...)
}

// elsewhere says whether another token may do what one has failed to.
func elsewhere(err error) bool {
	e, ok := errors.AsType[interface {
		error
		Refused() bool
	}](err)
	return !ok || !e.Refused()
}

// pick returns the member to ask next for a key: of those not tried, that works
// and has the least to do; where none works, one that might, unless it must.
func (f *Fleet) pick(id []byte, tried uint64, must bool) (*member, Token) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var best *member
	for i, m := range f.members {
		if tried&(1<<i) != 0 || m.token == nil || m.keys[string(id)] == absent || m.keys[string(id)] == other || must && !m.breaker.works() {
			continue
		}
		if best == nil || m.breaker.works() && !best.breaker.works() ||
			m.breaker.works() == best.breaker.works() && m.busy() < best.busy() {
			best = m
		}
	}
	if best == nil {
		return nil, nil
	}
	best.inFlight++
	return best, best.token
}

func (f *Fleet) primary() (Token, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if t := f.members[0].token; t != nil {
		return t, nil
	}
	return nil, &hsm.Error{Op: "fleet", Class: hsm.ClassGone, Detail: fmt.Sprintf(
		"the token %s, in which keys are made, is not open (%v)", f.members[0].Name, f.members[0].err)}
}

// Generate is [worker.Token.Generate] of the first token.
func (f *Fleet) Generate(ctx context.Context, label string, id []byte, algorithm string) (crypto.PublicKey, error) {
	t, err := f.primary()
	if err != nil {
		return nil, err
	}
	return t.Generate(ctx, label, id, algorithm)
}

// Delete destroys a pair in every token. Where one is not open, it errs, whatever
// the others have done; it may be called again.
func (f *Fleet) Delete(ctx context.Context, id []byte) error {
	var errs []error
	gone := 0
	for _, m := range f.members {
		f.mu.Lock()
		t := m.token
		delete(m.keys, string(id))
		f.mu.Unlock()
		err := error(&hsm.Error{Op: "delete", Class: hsm.ClassGone, Detail: "the token is not open"})
		if t != nil {
			err = t.Delete(ctx, id)
		}
		switch {
		case err == nil:
			gone++
		case !errors.Is(err, hsm.ErrNotFound):
			errs = append(errs, fmt.Errorf("token %s: %w", m.Name, err))
		}
	}
	if len(errs) == 0 && gone == 0 {
		return fmt.Errorf("delete: %w", hsm.ErrNotFound)
	}
	return errors.Join(errs...)
}

// ReadPIN has every open token read its PIN anew, and asks each again for the keys that
// it did not have: an operator has perhaps put them there.
func (f *Fleet) ReadPIN() error {
	var errs []error
	for _, m := range f.members {
		f.mu.Lock()
		t := m.token
		maps.DeleteFunc(m.keys, func(_ string, l location) bool { return l != here })
		for id := range m.lost {
			m.lost[id] = 0
		}
		f.mu.Unlock()
		if t != nil {
			errs = append(errs, t.ReadPIN())
		}
		m.poke()
	}
	return errors.Join(errs...)
}

// Ping asks the tokens in turn until one answers.
func (f *Fleet) Ping(ctx context.Context) error {
	var errs []error
	for _, m := range f.members {
		f.mu.Lock()
		t, works := m.token, m.breaker.works()
		f.mu.Unlock()
		if !works {
			continue
		}
		err := t.Ping(ctx)
		if err == nil {
			return nil
		}
		errs = append(errs, m.failed(t, err))
	}
	return errors.Join(append(errs, errNone)...)
}

var errNone = &hsm.Error{Op: "fleet", Class: hsm.ClassGone, Detail: "no token works; the log tells of each"}

// Stats is the sum of what the tokens that work say; Err is nil where one does.
func (f *Fleet) Stats() worker.Stats {
	sum := worker.Stats{Err: errNone}
	for _, s := range f.Status() {
		if s.State != Closed {
			continue
		}
		sum.Workers += s.Stats.Workers
		sum.InFlight += s.Stats.InFlight
		sum.Waiting += s.Stats.Waiting
		sum.Sessions += s.Stats.Sessions
		if s.Stats.Err == nil {
			sum.Err = nil
		}
	}
	return sum
}

// Status is what a fleet knows of one token.
type Status struct {
	Name  string
	State State
	Err   error // why it does not work
	Keys  int   // pinned keys that it has
	Other int   // pinned keys of which it has another under the id: an alarm
	Opens int   // how often it was found not to work
	Stats worker.Stats
}

// Status is that of each token, in their order.
func (f *Fleet) Status() []Status {
	var all []Status
	for _, m := range f.members {
		f.mu.Lock()
		s := Status{Name: m.Name, State: m.breaker.state, Err: m.err, Opens: m.breaker.opens}
		for _, l := range m.keys {
			switch l {
			case here:
				s.Keys++
			case other:
				s.Other++
			}
		}
		t := m.token
		f.mu.Unlock()
		if t != nil {
			s.Stats = t.Stats()
		}
		all = append(all, s)
	}
	return all
}

func (m *member) index() int { return slices.Index(m.f.members, m) }
