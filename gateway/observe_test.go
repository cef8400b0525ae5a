package gateway_test

import (
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/signwarden/signwarden/gateway"
	"github.com/signwarden/signwarden/gateway/gatewaytest"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
	"github.com/signwarden/signwarden/gateway/store"
)

// seen is an observer that remembers.
type seen struct {
	mu      sync.Mutex
	stages  [gateway.Stages]int
	ended   []error
	entries int
	failed  int
}

func (s *seen) Stage(st gateway.Stage, took time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if took >= 0 {
		s.stages[st]++
	}
}

func (s *seen) Ended(err error, _ time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = append(s.ended, err)
}

func (s *seen) Committed(entries int, _ time.Duration, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.entries += entries
	if err != nil {
		s.failed++
	}
}

func TestObserver(t *testing.T) {
	o := &seen{}
	f := gatewaytest.New(t, twoTeams, func(c *gateway.Config) { c.Observer = o })
	f.Key(t, "a-1", keys.P256)
	alice := gatewaytest.Principal(t, "alice")
	for _, tt := range []struct {
		name   string
		key    string
		want   error
		stages [gateway.Stages]int
		before func()
	}{
		{"signed", "a-1", nil, [gateway.Stages]int{1, 1, 1}, nil},
		{"not found", "b-1", sigerr.NotFound, [gateway.Stages]int{}, nil},
		{"token failed", "a-1", sigerr.TokenFailed, [gateway.Stages]int{1, 1, 0}, func() { f.Token.After = func([]byte) []byte { return []byte("junk") } }},
	} {
		if tt.before != nil {
			tt.before()
		}
		*o = seen{}
		_, err := f.Sign(t.Context(), alice, gatewaytest.Request(tt.key, tt.name))
		if len(o.ended) != 1 || !errors.Is(o.ended[0], tt.want) || !errors.Is(err, tt.want) || o.stages != tt.stages || o.entries != 1 {
			t.Errorf("%s: %v, observed %+v", tt.name, err, o)
		}
	}
	if n := f.InFlight(); n != 0 {
		t.Errorf("%d in flight after all", n)
	}
}

// A gateway whose store fails is not ready; it finds out by itself when the
// store records again, and says so in one row.
func TestReady(t *testing.T) {
	f := gatewaytest.New(t, "")
	f.Key(t, "k", keys.P256)
	rows := len(f.Store.Entries(t))
	for range 3 {
		if err := f.Ready(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(f.Store.Entries(t)) - rows; n != 0 {
		t.Errorf("%d rows while all was well", n)
	}
	f.Store.SetFail(func(store.Change) (error, error) { return errors.New("disk full"), nil }, nil)
	if _, err := f.Sign(t.Context(), f.Root, gatewaytest.Request("k", "text")); err == nil {
		t.Fatal("signed")
	}
	for range 3 {
		if err := f.Ready(t.Context()); !errors.Is(err, sigerr.Unavailable) {
			t.Errorf("got %v, want Unavailable", err)
		}
	}
	f.Store.SetFail(nil, nil)
	for range 3 {
		if err := f.Ready(t.Context()); err != nil {
			t.Errorf("when the store is back: %v", err)
		}
	}
	if n := len(f.Store.Entries(t)) - rows; n != 1 || f.Store.Last(t).Action != "store.recover" {
		t.Errorf("%d rows, the last of %q; want one of store.recover", n, f.Store.Last(t).Action)
	}
}
