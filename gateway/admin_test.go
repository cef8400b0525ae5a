package gateway_test

import (
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signwarden/signwarden/gateway"
	"github.com/signwarden/signwarden/gateway/audit"
	"github.com/signwarden/signwarden/gateway/gatewaytest"
	"github.com/signwarden/signwarden/gateway/ident"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/policy"
	"github.com/signwarden/signwarden/gateway/sigerr"
	"github.com/signwarden/signwarden/gateway/store"
)

func TestCreateKey(t *testing.T) {
	f := gatewaytest.New(t, "")
	for _, tt := range []struct {
		name  string
		spec  gateway.KeySpec
		pairs int
	}{
		{"plain", gateway.KeySpec{Name: "plain", Algorithm: keys.P256}, 1},
		{"subkey", gateway.KeySpec{Name: "sub", Algorithm: keys.Ed25519, UserID: "A <a@example.org>"}, 2},
		{"single", gateway.KeySpec{Name: "single", Algorithm: keys.P384, UserID: "A <a@example.org>", Layout: keys.Single}, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := f.Token.Pairs()
			k, err := f.CreateKey(t.Context(), f.Root, "test", tt.spec)
			if err != nil {
				t.Fatal(err)
			}
			if got := f.Token.Pairs() - before; got != tt.pairs {
				t.Errorf("%d pairs were made, want %d", got, tt.pairs)
			}
			if (k.OpenPGP != nil) != (tt.spec.UserID != "") || k.Created != k.Created.Truncate(time.Second) {
				t.Errorf("key %+v", k)
			}
			if (tt.pairs == 2) != (k.OpenPGP != nil && len(k.OpenPGP.PrimaryID) > 0) {
				t.Errorf("primary key: %+v", k.OpenPGP)
			}
			e := f.Store.Last(t)
			if e.Action != "key.create" || e.Outcome != audit.Done || e.Key != tt.spec.Name || e.KeyFingerprint != k.Fingerprint() || e.Principal != "root" {
				t.Errorf("audit entry %+v", e)
			}
			if _, err := f.Sign(t.Context(), f.Root, gatewaytest.Request(k.Name, "text")); err != nil {
				t.Errorf("signing with it: %v", err)
			}
		})
	}
}

// The certify-only primary key cannot be reached by any name.
func TestPrimaryKeyIsUnreachable(t *testing.T) {
	f := gatewaytest.New(t, "")
	_, err := f.CreateKey(t.Context(), f.Root, "test", gateway.KeySpec{Name: "k", Algorithm: keys.Ed25519, UserID: "A"})
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Sign(t.Context(), f.Root, gatewaytest.Request("k/certify", "text"))
	if !errors.Is(err, sigerr.NotFound) {
		t.Errorf("got %v, want NotFound", err)
	}
	all, err := f.Session(f.Root, "test", "openpgp").PublicKeys(t.Context())
	if err != nil || len(all) != 1 {
		t.Errorf("an agent is offered %v (%v), want the signing key alone", all, err)
	}
}

func TestCreateKeyRefused(t *testing.T) {
	f := gatewaytest.New(t, twoTeams)
	f.Key(t, "taken", keys.Ed25519)
	rows, pairs := len(f.Store.Entries(t)), f.Token.Pairs()
	good := gateway.KeySpec{Name: "new", Algorithm: keys.Ed25519}
	edit := func(change func(*gateway.KeySpec)) gateway.KeySpec { s := good; change(&s); return s }
	for i, tt := range []struct {
		name string
		who  string
		spec gateway.KeySpec
		want error
	}{
		{"not an administrator", "alice", good, sigerr.Denied},
		{"taken", "root", edit(func(s *gateway.KeySpec) { s.Name = "taken" }), sigerr.Conflict},
		{"name", "root", edit(func(s *gateway.KeySpec) { s.Name = "a/b" }), sigerr.Invalid},
		{"algorithm", "root", edit(func(s *gateway.KeySpec) { s.Algorithm = "rsa1024" }), sigerr.Invalid},
		{"user id", "root", edit(func(s *gateway.KeySpec) { s.UserID = "a\nb" }), sigerr.Invalid},
		{"layout", "root", edit(func(s *gateway.KeySpec) { s.UserID, s.Layout = "A", "double" }), sigerr.Invalid},
		{"layout without user id", "root", edit(func(s *gateway.KeySpec) { s.Layout = keys.Single }), sigerr.Invalid},
		{"expired", "root", edit(func(s *gateway.KeySpec) { s.UserID, s.Expires = "A", time.Now().Add(-time.Hour) }), sigerr.Invalid},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := f.CreateKey(t.Context(), gatewaytest.Principal(t, tt.who), "test", tt.spec)
			if !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
			all := f.Store.Entries(t)
			if len(all) != rows+i+1 || all[len(all)-1].Outcome != audit.Denied || all[len(all)-1].Principal != tt.who {
				t.Errorf("audit log ends with %+v", all[len(all)-1])
			}
			if f.Token.Pairs() != pairs {
				t.Error("a pair stays in the token")
			}
		})
	}
}

