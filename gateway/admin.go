package gateway

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/signwarden/signwarden/gateway/audit"
	"github.com/signwarden/signwarden/gateway/ident"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/policy"
	"github.com/signwarden/signwarden/gateway/sigerr"
	"github.com/signwarden/signwarden/gateway/store"
)

// act is one administrative act: who wants what, and its audit entry.
type act struct {
	p ident.Principal
	e audit.Entry
	s *snapshot
}

// begin opens every administrative method: where it errs the caller must not go on.
func (g *Gateway) begin(ctx context.Context, p ident.Principal, action, key, frontEnd string) (act, error) {
	now := g.c.Now()
	if err := p.Check(now); err != nil {
		return act{}, err
	}
	s, err := g.current(ctx)
	if err != nil {
		return act{}, err
	}
	return act{p: p, s: s, e: audit.Entry{
		Time: now, Action: action, Principal: p.Name(), Via: p.Via(), Key: clip(key), FrontEnd: frontEnd,
	}}, nil
}

// fail records why an act was not done and returns err for the caller.
func (g *Gateway) fail(a act, o audit.Outcome, err error) error {
	_, err = g.refuse(a.e, o, public(err), err.Error())
	return err
}

// commit makes a change durable together with its audit entry, and visible to
// the next request. An error of the store leaves it unknown whether the change
// took effect: applied then looks, and where it did, the act has succeeded.
func (g *Gateway) commit(ctx context.Context, a act, c store.Change, applied func(*snapshot) bool) error {
	// A caller that hangs up must not leave store and snapshot apart.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	a.e.Outcome = audit.Done
	c.Audit = [][]byte{a.e.Canonical()}
	_, err := g.c.Store.Commit(ctx, c)
	if errors.Is(err, store.ErrExists) {
		return g.fail(a, audit.Denied, fmt.Errorf("%w: %s", sigerr.Conflict, err))
	}
	if rerr := g.reload(ctx); rerr != nil {
		// The store may hold a state that no longer allows what the snapshot
		// allows: nothing is decided on it until the store has been read again.
		g.stale.Store(true)
		return g.unrecorded(errors.Join(err, rerr))
	}
	if err != nil && !applied(g.snap.Load()) {
		return g.unrecorded(err)
	}
	return nil
}

// KeySpec says what to generate.
type KeySpec struct {
	Name      string
	Algorithm keys.Algorithm
	UserID    string      // of an OpenPGP certificate; empty: none
	Layout    keys.Layout // empty: keys.Subkey
	Expires   time.Time   // of the certificate; zero: never
}

func (k *KeySpec) check(now time.Time, canCertify bool) error {
	if err := keys.CheckName(k.Name); err != nil {
		return err
	}
	if _, err := keys.ParseAlgorithm(string(k.Algorithm)); err != nil {
		return err
	}
	if k.Layout == "" {
		k.Layout = keys.Subkey
	}
	switch {
	case k.UserID == "" && (k.Layout != keys.Subkey || !k.Expires.IsZero()):
		return fmt.Errorf("%w: a layout or expiry is of the OpenPGP certificate; give its user id too", sigerr.Invalid)
	case k.UserID != "" && !canCertify:
		return fmt.Errorf("%w: this gateway makes no OpenPGP certificates", sigerr.Invalid)
	case k.Layout != keys.Subkey && k.Layout != keys.Single:
		return fmt.Errorf("%w: layout %q is neither %q nor %q", sigerr.Invalid, k.Layout, keys.Subkey, keys.Single)
	case !k.Expires.IsZero() && !k.Expires.After(now):
		return fmt.Errorf("%w: the certificate would expire at %s, which is past", sigerr.Invalid, k.Expires.UTC().Format(time.RFC3339))
	}
	return checkUserID(k.UserID)
}

func checkUserID(s string) error {
	if len(s) > 255 || !utf8.ValidString(s) || strings.ContainsFunc(s, unicode.IsControl) {
		return fmt.Errorf("%w: the user id must be UTF-8 of at most 255 bytes without control characters", sigerr.Invalid)
	}
	return nil
}

