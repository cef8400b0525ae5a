package worker_test

import (
	"context"
	"crypto"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/signwarden/signwarden/hsm"
	"github.com/signwarden/signwarden/hsm/pinrecord"
	"github.com/signwarden/signwarden/hsm/worker"
)

// recorded is a counting token whose refusals are on record in the file.
func recorded(t *testing.T) (c worker.Config, path string) {
	t.Helper()
	c = countingToken(t)
	path = filepath.Join(t.TempDir(), pinrecord.Name(c.Module, c.TokenLabel))
	c.Tries = pinrecord.New(path, c.Module, c.TokenLabel)
	return c, path
}

// restarted is a token as the next process would open it.
func restarted(c worker.Config, path string) worker.Config {
	c.Tries = pinrecord.New(path, c.Module, c.TokenLabel)
	return c
}

func operator(err error) bool {
	e, ok := errors.AsType[*hsm.Error](err)
	return ok && e.Operator()
}

// changePIN changes the PIN in the token, as an operator does with other software.
func changePIN(t *testing.T, c worker.Config, from, to string) {
	t.Helper()
	cmd := exec.Command("pkcs11-tool", "--module", softhsm, "--token-label", c.TokenLabel, "--login", "--pin", "env:WAS", "--change-pin", "--new-pin", "env:IS")
	cmd.Env = append(os.Environ(), "SOFTHSM2_CONF="+env["SOFTHSM2_CONF"], "WAS="+from, "IS="+to)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// Twenty restarts with a wrong PIN are one try. An operator's word is another
// one; so is another PIN; and the right one leaves nothing on record.
func TestWrongPINRestarts(t *testing.T) {
	c, path := recorded(t)
	refused := func(pin string, want int) {
		t.Helper()
		c := restarted(c, path)
		c.PIN = hsm.NewPIN(pin)
		tok, err := worker.Open(t.Context(), c)
		if err == nil {
			tok.Close()
			t.Fatal("opened")
		}
		if !operator(err) || strings.Contains(err.Error(), pin) {
			t.Errorf("got %v, want an operator's error without the PIN", err)
		}
		if got := counted(t, c, "C_Login"); got != want {
			t.Fatalf("%d logins, want %d", got, want)
		}
	}
	for range 20 {
		refused("0000-wrong", 1)
	}
	b, err := os.ReadFile(path)
	if err != nil || strings.Contains(string(b), "0000-wrong") || !strings.Contains(string(b), "CKR_PIN_INCORRECT") {
		t.Errorf("the record has %s, %v", b, err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the record has mode %v, %v", st.Mode(), err)
	}
	if said, err := pinrecord.Forget(path); err != nil || !strings.Contains(said, "CKR_PIN_INCORRECT") {
		t.Errorf("Forget: %q, %v", said, err)
	}
	refused("0000-wrong", 2)
	refused("0000-wrong", 2)
	refused("1111-wrong", 3)
	tok := open(t, restarted(c, path))
	if err := tok.Ping(t.Context()); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(path); err != nil || len(b) > 0 {
		t.Errorf("after the right one the record has %q, %v", b, err)
	}
}

// The PIN is changed in the token, and then all children lose their login: one
// of them tries the old one. When an operator has put the new one where it is
// read from, all goes on; the same where the token gets the old one back.
func TestPINChangedAtRunTime(t *testing.T) {
	for _, how := range []string{"file", "file and ReadPIN", "token"} {
		t.Run(how, func(t *testing.T) {
			c, path := recorded(t)
			c.Workers = 3
			var pin atomic.Pointer[string]
			set := func(s string) { pin.Store(&s) }
			set(userPIN)
			c.ReadPIN = func() (hsm.PIN, error) { return hsm.NewPIN(*pin.Load()), nil }
			tok := open(t, c)
			pub := generate(t, tok, "k", "p256")
			sign := func() error {
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				defer cancel()
				sig, err := tok.Sign(ctx, "", 1, []byte("k"), digest(1), crypto.SHA256)
				if err == nil {
					err = check(pub, digest(1), sig, crypto.SHA256)
				}
				return err
			}
			changePIN(t, c, userPIN, "2222-new")
			before := counted(t, c, "C_Login")
			for range c.Workers {
				order(t, c, "Sign", "0x101")
				var err error
				until(t, "somebody is logged out", func() bool {
					err = sign()
					_, there := os.Stat(filepath.Join(c.Env["COUNT_DIR"], "Sign.rv"))
					return there != nil
				})
				if err != nil && !operator(err) {
					t.Errorf("got %v, want a signature or an operator's error", err)
				}
			}
			if err := sign(); !operator(err) || !strings.Contains(err.Error(), "CKR_PIN_INCORRECT") {
				t.Errorf("when all are logged out: %v, want an operator's error", err)
			}
			if got := counted(t, c, "C_Login") - before; got != 1 {
				t.Errorf("%d logins, want 1", got)
			}
			switch how {
			case "token":
				changePIN(t, c, "2222-new", userPIN)
				if _, err := pinrecord.Forget(path); err != nil {
					t.Fatal(err)
				}
			case "file":
				set("2222-new")
			default:
				set("2222-new")
				if err := tok.ReadPIN(); err != nil {
					t.Fatal(err)
				}
				if err := sign(); err != nil {
					t.Errorf("at once: %v", err)
				}
			}
			until(t, "it signs again", func() bool { return sign() == nil })
			until(t, "all workers serve", func() bool { return len(tok.Workers()) == c.Workers })
			if got := counted(t, c, "C_Login") - before; got != 1+c.Workers {
				t.Errorf("%d logins, want the one that was refused and one of each worker", got)
			}
		})
	}
}

// All children lose their login, and the PIN is right: nobody sees it.
func TestLoginLost(t *testing.T) {
	c, _ := recorded(t)
	tok := open(t, c)
	l := newLoad(t, tok, generate(t, tok, "k", "p256"), 8)
	for range 6 {
		l.wait(t, 50)
		order(t, c, "Sign", "0x101")
		taken(t, c, "Sign")
	}
	l.wait(t, 200)
	l.end()
	until(t, "there are two workers", func() bool { return len(tok.Workers()) == 2 })
}

// A login that hangs is cut off. Whether it counted, SoftHSM can tell.
func TestLoginHangs(t *testing.T) {
	c, path := recorded(t)
	c.StartTimeout = 2 * time.Second
	for _, pin := range []string{userPIN, "0000-wrong"} {
		order(t, c, "Login", "hang")
		c := restarted(c, path)
		c.PIN = hsm.NewPIN(pin)
		tok, err := worker.Open(t.Context(), c)
		if e, ok := errors.AsType[*hsm.Error](err); !ok || e.Class != hsm.ClassCrashed {
			if err == nil {
				tok.Close()
			}
			t.Fatalf("got %v, want class H", err)
		}
		if pin != userPIN { // somebody has entered a wrong one: it may have been us
			other := c
			other.PIN, other.Tries = hsm.NewPIN("3333-wrong"), nil
			if _, err := worker.Open(t.Context(), other); !operator(err) {
				t.Fatal(err)
			}
		}
		before := counted(t, c, "C_Login")
		tok, err = worker.Open(t.Context(), restarted(c, path))
		if err == nil {
			tok.Close()
		}
		if tried := counted(t, c, "C_Login") > before; tried != (pin == userPIN) || (err == nil) != (pin == userPIN) {
			t.Errorf("%s: tried again: %v, %v", pin, tried, err)
		}
	}
}

// No PIN goes to a child before it is known that it may be tried.
func TestChildAsksBeforeLogin(t *testing.T) {
	c, _ := recorded(t)
	c.Tries = never{}
	if _, err := worker.Open(t.Context(), c); !operator(err) || counted(t, c, "C_Login") != 0 {
		t.Errorf("%v, %d logins; want an operator's error and none", err, counted(t, c, "C_Login"))
	}
}

// never has no PIN tried.
type never struct{}

func (never) Try(i hsm.Info, _ hsm.PIN) (func(error), error) {
	return nil, &hsm.Error{Op: "PIN", Class: hsm.ClassOperator, Detail: "never, on " + i.TokenSerial}
}
func (never) Refuses(hsm.PIN) error { return errors.New("never") }

// A token that is slow to refuse, and does not tell of wrong PINs, gets one wrong try: a
// login is not cut off there to be tried again.
func TestSlowRefusal(t *testing.T) {
	var c worker.Config
	tok, m, pub := faultyToken(t, func(conf *worker.Config) {
		conf.Workers, conf.Profile = 1, "default"
		conf.Tries = pinrecord.New(filepath.Join(t.TempDir(), "record"), conf.Module, conf.TokenLabel)
		c = *conf
	})
	if err := signNow(t, tok, pub, 1); err != nil {
		t.Fatal(err)
	}
	changePIN(t, c, c.PIN.Reveal(), "87654321")
	m.Set(t, "C_Login delay=4000")
	before := m.Calls("C_Login")
	if err := syscall.Kill(tok.Workers()[0].PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, "the PIN is refused", func() bool { return operator(tok.Stats().Err) })
	if n := m.Calls("C_Login") - before; n != 1 {
		t.Errorf("the wrong PIN was tried %d times", n)
	}
}

// Who leaves while an administrative worker logs in, or closes the token, leaves no try
// on record that may have been a wrong one, and what he asked for is not begun.
func TestLeftInLogin(t *testing.T) {
	c, path := recorded(t)
	a := worker.Administer(c)
	order(t, c, "Login", "wait")
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := a.Import(ctx, "l", []byte("k"), newKey(t)); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
	taken(t, c, "Login")
	cancel()
	wg.Wait()
	wg.Go(func() { a.Close() })
	until(t, "the token is closed", func() bool {
		_, err := a.List(t.Context())
		return errors.Is(err, hsm.ErrClosed)
	})
	if err := os.WriteFile(filepath.Join(c.Env["COUNT_DIR"], "Login.go"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	if b, err := os.ReadFile(path); err != nil || len(b) > 0 {
		t.Errorf("on record: %q, %v", b, err)
	}
	if n := counted(t, c, "C_CreateObject"); n != 0 {
		t.Errorf("%d objects made", n)
	}
	again := worker.Administer(restarted(c, path))
	defer again.Close()
	if left := list(t, again); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}
