package gateway_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signwarden/signwarden/gateway"
	"github.com/signwarden/signwarden/gateway/audit"
	"github.com/signwarden/signwarden/gateway/gatewaytest"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
	"github.com/signwarden/signwarden/gateway/store"
)

func adopt(t *testing.T, f *gatewaytest.Fixture, who string, a gateway.Adoption) (keys.Key, error) {
	t.Helper()
	return f.AdoptKey(t.Context(), gatewaytest.Principal(t, who), "test", a)
}

func TestAdoptKey(t *testing.T) {
	var mu sync.Mutex
	pinned := map[string]crypto.PublicKey{}
	f := gatewaytest.New(t, admins, func(c *gateway.Config) {
		c.Pin = func(id []byte, pub crypto.PublicKey) { mu.Lock(); pinned[string(id)] = pub; mu.Unlock() }
	})
	plain, single, sub, offline, primary := f.Put(t, "1"), f.Put(t, "2"), f.Put(t, "3"), f.Put(t, "4"), f.Put(t, "5")
	elsewhere, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	const uid = "A <a@example.org>"
	for _, c := range []struct {
		name    string
		a       gateway.Adoption
		public  crypto.PublicKey
		layout  keys.Layout // empty: no certificate
		offLine bool
		says    string
	}{
		{"plain", gateway.Adoption{ID: []byte("1")}, plain, "", false, "id 31"},
		{"single", gateway.Adoption{ID: []byte("2"), OpenPGP: gatewaytest.Certificate(t, uid, single, nil)}, single, keys.Single, false, "layout single"},
		{"subkey", gateway.Adoption{ID: []byte("3"), OpenPGP: gatewaytest.Certificate(t, uid, sub, primary), PrimaryID: []byte("5")}, sub, keys.Subkey, false, "layout subkey"},
		{"offline", gateway.Adoption{ID: []byte("4"), OpenPGP: gatewaytest.Certificate(t, uid, offline, elsewhere)}, offline, keys.Subkey, true, "off line"},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.a.Name = "a-" + c.name
			signs, pairs := f.Token.Signs(), f.Token.Pairs()
			k, err := adopt(t, f, "root", c.a)
			if err != nil {
				t.Fatal(err)
			}
			if now := stored(t, f, k.Name); now.Algorithm != keys.Ed25519 || now.State != keys.Enabled || !bytes.Equal(now.ID, c.a.ID) || now.Token != "memory" {
				t.Errorf("registered: %+v", now)
			}
			if o := k.OpenPGP; c.layout == "" && o != nil || c.layout != "" && (o.Layout != c.layout || o.UserID != uid || o.OffLine() != c.offLine || !k.Created.Equal(gatewaytest.Created)) {
				t.Errorf("certificate: %+v", o)
			}
			want := 1
			if len(c.a.PrimaryID) > 0 {
				want = 2
			}
			if got := f.Token.Signs() - signs; got != want || f.Token.Pairs() != pairs {
				t.Errorf("%d signatures, want %d; %d pairs, was %d", got, want, f.Token.Pairs(), pairs)
			}
			e := f.Store.Last(t)
			if e.Action != "key.adopt" || e.Outcome != audit.Done || e.Key != k.Name || e.KeyFingerprint != k.Fingerprint() || e.Principal != "root" || e.Rule != "root" || !strings.Contains(e.Detail, c.says) {
				t.Errorf("audit entry %+v", e)
			}
			mu.Lock()
			if p, ok := pinned[string(c.a.ID)].(ed25519.PublicKey); !ok || !p.Equal(c.public) || len(c.a.PrimaryID) > 0 && pinned[string(c.a.PrimaryID)] == nil || pinned[""] != nil {
				t.Errorf("pinned: %v", pinned)
			}
			mu.Unlock()
			if _, err := f.Sign(t.Context(), f.Root, gatewaytest.Request(k.Name, "text")); err != nil {
				t.Errorf("signing with it: %v", err)
			}
			if c.layout == "" {
				return
			}
			// What changes the certificate works where its primary key is at hand, and says so where not.
			_, renewed := f.AmendOpenPGP(t.Context(), f.Root, "test", k.Name, renewal)
			_, revoked := f.AmendOpenPGP(t.Context(), f.Root, "test", k.Name, gateway.OpenPGPChange{Revoke: &gateway.Revocation{Reason: "retired"}})
			_, rotated := f.RotateOpenPGP(t.Context(), f.Root, "test", k.Name, gateway.Rotation{To: k.Name + "-next"})
			for what, err := range map[string]error{"renew": renewed, "revoke": revoked} {
				if c.offLine != errors.Is(err, sigerr.Invalid) || c.offLine != (err != nil) || err != nil && !strings.Contains(err.Error(), "in no token") {
					t.Errorf("%s: %v", what, err)
				}
			}
			_, replaced := f.AmendOpenPGP(t.Context(), f.Root, "test", k.Name, gateway.OpenPGPChange{Replace: c.a.OpenPGP})
			if c.offLine != (replaced == nil) || replaced != nil && !errors.Is(replaced, sigerr.Invalid) && !errors.Is(replaced, sigerr.Disabled) {
				t.Errorf("replace: %v", replaced)
			}
			if c.offLine && (!errors.Is(rotated, sigerr.Invalid) || !strings.Contains(rotated.Error(), "in no token")) {
				t.Errorf("rotate: %v", rotated)
			}
		})
	}
	if f.Token.Pairs() != 5 {
		t.Errorf("%d pairs", f.Token.Pairs())
	}
}