// CreateKey generates a key pair in the token, certifies it where the
// specification has a user id, and registers it. Needs an admin rule for the
// name. On an error nothing is registered, and what was generated is destroyed.
func (g *Gateway) CreateKey(ctx context.Context, p ident.Principal, frontEnd string, spec KeySpec) (keys.Key, error) {
	may := ofName(spec.Name)
	a, err := g.beginKey(ctx, p, "key.create", spec.Name, frontEnd, may, func(now time.Time) error {
		return spec.check(now, g.c.Certify != nil)
	})
	if err != nil {
		return keys.Key{}, err
	}
	defer g.unreserve(spec.Name)

	ids := spec.newIDs()
	if _, err := g.c.Store.Commit(ctx, store.Change{Begin: ids}); err != nil {
		return keys.Key{}, g.unrecorded(err)
	}
	k, err := g.generate(ctx, spec, ids)
	if err != nil {
		g.destroy(ctx, ids)
		g.log.Error("generating a key", "key", spec.Name, "error", err)
		_, err = g.refuse(a.e, audit.Failed, tokenError(err), err.Error())
		return keys.Key{}, err
	}
	a.e.KeyFingerprint = k.Fingerprint()
	a.e.Detail = fmt.Sprintf("algorithm %s, token %q, id %x", k.Algorithm, k.Token, k.ID)
	if k.OpenPGP != nil {
		a.e.Detail += fmt.Sprintf(", user id %q, layout %s", spec.UserID, spec.Layout)
	}

	g.admin.Lock()
	defer g.admin.Unlock()
	if err := g.still(p, may); err != nil {
		g.destroy(ctx, ids)
		return keys.Key{}, g.fail(a, audit.Denied, err)
	}
	err = g.commit(ctx, a, store.Change{CreateKey: &k, Forget: pairIDs(ids)}, func(s *snapshot) bool { return s.keys.Get(k.Name) != nil })
	if err != nil {
		// Where the store could not be read back it is unknown whether the key is
		// registered. If not, its pairs are pending, and the next start destroys them.
		if !g.stale.Load() {
			g.destroy(ctx, ids)
		}
		return keys.Key{}, err
	}
	return k, nil
}

// newIDs draws the CKA_IDs of the pairs that k needs: the signing pair's, and
// with the subkey layout the primary's.
func (k *KeySpec) newIDs() []store.Pending {
	n := 1
	if k.UserID != "" && k.Layout == keys.Subkey {
		n = 2
	}
	ids := make([]store.Pending, n)
	for i := range ids {
		ids[i] = store.Pending{KeyName: k.Name, ID: make([]byte, 16)}
		rand.Read(ids[i].ID)
	}
	return ids
}

func pairIDs(pairs []store.Pending) [][]byte {
	out := make([][]byte, len(pairs))
	for i, p := range pairs {
		out[i] = p.ID
	}
	return out
}

// generate makes the pair, or with the subkey layout the two pairs, and the
// certificate.
func (g *Gateway) generate(ctx context.Context, spec KeySpec, ids []store.Pending) (keys.Key, error) {
	k := keys.Key{
		Name: spec.Name, Algorithm: spec.Algorithm, State: keys.Enabled, Token: g.c.TokenLabel,
		Created: g.c.Now().UTC().Truncate(time.Second),
	}
	signer, err := g.generatePair(ctx, spec.Name, ids[0].ID, spec.Algorithm)
	if err != nil {
		return k, err
	}
	k.ID = signer.id
	k.Public, err = x509.MarshalPKIXPublicKey(signer.public)
	if err != nil || spec.UserID == "" {
		return k, err
	}
	k.OpenPGP = &keys.OpenPGP{UserID: spec.UserID, Layout: spec.Layout, Expires: spec.Expires.UTC().Truncate(time.Second)}
	if spec.Layout == keys.Single {
		k.OpenPGP.Certificate, err = g.c.Certify(spec.UserID, k.Created, k.OpenPGP.Expires, signer, nil)
		return k, err
	}
	// A label that no key name can have: '/' is not allowed in one.
	primary, err := g.generatePair(ctx, spec.Name+"/certify", ids[1].ID, spec.Algorithm)
	if err != nil {
		return k, err
	}
	k.OpenPGP.PrimaryID = primary.id
	k.OpenPGP.PrimaryPublic, err = x509.MarshalPKIXPublicKey(primary.public)
	if err != nil {
		return k, err
	}
	k.OpenPGP.Certificate, err = g.c.Certify(spec.UserID, k.Created, k.OpenPGP.Expires, primary, signer)
	return k, err
}

