package gateway_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/signwarden/signwarden/gateway"
	"github.com/signwarden/signwarden/gateway/audit"
	"github.com/signwarden/signwarden/gateway/gatewaytest"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
	"github.com/signwarden/signwarden/gateway/store"
)

const admins = gatewaytest.Policy + `
  - {name: some, principals: [dave], keys: ["a-*"], may: [admin]}
  - {name: one, principals: [erin], keys: [a-1], may: [admin]}
  - {name: look, principals: [carol], keys: ["*"], may: [read]}
`

// certified creates a key that has an OpenPGP certificate.
func certified(t *testing.T, f *gatewaytest.Fixture, name string, layout keys.Layout) keys.Key {
	t.Helper()
	k, err := f.CreateKey(t.Context(), f.Root, "test", gateway.KeySpec{
		Name: name, Algorithm: keys.Ed25519, UserID: "A <a@example.org>", Layout: layout,
	})
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func stored(t *testing.T, f *gatewaytest.Fixture, name string) keys.Key {
	t.Helper()
	v, err := f.Gateway.Key(t.Context(), f.Root, name)
	if err != nil {
		t.Fatal(err)
	}
	return v.Registered.Key
}

var (
	later   = time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC)
	renewal = gateway.OpenPGPChange{Renew: &later}
)

func TestAmendOpenPGP(t *testing.T) {
	for _, layout := range []keys.Layout{keys.Subkey, keys.Single} {
		t.Run(string(layout), func(t *testing.T) {
			f := gatewaytest.New(t, admins)
			first := certified(t, f, "a-1", layout)
			certified(t, f, "a-other", layout)
			dave := gatewaytest.Principal(t, "dave")
			other, err := f.RotateOpenPGP(t.Context(), dave, "test", "a-1", gateway.Rotation{To: "a-2", Algorithm: keys.P256})
			if err != nil {
				t.Fatal(err)
			}
			if e := f.Store.Last(t); e.Action != "key.openpgp" || e.Outcome != audit.Done || e.Key != "a-1" || e.Principal != "dave" ||
				!strings.Contains(e.Detail, "a-2") || !strings.Contains(e.Detail, other.Fingerprint()) {
				t.Errorf("audit entry %+v", e)
			}
			for _, c := range []struct {
				change gateway.OpenPGPChange
				says   string
			}{
				{renewal, "renewed until 2100-01-01T00:00:00Z"},
				{gateway.OpenPGPChange{AddUserID: "B <b@example.org>"}, "B <b@example.org>"},
				{gateway.OpenPGPChange{Revoke: &gateway.Revocation{Reason: "retired", Text: "old"}}, "retired"},
			} {
				before := stored(t, f, "a-1").OpenPGP.Certificate
				k, err := f.AmendOpenPGP(t.Context(), dave, "test", "a-2", c.change) // by either name
				if err != nil {
					t.Fatal(err)
				}
				now := stored(t, f, "a-1")
				if !bytes.Equal(now.OpenPGP.Certificate, k.OpenPGP.Certificate) || !bytes.HasPrefix(now.OpenPGP.Certificate, before) || len(now.OpenPGP.Certificate) == len(before) {
					t.Errorf("%s: the keys' certificates are not the amended one", c.says)
				}
				if e := f.Store.Last(t); e.Outcome != audit.Done || !strings.Contains(e.Detail, c.says) || e.Rule != "some" {
					t.Errorf("audit entry %+v, want %q in it", e, c.says)
				}
				if c.change.Renew != nil && !now.OpenPGP.Expires.Equal(later) {
					t.Errorf("it expires at %v", now.OpenPGP.Expires)
				}
			}
			for name, want := range map[string]keys.State{"a-1": keys.Disabled, "a-2": keys.Disabled, "a-other": keys.Enabled} {
				if got := stored(t, f, name).State; got != want {
					t.Errorf("%s is %s after the revocation, want %s", name, got, want)
				}
			}
			if got := stored(t, f, "a-1"); !bytes.Equal(got.Public, first.Public) || !bytes.Equal(got.ID, first.ID) {
				t.Error("the key itself has changed")
			}
		})
	}
}

