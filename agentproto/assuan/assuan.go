// Package assuan speaks Assuan, the line protocol of GnuPG's helpers
// (https://gnupg.org/documentation/manuals/assuan/): lines, escapes, limits,
// deadlines and the command loop. It knows no command; those come in a table.
//
// What [Serve] keeps:
//
//  1. Every command gets exactly one OK or ERR, and an ERR has a number that is
//     not 0: GnuPG hangs without the one and aborts without the other.
//  2. No line sent is longer than 998 bytes, or holds a line break of somebody else's.
//  3. A client cannot make the server hold more than a line of it, or wait longer
//     than the configured times: long between commands, short within a line.
//  4. A handler that panics takes its own connection with it, and nothing else.
package assuan

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"runtime/debug"
	"time"
)

// The defaults of Config.
const (
	// DefaultIdleTimeout bounds the wait for a next command to begin. It is long:
	// gpg looks its key up first and asks for the signature when it has hashed its
	// input, which can be a pipe that is fed for hours.
	DefaultIdleTimeout = 12 * time.Hour
	// DefaultLineTimeout bounds the time from the first byte of a line to its last.
	DefaultLineTimeout = 10 * time.Second
	// DefaultWriteTimeout bounds the wait for a client that does not read.
	DefaultWriteTimeout = 30 * time.Second
)

// Handler does one command. args is the rest of the line, without blanks around
// it, and valid until c is read from or the handler returns. The reply is OK if the error is nil,
// ERR with its number if it is or wraps an *Error, and General error otherwise.
// ctx ends when the server does: a client that hangs up is not noticed before the next read.
type Handler func(ctx context.Context, c *Conn, args []byte) error

// Config says how a connection is served. A zero time is its default.
type Config struct {
	Greeting string             // the text of the first OK
	Commands map[string]Handler // by upper-case name; not changed while serving

	IdleTimeout  time.Duration
	LineTimeout  time.Duration
	WriteTimeout time.Duration

	Logger *slog.Logger // of panics and of errors that are no *Error; nil discards
}

func (cfg Config) withDefaults() Config {
	for _, d := range []struct {
		field *time.Duration
		value time.Duration
	}{
		{&cfg.IdleTimeout, DefaultIdleTimeout},
		{&cfg.LineTimeout, DefaultLineTimeout},
		{&cfg.WriteTimeout, DefaultWriteTimeout},
	} {
		if *d.field <= 0 {
			*d.field = d.value
		}
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return cfg
}

// Serve greets the client and runs its commands until it hangs up, a handler
// does, or ctx ends; a command that is running then is finished. It leaves nc open. The error is nil when the client
// hung up between two lines.
func Serve(ctx context.Context, nc net.Conn, cfg Config) error {
	cfg = cfg.withDefaults()
	c := newConn(ctx, nc, cfg)
	stop := context.AfterFunc(ctx, func() { nc.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	err := c.writeLine("OK " + cfg.Greeting)
	if err != nil {
		return err
	}
	for !c.hangup {
		line, err := c.readLine()
		if errors.Is(err, ErrLineTooLong) {
			// What follows may be the rest of that line, or its secret: it is not parsed.
			return errors.Join(err, c.finish(errLineTooLong))
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		err = c.command(ctx, line)
		if err != nil {
			return err
		}
	}
	return c.w.Flush()
}

// finish sends a last ERR.
func (c *Conn) finish(e *Error) error {
	return errors.Join(c.writeLine(e.line()), c.w.Flush())
}

// command runs one line and writes its OK or ERR.
func (c *Conn) command(ctx context.Context, line []byte) error {
	name, args, skip, err := parseRequest(line)
	if skip {
		return nil
	}
	c.okText = ""
	if err == nil {
		err = c.run(ctx, name, args)
	}
	if err == nil && c.okText == "" {
		return c.writeLine("OK")
	}
	if err == nil {
		return c.writeLine("OK " + c.okText)
	}
	e, ok := errors.AsType[*Error](err)
	if !ok {
		c.cfg.Logger.Error("command failed", "command", name, "err", err)
		e = errGeneral
	}
	return c.writeLine(e.line())
}

func (c *Conn) run(ctx context.Context, name string, args []byte) (err error) {
	h, ok := c.cfg.Commands[name]
	if !ok {
		return errUnknown
	}
	defer func() {
		r := recover()
		if r != nil {
			// The state of a session whose handler stopped half way is not to be trusted.
			c.Hangup()
			c.cfg.Logger.Error("command panicked", "command", name, "panic", r, "stack", string(debug.Stack()))
			err = fmt.Errorf("panic in %s: %w", name, errGeneral)
		}
	}()
	return h(ctx, c, args)
}
