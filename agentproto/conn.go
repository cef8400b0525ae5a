package agentproto

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// conn is a connection whose every read and write is bounded by the idle
// timeout. A protocol's own deadlines may only shorten it.
type conn struct {
	net.Conn
	idle time.Duration

	// mu guards the fields below and orders the setting of deadlines: once
	// draining is set no later call moves the read deadline into the future again.
	// It is not held across a read or a write.
	mu       sync.Mutex
	read     time.Time // the protocol's deadlines; zero is none
	write    time.Time
	draining bool
}

func (c *conn) Read(b []byte) (int, error) {
	err := c.armRead()
	if err != nil {
		return 0, err
	}
	n, err := c.Conn.Read(b)
	if errors.Is(err, os.ErrDeadlineExceeded) && c.isDraining() {
		return n, io.EOF
	}
	return n, err
}

func (c *conn) Write(b []byte) (int, error) {
	c.mu.Lock()
	err := c.Conn.SetWriteDeadline(earlier(c.write, time.Now().Add(c.idle)))
	c.mu.Unlock()
	if err != nil {
		return 0, err
	}
	return c.Conn.Write(b)
}

func (c *conn) armRead() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.draining {
		return io.EOF
	}
	return c.Conn.SetReadDeadline(earlier(c.read, time.Now().Add(c.idle)))
}

func (c *conn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.read = t
	if c.draining {
		return nil
	}
	return c.Conn.SetReadDeadline(t)
}

func (c *conn) SetWriteDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.write = t
	return c.Conn.SetWriteDeadline(t)
}

func (c *conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// drain makes a read that waits, and every later one, report io.EOF.
func (c *conn) drain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.draining = true
	c.Conn.SetReadDeadline(time.Unix(1, 0)) // a failure means that it is closed already
}

func (c *conn) isDraining() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.draining
}

func earlier(a, b time.Time) time.Time {
	if !a.IsZero() && a.Before(b) {
		return a
	}
	return b
}