// Who may not, and what cannot be, reaches no token, leaves no pair, and is recorded.
func TestAmendOpenPGPDenied(t *testing.T) {
	f := gatewaytest.New(t, admins)
	certified(t, f, "a-1", keys.Subkey)
	certified(t, f, "b-1", keys.Subkey)
	certified(t, f, "a-single", keys.Single)
	f.Key(t, "a-plain", keys.P256)
	if _, err := f.RotateOpenPGP(t.Context(), f.Root, "test", "a-1", gateway.Rotation{To: "a-next"}); err != nil {
		t.Fatal(err)
	}
	past := time.Now().Add(-time.Hour)
	amend := func(name string, c gateway.OpenPGPChange) func(who string) error {
		return func(who string) error {
			_, err := f.AmendOpenPGP(t.Context(), gatewaytest.Principal(t, who), "test", name, c)
			return err
		}
	}
	rotate := func(name string, r gateway.Rotation) func(who string) error {
		return func(who string) error {
			_, err := f.RotateOpenPGP(t.Context(), gatewaytest.Principal(t, who), "test", name, r)
			return err
		}
	}
	for _, tt := range []struct {
		name, who string
		do        func(string) error
		want      error
	}{
		{"another's key", "dave", amend("b-1", renewal), sigerr.NotFound},
		{"no such key", "dave", amend("a-none", renewal), sigerr.NotFound},
		{"a reader", "carol", amend("a-1", renewal), sigerr.Denied},
		{"a stranger", "mallory", rotate("a-1", gateway.Rotation{To: "a-2"}), sigerr.NotFound},
		{"no certificate", "dave", amend("a-plain", renewal), sigerr.Invalid},
		{"no change", "dave", amend("a-1", gateway.OpenPGPChange{}), sigerr.Invalid},
		{"two changes", "dave", amend("a-1", gateway.OpenPGPChange{Renew: &later, AddUserID: "x"}), sigerr.Invalid},
		{"a past expiry", "dave", amend("a-1", gateway.OpenPGPChange{Renew: &past}), sigerr.Invalid},
		{"no such reason", "dave", amend("a-1", gateway.OpenPGPChange{Revoke: &gateway.Revocation{Reason: "bored"}}), sigerr.Invalid},
		{"a new name of others", "dave", rotate("a-1", gateway.Rotation{To: "b-2"}), sigerr.Denied},
		{"a new name that is taken", "dave", rotate("a-1", gateway.Rotation{To: "a-plain"}), sigerr.Conflict},
		{"no new name", "dave", rotate("a-1", gateway.Rotation{}), sigerr.Invalid},
		{"no such algorithm", "dave", rotate("a-1", gateway.Rotation{To: "a-2", Algorithm: "dsa"}), sigerr.Invalid},
		{"a subkey of the past", "dave", rotate("a-1", gateway.Rotation{To: "a-2", Expires: past}), sigerr.Invalid},
		{"a certificate of others' too", "erin", amend("a-1", renewal), sigerr.Denied},
		{"a primary retired", "dave", rotate("a-single", gateway.Rotation{To: "a-2", Retire: later}), sigerr.Invalid},
	} {
		t.Run(tt.name, func(t *testing.T) {
			signs, pairs, rows := f.Token.Signs(), f.Token.Pairs(), len(f.Store.Entries(t))
			if err := tt.do(tt.who); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
			if f.Token.Signs() != signs || f.Token.Pairs() != pairs {
				t.Errorf("%d signatures, %d pairs more", f.Token.Signs()-signs, f.Token.Pairs()-pairs)
			}
			if e := f.Store.Last(t); len(f.Store.Entries(t)) != rows+1 || e.Outcome != audit.Denied || e.Action != "key.openpgp" || e.Principal != tt.who {
				t.Errorf("audit entry %+v", e)
			}
		})
	}
}

