package grpcapi_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/signwarden/signwarden/gateway/audit"
	"github.com/signwarden/signwarden/gateway/client"
	pb "github.com/signwarden/signwarden/gateway/gatewaypb"
	"github.com/signwarden/signwarden/gateway/gatewaytest"
	"github.com/signwarden/signwarden/gateway/grpcapi"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// outcome is what a Sign in another goroutine returned.
type outcome struct {
	sig client.Signature
	err error
}

func signLater(ctx context.Context, c *client.Client, r client.Request) <-chan outcome {
	out := make(chan outcome, 1)
	go func() {
		sig, err := c.Sign(ctx, r)
		out <- outcome{sig, err}
	}()
	return out
}

// The server dies with a request at the token, and another takes its place: the
// client sends again under the same id, and the signature is made once.
func TestServerKilled(t *testing.T) {
	t.Parallel()
	f := gatewaytest.New(t, "")
	k := f.Key(t, "k", keys.P256)
	h := hold(t, f)
	s := serve(t, f)
	t.Cleanup(h.let)
	cl := s.client(t, "root")
	r := clientRequest("k", "id")
	answer := signLater(t.Context(), cl, r)
	<-h.entered
	s.listener.kill()
	s.start(t)
	wait(t, "the client to connect again", func() bool { return s.listener.accepted() > 0 })
	h.let()
	got := <-answer
	if got.err != nil {
		t.Fatal(got.err)
	}
	checkSignature(t, s, k, r.ID, r.Hash, r.Digest, got.sig)
	if n := signed(t, f)[r.ID]; n != 1 || f.Token.Signs() != 1 {
		t.Errorf("recorded %d times and signed %d times, want once", n, f.Token.Signs())
	}
}

// A gateway that starts anew is asked for a key until it is there.
func TestKeyOfAStartingGateway(t *testing.T) {
	t.Parallel()
	f := gatewaytest.New(t, "")
	k := f.Key(t, "k", keys.P256)
	s := serve(t, f)
	cl := s.client(t, "root")
	s.listener.kill()
	var l net.Listener
	wait(t, "the address to be free", func() (free bool) {
		var err error
		l, err = net.Listen("tcp", s.addr)
		return err == nil
	})
	got := make(chan error, 1)
	go func() {
		key, err := cl.Key(t.Context(), "k")
		if err == nil && !bytes.Equal(key.SPKI, k.Public) {
			err = errors.New("it is another key")
		}
		got <- err
	}()
	c, err := l.Accept() // the first attempt
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	l.Close()
	s.start(t)
	if err := <-got; err != nil {
		t.Fatal(err)
	}
}

