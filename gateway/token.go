package gateway

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// Token holds private keys that never leave it. It is safe for concurrent use.
// Methods give up when ctx ends, though work that the device has begun may go on;
// signing has no side effect, so nobody needs to know.
//
// An error may have methods that tell its kind: Busy() bool for one that may
// pass by itself, and with it RetryAfter() time.Duration where the token has not
// been asked, since too much waits for it; Exists() bool for a label or id that is taken; everything else
// is a token failure. Of one with Name() string, Refused(), Gone() and Operator() bool the
// caller is told the name, where that is one of a CK_RV, and which of the three it is.
type Token interface {
	// Sign signs a digest with the key whose CKA_ID is id. opts is
	// *rsa.PSSOptions for PSS, crypto.Hash(0) for Ed25519, and else the hash.
	// ECDSA comes back as r||s of equal width. by is the principal and weight that
	// of its rule: where requests of several wait, each gets of the token's time in
	// proportion to it.
	Sign(ctx context.Context, by string, weight int, id, digest []byte, opts crypto.SignerOpts) ([]byte, error)
	// Generate makes a pair that cannot be exported; algorithm is a keys.Algorithm.
	Generate(ctx context.Context, label string, id []byte, algorithm string) (crypto.PublicKey, error)
	// PublicKey reads the public half of a pair, however that came into the token.
	// Where there is none the error has the method NotFound() bool.
	PublicKey(ctx context.Context, id []byte) (crypto.PublicKey, error)
	// Delete destroys a pair: one that Generate made and that was not registered.
	// Where there is none the error has the method NotFound() bool.
	Delete(ctx context.Context, id []byte) error
	// Doubt says that a signature by the key with this id was not that of the
	// registered key: what the token holds is to be looked at anew. It returns at once.
	Doubt(id []byte)
}

// Certify makes an OpenPGP certificate (a transferable public key) by asking the
// signers for certifications. subkey is nil for keys.Single. created and expires
// are whole seconds; a zero expires is never.
type Certify func(userID string, created, expires time.Time, primary, subkey crypto.Signer) ([]byte, error)

// Inspected is what an OpenPGP certificate says of one of its keys, which may sign now.
type Inspected struct {
	Certificate []byte // binary
	UserID      string // the main one
	// Primary is the primary key; nil where the key itself is it.
	Primary crypto.PublicKey
	Created time.Time // of the key, whole seconds
	Expires time.Time // of the key, no later than the certificate; zero: never
}

// Inspect reads a certificate, armored or not, that is to be a key's. Its errors wrap
// sigerr.Invalid: it is none, its self-signatures do not verify, or the key is not in it
// or may not sign.
type Inspect func(certificate []byte, signing crypto.PublicKey, at time.Time) (Inspected, error)

// missing says whether a token's error is that it has no such pair.
func missing(err error) bool {
	e, ok := errors.AsType[interface {
		error
		NotFound() bool
	}](err)
	return ok && e.NotFound()
}

// tokenError tells the kind of a token's error. Its text stays in the audit
// log: it may name slots and serial numbers.
func tokenError(err error) error {
	busy, ok := errors.AsType[interface {
		error
		Busy() bool
	}](err)
	exists, taken := errors.AsType[interface {
		error
		Exists() bool
	}](err)
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%w while waiting for the token", sigerr.Timeout)
	case errors.Is(err, context.Canceled):
		return sigerr.Canceled
	case ok && busy.Busy():
		if q, ok := errors.AsType[queued](err); ok {
			return &overQueue{q.Error(), q.RetryAfter()}
		}
		return fmt.Errorf("%w: the token is busy", sigerr.Overloaded)
	case taken && exists.Exists():
		return fmt.Errorf("%w: the token holds an unregistered object of that label; delete it there, or choose another name", sigerr.Conflict)
	}
	return tokenFailure(err)
}

// tokenFailure is sigerr.Unsupported or TokenFailed with what a caller can do about it. Of the token's
// own words it has the name of the CK_RV, no more: others may name slots.
func tokenFailure(err error) error {
	e, ok := errors.AsType[interface {
		error
		Name() string
		Refused() bool
		Gone() bool
		Operator() bool
	}](err)
	if !ok || !strings.HasPrefix(e.Name(), "CK") {
		return sigerr.TokenFailed
	}
	switch {
	case e.Refused():
		return fmt.Errorf("%w: it refuses this request as it stands (%s); sending it again will not help: use another key, scheme or hash, or ask an administrator",
			sigerr.Unsupported, e.Name())
	case e.Operator():
		return fmt.Errorf("%w: the token waits for its operator (%s)", sigerr.TokenFailed, e.Name())
	case e.Gone():
		return fmt.Errorf("%w: the token does not work (%s); its operator's log tells more", sigerr.TokenFailed, e.Name())
	}
	return fmt.Errorf("%w: %s", sigerr.TokenFailed, e.Name())
}

// queued is the error of a request that had to wait for the token and was refused
// instead: the token has not seen it.
type queued interface {
	error
	RetryAfter() time.Duration
}

// overQueue is sigerr.Overloaded, and its method RetryAfter tells a front-end when
// to try again.
type overQueue struct {
	text string
	wait time.Duration
}

func (o *overQueue) Error() string             { return fmt.Sprintf("%v: %s", sigerr.Overloaded, o.text) }
func (o *overQueue) Unwrap() error             { return sigerr.Overloaded }
func (o *overQueue) RetryAfter() time.Duration { return o.wait }

// tokenSigner signs certifications with a key that has just been generated. It
// is the bridge from crypto.Signer, which has no context, and so keeps one; it
// lives for one administrative act.
type tokenSigner struct {
	ctx       context.Context
	token     Token
	id        []byte
	algorithm keys.Algorithm
	public    crypto.PublicKey
}

var _ crypto.Signer = (*tokenSigner)(nil)

func (t *tokenSigner) Public() crypto.PublicKey { return t.public }

// Sign implements crypto.Signer. Like Gateway.Sign it returns nothing that does
// not verify.
func (t *tokenSigner) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	scheme, err := keys.SchemeFor(t.algorithm, "")
	if err != nil {
		return nil, err
	}
	sig, err := t.token.Sign(t.ctx, "", 1, t.id, digest, scheme.Options(opts.HashFunc()))
	if err != nil {
		return nil, fmt.Errorf("certifying: %w", err)
	}
	if err := keys.Verify(t.public, scheme, opts.HashFunc(), digest, sig); err != nil {
		return nil, fmt.Errorf("certifying: the token's signature does not verify: %w", err)
	}
	if ec, ok := t.public.(*ecdsa.PublicKey); ok {
		return keys.ECDSAToASN1(ec, sig)
	}
	return sig, nil
}
