package client

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"io"
	"sync"
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

	unverified bool
}

var _ crypto.Signer = (*Signer)(nil)

// Unverified returns a Signer that does not verify what the gateway answers, for a
// caller that does: a verification of its own costs as much as the rest of the
// client's part.
func (s *Signer) Unverified() *Signer {
	u := *s
	u.unverified = true
	return &u
}

// Signer returns a crypto.Signer for signatures of one format with one key.
func (c *Client) Signer(ctx context.Context, key Key, format string, claim Claim) *Signer {
	return &Signer{c: c, ctx: ctx, key: key, format: format, claim: claim}
}

// Public implements crypto.Signer.
func (s *Signer) Public() crypto.PublicKey { return s.key.PublicKey }

// Sign implements crypto.Signer for digests: RSA PKCS #1 v1.5, or PSS with
// [*rsa.PSSOptions] and a salt as long as the hash, or of so many bytes; ECDSA, as ASN.1; Ed25519
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
		var err error
		r.Scheme = keys.PSS
		r.SaltLength, err = keys.SaltLength(pss)
		if err != nil {
			return nil, err
		}
	}
	sig, err := s.c.Sign(s.ctx, r)
	if err != nil {
		return nil, err
	}
	signed := digest
	if sig.Scheme == keys.EdDSAMessage {
		signed = message
	}
	if sig.Scheme == keys.EdDSAMessage && message == nil {
		err = errors.New("it signs a message, and was sent a digest")
	} else if !s.unverified {
		err = keys.VerifySalted(s.key.PublicKey, sig.Scheme, r.Hash, r.SaltLength, signed, sig.Bytes)
	}
	if err != nil {
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
// its digest signed as Sign does, or with Ed25519 and the formats of SSH the message
// itself. What it returns it has verified.
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
	list   atomic.Pointer[listing]
	tried  chan struct{} // closed when list is set
	once   sync.Once     // closes tried
}

// listing is what the gateway last told of the keys that we may sign with, or why
// it has not told anything yet.
type listing struct {
	keys   map[string]crypto.PublicKey
	certs  map[string][]byte   // a key's own X.509 certificate, DER
	chains map[string][][]byte // that, and its issuers'
	err    error               // while there has been no list
}

// refreshKeys is how often a Session asks for the list of keys, and firstKeys how
// often while it has none.
const (
	refreshKeys = 5 * time.Second
	firstKeys   = 500 * time.Millisecond
)

// Session fetches the keys that we may sign with. Run keeps them fresh.
func (c *Client) Session(ctx context.Context, format string) (*Session, error) {
	s := c.OpenSession(format)
	return s, s.refresh(ctx)
}

// OpenSession is Session for who cannot wait for a gateway that is away: Run
// fetches the keys as soon as it can. Until it has tried once PublicKeys waits, and
// until it has succeeded PublicKeys returns why not.
func (c *Client) OpenSession(format string) *Session {
	return &Session{c: c, format: format, tried: make(chan struct{})}
}

func (s *Session) refresh(ctx context.Context) error {
	all, err := s.c.Keys(ctx)
	if err != nil {
		if l := s.list.Load(); l == nil || l.err != nil {
			s.set(&listing{err: err})
		}
		return err
	}
	l := &listing{keys: make(map[string]crypto.PublicKey, len(all)), certs: make(map[string][]byte), chains: make(map[string][][]byte)}
	for _, k := range all {
		if !k.MaySign {
			continue
		}
		l.keys[k.Name] = k.PublicKey
		for _, cert := range k.X509 {
			l.chains[k.Name] = append(l.chains[k.Name], cert.Raw)
		}
		if len(k.X509) > 0 {
			l.certs[k.Name] = k.X509[0].Raw
		}
	}
	s.set(l)
	return nil
}

func (s *Session) set(l *listing) {
	s.list.Store(l)
	s.once.Do(func() { close(s.tried) })
}

