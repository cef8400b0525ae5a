package client

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"fmt"
	"io"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// Signer is a [crypto.Signer] whose private key is in the gateway's token. It
// is safe for concurrent use.
//
// crypto.Signer has no context, so a Signer keeps the one it was made with:
// that bounds every signature it makes.
type Signer struct {
	c      *Client
	ctx    context.Context
	key    Key
	format string
	claim  Claim
}

var _ crypto.Signer = (*Signer)(nil)

// Signer returns a crypto.Signer for signatures of one format with one key.
func (c *Client) Signer(ctx context.Context, key Key, format string, claim Claim) *Signer {
	return &Signer{c, ctx, key, format, claim}
}

// Public implements crypto.Signer.
func (s *Signer) Public() crypto.PublicKey { return s.key.PublicKey }

// Sign implements crypto.Signer for digests: RSA PKCS #1 v1.5, or PSS with
// [*rsa.PSSOptions] and a salt as long as the hash; ECDSA, as ASN.1; Ed25519
// over the digest's bytes, where opts must have the method
// DigestHash() crypto.Hash, since the gateway decides on the hash and opts'
// HashFunc is 0 for Ed25519. What it returns it has verified.
func (s *Signer) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return s.sign(digest, nil, opts)
}

// sign asks for a signature over a digest, or over a message, whose digest is
// then for checking the answer.
func (s *Signer) sign(digest, message []byte, opts crypto.SignerOpts) ([]byte, error) {
	r := Request{Key: s.key.Name, Digest: digest, Hash: hashOf(opts), Format: s.format, Claim: s.claim}
	if message != nil {
		r.Digest, r.Message = nil, message
	}
	if r.Hash == 0 {
		return nil, fmt.Errorf("%w: the gateway signs digests; say which hash made this one", sigerr.Invalid)
	}
	if _, ok := s.key.PublicKey.(ed25519.PublicKey); ok && opts.HashFunc() != 0 {
		return nil, fmt.Errorf("%w: Ed25519ph is not made; the digest's bytes are signed as the message", sigerr.Invalid)
	}
	if pss, ok := opts.(*rsa.PSSOptions); ok {
		if pss.SaltLength != rsa.PSSSaltLengthEqualsHash && pss.SaltLength != r.Hash.Size() {
			return nil, fmt.Errorf("%w: PSS salt length %d; only a salt as long as the hash is made", sigerr.Invalid, pss.SaltLength)
		}
		r.Scheme = keys.PSS
	}
	sig, err := s.c.Sign(s.ctx, r)
	if err != nil {
		return nil, err
	}
	if err := keys.Verify(s.key.PublicKey, sig.Scheme, r.Hash, digest, sig.Bytes); err != nil {
		return nil, fmt.Errorf("%w: what the gateway returned for key %q does not verify: %w", sigerr.TokenFailed, s.key.Name, err)
	}
	if ec, ok := s.key.PublicKey.(*ecdsa.PublicKey); ok {
		return keys.ECDSAToASN1(ec, sig.Bytes)
	}
	return sig.Bytes, nil
}

// hashOf is the hash of the digest that opts are for; 0: they do not say.
func hashOf(opts crypto.SignerOpts) crypto.Hash {
	if h, ok := opts.(interface{ DigestHash() crypto.Hash }); ok {
		return h.DigestHash()
	}
	return opts.HashFunc()
}

// MessageSigner is a [Signer] that is a [crypto.MessageSigner] too: for a format
// of Key.Reads, where the gateway is to see what it signs.
type MessageSigner struct{ *Signer }

var _ crypto.MessageSigner = MessageSigner{}

// MessageSigner returns a crypto.MessageSigner for one format with one key.
func (c *Client) MessageSigner(ctx context.Context, key Key, format string, claim Claim) MessageSigner {
	return MessageSigner{c.Signer(ctx, key, format, claim)}
}

// SignMessage implements crypto.MessageSigner: the whole message is sent, and
// its digest signed as Sign does. What it returns it has verified.
func (s MessageSigner) SignMessage(_ io.Reader, message []byte, opts crypto.SignerOpts) ([]byte, error) {
	hash := hashOf(opts)
	if keys.HashName(hash) == "" {
		return nil, fmt.Errorf("%w: messages are hashed with SHA-256, SHA-384 or SHA-512", sigerr.Invalid)
	}
	if message == nil {
		message = []byte{}
	}
	h := hash.New()
	h.Write(message)
	return s.sign(h.Sum(nil), message, opts)
}

// Session is what an agent socket on this host needs of the gateway: it answers
// for keys from memory and sends only what is to be signed. It is safe for
// concurrent use.
type Session struct {
	c      *Client
	format string
	keys   atomic.Pointer[map[string]crypto.PublicKey]
}

// refreshKeys is how often a Session asks for the list of keys.
const refreshKeys = 5 * time.Second

// Session fetches the keys that we may sign with. Run keeps them fresh.
func (c *Client) Session(ctx context.Context, format string) (*Session, error) {
	s := &Session{c: c, format: format}
	return s, s.refresh(ctx)
}

func (s *Session) refresh(ctx context.Context) error {
	all, err := s.c.Keys(ctx)
	if err != nil {
		return err
	}
	m := make(map[string]crypto.PublicKey, len(all))
	for _, k := range all {
		if k.MaySign {
			m[k.Name] = k.PublicKey
		}
	}
	s.keys.Store(&m)
	return nil
}

// Run fetches the keys again every few seconds until ctx ends. While the
// gateway does not answer, the last list stays.
func (s *Session) Run(ctx context.Context) {
	t := time.NewTicker(refreshKeys)
	defer t.Stop()
	reachable := true
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		rctx, cancel := context.WithTimeout(ctx, refreshKeys)
		err := s.refresh(rctx)
		cancel()
		if ctx.Err() == nil && (err == nil) != reachable {
			reachable = err == nil
			s.c.log.Log(ctx, slog.LevelWarn, "listing keys", "reachable", reachable, "error", err)
		}
	}
}

// PublicKeys returns the keys that we may sign with, by name, from memory. The
// caller must not change the map.
func (s *Session) PublicKeys(context.Context) (map[string]crypto.PublicKey, error) {
	return *s.keys.Load(), nil
}

// Sign signs a digest by the usual scheme of the key; note is recorded.
func (s *Session) Sign(ctx context.Context, key string, hash crypto.Hash, digest []byte, note string) ([]byte, error) {
	sig, err := s.c.Sign(ctx, Request{Key: key, Digest: digest, Hash: hash, Format: s.format, Claim: Claim{Note: note}})
	return sig.Bytes, err
}
