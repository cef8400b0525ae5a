// Package p11rpc speaks the RPC protocol of p11-kit, by which the distribution's
// own p11-kit-client.so carries the calls of PKCS#11 over a byte stream: frames,
// versions, signatures, values and the serving loop. It knows no object, key or
// mechanism; what the calls do comes in a table.
//
// There is no specification but p11-kit's source. This one was measured against
// clients of 0.24.1 (version 0), 0.25.5 (1) and 0.26.4 (2).
//
// What [Serve] keeps:
//
//  1. Every request whose frame is whole gets exactly one response. Clients have no
//     timeouts: one that is not answered waits for ever.
//  2. A call that is unknown, or has another signature than ours, is answered
//     CKR_FUNCTION_NOT_SUPPORTED; one whose arguments do not decode CKR_ARGUMENTS_BAD.
//     The connection goes on.
//  3. Requests run side by side and are answered as they finish, but those of one
//     PKCS#11 session run one after another, in the order in which they came.
//  4. A client cannot make the server hold more than MaxInFlight requests and
//     MaxHeld bytes of it (and the one request that is being read): beyond, nothing
//     more is read from it.
//  5. Lengths and counts are checked before anything is allocated for them.
//  6. A handler that panics takes its own connection with it, and nothing else.
package p11rpc

import (
	"context"
	"fmt"
	"log/slog"
	"time"
)

// The versions of the protocol that are spoken. The peers' first bytes settle on
// one; it changes nothing in what is sent, since clients do not keep to it.
const (
	MinVersion = 0 // 0.24 and before
	MaxVersion = 2 // 0.25.6 and after; 1 is 0.25.0
)

// The bounds of a message.
const (
	// MaxBody is the longest body that is decoded, in bytes. A longer one is read
	// past and answered CKR_DATA_LEN_RANGE.
	MaxBody = 1 << 20
	// maxSkip is the longest body that is read past: p11-kit writes none longer.
	maxSkip = 1<<31 - 1
	// maxOptions bounds the options of a frame, which are read past.
	maxOptions = 4 << 10
	// maxSignature bounds a signature; the longest known has 12 letters.
	maxSignature = 64
	// MaxAttributes bounds the attributes of one template, nested ones included.
	MaxAttributes = 256
	// maxDepth bounds how deep attribute templates may be nested.
	maxDepth = 8
)

// The defaults of Config.
const (
	// DefaultMaxInFlight bounds the requests of a connection that are not answered:
	// each thread of a client has one.
	DefaultMaxInFlight = 64
	// DefaultMaxHeld bounds their bodies, in bytes.
	DefaultMaxHeld = 4 << 20
	// DefaultIdleTimeout bounds the wait for a next request. It is long: a
	// program loads its keys and signs hours later.
	DefaultIdleTimeout = 12 * time.Hour
	// DefaultFrameTimeout bounds the time from the first byte of a frame to its last.
	DefaultFrameTimeout = 30 * time.Second
	// DefaultWriteTimeout bounds the wait for a client that does not read.
	DefaultWriteTimeout = 30 * time.Second
)

// RV is a CK_RV, PKCS#11's outcome of a call. As an error it is the answer to a
// request. 0, CKR_OK, is none.
type RV uint64

// The outcomes that this layer gives itself.
const (
	GeneralError         RV = 0x05 // a handler failed with no RV
	ArgumentsBad         RV = 0x07 // arguments do not decode
	DataLenRange         RV = 0x21 // body longer than MaxBody
	FunctionNotSupported RV = 0x54 // no such call, or not served
)

func (v RV) Error() string { return fmt.Sprintf("PKCS#11 error 0x%x", uint64(v)) }

// Handler does one call: arguments in the order of its signature, and results
// likewise. An error that is or wraps an RV is answered with it, any other with
// GeneralError, and logged. What args holds of bytes is the handler's to keep.
//
// ctx ends when the connection is given up, not when the client merely closes
// it: what is under way then is finished.
type Handler func(ctx context.Context, args []Value) ([]Value, error)

// Config says how a connection is served. The zero value of a number or a time is its default.
type Config struct {
	Calls map[CallID]Handler // not changed while serving
	// Quick says of a call that it waits for nothing. It is then done by the goroutine
	// that reads, which for it reads no further; nil: of none.
	Quick func(CallID) bool

	MaxInFlight  int
	MaxHeld      int
	IdleTimeout  time.Duration
	FrameTimeout time.Duration
	WriteTimeout time.Duration

	Logger *slog.Logger // of panics and of errors that are no RV; nil discards
}

func (cfg Config) withDefaults() Config {
	for _, n := range []struct {
		field *int
		value int
	}{
		{&cfg.MaxInFlight, DefaultMaxInFlight},
		{&cfg.MaxHeld, DefaultMaxHeld},
	} {
		if *n.field <= 0 {
			*n.field = n.value
		}
	}
	for _, d := range []struct {
		field *time.Duration
		value time.Duration
	}{
		{&cfg.IdleTimeout, DefaultIdleTimeout},
		{&cfg.FrameTimeout, DefaultFrameTimeout},
		{&cfg.WriteTimeout, DefaultWriteTimeout},
	} {
		if *d.field <= 0 {
			*d.field = d.value
		}
	}
	if cfg.Quick == nil {
		cfg.Quick = func(CallID) bool { return false }
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return cfg
}
