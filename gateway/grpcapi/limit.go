package grpcapi

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	pb "github.com/signwarden/signwarden/gateway/gatewaypb"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// The bounds on connections: in all, and of one address before it has said who
// it is, so that nobody unknown can keep the others out.
const (
	maxConnections = 4096
	maxStrangers   = 64
)

// counter bounds how many of something each name has.
type counter struct {
	max int
	mu  sync.Mutex // guards of; held for a look-up
	of  map[string]int
}

func newCounter(max int) *counter { return &counter{max: max, of: map[string]int{}} }

// enter counts one in, and returns what counts it out again, once.
func (c *counter) enter(name string) (leave func(), err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.of[name] >= c.max {
		return nil, fmt.Errorf("%w: %d are open", sigerr.Overloaded, c.of[name])
	}
	c.of[name]++
	return sync.OnceFunc(func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.of[name]--; c.of[name] == 0 {
			delete(c.of, name)
		}
	}), nil
}

// budget bounds how many bytes each name holds. Names come from certificates and
// configuration, so they are as many as those.
type budget struct {
	max int64
	mu  sync.Mutex // guards of; held for a look-up
	of  map[string]*semaphore.Weighted
}

func newBudget(max int64) *budget { return &budget{max: max, of: map[string]*semaphore.Weighted{}} }

// take waits until n bytes, at most max, are free, and returns what gives them
// back. Who waits is served in order.
func (b *budget) take(ctx context.Context, name string, n int) (give func(), err error) {
	if n == 0 {
		return func() {}, nil
	}
	b.mu.Lock()
	s := b.of[name]
	if s == nil {
		s = semaphore.NewWeighted(b.max)
		b.of[name] = s
	}
	b.mu.Unlock()
	if err := s.Acquire(ctx, int64(n)); err != nil {
		return nil, fmt.Errorf("%w: waiting for other messages of yours to be signed", sigerr.Canceled)
	}
	return func() { s.Release(int64(n)) }, nil
}

// limitListener closes connections over a bound at once: they have not said who
// they are, so they must not be able to wait in memory.
type limitListener struct {
	net.Listener
	places    chan struct{}
	strangers *counter // by address
	log       *slog.Logger
	lines     *rate.Limiter
}

func newLimitListener(l net.Listener, log *slog.Logger) *limitListener {
	return &limitListener{l, make(chan struct{}, maxConnections), newCounter(maxStrangers), log, newLineLimit()}
}

// newLineLimit bounds what peers that have not said who they are can write to
// the log.
func newLineLimit() *rate.Limiter { return rate.NewLimiter(rate.Every(time.Second), 10) }

func (l *limitListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		host, _, err := net.SplitHostPort(c.RemoteAddr().String())
		if err != nil {
			host = c.RemoteAddr().String()
		}
		known, err := l.strangers.enter(host)
		if err == nil {
			select {
			case l.places <- struct{}{}:
				return &limitConn{Conn: c, known: known, leave: sync.OnceFunc(func() { <-l.places })}, nil
			default:
				known()
			}
		}
		if l.lines.Allow() {
			l.log.Warn("too many connections; one was closed", "peer", c.RemoteAddr().String())
		}
		c.Close()
	}
}

// limitConn gives its places back: that of a stranger when it has said who it
// is or is closed, its own when it is closed.
type limitConn struct {
	net.Conn
	known, leave func()
}

func (c *limitConn) Close() error {
	defer c.leave()
	defer c.known()
	return c.Conn.Close()
}

// boundedCodec decodes no more items of a message than make it too long: two
// bytes are an item, and decoded it has a hundred.
type boundedCodec struct{ encoding.CodecV2 }

func (b boundedCodec) Unmarshal(data mem.BufferSlice, v any) error {
	m, ok := v.(*pb.SignStreamRequest)
	if !ok {
		return b.CodecV2.Unmarshal(data, v)
	}
	whole := data.Materialize()
	part := cutFields(whole, pb.MaxItems+1)
	if err := (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(part, m); err != nil {
		return err
	}
	if len(part) < len(whole) && len(m.GetItems()) <= pb.MaxItems {
		return fmt.Errorf("a message has over %d fields, and not all are items", pb.MaxItems) // none is dropped in silence
	}
	return nil
}

// malformedRest is how much of a malformed field is left for Unmarshal to find
// wrong: enough for a tag and a length.
const malformedRest = 2 * binary.MaxVarintLen64

// cutFields returns the first n fields of a message, or fewer where it has no
// more, with the beginning of one that is malformed.
func cutFields(b []byte, n int) []byte {
	at := 0
	for range n {
		_, _, size := protowire.ConsumeField(b[at:])
		if size < 0 {
			return b[:min(len(b), at+malformedRest)]
		}
		at += size
		if at == len(b) {
			break
		}
	}
	return b[:at]
}

// logging is TLS that tells the log of clients it turns away, which gRPC does
// not: an operator who is asked about a refused certificate finds it there. They
// have not said who they are, so they get so many lines and no more.
type logging struct {
	credentials.TransportCredentials
	log   *slog.Logger
	lines *rate.Limiter
}

func newLogging(c credentials.TransportCredentials, log *slog.Logger) credentials.TransportCredentials {
	return &logging{c, log, newLineLimit()}
}

func (l *logging) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := l.TransportCredentials.ServerHandshake(raw)
	if c, ok := raw.(*limitConn); ok && err == nil {
		c.known()
	}
	if err != nil && !errors.Is(err, io.EOF) && l.lines.Allow() {
		l.log.Warn("client refused", "peer", raw.RemoteAddr().String(), "error", err)
	}
	return conn, info, err
}

func (l *logging) Clone() credentials.TransportCredentials {
	return &logging{l.TransportCredentials.Clone(), l.log, l.lines}
}
