package fleet

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/signwarden/signwarden/hsm"
	"github.com/signwarden/signwarden/hsm/worker"
)

// location is what is known of a key in a token.
type location byte

const (
	unknown location = iota // it has to be asked first
	here                    // it has the key
	absent                  // it has no key with that id
	other                   // it has another key under that id, and is not to use it
)

// member is a token and what is known of it.
type member struct {
	Member
	f     *Fleet
	log   *slog.Logger
	retry chan struct{} // capacity 1: something has changed for keep to see to

	// Fleet.mu guards these.
	token    Token // nil until it was opened; the same one then
	breaker  breaker
	err      error // why it does not work
	keys     map[string]location
	lost     map[string]int // of each registered key that it has or had: looks at it since it was not there
	inFlight int
	took     time.Duration // what a request takes it: of those at a time, a moving average
	crashes  int           // requests that crashed its workers, since one that did not
}

// busy says how long a further request would take; Fleet.mu is held.
func (m *member) busy() time.Duration {
	return time.Duration(m.inFlight+1) * max(m.took, time.Microsecond)
}

func (m *member) poke() {
	select {
	case m.retry <- struct{}{}:
	default:
	}
}

// sign asks a token that pick has chosen, and takes note of what comes of it.
func (m *member) sign(ctx context.Context, t Token, by string, weight int, id, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	f := m.f
	f.mu.Lock()
	at, n := m.keys[string(id)], m.inFlight
	f.mu.Unlock()
	began := time.Now()
	var sig []byte
	var err error
	if at == unknown {
		err = m.check(ctx, t, id)
	}
	if err == nil {
		sig, err = t.Sign(ctx, by, weight, id, digest, opts)
	}
	took := time.Since(began) / time.Duration(n)
	f.mu.Lock()
	m.inFlight--
	if errors.Is(err, hsm.ErrNotFound) && at == here {
		delete(m.keys, string(id)) // it had it
	}
	if err == nil {
		m.crashes = 0
	}
	if err == nil && at == here {
		m.took += (took - m.took) / 16
	}
	f.mu.Unlock()
	if err == nil || ctx.Err() != nil {
		return sig, err
	}
	return nil, m.failed(t, err)
}

var errOther = errors.New("the token has another key under the registered id, and is not used for it")

// check asks a token for the public key of a pinned id, and remembers the answer.
// It returns nil where that is the registered one.
func (m *member) check(ctx context.Context, t Token, id []byte) error {
	f := m.f
	got, err := t.PublicKey(ctx, id)
	f.mu.Lock()
	defer f.mu.Unlock()
	want, pinned := f.pins[string(id)]
	switch {
	case !pinned:
		return fmt.Errorf("key %x is not pinned", id)
	case errors.Is(err, hsm.ErrNotFound):
		m.keys[string(id)] = absent
	case err != nil:
	case equal(want, got):
		if m.lost[string(id)] > 0 {
			m.log.Info("the token has a registered key again", slog.String("id", fmt.Sprintf("%x", id)))
		}
		m.keys[string(id)], m.lost[string(id)] = here, 0
	default:
		known := m.keys[string(id)] == other
		m.keys[string(id)] = other
		err = errOther
		if known {
			break
		}
		m.log.Error("the token has another key under a registered id: it is not used for that key", slog.String("id", fmt.Sprintf("%x", id)))
	}
	return err
}

// maxCrashes is how many requests in turn may crash a token's workers before it is
// the token that does not work. One is the request's own fault: nobody is to bring a
// token down for all by what he asks of it.
const maxCrashes = 3

// failed opens the breaker where an error says that the token does not work, and
// has what else it was asked go elsewhere.
func (m *member) failed(t Token, err error) error {
	cause := err
	err = fmt.Errorf("token %s: %w", m.Name, err)
	if !broken(err) {
		return err
	}
	m.f.mu.Lock()
	if errors.Is(err, worker.ErrCrashed) {
		if m.crashes++; m.crashes < maxCrashes {
			m.f.mu.Unlock()
			return err
		}
	}
	first := m.breaker.open()
	m.err = err
	elsewhere := m.f.others(m)
	m.f.mu.Unlock()
	if first {
		m.log.Error("the token does not work and gets no requests", slog.Any("error", err))
		t.Evict(cause, func(id []byte) bool { return elsewhere[string(id)] })
		m.poke()
	}
	return err
}

// others are the pinned keys that another member which works may have; mu is held.
func (f *Fleet) others(m *member) map[string]bool {
	ids := map[string]bool{}
	for _, o := range f.members {
		if o == m || !o.breaker.works() {
			continue
		}
		for id := range f.pins {
			if l := o.keys[id]; l == here || l == unknown {
				ids[id] = true
			}
		}
	}
	return ids
}

// broken says whether an error is of the token, and not of the request or of a
// queue that is full.
func broken(err error) bool {
	if e, ok := errors.AsType[*hsm.Error](err); ok {
		return e.Class == hsm.ClassGone || e.Class == hsm.ClassOperator || e.Class == hsm.ClassCrashed
	}
	busy, ok := errors.AsType[interface {
		error
		Busy() bool
	}](err)
	return !(ok && busy.Busy()) && !errors.Is(err, hsm.ErrNotFound) && !errors.Is(err, errOther) &&
		!errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded)
}

// keep opens the token, and then sees to it that it is probed when it does not
// work, and asked for its keys, until Close. It tells tried of the first attempt.
func (m *member) keep(ctx context.Context, tried chan<- error) {
	if !m.openIt(ctx, tried) {
		return
	}
	next := time.Now().Add(lookEvery)
	for {
		m.f.mu.Lock()
		works, pause := m.breaker.works(), m.breaker.pause
		m.f.mu.Unlock()
		var probe, look <-chan time.Time
		if works {
			m.checkAll(m.f.closing)
			look = time.After(time.Until(next))
		} else {
			probe = time.After(pause)
		}
		select {
		case <-m.retry:
			continue
		case <-look:
			m.lookAgain()
			next = time.Now().Add(lookEvery)
		case <-probe:
			m.probe()
		case <-m.f.closing.Done():
			return
		}
	}
}