// What is refused registers nothing, changes nothing in the token, and is recorded.
func TestAdoptKeyRefused(t *testing.T) {
	f := gatewaytest.New(t, admins)
	made := certified(t, f, "a-made", keys.Subkey)
	pub, _ := f.Put(t, "free"), f.Put(t, "other")
	primary := f.Put(t, "primary")
	f.Token.Put([]byte("copy"), f.Token.Signer(made.ID))
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	f.Token.Put([]byte("p521"), p521)
	f.Store.State.Pending = append(f.Store.State.Pending, store.Pending{KeyName: "b", ID: []byte("other")})
	cert := gatewaytest.Certificate(t, "A", pub, primary)
	long := bytes.Repeat([]byte{'x'}, gateway.MaxOpenPGP+1)
	pairs := f.Token.Pairs()
	registered := func() []string {
		var names []string
		all, err := f.Keys(t.Context(), f.Root)
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range all {
			names = append(names, k.Name)
		}
		return names
	}
	for _, c := range []struct {
		name, who string
		a         gateway.Adoption
		want      error
	}{
		{"no rule", "carol", gateway.Adoption{Name: "a-x", ID: []byte("free")}, sigerr.Denied},
		{"another's name", "dave", gateway.Adoption{Name: "b-x", ID: []byte("free")}, sigerr.Denied},
		{"who administers this name and no other", "dave", gateway.Adoption{Name: "a-x", ID: []byte("free")}, sigerr.Denied},
		{"name taken", "root", gateway.Adoption{Name: "a-made", ID: []byte("free")}, sigerr.Conflict},
		{"name", "root", gateway.Adoption{Name: "a/x", ID: []byte("free")}, sigerr.Invalid},
		{"no id", "root", gateway.Adoption{Name: "a-x"}, sigerr.Invalid},
		{"long id", "root", gateway.Adoption{Name: "a-x", ID: make([]byte, 65)}, sigerr.Invalid},
		{"no such key", "root", gateway.Adoption{Name: "a-x", ID: []byte("none")}, sigerr.Invalid},
		{"algorithm", "root", gateway.Adoption{Name: "a-x", ID: []byte("p521")}, sigerr.Invalid},
		{"id registered", "root", gateway.Adoption{Name: "a-x", ID: made.ID}, sigerr.Conflict},
		{"another's primary key", "root", gateway.Adoption{Name: "a-x", ID: made.OpenPGP.PrimaryID}, sigerr.Conflict},
		{"public key registered", "root", gateway.Adoption{Name: "a-x", ID: []byte("copy")}, sigerr.Conflict},
		{"being made", "root", gateway.Adoption{Name: "a-x", ID: []byte("other")}, sigerr.Conflict},
		{"no certificate", "root", gateway.Adoption{Name: "a-x", ID: []byte("free"), OpenPGP: []byte("x")}, sigerr.Invalid},
		{"certificate of another", "root", gateway.Adoption{Name: "a-x", ID: []byte("primary"), OpenPGP: cert}, sigerr.Invalid},
		{"long certificate", "root", gateway.Adoption{Name: "a-x", ID: []byte("free"), OpenPGP: long}, sigerr.Invalid},
		{"primary without certificate", "root", gateway.Adoption{Name: "a-x", ID: []byte("free"), PrimaryID: []byte("primary")}, sigerr.Invalid},
		{"another primary", "root", gateway.Adoption{Name: "a-x", ID: []byte("free"), OpenPGP: cert, PrimaryID: []byte("copy")}, sigerr.Invalid},
		{"itself as primary", "root", gateway.Adoption{Name: "a-x", ID: []byte("free"), OpenPGP: cert, PrimaryID: []byte("free")}, sigerr.Invalid},
		{"no such primary", "root", gateway.Adoption{Name: "a-x", ID: []byte("free"), OpenPGP: cert, PrimaryID: []byte("none")}, sigerr.Invalid},
		{"primary of a key that is it", "root", gateway.Adoption{Name: "a-x", ID: []byte("free"), OpenPGP: gatewaytest.Certificate(t, "A", pub, nil), PrimaryID: []byte("primary")}, sigerr.Invalid},
		{"user id", "root", gateway.Adoption{Name: "a-x", ID: []byte("free"), OpenPGP: gatewaytest.Certificate(t, "A\x1b", pub, nil)}, sigerr.Invalid},
	} {
		rows, signs := len(f.Store.Entries(t)), f.Token.Signs()
		_, err := adopt(t, f, c.who, c.a)
		if c.want == sigerr.Conflict && c.name != "public key registered" && f.Token.Signs() != signs {
			t.Errorf("%s: a key that is registered has signed for it", c.name)
		}
		if !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", c.name, err, c.want)
		}
		if e := f.Store.Last(t); len(f.Store.Entries(t)) != rows+1 || e.Action != "key.adopt" || e.Outcome != audit.Denied || e.Principal != c.who {
			t.Errorf("%s: audit entry %+v", c.name, e)
		}
	}
	if got := registered(); !slices.Equal(got, []string{"a-made"}) || f.Token.Pairs() != pairs {
		t.Errorf("registered %q, %d pairs, were %d", got, f.Token.Pairs(), pairs)
	}
}