// A request that is refused for overload is sent again.
func TestOverloadIsRetried(t *testing.T) {
	t.Parallel()
	f := gatewaytest.New(t, "")
	k := f.Key(t, "k", keys.P256)
	var calls atomic.Int64
	f.Token.Before = func(context.Context, []byte) error {
		if calls.Add(1) < 3 {
			return busy{}
		}
		return nil
	}
	s := serve(t, f)
	r := clientRequest("k", "id")
	sig, err := s.client(t, "root").Sign(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	checkSignature(t, s, k, r.ID, r.Hash, r.Digest, sig)
	if calls.Load() != 3 {
		t.Errorf("the token was asked %d times, want 3", calls.Load())
	}
}

type busy struct{}

func (busy) Error() string { return "busy" }
func (busy) Busy() bool    { return true }

// deadline is a context whose deadline passes when the test says so.
type deadline struct {
	context.Context
	passed chan struct{}
}

func (d deadline) Done() <-chan struct{} { return d.passed }

func (d deadline) Err() error {
	select {
	case <-d.passed:
		return context.DeadlineExceeded
	default:
		return nil
	}
}

func TestContexts(t *testing.T) {
	t.Parallel()
	f := gatewaytest.New(t, "")
	k := f.Key(t, "k", keys.Ed25519)
	h := hold(t, f)
	s := serve(t, f, func(c *grpcapi.Config) { c.Window = 2 })
	t.Cleanup(h.let)
	cl := s.client(t, "root")

	ctx, cancel := context.WithCancel(t.Context())
	canceled := signLater(ctx, cl, clientRequest("k", "canceled"))
	<-h.entered
	cancel()
	if got := <-canceled; !errors.Is(got.err, sigerr.Canceled) || got.sig.Bytes != nil {
		t.Errorf("cancelled: got %v, want Canceled", got)
	}
	short := func() context.Context {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		t.Cleanup(cancel)
		return ctx
	}
	late := deadline{t.Context(), make(chan struct{})}
	answered := signLater(late, cl, clientRequest("k", "late"))
	<-h.entered
	close(late.passed)
	if got := <-answered; !errors.Is(got.err, sigerr.Timeout) {
		t.Errorf("a deadline at the token: got %v, want Timeout", got.err)
	}
	// Both places are taken by what nobody waits for any more.
	if _, err := cl.Sign(short(), clientRequest("k", "no-place")); !errors.Is(err, sigerr.Timeout) {
		t.Errorf("a deadline before there is a place: got %v, want Timeout", err)
	}
	if got := s.Token.Signs(); got != 2 {
		t.Errorf("%d requests reached the token, want 2", got)
	}
	third := clientRequest("k", "third")
	answer := signLater(t.Context(), cl, third)
	h.let()
	got := <-answer
	if got.err != nil {
		t.Fatalf("after the answers have come: %v", got.err)
	}
	checkSignature(t, s, k, third.ID, third.Hash, third.Digest, got.sig)
	// What was given up is signed once, and can be had under its id.
	for _, id := range []string{"canceled", "late"} {
		again := clientRequest("k", id)
		sig, err := cl.Sign(t.Context(), again)
		for errors.Is(err, sigerr.Conflict) { // its answer is still on its way
			sig, err = cl.Sign(t.Context(), again)
		}
		if err != nil {
			t.Fatal(err)
		}
		checkSignature(t, s, k, again.ID, again.Hash, again.Digest, sig)
	}
	if rows := signed(t, f); rows["canceled"] != 1 || rows["late"] != 1 || rows["no-place"] != 0 || s.Token.Signs() != 3 {
		t.Errorf("recorded %v, and %d signatures", rows, s.Token.Signs())
	}
}

func TestClose(t *testing.T) {
	t.Parallel()
	f := gatewaytest.New(t, "")
	f.Key(t, "k", keys.Ed25519)
	h := hold(t, f)
	s := serve(t, f)
	t.Cleanup(h.let)
	cl := s.client(t, "root")
	var answers []<-chan outcome
	for n := range 8 {
		answers = append(answers, signLater(t.Context(), cl, clientRequest("k", fmt.Sprint("id-", n))))
	}
	for range answers {
		<-h.entered
	}
	cl.Close()
	for _, a := range answers {
		if got := <-a; !errors.Is(got.err, sigerr.Canceled) || !strings.Contains(got.err.Error(), "closed") {
			t.Errorf("got %v, want Canceled that says closed", got.err)
		}
	}
	if _, err := cl.Sign(t.Context(), clientRequest("k", "after")); !errors.Is(err, sigerr.Canceled) {
		t.Errorf("after Close: got %v, want Canceled", err)
	}
	if err := cl.Ping(t.Context()); !errors.Is(err, sigerr.Canceled) {
		t.Errorf("a ping after Close: got %v, want Canceled", err)
	}
}

// Close and Sign at the same moment leave nothing running.
func TestCloseWhileOpening(t *testing.T) {
	t.Parallel()
	s := serve(t, gatewaytest.New(t, ""))
	s.Key(t, "k", keys.Ed25519)
	conf := s.profile(t, "root")
	for range 20 {
		cl := dial(t, conf)
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				if _, err := cl.Sign(t.Context(), client.Request{Key: "k"}); err == nil {
					t.Error("a request without a digest was signed")
				}
			})
		}
		wg.Go(func() { cl.Close() })
		wg.Wait()
	}
}

func TestUnreachable(t *testing.T) {
	t.Parallel()
	s := serve(t, gatewaytest.New(t, ""))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	cl := dial(t, profile(t, addr, s.ca.file, s.ca.issue(t, "root")))
	ping := cl.Ping(t.Context())
	_, sign := cl.Sign(t.Context(), clientRequest("k", "id"))
	_, list := cl.Keys(t.Context())
	for name, err := range map[string]error{"ping": ping, "sign": sign, "keys": list} {
		if !errors.Is(err, sigerr.Unavailable) || !strings.Contains(err.Error(), addr) || !strings.Contains(err.Error(), "nothing listens") {
			t.Errorf("%s: got %v, want Unavailable that says that nothing listens at %s", name, err, addr)
		}
		t.Log(name, err)
	}
}

