package fleet_test

import (
	"context"
	"crypto"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signwarden/signwarden/hsm/fleet"
	"github.com/signwarden/signwarden/hsm/worker"
)

// deadly is a token whose workers crash at some requests.
type deadly struct {
	*fake
	asked int
}

func (d *deadly) Sign(ctx context.Context, by string, weight int, id, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if string(digest) == "deadly" {
		d.asked++
		return nil, worker.ErrCrashed
	}
	return d.fake.Sign(ctx, by, weight, id, digest, opts)
}

// A request that crashes workers fails by itself, and takes nobody's with it. Tokens of
// which nothing but crashes comes are taken for broken.
func TestDeadly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := &deadly{fake: newFake(has(keyA))}, &deadly{fake: newFake(has(keyA))}
		a.hangs, b.hangs = make(chan struct{}), make(chan struct{})
		var c fleet.Config
		for name, k := range map[string]*deadly{"a": a, "b": b} {
			c.Members = append(c.Members, fleet.Member{Name: name, Open: func(context.Context) (fleet.Token, error) { return k, nil }})
		}
		f, err := fleet.Open(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		f.Pin([]byte("k"), keyA)
		synctest.Wait()
		die := func() {
			t.Helper()
			if _, err := f.Sign(t.Context(), "attacker", 1, []byte("k"), []byte("deadly"), crypto.Hash(0)); !errors.Is(err, worker.ErrCrashed) {
				t.Errorf("a deadly request: %v", err)
			}
		}
		var others sync.WaitGroup
		for range 10 {
			others.Go(func() {
				if err := sign(f); err != nil {
					t.Errorf("another's request: %v", err)
				}
			})
		}
		time.Sleep(time.Millisecond)
		die()
		if a.asked != 1 || b.asked != 1 {
			t.Errorf("it was asked of the tokens %d and %d times", a.asked, b.asked)
		}
		for _, s := range f.Status() {
			if s.State != fleet.Closed {
				t.Errorf("token %s is %v after one deadly request", s.Name, s.State)
			}
		}
		close(a.hangs)
		close(b.hangs)
		others.Wait()
		for range 3 {
			die()
		}
		for _, s := range f.Status() {
			if s.Opens == 0 {
				t.Errorf("token %s is not taken for broken after three crashes in turn", s.Name)
			}
		}
	})
}
