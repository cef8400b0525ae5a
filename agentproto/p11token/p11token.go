// Package p11token is a PKCS#11 token for unmodified openssl, sbsign, pesign,
// jarsigner and their like, which load p11-kit-client.so: it shows the keys that a
// peer may sign with, and their certificates, and has digests signed. Nothing in it
// can be changed. It is served over the protocol of package p11rpc.
//
// It holds no private key. What is to be signed goes to a [Keys], which decides;
// nothing that a client says of itself or of what it signs is decided on here.
//
// What it keeps:
//
//  1. No call makes, changes, exports or deletes an object; those that would are not
//     served. No attribute gives a secret.
//  2. A peer sees no key but those its Keys shows it.
//  3. Only SHA-256, SHA-384 and SHA-512 digests of the right length are passed on. Bytes
//     that are no DigestInfo of such a digest are never padded and signed with RSA.
//  4. One C_Sign or C_SignFinal that has room for the signature is one request to Keys,
//     and nothing else is one: the rest is answered from memory.
//  5. The client gets the CK_RV of an error's kind; the rest goes to our log, with the
//     request's id, which Keys is told too.
//  6. The state of a client is its connection's, is bounded, and ends with it.
package p11token

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path"
	"strings"
	"syscall"
	"time"

	"github.com/signwarden/signwarden/agentproto"
	"github.com/signwarden/signwarden/agentproto/lease"
	"github.com/signwarden/signwarden/agentproto/p11rpc"
)

// Keys is what the token needs of the keys that one peer's principal may use.
// It must be safe for concurrent use.
type Keys interface {
	// PublicKeys returns the keys that the principal may sign with now, by name. It
	// must answer from memory. The map is not changed.
	PublicKeys(ctx context.Context) (map[string]crypto.PublicKey, error)

	// Chains returns the X.509 certificates of those keys that have some, as DER:
	// a key's own, then its issuers'. It must answer from memory. Nothing in it is changed.
	Chains(ctx context.Context) (map[string][][]byte, error)

	// SignWith signs digest, which was made with opts.HashFunc(): RSA PKCS #1 v1.5, or
	// PSS with a *rsa.PSSOptions whose salt length is a number of bytes; ECDSA, as r||s
	// of equal width, where a digest longer than the order is cut to it; Ed25519 with
	// the digest's bytes as the message. note says what asked and with which request
	// id: audited, never decided on. Errors wrap the sentinels of sigerr. It must
	// return soon after ctx has ended.
	SignWith(ctx context.Context, key string, opts crypto.SignerOpts, digest []byte, note string) ([]byte, error)
}

const (
	// DefaultLabel is the token's label where there are no groups.
	DefaultLabel = "signwarden"
	// DefaultSignTimeout bounds a signature. Clients wait for ever, so a bound must be ours.
	DefaultSignTimeout = time.Minute
)

// The bounds of one connection.
const (
	MaxSessions = 1024     // crypto11 opens as many where it may
	MaxKeys     = 4096     // of one token; those that come later by name are not shown
	MaxRandom   = 64 << 10 // bytes of one C_GenerateRandom
	MaxLabel    = 32 - 8   // bytes of a token's label: "ed25519-" goes before it
	MaxGroups   = 64
	refresh     = time.Second // how old the list of keys may be that a search begins with
)

// Group is a token: which keys are in it.
type Group struct {
	// Label is the token's, by which tools are told of it. No label may begin with
	// another one: pkcs11-tool takes a token whose label begins with what it was told.
	Label string
	// Keys are names or globs in the manner of path.Match. A key is in every group
	// that names it, and in no token where none does.
	Keys []string
}

// Config says what a Server answers with.
type Config struct {
	// Keys gives the keys of a peer's principal, once for each connection. An error
	// is the answer to every search of the connection. Required.
	Keys func(agentproto.Peer) (Keys, error)

	// Groups are the tokens, at most MaxGroups; none: one of DefaultLabel with every key.
	Groups []Group

	// Lease bounds what all connections together may sign; nil: nothing does.
	Lease *lease.Lease

	SignTimeout time.Duration // 0: DefaultSignTimeout

	// Logger of refusals and failures, with peer, request id, key and reason; nil discards.
	Logger *slog.Logger
}

