package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/signwarden/signwarden/hsm"
)

// Tries remembers what became of PINs, for longer than a process lives. It is
// safe for concurrent use; one login at a time is under way.
type Tries interface {
	// Try is called before a child tries pin on the token of which i tells. An
	// error of class G says that pin is not to be tried before an operator has
	// acted; any other, that it cannot be now. Otherwise done is called once: with
	// nil where the token took the PIN, with its error where it did not, with
	// [ErrInterrupted] where nobody knows, and with an [hsm.Error] of another class
	// than G and H where it was not tried.
	Try(i hsm.Info, pin hsm.PIN) (done func(error), err error)
	// Refuses returns the error of class G with which Try would meet pin on the
	// token it was last called for, or nil. It is called often.
	Refuses(pin hsm.PIN) error
}

// ErrInterrupted: a child ended, or was killed, while it logged in.
var ErrInterrupted = errors.New("the login was cut off")

// operatorPoll is how often it is looked whether an operator has acted, while
// the PIN is refused.
const operatorPoll = time.Second

// login answers a child that would log in, and returns what it says then.
// Where its PIN is not to be tried, or is refused, nothing starts any more.
func (p *process) login(ctx context.Context, f frame, bound time.Duration) (frame, error) {
	t := p.t
	i, err := parseInfo(f.body)
	if err != nil {
		return frame{}, fmt.Errorf("greeting a worker: %w", err)
	}
	t.mu.Lock()
	pin := t.pin
	t.mu.Unlock()
	done := func(error) {}
	if t.c.Tries != nil {
		if done, err = t.c.Tries.Try(i, pin); err != nil {
			t.refuseFor(err)
			return frame{}, err
		}
	}
	if !i.CountsPINs {
		// A login that is cut off may have been a wrong try, and nobody would know.
		bound = t.c.StartTimeout
	}
	p.conn.SetDeadline(time.Now().Add(bound)) // Try may have taken long
	if ctx.Err() != nil || t.closing.Err() != nil {
		p.conn.SetDeadline(time.Unix(1, 0)) // which was what we have just undone
	}
	if err := p.say(kindPIN, []byte(pin.Reveal())); err != nil {
		done(&hsm.Error{Op: "C_Login", Class: hsm.ClassGone, Detail: "the worker ended before it had the PIN"})
		return frame{}, err
	}
	f, err = p.hear()
	if err != nil {
		done(ErrInterrupted)
		return frame{}, err
	}
	_, err = welcome(f)
	done(err)
	if err != nil {
		t.refuseFor(err)
	}
	return f, err
}

// refuseFor ends all starts where err is of class G, and says why.
func (t *Token) refuseFor(err error) {
	if e, ok := errors.AsType[*hsm.Error](err); !ok || e.Class != hsm.ClassOperator {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.refused == nil {
		t.refused, t.mended = err, make(chan struct{})
		t.log.Error("the token's PIN is not tried again before an operator has seen to it", slog.Any("error", err))
		t.running.Go(t.awaitOperator)
	}
	if !t.serving() {
		t.failWaiting(t.refused)
	}
}

// awaitOperator looks whether there is another PIN, or the refusal is
// forgotten, until one of the two is so.
func (t *Token) awaitOperator() {
	for !t.mend() && t.sleep(operatorPoll) {
	}
}

// mend has workers start again where an operator has acted, and tells whether
// they do.
func (t *Token) mend() bool {
	t.reading.Lock()
	defer t.reading.Unlock()
	t.mu.Lock()
	pin, refused := t.pin, t.refused
	t.mu.Unlock()
	if t.c.ReadPIN != nil {
		var err error
		if pin, err = t.c.ReadPIN(); err != nil {
			return false // it is being written, perhaps
		}
	}
	return t.adopt(pin, refused)
}

// adopt takes pin, which was read while refused was the state, for the workers that
// start from now on. It returns whether they do start: where pin is another one, or
// its refusal is forgotten.
func (t *Token) adopt(pin hsm.PIN, refused error) bool {
	forgotten := t.c.Tries != nil && t.c.Tries.Refuses(pin) == nil
	t.mu.Lock()
	defer t.mu.Unlock()
	changed := pin.Reveal() != t.pin.Reveal()
	if t.refused != nil && t.refused != refused && !changed {
		return false // it was refused meanwhile
	}
	if changed {
		t.pin = pin
		t.log.Info("the token's PIN was read anew and is another one")
	}
	if t.refused == nil {
		return true
	}
	if !changed && !forgotten {
		return false
	}
	t.refused, t.down = nil, nil
	close(t.mended)
	t.log.Info("an operator has seen to the token's PIN: it is tried")
	return true
}

// ReadPIN reads the PIN anew. Those workers that are logged in stay so.
func (t *Token) ReadPIN() error {
	if t.c.ReadPIN == nil {
		return nil
	}
	t.reading.Lock()
	defer t.reading.Unlock()
	t.mu.Lock()
	refused := t.refused
	t.mu.Unlock()
	pin, err := t.c.ReadPIN()
	if err == nil {
		t.adopt(pin, refused)
	}
	return err
}