// Nothing stays behind in the token where certifying fails.
func TestCreateKeyUndone(t *testing.T) {
	f := gatewaytest.New(t, "")
	f.Token.After = func(sig []byte) []byte { sig[0] ^= 1; return sig } // does not verify
	_, err := f.CreateKey(t.Context(), f.Root, "test", gateway.KeySpec{Name: "k", Algorithm: keys.Ed25519, UserID: "A"})
	if !errors.Is(err, sigerr.TokenFailed) {
		t.Errorf("got %v, want a token failure", err)
	}
	if f.Token.Pairs() != 0 {
		t.Errorf("%d pairs stay in the token", f.Token.Pairs())
	}
	if e := f.Store.Last(t); e.Outcome != audit.Failed || !strings.Contains(e.Reason, "does not verify") {
		t.Errorf("audit entry %+v", e)
	}
	f.Token.After = nil
	if _, err := f.CreateKey(t.Context(), f.Root, "test", gateway.KeySpec{Name: "k", Algorithm: keys.Ed25519}); err != nil {
		t.Errorf("the name is not free again: %v", err)
	}
}

// Two who create one name at a time: one key, one pair.
func TestCreateKeyRace(t *testing.T) {
	f := gatewaytest.New(t, "")
	var wg sync.WaitGroup
	errs := make([]error, 8)
	for i := range errs {
		wg.Go(func() {
			_, errs[i] = f.CreateKey(t.Context(), f.Root, "test", gateway.KeySpec{Name: "k", Algorithm: keys.P256})
		})
	}
	wg.Wait()
	made := 0
	for _, err := range errs {
		if err == nil {
			made++
		} else if !errors.Is(err, sigerr.Conflict) {
			t.Errorf("got %v, want Conflict", err)
		}
	}
	if made != 1 || f.Token.Pairs() != 1 {
		t.Errorf("%d keys and %d pairs, want one of each", made, f.Token.Pairs())
	}
}

// A change whose commit fails, or seems to, leaves store and decisions agreeing.
func TestAdminStoreFaults(t *testing.T) {
	boom := errors.New("disk full")
	t.Run("failed", func(t *testing.T) {
		f := gatewaytest.New(t, "")
		f.Key(t, "k", keys.Ed25519)
		f.Store.SetFail(func(store.Change) (error, error) { return boom, nil }, nil)
		_, err := f.SetKeyState(t.Context(), f.Root, "test", "k", keys.Disabled)
		if !errors.Is(err, sigerr.Unavailable) {
			t.Errorf("got %v, want Unavailable", err)
		}
		f.Store.SetFail(nil, nil)
		if _, err := f.Sign(t.Context(), f.Root, gatewaytest.Request("k", "text")); err != nil {
			t.Errorf("the key is no longer enabled: %v", err)
		}
	})
	t.Run("failed but persisted", func(t *testing.T) {
		f := gatewaytest.New(t, "")
		f.Key(t, "k", keys.Ed25519)
		f.Store.SetFail(func(store.Change) (error, error) { return nil, boom }, nil)
		k, err := f.SetKeyState(t.Context(), f.Root, "test", "k", keys.Disabled)
		if err != nil || k.State != keys.Disabled {
			t.Errorf("got %v, %v; the change took effect, so it succeeded", k.State, err)
		}
	})
	t.Run("persisted and unreadable", func(t *testing.T) {
		f := gatewaytest.New(t, "")
		f.Key(t, "k", keys.Ed25519)
		f.Store.SetFail(func(store.Change) (error, error) { return nil, boom }, boom)
		if _, err := f.SetKeyState(t.Context(), f.Root, "test", "k", keys.Disabled); !errors.Is(err, sigerr.Unavailable) {
			t.Errorf("got %v, want Unavailable", err)
		}
		before := f.Token.Signs()
		f.Store.SetFail(nil, boom) // it can record, but not be read
		if _, err := f.Sign(t.Context(), f.Root, gatewaytest.Request("k", "text")); !errors.Is(err, sigerr.Unavailable) {
			t.Errorf("on a state that may be old: got %v, want Unavailable", err)
		}
		if f.Token.Signs() != before {
			t.Error("the token was asked on a state that may be old")
		}
		f.Store.SetFail(nil, nil)
		if _, err := f.Sign(t.Context(), f.Root, gatewaytest.Request("k", "text")); !errors.Is(err, sigerr.Disabled) {
			t.Errorf("after the store recovered: got %v, want Disabled", err)
		}
	})
}

