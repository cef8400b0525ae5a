// Package gateway is the only road from a request to a token: [Gateway.Sign].
//
// Every front-end authenticates its peer, turns its wire form into a [Request],
// calls Sign, and maps the errors of package sigerr to its own codes from one
// table. The package knows no wire, no file format and no PKCS#11; the token and
// the maker of OpenPGP certificates are given to [New].
package gateway

import (
	"cmp"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/signwarden/signwarden/gateway/audit"
	"github.com/signwarden/signwarden/gateway/ident"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/policy"
	"github.com/signwarden/signwarden/gateway/sigerr"
	"github.com/signwarden/signwarden/gateway/store"
)

// The bounds that hold where Config leaves them zero.
const (
	DefaultMaxInFlight     = 4096
	DefaultMaxPerPrincipal = 1024
	DefaultSignTimeout     = 30 * time.Second
)

// Config is what a Gateway is made of. The parts must not change after New.
type Config struct {
	Store      store.Store
	Token      Token
	TokenLabel string // recorded with keys that are made
	// Pin, where set, is told of the public key of each pair that is registered, by
	// its CKA_ID, before the token is asked to sign with it, and again: for a token
	// that is several.
	Pin      func(id []byte, public crypto.PublicKey)
	Certify  Certify      // nil: no OpenPGP certificates can be made
	Amend    Amend        // nil: none can be changed
	Inspect  Inspect      // nil: none can be adopted
	Read     Read         // nil: messages are refused
	Logger   *slog.Logger // nil: discards
	Observer Observer     // nil: nobody is told

	// MaxInFlight bounds requests between admission and answer, over all
	// principals; MaxPerPrincipal those of one. A request beyond is refused at once.
	MaxInFlight     int
	MaxPerPrincipal int
	// SignTimeout bounds one request's time at the token, waiting included.
	SignTimeout time.Duration

	Now func() time.Time // nil: time.Now
}

// Gateway decides, signs, checks and records. It is safe for concurrent use.
type Gateway struct {
	c     Config
	log   *slog.Logger
	audit *audit.Log
	dedup *dedup
	gate  *gate

	denials *denials

	// snap is what requests are decided on. It is replaced as a whole, under
	// admin, when an administrator acts; a request that loads it afterwards
	// sees the change.
	snap atomic.Pointer[snapshot]

	// stale is set where a change may have been stored and could not be read
	// back. Until it can, nothing is decided: fail closed.
	stale atomic.Bool

	// failing is set while the last commit of audit entries failed.
	failing atomic.Bool

	// admin serialises administrative changes: each commits to the store and
	// then replaces snap. It is held for one commit and one load, never while a
	// key is generated, so that disabling a key waits for nothing slow.
	admin sync.Mutex
	// amending serialises changes of OpenPGP certificates, each of which begins
	// with the one before. It is held while the token signs, and taken before admin.
	amending sync.Mutex
	// creating holds the names of keys whose generation is under way; guarded by admin.
	creating map[string]bool
}

// snapshot is the state that decisions are made on; immutable but for limits.
type snapshot struct {
	keys   *keys.Registry
	rules  *policy.Rules
	source []byte    // of rules
	limits *limiters // of rules' rates
}

