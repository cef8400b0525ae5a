package worker

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/signwarden/signwarden/hsm"
)

// actTimeout is how long an act that writes to the token may go on, its caller
// there or not: some tokens take a minute for an RSA key.
const actTimeout = 5 * time.Minute

// Generate is [hsm.Pool.Generate], done by a worker of its own. When ctx ends
// first, that worker destroys what it makes. Where it dies a pair with this id
// may remain, for Delete.
func (t *Token) Generate(ctx context.Context, label string, id []byte, algorithm string) (crypto.PublicKey, error) {
	b, err := t.act(ctx, "generate", kindGenerate, generation{label, id, algorithm}.append(nil))
	if e, ok := errors.AsType[*hsm.Error](err); ok && e.Class == hsm.ClassCrashed {
		return nil, fmt.Errorf("%w; a key with id %x may be left in the token, which Delete removes", err, id)
	}
	if err != nil {
		return nil, err
	}
	return parsePublic(b)
}

// Delete is [hsm.Pool.Delete], done by a worker of its own.
func (t *Token) Delete(ctx context.Context, id []byte) error {
	_, err := t.act(ctx, "delete", kindDelete, bytes.Clone(id))
	return err
}

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

// act has one request done by a child that starts for it. One does at a time.
func (t *Token) act(ctx context.Context, op string, kind byte, body []byte) ([]byte, error) {
	if len(body) > maxBody {
		return nil, tooLong(op, len(body))
	}
	select {
	case t.admin <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("%s: %w", op, ctx.Err())
	case <-t.closing.Done():
		return nil, fmt.Errorf("%s: %w", op, hsm.ErrClosed)
	}
	if !t.enter() {
		<-t.admin
		return nil, fmt.Errorf("%s: %w", op, hsm.ErrClosed)
	}
	defer t.running.Done()
	p, err := t.start(ctx, modeAdmin)
	if err != nil {
		<-t.admin
		return nil, fmt.Errorf("%s: %w", op, err)
	}
	type outcome struct {
		answer []byte
		err    error
	}
	came := make(chan outcome, 1)
	t.running.Go(func() {
		defer func() { <-t.admin }()
		answer, err := p.ask(op, kind, body)
		p.hangUp()
		came <- outcome{answer, err}
		p.conn.SetDeadline(time.Now().Add(endTimeout))
		io.Copy(io.Discard, p.conn) // until it is gone
		p.bury()
		p.log.Info("administrative worker ended", slog.String("act", op), slog.String("state", p.cmd.ProcessState.String()))
	})
	select {
	case o := <-came:
		return o.answer, o.err
	case <-ctx.Done():
		p.hangUp() // by which it knows, and undoes what it has begun
		return nil, fmt.Errorf("%s: %w", op, ctx.Err())
	}
}

// ask has a child answer one request, which is its first.
func (p *process) ask(op string, kind byte, body []byte) ([]byte, error) {
	p.conn.SetDeadline(time.Now().Add(actTimeout))
	_, err := p.conn.Write(appendFrame(nil, kind, 1, body))
	var f frame
	if err == nil {
		f, err = readFrame(p.conn)
	}
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, &hsm.Error{Op: op, Class: hsm.ClassCrashed, Detail: fmt.Sprintf("the administrative worker did not answer within %v and was killed", actTimeout)}
	case err != nil:
		return nil, &hsm.Error{Op: op, Class: hsm.ClassCrashed, Detail: fmt.Sprintf("the administrative worker died: %v; the log has what it said", err)}
	case f.kind == kindDone && f.number == 1:
		return f.body, nil
	case f.kind == kindFailed && f.number == 1:
		fail, err := parseFailure(f.body)
		if err != nil {
			return nil, err
		}
		return nil, fail
	}
	return nil, fmt.Errorf("%s: %w: kind %d, number %d", op, errFrame, f.kind, f.number)
}
