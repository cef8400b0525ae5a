package pinrecord_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/signwarden/signwarden/hsm"
	"github.com/signwarden/signwarden/hsm/pinrecord"
	"github.com/signwarden/signwarden/hsm/worker"
)

var (
	incorrect = &hsm.Error{Op: "C_Login", Code: pkcs11.CKR_PIN_INCORRECT, Class: hsm.ClassOperator}
	unclear   = &hsm.Error{Op: "C_Login", Code: pkcs11.CKR_FUNCTION_FAILED, Class: hsm.ClassBusy}
	gone      = &hsm.Error{Op: "C_Login", Code: pkcs11.CKR_DEVICE_REMOVED, Class: hsm.ClassGone}
)

const killed = "killed" // nobody calls done

// What of one try the next one sees: of the same process, and of one that was
// started since.
func TestTry(t *testing.T) {
	type info = hsm.Info
	for _, tt := range []struct {
		name   string
		before []any // ends of earlier tries of the PIN, by this process
		fresh  bool  // the process is started again
		pin    string
		i      info
		tried  bool
	}{
		{name: "nothing on record", pin: "1", tried: true},
		{name: "refused", before: []any{incorrect}, pin: "1"},
		{name: "refused, restarted", before: []any{incorrect}, fresh: true, pin: "1"},
		{name: "refused, another PIN", before: []any{incorrect}, pin: "2", tried: true},
		{name: "refused, another PIN, restarted", before: []any{incorrect}, fresh: true, pin: "2", tried: true},
		{name: "refused by another token of that label", before: []any{incorrect}, fresh: true, pin: "1", i: info{TokenSerial: "other"}, tried: true},
		{name: "accepted", before: []any{nil}, pin: "1", tried: true},
		{name: "accepted, then refused, restarted", before: []any{nil, incorrect}, fresh: true, pin: "1"},
		{name: "another answer", before: []any{gone}, pin: "1", tried: true},
		{name: "another answer, restarted", before: []any{gone}, fresh: true, pin: "1", tried: true},
		// One that may have been of the PIN.
		{name: "unclear", before: []any{unclear}, pin: "1"},
		{name: "unclear, restarted", before: []any{unclear}, fresh: true, pin: "1"},
		{name: "unclear, another PIN", before: []any{unclear}, fresh: true, pin: "2", tried: true},
		{name: "unclear, restarted, the token tells of wrong ones", before: []any{unclear}, fresh: true, pin: "1", i: info{CountsPINs: true}, tried: true},
		{name: "unclear, restarted, the token tells of a wrong one", before: []any{unclear}, fresh: true, pin: "1", i: info{CountsPINs: true, WrongPIN: true}},
		{name: "accepted, then unclear", before: []any{nil, unclear}, pin: "1", tried: true},
		{name: "accepted, then unclear, and a wrong one", before: []any{nil, unclear}, pin: "1", i: info{WrongPIN: true}},
		// Without an end: as the token says, where it does.
		{name: "cut off", before: []any{worker.ErrInterrupted}, pin: "1"},
		{name: "killed, restarted", before: []any{killed}, fresh: true, pin: "1"},
		{name: "killed, restarted, the token tells of wrong ones", before: []any{killed}, fresh: true, pin: "1", i: info{CountsPINs: true}, tried: true},
		{name: "killed, restarted, the token tells of a wrong one", before: []any{killed}, fresh: true, pin: "1", i: info{CountsPINs: true, WrongPIN: true}},
		{name: "accepted, then cut off", before: []any{nil, worker.ErrInterrupted}, pin: "1", tried: true},
		{name: "accepted, then cut off twice", before: []any{nil, worker.ErrInterrupted, worker.ErrInterrupted}, pin: "1"},
		{name: "accepted, then cut off twice, the token tells of wrong ones", before: []any{nil, worker.ErrInterrupted, worker.ErrInterrupted}, pin: "1", i: info{CountsPINs: true}, tried: true},
		{name: "accepted, then cut off twice, another PIN", before: []any{nil, worker.ErrInterrupted, worker.ErrInterrupted}, pin: "2", tried: true},
		{name: "accepted, then cut off, and a wrong one", before: []any{nil, worker.ErrInterrupted}, pin: "1", i: info{WrongPIN: true}},
		{name: "accepted, then killed, restarted", before: []any{nil, killed}, fresh: true, pin: "1", tried: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), pinrecord.Name("m", "l"))
			r := pinrecord.New(path, "m", "l")
			for _, end := range tt.before {
				done, err := r.Try(hsm.Info{TokenSerial: "s"}, hsm.NewPIN("1"))
				if err != nil {
					t.Fatal(err)
				}
				err, _ = end.(error)
				if end != killed {
					done(err)
				} else { // the kernel lets its lock go
					os.Rename(path, path+".was")
					b, err := os.ReadFile(path + ".was")
					if err == nil {
						err = os.WriteFile(path, b, 0o600)
					}
					if err != nil {
						t.Fatal(err)
					}
				}
			}
			if tt.fresh {
				r = pinrecord.New(path, "m", "l")
			}
			if tt.i.TokenSerial == "" {
				tt.i.TokenSerial = "s"
			}
			done, err := r.Try(tt.i, hsm.NewPIN(tt.pin))
			if tried := err == nil; tried != tt.tried {
				t.Fatalf("tried: %v, %v", tried, err)
			}
			if err == nil {
				done(nil)
				if b, err := os.ReadFile(path); err != nil || len(b) > 0 {
					t.Errorf("after it was accepted the record has %q, %v", b, err)
				}
				return
			}
			if e, ok := errors.AsType[*hsm.Error](err); !ok || !e.Operator() {
				t.Errorf("got %v, want an operator's error", err)
			}
			for _, want := range []string{"retry-pin", path, `token l`} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%v: does not say %q", err, want)
				}
			}
			if r.Refuses(hsm.NewPIN(tt.pin)) == nil || r.Refuses(hsm.NewPIN("another")) != nil {
				t.Error("Refuses says otherwise")
			}
			if said, err := pinrecord.Forget(path); said == "" || err != nil {
				t.Errorf("Forget: %q, %v", said, err)
			}
			if err := r.Refuses(hsm.NewPIN(tt.pin)); err != nil {
				t.Errorf("after Forget: %v", err)
			}
			if done, err = r.Try(tt.i, hsm.NewPIN(tt.pin)); err != nil {
				t.Fatalf("after Forget: %v", err)
			}
			done(nil)
		})
	}
}