// A key that does not sign, or signs what does not verify, is not registered, nor is one
// that cannot be recorded; and where it is unknown whether it is, the store tells.
func TestAdoptKeyFails(t *testing.T) {
	broken := errors.New("broken")
	for _, c := range []struct {
		name  string
		spoil func(f *gatewaytest.Fixture)
		want  error // nil: it is registered
		entry audit.Outcome
	}{
		{"does not sign", func(f *gatewaytest.Fixture) {
			f.Token.Before = func(context.Context, []byte) error { return broken }
		}, sigerr.TokenFailed, audit.Failed},
		{"signs wrongly", func(f *gatewaytest.Fixture) {
			f.Token.After = func(sig []byte) []byte { sig[0] ^= 1; return sig }
		}, sigerr.TokenFailed, audit.Failed},
		{"store fails", func(f *gatewaytest.Fixture) {
			f.Store.SetFail(func(c store.Change) (error, error) {
				if c.CreateKey != nil {
					return broken, nil
				}
				return nil, nil
			}, nil)
		}, sigerr.Unavailable, ""},
		{"store fails but persists", func(f *gatewaytest.Fixture) {
			f.Store.SetFail(func(c store.Change) (error, error) {
				if c.CreateKey != nil {
					return nil, broken
				}
				return nil, nil
			}, nil)
		}, nil, audit.Done},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := gatewaytest.New(t, admins)
			f.Put(t, "k")
			c.spoil(f)
			_, err := adopt(t, f, "root", gateway.Adoption{Name: "a-k", ID: []byte("k")})
			if !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			f.Store.SetFail(nil, nil)
			if _, err := f.Gateway.Key(t.Context(), f.Root, "a-k"); (err == nil) != (c.want == nil) {
				t.Errorf("registered: %v", err)
			}
			if c.entry != "" {
				if e := f.Store.Last(t); e.Action != "key.adopt" || e.Outcome != c.entry {
					t.Errorf("audit entry %+v", e)
				}
			}
		})
	}
}

