package assuan

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net"
	"strconv"
	"strings"
)

const (
	maxReplyLine = 1 << 12 // more than any server is allowed to send
	maxReplyData = 1 << 20
)

// Client is a minimal client for tools and tests. It has no timeouts of its own,
// and is not safe for concurrent use.
type Client struct {
	nc net.Conn
	r  *bufio.Reader

	// Inquire answers the server's inquiries; nil cancels them.
	Inquire func(keyword, args string) ([]byte, error)
}

// Reply is what a server answered to a command.
type Reply struct {
	Data   []byte   // of all D lines, decoded
	Status []string // S lines, without the S
	Text   string   // after the OK
}

// Dial connects to the socket at path and reads the greeting.
func Dial(ctx context.Context, path string) (*Client, error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	c, err := NewClient(nc)
	if err != nil {
		nc.Close()
		return nil, err
	}
	return c, nil
}

// NewClient reads the greeting from nc. On an error nc stays the caller's to close.
func NewClient(nc net.Conn) (*Client, error) {
	c := &Client{nc: nc, r: bufio.NewReaderSize(nc, maxReplyLine)}
	_, err := c.reply()
	if err != nil {
		return nil, fmt.Errorf("reading the greeting: %w", err)
	}
	return c, nil
}

// Close closes the connection.
func (c *Client) Close() error { return c.nc.Close() }

// Transact sends one command line and reads its reply. An ERR is an *Error; the
// Reply then has what came before it.
func (c *Client) Transact(command string) (Reply, error) {
	if len(command) > MaxRequest || strings.ContainsAny(command, "\r\n") {
		return Reply{}, fmt.Errorf("assuan: command %.20q is too long, or no single line", command)
	}
	_, err := c.nc.Write([]byte(command + "\n"))
	if err != nil {
		return Reply{}, err
	}
	return c.reply()
}

func (c *Client) reply() (Reply, error) {
	var r Reply
	for {
		line, err := c.r.ReadSlice('\n')
		if err != nil {
			return r, err
		}
		line = bytes.TrimRight(line, "\r\n")
		word, rest, _ := bytes.Cut(line, []byte(" "))
		switch string(word) {
		case "OK":
			r.Text = string(rest)
			return r, nil
		case "ERR":
			return r, parseError(rest)
		case "D":
			r.Data, err = unescape(r.Data, rest)
			if err == nil && len(r.Data) > maxReplyData {
				err = fmt.Errorf("assuan: reply has more than %d bytes", maxReplyData)
			}
		case "S":
			r.Status = append(r.Status, string(rest))
		case "INQUIRE":
			keyword, args, _ := strings.Cut(string(rest), " ")
			err = c.answer(keyword, args)
		default:
			if len(word) > 0 && word[0] != '#' {
				err = fmt.Errorf("assuan: unexpected reply %q", line)
			}
		}
		if err != nil {
			return r, err
		}
	}
}

func (c *Client) answer(keyword, args string) error {
	msg := []byte("CAN\n")
	if c.Inquire != nil {
		data, err := c.Inquire(keyword, args)
		if err == nil {
			msg = append(appendData(nil, data), "END\n"...)
		}
	}
	_, err := c.nc.Write(msg)
	return err
}

func parseError(rest []byte) error {
	num, text, _ := strings.Cut(string(rest), " ")
	code, err := strconv.ParseUint(num, 10, 32)
	if err != nil || code == 0 {
		return fmt.Errorf("assuan: malformed error reply %q", rest)
	}
	return &Error{Code: uint32(code), Text: text}
}
