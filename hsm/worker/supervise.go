package worker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"time"

	"github.com/signwarden/signwarden/hsm"
)

// Pauses before a start, where the one before did not come to an answer.
const (
	minPause = 50 * time.Millisecond
	maxPause = time.Second
)

// endTimeout is how long a child that is to end has for closing its sessions.
const endTimeout = 5 * time.Second

// replacePause is the least age of a worker that is replaced because the
// token does not work: a new process may not help. loginPause is that of one
// which has lost its login, and can do nothing more.
var (
	replacePause = 5 * time.Second
	loginPause   = 250 * time.Millisecond
)

// start starts a child and returns when it is logged in. One does at a time:
// where its PIN is refused, no other has tried it, nor will.
func (t *Token) start(ctx context.Context, mode byte) (*process, error) {
	select {
	case t.starting <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-t.closing.Done():
		return nil, hsm.ErrClosed
	}
	defer func() { <-t.starting }()
	t.mu.Lock()
	refused := t.refused
	t.mu.Unlock()
	if refused != nil {
		return nil, refused
	}
	p, err := t.spawn()
	if err != nil {
		return nil, err
	}
	bound := t.startBound()
	err = p.greet(ctx, mode, bound)
	if err == nil {
		t.started(time.Since(p.born), false)
		return p, nil
	}
	p.bury()
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = &hsm.Error{Op: "starting a worker", Class: hsm.ClassCrashed,
			Detail: fmt.Sprintf("the module %s ended its process (%v); the log has what it said", t.c.Module, p.cmd.ProcessState)}
	}
	if cerr := ctx.Err(); cerr != nil && errors.Is(err, os.ErrDeadlineExceeded) {
		err = cerr
	} else if errors.Is(err, os.ErrDeadlineExceeded) {
		t.started(bound, true)
		err = &hsm.Error{Op: "starting a worker", Class: hsm.ClassCrashed,
			Detail: fmt.Sprintf("the module %s did not log in within %v", t.c.Module, time.Since(p.born).Round(time.Millisecond))}
	}
	return nil, err
}

// greet tells the child what it is for, gives it the PIN when it would log in,
// and waits until it is ready, no longer than bound. A login that an administrative
// child has begun goes on when ctx ends, or the token is closed: cut off it may count
// as a wrong try, and nobody would try the PIN before an operator has acted.
func (p *process) greet(ctx context.Context, mode byte, bound time.Duration) error {
	p.conn.SetDeadline(time.Now().Add(bound))
	now := func() { p.conn.SetDeadline(time.Unix(1, 0)) }
	left, closing := context.AfterFunc(ctx, now), context.AfterFunc(p.t.closing, now)
	defer left()
	defer closing()
	f, err := p.exchange(kindHello, newHello(mode, p.t.c).append(nil))
	if err == nil && f.kind == kindAsk {
		if mode != modeSign { // what has ended before, login sees
			left()
			closing()
		}
		f, err = p.login(ctx, f, bound)
	}
	if err != nil {
		return err
	}
	if p.info, err = welcome(f); err != nil {
		return err
	}
	return p.conn.SetDeadline(time.Time{})
}

// exchange sends one frame to a child that starts, and reads one.
func (p *process) exchange(kind byte, body []byte) (frame, error) {
	if err := p.say(kind, body); err != nil {
		return frame{}, err
	}
	return p.hear()
}

func (p *process) say(kind byte, body []byte) error {
	if _, err := p.conn.Write(appendFrame(nil, kind, 0, body)); err != nil {
		return fmt.Errorf("greeting a worker: %w", err)
	}
	return nil
}

func (p *process) hear() (frame, error) {
	f, err := readFrame(p.conn)
	if err != nil {
		return frame{}, fmt.Errorf("greeting a worker: %w", err)
	}
	return f, nil
}

// welcome reads what a child that has started says.
func welcome(f frame) (hsm.Info, error) {
	switch f.kind {
	case kindReady:
		info, err := parseInfo(f.body)
		if err != nil {
			return hsm.Info{}, fmt.Errorf("greeting a worker: %w", err)
		}
		return info, nil
	case kindFailed:
		fail, err := parseFailure(f.body)
		if err == nil {
			err = fail
		}
		return hsm.Info{}, err
	}
	return hsm.Info{}, fmt.Errorf("greeting a worker: %w: kind %d", errFrame, f.kind)
}

// admit has a child that is ready take requests.
func (t *Token) admit(p *process) {
	t.mu.Lock()
	p.progress = time.Now()
	t.live = append(t.live, p)
	t.down, t.misses = nil, 0
	fed := t.feed(nil)
	t.mu.Unlock()
	t.running.Go(p.serve)
	for _, q := range fed {
		q.flush()
	}
	p.log.Info("worker serves")
}

// keep sees to it that there is one worker, until Close. p is the first; nil:
// there is none yet.
func (t *Token) keep(p *process) {
	pause := time.Duration(0)
	for {
		if p == nil {
			if p = t.raise(&pause); p == nil {
				return
			}
		}
		age := time.NewTimer(t.c.RecycleAge)
		if t.c.RecycleAge < 0 {
			age.Stop()
		}
		select {
		case <-t.closing.Done():
			t.end(p)
			return
		case <-p.dead:
			if pause = 0; p.answered == 0 { // nobody else touches it any more
				pause = minPause
			}
			t.awaitReturn(p)
			p = nil
		case <-p.retire:
			p = t.succeed(p)
		case <-age.C:
			t.mu.Lock()
			p.why = CauseRecycled
			t.mu.Unlock()
			p = t.succeed(p)
		}
		age.Stop()
	}
}

