// Package exit ends the command-line programs: one table from errors to exit
// codes, and one form of error message.
package exit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/signwarden/signwarden/gateway/sigerr"
)

// The exit codes of every command.
const (
	OK            = 0
	Failed        = 1
	Usage         = 2
	NotVerified   = 3
	Denied        = 4
	Unavailable   = 5
	SomeOfSeveral = 6
)

// codes maps the kinds of errors that a gateway tells apart; others are Failed.
var codes = []struct {
	kind error
	code int
}{
	{sigerr.NotFound, Denied},
	{sigerr.Denied, Denied},
	{sigerr.Disabled, Denied},
	{sigerr.Unauthenticated, Denied},
	{sigerr.Invalid, Usage},
	{sigerr.Conflict, Failed},
	{sigerr.Overloaded, Unavailable},
	{sigerr.Timeout, Unavailable},
	{sigerr.Canceled, Failed},
	{sigerr.Unsupported, Failed},
	{sigerr.TokenFailed, Unavailable},
	{sigerr.Unavailable, Unavailable},
}

// Error is an error that knows its exit code or what to do about it.
type Error struct {
	Err  error
	Code int    // 0: by the kind of Err
	Hint string // what to do next; empty: nothing to add
}

func (e *Error) Error() string { return e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// Hint adds what to do next to an error; nil stays nil.
func Hint(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return &Error{Err: err, Hint: fmt.Sprintf(format, args...)}
}

// WithCode gives an error an exit code; nil stays nil.
func WithCode(err error, code int) error {
	if err == nil {
		return nil
	}
	return &Error{Err: err, Code: code}
}

// UsageError is for a command line that cannot be carried out.
func UsageError(format string, args ...any) error {
	return &Error{Err: fmt.Errorf(format, args...), Code: Usage}
}

// Code returns the exit code of err.
func Code(err error) int {
	if err == nil {
		return OK
	}
	for e := err; e != nil; {
		x, ok := errors.AsType[*Error](e)
		if !ok {
			break
		}
		if x.Code != 0 {
			return x.Code
		}
		e = x.Err
	}
	kind := sigerr.Kind(err)
	for _, row := range codes {
		if row.kind == kind {
			return row.code
		}
	}
	return Failed
}

// hints are for kinds of errors that come without a hint of their own.
var hints = map[error]string{
	sigerr.NotFound:        "`signwarden key list` shows the keys you may see; an administrator grants more with `signwarden policy apply`",
	sigerr.Denied:          "an administrator can see why with `signwarden policy test`, and change it with `signwarden policy apply`",
	sigerr.Overloaded:      "try again later, or with fewer requests at a time",
	sigerr.Unavailable:     "is the gateway running, and does its log say why it cannot serve? `signwarden ping --wait 10s` waits for it",
	sigerr.TokenFailed:     "the gateway's log and audit log say what the token answered; `signwardend check` examines it",
	sigerr.Unauthenticated: "is it the right client profile, and are its address and server_name right? `signwardend client create NAME` makes a new one",
}

// Line is s as one line of output. Names of files, and what is in them, can hold
// line ends and a terminal's control sequences: what does not print is escaped.
func Line(s string) string {
	if utf8.ValidString(s) && strings.IndexFunc(s, func(r rune) bool { return !strconv.IsPrint(r) }) < 0 {
		return s
	}
	q := strconv.Quote(s)
	return q[1 : len(q)-1]
}

// OneLine is err with its message as Line has it; nil stays nil.
func OneLine(err error) error {
	if err == nil {
		return nil
	}
	return oneLine{err}
}

type oneLine struct{ err error }

func (o oneLine) Error() string { return Line(o.err.Error()) }
func (o oneLine) Unwrap() error { return o.err }

// Print writes err as "prog: message" and, where there is one, "hint: what to do".
func Print(w io.Writer, prog string, err error) {
	fmt.Fprintf(w, "%s: %v\n", prog, err)
	hint := hints[sigerr.Kind(err)]
	if x, ok := errors.AsType[*Error](err); ok && x.Hint != "" {
		hint = x.Hint
	}
	if hint != "" {
		fmt.Fprintf(w, "hint: %s\n", hint)
	}
}

// Execute runs a command. What goes wrong before a command has begun (an unknown
// command or flag, a missing argument) is an error of usage.
func Execute(ctx context.Context, root *cobra.Command) error {
	begun := false
	var wrap func(*cobra.Command)
	wrap = func(c *cobra.Command) {
		if run := c.RunE; run != nil {
			c.RunE = func(c *cobra.Command, args []string) error {
				begun = true
				return run(c, args)
			}
		}
		for _, sub := range c.Commands() {
			wrap(sub)
		}
	}
	wrap(root)
	c, err := root.ExecuteContextC(ctx)
	if err != nil && !begun {
		return Hint(UsageError("%w", err), "see `%s --help`", c.CommandPath())
	}
	return err
}

// Require marks a flag that the command has as one that must be given.
func Require(c *cobra.Command, flag string) {
	if err := c.MarkFlagRequired(flag); err != nil {
		panic(err) // there is no such flag: a mistake in the program
	}
}
