// Package grpcapi serves the gateway over gRPC with mutual TLS. It turns each
// message into a call of package gateway and each error into a status by one
// table; it decides nothing. Who the caller is comes from the verified client
// certificate of the connection, on every call.
package grpcapi

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"

	"github.com/signwarden/signwarden/gateway"
	pb "github.com/signwarden/signwarden/gateway/gatewaypb"
	"github.com/signwarden/signwarden/gateway/ident"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// The bounds that hold where Config leaves them zero, and those that always do.
const (
	DefaultWindow       = 512              // unanswered items of one stream
	DefaultDrainTimeout = 25 * time.Second // for streams to finish

	maxConcurrentStreams   = 16               // of one connection
	maxStreamsPerPrincipal = 64               // SignStreams, over all connections
	maxHeaderList          = 16 << 10         // bytes of a request's headers
	connectionTimeout      = 10 * time.Second // for a handshake
	maxConnectionIdle      = 10 * time.Minute // without a stream

	maxItem = 64 << 10 // bytes of one item but for its message: a window of them is kept in memory
	// maxContent bounds the bytes of messages of one principal that are being
	// received and signed. A stream that would go beyond is read no further for a
	// while, so what it sends stays with its sender.
	maxContent = 64 << 20
	maxText    = 2 << 10 // bytes of an error's text: in a header others take no more
)

// Config is what a Server is made of. The parts must not change after New.
type Config struct {
	Gateway *gateway.Gateway
	// TLS is called for each connection. It must ask for and verify client
	// certificates; LoadTLS makes such a configuration.
	TLS          func() *tls.Config
	Window       int
	DrainTimeout time.Duration
	Logger       *slog.Logger // nil: discards
}

// Server is a gRPC server. It is safe for concurrent use.
type Server struct {
	c      Config
	log    *slog.Logger
	grpc   *grpc.Server
	health *health.Server

	streams *counter // SignStreams of each principal
	content *budget  // messages of each principal

	drain     chan struct{} // closed when streams are to move on
	drainOnce sync.Once
}

// New makes a server. Serve it, and end it with Shutdown.
func New(c Config) (*Server, error) {
	if c.Gateway == nil || c.TLS == nil {
		return nil, errors.New("grpcapi: Config lacks a gateway or TLS")
	}
	if c.Window == 0 {
		c.Window = DefaultWindow
	}
	if c.DrainTimeout == 0 {
		c.DrainTimeout = DefaultDrainTimeout
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Server{c: c, log: c.Logger, drain: make(chan struct{}), health: health.NewServer(), streams: newCounter(maxStreamsPerPrincipal), content: newBudget(maxContent)}
	s.grpc = grpc.NewServer(
		grpc.Creds(newLogging(credentials.NewTLS(&tls.Config{
			MinVersion:         tls.VersionTLS13,
			GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return c.TLS(), nil },
		}), c.Logger)),
		grpc.MaxRecvMsgSize(pb.MaxMessage),
		grpc.MaxHeaderListSize(maxHeaderList),
		grpc.ForceServerCodecV2(boundedCodec{encoding.GetCodecV2(proto.Name)}),
		grpc.MaxConcurrentStreams(maxConcurrentStreams),
		grpc.ConnectionTimeout(connectionTimeout),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time: 30 * time.Second, Timeout: 10 * time.Second, MaxConnectionIdle: maxConnectionIdle,
		}),
		grpc.WaitForHandlers(true),
		grpc.UnaryInterceptor(s.unary),
		grpc.StreamInterceptor(s.stream),
	)
	pb.RegisterSigningServiceServer(s.grpc, &signing{s: s})
	pb.RegisterKeyServiceServer(s.grpc, &admin{s: s})
	pb.RegisterPolicyServiceServer(s.grpc, &admin{s: s})
	pb.RegisterAuditServiceServer(s.grpc, &admin{s: s})
	healthpb.RegisterHealthServer(s.grpc, s.health)
	s.SetReady(true)
	reflection.Register(s.grpc)
	return s, nil
}