func TestSetKeyState(t *testing.T) {
	f := gatewaytest.New(t, twoTeams)
	f.Key(t, "a-1", keys.Ed25519)
	alice := gatewaytest.Principal(t, "alice")
	if _, err := f.SetKeyState(t.Context(), alice, "test", "a-1", keys.Disabled); !errors.Is(err, sigerr.Denied) {
		t.Errorf("by one who may only sign: got %v, want Denied", err)
	}
	for _, to := range []keys.State{keys.Disabled, keys.Disabled, keys.Enabled} {
		k, err := f.SetKeyState(t.Context(), f.Root, "test", "a-1", to)
		if err != nil || k.State != to {
			t.Fatalf("to %s: %v, %v", to, k.State, err)
		}
		_, err = f.Sign(t.Context(), alice, gatewaytest.Request("a-1", "text"))
		if to == keys.Disabled && !errors.Is(err, sigerr.Disabled) || to == keys.Enabled && err != nil {
			t.Errorf("signing with a key that is %s: %v", to, err)
		}
	}
	if _, err := f.SetKeyState(t.Context(), f.Root, "test", "a-1", "lost"); !errors.Is(err, sigerr.Invalid) {
		t.Errorf("an unknown state: got %v, want Invalid", err)
	}
	changes := 0
	for _, e := range f.Store.Entries(t) {
		if e.Action == "key.state" && e.Outcome == audit.Done {
			changes++
		}
	}
	if changes != 3 {
		t.Errorf("%d acts in the audit log, want 3: the one that changed nothing too", changes)
	}
}

func TestApplyPolicy(t *testing.T) {
	f := gatewaytest.New(t, twoTeams)
	f.Key(t, "a-1", keys.Ed25519)
	alice := gatewaytest.Principal(t, "alice")
	for _, tt := range []struct {
		name, who, source string
		want              error
	}{
		{"by one who signs", "alice", gatewaytest.Policy, sigerr.Denied},
		{"not YAML", "root", "rules: [", sigerr.Invalid},
		{"unknown field", "root", "rules: []\nextra: 1", sigerr.Invalid},
		{"locks out", "root", "rules:\n- {name: x, principals: [eve], keys: ['*'], may: [admin]}", sigerr.Conflict},
		{"empty", "root", "", sigerr.Conflict},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := f.ApplyPolicy(t.Context(), gatewaytest.Principal(t, tt.who), "test", []byte(tt.source))
			if !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
			if e := f.Store.Last(t); e.Action != "policy.apply" || e.Outcome != audit.Denied {
				t.Errorf("audit entry %+v", e)
			}
			if _, err := f.Sign(t.Context(), alice, gatewaytest.Request("a-1", "text")); err != nil {
				t.Errorf("the rules changed: %v", err)
			}
		})
	}
	n, err := f.ApplyPolicy(t.Context(), f.Root, "test", []byte(gatewaytest.Policy))
	if err != nil || n != 1 {
		t.Fatalf("got %d, %v", n, err)
	}
	if e := f.Store.Last(t); e.Outcome != audit.Done || !strings.Contains(e.Detail, "1 rules, sha256 ") {
		t.Errorf("audit entry %+v", e)
	}
	if _, err := f.Sign(t.Context(), alice, gatewaytest.Request("a-1", "text")); !errors.Is(err, sigerr.NotFound) {
		t.Errorf("alice, whose rule is gone: got %v, want NotFound", err)
	}
	src, err := f.Policy(t.Context(), f.Root, "test")
	if err != nil || string(src) != gatewaytest.Policy {
		t.Errorf("got %q, %v", src, err)
	}
}

