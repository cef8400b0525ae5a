package grpcapi_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	pb "github.com/signwarden/signwarden/gateway/gatewaypb"
	"github.com/signwarden/signwarden/gateway/gatewaytest"
	"github.com/signwarden/signwarden/gateway/grpcapi"
	"github.com/signwarden/signwarden/gateway/keys"
)

// A gateway is replaced while a client signs, and nobody sees it.
func TestShutdownUnderLoad(t *testing.T) {
	t.Parallel()
	s := serve(t, gatewaytest.New(t, ""))
	k := s.Key(t, "k", keys.Ed25519)
	pub := public(t, k)
	cl := s.client(t, "root")
	const goroutines = 16
	var made atomic.Int64
	var stop atomic.Bool
	var wg sync.WaitGroup
	var ids sync.Map
	for g := range goroutines {
		wg.Go(func() {
			for n := 0; !stop.Load(); n++ {
				r := clientRequest("k", fmt.Sprintf("%d-%d", g, n))
				sig, err := cl.Sign(t.Context(), r)
				if err == nil {
					err = keys.Verify(pub, sig.Scheme, r.Hash, r.Digest, sig.Bytes)
				}
				if err != nil {
					t.Errorf("%s: %v", r.ID, err)
					return
				}
				ids.Store(r.ID, true)
				made.Add(1)
			}
		})
	}
	more := func() {
		want := made.Load() + 10*goroutines
		wait(t, "more signatures", func() bool { return made.Load() >= want || t.Failed() })
	}
	more()
	for range 2 {
		old := s.server
		var down sync.WaitGroup
		down.Go(old.Shutdown)
		s.start(t) // when the old listener is closed; the old streams may drain still
		more()
		down.Wait()
		more()
	}
	stop.Store(true)
	wg.Wait()
	rows := signed(t, s.Fixture)
	for id, n := range rows {
		if _, ok := ids.Load(id); !ok || n != 1 {
			t.Errorf("%s: recorded %d times, and returned %v; want once", id, n, ok)
		}
	}
	if int64(len(rows)) != made.Load() || int64(s.Token.Signs()) != made.Load() {
		t.Errorf("%d ids recorded, %d signatures made and %d returned", len(rows), s.Token.Signs(), made.Load())
	}
}

// held is a token that signs when it is told to.
type held struct {
	entered chan struct{}
	release chan struct{}
	once    sync.Once
}

// hold makes f's token wait. The test releases it, at the latest at its end.
func hold(t *testing.T, f *gatewaytest.Fixture) *held {
	t.Helper()
	h := &held{entered: make(chan struct{}, 1000), release: make(chan struct{})}
	f.Token.Before = func(context.Context, []byte) error {
		h.entered <- struct{}{}
		<-h.release
		return nil
	}
	return h
}

func (h *held) let() { h.once.Do(func() { close(h.release) }) }

// What is in flight at a shutdown is answered.
func TestShutdownAnswers(t *testing.T) {
	t.Parallel()
	f := gatewaytest.New(t, "")
	k := f.Key(t, "k", keys.Ed25519)
	h := hold(t, f)
	s := serve(t, f)
	t.Cleanup(h.let)
	conn := s.raw(t, "root")
	st := openStream(t, conn)
	items := []*pb.SignItem{item("k", "a"), item("k", "b"), item("k", "c")}
	st.send(items...)
	for range items {
		<-h.entered
	}
	unary := make(chan error, 1)
	go func() {
		_, err := pb.NewSigningServiceClient(conn).Sign(t.Context(), &pb.SignRequest{Item: item("k", "d")})
		unary <- err
	}()
	<-h.entered
	var wg sync.WaitGroup
	wg.Go(s.server.Shutdown)
	m, err := st.st.Recv()
	if err != nil || m.GetDrain() == nil {
		t.Fatalf("got %v, %v; want a drain", m, err)
	}
	// An item sent after the drain was on its way, and is answered too.
	late := item("k", "late")
	st.send(late)
	<-h.entered
	h.let()
	byID := map[string]*pb.SignItem{"late": late}
	for _, it := range items {
		byID[it.GetId()] = it
	}
	for _, r := range st.results(4) {
		checkResult(t, s, k, byID[r.GetId()], r.GetSignature())
		delete(byID, r.GetId())
	}
	if err := st.st.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if m, err := st.st.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("after the last answer: got %v, %v; want the stream's end", m, err)
	}
	if err := <-unary; err != nil {
		t.Errorf("the unary call in flight: %v", err)
	}
	wg.Wait()
	// Another time does nothing.
	s.server.Shutdown()
}

// A client that does not move on is cut.
func TestShutdownCuts(t *testing.T) {
	t.Parallel()
	s := serve(t, gatewaytest.New(t, ""), func(c *grpcapi.Config) { c.DrainTimeout = 50 * time.Millisecond })
	conn := s.raw(t, "root")
	st := openStream(t, conn)
	watch, err := healthpb.NewHealthClient(conn).Watch(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if m, err := watch.Recv(); err != nil || m.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Fatalf("health: got %v, %v", m, err)
	}
	s.server.Shutdown() // returns
	if m, err := st.st.Recv(); err != nil || m.GetDrain() == nil {
		t.Fatalf("got %v, %v; want a drain", m, err)
	}
	if _, err := st.st.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("the hung stream ended with %v, want Unavailable", err)
	}
	if m, err := watch.Recv(); err != nil || m.GetStatus() != healthpb.HealthCheckResponse_NOT_SERVING {
		t.Errorf("health: got %v, %v; want not serving", m, err)
	}
}

// A client that sends and never reads costs its window, and no more; it does
// not keep the server from stopping.
func TestClientThatDoesNotRead(t *testing.T) {
	t.Parallel()
	s := serve(t, gatewaytest.New(t, ""), func(c *grpcapi.Config) { c.Window, c.DrainTimeout = 8, 50*time.Millisecond })
	s.Key(t, "k", keys.RSA4096)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	st, err := pb.NewSigningServiceClient(s.raw(t, "root")).SignStream(ctx)
	if err != nil {
		t.Fatal(err)
	}
	bad := item("k", "bad")
	bad.Format = string(make([]byte, 2000)) // its answer is long
	batch := make([]*pb.SignItem, 64)
	for n := range batch {
		batch[n] = bad
	}
	var sent atomic.Int64
	var wg sync.WaitGroup
	wg.Go(func() {
		for st.Send(&pb.SignStreamRequest{Items: batch}) == nil {
			sent.Add(1)
		}
	})
	// It stalls: with everybody's buffers full, nobody takes more.
	last, same := int64(-1), 0
	wait(t, "the client to stall", func() bool {
		if n := sent.Load(); n != last {
			last, same = n, 0
		} else {
			same++
		}
		return same > 200
	})
	s.server.Shutdown() // returns
	wg.Wait()
}