// Who is no administrator any more when the key has signed does not adopt it.
func TestAdoptKeyRightsLost(t *testing.T) {
	f := gatewaytest.New(t, admins+`
  - {name: boss, principals: [boss], keys: ["*"], may: [admin]}
`)
	f.Put(t, "k")
	f.Token.Before = func(context.Context, []byte) error {
		_, err := f.ApplyPolicy(t.Context(), f.Root, "test", []byte(admins))
		return err
	}
	if _, err := adopt(t, f, "boss", gateway.Adoption{Name: "a-k", ID: []byte("k")}); !errors.Is(err, sigerr.Denied) {
		t.Errorf("got %v", err)
	}
	if e := f.Store.Last(t); f.Token.Signs() != 1 || e.Action != "key.adopt" || e.Outcome != audit.Denied || e.Principal != "boss" {
		t.Errorf("%d signatures; audit entry %+v", f.Token.Signs(), e)
	}
	if _, err := f.Gateway.Key(t.Context(), f.Root, "a-k"); !errors.Is(err, sigerr.NotFound) {
		t.Errorf("registered: %v", err)
	}
}

// Nor does who wants as a primary key what has been adopted as a key that signs meanwhile.
func TestAdoptKeyClaimed(t *testing.T) {
	f := gatewaytest.New(t, admins)
	pub, primary := f.Put(t, "k"), f.Put(t, "primary")
	f.Token.Before = func(context.Context, []byte) error {
		f.Token.Before = nil
		_, err := adopt(t, f, "root", gateway.Adoption{Name: "a-p", ID: []byte("primary")})
		return err
	}
	_, err := adopt(t, f, "root", gateway.Adoption{Name: "a-k", ID: []byte("k"), OpenPGP: gatewaytest.Certificate(t, "A", pub, primary), PrimaryID: []byte("primary")})
	if !errors.Is(err, sigerr.Conflict) {
		t.Errorf("got %v", err)
	}
	if _, err := f.Gateway.Key(t.Context(), f.Root, "a-k"); !errors.Is(err, sigerr.NotFound) {
		t.Errorf("registered: %v", err)
	}
}

// The longest id and certificate are taken for what they are.
func TestAdoptKeyBounds(t *testing.T) {
	f := gatewaytest.New(t, admins)
	id := bytes.Repeat([]byte("k"), gateway.MaxTokenID)
	f.Put(t, string(id))
	_, err := adopt(t, f, "root", gateway.Adoption{Name: "a-k", ID: id, OpenPGP: make([]byte, gateway.MaxOpenPGP)})
	if !errors.Is(err, sigerr.Invalid) || strings.Contains(err.Error(), "bytes") {
		t.Errorf("a certificate of as many bytes as there may be: %v", err)
	}
	if _, err := adopt(t, f, "root", gateway.Adoption{Name: "a-k", ID: id}); err != nil {
		t.Errorf("an id of as many: %v", err)
	}
}

// Of two who adopt one key at a time one does.
func TestAdoptKeyTwice(t *testing.T) {
	f := gatewaytest.New(t, admins)
	f.Put(t, "k")
	var wg sync.WaitGroup
	errs := make([]error, 8)
	for i := range errs {
		wg.Go(func() {
			_, errs[i] = f.AdoptKey(t.Context(), f.Root, "test", gateway.Adoption{Name: string(rune('a' + i)), ID: []byte("k")})
		})
	}
	wg.Wait()
	done := 0
	for _, err := range errs {
		if err == nil {
			done++
		} else if !errors.Is(err, sigerr.Conflict) {
			t.Error(err)
		}
	}
	if done != 1 {
		t.Errorf("%d have adopted it", done)
	}
}

