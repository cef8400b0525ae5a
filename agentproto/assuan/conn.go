package assuan

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"net"
	"strings"
	"time"
)

// Conn is the server's side of one connection, as a Handler sees it. What it
// writes is buffered until the command ends, or the client must answer. It is not
// safe for concurrent use.
type Conn struct {
	nc   net.Conn
	r    *bufio.Reader
	w    *bufio.Writer
	cfg  Config
	done func() error // the error of the connection's ctx

	okText string
	hangup bool
	buf    []byte
}

func newConn(ctx context.Context, nc net.Conn, cfg Config) *Conn {
	return &Conn{
		nc: nc,
		// One line with CR and LF fits, and no more: a longer line fills the buffer
		// and is told at once, without waiting for its end.
		r:    bufio.NewReaderSize(nc, MaxRequest+2),
		w:    bufio.NewWriterSize(deadlineWriter{nc, cfg.WriteTimeout}, 2048),
		cfg:  cfg,
		done: ctx.Err,
	}
}

// deadlineWriter bounds each write, so that a client that does not read cannot hold the server.
type deadlineWriter struct {
	nc      net.Conn
	timeout time.Duration
}

func (w deadlineWriter) Write(b []byte) (int, error) {
	err := w.nc.SetWriteDeadline(time.Now().Add(w.timeout))
	if err != nil {
		return 0, err
	}
	return w.nc.Write(b)
}

// readLine returns the next line without its LF and CR; it is valid until the
// next call. Replies are sent before it waits.
func (c *Conn) readLine() ([]byte, error) {
	if !c.lineBuffered() {
		err := c.w.Flush()
		if err != nil {
			return nil, err
		}
		err = c.awaitLine()
		if err != nil {
			return nil, err
		}
	}
	line, err := c.r.ReadSlice('\n')
	if errors.Is(err, bufio.ErrBufferFull) {
		return nil, ErrLineTooLong
	}
	if err != nil {
		return nil, err
	}
	line = bytes.TrimSuffix(line[:len(line)-1], []byte("\r"))
	if len(line) > MaxRequest {
		return nil, ErrLineTooLong
	}
	return line, nil
}

func (c *Conn) lineBuffered() bool {
	b, _ := c.r.Peek(c.r.Buffered()) // never reads
	return bytes.IndexByte(b, '\n') >= 0
}

// awaitLine waits for a line to begin, long, and then lets the deadline be the
// short one within which the rest of it must come.
func (c *Conn) awaitLine() error {
	err := c.setReadDeadline(c.cfg.IdleTimeout)
	if err != nil {
		return err
	}
	_, err = c.r.Peek(1)
	if err != nil {
		return err
	}
	if c.lineBuffered() {
		return nil
	}
	return c.setReadDeadline(c.cfg.LineTimeout)
}

// setReadDeadline looks at ctx after it has set the deadline, so that the one
// which the end of ctx sets is never overwritten for good.
func (c *Conn) setReadDeadline(d time.Duration) error {
	err := c.nc.SetReadDeadline(time.Now().Add(d))
	if err != nil {
		return err
	}
	return c.done()
}

// writeLine adds a line of text to the replies.
func (c *Conn) writeLine(text string) error {
	c.buf = appendLine(c.buf[:0], text)
	_, err := c.w.Write(c.buf)
	return err
}

// Data sends b as D lines. Several calls in a command are one datum to the client.
func (c *Conn) Data(b []byte) error {
	c.buf = appendData(c.buf[:0], b)
	_, err := c.w.Write(c.buf)
	return err
}

// Status sends an S line.
func (c *Conn) Status(keyword string, args ...string) error {
	return c.writeLine("S " + strings.Join(append([]string{keyword}, args...), " "))
}

// Comment sends a line that clients ignore.
func (c *Conn) Comment(text string) error { return c.writeLine("# " + text) }

// SetOK sets the text after the OK of the present command.
func (c *Conn) SetOK(text string) { c.okText = text }

// Hangup ends the connection after the reply of the present command.
func (c *Conn) Hangup() { c.hangup = true }

// LocalPath is the path of the socket that the client connected to.
func (c *Conn) LocalPath() string { return c.nc.LocalAddr().String() }

// Inquire asks the client for data of at most limit bytes and waits for it. A
// client that cancels, or sends more, gives an *Error that is the command's reply.
func (c *Conn) Inquire(keyword, args string, limit int) ([]byte, error) {
	err := c.writeLine(strings.TrimRight("INQUIRE "+keyword+" "+args, " "))
	if err != nil {
		return nil, err
	}
	var data []byte
	// Each line counts with its overhead, so that empty D lines do not go on for ever.
	for wire := 0; wire <= 4*(limit+MaxRequest); {
		line, err := c.readLine()
		if err != nil {
			return nil, err
		}
		wire += len(line) + 1
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		word, rest, _ := bytes.Cut(line, []byte(" "))
		switch strings.ToUpper(string(word)) {
		case "D":
			// Beyond the limit lines are still read, up to END, but not kept.
			if len(data) > limit {
				continue
			}
			data, err = unescape(data, rest)
			if err != nil {
				c.Hangup()
				return nil, errBadEscape
			}
		case "END":
			if len(data) > limit {
				return nil, errTooMuchData
			}
			return data, nil
		case "CAN", "CANCEL": // libassuan sends CAN, a script of gpg-connect-agent CANCEL
			return nil, errCanceled
		default:
			return nil, errUnexpected
		}
	}
	c.Hangup() // the client has not ended its answer, so it cannot be followed any more
	return nil, errTooMuchData
}
