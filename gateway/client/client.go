// Package client is the Go client of a Signwarden gateway.
//
// A [Client] keeps one bidirectional stream, which any number of goroutines
// share, and sends only digests over it, or the headers of packages that the
// gateway wants to see ([Client.MessageSigner]). Start with [LoadProfile] and
// [Dial], then use [Client.Signer] where a [crypto.Signer] is wanted, or
// [Client.Sign] from as many goroutines as there are digests in flight.
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
	"math"
	mrand "math/rand/v2"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	_ "google.golang.org/grpc/health" // health checks of replicas
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "github.com/signwarden/signwarden/gateway/gatewaypb"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// Config says where the gateway is and who we are.
type Config struct {
	// Address is host:port. Replicas are more of them, of gateways with the same
	// keys: a stream is opened with each in turn that serves. Only replicas of one
	// store know each other's ids: of others a request sent again may be signed, and
	// recorded, by each.
	Address  string
	Replicas []string
	// TLS has our certificate and the CA that issued the gateway's.
	TLS *tls.Config
	// Logger; nil: discards.
	Logger *slog.Logger
}

// A request that the gateway could not serve (Unavailable) or not yet
// (Overloaded) is sent again, with the same id, so many times in all; the pause
// doubles from firstPause, with jitter. The question for a key, which comes before all
// else, is asked for as long as a gateway takes to start anew, and no longer: the
// address may be wrong.
const (
	attempts      = 7
	keyAttempts   = 6
	firstPause    = 50 * time.Millisecond
	maxRetryAfter = 2 * time.Second // the longest pause that the gateway can ask for
)

// Client is a connection to a gateway. It is safe for concurrent use.
type Client struct {
	address string
	conn    *grpc.ClientConn
	log     *slog.Logger

	signing pb.SigningServiceClient
	keys    pb.KeyServiceClient
	policy  pb.PolicyServiceClient
	audit   pb.AuditServiceClient

	windows windows // of requests to sign

	// ctx ends with Close; streams live in it, not in the context of the
	// request that happened to open them.
	ctx    context.Context
	cancel context.CancelFunc

	// mu guards current, opening and the end of ctx. It is held for look-ups,
	// never while a stream is opened, so that nobody waits longer than its own
	// context for that.
	mu      sync.Mutex
	current *stream
	opening *opening // nil: no stream is being opened

	// wg counts the goroutines of streams. It grows under mu while ctx lives,
	// or in one of those goroutines; so Close waits for all.
	wg sync.WaitGroup
}

