package gateway

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/signwarden/signwarden/gateway/audit"
	"github.com/signwarden/signwarden/gateway/ident"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/policy"
	"github.com/signwarden/signwarden/gateway/sigerr"
	"github.com/signwarden/signwarden/gateway/store"
)

// Amendment is a change of an OpenPGP certificate, with the signers that it
// needs. One of Renew, UserID, Revoke, NewSubkey and Retire is set.
type Amendment struct {
	Certificate []byte
	Primary     crypto.Signer
	At          time.Time // of the self-signatures; whole seconds

	Renew     *time.Time      // when the certificate is to expire; zero: never
	Subkeys   []crypto.Signer // that are renewed as well
	UserID    string          // to be added
	Revoke    *Revocation
	NewSubkey crypto.Signer // created at At
	Retire    crypto.Signer // a subkey that is to expire
	Expires   time.Time     // of NewSubkey or Retire; zero: never
}

// Revocation says why a certificate is revoked: Reason is of RevocationReasons.
type Revocation struct{ Reason, Text string }

// RevocationReasons are those of RFC 9580 section 5.2.3.31 that are about keys.
var RevocationReasons = []string{"unspecified", "superseded", "compromised", "retired"}

// Amend makes an amended certificate, every signature in it verified. Its errors
// wrap sigerr.Invalid where the change itself is wrong. One for a time that is not
// after the certificate's last self-signature has the method TooSoon() bool.
type Amend func(Amendment) ([]byte, error)

// OpenPGPChange asks for one change of a certificate: one field is set.
type OpenPGPChange struct {
	Renew     *time.Time // see Amendment
	AddUserID string
	Revoke    *Revocation
	// Replace is the certificate as it was changed elsewhere, where its primary key is.
	Replace []byte
}

func (c *OpenPGPChange) check(now time.Time) error {
	set := 0
	for _, is := range []bool{c.Renew != nil, c.AddUserID != "", c.Revoke != nil, len(c.Replace) > 0} {
		if is {
			set++
		}
	}
	switch {
	case set != 1:
		return fmt.Errorf("%w: ask for one change of the certificate at a time", sigerr.Invalid)
	case len(c.Replace) > MaxOpenPGP:
		return errLongOpenPGP
	case c.Renew != nil && !c.Renew.IsZero() && !c.Renew.After(now):
		return fmt.Errorf("%w: the certificate would expire at %s, which is past", sigerr.Invalid, c.Renew.UTC().Format(time.RFC3339))
	case c.Revoke != nil && !slices.Contains(RevocationReasons, c.Revoke.Reason):
		return fmt.Errorf("%w: reason %q is not one of %s", sigerr.Invalid, c.Revoke.Reason, strings.Join(RevocationReasons, ", "))
	}
	return nil
}

// words describe the change in the audit log.
func (c *OpenPGPChange) words() string {
	switch {
	case c.Renew != nil && c.Renew.IsZero():
		return "renewed for ever"
	case c.Renew != nil:
		return "renewed until " + c.Renew.UTC().Format(time.RFC3339)
	case len(c.Replace) > 0:
		return "replaced by what was changed elsewhere"
	case c.Revoke != nil:
		return clip(fmt.Sprintf("revoked: %s, %q; keys disabled", c.Revoke.Reason, c.Revoke.Text))
	}
	return clip(fmt.Sprintf("user id %q added", c.AddUserID))
}