func (g *Gateway) generatePair(ctx context.Context, label string, id []byte, a keys.Algorithm) (*tokenSigner, error) {
	pub, err := g.c.Token.Generate(ctx, label, id, string(a))
	if err != nil {
		return nil, fmt.Errorf("generating %q: %w", label, err)
	}
	if got := keys.AlgorithmOf(pub); got != a {
		return nil, fmt.Errorf("the token was asked for a key of %s and made one of %q", a, got)
	}
	return &tokenSigner{ctx: ctx, token: g.c.Token, id: id, algorithm: a, public: pub}, nil
}

// destroy removes pairs that were begun and are not registered, whether they were
// made or not. What cannot be removed stays pending: the next start tries again,
// and no name leads to it.
func (g *Gateway) destroy(ctx context.Context, pairs []store.Pending) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), g.c.SignTimeout)
	defer cancel()
	var gone [][]byte
	for _, p := range pairs {
		err := g.c.Token.Delete(ctx, p.ID)
		if err == nil || missing(err) {
			gone = append(gone, p.ID)
			continue
		}
		g.log.Error("an unregistered pair stays in the token until the next start", "key", p.KeyName, "id", hex.EncodeToString(p.ID), "error", err)
	}
	if len(gone) == 0 {
		return
	}
	if _, err := g.c.Store.Commit(ctx, store.Change{Forget: gone}); err != nil {
		g.log.Error("destroyed pairs stay listed as pending until the next start", "error", err)
	}
}

// SetKeyState enables or disables a key. Needs an admin rule for it. When it
// returns, no later request finds the old state. Setting the state that a key
// is in changes nothing, is recorded, and succeeds.
func (g *Gateway) SetKeyState(ctx context.Context, p ident.Principal, frontEnd, name string, to keys.State) (keys.Key, error) {
	a, err := g.begin(ctx, p, "key.state", name, frontEnd)
	if err != nil {
		return keys.Key{}, err
	}
	a.e.Detail = "to " + clip(string(to))
	if _, err := keys.ParseState(string(to)); err != nil {
		return keys.Key{}, g.fail(a, audit.Denied, err)
	}
	g.admin.Lock()
	defer g.admin.Unlock()
	a.s = g.snap.Load()
	k, d, err := a.s.manage(p, name, policy.Admin, a.e.Time)
	a.e.Rule = d.Rule
	if err != nil {
		return keys.Key{}, g.fail(a, audit.Denied, err)
	}
	a.e.KeyFingerprint = k.Fingerprint()
	if k.State == to {
		a.e.Outcome, a.e.Detail = audit.Done, "it is "+string(to)+" already"
		if _, err := g.audit.Append(a.e); err != nil {
			return keys.Key{}, g.unrecorded(err)
		}
		return k.Key, nil
	}
	if !k.State.CanBecome(to) {
		return keys.Key{}, g.fail(a, audit.Denied, fmt.Errorf("%w: a key that is %s cannot become %s", sigerr.Conflict, k.State, to))
	}
	a.e.Detail = fmt.Sprintf("%s to %s", k.State, to)
	err = g.commit(ctx, a, store.Change{SetState: &store.SetState{Name: name, State: to}},
		func(s *snapshot) bool { return s.keys.Get(name).State == to })
	if err != nil {
		return keys.Key{}, err
	}
	return g.snap.Load().keys.Get(name).Key, nil
}

