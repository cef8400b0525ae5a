package lease_test

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signwarden/signwarden/agentproto/lease"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

func newLease(t *testing.T, cfg lease.Config) *lease.Lease {
	t.Helper()
	l, err := lease.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestShows(t *testing.T) {
	tests := []struct {
		name string
		keys []string
		key  string
		want bool
	}{
		{"no list", nil, "release", true},
		{"name", []string{"release"}, "release", true},
		{"another name", []string{"release"}, "release2", false},
		{"glob", []string{"nightly-*"}, "nightly-2027", true},
		{"glob and a slash", []string{"nightly-*"}, "nightly-a/b", false},
		{"second of two", []string{"a", "b?"}, "b1", true},
		{"none of two", []string{"a", "b?"}, "b", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := newLease(t, lease.Config{Keys: tt.keys}).Shows(tt.key); got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
	if !(*lease.Lease)(nil).Shows("release") {
		t.Error("no lease shows nothing")
	}
}

func TestExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLease(t, lease.Config{Expires: time.Now().Add(time.Hour)})
		time.Sleep(time.Hour - time.Nanosecond)
		if _, err := l.Take(); err != nil {
			t.Errorf("in time: %v", err)
		}
		time.Sleep(time.Nanosecond)
		_, err := l.Take()
		if !errors.Is(err, lease.ErrExpired) || sigerr.Kind(err) != sigerr.Denied {
			t.Errorf("at its end: %v", err)
		}
		if !l.Shows("release") {
			t.Error("at its end the key is not shown: the tool would say that it does not exist")
		}
	})
}

// However many take at once, the bound holds; what was given back can be taken again, once.
func TestSignatures(t *testing.T) {
	const bound = 10
	l := newLease(t, lease.Config{Signatures: bound})
	var got atomic.Int32
	var back sync.Map
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() {
			giveBack, err := l.Take()
			if err == nil {
				got.Add(1)
				back.Store(i, giveBack)
			} else if !errors.Is(err, lease.ErrSpent) || sigerr.Kind(err) != sigerr.Overloaded {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got.Load() != bound {
		t.Fatalf("%d taken, want %d", got.Load(), bound)
	}
	back.Range(func(_, giveBack any) bool {
		giveBack.(func())()
		giveBack.(func())() // twice is once
		return false
	})
	if _, err := l.Take(); err != nil {
		t.Errorf("what was given back: %v", err)
	}
	if _, err := l.Take(); !errors.Is(err, lease.ErrSpent) {
		t.Errorf("given back twice counts twice: %v", err)
	}
}

func TestNoLease(t *testing.T) {
	giveBack, err := (*lease.Lease)(nil).Take()
	if err != nil {
		t.Fatal(err)
	}
	giveBack()
}

func TestNewRefuses(t *testing.T) {
	for name, cfg := range map[string]lease.Config{
		"glob": {Keys: []string{"a["}}, "empty glob": {Keys: []string{""}}, "number": {Signatures: -1},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := lease.New(cfg); err == nil {
				t.Error("accepted")
			}
		})
	}
}
