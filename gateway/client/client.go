// Package client is the Go client of a Signwarden gateway.
//
// A [Client] keeps one bidirectional stream, which any number of goroutines
// share, and sends only digests over it. Start with [LoadProfile] and [Dial],
// then use [Client.Signer] where a [crypto.Signer] is wanted, or [Client.Sign]
// from as many goroutines as there are digests in flight.
//
// Errors wrap the sentinels of package sigerr, whatever side they arose on.
package client

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	mrand "math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	pb "github.com/signwarden/signwarden/gateway/gatewaypb"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// Config says where the gateway is and who we are.
type Config struct {
	// Address is host:port.
	Address string
	// TLS has our certificate and the CA that issued the gateway's.
	TLS *tls.Config
	// Logger; nil: discards.
	Logger *slog.Logger
}

// A request that the gateway could not serve (Unavailable) or not yet
// (Overloaded) is sent again, with the same id, so many times in all; the pause
// doubles from firstPause, with jitter.
const (
	attempts   = 7
	firstPause = 50 * time.Millisecond
)

// Client is a connection to a gateway. It is safe for concurrent use.
type Client struct {
	conn *grpc.ClientConn
	log  *slog.Logger

	signing pb.SigningServiceClient
	keys    pb.KeyServiceClient
	policy  pb.PolicyServiceClient
	audit   pb.AuditServiceClient

	// ctx ends with Close; streams live in it, not in the context of the
	// request that happened to open them.
	ctx    context.Context
	cancel context.CancelFunc

	// mu guards current, and is held while a stream is opened, so that many
	// goroutines that find none open one.
	mu      sync.Mutex
	current *stream
	wg      sync.WaitGroup // the goroutines of streams
}

