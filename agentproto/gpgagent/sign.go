package gpgagent

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"errors"
	"fmt"

	"github.com/signwarden/signwarden/agentproto/assuan"
	"github.com/signwarden/signwarden/agentproto/sexp"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// sign answers PKSIGN. Its arguments are a cache nonce for passphrases, ignored. It
// may be repeated without a new SETHASH.
func (s *session) sign(ctx context.Context, c *assuan.Conn, _ []byte) error {
	if !s.hasGrip {
		return errNoSecretKey
	}
	if s.hash == 0 {
		return parameterError("no hash set")
	}
	ctx, cancel := context.WithTimeout(ctx, s.srv.cfg.SignTimeout)
	defer cancel()
	keys, err := s.shown(ctx)
	if err != nil {
		return err
	}
	key, ok := keys[s.grip]
	if !ok {
		return errNoSecretKey
	}
	err = checkDigest(key.pub, s.digest)
	if err != nil {
		return err
	}
	expr, err := s.signature(ctx, key)
	if err != nil {
		return fmt.Errorf("signing with %q: %w", key.name, err)
	}
	s.log.Debug("signed", "key", key.name, "keygrip", s.grip.String(), "hash", s.hash.String())
	return c.Data(expr.Bytes())
}

// signature has the digest signed, if the lease leaves one; what fails costs it none.
func (s *session) signature(ctx context.Context, key shownKey) (sexp.Expr, error) {
	giveBack, err := s.srv.cfg.Lease.Take()
	if err != nil {
		return sexp.Expr{}, err
	}
	sig, err := s.keys.Sign(ctx, key.name, s.hash, bytes.Clone(s.digest), s.note)
	if err != nil {
		giveBack()
		if sigerr.Kind(err) == nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
			err = fmt.Errorf("%w: %w", sigerr.Timeout, err) // whatever a broken-off call said
		}
		return sexp.Expr{}, err
	}
	expr, err := sigVal(key.pub, sig)
	if err != nil {
		giveBack()
	}
	return expr, err
}

// checkDigest refuses an ECDSA digest shorter than the curve, as the real agent
// does. P-521 takes SHA-512, the longest there is.
func checkDigest(pub crypto.PublicKey, digest []byte) error {
	k, ok := pub.(*ecdsa.PublicKey)
	if ok && len(digest) < min(k.Curve.Params().BitSize, 512)/8 {
		return errLength
	}
	return nil
}

// sigVal is the sig-val expression that libgcrypt reads. A signature of the wrong
// length is a failure of the token: an OK without a signature in it must never be sent.
func sigVal(pub crypto.PublicKey, sig []byte) (sexp.Expr, error) {
	param := func(name string, value []byte) sexp.Expr {
		return sexp.List(sexp.Atom(name), sexp.Atom(value))
	}
	var want int
	var alg sexp.Expr
	r, t := sig[:len(sig)/2], sig[len(sig)/2:]
	switch k := pub.(type) {
	case *rsa.PublicKey:
		want = k.Size()
		alg = sexp.List(sexp.Atom("rsa"), param("s", sig))
	case *ecdsa.PublicKey:
		want = 2 * ((k.Curve.Params().N.BitLen() + 7) / 8)
		alg = sexp.List(sexp.Atom("ecdsa"),
			param("r", bytes.TrimLeft(r, "\x00")), param("s", bytes.TrimLeft(t, "\x00")))
	case ed25519.PublicKey:
		// Exactly 32 and 32: libgcrypt takes no shortened halves here.
		want = ed25519.SignatureSize
		alg = sexp.List(sexp.Atom("eddsa"), param("r", r), param("s", t))
	}
	if want == 0 || len(sig) != want {
		return sexp.Expr{}, fmt.Errorf("%w: signature of %d bytes for a %T", sigerr.TokenFailed, len(sig), pub)
	}
	return sexp.List(sexp.Atom("sig-val"), alg), nil
}