// AmendOpenPGP changes the OpenPGP certificate of a key, and of every key that
// is in the same certificate. Needs an admin rule for the key. A certificate whose
// primary key is off line can be replaced, and nothing else; any other cannot be. One that
// is revoked has its keys disabled. It waits up to a second where the last change
// was made in this one: of two self-signatures of a second none is the newer.
func (g *Gateway) AmendOpenPGP(ctx context.Context, p ident.Principal, frontEnd, name string, c OpenPGPChange) (keys.Key, error) {
	g.amending.Lock()
	defer g.amending.Unlock()
	a, k, err := g.beginOpenPGP(ctx, p, frontEnd, name, c.Revoke != nil)
	if err != nil {
		return keys.Key{}, err
	}
	if err := c.check(a.e.Time); err != nil {
		return keys.Key{}, g.fail(a, audit.Denied, err)
	}
	a.e.Detail = clip(a.e.Detail + c.words())
	if len(c.Replace) > 0 {
		set, err := g.replacement(a.s, k, c.Replace)
		if err != nil {
			return keys.Key{}, g.fail(a, audit.Denied, err)
		}
		a.e.Detail += fmt.Sprintf(", sha256 %x", sha256.Sum256(set[0].Certificate)) // as it is stored, and exported
		return g.storeOpenPGP(ctx, p, a, name, store.Change{SetOpenPGP: set}, func() {})
	}
	if err := certifies(k); err != nil {
		return keys.Key{}, g.fail(a, audit.Denied, err)
	}
	m := Amendment{Renew: c.Renew, UserID: c.AddUserID, Revoke: c.Revoke}
	if c.Renew != nil {
		t := c.Renew.UTC().Truncate(time.Second)
		if c.Renew.IsZero() {
			t = time.Time{}
		}
		m.Renew = &t
		for _, other := range a.s.renewed(k) {
			if len(other.OpenPGP.PrimaryID) > 0 { // it is a subkey
				m.Subkeys = append(m.Subkeys, g.signerFor(ctx, other))
			}
		}
	}
	cert, _, err := g.amend(ctx, k, k.OpenPGP.Certificate, m)
	if err != nil {
		return keys.Key{}, g.unamended(a, err)
	}
	var set []store.SetOpenPGP
	for _, other := range a.s.together(k) {
		s := store.SetOpenPGP{Name: other.Name, Certificate: cert, Expires: other.OpenPGP.Expires, Disable: c.Revoke != nil}
		if m.Renew != nil && slices.Contains(a.s.renewed(k), other) {
			s.Expires = *m.Renew
		}
		set = append(set, s)
	}
	return g.storeOpenPGP(ctx, p, a, name, store.Change{SetOpenPGP: set}, func() {})
}

// Rotation asks for a new signing subkey in a key's certificate.
type Rotation struct {
	To        string         // name of the new key
	Algorithm keys.Algorithm // empty: that of the old one
	Expires   time.Time      // of the new subkey; zero: with the certificate
	// Retire is when the old subkey expires; zero: it does not change. Until then
	// both may sign, so that the new certificate can reach who verifies.
	Retire time.Time
}

// RotateOpenPGP makes a new key whose pair is another signing subkey of a key's
// certificate. Needs an admin rule for both. The new key is returned.
func (g *Gateway) RotateOpenPGP(ctx context.Context, p ident.Principal, frontEnd, name string, r Rotation) (keys.Key, error) {
	g.amending.Lock()
	defer g.amending.Unlock()
	a, k, err := g.beginOpenPGP(ctx, p, frontEnd, name, false)
	if err != nil {
		return keys.Key{}, err
	}
	if r.Algorithm == "" {
		r.Algorithm = k.Algorithm
	}
	spec := KeySpec{Name: r.To, Algorithm: r.Algorithm}
	if err = spec.check(a.e.Time, true); err == nil {
		err = certifies(k)
	}
	switch {
	case err != nil:
	case !r.Expires.IsZero() && !r.Expires.After(a.e.Time), !r.Retire.IsZero() && !r.Retire.After(a.e.Time):
		err = fmt.Errorf("%w: a subkey would expire at a time that is past", sigerr.Invalid)
	case !r.Retire.IsZero() && len(k.OpenPGP.PrimaryID) == 0:
		err = fmt.Errorf("%w: the key is the primary of its certificate (layout single); it cannot be retired by itself", sigerr.Invalid)
	default:
		d := a.s.rules.Allow(policy.Query{Principal: p.Name(), Key: r.To, Action: policy.Admin, Now: a.e.Time})
		if !d.Allowed {
			err = fmt.Errorf("%w: for the new key: %s", sigerr.Denied, d.Reason)
		}
	}
	if err == nil {
		err = g.reserve(r.To)
	}
	if err != nil {
		return keys.Key{}, g.fail(a, audit.Denied, err)
	}
	defer g.unreserve(r.To)

	ids := []store.Pending{{KeyName: r.To, ID: make([]byte, 16)}}
	rand.Read(ids[0].ID)
	if _, err := g.c.Store.Commit(ctx, store.Change{Begin: ids}); err != nil {
		return keys.Key{}, g.unrecorded(err)
	}
	next, set, err := g.rotate(ctx, a.s, k, r, ids[0].ID)
	if err != nil {
		g.destroy(ctx, ids)
		return keys.Key{}, g.unamended(a, err)
	}
	a.e.Detail += fmt.Sprintf("key %s added to the certificate: algorithm %s, token %q, id %x, sha256 %s",
		next.Name, next.Algorithm, next.Token, next.ID, next.Fingerprint())
	if !r.Retire.IsZero() {
		a.e.Detail += "; this one expires at " + r.Retire.UTC().Format(time.RFC3339)
	}
	_, err = g.storeOpenPGP(ctx, p, a, name, store.Change{CreateKey: &next, SetOpenPGP: set, Forget: pairIDs(ids)},
		func() { g.destroy(ctx, ids) })
	if err != nil {
		return keys.Key{}, err
	}
	return next, nil
}