// openIt opens the token, as often as it takes; false: Close was called.
func (m *member) openIt(ctx context.Context, tried chan<- error) bool {
	f := m.f
	for pause := firstPause; ; pause = min(2*pause, maxPause) {
		octx, cancel := context.WithCancel(ctx)
		stop := context.AfterFunc(f.closing, cancel)
		t, err := m.Open(octx)
		stop()
		cancel()
		ctx = f.closing // the first attempt is the caller's
		f.mu.Lock()
		m.token, m.err = t, err
		if err == nil {
			m.breaker.close()
			m.crashes = 0
		}
		f.mu.Unlock()
		if tried != nil {
			if err != nil {
				tried <- fmt.Errorf("token %s: %w", m.Name, err)
			} else {
				tried <- nil
			}
			tried = nil
		}
		if err == nil {
			m.log.Info("the token serves")
			return true
		}
		if f.closing.Err() != nil {
			return false
		}
		m.log.Error("the token could not be opened", slog.Any("error", err))
		if e, ok := errors.AsType[*hsm.Error](err); ok && e.Class == hsm.ClassOperator {
			for m.Mended == nil || !m.Mended() {
				if !m.sleep(mendedEvery) {
					return false
				}
			}
			pause = 0
		}
		if !m.sleep(pause) {
			return false
		}
	}
}

func (m *member) sleep(d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-m.f.closing.Done():
		return false
	}
}

// probe asks a token that did not work whether it does again, and which keys it
// has, before it gets a request.
func (m *member) probe() {
	f := m.f
	f.mu.Lock()
	m.breaker.probe()
	clear(m.keys) // it may be another token by now
	t := m.token
	f.mu.Unlock()
	ctx, cancel := context.WithTimeout(f.closing, probeFor)
	defer cancel()
	err := t.Ping(ctx)
	if err == nil {
		err = m.checkAll(ctx)
	}
	if err != nil && f.closing.Err() == nil {
		f.mu.Lock()
		m.breaker.open()
		m.err = fmt.Errorf("token %s: %w", m.Name, err)
		f.mu.Unlock()
		return
	}
	f.mu.Lock()
	m.breaker.close()
	m.crashes = 0
	m.err = nil
	f.mu.Unlock()
	m.log.Info("the token works again and gets requests")
}

// checkAll asks the token for every pinned key of which it is not known whether
// it has it. What ctx leaves no time for is asked before it is used. It returns
// the error of a token that does not work.
func (m *member) checkAll(ctx context.Context) error {
	f := m.f
	f.mu.Lock()
	t := m.token
	var ids [][]byte
	for id := range f.pins {
		if m.keys[id] == unknown {
			ids = append(ids, []byte(id))
		}
	}
	f.mu.Unlock()
	return m.checkThese(ctx, t, ids)
}

func (m *member) checkThese(ctx context.Context, t Token, ids [][]byte) error {
	for _, id := range ids {
		if ctx.Err() != nil {
			return nil
		}
		if err := m.check(ctx, t, id); err != nil && ctx.Err() == nil && broken(err) {
			return m.failed(t, err)
		}
	}
	return nil
}

// lookAgain asks the token for keys that it does not have. Where it had one and still does not
// have it, what its workers see is in doubt too, ever less often: it may have been taken away
// for good.
func (m *member) lookAgain() {
	f := m.f
	ctx, cancel := context.WithTimeout(f.closing, lookFor)
	defer cancel()
	f.mu.Lock()
	t := m.token
	var ids [][]byte // in no order: where they are many, others come first next time
	for id := range f.pins {
		if m.keys[id] > here {
			ids = append(ids, []byte(id))
		}
	}
	f.mu.Unlock()
	m.checkThese(ctx, t, ids) // whose error has opened the breaker
	var doubt []byte
	f.mu.Lock()
	for _, id := range ids {
		n, had := m.lost[string(id)]
		if !had || m.keys[string(id)] <= here {
			continue
		}
		if n++; n&(n-1) == 0 { // 1, 2, 4, ...
			doubt = id
		}
		m.lost[string(id)] = n
	}
	f.mu.Unlock()
	if doubt != nil {
		t.Doubt(doubt)
	}
}

// watch looks for tokens that are silent: whose workers have requests and answer
// none. A call into a module cannot be cancelled, but it can be asked elsewhere.
func (f *Fleet) watch() {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-f.closing.Done():
			return
		}
		for _, m := range f.members {
			f.mu.Lock()
			t, ask := m.token, m.breaker.works() && m.inFlight > 0
			// Where it is the only one nothing is better elsewhere. So that a machine that
			// stood still does not take every token for silent.
			ask = ask && slices.ContainsFunc(f.members, func(o *member) bool { return o != m && o.breaker.works() })
			f.mu.Unlock()
			if !ask {
				continue
			}
			s := t.Stats()
			if s.Err != nil {
				m.failed(t, s.Err)
			} else if s.Workers == 0 {
				m.failed(t, &hsm.Error{Op: "sign", Class: hsm.ClassCrashed, Detail: "it has no worker"})
			} else if s.Silent > silence+10*s.Pace {
				m.failed(t, &hsm.Error{Op: "sign", Class: hsm.ClassCrashed, Detail: fmt.Sprintf("no worker has answered for %v", s.Silent.Round(time.Millisecond))})
			}
		}
	}
}
