package hsm_test

import (
	"context"
	"crypto"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/signwarden/signwarden/hsm"
)

// want is how often a call is made when the token answers every C_SignInit
// with a code of the class.
type calls struct{ signInit, opens, finds, logins int }

var actions = map[hsm.Class]calls{
	hsm.ClassRefused:  {signInit: 1},
	hsm.ClassStuck:    {signInit: 2, opens: 1},
	hsm.ClassSession:  {signInit: 2, opens: 2, finds: 1}, // one more that holds the login
	hsm.ClassLogin:    {signInit: 2, opens: 2, finds: 1, logins: 1},
	hsm.ClassBusy:     {signInit: 4},
	hsm.ClassGone:     {signInit: 1},
	hsm.ClassOperator: {signInit: 1},
}

// Every code of the table, and two that it lacks: what is done once, and what
// is answered when it does not help.
func TestEveryCode(t *testing.T) {
	c := newToken(t)
	c.Sessions = 1
	codes := hsm.Codes()
	codes[0x80000123] = hsm.ClassGone
	codes[0x7777] = hsm.ClassGone
	p, _ := openFaulty(t, c)
	pub := generate(t, p, "k", "p256")
	for code, class := range codes {
		t.Run(hsm.CodeName(code), func(t *testing.T) {
			p, f := openFaulty(t, c) // of its own: ClassOperator ends a pool
			if _, err := p.Sign(t.Context(), []byte("k"), d256, crypto.SHA256); err != nil {
				t.Fatal(err)
			}
			f.arm(times(-1, "C_SignInit", code))
			_, err := p.Sign(t.Context(), []byte("k"), d256, crypto.SHA256)
			e, ok := errors.AsType[*hsm.Error](err)
			if !ok || e.Code != code || e.Class != class || e.Error() == "" {
				t.Fatalf("got %v, want an Error of code %#x, class %v", err, code, class)
			}
			got := map[string]bool{"A": e.Refused(), "E": e.Busy(), "F": e.Gone(), "G": e.Operator()}
			for name, is := range got {
				if is != (class.String() == name) {
					t.Errorf("class %v says it is %s: %v", class, name, is)
				}
			}
			did := calls{f.count("C_SignInit"), f.count("C_OpenSession"), f.count("C_FindObjectsInit"), f.count("C_Login")}
			if did != actions[class] {
				t.Errorf("class %v: got %+v, want %+v", class, did, actions[class])
			}
			f.arm(nil)
			sig, err := p.Sign(t.Context(), []byte("k"), d256, crypto.SHA256)
			if class == hsm.ClassOperator {
				if again, ok := errors.AsType[*hsm.Error](err); !ok || again.Code != code || f.count("C_SignInit") != 0 {
					t.Errorf("after it: got %v and %d calls, want the same error and none", err, f.count("C_SignInit"))
				}
				return
			}
			if err == nil {
				err = check(pub, d256, sig, crypto.SHA256)
			}
			if err != nil {
				t.Errorf("after it: %v", err)
			}
		})
	}
}