// New loads the state from the store. Close the Gateway; the store and the
// token stay the caller's to close, after that.
func New(ctx context.Context, c Config) (*Gateway, error) {
	if c.Store == nil || c.Token == nil {
		return nil, errors.New("gateway: Config lacks a store or a token")
	}
	if c.MaxInFlight == 0 {
		c.MaxInFlight = DefaultMaxInFlight
	}
	if c.MaxPerPrincipal == 0 {
		c.MaxPerPrincipal = DefaultMaxPerPrincipal
	}
	if c.SignTimeout == 0 {
		c.SignTimeout = DefaultSignTimeout
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	g := &Gateway{
		c:        c,
		log:      c.Logger,
		dedup:    newDedup(c.Now),
		gate:     newGate(c.MaxInFlight, c.MaxPerPrincipal),
		denials:  newDenials(),
		creating: map[string]bool{},
	}
	if err := g.reload(ctx); err != nil {
		return nil, err
	}
	if err := g.recall(ctx); err != nil {
		return nil, err
	}
	g.audit = audit.New(g.observed(func(ctx context.Context, records []audit.Record) (int64, error) {
		var change store.Change
		for i, r := range records {
			change.Audit = append(change.Audit, r.Entry)
			if r.Answer != nil && change.Answers == nil {
				change.Answers = make([][]byte, len(records))
			}
			if r.Answer != nil {
				change.Answers[i] = r.Answer
			}
		}
		return c.Store.Commit(ctx, change)
	}))
	if err := g.cleanUp(ctx); err != nil {
		g.Close()
		return nil, err
	}
	return g, nil
}

// cleanUp destroys what a gateway that was cut off had made of keys and not
// registered, and records it.
func (g *Gateway) cleanUp(ctx context.Context) error {
	st, err := g.c.Store.Load(ctx)
	if err != nil || len(st.Pending) == 0 {
		return err
	}
	g.log.Warn("the gateway was cut off while it made a key; what it made is destroyed", "key", st.Pending[0].KeyName, "pairs", len(st.Pending))
	g.destroy(ctx, st.Pending)
	for _, p := range st.Pending {
		_, err := g.audit.Append(audit.Entry{
			Time: g.c.Now(), Action: "key.create", Outcome: audit.Failed, Principal: "signwardend", FrontEnd: "start", Key: p.KeyName,
			Reason: "the gateway was cut off before the key was registered", Detail: fmt.Sprintf("destroying the pair with id %x", p.ID),
		})
		if err != nil {
			return g.unrecorded(err)
		}
	}
	return nil
}

// recall has the requests of the last minutes answered as an earlier gateway of
// this store did: one that was killed may have recorded what it had no time to
// answer, and its clients send that again.
func (g *Gateway) recall(ctx context.Context) error {
	kept, err := g.c.Store.Answers(ctx)
	if err != nil {
		return err
	}
	for _, a := range slices.Backward(kept) { // the youngest first: there may be too many
		e, err := audit.Parse(a.Entry)
		if err != nil || len(a.Answer) < sha256.Size {
			return fmt.Errorf("reading the store: the answer kept with row %d: %w", a.Row, cmp.Or(err, errors.New("is cut off")))
		}
		if g.c.Now().Sub(e.Time) >= dedupFor {
			continue
		}
		content, sig := [sha256.Size]byte(a.Answer), a.Answer[sha256.Size:]
		g.dedup.recall(dedupKey{e.Principal, e.Request}, content, Signature{Bytes: sig, Scheme: keys.Scheme(e.Scheme), AuditRow: a.Row})
	}
	return nil
}

// Close waits for records under way. Requests that come after are refused.
func (g *Gateway) Close() { g.audit.Close() }

// reload replaces the snapshot by what the store holds. The caller holds admin,
// or is New. The limiters start afresh only where the policy has changed.
func (g *Gateway) reload(ctx context.Context) error {
	st, err := g.c.Store.Load(ctx)
	if err != nil {
		return err
	}
	reg, err := keys.NewRegistry(st.Keys)
	if err != nil {
		return fmt.Errorf("reading the store: %w", err)
	}
	rules, err := policy.Parse(st.Policy)
	if err != nil {
		return fmt.Errorf("reading the store: %w", err)
	}
	next := &snapshot{keys: reg, rules: rules, source: st.Policy, limits: newLimiters()}
	if old := g.snap.Load(); old != nil && string(old.source) == string(st.Policy) {
		next.limits = old.limits
	}
	if g.c.Pin != nil {
		if err := g.pin(reg); err != nil {
			return err
		}
	}
	g.snap.Store(next)
	g.stale.Store(false)
	return nil
}

// pin tells of every pair.
func (g *Gateway) pin(reg *keys.Registry) error {
	for _, name := range reg.Names() {
		k := reg.Get(name)
		g.c.Pin(k.ID, k.PublicKey)
		if k.OpenPGP == nil || len(k.OpenPGP.PrimaryID) == 0 {
			continue
		}
		pub, err := x509.ParsePKIXPublicKey(k.OpenPGP.PrimaryPublic)
		if err != nil {
			return fmt.Errorf("reading the store: primary key of %q: %w", name, err)
		}
		g.c.Pin(k.OpenPGP.PrimaryID, pub)
	}
	return nil
}

// current returns the snapshot to decide on. Where the last change could not be
// read back it reads the store first, and errs where that still fails.
func (g *Gateway) current(ctx context.Context) (*snapshot, error) {
	if g.stale.Load() {
		g.admin.Lock()
		defer g.admin.Unlock()
		if err := g.reload(ctx); err != nil {
			return nil, g.unrecorded(err)
		}
	}
	return g.snap.Load(), nil
}

// Signature is what Sign releases.
type Signature struct {
	// Bytes is an RSA signature as long as the modulus, an ECDSA signature as
	// r||s of equal width, or an Ed25519 signature of 64 bytes.
	Bytes    []byte
	Scheme   keys.Scheme
	AuditRow int64
}

// Sign decides, signs, checks, records, and only then returns the signature.
//
//  1. No request reaches a token unless a rule allows it, decided on the verified
//     identity, not on what the client says.
//  2. No signature leaves that does not verify with the key's registered public key.
//  3. No signature leaves without a durable audit record; a denial is recorded too.
//  4. A caller cannot tell a key it may not use from one that does not exist.
//
// Errors wrap one of the sentinels of package sigerr. The context bounds waiting
// and the token's work; it cannot cancel the audit record.
func (g *Gateway) Sign(ctx context.Context, p ident.Principal, r Request) (Signature, error) {
	if g.c.Observer == nil {
		return g.answer(ctx, p, r)
	}
	began := time.Now()
	sig, err := g.answer(ctx, p, r)
	g.c.Observer.Ended(err, time.Since(began))
	return sig, err
}

// answer is Sign.
func (g *Gateway) answer(ctx context.Context, p ident.Principal, r Request) (Signature, error) {
	now := g.c.Now()
	if err := p.Check(now); err != nil {
		return Signature{}, err // nobody has asked: there is nothing to record
	}
	leave, err := g.gate.enter(p.Name())
	if err != nil {
		// Not recorded: a flood of refusals must not become a flood of commits.
		return Signature{}, err
	}
	defer func() { leave(g.c.Now().Sub(now)) }()
	e := r.entry(p, now)
	if err := r.check(); err != nil {
		return g.refuse(e, audit.Denied, err, err.Error())
	}
	s, err := g.current(ctx)
	if err != nil {
		return Signature{}, err
	}
	content, err := g.read(s, p, &r, &e, now)
	if err != nil {
		return g.refuse(e, audit.Denied, err, err.Error())
	}
	k, rule, err := s.decide(p, r, content, now) // 1, 4
	e.Rule = rule.Rule
	if err != nil {
		return g.refuse(e, audit.Denied, public(err), err.Error())
	}
	e.KeyFingerprint = k.Fingerprint()
	scheme, err := r.scheme(k.Algorithm, content)
	if err == nil {
		err = keys.CheckSalt(k.PublicKey, scheme, r.Hash, r.SaltLength)
	}
	if err != nil {
		return g.refuse(e, audit.Denied, err, err.Error())
	}
	e.Scheme = string(scheme)
	if r.SaltLength != 0 && r.SaltLength != r.Hash.Size() {
		e.Detail = fmt.Sprintf("salt of %d bytes", r.SaltLength)
	}
	if r.ID == "" {
		return g.sign(ctx, p, r, content, e, s, k, rule, scheme)
	}
	sig, err := g.dedup.do(ctx, p.Name(), r, func() (Signature, error) {
		// Detached from the caller: one that hangs up and comes back with the
		// same id finds the work done, and recorded once.
		return g.sign(context.WithoutCancel(ctx), p, r, content, e, s, k, rule, scheme)
	})
	if errors.Is(err, sigerr.Conflict) {
		return g.refuse(e, audit.Denied, err, err.Error())
	}
	return sig, err
}

// read turns a request's message into its digest and what was read of it, and
// notes both in e. The message of who may sign nothing with that key is not read:
// it will be denied, and is not worth the work. Nothing here depends on whether
// there is such a key.
func (g *Gateway) read(s *snapshot, p ident.Principal, r *Request, e *audit.Entry, now time.Time) (*policy.Content, error) {
	if r.Message == nil {
		return nil, nil
	}
	message := r.Message
	if !ssh(r.Format) {
		r.Message = nil // to be freed while the token works
	}
	h := r.Hash.New()
	h.Write(message)
	r.Digest = h.Sum(nil)
	e.Digest = hex.EncodeToString(r.Digest)
	if !s.rules.MaySignSome(p.Name(), r.Key, now) {
		return nil, nil
	}
	if g.c.Read == nil {
		return nil, fmt.Errorf("%w: this gateway reads no messages; send digests", sigerr.Invalid)
	}
	content, err := g.c.Read(r.Format, r.Hash, message)
	if err == nil {
		err = content.Check(r.Format)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: the message is not what signatures of format %s are made of: %w", sigerr.Invalid, r.Format, err)
	}
	if content.Package != nil {
		e.NEVRA, e.Vendor = content.Package.String(), content.Package.Vendor
	}
	e.Namespace, e.User = content.Namespace, content.User
	return content, nil
}

// ssh reports whether a format is one of SSH's.
func ssh(format string) bool { return format == policy.SSHSig || format == policy.SSHAuth }

// scheme is how r is signed. Ed25519 signs a message of SSH as it is: only one that
// was read as that, and only so, since no verifier of SSH takes its digest.
func (r *Request) scheme(a keys.Algorithm, read *policy.Content) (keys.Scheme, error) {
	scheme, err := keys.SchemeFor(a, r.Scheme)
	switch {
	case err != nil:
		return "", err
	case scheme != keys.EdDSA || !ssh(r.Format):
		return scheme, nil
	case read == nil:
		return "", fmt.Errorf("%w: with Ed25519 SSH signs the message and not its digest; send the message", sigerr.Invalid)
	}
	return keys.EdDSAMessage, nil
}

// sign is the part of Sign that happens once for an idempotency id: the
// request is allowed under snapshot s.
func (g *Gateway) sign(ctx context.Context, p ident.Principal, r Request, content *policy.Content, e audit.Entry,
	s *snapshot, k *keys.Registered, rule policy.Decision, scheme keys.Scheme,
) (Signature, error) {
	giveBack, err := s.limits.take(p.Name(), k.Name, rule, g.c.Now())
	if err != nil {
		return g.refuse(e, audit.Denied, err, err.Error())
	}
	signed := r.Digest
	if scheme == keys.EdDSAMessage {
		signed = r.Message
	}
	expected := g.audit.Expect(p.Name())
	defer expected.Cancel()
	began := g.clock()
	tctx, cancel := context.WithTimeout(ctx, g.c.SignTimeout)
	sig, err := g.c.Token.Sign(tctx, p.Name(), rule.Weight, k.ID, signed, scheme.SaltedOptions(r.Hash, r.SaltLength))
	cancel()
	began = g.stage(StageToken, began)
	if err != nil {
		told := tokenError(err)
		if _, ok := errors.AsType[*overQueue](told); ok {
			// Not recorded, as where the gate refuses; nor does it count.
			giveBack()
			return Signature{}, told
		}
		return g.refuse(e, audit.Failed, told, err.Error())
	}
	err = keys.VerifySalted(k.PublicKey, scheme, r.Hash, r.SaltLength, signed, sig)
	began = g.stage(StageVerify, began)
	if err != nil { // 2
		g.log.Error("token returned a signature that does not verify: is this the token and the key that were registered?",
			"key", k.Name, "token", k.Token, "error", err)
		g.c.Token.Doubt(k.ID)
		return g.refuse(e, audit.Failed, sigerr.TokenFailed, "the token's signature does not verify: "+err.Error())
	}
	// An administrator may have acted while the token worked: what is no longer
	// allowed is not released.
	if g.stale.Load() || g.snap.Load() != s {
		now, err := g.current(context.WithoutCancel(ctx))
		if err == nil {
			_, _, err = now.decide(p, r, content, g.c.Now())
		}
		if err != nil {
			return g.refuse(e, audit.Denied, public(err), err.Error()+" (changed while the token worked)")
		}
	}
	sum := sha256.Sum256(sig)
	e.Outcome, e.Signature = audit.Signed, hex.EncodeToString(sum[:])
	var answer []byte
	if r.ID != "" {
		answer = r.answer(sig)
	}
	row, err := expected.Append(e, answer)
	g.stage(StageAudit, began)
	if err != nil { // 3
		return Signature{}, g.unrecorded(err)
	}
	return Signature{Bytes: sig, Scheme: scheme, AuditRow: row}, nil
}

// refuse records why there is no signature and returns err for the caller. If it
// cannot be recorded the caller is told that instead, and learns nothing else.
// Denials beyond a rate are not recorded one by one, and told as Overloaded: who
// may do nothing must not be able to fill the disk that everybody's records need.
func (g *Gateway) refuse(e audit.Entry, o audit.Outcome, err error, reason string) (Signature, error) {
	e.Outcome, e.Reason = o, clip(reason)
	if o == audit.Denied {
		dropped, ok := g.denials.take(e.Principal, g.c.Now())
		if !ok {
			return Signature{}, fmt.Errorf("%w: too many of yours were denied", sigerr.Overloaded)
		}
		if dropped > 0 {
			e.Detail = strings.TrimPrefix(fmt.Sprintf("%s; %d denials before this one were not recorded", e.Detail, dropped), "; ")
		}
	}
	if _, aerr := g.audit.Append(e); aerr != nil {
		return Signature{}, g.unrecorded(aerr)
	}
	return Signature{}, err
}

// unrecorded is what the caller is told when the store cannot record.
func (g *Gateway) unrecorded(err error) error {
	g.log.Error("the store fails, so nothing is released; check its disk", "error", err)
	return fmt.Errorf("%w: its store fails, so it releases nothing; try again when the store has recovered", sigerr.Unavailable)
}

// hidden is the error of a key that the caller may not know of. Its text, which
// says whether the key exists, is for the audit log; public returns what the
// caller is told.
type hidden struct{ reason string }

func (h hidden) Error() string { return h.reason }

func public(err error) error {
	if _, ok := errors.AsType[hidden](err); ok {
		return sigerr.NotFound
	}
	return err
}

// decide looks the key up and asks the rules; content is what was read of the
// request's message. Where it errs the caller must not go on. Errors are for the audit log; public turns them into the caller's.
func (s *snapshot) decide(p ident.Principal, r Request, content *policy.Content, now time.Time) (*keys.Registered, policy.Decision, error) {
	k := s.keys.Get(r.Key)
	d := s.rules.Allow(policy.Query{
		Principal: p.Name(), Key: r.Key, Action: policy.Sign, Now: now,
		Format: r.Format, Blind: content == nil, Hash: keys.HashName(r.Hash), Content: content,
	})
	switch {
	case k == nil:
		return nil, d, hidden{"no such key"}
	case !d.Allowed && !s.rules.Sees(p.Name(), r.Key, now):
		return nil, d, hidden{"the key is not the caller's: " + d.Reason}
	case !d.Allowed:
		return nil, d, fmt.Errorf("%w: %s", sigerr.Denied, d.Reason)
	case k.State != keys.Enabled:
		return nil, d, fmt.Errorf("%w: %s; an administrator can enable it with: signwarden key enable %s", sigerr.Disabled, k.Name, k.Name)
	}
	return k, d, nil
}