// signingService is the name under which a health check asks whether signatures
// can be had. The empty name tells that the process lives.
var signingService = pb.SigningService_ServiceDesc.ServiceName

// SetReady says whether signatures can be had: a token and a store that work.
// It is what the health of the signing service tells; that of the process ("")
// is serving until Shutdown. A server begins as one that is ready.
func (s *Server) SetReady(ready bool) {
	status := healthpb.HealthCheckResponse_NOT_SERVING
	if ready {
		status = healthpb.HealthCheckResponse_SERVING
	}
	s.health.SetServingStatus(signingService, status) // after Shutdown it stays as it is
}

// Serve accepts connections on l until Shutdown.
func (s *Server) Serve(l net.Listener) error {
	err := s.grpc.Serve(newLimitListener(l, s.log))
	if errors.Is(err, grpc.ErrServerStopped) { // Shutdown came first
		return nil
	}
	return err
}

// Shutdown asks every stream to move on, takes no new ones, and waits for what
// is in flight, at most DrainTimeout; then it cuts. It returns when no request
// is under way: after a cut, requests that are at the token are waited for, as
// long as gateway.Config.SignTimeout lets them.
func (s *Server) Shutdown() {
	s.health.Shutdown()
	s.drainOnce.Do(func() { close(s.drain) })
	stopped := make(chan struct{})
	cut := time.AfterFunc(s.c.DrainTimeout, func() {
		defer close(stopped)
		s.grpc.Stop()
	})
	s.grpc.GracefulStop()
	if !cut.Stop() {
		<-stopped
	}
}

type principalKey struct{}

// principal is who the interceptors found the caller to be.
func principal(ctx context.Context) ident.Principal {
	p, _ := ctx.Value(principalKey{}).(ident.Principal)
	return p // the zero Principal, which everything refuses, where there is none
}

// identify puts the connection's principal into the context.
func identify(ctx context.Context) (context.Context, error) {
	pr, ok := peer.FromContext(ctx)
	if !ok {
		return nil, sigerr.Unauthenticated
	}
	info, ok := pr.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return nil, sigerr.Unauthenticated
	}
	p, err := ident.FromTLS(info.State)
	if err != nil {
		// Of this kind whatever else it wraps, such as a name that is invalid.
		return nil, status.Error(codes.Unauthenticated, err.Error())
	}
	return context.WithValue(ctx, principalKey{}, p), nil
}

func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (resp any, err error) {
	defer s.recovered(info.FullMethod, &err)
	ctx, err = identify(ctx)
	if err != nil {
		return nil, s.wire(info.FullMethod, err)
	}
	resp, err = handle(ctx, req)
	return resp, s.wire(info.FullMethod, err)
}

// identified is a stream whose context has the principal.
type identified struct {
	grpc.ServerStream
	ctx context.Context
}

func (i identified) Context() context.Context { return i.ctx }

func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) (err error) {
	defer s.recovered(info.FullMethod, &err)
	ctx, err := identify(ss.Context())
	if err != nil {
		return s.wire(info.FullMethod, err)
	}
	return s.wire(info.FullMethod, handle(srv, identified{ss, ctx}))
}

// recovered turns a panic into Unknown: one request must not end the others.
func (s *Server) recovered(method string, err *error) {
	if r := recover(); r != nil {
		s.log.Error("panic", "method", method, "value", r, "stack", string(debug.Stack()))
		*err = status.Error(codes.Unknown, "internal error; the gateway's log tells more")
	}
}

// wire turns an error into a status. What is a status already (from gRPC
// itself, its health service, an unimplemented method) stays as it is.
func (s *Server) wire(method string, err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok && sigerr.Kind(err) == nil {
		return err
	}
	return s.status(method, err).Err()
}

func (s *Server) status(method string, err error) *status.Status {
	st, known := pb.ToStatus(err)
	if !known {
		s.log.Error("request failed", "method", method, "error", err)
	}
	if len(st.Message()) > maxText {
		p := st.Proto()
		p.Message = strings.ToValidUTF8(p.GetMessage()[:maxText], "") + " ..."
		st = status.FromProto(p)
	}
	return st
}
