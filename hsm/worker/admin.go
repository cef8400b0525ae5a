package worker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/signwarden/signwarden/hsm"
)

// actTimeout is how long an act that writes to the token may go on, its caller
// there or not: some tokens take a minute for an RSA key.
const actTimeout = 5 * time.Minute

// enter has Close wait for the caller, until it calls running.Done; false where
// Close was called.
func (t *Token) enter() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.closed {
		t.running.Add(1)
	}
	return !t.closed
}

// takeTurn waits until no other act is done, and has Close wait for the caller.
func (t *Token) takeTurn(ctx context.Context, size int) error {
	if size > maxBody {
		return tooLong("act", size)
	}
	select {
	case t.admin <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	case <-t.closing.Done():
		return hsm.ErrClosed
	}
	if !t.enter() {
		<-t.admin
		return hsm.ErrClosed
	}
	return nil
}

// act has one request done by a child that starts for it. One does at a time. The
// body is overwritten when it is done: it may be a private key.
func (t *Token) act(ctx context.Context, op string, kind byte, body []byte) ([]byte, error) {
	if err := t.takeTurn(ctx, len(body)); err != nil {
		clear(body)
		return nil, fmt.Errorf("%s: %w", op, err)
	}
	defer t.running.Done()
	came := make(chan outcome, 1)
	t.running.Go(func() {
		defer func() { <-t.admin }()
		t.perform(ctx, op, kind, body, came)
	})
	select {
	case o := <-came:
		return o.answer, o.err
	case <-ctx.Done():
		return nil, fmt.Errorf("%s: %w", op, ctx.Err())
	}
}

type outcome struct {
	answer []byte
	err    error
}

// maxLoans is how many signing workers are asked for their sessions for one act.
const maxLoans = 2

// perform starts a child, has it do the act, tells the outcome, and returns when the
// child is gone. Where the token has no session left for it, a signing worker ends
// first and its successor waits: a token that serves only some sessions would
// otherwise make no key as long as we sign. When ctx ends the child undoes what it has
// begun.
func (t *Token) perform(ctx context.Context, op string, kind byte, body []byte, came chan<- outcome) {
	defer clear(body)
	mode := modeWrite
	if kind == kindList {
		mode = modeList
	}
	for loans := 0; ; loans++ {
		p, err := t.start(ctx, mode)
		if err == nil {
			err = ctx.Err() // which has not cut off the login
		}
		if err == nil && t.closing.Err() != nil {
			err = hsm.ErrClosed
		}
		var answer []byte
		if err == nil {
			stop := context.AfterFunc(ctx, p.hangUp)
			answer, err = p.ask(op, kind, body)
			stop()
		} else {
			err = fmt.Errorf("%s: %w", op, err)
		}
		if p != nil {
			p.hangUp()
		}
		e, ok := errors.AsType[*hsm.Error](err)
		again := ok && e.NoSession() && loans < maxLoans
		if !again {
			came <- outcome{answer, err}
		}
		if p != nil {
			p.conn.SetDeadline(time.Now().Add(endTimeout))
			io.Copy(io.Discard, p.conn) // until it is gone
			p.bury()
			p.log.Info("administrative worker ended", slog.String("act", op), slog.String("state", p.cmd.ProcessState.String()))
		}
		if !again {
			return
		}
		giveBack := t.borrow(ctx)
		if giveBack == nil {
			came <- outcome{nil, err}
			return
		}
		defer giveBack() // not before the act is over: its successor would take them
	}
}

// borrow ends a signing worker, whose successor does not start before the sessions
// are given back; nil where there is none, or ctx ended first.
func (t *Token) borrow(ctx context.Context) (giveBack func()) {
	t.mu.Lock()
	var p *process // that answers, and has the least to finish first
	for _, q := range t.live {
		if q.draining {
			continue
		}
		if p == nil || p.stalled && !q.stalled || p.stalled == q.stalled && len(q.inFlight) < len(p.inFlight) {
			p = q
		}
	}
	if p == nil {
		t.mu.Unlock()
		return nil
	}
	p.draining, p.lent = true, make(chan struct{})
	p.replace(CauseLent)
	t.mu.Unlock()
	giveBack = sync.OnceFunc(func() { close(p.lent) })
	p.log.Info("worker lends its sessions to an administrative one")
	select {
	case <-p.dead:
		return giveBack
	case <-ctx.Done():
	case <-t.closing.Done():
	}
	giveBack()
	return nil
}

// awaitReturn waits until what p lent is given back.
func (t *Token) awaitReturn(p *process) {
	t.mu.Lock()
	lent := p.lent
	t.mu.Unlock()
	if lent == nil {
		return
	}
	select {
	case <-lent:
	case <-t.closing.Done():
	}
}

// maxParts bounds an answer in parts: it has room for a list of MaxObjects whose four
// strings are all of MaxTold bytes.
const maxParts = hsm.MaxObjects * (4*hsm.MaxTold + 256)

// ask has a child answer one request, which is its first.
func (p *process) ask(op string, kind byte, body []byte) ([]byte, error) {
	p.conn.SetDeadline(time.Now().Add(actTimeout))
	request := appendFrame(nil, kind, 1, body)
	_, err := p.conn.Write(request)
	clear(request)
	var parts []byte
	var f frame
	for err == nil {
		f, err = readFrame(p.conn)
		if err != nil || f.kind != kindPart {
			break
		}
		if len(parts)+len(f.body) > maxParts {
			return nil, fmt.Errorf("%s: %w: an answer of more than %d bytes", op, errFrame, maxParts)
		}
		parts = append(parts, f.body...)
	}
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, &hsm.Error{Op: op, Class: hsm.ClassCrashed, Detail: fmt.Sprintf("the administrative worker did not answer within %v and was killed", actTimeout)}
	case err != nil:
		return nil, &hsm.Error{Op: op, Class: hsm.ClassCrashed, Detail: fmt.Sprintf("the administrative worker died: %v; the log has what it said", err)}
	case f.kind == kindDone && f.number == 1:
		return append(parts, f.body...), nil
	case f.kind == kindFailed && f.number == 1:
		fail, err := parseFailure(f.body)
		if err != nil {
			return nil, err
		}
		return nil, fail
	}
	return nil, fmt.Errorf("%s: %w: kind %d, number %d", op, errFrame, f.kind, f.number)
}
