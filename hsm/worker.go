package hsm

import (
	"errors"
	"log/slog"
	"runtime"
	"sync/atomic"

	"github.com/miekg/pkcs11"
)

// A job is one attempt of one operation. It has one outcome: the worker keeps
// it, or the caller, whose context ended, abandons it.
type job struct {
	run     func(*worker) error // on the worker's goroutine; its session is open
	done    chan error          // capacity 1: the worker never waits for a caller
	outcome atomic.Uint32
}

const (
	undecided = iota
	kept
	abandoned
)

// keep is called by the worker: the caller will take the result.
func (j *job) keep() bool {
	return j.outcome.CompareAndSwap(undecided, kept) || j.outcome.Load() == kept
}

// fail ends a job that no worker will do.
func (j *job) fail(err error) {
	if j.keep() {
		j.done <- err
	}
}

// abandon is called by the caller: it will not take the result.
func (j *job) abandon() bool { return j.outcome.CompareAndSwap(undecided, abandoned) }

// A worker is a session and the goroutine that uses it. A call into the module
// cannot be cancelled, so that a caller who must be able to leave hands it to
// the worker. One whose context never ends makes it itself, on the session of
// an idle worker, and spares two switches between threads (figures at
// BenchmarkSign).
type worker struct {
	p    *Pool
	jobs chan *job // capacity 1; sent to by whoever took the worker off p.idle

	// Only who runs the worker touches the rest: its goroutine, or a caller
	// that took it off p.idle. p.mu hands it from one to the other.
	sh    pkcs11.SessionHandle
	open  bool
	epoch uint64 // of sh, and of the handles that may be used with it
}

func (w *worker) loop() {
	// Without a thread of its own the goroutine comes out of the module on
	// another one each time. Measured with SoftHSM 2.6.1, 2 sessions, 8 callers,
	// of the rate of bare C_Sign: P-256 92 % (without: 81 %), Ed25519 106 %
	// (78 %), RSA-2048 95 % (85 %).
	runtime.LockOSThread()
	for j := range w.jobs {
		for j != nil {
			j = w.serve(j)
		}
	}
}

// serve does one job and returns the next; nil when there is none and the
// worker is idle again.
func (w *worker) serve(j *job) *job {
	if j.outcome.Load() == abandoned {
		return w.p.next(w)
	}
	err := w.ready()
	if errors.Is(err, errNoRoom) {
		return w.p.park(w, j)
	}
	if err == nil {
		err = j.run(w)
	}
	w.settle(err)
	next := w.p.next(w) // before the caller knows: its next job finds w idle
	if j.keep() {
		j.done <- err
	}
	return next
}

// ready makes sure of a session of the present epoch in which the user is
// logged in. It returns errNoRoom where the token grants no more sessions than
// the other workers hold.
func (w *worker) ready() error {
	p := w.p
	if e := p.operator.Load(); e != nil {
		return e
	}
	if w.open && w.epoch == p.epoch.Load() {
		return nil
	}
	w.drop()
	w.epoch = p.epoch.Load() // before the session is opened: a later loss voids it
	flags := p.sessionFlags()
	if p.writes {
		flags |= pkcs11.CKF_RW_SESSION
	}
	sh, err := p.api.OpenSession(p.slot, flags)
	if errors.Is(err, pkcs11.Error(pkcs11.CKR_SESSION_COUNT)) && p.live.Load() > 0 {
		return errNoRoom
	}
	if err != nil {
		return p.profile.fail("C_OpenSession", err)
	}
	w.sh, w.open = sh, true
	p.live.Add(1)
	if err := p.ensureLogin(sh); err != nil {
		w.drop() // or it would pass for one that is logged in
		return err
	}
	return nil
}

// settle does what the class of err asks of a session. It is the worker that
// does this, because the caller may have left.
func (w *worker) settle(err error) {
	e, ok := errors.AsType[*Error](err)
	if !ok {
		return
	}
	r := rules[e.Class]
	if e.Class == ClassOperator {
		w.p.operator.CompareAndSwap(nil, e)
	}
	if r.epoch {
		w.p.lost(w.epoch, r.login, e)
	}
	if r.drop {
		w.drop()
	}
}

