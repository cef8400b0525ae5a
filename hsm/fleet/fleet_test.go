package fleet_test

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signwarden/signwarden/hsm"
	"github.com/signwarden/signwarden/hsm/fleet"
	"github.com/signwarden/signwarden/hsm/worker"
)

// fake is a token in memory that can be made to fail. It has one key.
type fake struct {
	mu     sync.Mutex
	public map[string]crypto.PublicKey
	err    error         // of each call
	hangs  chan struct{} // where set, Sign waits for it or to be evicted
	evict  chan error
	signs  int
	busy   int
	since  time.Time
	asked  int // whatever
	doubts int
	slow   time.Duration // of PublicKey
	noKey  bool          // Sign finds none
}

func newFake(keys map[string]crypto.PublicKey) *fake {
	return &fake{public: keys, evict: make(chan error, 100)}
}

func (k *fake) call() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.asked++
	return k.err
}

func (k *fake) set(err error) { k.mu.Lock(); k.err = err; k.mu.Unlock() }

func (k *fake) Sign(ctx context.Context, _ string, _ int, id, _ []byte, _ crypto.SignerOpts) ([]byte, error) {
	if err := k.call(); err != nil {
		return nil, err
	}
	k.mu.Lock()
	if k.noKey {
		k.mu.Unlock()
		return nil, hsm.ErrNotFound
	}
	k.busy++
	k.since = time.Now()
	hangs := k.hangs
	k.mu.Unlock()
	defer func() { k.mu.Lock(); k.busy--; k.mu.Unlock() }()
	if hangs != nil {
		select {
		case <-hangs:
		case err := <-k.evict:
			return nil, err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.signs++
	return []byte("signature"), nil
}

func (k *fake) PublicKey(_ context.Context, id []byte) (crypto.PublicKey, error) {
	if err := k.call(); err != nil {
		return nil, err
	}
	time.Sleep(k.slow)
	k.mu.Lock()
	defer k.mu.Unlock()
	if p := k.public[string(id)]; p != nil {
		return p, nil
	}
	return nil, hsm.ErrNotFound
}

func (k *fake) Generate(context.Context, string, []byte, string) (crypto.PublicKey, error) {
	return nil, k.call()
}

func (k *fake) Delete(_ context.Context, id []byte) error {
	if err := k.call(); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.public[string(id)] == nil {
		return hsm.ErrNotFound
	}
	delete(k.public, string(id))
	return nil
}
func (k *fake) Doubt([]byte)               { k.mu.Lock(); defer k.mu.Unlock(); k.doubts++ }
func (k *fake) Ping(context.Context) error { return k.call() }
func (k *fake) ReadPIN() error             { return nil }
func (k *fake) Close() error               { return nil }
func (k *fake) Evict(err error, movable func([]byte) bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !movable([]byte("k")) {
		return
	}
	for range k.busy {
		k.evict <- err
	}
}

func (k *fake) Stats() worker.Stats {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := worker.Stats{Workers: 1, InFlight: k.busy}
	if k.busy > 0 {
		s.Silent, s.Pace = time.Since(k.since), time.Millisecond
	}
	return s
}

func (k *fake) doubted() int { k.mu.Lock(); defer k.mu.Unlock(); return k.doubts }

func (k *fake) count() int { k.mu.Lock(); defer k.mu.Unlock(); return k.signs }

var (
	keyA, _, _ = ed25519.GenerateKey(nil)
	keyB, _, _ = ed25519.GenerateKey(nil)
)

func has(k crypto.PublicKey) map[string]crypto.PublicKey {
	return map[string]crypto.PublicKey{"k": k}
}

// open opens a fleet of tokens that are there.
func open(t *testing.T, tokens ...*fake) *fleet.Fleet {
	t.Helper()
	var c fleet.Config
	for i, k := range tokens {
		c.Members = append(c.Members, fleet.Member{Name: string(rune('a' + i)), Open: func(context.Context) (fleet.Token, error) { return k, nil }})
	}
	f, err := fleet.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	f.Pin([]byte("k"), keyA)
	synctest.Wait()
	return f
}

func sign(f *fleet.Fleet) error {
	_, err := f.Sign(context.Background(), "p", 1, []byte("k"), nil, crypto.Hash(0))
	return err
}

func gone() error { return &hsm.Error{Op: "sign", Class: hsm.ClassGone, Detail: "gone"} }

// A token that fails costs no request; it gets none until it answers again, and
// is probed with growing pauses.
func TestBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newFake(has(keyA)), newFake(has(keyA))
		f := open(t, a, b)
		defer f.Close()
		a.set(gone())
		for range 10 {
			if err := sign(f); err != nil {
				t.Errorf("with one token that works: %v", err)
			}
		}
		if s := f.Status(); s[0].State == fleet.Closed || s[0].Opens != 1 || !strings.Contains(s[0].Err.Error(), "gone") || s[1].State != fleet.Closed {
			t.Errorf("status %+v", s)
		}
		synctest.Wait()
		asked := func() int { a.mu.Lock(); defer a.mu.Unlock(); return a.asked }
		before := asked()
		time.Sleep(time.Minute)
		if n := asked() - before; n < 60 || n > 68 {
			t.Errorf("%d probes in a minute, want one a second", n)
		}
		before = asked()
		for range 100 {
			if err := sign(f); err != nil {
				t.Error(err)
			}
		}
		if n := asked() - before; n > 0 {
			t.Errorf("a token that does not work was asked %d times", n)
		}
		a.set(nil)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if s := f.Status(); s[0].State != fleet.Closed || s[0].Keys != 1 || s[0].Err != nil {
			t.Errorf("5 s after its return: %+v", s[0])
		}
		a.set(gone())
		b.set(gone())
		if err := sign(f); err == nil {
			t.Error("with no token that works there is a signature")
		}
		a.set(nil)
		if err := sign(f); err != nil {
			t.Errorf("with no token known to work, and one that does: %v", err)
		}
	})
}

