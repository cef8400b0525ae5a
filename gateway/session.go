package gateway

import (
	"context"
	"crypto"
	"crypto/rsa"

	"github.com/signwarden/signwarden/gateway/ident"
	"github.com/signwarden/signwarden/gateway/keys"
)

// Session is a principal at a front-end of this process: what an agent socket
// needs of the gateway. It is safe for concurrent use.
type Session struct {
	g                *Gateway
	p                ident.Principal
	frontEnd, format string
}

// Session binds what a front-end knows of every request of one peer.
func (g *Gateway) Session(p ident.Principal, frontEnd, format string) *Session {
	return &Session{g, p, frontEnd, format}
}

// PublicKeys returns the keys that the principal may sign with in some format,
// by name, disabled ones too.
func (s *Session) PublicKeys(ctx context.Context) (map[string]crypto.PublicKey, error) {
	all, err := s.g.Keys(ctx, s.p)
	if err != nil {
		return nil, err
	}
	out := make(map[string]crypto.PublicKey, len(all))
	for _, k := range all {
		if k.MaySign {
			out[k.Name] = k.PublicKey
		}
	}
	return out, nil
}

// Certificates returns the X.509 certificates, in DER, of those keys that have
// one: each key's own, without its issuers'.
func (s *Session) Certificates(ctx context.Context) (map[string][]byte, error) {
	all, err := s.g.Keys(ctx, s.p)
	if err != nil {
		return nil, err
	}
	out := make(map[string][]byte)
	for _, k := range all {
		if k.MaySign && len(k.X509) > 0 {
			out[k.Name] = k.X509[0]
		}
	}
	return out, nil
}

// Sign signs a digest by the usual scheme of the key. note is what the client
// says it signs: recorded, never decided on.
func (s *Session) Sign(ctx context.Context, key string, hash crypto.Hash, digest []byte, note string) ([]byte, error) {
	sig, err := s.g.Sign(ctx, s.p, Request{
		Key: key, Digest: digest, Hash: hash, Format: s.format, FrontEnd: s.frontEnd, Claim: Claim{Note: note},
	})
	return sig.Bytes, err
}

// SignMessage has a message of a format that the gateway reads signed, as the format
// and the key want it: its digest by hash, or with SSH and Ed25519 itself. note is
// recorded, never decided on.
func (s *Session) SignMessage(ctx context.Context, key, format string, hash crypto.Hash, message []byte, note string) ([]byte, error) {
	sig, err := s.g.Sign(ctx, s.p, Request{
		Key: key, Message: message, Hash: hash, Format: format, FrontEnd: s.frontEnd, Claim: Claim{Note: note},
	})
	return sig.Bytes, err
}

// Chains returns the X.509 certificates of those keys that have some, as DER: a
// key's own, then its issuers'. The caller must not change them.
func (s *Session) Chains(ctx context.Context) (map[string][][]byte, error) {
	all, err := s.g.Keys(ctx, s.p)
	if err != nil {
		return nil, err
	}
	out := map[string][][]byte{}
	for _, k := range all {
		if k.MaySign && len(k.X509) > 0 {
			out[k.Name] = k.X509
		}
	}
	return out, nil
}

// SignWith signs a digest by what opts say: a hash, for the usual scheme of the
// key, or *rsa.PSSOptions. note is recorded, never decided on.
func (s *Session) SignWith(ctx context.Context, key string, opts crypto.SignerOpts, digest []byte, note string) ([]byte, error) {
	r := Request{Key: key, Digest: digest, Hash: opts.HashFunc(), Format: s.format, FrontEnd: s.frontEnd, Claim: Claim{Note: note}}
	if pss, ok := opts.(*rsa.PSSOptions); ok {
		var err error
		r.Scheme = keys.PSS
		r.SaltLength, err = keys.SaltLength(pss)
		if err != nil {
			return nil, err
		}
	}
	sig, err := s.g.Sign(ctx, s.p, r)
	return sig.Bytes, err
}