// raise starts a worker in place of one that died, as often as it takes. It
// returns nil where none will start.
func (t *Token) raise(pause *time.Duration) *process {
	for {
		if !t.sleep(*pause) {
			return nil
		}
		p, err := t.start(t.closing, modeSign)
		if err == nil {
			t.admit(p)
			return p
		}
		*pause = min(max(2**pause, minPause), maxPause)
		t.mu.Lock()
		refused, mended := t.refused != nil, t.mended
		if !t.hopeful(err) {
			t.down = err
			if !t.serving() {
				t.failWaiting(err)
			}
		}
		t.mu.Unlock()
		if t.closing.Err() != nil {
			return nil
		}
		if refused {
			select {
			case <-mended:
				*pause = 0
				continue
			case <-t.closing.Done():
				return nil
			}
		}
		t.ended(CauseStart)
		t.log.Error("no worker could be started", slog.Any("error", err), slog.Duration("next", *pause))
	}
}

// hopeFor bounds how long after a start that failed others are waited for.
const hopeFor = 2 * time.Second

// hopeful says whether the next start may well succeed after one that crashed, was cut
// off, or met a token that did not work: it comes soon, and who has the time waits for
// it. mu is held.
func (t *Token) hopeful(err error) bool {
	if t.misses++; t.misses == 1 {
		t.missed = time.Now()
	}
	e, ok := errors.AsType[*hsm.Error](err)
	if ok && (e.Class == hsm.ClassOperator || e.Class == hsm.ClassRefused) {
		return false
	}
	return t.misses <= t.c.Workers && time.Since(t.missed) < hopeFor
}

// succeed replaces a worker that is old or does not work: first there is the
// new one, then the old one ends. Where no other starts the old one stays.
func (t *Token) succeed(p *process) *process {
	t.mu.Lock()
	late := t.hurried(p)
	needless := !late && (p.why == "" || p.why == CauseStalled) // it stalled, and may have gone on since
	switch {
	case needless:
		p.why = ""
	case late:
		t.hurriedAt = time.Now()
		if p.why == "" {
			p.why = CauseStalled
		}
	}
	t.mu.Unlock()
	if needless {
		return p
	}
	if !late && !t.due(p) {
		t.end(p)
		t.awaitReturn(p)
		return nil
	}
	q, err := t.start(t.closing, modeSign)
	if err != nil {
		t.mu.Lock()
		refused, draining := t.refused != nil, p.draining || t.makesRoom(p, err)
		t.mu.Unlock()
		if draining || t.closing.Err() != nil {
			t.end(p)
			t.awaitReturn(p)
			return nil
		}
		p.log.Error("worker has no successor and stays", slog.Any("error", err))
		if refused { // and no start will do better
			return p
		}
		t.mu.Lock()
		p.born = time.Now() // so that it is not tried again at once
		if late {
			t.hurryFailed = p.born
		}
		if p.why == CauseDoubt {
			p.why = "" // the next doubt asks for it
		} else {
			p.replace(p.why)
		}
		t.mu.Unlock()
		return p
	}
	t.admit(q)
	t.running.Go(func() { t.end(p) }) // which may take CallTimeout, and q wants its keeper
	return q
}

// makesRoom says whether p is to end first, where the token has no session for its successor:
// while another one serves, or because what p sees may be wrong. It drains then. mu is held.
func (t *Token) makesRoom(p *process, err error) bool {
	e, ok := errors.AsType[*hsm.Error](err)
	if !ok || !e.NoSession() {
		return false
	}
	p.draining = p.why == CauseDoubt || slices.ContainsFunc(t.live, func(q *process) bool { return q != p && !q.draining })
	return p.draining
}

// due waits until p is old enough to be replaced. It returns false where p is
// to end without a successor: it has died, none would log in, or its sessions
// are lent.
func (t *Token) due(p *process) bool {
	t.mu.Lock()
	refused, pause := t.refused != nil && p.draining || p.lent != nil, replacePause
	if p.draining {
		pause = min(pause, loginPause)
	}
	t.mu.Unlock()
	if refused {
		return false
	}
	timer := time.NewTimer(time.Until(p.born.Add(pause)))
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
			return true
		case <-p.retire:
			t.mu.Lock()
			late, lent := t.hurried(p), p.lent != nil
			t.mu.Unlock()
			if late || lent {
				return !lent
			}
			continue
		case <-p.dead:
		case <-t.closing.Done():
		}
		return false
	}
}

// end has a worker finish what it has, and end.
func (t *Token) end(p *process) {
	t.mu.Lock()
	p.draining = true
	p.checkDrained()
	t.mu.Unlock()
	select {
	case <-p.drained:
	case <-p.dead:
	}
	p.hangUp()
	p.await(endTimeout)
}

// await waits for the end of a child; its time over, kills it.
func (p *process) await(d time.Duration) {
	late := time.AfterFunc(d, p.kill)
	defer late.Stop()
	<-p.dead
}

// sleep waits, and returns false at Close.
func (t *Token) sleep(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return t.closing.Err() == nil
	case <-t.closing.Done():
		return false
	}
}
