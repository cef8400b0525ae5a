package grpcapi_test

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signwarden/signwarden/gateway/client"
	"github.com/signwarden/signwarden/gateway/gatewaytest"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// replicas serves one gateway at n addresses, as processes that share a store
// and a token do.
func replicas(t *testing.T, n int) []*service {
	t.Helper()
	first := serve(t, gatewaytest.New(t, ""))
	all := []*service{first}
	for range n - 1 {
		s := &service{Fixture: first.Fixture, ca: first.ca, tls: first.tls, addr: "127.0.0.1:0"}
		s.start(t)
		all = append(all, s)
	}
	return all
}

// dialAll makes a client of all replicas.
func dialAll(t *testing.T, all []*service) *client.Client {
	t.Helper()
	conf := all[0].profile(t, "root")
	for _, s := range all[1:] {
		conf.Replicas = append(conf.Replicas, s.addr)
	}
	return dial(t, conf)
}

// Requests go on while replicas are killed, drain and come back, one at a time;
// each is recorded once, and the replica that is left has signed.
func TestReplicas(t *testing.T) {
	t.Parallel()
	all := replicas(t, 3)
	all[0].Key(t, "k", keys.Ed25519)
	c := dialAll(t, all)
	var stop atomic.Bool
	var made atomic.Int64
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := 0; !stop.Load(); i++ {
				if _, err := c.Sign(t.Context(), clientRequest("k", fmt.Sprintf("id-%d-%d", w, i))); err != nil {
					t.Errorf("a request: %v", err)
					return
				}
				made.Add(1)
			}
		})
	}
	more := func() {
		t.Helper()
		n := made.Load()
		wait(t, "more requests to succeed", func() bool { return made.Load() > n+50 || t.Failed() })
	}
	for i, s := range all {
		more()
		if i == 1 {
			s.server.Shutdown()
		} else {
			s.listener.kill()
		}
		more()
		s.start(t)
	}
	more()
	stop.Store(true)
	wg.Wait()
	for id, n := range signed(t, all[0].Fixture) {
		if n != 1 {
			t.Errorf("%s is recorded %d times", id, n)
		}
	}
	for i, s := range all {
		t.Logf("replica %d: %d connections since its start", i, s.listener.accepted())
	}
}

// Where one replica is left, or one was never there, everything goes to it; with
// none the answer is Unavailable and names them all.
func TestLastReplica(t *testing.T) {
	t.Parallel()
	all := replicas(t, 2)
	all[0].Key(t, "k", keys.Ed25519)
	all[0].listener.kill()
	c := dialAll(t, all)
	for i := range 20 {
		if _, err := c.Sign(t.Context(), clientRequest("k", fmt.Sprintf("id-%d", i))); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Keys(t.Context()); err != nil {
		t.Error(err)
	}
	all[1].listener.kill()
	_, err := c.Sign(t.Context(), clientRequest("k", "none"))
	if !errors.Is(err, sigerr.Unavailable) {
		t.Errorf("got %v, want Unavailable", err)
	}
}

// A client that watches a replica's health does not keep it from ending.
func TestShutdownOfWatchedReplica(t *testing.T) {
	t.Parallel()
	all := replicas(t, 2)
	all[0].Key(t, "k", keys.Ed25519)
	c := dialAll(t, all)
	wait(t, "connections to both", func() bool {
		if _, err := c.Keys(t.Context()); err != nil {
			t.Fatal(err)
		}
		return all[0].listener.accepted() > 0 && all[1].listener.accepted() > 0
	})
	ended := make(chan struct{})
	go func() { all[0].server.Shutdown(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(15 * time.Second): // DrainTimeout is 25 s
		t.Error("the replica waits for its health's watcher")
		<-ended
	}
	if _, err := c.Sign(t.Context(), clientRequest("k", "id")); err != nil {
		t.Error(err)
	}
}
