// Package lease bounds what may be signed through one socket: with which keys,
// until when, and how often.
//
// It only takes away. What is left is still decided where the keys are. It knows
// no protocol; a front-end asks [Lease.Shows] before it names a key, and
// [Lease.Take] before it has something signed.
package lease

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"sync"
	"time"

	"github.com/signwarden/signwarden/gateway/sigerr"
)

var (
	// ErrExpired: the socket's time is over. It wraps sigerr.Denied.
	ErrExpired = fmt.Errorf("%w: the time of this socket is over", sigerr.Denied)

	// ErrSpent: the socket has given as many signatures as it may. It wraps
	// sigerr.Overloaded, but trying again does not help.
	ErrSpent = fmt.Errorf("%w: the signatures of this socket are spent", sigerr.Overloaded)
)

// Config says what a Lease leaves. The zero value leaves everything, for ever.
type Config struct {
	// Keys are names or globs, as path.Match has them: * does not match a slash.
	// A key that none matches does not exist for the socket. None: all keys.
	Keys []string
	// Expires is when the last signature may be asked for; zero: never.
	Expires time.Time
	// Signatures bounds how many are given in all; 0: no bound.
	Signatures int

	Now func() time.Time // nil: time.Now
}

// Lease is what a socket may still do. It is safe for concurrent use. A nil
// Lease bounds nothing.
type Lease struct {
	cfg Config

	// mu guards taken. It is held for an addition, so nobody waits.
	mu    sync.Mutex
	taken int
}

// New checks cfg, which must not change afterwards.
func New(cfg Config) (*Lease, error) {
	for _, glob := range cfg.Keys {
		if _, err := path.Match(glob, ""); err != nil || glob == "" {
			return nil, fmt.Errorf("keys: %q is no name or glob of a key", glob)
		}
	}
	if cfg.Signatures < 0 {
		return nil, errors.New("signatures: a bound cannot be negative")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	cfg.Keys = slices.Clone(cfg.Keys)
	return &Lease{cfg: cfg}, nil
}

// Shows says whether the socket may know of the key. It does not depend on time or
// number: a tool is told at its signature that the socket's time is over, rather than
// before that its key does not exist.
func (l *Lease) Shows(key string) bool {
	if l == nil || len(l.cfg.Keys) == 0 {
		return true
	}
	return slices.ContainsFunc(l.cfg.Keys, func(glob string) bool {
		ok, err := path.Match(glob, key)
		return ok && err == nil
	})
}

// Take takes one signature, or returns ErrExpired or ErrSpent. Call giveBack if none was
// released after all. Signatures under way count, so the bound holds however many
// are asked for at once.
func (l *Lease) Take() (giveBack func(), err error) {
	if l == nil {
		return func() {}, nil
	}
	if !l.cfg.Expires.IsZero() && !l.cfg.Now().Before(l.cfg.Expires) {
		return nil, ErrExpired
	}
	if l.cfg.Signatures == 0 {
		return func() {}, nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.taken >= l.cfg.Signatures {
		return nil, ErrSpent
	}
	l.taken++
	return sync.OnceFunc(func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.taken--
	}), nil
}