// A key that is not registered yet is read from the tokens that have it, which agree, and
// tried with the first of those.
func TestUnpinned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, c := newFake(nil), newFake(map[string]crypto.PublicKey{"x": keyA, "y": keyA}), newFake(map[string]crypto.PublicKey{"y": keyB})
		f := open(t, a, b, c)
		defer f.Close()
		a.noKey = true
		if pub, err := f.PublicKey(t.Context(), []byte("x")); err != nil || !keyA.Equal(pub) {
			t.Errorf("in one of three: %v, %v", pub, err)
		}
		if _, err := f.PublicKey(t.Context(), []byte("y")); err == nil || errors.Is(err, hsm.ErrNotFound) || !strings.Contains(err.Error(), "different keys") {
			t.Errorf("two keys with one id: %v", err)
		}
		if _, err := f.PublicKey(t.Context(), []byte("z")); !errors.Is(err, hsm.ErrNotFound) {
			t.Errorf("in none: %v", err)
		}
		if _, err := f.Sign(t.Context(), "p", 1, []byte("x"), nil, crypto.Hash(0)); err != nil || a.count() != 0 || b.count() != 1 || c.count() != 0 {
			t.Errorf("signing: %v; %d, %d, %d", err, a.count(), b.count(), c.count())
		}
		a.noKey = false
		a.set(gone())
		b.noKey, c.noKey = true, true
		if _, err := f.Sign(t.Context(), "p", 1, []byte("x"), nil, crypto.Hash(0)); err == nil || errors.Is(err, hsm.ErrNotFound) || !strings.Contains(err.Error(), "gone") {
			t.Errorf("the first does not work, and the others have it not: %v", err)
		}
		a.set(nil)
		b.set(gone())
		if _, err := f.PublicKey(t.Context(), []byte("x")); err == nil || errors.Is(err, hsm.ErrNotFound) {
			t.Errorf("where who has it does not work: %v", err)
		}
	})
}

// What hangs in a token is asked of another one, soon.
func TestSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newFake(has(keyA)), newFake(has(keyA))
		f := open(t, a, b)
		defer f.Close()
		a.hangs, b.hangs = make(chan struct{}), make(chan struct{})
		close(b.hangs)
		began := time.Now()
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				if err := sign(f); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if took := time.Since(began); took > 200*time.Millisecond {
			t.Errorf("it took %v", took)
		}
		if a.count() != 0 || b.count() != 20 {
			t.Errorf("%d and %d signatures, want 0 and 20", a.count(), b.count())
		}
		close(a.hangs)
	})
}