// A token or a store that fails leaves the old certificate, and no pair; where the
// store had kept the change in spite of its error, the change has been made.
func TestAmendOpenPGPFaults(t *testing.T) {
	broken := errors.New("broken")
	acts := map[string]func(*gatewaytest.Fixture) error{
		"renew": func(f *gatewaytest.Fixture) error {
			_, err := f.AmendOpenPGP(context.Background(), f.Root, "test", "a-1", renewal)
			return err
		},
		"rotate": func(f *gatewaytest.Fixture) error {
			_, err := f.RotateOpenPGP(context.Background(), f.Root, "test", "a-1", gateway.Rotation{To: "a-2", Retire: later})
			return err
		},
	}
	for name, act := range acts {
		t.Run(name+", token", func(t *testing.T) {
			f := gatewaytest.New(t, admins)
			before := certified(t, f, "a-1", keys.Subkey)
			f.Token.Before = func(context.Context, []byte) error { return broken }
			pairs := f.Token.Pairs()
			if err := act(f); !errors.Is(err, sigerr.TokenFailed) {
				t.Errorf("got %v, want TokenFailed", err)
			}
			if e := f.Store.Last(t); e.Outcome != audit.Failed || !strings.Contains(e.Reason, "broken") {
				t.Errorf("audit entry %+v", e)
			}
			if got := stored(t, f, "a-1"); !bytes.Equal(got.OpenPGP.Certificate, before.OpenPGP.Certificate) || f.Token.Pairs() != pairs {
				t.Errorf("the certificate has changed, or %d pairs are left", f.Token.Pairs()-pairs)
			}
		})
		for _, persisted := range []bool{false, true} {
			t.Run(name+map[bool]string{false: ", store failed", true: ", store failed but persisted"}[persisted], func(t *testing.T) {
				f := gatewaytest.New(t, admins)
				before := certified(t, f, "a-1", keys.Subkey)
				pairs := f.Token.Pairs()
				f.Store.SetFail(func(c store.Change) (error, error) {
					switch {
					case c.SetOpenPGP == nil:
						return nil, nil
					case persisted:
						return nil, broken
					}
					return broken, nil
				}, nil)
				err := act(f)
				changed := !bytes.Equal(stored(t, f, "a-1").OpenPGP.Certificate, before.OpenPGP.Certificate)
				if changed != persisted || (err == nil) != persisted {
					t.Errorf("changed %t, error %v", changed, err)
				}
				if !persisted && (!errors.Is(err, sigerr.Unavailable) || f.Token.Pairs() != pairs) {
					t.Errorf("got %v, want Unavailable; %d pairs are left", err, f.Token.Pairs()-pairs)
				}
			})
		}
	}
}

// What was disabled, or is to end before the others, is not renewed with them.
func TestRenewLeavesWhatEnds(t *testing.T) {
	var asked gateway.Amendment
	f := gatewaytest.New(t, admins, func(c *gateway.Config) {
		c.Amend = func(m gateway.Amendment) ([]byte, error) {
			asked = m
			return gatewaytest.Amend(m)
		}
	})
	certified(t, f, "a-1", keys.Subkey)
	end := time.Now().Add(24 * time.Hour).UTC().Truncate(time.Second)
	for _, r := range []gateway.Rotation{{To: "a-2", Retire: end}, {To: "a-3"}} {
		if _, err := f.RotateOpenPGP(t.Context(), f.Root, "test", "a-1", r); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.SetKeyState(t.Context(), f.Root, "test", "a-3", keys.Disabled); err != nil {
		t.Fatal(err)
	}
	if _, err := f.AmendOpenPGP(t.Context(), f.Root, "test", "a-2", renewal); err != nil {
		t.Fatal(err)
	}
	if len(asked.Subkeys) != 1 {
		t.Errorf("%d subkeys are renewed, want a-2 alone", len(asked.Subkeys))
	}
	for name, want := range map[string]time.Time{"a-1": end, "a-2": later, "a-3": {}} {
		if got := stored(t, f, name).OpenPGP.Expires; !got.Equal(want) {
			t.Errorf("%s expires at %v, want %v", name, got, want)
		}
	}
	// Asked for by its name, it is.
	if _, err := f.AmendOpenPGP(t.Context(), f.Root, "test", "a-1", renewal); err != nil {
		t.Fatal(err)
	}
	if got := stored(t, f, "a-1").OpenPGP.Expires; !got.Equal(later) {
		t.Errorf("a-1 expires at %v, want %v", got, later)
	}
}