func (w *worker) drop() {
	if !w.open {
		return
	}
	// Its error tells nothing: as often as not the session is dead already.
	w.p.api.CloseSession(w.sh)
	w.open = false
	w.p.live.Add(-1)
	w.p.unpark()
}

// writable gives run a read-write session. For what makes or destroys keys.
func (w *worker) writable(run func() error) error {
	if w.p.writes {
		return run()
	}
	return w.inNewSession(run)
}

// inNewSession gives run a read-write session in place of the worker's own, so
// that the number of sessions does not grow. Where that was the last one, the login
// goes with it.
func (w *worker) inNewSession(run func() error) error {
	w.drop()
	sh, err := w.p.api.OpenSession(w.p.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return w.p.profile.fail("C_OpenSession", err)
	}
	w.sh, w.open = sh, true
	w.p.live.Add(1)
	defer w.drop()
	if err := w.p.ensureLogin(sh); err != nil {
		return err
	}
	return run()
}

// lost records that what was opened or found in this epoch is void. The first
// to say so of an epoch counts; the others saw the same loss.
func (p *Pool) lost(epoch uint64, login bool, cause error) {
	p.loginMu.Lock()
	defer p.loginMu.Unlock()
	if p.epoch.Load() != epoch {
		return
	}
	// Who may not log in again looks at what the token says of its new session.
	p.relogin = p.relogin || login && p.ask == nil
	p.epoch.Store(epoch + 1)
	p.log.Warn("token sessions lost", slog.Uint64("epoch", epoch), slog.Any("error", cause))
}

// ensureLogin logs in where the session is not: the login belongs to the
// process and its token, not to the session, and is gone with the last
// session, which is why the pool keeps one that does nothing else.
func (p *Pool) ensureLogin(sh pkcs11.SessionHandle) error {
	p.loginMu.Lock()
	defer p.loginMu.Unlock()
	if e := p.operator.Load(); e != nil {
		return e
	}
	p.hold()
	in, err := p.loggedIn(sh)
	if err != nil || (in && !p.relogin) {
		return err
	}
	if p.ask != nil {
		if p.entered {
			return &Error{Op: "C_GetSessionInfo", Code: pkcs11.CKR_USER_NOT_LOGGED_IN, Class: ClassLogin}
		}
		if p.pin.Reveal() == "" {
			if p.pin, err = p.ask(p.info); err != nil {
				return err
			}
		}
	}
	err = p.api.Login(sh, pkcs11.CKU_USER, p.pin.Reveal())
	if err != nil && !errors.Is(err, pkcs11.Error(pkcs11.CKR_USER_ALREADY_LOGGED_IN)) {
		err = p.profile.fail(callLogin, err)
		if e, ok := errors.AsType[*Error](err); ok && e.Class == ClassOperator {
			p.operator.CompareAndSwap(nil, e)
		}
		return err
	}
	p.relogin, p.entered = false, true
	if p.ask != nil {
		p.pin = PIN{}
	}
	return nil
}

// hold opens the session that holds the login, once an epoch, where the token
// grants one more. Without it all still works, at the cost of a C_Login each
// time the last session goes; so an error is not one of the caller's. Called
// with loginMu held.
func (p *Pool) hold() {
	epoch := p.epoch.Load()
	if !p.spare || p.keeperEpoch == epoch {
		return
	}
	p.keeperEpoch = epoch
	sh, err := p.api.OpenSession(p.slot, p.sessionFlags())
	if p.keeping { // only now: the login goes with the last session
		p.api.CloseSession(p.keeper)
	}
	p.keeper, p.keeping = sh, err == nil
	if err != nil {
		p.log.Warn("no session to hold the login", slog.Any("error", p.profile.fail("C_OpenSession", err)))
	}
}

// sessionFlags are those of the sessions that sign, and of the one that holds the login.
func (p *Pool) sessionFlags() uint {
	if p.profile.ReadWrite {
		return pkcs11.CKF_SERIAL_SESSION | pkcs11.CKF_RW_SESSION
	}
	return pkcs11.CKF_SERIAL_SESSION
}

func (p *Pool) loggedIn(sh pkcs11.SessionHandle) (bool, error) {
	i, err := p.api.GetSessionInfo(sh)
	return i.State == cksROUser || i.State == cksRWUser, p.profile.fail("C_GetSessionInfo", err)
}