// As many tokens as Sign can keep apart, and one at least.
func TestMembers(t *testing.T) {
	for n, good := range map[int]bool{0: false, 1: true, 64: true, 65: false} {
		var c fleet.Config
		for range n {
			c.Members = append(c.Members, fleet.Member{Open: func(context.Context) (fleet.Token, error) { return newFake(nil), nil }})
		}
		f, err := fleet.Open(t.Context(), c)
		if (err == nil) != good {
			t.Errorf("%d tokens: %v", n, err)
		}
		if err == nil {
			f.Close()
		}
	}
}

// A token with another key under the id signs nothing, and there is an alarm.
func TestOtherKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, c := newFake(has(keyB)), newFake(has(keyA)), newFake(nil)
		f := open(t, a, b, c)
		defer f.Close()
		for range 50 {
			if err := sign(f); err != nil {
				t.Error(err)
			}
		}
		if a.count() != 0 || b.count() != 50 || c.count() != 0 {
			t.Errorf("%d, %d and %d signatures, want all of b", a.count(), b.count(), c.count())
		}
		if s := f.Status(); s[0].Other != 1 || s[0].State != fleet.Closed || s[1].Other != 0 || s[0].Keys != 0 || s[1].Keys != 1 || s[2].Keys != 0 {
			t.Errorf("status %+v, want an alarm of a, and the key in b", s)
		}
		b.set(gone())
		if err := sign(f); err == nil || a.count() != 0 {
			t.Errorf("where only another key is left: %v", err)
		}
		b.mu.Lock() // it comes back as another token
		b.err, b.public = nil, has(keyB)
		b.mu.Unlock()
		time.Sleep(5 * time.Second)
		if err := sign(f); err == nil || !strings.Contains(err.Error(), "another key") || b.count() != 50 {
			t.Errorf("where both have another key: %v, %d signatures", err, b.count()-50)
		}
		a.mu.Lock() // an operator mends one, and says so
		a.public = has(keyA)
		a.mu.Unlock()
		if err := f.ReadPIN(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if err := sign(f); err != nil || a.count() != 1 {
			t.Errorf("after the copy was mended: %v, %d signatures", err, a.count())
		}
	})
}

// A token that lacks a key is asked for it again: one that never had it may be given it, and
// of one that had it the workers, too, may see what was.
func TestLooksAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newFake(has(keyA)), newFake(nil)
		f := open(t, a, b)
		defer f.Close()
		signs := func(want *fake, why string) {
			t.Helper()
			before := want.count()
			if err := sign(f); err != nil || want.count() != before+1 {
				t.Errorf("%s: %v, and another token was asked", why, err)
			}
		}
		set := func(k *fake, noKey bool, public map[string]crypto.PublicKey) {
			k.mu.Lock()
			defer k.mu.Unlock()
			k.noKey, k.public = noKey, public
		}
		time.Sleep(time.Minute)
		signs(a, "b has no key")
		if n := b.doubted(); n != 0 {
			t.Errorf("a token that never had the key was doubted %d times", n)
		}
		set(b, false, has(keyA))
		time.Sleep(11 * time.Second)
		a.set(gone())
		signs(b, "b was given the key")
		if b.doubted() != 0 {
			t.Error("a token was doubted that has its key")
		}
		a.set(nil)
		time.Sleep(time.Minute)

		set(a, true, nil)
		b.set(gone())
		if err := sign(f); err == nil {
			t.Error("signed without a key")
		}
		b.set(nil)
		time.Sleep(time.Hour) // 360 looks
		if n := a.doubted(); n != 9 || b.doubted() != 0 {
			t.Errorf("in an hour a, which lost the key, was doubted %d times, and b %d times", n, b.doubted())
		}
		if err := f.ReadPIN(); err != nil { // the operator says that something was done
			t.Error(err)
		}
		time.Sleep(11 * time.Second)
		if n := a.doubted(); n != 10 {
			t.Errorf("after the operator's word it was doubted %d times more", n-9)
		}
		set(a, false, has(keyA))
		time.Sleep(11 * time.Second)
		b.set(gone())
		signs(a, "a has its key again")
		b.set(nil)
		time.Sleep(time.Minute)

		doubts := a.doubted()
		set(a, false, has(keyB)) // under way: what it signs does not verify
		f.Doubt([]byte("k"))
		if a.doubted() != doubts+1 || b.doubted() != 1 {
			t.Errorf("doubted %d and %d times", a.doubted()-doubts, b.doubted())
		}
		signed := a.count()
		for range 10 {
			signs(b, "a has another key")
		}
		if a.count() != signed {
			t.Error("a token was used that has another key")
		}
	})
}

