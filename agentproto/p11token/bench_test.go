package p11token_test

import (
	"context"
	"crypto"
	"io"
	"log/slog"
	"net"
	"testing"

	"github.com/signwarden/signwarden/agentproto"
	"github.com/signwarden/signwarden/agentproto/p11rpc"
	"github.com/signwarden/signwarden/agentproto/p11token"
)

// fixedKeys has an answer ready, so that what is measured is ours.
type fixedKeys struct {
	*softKeys
	sig []byte
}

func (k fixedKeys) SignWith(context.Context, string, crypto.SignerOpts, []byte, string) ([]byte, error) {
	return k.sig, nil
}

// BenchmarkSign is one signature through a Unix socket: C_SignInit and C_Sign, each with its
// round trip, by one client that waits for its answers.
func BenchmarkSign(b *testing.B) {
	keys := fixedKeys{newSoftKeys("p256"), make([]byte, 64)}
	srv, err := p11token.New(p11token.Config{Keys: keysFor(keys), Logger: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		b.Fatal(err)
	}
	l, err := net.Listen("unix", b.TempDir()+"/s")
	if err != nil {
		b.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := l.Accept()
		if err == nil {
			srv.ServeConn(context.Background(), c, agentproto.Peer{})
		}
	}()
	nc, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	rpc, err := p11rpc.NewClient(nc, 2)
	if err != nil {
		b.Fatal(err)
	}
	c := &client{rpc, nc}
	c.must(b, p11rpc.Initialize, initArgs...)
	c.session(b, 1)
	h, digest := c.handle(b, 1, private, "p256"), make([]byte, 32)
	for b.Loop() {
		c.must(b, p11rpc.SignInit, u(1), mech(0x1041), u(h))
		c.must(b, p11rpc.Sign, u(1), p11rpc.B(digest), room(512))
	}
	c.Close()
	<-done
	l.Close()
}
