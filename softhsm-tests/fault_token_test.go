package softhsm_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/signwarden/signwarden/hsm/worker"
)

// killAll ends each worker, so that all that follows is done by new ones.
func (f *faultToken) killAll(t testing.TB) {
	t.Helper()
	for _, w := range f.tok.Workers() {
		if err := syscall.Kill(w.PID, syscall.SIGKILL); err != nil && err != syscall.ESRCH {
			t.Fatal(err)
		}
	}
}

// refused asks until the request is refused for a reason: a worker may have answered
// before it ended.
func (f *faultToken) refused(t testing.TB, why string) error {
	var err error
	waitFor(t, "it is refused: "+why, func() bool {
		err = f.sign(t, faultDeadline)
		return err != nil && strings.Contains(err.Error(), why)
	})
	return err
}

// copyAll copies what is in a directory to another, which is replaced.
func copyAll(t testing.TB, from, to string) {
	t.Helper()
	if err := os.RemoveAll(to); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
}

// util runs softhsm2-util on the row's token, as an operator would.
func (f *faultToken) util(t testing.TB, args ...string) {
	t.Helper()
	mustEnv(t, append(os.Environ(), "SOFTHSM2_CONF="+f.Env["SOFTHSM2_CONF"]), "softhsm2-util", args...)
}

// tokenRows are faults of a whole token: sessions, mechanisms, what it holds.
func tokenRows() []faultRow {
	var module string // a copy, which goes away
	return []faultRow{
		{fault: "4 sessions for all processes, 16 callers", rules: []string{"sessions_total 4"}, change: own, outcome: answered, tries: 16, sign: several,
			before: func(t testing.TB, f *faultToken) { f.Set(t, "sessions_total 4"); f.killAll(t) }},
		{fault: "4 sessions for all processes, a key is made and destroyed meanwhile", rules: []string{"sessions_total 4"}, change: own, outcome: answered, tries: -1,
			before: func(t testing.TB, f *faultToken) { f.Set(t, "sessions_total 4") },
			sign: func(t testing.TB, f *faultToken) error {
				if _, err := f.tok.Generate(t.Context(), "other", []byte("other"), "p256"); err != nil {
					return err
				}
				if _, err := f.signAs(t, []byte("other"), faultDeadline); err != nil {
					return err
				}
				return f.tok.Delete(t.Context(), []byte("other"))
			}},
		{fault: "2 sessions for all processes, one worker, a key is made", rules: []string{"sessions_total 2"}, outcome: answered, tries: -1,
			change: func(c *worker.Config) { c.Workers = 1 },
			before: func(t testing.TB, f *faultToken) { f.Set(t, "sessions_total 2") },
			sign: func(t testing.TB, f *faultToken) error {
				_, err := f.tok.Generate(t.Context(), "other", []byte("other"), "p256")
				return err
			}},
		{fault: "1 session for each process", change: own, outcome: answered, tries: 16, sign: several,
			before: func(t testing.TB, f *faultToken) { f.Set(t, "sessions 1"); f.killAll(t) }},
		{fault: "sessions end when idle, keep-alive longer than that", rules: []string{"idle 100"}, outcome: answered, tries: -1,
			change: func(c *worker.Config) { c.KeepAlive = -1 },
			before: func(t testing.TB, f *faultToken) { f.Set(t, "idle 100"); idleFor(t, 300*time.Millisecond) }},
		{fault: "sessions end when idle, keep-alive shorter than that", rules: []string{"idle 1000"}, outcome: answered, tries: 1,
			change: func(c *worker.Config) { c.KeepAlive = 100 * time.Millisecond },
			before: func(t testing.TB, f *faultToken) {
				f.Set(t, "idle 1000")
				idleFor(t, 1500*time.Millisecond)
			}},
		{fault: "the token offers CKM_ECDSA no more", rules: []string{"hide 0x1041"}, change: own, outcome: "refused, class A", text: "CKR_MECHANISM_INVALID: the token does not offer", tries: 1,
			mend: func(t testing.TB, f *faultToken) { f.Set(t) }},
		{fault: "the module's file is gone, and workers start", outcome: "refused", text: "does not exist", tries: 0,
			change: func(c *worker.Config) {
				module = filepath.Join(filepath.Dir(c.Env["SOFTHSM2_CONF"]), "module.so")
				b, err := os.ReadFile(faulty)
				if err == nil {
					err = os.WriteFile(module, b, 0o755)
				}
				if err != nil {
					panic(err)
				}
				c.Module = module
			},
			before: func(t testing.TB, f *faultToken) {
				if err := os.Rename(module, module+".gone"); err != nil {
					t.Fatal(err)
				}
				f.killAll(t)
			},
			sign: func(t testing.TB, f *faultToken) error { return f.refused(t, "does not exist") },
			mend: func(t testing.TB, f *faultToken) {
				if err := os.Rename(module+".gone", module); err != nil {
					t.Fatal(err)
				}
			}},
		{fault: "the token's configuration is gone, and workers start", change: own, outcome: "refused, class F", text: "SoftHSM's configuration cannot be read", tries: 0,
			before: func(t testing.TB, f *faultToken) {
				conf := f.Env["SOFTHSM2_CONF"]
				if err := os.Rename(conf, conf+".gone"); err != nil {
					t.Fatal(err)
				}
				f.killAll(t)
			},
			sign: func(t testing.TB, f *faultToken) error { return f.refused(t, "SoftHSM's configuration cannot be read") },
			mend: func(t testing.TB, f *faultToken) {
				conf := f.Env["SOFTHSM2_CONF"]
				if err := os.Rename(conf+".gone", conf); err != nil {
					t.Fatal(err)
				}
			}},
		{fault: "the token is initialised anew, without the key", change: own, outcome: "refused", text: "no such key in the token", tries: -1,
			before: func(t testing.TB, f *faultToken) {
				copyAll(t, f.tokens(), f.tokens()+".backup")
				f.util(t, "--init-token", "--token", "fault", "--label", "fault", "--so-pin", faultSO, "--pin", faultPIN)
			},
			sign: func(t testing.TB, f *faultToken) error { return f.refused(t, "no such key in the token") },
			mend: func(t testing.TB, f *faultToken) { copyAll(t, f.tokens()+".backup", f.tokens()) }},
		{fault: "the PIN is another one, and workers start", change: own, outcome: "refused, class G", text: "CKR_PIN_INCORRECT", tries: -1,
			before: func(t testing.TB, f *faultToken) {
				f.pkcs11(t, "--change-pin", "--pin", faultPIN, "--new-pin", "another-pin")
			},
			sign: func(t testing.TB, f *faultToken) error {
				logins := f.Calls("C_Login")
				f.killAll(t)
				err := f.refused(t, "CKR_PIN_INCORRECT")
				if n := f.Calls("C_Login") - logins; n != 1 {
					t.Errorf("a wrong PIN was tried %d times", n)
				}
				return err
			}},
	}
}