func TestReadersOfEverything(t *testing.T) {
	f := gatewaytest.New(t, twoTeams)
	alice := gatewaytest.Principal(t, "alice")
	q := policy.Query{Principal: "bob", Key: "b-1", Action: policy.Sign, Format: "rpm", Blind: true, Hash: "sha256"}
	if _, _, err := f.TestPolicy(t.Context(), alice, "test", q); !errors.Is(err, sigerr.Denied) {
		t.Errorf("alice asks about bob: got %v, want Denied", err)
	}
	d, each, err := f.TestPolicy(t.Context(), f.Root, "test", q)
	if err != nil || !d.Allowed || d.Rule != "team-b" || len(each) != 4 {
		t.Errorf("root asks about bob: %+v, %q, %v", d, each, err)
	}
	q.Principal = "alice"
	d, each, err = f.TestPolicy(t.Context(), alice, "test", q)
	if err != nil || d.Allowed || each != nil {
		t.Errorf("alice asks about herself: %+v, %q, %v", d, each, err)
	}
	if _, _, err := f.AuditEntries(t.Context(), alice, "test", 0, 10); !errors.Is(err, sigerr.Denied) {
		t.Errorf("alice reads the audit log: got %v, want Denied", err)
	}
	if _, err := f.Policy(t.Context(), alice, "test"); !errors.Is(err, sigerr.Denied) {
		t.Errorf("alice reads the policy: got %v, want Denied", err)
	}
	for _, limit := range []int{0, gateway.MaxAuditRows + 1} {
		if _, _, err := f.AuditEntries(t.Context(), f.Root, "test", 0, limit); !errors.Is(err, sigerr.Invalid) {
			t.Errorf("limit %d: got %v, want Invalid", limit, err)
		}
	}
	first, rows, err := f.AuditEntries(t.Context(), f.Root, "test", -1, 2)
	if n := len(f.Store.Entries(t)); err != nil || len(rows) != 2 || first != int64(n-2) {
		t.Errorf("the last two of %d: %d rows from %d, %v", n, len(rows), first, err)
	}
}

// Nobody gets nothing, by any method, and leaves no trace.
func TestNobody(t *testing.T) {
	f := gatewaytest.New(t, `
rules:
  - {name: all, principals: ["*"], keys: ["*"], may: [sign, read, admin], formats: ["*"], blind: true}
`)
	f.Key(t, "k", keys.Ed25519)
	rows := len(f.Store.Entries(t))
	var nobody ident.Principal
	ctx := t.Context()
	for name, call := range map[string]func() error{
		"Sign": func() error { _, err := f.Sign(ctx, nobody, gatewaytest.Request("k", "text")); return err },
		"CreateKey": func() error {
			_, err := f.CreateKey(ctx, nobody, "test", gateway.KeySpec{Name: "new", Algorithm: keys.P256})
			return err
		},
		"SetKeyState":  func() error { _, err := f.SetKeyState(ctx, nobody, "test", "k", keys.Disabled); return err },
		"Key":          func() error { _, err := f.Gateway.Key(ctx, nobody, "k"); return err },
		"Keys":         func() error { _, err := f.Keys(ctx, nobody); return err },
		"ApplyPolicy":  func() error { _, err := f.ApplyPolicy(ctx, nobody, "test", []byte(gatewaytest.Policy)); return err },
		"Policy":       func() error { _, err := f.Policy(ctx, nobody, "test"); return err },
		"TestPolicy":   func() error { _, _, err := f.TestPolicy(ctx, nobody, "test", policy.Query{}); return err },
		"AuditEntries": func() error { _, _, err := f.AuditEntries(ctx, nobody, "test", 0, 1); return err },
	} {
		if err := call(); !errors.Is(err, sigerr.Unauthenticated) {
			t.Errorf("%s: got %v, want Unauthenticated", name, err)
		}
	}
	if f.Token.Signs() != 0 || len(f.Store.Entries(t)) != rows {
		t.Errorf("the token signed %d times, %d audit rows were added", f.Token.Signs(), len(f.Store.Entries(t))-rows)
	}
}

// A key that the caller may no longer create when the token has made it is not
// registered, and one of another algorithm neither; nothing stays in the token.
func TestCreateKeyAskedAgain(t *testing.T) {
	f := gatewaytest.New(t, gatewaytest.Policy+`
  - {name: maker, principals: [alice], keys: ["*"], may: [admin]}
`)
	f.Token.OnGenerate = func(string) string {
		if _, err := f.ApplyPolicy(t.Context(), f.Root, "test", []byte(gatewaytest.Policy)); err != nil {
			t.Error(err)
		}
		return ""
	}
	_, err := f.CreateKey(t.Context(), gatewaytest.Principal(t, "alice"), "test", gateway.KeySpec{Name: "k", Algorithm: keys.Ed25519})
	if !errors.Is(err, sigerr.Denied) || f.Token.Pairs() != 0 {
		t.Errorf("got %v and %d pairs, want Denied and none", err, f.Token.Pairs())
	}
	f.Token.OnGenerate = func(string) string { return "p384" }
	_, err = f.CreateKey(t.Context(), f.Root, "test", gateway.KeySpec{Name: "k", Algorithm: keys.P256})
	if !errors.Is(err, sigerr.TokenFailed) || f.Token.Pairs() != 0 {
		t.Errorf("another algorithm: got %v and %d pairs, want a token failure and none", err, f.Token.Pairs())
	}
}

