package grpcapi

import (
	"log/slog"
	"net"
	"sync"
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
