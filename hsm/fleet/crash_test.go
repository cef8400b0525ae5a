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
		var all [3]*deadly
		var c fleet.Config
		for i, name := range []string{"a", "b", "c"} {
			k := &deadly{fake: newFake(has(keyA))}
			k.hangs = make(chan struct{})
			all[i] = k
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
		asked := func() int { return all[0].asked + all[1].asked + all[2].asked }
		if asked() != 2 {
			t.Errorf("it was asked %d times of three tokens, want two of them", asked())
		}
		for _, s := range f.Status() {
			if s.State != fleet.Closed {
				t.Errorf("token %s is %v after one deadly request", s.Name, s.State)
			}
		}
		for _, k := range all {
			close(k.hangs)
		}
		others.Wait()
		opens := func() (n int) {
			for _, s := range f.Status() {
				n += s.Opens
			}
			return n
		}
		for range 6 { // of each token some are asked three times in turn
			die()
		}
		if opens() == 0 {
			t.Error("no token is taken for broken after three crashes in turn")
		}
		time.Sleep(time.Minute) // they are back, and what was is forgotten
		before := opens()
		die()
		if opens() != before {
			t.Error("after its return a token is taken for broken at the first crash")
		}
	})
}