// Run fetches the keys, and again every few seconds until ctx ends. While the
// gateway does not answer, the last list stays.
func (s *Session) Run(ctx context.Context) {
	reachable := true
	for first := s.list.Load() == nil; ; first = false {
		l := s.list.Load()
		pause := refreshKeys
		if l == nil || l.err != nil {
			pause = firstKeys
		}
		if !first {
			select {
			case <-ctx.Done():
				return
			case <-time.After(pause):
			}
		}
		rctx, cancel := context.WithTimeout(ctx, refreshKeys)
		err := s.refresh(rctx)
		cancel()
		if ctx.Err() == nil && (err == nil) != reachable {
			reachable = err == nil
			if reachable {
				s.c.log.Info("the gateway answers again")
			} else {
				s.c.log.Warn("the gateway does not answer: the list of keys stays as it was", "error", err)
			}
		}
	}
}

// listed is the last list. It waits for the first attempt to get one.
func (s *Session) listed(ctx context.Context) (*listing, error) {
	select {
	case <-s.tried:
	case <-ctx.Done():
		return nil, contextError(ctx)
	}
	l := s.list.Load()
	return l, l.err
}

// PublicKeys returns the keys that we may sign with, by name, from memory. The
// caller must not change the map.
func (s *Session) PublicKeys(ctx context.Context) (map[string]crypto.PublicKey, error) {
	l, err := s.listed(ctx)
	if err != nil {
		return nil, err
	}
	return l.keys, nil
}

// Certificates returns the X.509 certificates, in DER, that were made for those keys
// or imported: each key's own. The caller must not change the map.
func (s *Session) Certificates(ctx context.Context) (map[string][]byte, error) {
	l, err := s.listed(ctx)
	if err != nil {
		return nil, err
	}
	return l.certs, nil
}

// Chains returns the X.509 certificates of those keys that have some, as DER: a
// key's own, then its issuers'. The caller must not change the map.
func (s *Session) Chains(ctx context.Context) (map[string][][]byte, error) {
	l, err := s.listed(ctx)
	if err != nil {
		return nil, err
	}
	return l.chains, nil
}

// Sign signs a digest by the usual scheme of the key; note is recorded. An error
// names the request as the gateway's audit log does.
func (s *Session) Sign(ctx context.Context, key string, hash crypto.Hash, digest []byte, note string) ([]byte, error) {
	return s.SignWith(ctx, key, hash, digest, note)
}

// SignWith is Sign by what opts say: a hash, for the usual scheme of the key, or
// *rsa.PSSOptions.
func (s *Session) SignWith(ctx context.Context, key string, opts crypto.SignerOpts, digest []byte, note string) ([]byte, error) {
	r := Request{ID: rand.Text(), Key: key, Digest: digest, Hash: opts.HashFunc(), Format: s.format, Claim: Claim{Note: note}}
	if pss, ok := opts.(*rsa.PSSOptions); ok {
		var err error
		r.Scheme = keys.PSS
		r.SaltLength, err = keys.SaltLength(pss)
		if err != nil {
			return nil, err
		}
	}
	sig, err := s.c.Sign(ctx, r)
	if err != nil {
		return nil, fmt.Errorf("request %s: %w", r.ID, err)
	}
	return sig.Bytes, nil
}

// SignMessage has a message of a format that the gateway reads signed, as the format
// and the key want it: its digest by hash, or with SSH and Ed25519 itself. note is
// recorded. An error names the request as the gateway's audit log does.
func (s *Session) SignMessage(ctx context.Context, key, format string, hash crypto.Hash, message []byte, note string) ([]byte, error) {
	r := Request{ID: rand.Text(), Key: key, Message: message, Hash: hash, Format: format, Claim: Claim{Note: note}}
	sig, err := s.c.Sign(ctx, r)
	if err != nil {
		return nil, fmt.Errorf("request %s: %w", r.ID, err)
	}
	return sig.Bytes, nil
}
