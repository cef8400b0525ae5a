package p11rpc

import (
	"bufio"
	"fmt"
	"net"
)

// firstCode is the number of p11-kit's first request.
const firstCode = 0x10

// Client is a minimal client for tools and tests. It has no timeouts of its own.
// One goroutine may send while another receives.
type Client struct {
	nc   net.Conn
	r    *bufio.Reader
	code uint32

	// Version is the one that was settled on.
	Version byte
}

// NewClient says version on nc and reads the answer. On an error nc stays the
// caller's to close.
func NewClient(nc net.Conn, version byte) (*Client, error) {
	_, err := nc.Write([]byte{version})
	if err != nil {
		return nil, err
	}
	c := &Client{nc: nc, r: bufio.NewReader(nc), code: firstCode}
	c.Version, err = c.r.ReadByte()
	if err != nil {
		return nil, fmt.Errorf("reading the server's version: %w", err)
	}
	return c, nil
}

// Close closes the connection.
func (c *Client) Close() error { return c.nc.Close() }

// Send sends a request and returns its number.
func (c *Client) Send(id CallID, args ...Value) (uint32, error) {
	body, err := Message{id, args}.AppendRequest(nil)
	if err != nil {
		return 0, err
	}
	return c.SendBody(body)
}

// SendBody sends a request whose body is given.
func (c *Client) SendBody(body []byte) (uint32, error) {
	code := c.code
	c.code++
	_, err := c.nc.Write(append(appendHeader(nil, code, len(body)), body...))
	return code, err
}

// Receive reads the next response and the number of its request. The error is an RV
// if the server answered one.
func (c *Client) Receive() (uint32, []Value, error) {
	h, err := readHeader(c.r)
	if err != nil {
		return 0, nil, err
	}
	if h.body > MaxBody {
		return h.code, nil, fmt.Errorf("%w: response of %d bytes", errMalformed, h.body)
	}
	body, err := readBody(c.r, h)
	if err != nil {
		return h.code, nil, err
	}
	m, err := ParseResponse(body)
	if err != nil {
		return h.code, nil, err
	}
	return h.code, m.Values, nil
}

// Call sends a request and waits for its response; no other may be in flight.
func (c *Client) Call(id CallID, args ...Value) ([]Value, error) {
	code, err := c.Send(id, args...)
	if err != nil {
		return nil, err
	}
	got, values, err := c.Receive()
	if got != code && (err == nil || got != 0) {
		return nil, fmt.Errorf("response to request %d, want %d", got, code)
	}
	return values, err
}