// manage looks up a key for an action other than signing. Its errors are like
// those of decide.
func (s *snapshot) manage(p ident.Principal, name string, action policy.Action, now time.Time) (*keys.Registered, policy.Decision, error) {
	k := s.keys.Get(name)
	d := s.rules.Allow(policy.Query{Principal: p.Name(), Key: name, Action: action, Now: now})
	switch {
	case k == nil:
		return nil, d, hidden{"no such key"}
	case !d.Allowed && !s.rules.Sees(p.Name(), name, now):
		return nil, d, hidden{"the key is not the caller's: " + d.Reason}
	case !d.Allowed:
		return nil, d, fmt.Errorf("%w: %s", sigerr.Denied, d.Reason)
	}
	return k, d, nil
}

// Visible is a key as one principal sees it.
type Visible struct {
	*keys.Registered
	MaySign bool // in some format
	// Reads are the formats in which to send messages, not digests; see
	// policy.Rules.Reads.
	Reads []string
}

func (s *snapshot) visible(p ident.Principal, name string, now time.Time) Visible {
	return Visible{s.keys.Get(name), s.rules.MaySignSome(p.Name(), name, now), s.rules.Reads(p.Name(), name, now)}
}

// Key tells of a key that some rule lets p sign with, read or administer.
func (g *Gateway) Key(ctx context.Context, p ident.Principal, name string) (Visible, error) {
	now := g.c.Now()
	if err := p.Check(now); err != nil {
		return Visible{}, err
	}
	s, err := g.current(ctx)
	if err != nil {
		return Visible{}, err
	}
	if s.keys.Get(name) == nil || !s.rules.Sees(p.Name(), name, now) {
		return Visible{}, sigerr.NotFound
	}
	return s.visible(p, name, now), nil
}

// Keys tells of every key that p may see, by name.
func (g *Gateway) Keys(ctx context.Context, p ident.Principal) ([]Visible, error) {
	now := g.c.Now()
	if err := p.Check(now); err != nil {
		return nil, err
	}
	s, err := g.current(ctx)
	if err != nil {
		return nil, err
	}
	var out []Visible
	for _, name := range s.keys.Names() {
		if s.rules.Sees(p.Name(), name, now) {
			out = append(out, s.visible(p, name, now))
		}
	}
	return out, nil
}

// adminOfAll begins an act that needs an admin rule for every key.
func (g *Gateway) adminOfAll(ctx context.Context, p ident.Principal, action, frontEnd string) (act, error) {
	a, err := g.begin(ctx, p, action, "", frontEnd)
	if err != nil {
		return a, err
	}
	d := a.s.rules.MayAdministerAll(p.Name(), a.e.Time)
	if !d.Allowed {
		return a, g.fail(a, audit.Denied, fmt.Errorf("%w: %s", sigerr.Denied, d.Reason))
	}
	a.e.Rule = d.Rule
	return a, nil
}

// ApplyPolicy replaces the rules by those of a policy file and returns their
// number. Needs an admin rule for every key, before and after: rules that would
// lock the caller out are refused.
func (g *Gateway) ApplyPolicy(ctx context.Context, p ident.Principal, frontEnd string, source []byte) (int, error) {
	a, err := g.adminOfAll(ctx, p, "policy.apply", frontEnd)
	if err != nil {
		return 0, err
	}
	rules, err := policy.Parse(source)
	if err != nil {
		return 0, g.fail(a, audit.Denied, err)
	}
	if d := rules.MayAdministerAll(p.Name(), a.e.Time); !d.Allowed {
		return 0, g.fail(a, audit.Denied, fmt.Errorf("%w: under these rules you would no longer be an administrator: %s", sigerr.Conflict, d.Reason))
	}
	sum := sha256.Sum256(source)
	a.e.Detail = fmt.Sprintf("%d rules, sha256 %x", rules.Len(), sum)
	if len(source) == 0 {
		source = []byte("\n") // nil is no change
	}
	g.admin.Lock()
	defer g.admin.Unlock()
	// Asked again: another administrator may have been faster.
	if d := g.snap.Load().rules.MayAdministerAll(p.Name(), a.e.Time); !d.Allowed {
		return 0, g.fail(a, audit.Denied, fmt.Errorf("%w: %s", sigerr.Denied, d.Reason))
	}
	before := string(g.snap.Load().source)
	err = g.commit(ctx, a, store.Change{Policy: source}, func(s *snapshot) bool {
		return string(s.source) == string(source) && before != string(source)
	})
	if err != nil {
		return 0, err
	}
	return rules.Len(), nil
}