// Server answers any number of connections. It is safe for concurrent use.
type Server struct {
	cfg   Config
	slots []slot
	log   *slog.Logger

	warnings *agentproto.Warnings
}

// New checks cfg. The parts of cfg must not change afterwards.
func New(cfg Config) (*Server, error) {
	if cfg.Keys == nil {
		return nil, errors.New("p11token: Config.Keys is missing")
	}
	if len(cfg.Groups) == 0 {
		cfg.Groups = []Group{{Label: DefaultLabel, Keys: []string{"*"}}}
	}
	if cfg.SignTimeout <= 0 {
		cfg.SignTimeout = DefaultSignTimeout
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	err := CheckGroups(cfg.Groups)
	if err != nil {
		return nil, err
	}
	return &Server{cfg: cfg, slots: newSlots(cfg.Groups), log: cfg.Logger, warnings: agentproto.NewWarnings()}, nil
}

// CheckGroups says what is wrong with the configuration of tokens.
func CheckGroups(groups []Group) error {
	if len(groups) > MaxGroups {
		return fmt.Errorf("%d tokens; at most %d are served", len(groups), MaxGroups)
	}
	for i, g := range groups {
		if g.Label == "" || len(g.Label) > MaxLabel || strings.ContainsFunc(g.Label, func(r rune) bool { return r <= ' ' || r > '~' }) {
			return fmt.Errorf("token label %q: use 1 to %d printable ASCII characters without blanks", g.Label, MaxLabel)
		}
		if strings.HasPrefix(g.Label, ed25519Prefix) {
			return fmt.Errorf("token label %q: tokens that begin so are made for Ed25519 keys; use another", g.Label)
		}
		for _, other := range groups[:i] {
			if strings.HasPrefix(g.Label, other.Label) || strings.HasPrefix(other.Label, g.Label) {
				return fmt.Errorf("token labels %q and %q: tools would take one for the other; let neither begin with the other", other.Label, g.Label)
			}
		}
		if len(g.Keys) == 0 {
			return fmt.Errorf("token %q has no keys: name some, or \"*\"", g.Label)
		}
		for _, glob := range g.Keys {
			_, err := path.Match(glob, "")
			if err != nil || glob == "" {
				return fmt.Errorf("token %q: %q is no name or glob of a key", g.Label, glob)
			}
		}
	}
	return nil
}

// ServeConn answers p on c until it hangs up or ctx ends, and closes c.
func (s *Server) ServeConn(ctx context.Context, c net.Conn, p agentproto.Peer) {
	defer c.Close()
	log := s.log.With("peer", p)
	keys, err := s.cfg.Keys(p)
	if err != nil {
		// Not a connection closed at the door: a tool would take that for a broken module.
		keys = noKeys{err}
	}
	conn := &conn{srv: s, keys: keys, program: p.Executable(), log: log, view: &view{}}
	err = p11rpc.Serve(ctx, c, p11rpc.Config{Calls: conn.calls(), Quick: quick, Logger: log})
	switch {
	case errors.Is(err, syscall.EPIPE), errors.Is(err, syscall.ECONNRESET):
		log.Debug("the client has gone", "err", err) // killed, say: it was told nothing, and hears nothing
	case err != nil:
		log.Info("connection ended", "err", err)
	}
}

// noKeys is the Keys of a peer that has none; every use of it says why.
type noKeys struct{ err error }

func (n noKeys) PublicKeys(context.Context) (map[string]crypto.PublicKey, error) { return nil, n.err }

func (n noKeys) Chains(context.Context) (map[string][][]byte, error) { return nil, n.err }

func (n noKeys) SignWith(context.Context, string, crypto.SignerOpts, []byte, string) ([]byte, error) {
	return nil, n.err
}