// tokens is where SoftHSM keeps the token.
func (f *faultToken) tokens() string {
	return filepath.Join(filepath.Dir(f.Env["SOFTHSM2_CONF"]), "tokens")
}

// pkcs11 runs pkcs11-tool on the row's token.
func (f *faultToken) pkcs11(t testing.TB, args ...string) {
	t.Helper()
	mustEnv(t, append(os.Environ(), "SOFTHSM2_CONF="+f.Env["SOFTHSM2_CONF"]), "pkcs11-tool",
		append([]string{"--module", softhsmModule(t), "--token-label", "fault", "--login"}, args...)...)
}

// idleFor lets time go by in which nobody asks anything.
func idleFor(t testing.TB, d time.Duration) {
	t.Helper()
	select {
	case <-time.After(d):
	case <-t.Context().Done():
		t.Fatal(t.Context().Err())
	}
}

// A token that has 4 sessions for all who use it, and 500 who would sign: none is
// refused, and keys are made and destroyed meanwhile.
func TestFewSessions(t *testing.T) {
	f := newFaultToken(t, nil)
	f.Set(t, "sessions_total 4")
	f.killAll(t)
	done := make(chan struct{})
	var acts sync.WaitGroup
	acts.Go(func() {
		defer close(done)
		for i := range 3 {
			id := fmt.Appendf(nil, "other %d", i)
			if _, err := f.tok.Generate(t.Context(), string(id), id, "p256"); err != nil {
				t.Errorf("making a key: %v", err)
			}
			if err := f.tok.Delete(t.Context(), id); err != nil {
				t.Errorf("destroying it: %v", err)
			}
		}
	})
	l := signUntil(500, func() error { return f.sign(t, 10*time.Second) }, func(asked int64) bool {
		select {
		case <-done:
			return asked > 5000
		default:
			return false
		}
	})
	acts.Wait()
	t.Logf("%v; %d sessions now", l, f.Sessions())
	if l.failed() > 0 || f.Sessions() > 4 {
		t.Errorf("%d errors, %d sessions", l.failed(), f.Sessions())
	}
}