// Policy returns the policy file in force. Needs an admin rule for every key.
func (g *Gateway) Policy(ctx context.Context, p ident.Principal, frontEnd string) ([]byte, error) {
	a, err := g.adminOfAll(ctx, p, "policy.read", frontEnd)
	if err != nil {
		return nil, err
	}
	return a.s.source, nil
}

// checkQuery refuses what Sign would refuse before it asks the rules.
func checkQuery(q policy.Query) error {
	switch {
	case q.Action != policy.Sign && q.Action != policy.Read && q.Action != policy.Admin:
		return fmt.Errorf("%w: action %q is not sign, read or admin", sigerr.Invalid, q.Action)
	case q.Action != policy.Sign:
		return nil
	case !slices.Contains(policy.Formats, q.Format):
		return fmt.Errorf("%w: format %q is not one of %s", sigerr.Invalid, q.Format, strings.Join(policy.Formats, ", "))
	case keys.Hashes[q.Hash] == 0:
		return fmt.Errorf("%w: a digest of that hash is never signed; use SHA-256, SHA-384 or SHA-512", sigerr.Invalid)
	case q.Content == nil:
		return nil
	case !slices.Contains(policy.ContentFormats, q.Format):
		return fmt.Errorf("%w: of format %q the gateway reads nothing", sigerr.Invalid, q.Format)
	}
	if err := q.Content.Check(q.Format); err != nil {
		return fmt.Errorf("%w: content: %w", sigerr.Invalid, err)
	}
	return nil
}

// TestPolicy tells what the rules say to q, and for an administrator what each
// rule says. A question about another principal needs an admin rule for every
// key. Whether the key exists makes no difference to the answer.
func (g *Gateway) TestPolicy(ctx context.Context, p ident.Principal, frontEnd string, q policy.Query) (policy.Decision, []string, error) {
	if err := p.Check(g.c.Now()); err != nil {
		return policy.Decision{}, nil, err
	}
	if len(q.Principal) > MaxClaim || len(q.Key) > MaxClaim || len(q.Action) > MaxClaim || len(q.Format) > MaxClaim {
		return policy.Decision{}, nil, fmt.Errorf("%w: a principal, key, action or format has at most %d bytes", sigerr.Invalid, MaxClaim)
	}
	if err := checkQuery(q); err != nil {
		return policy.Decision{}, nil, err
	}
	q.Now = g.c.Now()
	s, err := g.current(ctx)
	if err != nil {
		return policy.Decision{}, nil, err
	}
	d := s.rules.Allow(q)
	if s.rules.MayAdministerAll(p.Name(), q.Now).Allowed {
		return d, s.rules.Explain(q), nil
	}
	if q.Principal != p.Name() {
		if _, err := g.adminOfAll(ctx, p, "policy.test", frontEnd); err != nil {
			return policy.Decision{}, nil, err
		}
	}
	return d, nil, nil
}

// MaxAuditRows bounds the rows of one call of AuditEntries.
const MaxAuditRows = 1000

// AuditEntries returns up to limit rows of the audit log from row from on, or
// the last ones where from is negative. Needs an admin rule for every key.
func (g *Gateway) AuditEntries(ctx context.Context, p ident.Principal, frontEnd string, from int64, limit int) (int64, [][]byte, error) {
	if _, err := g.adminOfAll(ctx, p, "audit.read", frontEnd); err != nil {
		return 0, nil, err
	}
	if limit < 1 || limit > MaxAuditRows {
		return 0, nil, fmt.Errorf("%w: %d rows asked for; ask for 1 to %d", sigerr.Invalid, limit, MaxAuditRows)
	}
	first, entries, err := g.c.Store.Audit(ctx, from, limit)
	if err != nil {
		g.log.Error("reading the audit log", "error", err)
		return 0, nil, fmt.Errorf("%w: its store cannot be read", sigerr.Unavailable)
	}
	return first, entries, nil
}
