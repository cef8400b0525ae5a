// Package store keeps keys, policy and the audit log. [SQLite] is the embedded
// one; a shared database for several replicas will stand behind [Store] as well.
package store

import (
	"context"
	"errors"
	"time"

	"github.com/signwarden/signwarden/gateway/keys"
)

// ErrExists is returned where a key of that name is already stored.
var ErrExists = errors.New("already stored")

// Store is what the gateway keeps its state in. Implementations are safe for
// concurrent use.
type Store interface {
	// Load returns all keys and the policy source as of one moment.
	Load(ctx context.Context) (State, error)

	// Commit applies c as one transaction and returns the row number of its
	// first audit entry. When it returns nil the change is durable; on an error
	// it is unknown whether it was applied, and Load tells. Rows are numbered
	// from 0 without gaps, in the order of the commits.
	Commit(ctx context.Context, c Change) (firstRow int64, err error)

	// Audit returns up to limit entries from row from on, and the row number of
	// the first. A negative from means the last limit entries.
	Audit(ctx context.Context, from int64, limit int) (firstRow int64, entries [][]byte, err error)

	// Answers returns the answers of the last KeepAnswers at least, in the order of
	// their rows.
	Answers(ctx context.Context) ([]Answer, error)

	Close() error
}

// KeepAnswers is how long a store keeps answers.
const KeepAnswers = 75 * time.Second

// Answer is what was kept beside an audit row.
type Answer struct {
	Row           int64
	Entry, Answer []byte
}

// State is what Load returns.
type State struct {
	Keys   []keys.Key
	Policy []byte // source; nil before the first was applied
	// Pending are the pairs that were begun and neither registered nor forgotten.
	Pending []Pending
}

// Pending is a pair that is being made in the token, or was when the gateway ended.
type Pending struct {
	KeyName string
	ID      []byte // CKA_ID
}

// Change is one transaction: what it changes and the audit entries that say so.
type Change struct {
	CreateKey *keys.Key // ErrExists where the name is taken
	SetState  *SetState
	SetX509   *SetX509
	// SetOpenPGP are the keys of one certificate.
	SetOpenPGP []SetOpenPGP
	Begin      []Pending // pairs about to be made
	Forget     [][]byte  // CKA_IDs of pairs that are registered, by this change or before, or destroyed
	Policy     []byte
	Audit      [][]byte
	// Answers are kept beside the entries of Audit, one for each, nil for none; or
	// none of them has one, and Answers is nil.
	Answers [][]byte
}

// SetState puts a stored key into another state; where it is not stored the
// commit fails.
type SetState struct {
	Name  string
	State keys.State
}

// SetOpenPGP gives a stored key that has an OpenPGP certificate another one.
type SetOpenPGP struct {
	Name        string
	Certificate []byte
	Expires     time.Time // zero: never
	Disable     bool      // puts the key into the state keys.Disabled
}

// SetX509 gives a stored key another certificate chain.
type SetX509 struct {
	Name  string
	Chain [][]byte // DER
}
