package grpcapi

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/credentials"
)

// limitListener closes connections over a bound at once: they have not said who
// they are, so they must not be able to wait in memory.
type limitListener struct {
	net.Listener
	places chan struct{}
	log    *slog.Logger
}

func newLimitListener(l net.Listener, n int, log *slog.Logger) net.Listener {
	return &limitListener{l, make(chan struct{}, n), log}
}

func (l *limitListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		select {
		case l.places <- struct{}{}:
			return &limitConn{Conn: c, leave: sync.OnceFunc(func() { <-l.places })}, nil
		default:
			l.log.Warn("too many connections; one was closed", "peer", c.RemoteAddr().String(), "bound", cap(l.places))
			c.Close()
		}
	}
}

type limitConn struct {
	net.Conn
	leave func()
}

func (c *limitConn) Close() error {
	defer c.leave()
	return c.Conn.Close()
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
	return &logging{c, log, rate.NewLimiter(rate.Every(time.Second), 10)}
}

func (l *logging) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := l.TransportCredentials.ServerHandshake(raw)
	if err != nil && !errors.Is(err, io.EOF) && l.lines.Allow() {
		l.log.Warn("client refused", "peer", raw.RemoteAddr().String(), "error", err)
	}
	return conn, info, err
}

func (l *logging) Clone() credentials.TransportCredentials {
	return &logging{l.TransportCredentials.Clone(), l.log, l.lines}
}