// What cannot be read, or written, is no leave to try.
func TestRecordDamaged(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"junk": "junk", "no state": `{"salt":"AAAAAAAAAAAAAAAAAAAAAA=="}`, "cut off": `{"state":"refused"`, "huge": strings.Repeat("x", 1<<20),
	} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		r := pinrecord.New(path, "m", "l")
		if _, err := r.Try(hsm.Info{}, hsm.NewPIN("1")); err == nil || !strings.Contains(err.Error(), "retry-pin") {
			t.Errorf("%s: got %v", name, err)
		}
		if r.Refuses(hsm.NewPIN("1")) == nil {
			t.Errorf("%s: Refuses says that it may be tried", name)
		}
		if _, err := pinrecord.Forget(path); err != nil {
			t.Errorf("%s: Forget: %v", name, err)
		}
		done, err := r.Try(hsm.Info{}, hsm.NewPIN("1"))
		if err != nil {
			t.Fatalf("%s: after Forget: %v", name, err)
		}
		done(nil)
	}
	if _, err := pinrecord.New(filepath.Join(dir, "none", "x"), "m", "l").Try(hsm.Info{}, hsm.NewPIN("1")); err == nil {
		t.Error("tried with no place to note it")
	}
	if err := os.Symlink(filepath.Join(dir, "junk"), filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if _, err := pinrecord.New(filepath.Join(dir, "link"), "m", "l").Try(hsm.Info{}, hsm.NewPIN("1")); err == nil {
		t.Error("a symbolic link is followed")
	}
	if pinrecord.New(filepath.Join(dir, "link"), "m", "l").Refuses(hsm.NewPIN("1")) == nil {
		t.Error("a symbolic link is followed to one that refuses nothing")
	}
	if said, err := pinrecord.Forget(filepath.Join(dir, "missing")); said != "" || err != nil {
		t.Errorf("Forget of nothing: %q, %v", said, err)
	}
}

// One that is right is in no file while it is tried again.
func TestAcceptedLeavesNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "r")
	r := pinrecord.New(path, "m", "l")
	for i := range 2 {
		done, err := r.Try(hsm.Info{}, hsm.NewPIN("1"))
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil || (len(b) > 0) != (i == 0) {
			t.Errorf("try %d: the record has %q, %v", i, b, err)
		}
		done(nil)
	}
}
