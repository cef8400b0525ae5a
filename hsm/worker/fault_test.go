package worker_test

import (
	"context"
	"crypto"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/signwarden/signwarden/hsm"
	"github.com/signwarden/signwarden/hsm/worker"
)

// A fault of the module at a call: one request is done again, and its worker
// is replaced.
func TestModuleFaults(t *testing.T) {
	for _, what := range []string{"crash", "hang", "0x30", "0x32", "0x5", "0x80000001"} {
		t.Run(what, func(t *testing.T) {
			worker.SetReplacePause(t, time.Millisecond)
			c := countingToken(t)
			c.CallTimeout = 500 * time.Millisecond
			tok := open(t, c)
			l := newLoad(t, tok, generate(t, tok, "k", "p256"), 8)
			seen := map[int]bool{}
			until(t, "four workers have been replaced", func() bool {
				taken(t, c, "Sign")
				l.wait(t, 50) // what met the fault is done again by now, and does not meet the next
				until(t, "there are two workers", func() bool { return len(tok.Workers()) == 2 })
				for _, w := range tok.Workers() {
					seen[w.PID] = true
				}
				if len(seen) >= 6 {
					return true
				}
				order(t, c, "Sign", what)
				return false
			})
			l.end()
		})
	}
}

// A request that crashes each worker is asked twice, and not for ever.
func TestDeadlyRequest(t *testing.T) {
	c := countingToken(t)
	tok := open(t, c)
	pub := generate(t, tok, "k", "p256")
	deadly := filepath.Join(c.Env["COUNT_DIR"], "deadly")
	if err := os.WriteFile(deadly, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := tok.Sign(t.Context(), "", 1, []byte("k"), digest(1), crypto.SHA256)
	if e, ok := errors.AsType[*hsm.Error](err); !ok || e.Class != hsm.ClassCrashed {
		t.Errorf("got %v, want class H", err)
	}
	if n := counted(t, c, "deadly"); n != 2 {
		t.Errorf("asked %d times, want 2", n)
	}
	if err := os.Remove(deadly); err != nil {
		t.Fatal(err)
	}
	sig, err := tok.Sign(t.Context(), "", 1, []byte("k"), digest(2), crypto.SHA256)
	if err == nil {
		err = check(pub, digest(2), sig, crypto.SHA256)
	}
	if err != nil {
		t.Errorf("the next one: %v", err)
	}
}

// One that crashes each worker does not take with it those that wait before and behind it.
func TestDeadlyAmongOthers(t *testing.T) {
	c := countingToken(t)
	c.Workers = 1
	tok := open(t, c)
	pub := generate(t, tok, "k", "p256")
	deadly := filepath.Join(c.Env["COUNT_DIR"], "deadly")
	if err := os.WriteFile(deadly, digest(1), 0o600); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			d := digest(int64(100 + i))
			if i == 7 {
				d = digest(1)
			}
			sig, err := tok.Sign(t.Context(), "", 1, []byte("k"), d, crypto.SHA256)
			if i == 7 {
				if e, ok := errors.AsType[*hsm.Error](err); !ok || e.Class != hsm.ClassCrashed {
					t.Errorf("the deadly one: %v, want class H", err)
				}
				return
			}
			if err == nil {
				err = check(pub, d, sig, crypto.SHA256)
			}
			if err != nil {
				t.Errorf("request %d: %v", i, err)
			}
		})
	}
	wg.Wait()
}

func TestGenerateFaults(t *testing.T) {
	c := countingToken(t)
	tok := open(t, c)
	order(t, c, "GenerateKeyPair", "crash")
	_, err := tok.Generate(t.Context(), "l", []byte("k"), "p256")
	if err == nil || !strings.Contains(err.Error(), "6b may be left") {
		t.Errorf("crash: got %v", err)
	}
	if err := tok.Delete(t.Context(), []byte("k")); err != nil {
		t.Errorf("what a crash left cannot be deleted: %v", err)
	}
	order(t, c, "GenerateKeyPair", "0x5")
	if _, err := tok.Generate(t.Context(), "l", []byte("k"), "p256"); err == nil || !strings.Contains(err.Error(), "CKR_GENERAL_ERROR") {
		t.Errorf("failed, but persisted: got %v", err)
	}
	generate(t, tok, "k", "p256") // nothing is in its way
	// A caller who leaves: what is made is destroyed, and the next act waits for that.
	ctx, cancel := context.WithCancel(t.Context())
	logins := counted(t, c, "C_OpenSession rw")
	left := make(chan error, 1)
	go func() {
		_, err := tok.Generate(ctx, "left", []byte("left"), "rsa4096")
		left <- err
	}()
	until(t, "it is being made", func() bool { return counted(t, c, "C_OpenSession rw") > logins })
	cancel()
	if err := <-left; err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("a caller who left: got %v", err)
	} else if err != nil {
		if err := tok.Delete(t.Context(), []byte("left")); !errors.Is(err, hsm.ErrNotFound) {
			t.Errorf("what nobody waits for: got %v, want ErrNotFound", err)
		}
	}
}

// The token is gone for a while: who asks is told so at once, and when it is
// back all works without anybody's doing.
func TestTokenGone(t *testing.T) {
	c := countingToken(t)
	tok := open(t, c)
	pub := generate(t, tok, "k", "p256")
	for range 2 {
		if err := os.Rename(env["SOFTHSM2_CONF"], env["SOFTHSM2_CONF"]+".gone"); err != nil {
			t.Fatal(err)
		}
		for _, w := range tok.Workers() {
			if err := syscall.Kill(w.PID, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := tok.Sign(t.Context(), "", 1, []byte("k"), digest(1), crypto.SHA256); err == nil {
			// A worker may have answered before the signal came.
			until(t, "it is refused", func() bool {
				_, err = tok.Sign(t.Context(), "", 1, []byte("k"), digest(1), crypto.SHA256)
				return err != nil
			})
		}
		if err := os.Rename(env["SOFTHSM2_CONF"]+".gone", env["SOFTHSM2_CONF"]); err != nil {
			t.Fatal(err)
		}
		until(t, "it signs again", func() bool {
			sig, err := tok.Sign(t.Context(), "", 1, []byte("k"), digest(1), crypto.SHA256)
			return err == nil && check(pub, digest(1), sig, crypto.SHA256) == nil
		})
		until(t, "there are two workers", func() bool { return len(tok.Workers()) == 2 })
	}
}

// What is wrong with SoftHSM's configuration, which it does not say itself.
func TestSoftHSMTrouble(t *testing.T) {
	c := newToken(t)
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, tt := range []struct {
		name, conf string
		want       []string
	}{
		{"no configuration", filepath.Join(dir, "none.conf"), []string{"none.conf", "SOFTHSM2_CONF", "no such file"}},
		{"no directory named", write("empty.conf", "log.level = ERROR\n"), []string{"empty.conf", "directories.tokendir"}},
		{"no directory", write("gone.conf", "directories.tokendir = "+dir+"/gone\n"), []string{dir + "/gone", "directories.tokendir"}},
		{"no tokens", write("blank.conf", "directories.tokendir = "+t.TempDir()+"\n"), []string{"no initialised token"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := c
			c.Env = map[string]string{"SOFTHSM2_CONF": tt.conf}
			tok, err := worker.Open(t.Context(), c)
			if err == nil {
				tok.Close()
				t.Fatal("opened")
			}
			for _, w := range tt.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("got %q, want it to tell %q", err, w)
				}
			}
		})
	}
}