// A second subkey of a certificate is its administrator's to adopt, with the same
// certificate.
func TestAdoptSecondSubkey(t *testing.T) {
	f := gatewaytest.New(t, admins)
	first, second, primary := f.Put(t, "1"), f.Put(t, "2"), f.Put(t, "p")
	// The certificate has both; the fake reads the one that is asked for.
	for _, c := range []struct {
		who, name string
		cert      []byte
		id        string
		want      error
	}{
		{"root", "b-1", gatewaytest.Certificate(t, "A", first, primary), "1", nil},
		{"dave", "a-2", gatewaytest.Certificate(t, "A", second, primary), "2", sigerr.Denied},
		{"root", "a-2", gatewaytest.Certificate(t, "A", second, primary), "2", sigerr.Conflict},
	} {
		_, err := adopt(t, f, c.who, gateway.Adoption{Name: c.name, ID: []byte(c.id), OpenPGP: c.cert, PrimaryID: []byte("p")})
		if !errors.Is(err, c.want) {
			t.Errorf("%s by %s: got %v, want %v", c.name, c.who, err, c.want)
		}
	}
}

// severals is a certificate of several keys, which a gateway with ofSeveral reads.
func severals(t *testing.T, uid string, primary crypto.PublicKey, signing ...crypto.PublicKey) []byte {
	t.Helper()
	var all [][]byte
	for _, k := range signing {
		all = append(all, gatewaytest.Certificate(t, uid, k, primary))
	}
	return bytes.Join(all, []byte("\n\n"))
}

func ofSeveral(expires time.Time) func(*gateway.Config) {
	return func(c *gateway.Config) {
		c.Inspect = func(cert []byte, signing crypto.PublicKey, at time.Time) (gateway.Inspected, error) {
			for part := range strings.SplitSeq(string(cert), "\n\n") {
				if in, err := gatewaytest.Inspect([]byte(part), signing, at); err == nil {
					in.Certificate, in.Expires = cert, expires
					return in, nil
				}
			}
			return gateway.Inspected{}, sigerr.Invalid
		}
	}
}

// A subkey that is adopted while its certificate is revoked is not left enabled with the
// certificate as it was.
func TestAdoptKeyWhileAmending(t *testing.T) {
	f := gatewaytest.New(t, admins, ofSeveral(time.Time{}))
	first, second, primary := f.Put(t, "1"), f.Put(t, "2"), f.Put(t, "p")
	cert := severals(t, "A", primary, first, second)
	if _, err := adopt(t, f, "root", gateway.Adoption{Name: "a-1", ID: []byte("1"), OpenPGP: cert, PrimaryID: []byte("p")}); err != nil {
		t.Fatal(err)
	}
	revoking, goOn := make(chan struct{}), make(chan struct{})
	var begun atomic.Bool
	f.Token.Before = func(context.Context, []byte) error {
		if begun.CompareAndSwap(false, true) {
			close(revoking)
			<-goOn
		}
		return nil
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := f.AmendOpenPGP(t.Context(), f.Root, "test", "a-1", gateway.OpenPGPChange{Revoke: &gateway.Revocation{Reason: "retired"}}); err != nil {
			t.Error(err)
		}
	})
	<-revoking
	adopted := make(chan error, 1)
	wg.Go(func() {
		_, err := f.AdoptKey(t.Context(), f.Root, "test", gateway.Adoption{Name: "a-2", ID: []byte("2"), OpenPGP: cert, PrimaryID: []byte("p")})
		adopted <- err
	})
	for len(adopted) == 0 && !waitsInAdoptKey() {
		runtime.Gosched()
	}
	close(goOn)
	wg.Wait()
	if err := <-adopted; !errors.Is(err, sigerr.Conflict) {
		t.Errorf("got %v, want Conflict: the certificate is another one now", err)
	}
	if k, err := f.Gateway.Key(t.Context(), f.Root, "a-2"); err == nil {
		t.Errorf("a-2 is registered, %s", k.Registered.State)
	}
	if got := stored(t, f, "a-1").State; got != keys.Disabled {
		t.Errorf("a-1 is %s", got)
	}
}