// A gateway that lacks a call is older, and its token no part of that.
func TestOlderGateway(t *testing.T) {
	t.Parallel()
	s := serve(t, gatewaytest.New(t, ""))
	addr := listen(t, grpc.NewServer(grpc.Creds(credentials.NewTLS(s.tls.Config()))))
	_, err := dial(t, profile(t, addr, s.ca.file, s.ca.issue(t, "root"))).AdoptKey(t.Context(), client.Adoption{Name: "k", TokenID: []byte("k")})
	if err == nil || sigerr.Kind(err) != nil || !strings.Contains(err.Error(), "older") || !strings.Contains(err.Error(), addr) {
		t.Errorf("got %v", err)
	}
}

// While a stream is being opened, everybody waits no longer than he wants to.
func TestNobodyAnswers(t *testing.T) {
	t.Parallel()
	s := serve(t, gatewaytest.New(t, ""))
	l, err := net.Listen("tcp", "127.0.0.1:0") // and nobody accepts
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	cl := dial(t, profile(t, l.Addr().String(), s.ca.file, s.ca.issue(t, "root")))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	patient := signLater(ctx, cl, clientRequest("k", "patient"))
	for n := range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		_, err := cl.Sign(ctx, clientRequest("k", fmt.Sprint("hurried-", n)))
		cancel()
		if !errors.Is(err, sigerr.Timeout) {
			t.Errorf("with a deadline: got %v, want Timeout", err)
		}
	}
	select {
	case got := <-patient:
		t.Errorf("the one without a deadline has ended with %v", got.err)
	default:
	}
	cancel()
	if got := <-patient; !errors.Is(got.err, sigerr.Canceled) {
		t.Errorf("cancelled: got %v, want Canceled", got.err)
	}
}

// ending is a server that ends its streams as it is told to.
type ending struct {
	pb.UnimplementedSigningServiceServer
	window  uint32
	streams atomic.Int64
}

func (e *ending) SignStream(st grpc.BidiStreamingServer[pb.SignStreamRequest, pb.SignStreamResponse]) error {
	e.streams.Add(1)
	return st.Send(&pb.SignStreamResponse{Settings: &pb.Settings{Window: e.window}})
}

// A server that makes no sense is not asked for ever.
func TestHostileServer(t *testing.T) {
	t.Parallel()
	s := serve(t, gatewaytest.New(t, ""))
	for _, tt := range []struct {
		name   string
		window uint32
	}{
		{"ends each stream", 1 << 31},
		{"no window", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			e := &ending{window: tt.window}
			cl := dial(t, profile(t, stand(t, s, e), s.ca.file, s.ca.issue(t, "root")))
			_, err := cl.Sign(t.Context(), clientRequest("k", "id"))
			if !errors.Is(err, sigerr.Unavailable) {
				t.Errorf("got %v, want Unavailable", err)
			}
			if n := e.streams.Load(); n > 40 {
				t.Errorf("%d streams were opened", n)
			}
			t.Log(e.streams.Load(), err)
		})
	}
}