// Applying the rules in force while the store fails is no success.
func TestApplySamePolicyUnrecorded(t *testing.T) {
	f := gatewaytest.New(t, "")
	f.Store.SetFail(func(store.Change) (error, error) { return errors.New("disk full"), nil }, nil)
	if _, err := f.ApplyPolicy(t.Context(), f.Root, "test", []byte(gatewaytest.Policy)); !errors.Is(err, sigerr.Unavailable) {
		t.Errorf("got %v, want Unavailable", err)
	}
}

// A question that Sign would not put to the rules is not answered by them.
func TestPolicyQuestions(t *testing.T) {
	f := gatewaytest.New(t, "")
	good := policy.Query{Principal: "root", Key: "k", Action: policy.Sign, Format: "rpm", Blind: true, Hash: "sha256"}
	for _, change := range []func(*policy.Query){
		func(q *policy.Query) { q.Format = "nonsense" },
		func(q *policy.Query) { q.Hash = "" },
		func(q *policy.Query) { q.Hash = "sha1" },
		func(q *policy.Query) { q.Action = "own" },
		func(q *policy.Query) { q.Key = strings.Repeat("k", 2000) },
	} {
		q := good
		change(&q)
		if _, _, err := f.TestPolicy(t.Context(), f.Root, "test", q); !errors.Is(err, sigerr.Invalid) {
			t.Errorf("%+v: got %v, want Invalid", q, err)
		}
	}
}

// A gateway that was cut off while it made a key: the next one destroys what
// was made, records it, and the name is free.
func TestCreateKeyCutOff(t *testing.T) {
	boom := errors.New("disk full")
	f := gatewaytest.New(t, "")
	f.Store.SetFail(func(c store.Change) (error, error) {
		if c.CreateKey != nil {
			return boom, nil
		}
		return nil, nil
	}, nil)
	// Known not to be registered: undone at once.
	spec := gateway.KeySpec{Name: "k", Algorithm: keys.Ed25519, UserID: "A"}
	if _, err := f.CreateKey(t.Context(), f.Root, "test", spec); !errors.Is(err, sigerr.Unavailable) {
		t.Fatalf("got %v, want Unavailable", err)
	}
	if f.Token.Pairs() != 0 || len(f.Store.State.Pending) != 0 {
		t.Errorf("%d pairs and %d pending ones stay", f.Token.Pairs(), len(f.Store.State.Pending))
	}
	// Not known: they stay, and are pending.
	f.Store.SetFail(func(c store.Change) (error, error) {
		if c.CreateKey != nil {
			f.Store.LoadError = boom
			return boom, nil
		}
		return nil, nil
	}, nil)
	if _, err := f.CreateKey(t.Context(), f.Root, "test", spec); !errors.Is(err, sigerr.Unavailable) {
		t.Fatalf("got %v, want Unavailable", err)
	}
	if f.Token.Pairs() != 2 || len(f.Store.State.Pending) != 2 {
		t.Fatalf("%d pairs and %d pending ones, want 2 of each", f.Token.Pairs(), len(f.Store.State.Pending))
	}
	f.Store.SetFail(nil, nil)
	f.Close()
	g, err := gateway.New(t.Context(), gateway.Config{Store: f.Store, Token: f.Token, Certify: gatewaytest.Certify})
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	if f.Token.Pairs() != 0 || len(f.Store.State.Pending) != 0 {
		t.Errorf("after a start %d pairs and %d pending ones stay", f.Token.Pairs(), len(f.Store.State.Pending))
	}
	if e := f.Store.Last(t); e.Action != "key.create" || e.Outcome != audit.Failed || e.Key != "k" || !strings.Contains(e.Reason, "cut off") {
		t.Errorf("audit entry %+v", e)
	}
	if _, err := g.CreateKey(t.Context(), f.Root, "test", spec); err != nil {
		t.Errorf("the name is not free: %v", err)
	}
}