// waitsInAdoptKey says whether an adoption waits for somebody's lock.
func waitsInAdoptKey() bool {
	buf := make([]byte, 1<<20)
	for g := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		if state, calls, ok := strings.Cut(g, "\n"); ok && strings.Contains(state, "[sync.Mutex.Lock") && strings.Contains(calls, ".AdoptKey(") {
			return true
		}
	}
	return false
}

// A certificate whose primary key is off line is replaced for all keys in it, by one that
// is of the same primary key and in which they may sign.
func TestReplaceOpenPGP(t *testing.T) {
	now := gatewaytest.Created.AddDate(1, 0, 0)
	f := gatewaytest.New(t, admins, ofSeveral(now))
	first, second := f.Put(t, "1"), f.Put(t, "2")
	primary, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	certs := func(uid string, primary crypto.PublicKey, signing ...crypto.PublicKey) []byte {
		return severals(t, uid, primary, signing...)
	}
	was, next := certs("A", primary, first, second), certs("B", primary, first, second)
	for name, id := range map[string]string{"a-1": "1", "a-2": "2"} {
		if _, err := adopt(t, f, "root", gateway.Adoption{Name: name, ID: []byte(id), OpenPGP: was}); err != nil {
			t.Fatal(err)
		}
	}
	signs := f.Token.Signs()
	replace := func(who string, cert []byte) error {
		_, err := f.AmendOpenPGP(t.Context(), gatewaytest.Principal(t, who), "test", "a-1", gateway.OpenPGPChange{Replace: cert})
		return err
	}
	for name, c := range map[string]struct {
		who  string
		cert []byte
		want error
	}{
		"by who administers one of the keys": {"erin", next, sigerr.Denied},
		"by nobody":                          {"carol", next, sigerr.Denied},
		"no certificate":                     {"dave", []byte("x"), sigerr.Invalid},
		"without the other key":              {"dave", certs("B", primary, first), sigerr.Invalid},
		"of another primary key":             {"dave", certs("B", second, first), sigerr.Invalid},
		"of the key itself":                  {"dave", certs("B", nil, first), sigerr.Invalid},
		"long":                               {"dave", make([]byte, gateway.MaxOpenPGP+1), sigerr.Invalid},
	} {
		if err := replace(c.who, c.cert); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", name, err, c.want)
		}
		if e := f.Store.Last(t); e.Outcome != audit.Denied || !bytes.Equal(stored(t, f, "a-1").OpenPGP.Certificate, was) {
			t.Errorf("%s: audit entry %+v, or the certificate has changed", name, e)
		}
	}
	if err := replace("dave", next); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a-1", "a-2"} {
		if o := stored(t, f, name).OpenPGP; !bytes.Equal(o.Certificate, next) || !o.Expires.Equal(now) || !o.OffLine() {
			t.Errorf("%s: %+v", name, o)
		}
	}
	if e := f.Store.Last(t); e.Outcome != audit.Done || e.Action != "key.openpgp" || !strings.Contains(e.Detail, fmt.Sprintf("replaced by what was changed elsewhere, sha256 %x", sha256.Sum256(next))) || f.Token.Signs() != signs {
		t.Errorf("audit entry %+v, %d signatures", e, f.Token.Signs()-signs)
	}
	// A key that is disabled need not sign in it.
	if _, err := f.SetKeyState(t.Context(), f.Root, "test", "a-2", keys.Disabled); err != nil {
		t.Fatal(err)
	}
	if err := replace("dave", certs("C", primary, first)); err != nil {
		t.Error(err)
	}
}