// Dial makes a client. It does not connect: the first call does. Close it.
func Dial(c Config) (*Client, error) {
	if c.Address == "" || c.TLS == nil {
		return nil, errors.New("client: Config lacks an address or TLS")
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	target, opts := c.target()
	conn, err := grpc.NewClient(target, append(opts,
		grpc.WithTransportCredentials(alerting{credentials.NewTLS(c.TLS)}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 3 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
	)...)
	if err != nil {
		return nil, fmt.Errorf("address %q: %w", c.Address, err)
	}
	cl := &Client{
		address: c.String(), conn: conn, log: c.Logger,
		signing: pb.NewSigningServiceClient(conn), keys: pb.NewKeyServiceClient(conn),
		policy: pb.NewPolicyServiceClient(conn), audit: pb.NewAuditServiceClient(conn),
	}
	cl.ctx, cl.cancel = context.WithCancel(context.Background())
	return cl, nil
}

// String names the gateway in messages to a person.
func (c *Config) String() string { return strings.Join(c.addresses(), ", ") }

func (c *Config) addresses() []string { return append([]string{c.Address}, c.Replicas...) }

// overReplicas has gRPC begin calls and streams with each address in turn, but
// for those that cannot be reached, or say that they do not sign: their token or
// their store does not work, or they are about to end.
var overReplicas = fmt.Sprintf(`{"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": %q}}`, pb.SigningService_ServiceDesc.ServiceName)

// target is what to connect to, and how where there are replicas.
func (c *Config) target() (string, []grpc.DialOption) {
	if len(c.Replicas) == 0 {
		return "dns:///" + c.Address, nil
	}
	var list []resolver.Address
	for _, a := range c.addresses() {
		list = append(list, resolver.Address{Addr: a, ServerName: a})
	}
	r := manual.NewBuilderWithScheme("replicas")
	r.InitialState(resolver.State{Addresses: list})
	return r.Scheme() + ":///", []grpc.DialOption{grpc.WithResolvers(r), grpc.WithDefaultServiceConfig(overReplicas)}
}

// Close cuts the connection and waits for the client's goroutines. Requests in
// flight fail; nobody can tell whether the gateway has signed them.
func (c *Client) Close() error {
	c.mu.Lock()
	c.cancel()
	c.mu.Unlock()
	err := c.conn.Close()
	c.wg.Wait()
	return err
}

// Ping asks whether the gateway serves.
func (c *Client) Ping(ctx context.Context) error {
	r, err := healthpb.NewHealthClient(c.conn).Check(ctx, &healthpb.HealthCheckRequest{})
	if err != nil {
		return c.wireError(err)
	}
	if r.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		return fmt.Errorf("%w: it says %s", sigerr.Unavailable, r.GetStatus())
	}
	return nil
}

// Request asks for one signature over one digest, or one message.
type Request struct {
	// ID makes the request idempotent; empty: Sign makes one up. While a request
	// is in flight, its caller gone or not, another of its id is refused.
	ID string
	// Key is the name of the key.
	Key string
	// Digest, made by Hash: SHA-256, SHA-384 or SHA-512. Ed25519 signs its bytes.
	Digest []byte
	Hash   crypto.Hash
	// Message, in place of Digest, is what the gateway is to read and to hash with
	// Hash: at most MaxMessage bytes. See Key.Reads.
	Message []byte
	// Scheme; empty: the usual one of the key's algorithm.
	Scheme keys.Scheme
	// SaltLength is that of PSS, in bytes; 0: as long as the hash.
	SaltLength int
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

// MaxMessage bounds a Request's Message, and maxItem one item besides that, in
// bytes, as the gateway does too.
const (
	MaxMessage = pb.MaxContent
	maxItem    = 64 << 10
)

// item is the wire form of r. What could not be sent is refused here: it would
// end the stream that others share.
func (r *Request) item() (*pb.SignItem, error) {
	for _, f := range []struct{ name, value string }{{"id", r.ID}, {"key", r.Key}, {"format", r.Format}} {
		if !utf8.ValidString(f.value) {
			return nil, fmt.Errorf("%w: the %s %q is not UTF-8", sigerr.Invalid, f.name, f.value)
		}
	}
	it := &pb.SignItem{
		Id: r.ID, Key: r.Key, Digest: r.Digest, Message: r.Message, Hash: pb.HashAlgorithmOf(r.Hash),
		Scheme: pb.SignatureSchemeOf(r.Scheme), SaltLength: uint32(r.SaltLength), Format: r.Format,
	}
	if r.Claim != (Claim{}) {
		// A file's name need not be UTF-8, and is recorded all the same.
		valid := func(s string) string { return strings.ToValidUTF8(s, string(utf8.RuneError)) }
		it.Claim = &pb.Claim{
			File: valid(r.Claim.File), ContentSha256: valid(r.Claim.ContentSHA256),
			Nevra: valid(r.Claim.NEVRA), Note: valid(r.Claim.Note),
		}
	}
	if r.SaltLength < 0 || r.SaltLength > math.MaxInt32 {
		return nil, fmt.Errorf("%w: PSS salt of %d bytes", sigerr.Invalid, r.SaltLength)
	}
	if n := len(it.GetMessage()); n > MaxMessage {
		return nil, fmt.Errorf("%w: the message to be signed has %d bytes; at most %d are sent", sigerr.Invalid, n, MaxMessage)
	}
	if n := proto.Size(it) - len(it.GetMessage()); n > maxItem {
		return nil, fmt.Errorf("%w: the request has %d bytes; at most %d are sent", sigerr.Invalid, n, maxItem)
	}
	return it, nil
}

// Sign asks for one signature and waits. Call it from many goroutines to keep
// many in flight: they share a stream and its messages. Where the gateway
// cannot be reached, drains or is overloaded, the request is sent again under
// the same id, within ctx. Once it was overloaded, it is given no more requests at a time than
// it takes; the others wait for their turn, until their ctx ends.
func (c *Client) Sign(ctx context.Context, r Request) (Signature, error) {
	if r.ID == "" {
		r.ID = rand.Text()
	}
	it, err := r.item()
	if err != nil {
		return Signature{}, err
	}
	var out Signature
	err = c.persist(ctx, attempts, func() error {
		return c.windows.do(ctx, r.Key, func() error {
			res, err := c.signOnce(ctx, it)
			if err != nil {
				return err
			}
			sig := res.GetSignature()
			if sig == nil {
				return pb.FromStatus(status.FromProto(res.GetError()))
			}
			out = Signature{Bytes: sig.GetSignature(), Scheme: sig.GetScheme().Scheme(), AuditRow: sig.GetAuditRow()}
			return nil
		})
	})
	return out, err
}

// persist calls f, so many times at the most, until it succeeds or its error is one
// that does not pass; within ctx and the client's life.
func (c *Client) persist(ctx context.Context, attempts int, f func() error) error {
	pause := firstPause
	var last error
	for try := 1; ; try++ {
		err := f()
		if last != nil && ctx.Err() != nil && err != nil {
			return last // why it took so long
		}
		last = err
		again := errors.Is(err, sigerr.Unavailable) || errors.Is(err, sigerr.Overloaded)
		if r, ok := errors.AsType[interface {
			error
			RetryAfter() time.Duration
		}](err); ok {
			// A rate that allows the next one in an hour is told, not waited for.
			again = again && r.RetryAfter() <= maxRetryAfter
			pause = max(pause, r.RetryAfter())
		}
		if !again || try == attempts || c.ctx.Err() != nil {
			return err
		}
		select {
		case <-time.After(pause + mrand.N(pause)):
			pause *= 2
		case <-ctx.Done():
			return err
		}
	}
}

// maxMoves bounds how many streams an item tries, one after the other without a
// pause, when each takes no more before the item is on it.
const maxMoves = 4

// signOnce sends it over the current stream and waits for its result.
func (c *Client) signOnce(ctx context.Context, it *pb.SignItem) (*pb.SignResult, error) {
	for range maxMoves {
		s, err := c.stream(ctx)
		if err != nil {
			return nil, err
		}
		res, err := s.do(ctx, it)
		if !errors.Is(err, errMoveOn) {
			return res, err
		}
	}
	return nil, fmt.Errorf("%w: it ends every stream as soon as it is open", sigerr.Unavailable)
}

// opening is a stream on its way; s and err are set when done is closed.
type opening struct {
	done chan struct{}
	s    *stream
	err  error
}

// stream returns the current stream. Where there is none it waits, within ctx,
// for one to be opened: one, however many goroutines wait.
func (c *Client) stream(ctx context.Context) (*stream, error) {
	c.mu.Lock()
	if c.ctx.Err() != nil {
		c.mu.Unlock()
		return nil, errClosed
	}
	if c.current != nil && c.current.usable() {
		defer c.mu.Unlock()
		return c.current, nil
	}
	o := c.opening
	if o == nil {
		o = &opening{done: make(chan struct{})}
		c.opening = o
		c.wg.Go(func() {
			o.s, o.err = c.open()
			c.mu.Lock()
			c.current, c.opening = o.s, nil
			c.mu.Unlock()
			close(o.done)
		})
	}
	c.mu.Unlock()
	select {
	case <-o.done:
		return o.s, o.err
	case <-ctx.Done():
		return nil, contextError(ctx)
	}
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
	// Reads are the formats in which the gateway wants to read what it signs for
	// us: a MessageSigner is for those.
	Reads   []string
	OpenPGP *OpenPGP
	X509    []*x509.Certificate // the key's own, then its issuers'
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
		Token: k.GetToken(), TokenID: k.GetTokenId(), MaySign: k.GetMaySign(), Reads: k.GetMessageFormats(),
	}
	for _, der := range k.GetX509Chain() {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return Key{}, fmt.Errorf("certificate of %q: %w", k.GetName(), err)
		}
		out.X509 = append(out.X509, cert)
	}
	if o := k.GetOpenpgp(); o != nil {
		out.OpenPGP = &OpenPGP{UserID: o.GetUserId(), Layout: keys.Layout(o.GetLayout()), Certificate: o.GetCertificate()}
		if o.GetExpires() != nil {
			out.OpenPGP.Expires = o.GetExpires().AsTime()
		}
	}
	return out, nil
}
