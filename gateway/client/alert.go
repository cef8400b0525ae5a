package client

import (
	"context"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"
)

// alerting is TLS whose connections tell why the gateway has ended them. With
// TLS 1.3 a client that is refused hears of it after its own handshake has
// succeeded (RFC 8446 section 4.4.2.4), when it is writing already: without
// this it may be told "broken pipe" and not the gateway's alert.
type alerting struct {
	credentials.TransportCredentials
}

func (a alerting) Clone() credentials.TransportCredentials {
	return alerting{a.TransportCredentials.Clone()}
}

func (a alerting) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := a.TransportCredentials.ClientHandshake(ctx, authority, raw)
	if err != nil {
		return nil, nil, err
	}
	return &alertConn{Conn: conn, ended: make(chan struct{})}, info, nil
}

// alertTimeout bounds how long a write that has failed waits for the read to
// fail too. Both fail for the same reason, so it does not wait so long.
const alertTimeout = time.Second

// alertConn answers a write that fails with the error of the read, where gRPC's
// reader, which reads all the time, gets one too.
type alertConn struct {
	net.Conn
	once  sync.Once
	ended chan struct{} // closed when a read has failed; err is set before
	err   error
}

func (c *alertConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err != nil {
		c.once.Do(func() { c.err = err; close(c.ended) })
	}
	return n, err
}

func (c *alertConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if err == nil {
		return n, nil
	}
	t := time.NewTimer(alertTimeout)
	defer t.Stop()
	select {
	case <-c.ended:
		return n, c.err
	case <-t.C:
		return n, err
	}
}