// rotate generates the pair and makes the certificate with it.
func (g *Gateway) rotate(ctx context.Context, s *snapshot, k *keys.Registered, r Rotation, id []byte) (keys.Key, []store.SetOpenPGP, error) {
	pair, err := g.generatePair(ctx, r.To, id, r.Algorithm)
	if err != nil {
		return keys.Key{}, nil, err
	}
	cert, at, err := g.amend(ctx, k, k.OpenPGP.Certificate, Amendment{NewSubkey: pair, Expires: r.Expires.UTC().Truncate(time.Second)})
	if err != nil {
		return keys.Key{}, nil, err
	}
	next := keys.Key{Name: r.To, Algorithm: r.Algorithm, State: keys.Enabled, Token: g.c.TokenLabel, Created: at, ID: id}
	next.Public, err = x509.MarshalPKIXPublicKey(pair.public)
	if err != nil {
		return keys.Key{}, nil, err
	}
	if !r.Retire.IsZero() {
		cert, _, err = g.amend(ctx, k, cert, Amendment{Retire: g.signerFor(ctx, k), Expires: r.Retire.UTC().Truncate(time.Second)})
		if err != nil {
			return keys.Key{}, nil, err
		}
	}
	pgp := *k.OpenPGP
	pgp.Layout, pgp.Certificate, pgp.Expires = keys.Subkey, cert, ends(s.expires(k), r.Expires)
	if len(pgp.PrimaryID) == 0 { // the key itself is the primary
		pgp.PrimaryID, pgp.PrimaryPublic = k.ID, k.Public
	}
	next.OpenPGP = &pgp
	var set []store.SetOpenPGP
	for _, other := range s.together(k) {
		o := store.SetOpenPGP{Name: other.Name, Certificate: cert, Expires: other.OpenPGP.Expires}
		if other.Name == k.Name {
			o.Expires = ends(o.Expires, r.Retire)
		}
		set = append(set, o)
	}
	return next, set, nil
}

// ends is the earlier of two times of expiry, where zero is never.
func ends(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b.UTC().Truncate(time.Second)
	}
	return a
}

// beginOpenPGP opens an act on the certificate of a key that the caller
// administers. A key that is disabled can be revoked, and nothing else.
func (g *Gateway) beginOpenPGP(ctx context.Context, p ident.Principal, frontEnd, name string, revoke bool) (act, *keys.Registered, error) {
	a, err := g.begin(ctx, p, "key.openpgp", name, frontEnd)
	if err != nil {
		return a, nil, err
	}
	k, d, err := a.s.manage(p, name, policy.Admin, a.e.Time)
	a.e.Rule = d.Rule
	switch {
	case err != nil:
	case k.OpenPGP == nil:
		err = fmt.Errorf("%w: key %s has no OpenPGP certificate", sigerr.Invalid, name)
	case g.c.Amend == nil:
		err = fmt.Errorf("%w: this gateway changes no OpenPGP certificates", sigerr.Invalid)
	case k.State != keys.Enabled && !revoke:
		err = fmt.Errorf("%w: %s; enable it first", sigerr.Disabled, name)
	}
	if err != nil {
		return a, nil, g.fail(a, audit.Denied, err)
	}
	// The certificate is that of others too: who changes it must administer all. He
	// is not told which, since he may not know of them.
	var others []string
	for _, other := range a.s.together(k) {
		if _, _, err := a.s.manage(p, other.Name, policy.Admin, a.e.Time); err != nil {
			return a, nil, g.fail(a, audit.Denied, fmt.Errorf("%w: the certificate of %s has keys that you do not administer", sigerr.Denied, name))
		}
		if other != k {
			others = append(others, other.Name)
		}
	}
	if len(others) > 0 {
		a.e.Detail = clip("with " + strings.Join(others, ", ") + ": ")
	}
	a.e.KeyFingerprint = k.Fingerprint()
	return a, k, nil
}

// together are the keys of one certificate: those with the same primary key.
func (s *snapshot) together(k *keys.Registered) []*keys.Registered {
	var out []*keys.Registered
	for _, name := range s.keys.Names() {
		if other := s.keys.Get(name); other.OpenPGP != nil && string(primaryOf(other)) == string(primaryOf(k)) {
			out = append(out, other)
		}
	}
	return out
}

