// Package gpgagent answers unmodified gpg, gpgsm, rpmsign, git and sq as their
// gpg-agent: it shows the keys that a peer may sign with, and has digests signed.
//
// It holds no private key. What is asked of it goes to a [Keys], which decides;
// nothing that a client says of itself or of what it signs is decided on here.
//
// What it keeps:
//
//  1. No command exports, imports, makes, changes or deletes a key, or stops the
//     agent: those are Forbidden before any of their data is asked for.
//  2. A peer sees no key but those its Keys shows it, in no reply, and one that is
//     not shown is told as one that does not exist.
//  3. Only SHA-256, SHA-384 and SHA-512 digests of the right length are passed on.
//  4. The client gets the words of an error's kind; the rest goes to our log.
//
// The replies are those of the GnuPG 2.2.40 agent except where the comments say otherwise.
// Commands are dispatched one by one and not by a state machine: the order in which
// clients send them has changed between versions and will again.
package gpgagent

import (
	"context"
	"crypto"
	"crypto/sha1"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/signwarden/signwarden/agentproto"
	"github.com/signwarden/signwarden/agentproto/assuan"
	"github.com/signwarden/signwarden/agentproto/lease"
)

// Keys is what the agent needs of the keys that one peer's principal may use.
// It must be safe for concurrent use.
type Keys interface {
	// PublicKeys returns the keys that the principal may sign with now, by name. It is
	// called on most commands and must answer from memory. The map is not changed.
	PublicKeys(ctx context.Context) (map[string]crypto.PublicKey, error)

	// Sign signs digest, which was made with hash, by the key's usual scheme: RSA
	// PKCS #1 v1.5; ECDSA, as r||s of equal width, where a digest longer than the
	// order is cut to it; Ed25519 with the digest's bytes as the message. note is
	// what the client says it signs: audited, never decided on. Errors wrap the
	// sentinels of sigerr. It must return soon after ctx has ended.
	Sign(ctx context.Context, key string, hash crypto.Hash, digest []byte, note string) ([]byte, error)
}

// Certified is a Keys that knows X.509 certificates too.
type Certified interface {
	// Certificates returns the certificates, in DER, that were issued for the keys that
	// PublicKeys returns: each key's own, without its issuers'. From memory as well.
	Certificates(ctx context.Context) (map[string][]byte, error)
}

const (
	// DefaultVersion is what GETINFO version says. A client warns of an agent that
	// is older than itself, four lines each time, and is silent about a newer one.
	DefaultVersion = "2.5.99"
	// DefaultSignTimeout bounds a PKSIGN. Clients wait for ever, and rpmsign signs
	// one package after another, so a bound must be ours.
	DefaultSignTimeout = time.Minute
)

// Config says what a Server answers with.
type Config struct {
	// Keys gives the keys of a peer's principal, once for each connection. An error
	// is the answer to every command of the connection that uses a key. Required.
	Keys func(agentproto.Peer) (Keys, error)

	Version     string        // "": DefaultVersion
	SignTimeout time.Duration // 0: DefaultSignTimeout

	// TrustedRoots are the SHA-1 fingerprints, in hex, of the X.509 roots that
	// ISTRUSTED says yes to, besides self-signed certificates of the peer's own keys
	// where its Keys is Certified. gpgsm signs only under one of them. It asks when it
	// verifies too: whatever such a root has issued is then valid to gpgsm.
	TrustedRoots []string

	// Lease bounds what all connections together may sign; nil: nothing does.
	Lease *lease.Lease

	// Logger of refusals and failures, with peer, keygrip and reason; nil discards.
	Logger *slog.Logger
}

// Server answers any number of connections. It is safe for concurrent use.
type Server struct {
	cfg   Config
	roots map[string]bool // by upper-case hex
	log   *slog.Logger
	grips gripCache

	warnings *agentproto.Warnings
}

// New checks cfg. The parts of cfg must not change afterwards.
func New(cfg Config) (*Server, error) {
	if cfg.Keys == nil {
		return nil, errors.New("gpgagent: Config.Keys is missing")
	}
	if cfg.Version == "" {
		cfg.Version = DefaultVersion
	}
	if !validVersion(cfg.Version) {
		return nil, fmt.Errorf("gpgagent: version %q is not of the form 2.5.99: clients would warn of it", cfg.Version)
	}
	if cfg.SignTimeout <= 0 {
		cfg.SignTimeout = DefaultSignTimeout
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg, roots: make(map[string]bool), log: cfg.Logger, warnings: agentproto.NewWarnings()}
	for _, root := range cfg.TrustedRoots {
		fpr, ok := parseFingerprint(root)
		if !ok {
			return nil, fmt.Errorf("gpgagent: trusted root %q is not a SHA-1 fingerprint in hex", root)
		}
		s.roots[fpr] = true
	}
	return s, nil
}

// Fingerprints are the SHA-1 fingerprints, in hex, of the certificates in PEM text, as
// Config.TrustedRoots wants them. Text without a certificate is an error.
func Fingerprints(text []byte) ([]string, error) {
	var out []string
	for {
		var block *pem.Block
		block, text = pem.Decode(text)
		switch {
		case block == nil && len(out) == 0:
			return nil, errors.New("it holds no PEM certificate")
		case block == nil:
			return out, nil
		case block.Type != "CERTIFICATE":
			return nil, fmt.Errorf("it holds a PEM %q, and certificates only are wanted", block.Type)
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(out)+1, err)
		}
		out = append(out, keygrip(sha1.Sum(block.Bytes)).String()) // of one form with a fingerprint
	}
}

func validVersion(v string) bool {
	parts := strings.Split(v, ".")
	for _, part := range parts {
		_, err := strconv.ParseUint(part, 10, 16)
		if err != nil {
			return false
		}
	}
	return len(parts) == 3
}

// ServeConn answers p on c until it hangs up or ctx ends, and closes c.
func (s *Server) ServeConn(ctx context.Context, c net.Conn, p agentproto.Peer) {
	defer c.Close()
	log := s.log.With("peer", p)
	keys, err := s.cfg.Keys(p)
	if err != nil {
		// Not an ERR for a greeting: gpg takes that for "No agent running", and may
		// then start an agent of its own at our path.
		keys = noKeys{err}
	}
	sess := &session{srv: s, keys: keys, log: log}
	err = assuan.Serve(ctx, c, assuan.Config{
		Greeting: "Pleased to meet you",
		Commands: sess.commands(),
		Logger:   log,
	})
	switch {
	case errors.Is(err, syscall.EPIPE), errors.Is(err, syscall.ECONNRESET):
		log.Debug("the client has gone", "err", err) // killed, say: it was told nothing, and hears nothing
	case err != nil:
		log.Info("connection ended", "err", err)
	}
}

// noKeys is the Keys of a peer that has none; every use of a key says why.
type noKeys struct{ err error }

func (n noKeys) PublicKeys(context.Context) (map[string]crypto.PublicKey, error) { return nil, n.err }

func (n noKeys) Sign(context.Context, string, crypto.Hash, []byte, string) ([]byte, error) {
	return nil, n.err
}