// A token that lacks a thousand keys is asked for them for half a second in ten.
func TestLooksInSlices(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newFake(has(keyA)), newFake(nil)
		b.slow = 10 * time.Millisecond
		f := open(t, a, b)
		defer f.Close()
		for i := range 1000 {
			f.Pin(fmt.Append(nil, i), keyB)
		}
		time.Sleep(30 * time.Second) // each is asked for once, as it is pinned
		b.mu.Lock()
		before := b.asked
		b.mu.Unlock()
		time.Sleep(time.Minute)
		b.mu.Lock()
		defer b.mu.Unlock()
		if n := b.asked - before; n < 4*50 || n > 6*51 { // one is under way when the time is over
			t.Errorf("asked %d times in a minute", n)
		}
	})
}

// What is wrong in itself is asked once, and a full queue is no failure.
func TestRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newFake(has(keyA)), newFake(has(keyA))
		f := open(t, a, b)
		defer f.Close()
		a.set(&hsm.Error{Op: "sign", Class: hsm.ClassRefused, Detail: "raw"})
		if err := sign(f); err == nil || b.count() != 0 {
			t.Errorf("got %v, and another token was asked %d times", err, b.count())
		}
		a.set(&hsm.Error{Op: "sign", Class: hsm.ClassBusy, Detail: "busy"})
		if err := sign(f); err != nil {
			t.Error(err)
		}
		if s := f.Status(); s[0].Opens != 0 {
			t.Errorf("a busy token was taken for one that does not work: %+v", s[0])
		}
	})
}

// A token that cannot be opened keeps no other from serving. One that refuses its
// PIN is opened again when an operator has acted, and not before.
func TestOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		tries, mended := map[string]int{}, false
		fail := map[string]error{"a": gone(), "b": &hsm.Error{Op: "C_Login", Class: hsm.ClassOperator, Detail: "PIN"}}
		member := func(name string) fleet.Member {
			return fleet.Member{
				Name: name,
				Open: func(context.Context) (fleet.Token, error) {
					mu.Lock()
					defer mu.Unlock()
					tries[name]++
					if err := fail[name]; err != nil {
						return nil, err
					}
					return newFake(has(keyA)), nil
				},
				Mended: func() bool { mu.Lock(); defer mu.Unlock(); return mended },
			}
		}
		if f, err := fleet.Open(t.Context(), fleet.Config{Members: []fleet.Member{member("a"), member("b")}}); f != nil || err == nil || !strings.Contains(err.Error(), "gone") || !strings.Contains(err.Error(), "PIN") {
			t.Errorf("none to open: %v", err)
		}
		f, err := fleet.Open(t.Context(), fleet.Config{Members: []fleet.Member{member("a"), member("b"), member("c")}})
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		f.Pin([]byte("k"), keyA)
		if err := sign(f); err != nil {
			t.Error(err)
		}
		if _, err := f.Generate(t.Context(), "l", []byte("x"), "p256"); err == nil || !strings.Contains(err.Error(), "token a") {
			t.Errorf("Generate without the primary: %v", err)
		}
		if err := f.Delete(t.Context(), []byte("k")); err == nil {
			t.Error("Delete without a token: no error")
		}
		mu.Lock()
		a, b := tries["a"], tries["b"]
		mu.Unlock()
		time.Sleep(time.Minute)
		mu.Lock()
		if tries["a"]-a < 20 || tries["b"] != b {
			t.Errorf("in a minute a was tried %d times, want 30, and b %d times, want none", tries["a"]-a, tries["b"]-b)
		}
		mended, fail = true, nil
		mu.Unlock()
		time.Sleep(5 * time.Second)
		for _, s := range f.Status() {
			if s.State != fleet.Closed {
				t.Errorf("after all were mended: %+v", s)
			}
		}
		if err := f.Delete(t.Context(), []byte("k")); err != nil {
			t.Error(err)
		}
		if err := f.Delete(t.Context(), []byte("k")); !errors.Is(err, hsm.ErrNotFound) {
			t.Errorf("the second Delete: %v, want ErrNotFound", err)
		}
	})
}