// expires is when the certificate of a key does, the last of its keys; zero: never.
func (s *snapshot) expires(k *keys.Registered) time.Time {
	last := k.OpenPGP.Expires
	for _, other := range s.together(k) {
		if at := other.OpenPGP.Expires; at.IsZero() || !last.IsZero() && at.After(last) {
			last = at
		}
	}
	return last
}

// renewed are those keys of a certificate that are renewed with k: not what was
// disabled, or is to end before the others.
func (s *snapshot) renewed(k *keys.Registered) []*keys.Registered {
	last := s.expires(k)
	return slices.DeleteFunc(s.together(k), func(other *keys.Registered) bool {
		return other != k && (other.State != keys.Enabled || !other.OpenPGP.Expires.Equal(last))
	})
}

// primaryOf is the primary key of a key's certificate (SubjectPublicKeyInfo).
func primaryOf(k *keys.Registered) []byte {
	if len(k.OpenPGP.PrimaryPublic) > 0 {
		return k.OpenPGP.PrimaryPublic
	}
	return k.Public
}

// amend makes the amended certificate, at a time after its last change.
func (g *Gateway) amend(ctx context.Context, k *keys.Registered, cert []byte, m Amendment) ([]byte, time.Time, error) {
	primary := g.signerFor(ctx, k)
	if len(k.OpenPGP.PrimaryID) > 0 {
		pub, err := x509.ParsePKIXPublicKey(k.OpenPGP.PrimaryPublic)
		if err != nil {
			return nil, time.Time{}, fmt.Errorf("primary key of %q: %w", k.Name, err)
		}
		primary = &tokenSigner{ctx: ctx, token: g.c.Token, id: k.OpenPGP.PrimaryID, algorithm: keys.AlgorithmOf(pub), public: pub}
	}
	m.Certificate, m.Primary = cert, primary
	for try := 1; ; try++ {
		m.At = g.c.Now().UTC().Truncate(time.Second)
		out, err := g.c.Amend(m)
		soon, ok := errors.AsType[interface {
			error
			TooSoon() bool
		}](err)
		if !ok || !soon.TooSoon() {
			return out, m.At, err
		}
		if try == 3 {
			return nil, m.At, fmt.Errorf("%w: the certificate's last change is in the future; is the gateway's clock right?", sigerr.Invalid)
		}
		next := time.NewTimer(time.Second - time.Duration(g.c.Now().Nanosecond()))
		select {
		case <-next.C:
		case <-ctx.Done():
			next.Stop()
			return nil, time.Time{}, ctx.Err()
		}
	}
}

// unamended records why there is no amended certificate, and returns the
// caller's error.
func (g *Gateway) unamended(a act, err error) error {
	if sigerr.Kind(err) == sigerr.Invalid {
		return g.fail(a, audit.Denied, err)
	}
	g.log.Error("changing an OpenPGP certificate", "key", a.e.Key, "error", err)
	_, err = g.refuse(a.e, audit.Failed, tokenError(err), err.Error())
	return err
}

// storeOpenPGP makes the change durable, if the caller is an administrator still.
// Where it is certain that it was not made, undo is called.
func (g *Gateway) storeOpenPGP(ctx context.Context, p ident.Principal, a act, name string, c store.Change, undo func()) (_ keys.Key, err error) {
	g.admin.Lock()
	defer g.admin.Unlock()
	defer func() {
		if err != nil && !g.stale.Load() { // which nobody changes while admin is held
			undo()
		}
	}()
	_, _, err = g.snap.Load().manage(p, name, policy.Admin, g.c.Now())
	if err == nil && c.CreateKey != nil {
		d := g.snap.Load().rules.Allow(policy.Query{Principal: p.Name(), Key: c.CreateKey.Name, Action: policy.Admin, Now: g.c.Now()})
		if !d.Allowed {
			err = fmt.Errorf("%w: for the new key: %s", sigerr.Denied, d.Reason)
		}
	}
	if err != nil {
		return keys.Key{}, g.fail(a, audit.Denied, err)
	}
	cert := c.SetOpenPGP[0].Certificate
	err = g.commit(ctx, a, c, func(s *snapshot) bool {
		now := s.keys.Get(name)
		return now != nil && now.OpenPGP != nil && string(now.OpenPGP.Certificate) == string(cert)
	})
	if err != nil {
		return keys.Key{}, err
	}
	return g.snap.Load().keys.Get(name).Key, nil
}