// Dial makes a client. It does not connect: the first call does. Close it.
func Dial(c Config) (*Client, error) {
	if c.Address == "" || c.TLS == nil {
		return nil, errors.New("client: Config lacks an address or TLS")
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	conn, err := grpc.NewClient("dns:///"+c.Address,
		grpc.WithTransportCredentials(credentials.NewTLS(c.TLS)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 3 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
	)
	if err != nil {
		return nil, fmt.Errorf("address %q: %w", c.Address, err)
	}
	cl := &Client{
		conn: conn, log: c.Logger,
		signing: pb.NewSigningServiceClient(conn), keys: pb.NewKeyServiceClient(conn),
		policy: pb.NewPolicyServiceClient(conn), audit: pb.NewAuditServiceClient(conn),
	}
	cl.ctx, cl.cancel = context.WithCancel(context.Background())
	return cl, nil
}

// Close cuts the connection and waits for the client's goroutines. Requests in
// flight fail; nobody can tell whether the gateway has signed them.
func (c *Client) Close() error {
	c.cancel()
	err := c.conn.Close()
	c.wg.Wait()
	return err
}

// Ping asks whether the gateway serves.
func (c *Client) Ping(ctx context.Context) error {
	r, err := healthpb.NewHealthClient(c.conn).Check(ctx, &healthpb.HealthCheckRequest{})
	if err != nil {
		return wireError(err)
	}
	if r.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		return fmt.Errorf("%w: it says %s", sigerr.Unavailable, r.GetStatus())
	}
	return nil
}

// Request asks for one signature over one digest.
type Request struct {
	// ID makes the request idempotent; empty: Sign makes one up.
	ID string
	// Key is the name of the key.
	Key string
	// Digest, made by Hash: SHA-256, SHA-384 or SHA-512. Ed25519 signs its bytes.
	Digest []byte
	Hash   crypto.Hash
	// Scheme; empty: the usual one of the key's algorithm.
	Scheme keys.Scheme
	// Format is what the signature is for; see the policy's formats.
	Format string
	// What is recorded of the artefact and never decided on.
	Claim Claim
}

// Claim describes an artefact to the audit log, in at most 1,024 bytes a field.
type Claim struct {
	File, ContentSHA256, NEVRA, Note string
}

// Signature is what the gateway released: verified there, and recorded.
type Signature struct {
	// Bytes is an RSA signature as long as the modulus, an ECDSA signature as
	// r||s of equal width, or an Ed25519 signature of 64 bytes.
	Bytes    []byte
	Scheme   keys.Scheme
	AuditRow int64
}

// Sign asks for one signature and waits. Call it from many goroutines to keep
// many in flight: they share a stream and its messages. Where the gateway
// cannot be reached, drains or is overloaded, the request is sent again under
// the same id, within ctx.
func (c *Client) Sign(ctx context.Context, r Request) (Signature, error) {
	if r.ID == "" {
		r.ID = rand.Text()
	}
	it := &pb.SignItem{
		Id: r.ID, Key: r.Key, Digest: r.Digest, Hash: pb.HashAlgorithmOf(r.Hash),
		Scheme: pb.SignatureSchemeOf(r.Scheme), Format: r.Format,
	}
	if r.Claim != (Claim{}) {
		it.Claim = &pb.Claim{File: r.Claim.File, ContentSha256: r.Claim.ContentSHA256, Nevra: r.Claim.NEVRA, Note: r.Claim.Note}
	}
	pause := firstPause
	for try := 1; ; try++ {
		res, err := c.signOnce(ctx, it)
		if err == nil {
			sig := res.GetSignature()
			if sig != nil {
				return Signature{Bytes: sig.GetSignature(), Scheme: sig.GetScheme().Scheme(), AuditRow: sig.GetAuditRow()}, nil
			}
			err = pb.FromStatus(status.FromProto(res.GetError()))
		}
		again := errors.Is(err, sigerr.Unavailable) || errors.Is(err, sigerr.Overloaded)
		if !again || try == attempts || c.ctx.Err() != nil {
			return Signature{}, err
		}
		select {
		case <-time.After(pause/2 + mrand.N(pause)):
			pause *= 2
		case <-ctx.Done():
			return Signature{}, err
		}
	}
}

// signOnce sends it over the current stream and waits for its result.
func (c *Client) signOnce(ctx context.Context, it *pb.SignItem) (*pb.SignResult, error) {
	for {
		s, err := c.stream(ctx)
		if err != nil {
			return nil, err
		}
		res, err := s.do(ctx, it)
		if !errors.Is(err, errMoveOn) {
			return res, err
		}
		c.drop(s)
	}
}

// stream returns the current stream, and opens one where there is none.
func (c *Client) stream(ctx context.Context) (*stream, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.current != nil && c.current.usable() {
		return c.current, nil
	}
	s, err := c.open(ctx)
	if err != nil {
		return nil, err
	}
	c.current = s
	return s, nil
}

// drop forgets a stream that takes no more requests; it ends by itself.
func (c *Client) drop(s *stream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.current == s {
		c.current = nil
	}
}

// wireError turns a gRPC error into one of ours. A gateway that cannot be
// reached, or whose certificate is not accepted, comes out as Unavailable.
func wireError(err error) error {
	if err == nil {
		return nil
	}
	return pb.FromStatus(status.Convert(err))
}

// Key is what the gateway tells of a key.
type Key struct {
	Name      string
	Algorithm keys.Algorithm
	State     keys.State
	Created   time.Time
	PublicKey crypto.PublicKey
	SPKI      []byte // PublicKey as DER
	Token     string // label of the token
	TokenID   []byte // CKA_ID there
	MaySign   bool   // whether we may sign with it in some format
	OpenPGP   *OpenPGP
}

// OpenPGP is the certificate of a key.
type OpenPGP struct {
	UserID      string
	Layout      keys.Layout
	Expires     time.Time // zero: never
	Certificate []byte    // transferable public key, binary
}

func toKey(k *pb.Key) (Key, error) {
	pub, err := x509.ParsePKIXPublicKey(k.GetPublicKey())
	if err != nil {
		return Key{}, fmt.Errorf("public key of %q: %w", k.GetName(), err)
	}
	out := Key{
		Name: k.GetName(), Algorithm: keys.Algorithm(k.GetAlgorithm()), State: keys.State(k.GetState()),
		Created: k.GetCreated().AsTime(), PublicKey: pub, SPKI: k.GetPublicKey(),
		Token: k.GetToken(), TokenID: k.GetTokenId(), MaySign: k.GetMaySign(),
	}
	if o := k.GetOpenpgp(); o != nil {
		out.OpenPGP = &OpenPGP{UserID: o.GetUserId(), Layout: keys.Layout(o.GetLayout()), Certificate: o.GetCertificate()}
		if o.GetExpires() != nil {
			out.OpenPGP.Expires = o.GetExpires().AsTime()
		}
	}
	return out, nil
}
