package worker_test

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rsa"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/signwarden/signwarden/hsm"
	"github.com/signwarden/signwarden/hsm/worker"
)

func wakeUp() <-chan time.Time { return time.After(2 * time.Millisecond) }

func TestSign(t *testing.T) {
	for _, sessions := range []int{1, 3} {
		t.Run(strconv.Itoa(sessions), func(t *testing.T) {
			c := newToken(t)
			c.Sessions = sessions
			tok := open(t, c)
			if got, want := tok.Info().Sessions, 2*sessions; got != want || tok.Info().TokenLabel != c.TokenLabel || len(tok.Info().Mechanisms) == 0 {
				t.Errorf("info %+v, want %d sessions", tok.Info(), want)
			}
			for _, k := range []struct {
				algorithm string
				opts      []crypto.SignerOpts
			}{
				{"rsa2048", []crypto.SignerOpts{crypto.SHA256, &rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: rsa.PSSSaltLengthEqualsHash}, &rsa.PSSOptions{Hash: crypto.SHA256}}},
				{"p256", []crypto.SignerOpts{crypto.SHA256, crypto.Hash(0)}},
				{"p384", []crypto.SignerOpts{crypto.SHA256}},
				{"ed25519", []crypto.SignerOpts{crypto.Hash(0), &ed25519.Options{}}},
			} {
				pub := generate(t, tok, k.algorithm, k.algorithm)
				again, err := tok.PublicKey(t.Context(), []byte(k.algorithm))
				if diff := cmp.Diff(again, pub); diff != "" || err != nil {
					t.Errorf("%s: PublicKey: %v, %s", k.algorithm, err, diff)
				}
				for _, o := range k.opts {
					var wg sync.WaitGroup
					for i := range int64(20) {
						wg.Go(func() {
							sig, err := tok.Sign(t.Context(), "", 1, []byte(k.algorithm), digest(i), o)
							if err == nil {
								err = check(pub, digest(i), sig, o)
							}
							if err != nil {
								t.Errorf("%s %#v: %v", k.algorithm, o, err)
							}
						})
					}
					wg.Wait()
				}
			}
			if err := tok.Ping(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

// An error comes through the pipe as it is.
func TestErrors(t *testing.T) {
	c := newToken(t)
	tok := open(t, c)
	generate(t, tok, "k", "rsa2048")
	for _, k := range []struct {
		name   string
		do     func() error
		want   string
		is     error
		refuse bool
	}{
		{"raw RSA", func() error {
			_, err := tok.Sign(t.Context(), "", 1, []byte("k"), digest(1), crypto.Hash(0))
			return err
		}, "raw RSA", nil, true},
		{"no options", func() error { _, err := tok.Sign(t.Context(), "", 1, []byte("k"), digest(1), nil); return err }, "no signer options", nil, true},
		{"Ed25519ctx", func() error {
			_, err := tok.Sign(t.Context(), "", 1, []byte("k"), digest(1), &ed25519.Options{Context: "x"})
			return err
		}, "Ed25519ctx", nil, true},
		{"no key", func() error {
			_, err := tok.Sign(t.Context(), "", 1, []byte("x"), digest(1), crypto.SHA256)
			return err
		}, "78", hsm.ErrNotFound, false},
		{"exists", func() error { _, err := tok.Generate(t.Context(), "l", []byte("k"), "p256"); return err }, "6b", hsm.ErrExists, false},
		{"algorithm", func() error { _, err := tok.Generate(t.Context(), "l", []byte("l"), "dsa"); return err }, `"dsa"`, nil, true},
		{"nothing to delete", func() error { return tok.Delete(t.Context(), []byte("x")) }, "78", hsm.ErrNotFound, false},
		{"too long", func() error {
			_, err := tok.Sign(t.Context(), "", 1, []byte("k"), make([]byte, 1<<20), crypto.SHA256)
			return err
		}, "too long", nil, true},
	} {
		err := k.do()
		if err == nil || !strings.Contains(err.Error(), k.want) || k.is != nil && !errors.Is(err, k.is) {
			t.Errorf("%s: got %v, want %q, %v", k.name, err, k.want, k.is)
		}
		if e, ok := errors.AsType[interface {
			error
			Refused() bool
		}](err); k.refuse != (ok && e.Refused()) {
			t.Errorf("%s: refused %v, want %v", k.name, ok, k.refuse)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := tok.Sign(ctx, "", 1, []byte("k"), digest(1), crypto.SHA256); !errors.Is(err, context.Canceled) {
		t.Errorf("ended context: got %v", err)
	}
	if err := tok.Close(); err != nil {
		t.Error(err)
	}
	if _, err := tok.Sign(t.Context(), "", 1, []byte("k"), digest(1), crypto.SHA256); !errors.Is(err, hsm.ErrClosed) {
		t.Errorf("after Close: got %v", err)
	}
	if err := tok.Delete(t.Context(), []byte("k")); !errors.Is(err, hsm.ErrClosed) {
		t.Errorf("after Close: got %v", err)
	}
}

// What an administrative worker does, those that sign see: they know the key's
// handle already.
func TestDelete(t *testing.T) {
	tok := open(t, newToken(t))
	first := generate(t, tok, "k", "p256")
	sign := func() ([]byte, error) { return tok.Sign(t.Context(), "", 1, []byte("k"), digest(1), crypto.SHA256) }
	for range 8 {
		if _, err := sign(); err != nil {
			t.Fatal(err)
		}
	}
	if err := tok.Delete(t.Context(), []byte("k")); err != nil {
		t.Fatal(err)
	}
	if _, err := sign(); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("after Delete: got %v, want ErrNotFound", err)
	}
	second := generate(t, tok, "k", "p256")
	sig, err := sign()
	if err != nil || check(second, digest(1), sig, crypto.SHA256) != nil || check(first, digest(1), sig, crypto.SHA256) == nil {
		t.Errorf("after another Generate: %v, or another key signed", err)
	}
}

// load signs on n goroutines until stop, verifies all, and counts.
type load struct {
	stop   atomic.Bool
	signed atomic.Int64
	failed atomic.Int64
	wg     sync.WaitGroup
}

func newLoad(t *testing.T, tok *worker.Token, pub crypto.PublicKey, n int) *load {
	l := &load{}
	for range n {
		l.wg.Go(func() {
			for !l.stop.Load() {
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
				i := l.signed.Add(1)
				sig, err := tok.Sign(ctx, "", 1, []byte("k"), digest(i), crypto.SHA256)
				cancel()
				if err == nil {
					err = check(pub, digest(i), sig, crypto.SHA256)
				}
				if err != nil {
					l.failed.Add(1)
					t.Errorf("signature %d: %v", i, err)
				}
			}
		})
	}
	return l
}

// wait returns when n more have been signed.
func (l *load) wait(t *testing.T, n int64) {
	t.Helper()
	want := l.signed.Load() + n
	until(t, "more is signed", func() bool { return l.signed.Load() >= want })
}

func (l *load) end() { l.stop.Store(true); l.wg.Wait() }

// Whatever becomes of a worker, those who wait see only latency.
func TestWorkersDie(t *testing.T) {
	for _, k := range []struct {
		name string
		sig  syscall.Signal
	}{{"killed", syscall.SIGKILL}, {"crashed", syscall.SIGSEGV}, {"aborted", syscall.SIGABRT}, {"hung", syscall.SIGSTOP}} {
		t.Run(k.name, func(t *testing.T) {
			c := newToken(t)
			c.CallTimeout = 500 * time.Millisecond
			tok := open(t, c)
			pub := generate(t, tok, "k", "p256")
			l := newLoad(t, tok, pub, 16)
			seen := map[int]bool{}
			for range 6 {
				l.wait(t, 200)
				until(t, "there are two workers", func() bool { return len(tok.Workers()) == 2 })
				ws := tok.Workers()
				w := ws[len(seen)%2]
				if seen[w.PID] {
					t.Fatalf("worker %d again", w.PID)
				}
				seen[w.PID] = true
				if err := syscall.Kill(w.PID, k.sig); err != nil {
					t.Fatal(err)
				}
				until(t, "it is gone", func() bool { return errors.Is(syscall.Kill(w.PID, 0), syscall.ESRCH) })
			}
			l.wait(t, 200)
			l.end()
			t.Logf("%d signatures, %d workers ended", l.signed.Load(), len(seen))
		})
	}
}

// Nobody signs while both are gone, and all wait.
func TestAllWorkersDie(t *testing.T) {
	tok := open(t, newToken(t))
	pub := generate(t, tok, "k", "p256")
	l := newLoad(t, tok, pub, 8)
	defer l.end()
	for range 3 {
		l.wait(t, 100)
		until(t, "there are two workers", func() bool { return len(tok.Workers()) == 2 })
		for _, w := range tok.Workers() {
			if err := syscall.Kill(w.PID, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
	}
	l.wait(t, 100)
}

// A request that was with one worker, while another had nothing to do and died at the same
// time, is not to blame for both.
func TestIdleWorkerDiesToo(t *testing.T) {
	tok := open(t, newToken(t))
	pub := generate(t, tok, "k", "p256")
	for n := range int64(8) { // whichever is found dead first
		until(t, "there are two workers", func() bool { return len(tok.Workers()) == 2 })
		workers := tok.Workers()
		signal := func(sig syscall.Signal) {
			for _, w := range workers {
				if err := syscall.Kill(w.PID, sig); err != nil {
					t.Error(err)
				}
			}
		}
		for _, w := range workers {
			stop(t, w.PID)
		}
		signed := make(chan error)
		go func() { signed <- signNow(t, tok, pub, n) }()
		until(t, "one has it", func() bool { ws := tok.Workers(); return ws[0].InFlight+ws[1].InFlight == 1 })
		worker.Locked(tok, func() {
			signal(syscall.SIGKILL)
			for _, w := range workers {
				until(t, "it is dead, and its threads too, by which its pipe is closed", func() bool {
					b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", w.PID))
					threads, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", w.PID))
					return err != nil || strings.Contains(string(b), ") Z ") && len(threads) == 1
				})
			}
		})
		if err := <-signed; err != nil {
			t.Fatal(err)
		}
	}
}

// What is evicted ends at once, and what is not movable goes on.
func TestEvict(t *testing.T) {
	tok := open(t, newToken(t))
	pub := generate(t, tok, "k", "p256")
	generate(t, tok, "other", "p256")
	for _, w := range tok.Workers() {
		stop(t, w.PID)
	}
	ours := errors.New("evicted")
	stays, goes := make(chan error), make(chan error)
	go func() { stays <- signNow(t, tok, pub, 1) }()
	go func() {
		_, err := tok.Sign(t.Context(), "", 1, []byte("other"), digest(1), crypto.SHA256)
		goes <- err
	}()
	until(t, "both are under way", func() bool { s := tok.Stats(); return s.InFlight+s.Waiting >= 2 })
	tok.Evict(ours, func(id []byte) bool { return string(id) == "other" })
	if err := <-goes; !errors.Is(err, ours) {
		t.Errorf("what was evicted: %v", err)
	}
	for _, w := range tok.Workers() {
		_ = syscall.Kill(w.PID, syscall.SIGCONT) // one may be gone by now
	}
	if err := <-stays; err != nil {
		t.Errorf("what was not: %v", err)
	}
}

func TestRecycled(t *testing.T) {
	for _, k := range []struct {
		name   string
		change func(*worker.Config)
	}{
		{"by count", func(c *worker.Config) { c.RecycleOps = 300 }},
		{"by age", func(c *worker.Config) { c.RecycleAge = 50 * time.Millisecond }},
	} {
		t.Run(k.name, func(t *testing.T) {
			c := newToken(t)
			worker.SetReplacePause(t, time.Millisecond)
			k.change(&c)
			tok, err := worker.Open(t.Context(), c)
			if err != nil {
				t.Fatal(err)
			}
			defer tok.Close()
			l := newLoad(t, tok, generate(t, tok, "k", "p256"), 8)
			seen := map[int]bool{}
			until(t, "ten workers served", func() bool {
				ws := tok.Workers()
				if len(ws) == 0 {
					t.Error("there is no worker")
				}
				for _, w := range ws {
					seen[w.PID] = true
				}
				return len(seen) >= 10
			})
			l.end()
		})
	}
}

// A secret is nowhere but in the pipe and in memory.
func TestPINIsNowhere(t *testing.T) {
	t.Setenv("SIGNWARDEN_TEST_SECRET", "nobody's business")
	c := newToken(t)
	for _, w := range open(t, c).Workers() {
		dir := filepath.Join("/proc", strconv.Itoa(w.PID))
		for _, name := range []string{"cmdline", "environ"} {
			b, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil || len(b) == 0 {
				t.Fatalf("%s: %d bytes, %v", name, len(b), err)
			}
			for _, secret := range []string{userPIN, "nobody's business", "SOFTHSM2_CONF"} {
				if strings.Contains(string(b), secret) {
					t.Errorf("%s has %q", name, secret)
				}
			}
		}
		// What cannot be dumped belongs to root, and no file of it to its user.
		st, err := os.Stat(filepath.Join(dir, "mem"))
		if err != nil || st.Sys().(*syscall.Stat_t).Uid != 0 {
			t.Errorf("memory: %v", err)
		}
	}
}

// counted reads what the counting module counted.
func counted(t *testing.T, c worker.Config, line string) int {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(c.Env["COUNT_DIR"], "calls"))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return strings.Count(string(b), line+"\n")
}

// order has the next call answered with a CK_RV, or 'crash' or 'hang'.
func order(t *testing.T, c worker.Config, call, what string) {
	t.Helper()
	name := filepath.Join(c.Env["COUNT_DIR"], call+".rv")
	if err := os.WriteFile(name+".new", []byte(what), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(name+".new", name); err != nil {
		t.Fatal(err)
	}
}

// taken waits until an order has been carried out.
func taken(t *testing.T, c worker.Config, call string) {
	t.Helper()
	until(t, "the order is taken", func() bool {
		_, err := os.Stat(filepath.Join(c.Env["COUNT_DIR"], call+".rv"))
		return os.IsNotExist(err)
	})
}

func countingToken(t *testing.T) worker.Config {
	t.Helper()
	c := newToken(t)
	c.Module, c.Env = counting, map[string]string{"SOFTHSM2_CONF": env["SOFTHSM2_CONF"], "COUNT_DIR": t.TempDir()}
	return c
}

func TestWrongPIN(t *testing.T) {
	c := countingToken(t)
	c.PIN, c.Workers = hsm.NewPIN("0000-wrong"), 4
	tok, err := worker.Open(t.Context(), c)
	if err == nil {
		tok.Close()
		t.Fatal("opened")
	}
	if e, ok := errors.AsType[*hsm.Error](err); !ok || !e.Operator() || !strings.Contains(err.Error(), "tried once") || strings.Contains(err.Error(), "0000-wrong") {
		t.Errorf("got %v", err)
	}
	if got := counted(t, c, "C_Login"); got != 1 {
		t.Errorf("%d logins, want 1", got)
	}
}

// The PIN is changed under workers that are logged in. They go on; when one
// dies, its successor's login is refused, and nobody tries again.
func TestPINChanged(t *testing.T) {
	c := countingToken(t)
	tok := open(t, c)
	pub := generate(t, tok, "k", "p256")
	before := counted(t, c, "C_Login")
	order(t, c, "Login", "0xa0") // CKR_PIN_INCORRECT
	kill := func() {
		w := tok.Workers()[0]
		if err := syscall.Kill(w.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		until(t, "it is gone", func() bool { return errors.Is(syscall.Kill(w.PID, 0), syscall.ESRCH) })
	}
	kill()
	taken(t, c, "Login")
	l := newLoad(t, tok, pub, 4)
	l.wait(t, 500)
	l.end()
	if _, err := tok.Generate(t.Context(), "l", []byte("l"), "p256"); err == nil || !strings.Contains(err.Error(), "CKR_PIN_INCORRECT") {
		t.Errorf("Generate: got %v, want CKR_PIN_INCORRECT", err)
	}
	kill() // the last one
	_, err := tok.Sign(t.Context(), "", 1, []byte("k"), digest(1), crypto.SHA256)
	if e, ok := errors.AsType[*hsm.Error](err); !ok || !e.Operator() {
		t.Errorf("without a worker: got %v, want an operator's error", err)
	}
	if got := counted(t, c, "C_Login") - before; got != 1 {
		t.Errorf("%d logins, want 1", got)
	}
}

// Signing workers open sessions for reading only; one act opens one that writes.
func TestReadOnly(t *testing.T) {
	c := countingToken(t)
	tok := open(t, c)
	if n := counted(t, c, "C_OpenSession ro"); n == 0 {
		t.Error("nothing was counted")
	}
	if n := counted(t, c, "C_OpenSession rw"); n != 0 {
		t.Errorf("%d sessions that write before an act", n)
	}
	pub := generate(t, tok, "k", "p256")
	order(t, c, "Sign", "0xb3") // CKR_SESSION_HANDLE_INVALID
	l := newLoad(t, tok, pub, 4)
	l.wait(t, 100)
	taken(t, c, "Sign")
	l.end()
	if n := counted(t, c, "C_OpenSession rw"); n != 1 {
		t.Errorf("%d sessions that write, want the one of the act", n)
	}
}