// A fault that passes is not seen by the caller.
func TestRecovers(t *testing.T) {
	c := newToken(t)
	p, f := openFaulty(t, c)
	pub := generate(t, p, "k", "p256")
	for _, f1 := range []struct {
		call string
		rv   uint
		n    int
	}{
		{"C_SignInit", pkcs11.CKR_OPERATION_ACTIVE, 1},
		{"C_Sign", pkcs11.CKR_OPERATION_NOT_INITIALIZED, 1},
		{"C_SignInit", pkcs11.CKR_SESSION_HANDLE_INVALID, 1},
		{"C_Sign", pkcs11.CKR_SESSION_CLOSED, 1},
		{"C_SignInit", pkcs11.CKR_KEY_HANDLE_INVALID, 1},
		{"C_SignInit", pkcs11.CKR_USER_NOT_LOGGED_IN, 1},
		{"C_Sign", pkcs11.CKR_FUNCTION_FAILED, 3},
		{"C_SignInit", pkcs11.CKR_HOST_MEMORY, 3},
	} {
		t.Run(hsm.CodeName(f1.rv), func(t *testing.T) {
			f.arm(times(f1.n, f1.call, f1.rv))
			sig, err := p.Sign(t.Context(), []byte("k"), d256, crypto.SHA256)
			if err == nil {
				err = check(pub, d256, sig, crypto.SHA256)
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
}

// The token really loses every session, under load: nobody sees it.
func TestSessionsLost(t *testing.T) {
	p, f := openFaulty(t, newToken(t))
	pub := generate(t, p, "k", "p256")
	ctx, slot := p.LoadedCtx()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 50 {
				sig, err := p.Sign(t.Context(), []byte("k"), d256, crypto.SHA256)
				if err == nil {
					err = check(pub, d256, sig, crypto.SHA256)
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	f.arm(nil)
	if err := ctx.CloseAllSessions(slot); err != nil { // logs out, too
		t.Fatal(err)
	}
	for range 4 {
		wg.Go(func() {
			sig, err := p.Sign(t.Context(), []byte("k"), d256, crypto.SHA256)
			if err == nil {
				err = check(pub, d256, sig, crypto.SHA256)
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := f.count("C_Login"); n != 1 {
		t.Errorf("%d logins, want 1", n)
	}
	if err := ctx.CloseAllSessions(slot); err != nil {
		t.Fatal(err)
	}
	if err := p.Ping(t.Context()); err != nil {
		t.Errorf("Ping: %v", err)
	}
}

// Somebody logs us out, and the key is found again.
func TestLoggedOut(t *testing.T) {
	for _, key := range []string{"known", "not yet found"} { // a search finds nothing and does not say why
		t.Run(key, func(t *testing.T) {
			p, f := openFaulty(t, newToken(t))
			generate(t, p, "known", "p256")
			generate(t, p, "not yet found", "p256")
			if _, err := p.Sign(t.Context(), []byte("known"), d256, crypto.SHA256); err != nil {
				t.Fatal(err)
			}
			ctx, slot := p.LoadedCtx()
			logout(t, ctx, slot)
			f.arm(nil)
			if _, err := p.Sign(t.Context(), []byte(key), d256, crypto.SHA256); err != nil {
				t.Error(err)
			}
			if n := f.count("C_Login"); n != 1 {
				t.Errorf("%d logins, want 1", n)
			}
		})
	}
}

// Two see the same loss, one of them late: one login serves both.
func TestLoginLostOnce(t *testing.T) {
	p, f := openFaulty(t, newToken(t))
	generate(t, p, "k", "p256")
	entered, release := make(chan struct{}), make(chan struct{})
	var mu sync.Mutex
	n := 0
	f.arm(func(call string) error {
		if call != "C_SignInit" {
			return nil
		}
		mu.Lock()
		n++
		mine := n
		mu.Unlock()
		switch mine {
		case 1:
			close(entered)
			<-release
		case 2:
		default:
			return nil
		}
		return pkcs11.Error(pkcs11.CKR_USER_NOT_LOGGED_IN)
	})
	late := make(chan error, 1)
	go func() {
		_, err := p.Sign(t.Context(), []byte("k"), d256, crypto.SHA256)
		late <- err
	}()
	<-entered
	if _, err := p.Sign(t.Context(), []byte("k"), d256, crypto.SHA256); err != nil {
		t.Error(err)
	}
	close(release)
	if err := <-late; err != nil {
		t.Error(err)
	}
	if n := f.count("C_Login"); n != 1 {
		t.Errorf("%d logins, want 1", n)
	}
}

func logout(t *testing.T, ctx *pkcs11.Ctx, slot uint) {
	t.Helper()
	sh, err := ctx.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	defer ctx.CloseSession(sh)
	if err := ctx.Logout(sh); err != nil {
		t.Fatal(err)
	}
}

// A login that fails is not repeated by itself, whatever the code and the profile,
// and not taken for done.
func TestLoginFails(t *testing.T) {
	for _, profile := range hsm.Profiles() {
		for _, code := range []uint{pkcs11.CKR_FUNCTION_FAILED, pkcs11.CKR_SESSION_COUNT, pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED, pkcs11.CKR_OPERATION_ACTIVE, pkcs11.CKR_USER_NOT_LOGGED_IN, pkcs11.CKR_GENERAL_ERROR} {
			t.Run(profile+" "+hsm.CodeName(code), func(t *testing.T) {
				c := newToken(t)
				c.Sessions, c.Profile = 1, profile
				p, f := openFaulty(t, c)
				generate(t, p, "k", "p256")
				ctx, slot := p.LoadedCtx()
				logout(t, ctx, slot)
				f.arm(times(1, "C_Login", code))
				_, err := p.Sign(t.Context(), []byte("k"), d256, crypto.SHA256)
				if e, ok := errors.AsType[*hsm.Error](err); !ok || e.Code != code || e.Unclear() != (code == pkcs11.CKR_FUNCTION_FAILED) || f.count("C_Login") != 1 {
					t.Errorf("got %v and %d logins, want the login's error and one", err, f.count("C_Login"))
				}
				if _, err := p.Sign(t.Context(), []byte("k"), d256, crypto.SHA256); err != nil || f.count("C_Login") != 2 {
					t.Errorf("the next request: %v, %d logins in all, want 2", err, f.count("C_Login"))
				}
			})
		}
	}
}

// The PIN is changed behind our back: one try, and never another.
func TestPINChanged(t *testing.T) {
	c := newToken(t)
	p, f := openFaulty(t, c)
	generate(t, p, "k", "p256")
	ctx, slot := p.LoadedCtx()
	sh, err := ctx.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	if err := ctx.SetPIN(sh, userPIN, "another-pin"); err != nil {
		t.Fatal(err)
	}
	if err := ctx.CloseSession(sh); err != nil {
		t.Fatal(err)
	}
	logout(t, ctx, slot)
	f.arm(nil)
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			_, err := p.Sign(t.Context(), []byte("k"), d256, crypto.SHA256)
			if e, ok := errors.AsType[*hsm.Error](err); !ok || !e.Operator() || e.Code != pkcs11.CKR_PIN_INCORRECT {
				t.Errorf("got %v, want CKR_PIN_INCORRECT", err)
			}
		})
	}
	wg.Wait()
	if err := p.Ping(t.Context()); err == nil {
		t.Error("Ping says that all is well")
	}
	if n := f.count("C_Login"); n != 1 {
		t.Errorf("%d logins, want 1", n)
	}
}

// A token with room for fewer sessions than were asked for serves all.
func TestFewSessions(t *testing.T) {
	c := newToken(t)
	c.Sessions = 6
	var mu sync.Mutex
	open, most := 0, 3
	f := &faulty{counts: map[string]int{}}
	f.inject = func(call string) error {
		mu.Lock()
		defer mu.Unlock()
		switch {
		case call == "C_OpenSession" && open == most:
			return pkcs11.Error(pkcs11.CKR_SESSION_COUNT)
		case call == "C_OpenSession":
			open++
		case call == "C_CloseSession":
			open--
		}
		return nil
	}
	p, err := hsm.OpenWith(t.Context(), c, func(a hsm.API) hsm.API { f.API = a; return f })
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	pub := generate(t, p, "k", "p256")
	var wg sync.WaitGroup
	for i := range 64 {
		ctx := t.Context()
		if i%2 == 0 {
			ctx = context.Background() // runs on the caller's own goroutine
		}
		wg.Go(func() {
			for range 10 {
				sig, err := p.Sign(ctx, []byte("k"), d256, crypto.SHA256)
				if err == nil {
					err = check(pub, d256, sig, crypto.SHA256)
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

// hold makes the module hang in C_Sign until the test lets go.
func hold(f *faulty) (entered <-chan struct{}, release func()) {
	in, out := make(chan struct{}, 64), make(chan struct{})
	f.arm(func(call string) error {
		if call == "C_Sign" {
			in <- struct{}{}
			<-out
		}
		return nil
	})
	return in, sync.OnceFunc(func() { close(out) })
}

func TestContextEnds(t *testing.T) {
	c := newToken(t)
	c.Sessions = 1
	p, f := openFaulty(t, c)
	generate(t, p, "k", "p256")
	entered, release := hold(f)
	defer release()

	ctx, cancel := context.WithCancel(t.Context())
	running := make(chan error, 1)
	go func() {
		_, err := p.Sign(ctx, []byte("k"), d256, crypto.SHA256)
		running <- err
	}()
	<-entered
	// The session is in use: this one waits, and leaves at its deadline.
	short, stop := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer stop()
	if _, err := p.Sign(short, []byte("k"), d256, crypto.SHA256); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("waiting: got %v, want DeadlineExceeded", err)
	}
	cancel()
	if err := <-running; !errors.Is(err, context.Canceled) { // though the module still hangs
		t.Errorf("running: got %v, want Canceled", err)
	}
	if _, err := p.Sign(ctx, []byte("k"), d256, crypto.SHA256); !errors.Is(err, context.Canceled) {
		t.Errorf("ended before: got %v, want Canceled", err)
	}
	release()
	if _, err := p.Sign(t.Context(), []byte("k"), d256, crypto.SHA256); err != nil {
		t.Errorf("after: %v", err)
	}
	if n := f.count("C_Sign"); n != 2 {
		t.Errorf("%d signatures made, want 2: those who left must not sign", n)
	}
}

func TestContextEndsInBackoff(t *testing.T) {
	p, f := openFaulty(t, newToken(t))
	generate(t, p, "k", "p256")
	ctx, cancel := context.WithCancel(t.Context())
	f.arm(func(call string) error {
		if call != "C_SignInit" {
			return nil
		}
		cancel()
		return pkcs11.Error(pkcs11.CKR_FUNCTION_FAILED)
	})
	if _, err := p.Sign(ctx, []byte("k"), d256, crypto.SHA256); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want Canceled", err)
	}
	if n := f.count("C_SignInit"); n != 1 {
		t.Errorf("%d tries, want 1", n)
	}
}

func TestClose(t *testing.T) {
	for name, background := range map[string]bool{"handed over": false, "inline": true} {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			if background {
				ctx = context.Background()
			}
			c := newToken(t)
			c.Sessions = 1
			p, f := openFaulty(t, c)
			pub := generate(t, p, "k", "p256")
			entered, release := hold(f)
			defer release()
			running, waiting, closed := make(chan error, 1), make(chan error, 1), make(chan error, 1)
			go func() {
				sig, err := p.Sign(ctx, []byte("k"), d256, crypto.SHA256)
				if err == nil {
					err = check(pub, d256, sig, crypto.SHA256)
				}
				running <- err
			}()
			<-entered
			go func() {
				_, err := p.Sign(ctx, []byte("k"), d256, crypto.SHA256)
				waiting <- err
			}()
			go func() { closed <- p.Close() }()
			if err := <-waiting; !errors.Is(err, hsm.ErrClosed) {
				t.Errorf("waiting: got %v, want ErrClosed", err)
			}
			select {
			case <-closed:
				t.Error("Close did not wait for the call that runs")
			default:
			}
			release()
			if err := <-running; err != nil {
				t.Errorf("running: %v", err)
			}
			if err := <-closed; err != nil {
				t.Errorf("Close: %v", err)
			}
			if _, err := p.Sign(ctx, []byte("k"), d256, crypto.SHA256); !errors.Is(err, hsm.ErrClosed) {
				t.Errorf("after: got %v, want ErrClosed", err)
			}
		})
	}
}
