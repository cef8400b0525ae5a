package gateway

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// Token holds private keys that never leave it. It is safe for concurrent use.
// Methods give up when ctx ends, though work that the device has begun may go on;
// signing has no side effect, so nobody needs to know.
//
// An error may have methods that tell its kind: Busy() bool for one that may
// pass by itself, Exists() bool for a label or id that is taken; everything else
// is a token failure.
type Token interface {
	// Sign signs a digest with the key whose CKA_ID is id. opts is
	// *rsa.PSSOptions for PSS, crypto.Hash(0) for Ed25519, and else the hash.
	// ECDSA comes back as r||s of equal width.
	Sign(ctx context.Context, id, digest []byte, opts crypto.SignerOpts) ([]byte, error)
	// Generate makes a pair that cannot be exported; algorithm is a keys.Algorithm.
	Generate(ctx context.Context, label string, id []byte, algorithm string) (crypto.PublicKey, error)
	// Delete destroys a pair: one that Generate made and that was not registered.
	// Where there is none the error has the method NotFound() bool.
	Delete(ctx context.Context, id []byte) error
}

// Certify makes an OpenPGP certificate (a transferable public key) by asking the
// signers for certifications. subkey is nil for keys.Single. created and expires
// are whole seconds; a zero expires is never.
type Certify func(userID string, created, expires time.Time, primary, subkey crypto.Signer) ([]byte, error)

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
		return fmt.Errorf("%w: the token is busy", sigerr.Overloaded)
	case taken && exists.Exists():
		return fmt.Errorf("%w: the token holds an unregistered object of that label; delete it there, or choose another name", sigerr.Conflict)
	}
	return sigerr.TokenFailed
}

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
	sig, err := t.token.Sign(t.ctx, t.id, digest, scheme.Options(opts.HashFunc()))
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