// What cannot be sent is refused before, and does others no harm.
func TestUnsendable(t *testing.T) {
	t.Parallel()
	s := serve(t, gatewaytest.New(t, ""))
	k := s.Key(t, "k", keys.Ed25519)
	c := &counting{next: pb.NewSigningServiceClient(s.raw(t, "root"))}
	cl := dial(t, profile(t, stand(t, s, c), s.ca.file, s.ca.issue(t, "root")))
	for name, change := range map[string]func(*client.Request){
		"large":                  func(r *client.Request) { r.Claim.Note = strings.Repeat("x", 64<<10) },
		"an id of bytes":         func(r *client.Request) { r.ID = "\xff" },
		"a key of bytes":         func(r *client.Request) { r.Key = "\xff" },
		"a format of bytes":      func(r *client.Request) { r.Format = "\xff" },
		"a digest of a mebibyte": func(r *client.Request) { r.Digest = make([]byte, 1<<20) },
	} {
		r := clientRequest("k", "id")
		change(&r)
		if _, err := cl.Sign(t.Context(), r); !errors.Is(err, sigerr.Invalid) {
			t.Errorf("%s: got %v, want Invalid", name, err)
		}
	}
	if n := c.items.Load(); n != 0 {
		t.Errorf("%d of them were sent", n)
	}
	if _, err := cl.Key(t.Context(), "\xff"); err == nil {
		t.Error("a key's name of bytes was found")
	}
	// A file's name may be bytes.
	r := clientRequest("k", "file")
	r.Claim.File = "a\xffb"
	sig, err := cl.Sign(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	checkSignature(t, s, k, r.ID, r.Hash, r.Digest, sig)
	if e := s.Store.Last(t); e.ClaimFile != "a\uFFFDb" {
		t.Errorf("the claim is recorded as %q", e.ClaimFile)
	}
	if got := c.streams.Load(); got != 1 {
		t.Errorf("%d streams, want 1", got)
	}
}

// Errors that arise at the gateway keep their kind, and are not sent again.
func TestClientErrors(t *testing.T) {
	t.Parallel()
	f := gatewaytest.New(t, kindsPolicy)
	f.Key(t, "k-1", keys.Ed25519)
	f.Key(t, "readable", keys.Ed25519)
	f.Key(t, "hidden", keys.Ed25519)
	s := serve(t, f)
	cl := s.client(t, "carol")
	for _, tt := range []struct {
		key    string
		change func(*client.Request)
		kind   error
	}{
		{"none", nil, sigerr.NotFound},
		{"hidden", nil, sigerr.NotFound},
		{"readable", nil, sigerr.Denied},
		{"k-1", func(r *client.Request) { r.Format = "rpm" }, sigerr.Denied},
		{"k-1", func(r *client.Request) { r.Hash = 0 }, sigerr.Invalid},
	} {
		r := clientRequest(tt.key, "id-"+tt.key)
		if tt.change != nil {
			tt.change(&r)
		}
		rows := len(s.Store.Entries(t))
		_, err := cl.Sign(t.Context(), r)
		if sigerr.Kind(err) != tt.kind {
			t.Errorf("%s: got %v, want %v", tt.key, err, tt.kind)
		}
		if got := len(s.Store.Entries(t)) - rows; got != 1 || s.Store.Last(t).Outcome != audit.Denied {
			t.Errorf("%s: %d audit rows, the last %+v; want one denial", tt.key, got, s.Store.Last(t))
		}
	}
	if s.Token.Signs() != 0 {
		t.Errorf("the token signed %d times", s.Token.Signs())
	}
}

// The same id twice in flight is one request too many; they must not be mixed up.
func TestSameIDInFlight(t *testing.T) {
	t.Parallel()
	f := gatewaytest.New(t, "")
	k := f.Key(t, "k", keys.Ed25519)
	h := hold(t, f)
	s := serve(t, f)
	t.Cleanup(h.let)
	cl := s.client(t, "root")
	r := clientRequest("k", "id")
	answer := signLater(t.Context(), cl, r)
	<-h.entered
	other := clientRequest("k", "other")
	other.ID = "id"
	if _, err := cl.Sign(t.Context(), other); !errors.Is(err, sigerr.Conflict) {
		t.Errorf("got %v, want Conflict", err)
	}
	h.let()
	got := <-answer
	if got.err != nil {
		t.Fatal(got.err)
	}
	checkSignature(t, s, k, r.ID, r.Hash, r.Digest, got.sig)
}

func TestSession(t *testing.T) {
	t.Parallel()
	f := gatewaytest.New(t, kindsPolicy)
	k := f.Key(t, "k-1", keys.Ed25519)
	f.Key(t, "readable", keys.Ed25519)
	f.Key(t, "hidden", keys.Ed25519)
	s := serve(t, f)
	ses, err := s.client(t, "carol").Session(t.Context(), "openpgp")
	if err != nil {
		t.Fatal(err)
	}
	all, err := ses.PublicKeys(t.Context())
	if err != nil || len(all) != 1 || all["k-1"] == nil {
		t.Errorf("got %v, %v; want the one key that carol signs with", all, err)
	}
	it := item("k-1", "text")
	sum := sha256.Sum256([]byte("text"))
	sig, err := ses.Sign(t.Context(), "k-1", it.GetHash().Hash(), sum[:], "note")
	if err == nil {
		err = keys.Verify(public(t, k), keys.EdDSA, it.GetHash().Hash(), sum[:], sig)
	}
	if err != nil {
		t.Error(err)
	}
	if e := s.Store.Last(t); e.Outcome != audit.Signed || e.ClaimNote != "note" || e.Format != "openpgp" || e.Principal != "carol" {
		t.Errorf("audit entry %+v", e)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { ses.Run(ctx) })
	cancel()
	wg.Wait()
}
