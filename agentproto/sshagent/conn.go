package sshagent

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"time"

	"golang.org/x/crypto/ssh"
)

// Message numbers (draft-ietf-sshm-ssh-agent section 6.1).
const (
	msgFailure           = 5
	msgRequestIdentities = 11
	msgIdentitiesAnswer  = 12
	msgSignRequest       = 13
	msgSignResponse      = 14
	msgExtension         = 27
)

// refused names the requests that exist and are refused, for our log.
var refused = map[byte]string{
	17: "add a key", 18: "remove a key", 19: "remove all keys", 20: "add a smart card's keys", 21: "remove a smart card's keys",
	22: "lock", 23: "unlock", 25: "add a key with constraints", 26: "add a smart card's keys with constraints",
	// Of the first protocol; ssh-add -D sends 9 as well.
	1: "list the keys of SSH 1", 3: "answer a challenge of SSH 1", 7: "add a key of SSH 1", 8: "remove a key of SSH 1", 9: "remove all keys of SSH 1",
	24: "add a key of SSH 1 with constraints",
}

// conn is one connection. Its requests run one after the other.
type conn struct {
	srv     *Server
	nc      net.Conn
	ctx     context.Context
	keys    Keys
	program string // for the audit log
	log     *slog.Logger
}

// serve answers requests until the client hangs up between two of them, which is no
// error, or ctx ends.
func (c *conn) serve() error {
	stop := context.AfterFunc(c.ctx, func() { c.nc.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	r := bufio.NewReaderSize(c.nc, 4<<10)
	for {
		request, err := c.read(r)
		if errors.Is(err, io.EOF) || c.ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		if err := c.write(c.answer(request)); err != nil {
			return err
		}
	}
}

// read reads one request. It waits for its first byte as long as the connection lets
// it: git and ssh hold connections open.
func (c *conn) read(r *bufio.Reader) ([]byte, error) {
	if err := c.setReadDeadline(time.Time{}); err != nil {
		return nil, err
	}
	if _, err := r.Peek(1); err != nil {
		return nil, err
	}
	if err := c.setReadDeadline(time.Now().Add(c.srv.cfg.FrameTimeout)); err != nil {
		return nil, err
	}
	var size [4]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, noEOF(err)
	}
	n := binary.BigEndian.Uint32(size[:])
	if n == 0 || n > MaxRequest {
		return nil, fmt.Errorf("a request of %d bytes; 1 to %d are read", n, MaxRequest)
	}
	request := make([]byte, n)
	_, err := io.ReadFull(r, request)
	return request, noEOF(err)
}

// noEOF tells an end within a request from one between two.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// setReadDeadline looks at ctx after it has set the deadline, so that the one
// which the end of ctx sets is never overwritten for good.
func (c *conn) setReadDeadline(t time.Time) error {
	err := c.nc.SetReadDeadline(t)
	if err != nil {
		return err
	}
	return c.ctx.Err()
}

func (c *conn) write(reply []byte) error {
	err := c.nc.SetWriteDeadline(time.Now().Add(c.srv.cfg.FrameTimeout))
	if err != nil {
		return err
	}
	_, err = c.nc.Write(append(binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(reply)), uint32(len(reply))), reply...))
	return err
}

// answer is the reply to one request; every error becomes SSH_AGENT_FAILURE here.
func (c *conn) answer(request []byte) []byte {
	switch request[0] {
	case msgRequestIdentities:
		reply, err := c.list(request)
		if err == nil {
			return reply
		}
		c.warn("the list of keys is refused", "err", err)
	case msgSignRequest:
		reply, f := c.sign(request)
		if f == nil {
			return reply
		}
		c.warn("signature refused", "request", f.request, "key", f.key, "format", f.format, "algorithm", f.algorithm, "err", f.err)
	case msgExtension:
		// ssh tells each agent of the host it connects to (session-bind@openssh.com), and
		// goes on without.
		c.log.Debug("extension refused")
	default:
		name, ok := refused[request[0]]
		if !ok {
			name = fmt.Sprintf("message %d", request[0])
		}
		c.warn("request refused: keys are the gateway's, and are made and removed there", "what", name)
	}
	return []byte{msgFailure}
}

// list is the answer to SSH_AGENTC_REQUEST_IDENTITIES.
func (c *conn) list(request []byte) ([]byte, error) {
	if len(request) != 1 {
		return nil, fmt.Errorf("%d bytes follow the request", len(request)-1)
	}
	shown, err := c.shown()
	if err != nil {
		return nil, err
	}
	reply := []byte{msgIdentitiesAnswer, 0, 0, 0, 0}
	n := uint32(0)
	for _, k := range shown {
		next := ssh.Marshal(struct {
			Blob    []byte
			Comment string
		}{k.blob, k.name})
		if n == MaxKeys || len(reply)+len(next) > MaxReply {
			c.warn("there are more keys than a client takes: bound the socket's keys", "keys", len(shown), "listed", n)
			break
		}
		reply = append(reply, next...)
		n++
	}
	binary.BigEndian.PutUint32(reply[1:], n)
	return reply, nil
}

func (c *conn) warn(words string, attrs ...any) {
	c.srv.warnings.Log(c.ctx, c.log, slog.LevelWarn, words, attrs...)
}
