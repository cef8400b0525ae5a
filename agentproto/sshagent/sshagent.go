// Package sshagent answers unmodified ssh-keygen, git, ssh-add and ssh as their
// ssh-agent (draft-ietf-sshm-ssh-agent): it shows the keys that a peer may sign with,
// and has what SSH signs signed.
//
// It holds no private key. What is asked of it goes to a [Keys], which decides;
// nothing that a client says of itself or of what it signs is decided on here.
//
// What it keeps:
//
//  1. Two requests are served: the list of keys, and a signature. Those that would add,
//     remove or lock keys, and all extensions, are refused before any of their data is
//     looked at.
//  2. A peer sees no key but those its Keys shows it, and one that is not shown is
//     told as one that does not exist.
//  3. Only what package sshsig reads is passed on: a blob of ssh-keygen -Y sign, or a login with
//     the key and the algorithm that are asked for. It goes on whole, so that Keys can read
//     it too, and need not believe us. RSA with SHA-1 is refused.
//  4. One signature is one request to Keys; the list is answered from memory.
//  5. The client is told SSH_AGENT_FAILURE, which is all that the protocol has; why goes
//     to our log, with the request's id, which Keys is told too.
//
// golang.org/x/crypto/ssh/agent has a server as well. It reads up to 16 MiB, parses private keys that a client
// wants to add before anybody can refuse them, and logs to the process's log, without
// bounds; so only the client of that package is used, in tests.
package sshagent

import (
	"context"
	"crypto"
	"errors"
	"log/slog"
	"net"
	"syscall"
	"time"

	"github.com/signwarden/signwarden/agentproto"
	"github.com/signwarden/signwarden/agentproto/lease"
)

// Keys is what the agent needs of the keys that one peer's principal may use.
// It must be safe for concurrent use.
type Keys interface {
	// PublicKeys returns the keys that the principal may sign with now, by name. It
	// must answer from memory. The map is not changed.
	PublicKeys(ctx context.Context) (map[string]crypto.PublicKey, error)

	// SignMessage signs a message of the format ssh-sig or ssh-auth: RSA PKCS #1 v1.5 and
	// ECDSA (as r||s of equal width) over its digest by hash, Ed25519 over the message
	// itself. It must read what the message is by itself. note says what asked and with which
	// request id: audited, never decided on. Errors wrap the sentinels of sigerr. It
	// must return soon after ctx has ended.
	SignMessage(ctx context.Context, key, format string, hash crypto.Hash, message []byte, note string) ([]byte, error)
}

// The defaults and bounds of one connection.
const (
	// DefaultSignTimeout bounds a signature. Clients wait for ever, so a bound must be ours.
	DefaultSignTimeout = time.Minute
	// MaxRequest is the size of the largest request, in bytes. What is served has at most
	// 17 KiB; somebody who adds a key is told that it is refused.
	MaxRequest = 64 << 10
	// MaxReply and MaxKeys are what OpenSSH's clients take (MAX_AGENT_REPLY_LEN,
	// MAX_AGENT_IDENTITIES). Keys beyond that, in the order of their names, are not listed;
	// they sign all the same.
	MaxReply = 256 << 10
	MaxKeys  = 2048

	defaultFrameTimeout = 30 * time.Second
)

// Config says what a Server answers with.
type Config struct {
	// Keys gives the keys of a peer's principal, once for each connection. An error
	// is the answer to every request of the connection. Required.
	Keys func(agentproto.Peer) (Keys, error)

	// Lease bounds what all connections together may sign; nil: nothing does.
	Lease *lease.Lease

	SignTimeout  time.Duration // 0: DefaultSignTimeout
	FrameTimeout time.Duration // within a request, and of a reply; 0: 30 s

	// Logger of refusals and failures, with peer, request id, key and reason; nil discards.
	Logger *slog.Logger
}

// Server answers any number of connections. It is safe for concurrent use.
type Server struct {
	cfg Config
	log *slog.Logger

	warnings *agentproto.Warnings
}

// New checks cfg. The parts of cfg must not change afterwards.
func New(cfg Config) (*Server, error) {
	if cfg.Keys == nil {
		return nil, errors.New("sshagent: Config.Keys is missing")
	}
	if cfg.SignTimeout <= 0 {
		cfg.SignTimeout = DefaultSignTimeout
	}
	if cfg.FrameTimeout <= 0 {
		cfg.FrameTimeout = defaultFrameTimeout
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Server{cfg: cfg, log: cfg.Logger, warnings: agentproto.NewWarnings()}, nil
}

// ServeConn answers p on c, one request after the other, until it hangs up or ctx
// ends, and closes c.
func (s *Server) ServeConn(ctx context.Context, c net.Conn, p agentproto.Peer) {
	defer c.Close()
	keys, err := s.cfg.Keys(p)
	if err != nil {
		keys = noKeys{err}
	}
	conn := &conn{srv: s, nc: c, ctx: ctx, keys: keys, program: p.Executable(), log: s.log.With("peer", p)}
	err = conn.serve()
	switch {
	case errors.Is(err, syscall.EPIPE), errors.Is(err, syscall.ECONNRESET):
		conn.log.Debug("the client has gone", "err", err) // killed, say: it was told nothing, and hears nothing
	case err != nil:
		conn.log.Info("connection ended", "err", err)
	}
}

// noKeys is the Keys of a peer that has none; every use of it says why.
type noKeys struct{ err error }

func (n noKeys) PublicKeys(context.Context) (map[string]crypto.PublicKey, error) { return nil, n.err }

func (n noKeys) SignMessage(context.Context, string, string, crypto.Hash, []byte, string) ([]byte, error) {
	return nil, n.err
}
