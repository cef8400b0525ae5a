package grpcapi

import (
	"io"
	"log/slog"
	"net"
	"testing"
)

// Connections over the bound are closed at once, and a place that is given back
// is used again.
func TestLimitListener(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := newLimitListener(inner, 2, slog.New(slog.DiscardHandler))
	defer l.Close()
	accepted := make(chan net.Conn, 4)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	dial := func() net.Conn {
		t.Helper()
		c, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	dial()
	dial()
	first := <-accepted
	<-accepted
	third := dial()
	if _, err := third.Read(make([]byte, 1)); err == nil {
		t.Error("the third of two is served")
	} else if ne, ok := err.(net.Error); err != io.EOF && ok && ne.Timeout() {
		t.Errorf("the third of two waits: %v", err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if err := first.Close(); err == nil {
		t.Error("closed twice without an error")
	}
	dial()
	<-accepted
	if len(accepted) != 0 {
		t.Error("closing twice gave two places back")
	}
}
