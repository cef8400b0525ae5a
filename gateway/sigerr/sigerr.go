// Package sigerr holds the sentinel errors a front-end can be asked to tell
// apart. It is a leaf: it imports nothing of ours and knows no wire.
//
// The gateway wraps each with what it was doing; a front-end finds the kind
// with [Kind] and maps it to its own codes from one table. A kind that the
// table lacks is internal, and its text stays in our own log.
package sigerr

//lint:file-ignore ST1012 the package's name says already that these are errors

import "errors"

var (
	// NotFound: the key does not exist, or the caller may not know that it
	// does. The two are one error on purpose.
	NotFound = errors.New("no such key, or it is not yours to use")

	// Denied: the caller sees the key, and no rule allows this use of it.
	Denied = errors.New("denied by policy")

	// Disabled: the caller sees the key, and an administrator has disabled it.
	Disabled = errors.New("key is disabled")

	// Invalid: the request is wrong in itself (digest length, hash, name) and
	// will be refused however often it is sent.
	Invalid = errors.New("invalid request")

	// Conflict: the request contradicts an earlier one: a key name that is
	// taken, an idempotency id that was used for another digest.
	Conflict = errors.New("conflict")

	// Overloaded: a bound was reached; the same request may succeed later.
	Overloaded = errors.New("too many requests")

	// Timeout: the deadline passed first. The token may have signed; nothing
	// was released.
	Timeout = errors.New("deadline exceeded")

	// Canceled: the caller went away before the request was decided.
	Canceled = errors.New("canceled")

	// Unsupported: the token does not make such a signature with this key, and will
	// not however often it is asked.
	Unsupported = errors.New("not supported by the token")

	// TokenFailed: the token could not sign, or what it returned did not verify.
	TokenFailed = errors.New("token failure")

	// Unavailable: the gateway cannot serve now: it cannot record (and so
	// releases nothing), it is draining, or it cannot be reached.
	Unavailable = errors.New("gateway unavailable")

	// Unauthenticated: the peer did not prove who it is.
	Unauthenticated = errors.New("not authenticated")
)

// kinds is every sentinel, in the order in which Kind looks: where an error
// wraps two (a token failure caused by a deadline), the earlier one is told.
var kinds = []error{
	NotFound, Denied, Disabled, Invalid, Conflict, Overloaded,
	Timeout, Canceled, Unsupported, TokenFailed, Unavailable, Unauthenticated,
}

// Kinds returns every sentinel, for tests that check a table for holes.
func Kinds() []error { return append([]error(nil), kinds...) }

// Kind returns the sentinel that err wraps, or nil where it wraps none.
func Kind(err error) error {
	for _, k := range kinds {
		if errors.Is(err, k) {
			return k
		}
	}
	return nil
}
