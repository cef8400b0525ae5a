package p11token_test

import (
	"bytes"
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signwarden/signwarden/agentproto"
	"github.com/signwarden/signwarden/agentproto/internal/p11capture"
	"github.com/signwarden/signwarden/agentproto/p11token"
)

// tape is a connection whose client has said everything that it will say.
type tape struct {
	net.Conn // nil: the rest is not called
	r        *bytes.Reader
	mu       sync.Mutex
	out      int
}

func (c *tape) Read(b []byte) (int, error) { return c.r.Read(b) }

func (c *tape) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.out += len(b)
	return len(b), nil
}

func (c *tape) Close() error                     { return nil }
func (c *tape) SetReadDeadline(time.Time) error  { return nil }
func (c *tape) SetWriteDeadline(time.Time) error { return nil }

// FuzzConn: whatever a client says, nothing panics, and the connection ends with it.
func FuzzConn(f *testing.F) {
	for _, conn := range p11capture.Read(f, "../p11rpc/testdata") {
		stream := []byte{conn.Version}
		for _, m := range conn.Messages {
			if m.Request {
				stream = binary.BigEndian.AppendUint32(stream, uint32(m.Code))
				stream = binary.BigEndian.AppendUint32(stream, 6)
				stream = binary.BigEndian.AppendUint32(stream, uint32(len(m.Body)))
				stream = append(append(stream, "client"...), m.Body...)
			}
		}
		// The handles of the captures' own server are made ours.
		for from, to := range map[string]string{
			"\x00\x00\x00\x00\x00\x00\x00\x11": "\x00\x00\x00\x00\x00\x00\x00\x01",
			"\x00\x00\x00\x00\x00\x00\x00\x12": "\x00\x00\x00\x00\x00\x00\x00\x01",
		} {
			stream = bytes.ReplaceAll(stream, []byte(from), []byte(to))
		}
		f.Add(stream)
	}
	keys := newSoftKeys("p256", "ed", "rsa")
	var log bytes.Buffer
	var mu sync.Mutex
	srv, err := p11token.New(p11token.Config{Keys: keysFor(keys), Logger: slog.New(slog.NewTextHandler(locked{&mu, &log}, nil))})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, stream []byte) {
		c := &tape{r: bytes.NewReader(stream)}
		srv.ServeConn(t.Context(), c, agentproto.Peer{})
		if len(stream) > 0 && c.out == 0 {
			t.Error("no version was answered")
		}
		keys.takeCalls()
		mu.Lock()
		defer mu.Unlock()
		if strings.Contains(log.String(), "panic") {
			t.Error(log.String())
		}
		log.Reset()
	})
}

type locked struct {
	mu *sync.Mutex
	w  io.Writer
}

func (l locked) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(b)
}
