package grpcapi_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/signwarden/signwarden/gateway"
	"github.com/signwarden/signwarden/gateway/audit"
	pb "github.com/signwarden/signwarden/gateway/gatewaypb"
	"github.com/signwarden/signwarden/gateway/gatewaytest"
	"github.com/signwarden/signwarden/gateway/grpcapi"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
	"github.com/signwarden/signwarden/gateway/store"
)

// counting is a server between a client and the service: it counts what a
// client's streams carry.
type counting struct {
	pb.UnimplementedSigningServiceServer
	next                     pb.SigningServiceClient
	streams, messages, items atomic.Int64
}

func (c *counting) SignStream(st grpc.BidiStreamingServer[pb.SignStreamRequest, pb.SignStreamResponse]) error {
	c.streams.Add(1)
	next, err := c.next.SignStream(st.Context())
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		for {
			m, err := st.Recv()
			if err != nil {
				_ = next.CloseSend()
				return
			}
			c.messages.Add(1)
			c.items.Add(int64(len(m.GetItems())))
			if next.Send(m) != nil {
				return
			}
		}
	})
	for {
		m, err := next.Recv()
		if err != nil {
			return err
		}
		if err := st.Send(m); err != nil {
			return err
		}
	}
}

// stand starts a server of the test's own in the gateway's place.
func stand(t testing.TB, s *service, srv pb.SigningServiceServer) (addr string) {
	t.Helper()
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(s.tls.Config())))
	pb.RegisterSigningServiceServer(g, srv)
	return listen(t, g)
}

func TestManyOverOneStream(t *testing.T) {
	t.Parallel()
	s := serve(t, gatewaytest.New(t, ""))
	k := s.Key(t, "k", keys.Ed25519)
	c := &counting{next: pb.NewSigningServiceClient(s.raw(t, "root"))}
	cl := dial(t, profile(t, stand(t, s, c), s.ca.file, s.ca.issue(t, "root")))

	const goroutines, all = 64, 2000
	pub := public(t, k)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range goroutines {
		wg.Go(func() {
			for n := next.Add(1); n <= all; n = next.Add(1) {
				r := clientRequest("k", fmt.Sprint("id-", n))
				sig, err := cl.Sign(t.Context(), r)
				if err == nil {
					err = keys.Verify(pub, sig.Scheme, r.Hash, r.Digest, sig.Bytes)
				}
				if err != nil {
					t.Errorf("%s: %v", r.ID, err)
				}
			}
		})
	}
	wg.Wait()
	if got := c.streams.Load(); got != 1 {
		t.Errorf("%d streams, want 1", got)
	}
	if m, i := c.messages.Load(), c.items.Load(); i != all || m >= i {
		t.Errorf("%d items in %d messages; want %d, several a message", i, m, all)
	}
	rows := signed(t, s.Fixture)
	if len(rows) != all || s.Token.Signs() != all {
		t.Errorf("%d ids recorded and %d signatures, want %d", len(rows), s.Token.Signs(), all)
	}
}

func TestStreamOutOfOrder(t *testing.T) {
	t.Parallel()
	f := gatewaytest.New(t, "")
	slow, fast := f.Key(t, "slow", keys.Ed25519), f.Key(t, "fast", keys.P256)
	release := make(chan struct{})
	f.Token.Before = func(ctx context.Context, id []byte) error {
		if string(id) == string(slow.ID) {
			<-release
		}
		return nil
	}
	s := serve(t, f)
	st := openStream(t, s.raw(t, "root"))
	items := map[string]*pb.SignItem{}
	send := []*pb.SignItem{item("slow", "first")}
	for n := range 5 {
		send = append(send, item("fast", fmt.Sprint("fast-", n)))
	}
	for _, it := range send {
		items[it.GetId()] = it
	}
	st.send(send...)
	for _, r := range st.results(5) {
		it := items[r.GetId()]
		if it == nil || it.GetKey() != "fast" {
			t.Fatalf("result %v while the slow key holds", r)
		}
		checkResult(t, s, fast, it, r.GetSignature())
		delete(items, r.GetId())
	}
	close(release)
	checkResult(t, s, slow, items["first"], st.results(1)[0].GetSignature())
}

// failing is what a token answers for each key: nil: it signs.
type failing struct {
	mu sync.Mutex // guards by
	by map[string]func() error
}

func (x *failing) set(id []byte, f func() error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.by == nil {
		x.by = map[string]func() error{}
	}
	x.by[string(id)] = f
}

func (x *failing) before(_ context.Context, id []byte) error {
	x.mu.Lock()
	f := x.by[string(id)]
	x.mu.Unlock()
	if f == nil {
		return nil
	}
	return f()
}

// cannot is a token's error that says that the request itself is what it refuses.
type cannot struct{}

func (cannot) Error() string  { return "C_SignInit: slot 7" }
func (cannot) Name() string   { return "CKR_MECHANISM_INVALID" }
func (cannot) Refused() bool  { return true }
func (cannot) Gone() bool     { return false }
func (cannot) Operator() bool { return false }

// kindsPolicy lets carol sign with some keys, one of them rarely, and read others.
const kindsPolicy = gatewaytest.Policy + `
  - {name: rarely, principals: [carol], keys: [rare], may: [sign], formats: [openpgp], blind: true, rate: 1/h}
  - {name: carol, principals: [carol], keys: ["k-*"], may: [sign], formats: [openpgp], blind: true}
  - {name: reader, principals: [carol], keys: [readable], may: [read]}
`

// Every kind of error comes as its code, by item and as the unary call's
// status, and leaves the stream open.
func TestErrorOfEachKind(t *testing.T) {
	t.Parallel()
	var clock atomic.Int64 // offset
	f := gatewaytest.New(t, kindsPolicy, func(c *gateway.Config) {
		c.Now = func() time.Time { return time.Now().Add(time.Duration(clock.Load())) }
	})
	token := &failing{}
	f.Token.Before = token.before
	for name, err := range map[string]func() error{
		"k-fine": nil, "readable": nil, "hidden": nil, "rare": nil, "k-disabled": nil,
		"k-timeout":  func() error { return context.DeadlineExceeded },
		"k-canceled": func() error { return context.Canceled },
		"k-cannot":   func() error { return cannot{} },
		"k-broken":   func() error { return errors.New("CKR_DEVICE_ERROR in slot 7") },
		"k-panic":    func() error { panic("slot 7") },
	} {
		token.set(f.Key(t, name, keys.Ed25519).ID, err)
	}
	if _, err := f.SetKeyState(t.Context(), f.Root, "test", "k-disabled", keys.Disabled); err != nil {
		t.Fatal(err)
	}
	s := serve(t, f)
	conn := s.raw(t, "carol")
	st, unary := openStream(t, conn), pb.NewSigningServiceClient(conn)

	for _, it := range []*pb.SignItem{item("rare", "takes the one"), item("k-fine", "used")} {
		it.Id = "before-" + it.GetKey()
		if r := st.one(it); r.GetSignature() == nil {
			t.Fatalf("got %v, want a signature", r)
		}
	}
	short := item("k-fine", "short")
	short.Digest = short.Digest[1:]
	used := item("k-fine", "other text")
	used.Id = "before-k-fine"
	unrecorded := func() {
		s.Store.SetFail(func(store.Change) (before, after error) { return errors.New("disk full"), nil }, nil)
	}
	recorded := func() { s.Store.SetFail(nil, nil) }
	expire := func() { clock.Store(int64(24 * time.Hour)) }
	unexpire := func() { clock.Store(0) }

	covered := map[error]bool{}
	for _, tt := range []struct {
		name        string
		it          *pb.SignItem
		kind        error
		code        codes.Code
		rows        int // of the audit log, of each of two requests
		set, revert func()
	}{
		{"no such key", item("none", "1"), sigerr.NotFound, codes.NotFound, 1, nil, nil},
		{"another's key", item("hidden", "2"), sigerr.NotFound, codes.NotFound, 1, nil, nil},
		{"a key to read", item("readable", "3"), sigerr.Denied, codes.PermissionDenied, 1, nil, nil},
		{"a disabled key", item("k-disabled", "4"), sigerr.Disabled, codes.FailedPrecondition, 1, nil, nil},
		{"a short digest", short, sigerr.Invalid, codes.InvalidArgument, 1, nil, nil},
		{"an id that was used", used, sigerr.Conflict, codes.AlreadyExists, 1, nil, nil},
		{"beyond the rate", item("rare", "7"), sigerr.Overloaded, codes.ResourceExhausted, 1, nil, nil},
		{"a token that is late", item("k-timeout", "8"), sigerr.Timeout, codes.DeadlineExceeded, 1, nil, nil},
		{"a token that was told to stop", item("k-canceled", "9"), sigerr.Canceled, codes.Canceled, 1, nil, nil},
		{"a token that cannot", item("k-cannot", "13"), sigerr.Unsupported, codes.Unimplemented, 1, nil, nil},
		{"a token that fails", item("k-broken", "10"), sigerr.TokenFailed, codes.Internal, 1, nil, nil},
		{"a store that fails", item("k-fine", "11"), sigerr.Unavailable, codes.Unavailable, 0, unrecorded, recorded},
		{"an expired certificate", item("k-fine", "12"), sigerr.Unauthenticated, codes.Unauthenticated, 0, expire, unexpire},
	} {
		t.Run(tt.name, func(t *testing.T) {
			covered[tt.kind] = true
			if tt.set != nil {
				tt.set()
			}
			rows := len(s.Store.Entries(t))
			item := status.FromProto(st.one(tt.it).GetError())
			_, err := unary.Sign(t.Context(), &pb.SignRequest{Item: tt.it})
			if tt.revert != nil {
				tt.revert()
			}
			for where, got := range map[string]*status.Status{"item": item, "unary": status.Convert(err)} {
				if got.Code() != tt.code || !errors.Is(pb.FromStatus(got), tt.kind) {
					t.Errorf("%s: got %v, want %v", where, got, tt.code)
				}
				if has := retryInfo(got) != nil; has != (tt.code == codes.ResourceExhausted) {
					t.Errorf("%s: got %v with retry info %v", where, got, has)
				}
			}
			if got := len(s.Store.Entries(t)) - rows; got != 2*tt.rows {
				t.Errorf("%d audit rows, want %d", got, 2*tt.rows)
			}
		})
	}
	for _, k := range sigerr.Kinds() {
		if !covered[k] {
			t.Errorf("no case for %v", k)
		}
	}

	// A panic is nobody else's business, and its text nobody's.
	for where, got := range map[string]*status.Status{
		"item": status.FromProto(st.one(item("k-panic", "13")).GetError()),
		"unary": func() *status.Status {
			_, err := unary.Sign(t.Context(), &pb.SignRequest{Item: item("k-panic", "14")})
			return status.Convert(err)
		}(),
	} {
		if got.Code() != codes.Unknown || got.Message() != "internal error; the gateway's log tells more" {
			t.Errorf("%s: a panic became %v", where, got)
		}
	}
	// The stream has outlived them all.
	if r := st.one(item("k-fine", "last")); r.GetSignature() == nil {
		t.Errorf("at last: got %v, want a signature", r)
	}
}

func TestWindow(t *testing.T) {
	t.Parallel()
	f := gatewaytest.New(t, "")
	k := f.Key(t, "k", keys.Ed25519)
	entered, release := make(chan struct{}, 1000), make(chan struct{})
	f.Token.Before = func(context.Context, []byte) error {
		entered <- struct{}{}
		<-release
		return nil
	}
	s := serve(t, f, func(c *grpcapi.Config) { c.Window = 4 })
	st := openStream(t, s.raw(t, "root"))
	if st.window != 4 {
		t.Errorf("window %d, want 4", st.window)
	}
	var items []*pb.SignItem
	byID := map[string]*pb.SignItem{}
	for n := range 10 {
		items = append(items, item("k", fmt.Sprint("id-", n)))
		byID[items[n].GetId()] = items[n]
	}
	st.send(items...)
	over := map[string]bool{}
	for _, r := range st.results(6) {
		got := status.FromProto(r.GetError())
		if got.Code() != codes.ResourceExhausted || retryInfo(got) == nil {
			t.Errorf("%s: got %v, want ResourceExhausted with retry info", r.GetId(), r)
		}
		over[r.GetId()] = true
	}
	close(release)
	for _, r := range st.results(4) {
		if over[r.GetId()] {
			t.Errorf("%s is answered twice", r.GetId())
		}
		checkResult(t, s, k, byID[r.GetId()], r.GetSignature())
	}
	// Who has the answers has the places: the window can be filled at once.
	for n := range 100 {
		st.send(item("k", fmt.Sprint(n, "-a")), item("k", fmt.Sprint(n, "-b")), item("k", fmt.Sprint(n, "-c")), item("k", fmt.Sprint(n, "-d")))
		for _, r := range st.results(4) {
			if r.GetSignature() == nil {
				t.Fatalf("round %d: got %v, want a signature", n, r)
			}
		}
	}
	if got := s.Token.Signs(); got != 404 {
		t.Errorf("the token signed %d times, want 404", got)
	}
}

func TestMessageBounds(t *testing.T) {
	t.Parallel()
	s := serve(t, gatewaytest.New(t, ""))
	k := s.Key(t, "k", keys.Ed25519)
	conn := s.raw(t, "root")
	many := func(n int) []*pb.SignItem {
		out := make([]*pb.SignItem, n)
		for i := range out {
			out[i] = item("k", fmt.Sprint("id-", i))
		}
		return out
	}
	large := func(key, id string, n int) *pb.SignItem {
		it := item(key, id)
		it.Claim = &pb.Claim{Note: string(make([]byte, n))}
		return it
	}

	t.Run("256 items", func(t *testing.T) {
		st := openStream(t, conn)
		items := many(pb.MaxItems)
		st.send(items...)
		for _, r := range st.results(len(items)) {
			if r.GetSignature() == nil {
				t.Errorf("got %v, want a signature", r)
			}
		}
		if st.messages >= len(items) {
			t.Errorf("%d results in %d messages, want several a message", len(items), st.messages)
		}
	})
	for _, tt := range []struct {
		name  string
		items []*pb.SignItem
		code  codes.Code
	}{
		{"257 items", many(pb.MaxItems + 1), codes.InvalidArgument},
		{"more than a mebibyte", []*pb.SignItem{large("k", "large", pb.MaxMessage)}, codes.ResourceExhausted},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := s.Token.Signs()
			st := openStream(t, conn)
			st.send(tt.items...)
			_, err := st.st.Recv()
			if status.Code(err) != tt.code {
				t.Errorf("got %v, want %v", err, tt.code)
			}
			t.Log(err)
			if got := s.Token.Signs(); got != before {
				t.Errorf("the token signed %d times", got-before)
			}
		})
	}
	// An item that is too large, or cannot be matched, is refused by itself.
	st := openStream(t, conn)
	before := s.Token.Signs()
	none := item("k", "")
	for _, it := range []*pb.SignItem{large("k", "large", 64<<10), none} {
		if got := status.FromProto(st.one(it).GetError()); got.Code() != codes.InvalidArgument {
			t.Errorf("item %q: got %v, want InvalidArgument", it.GetId(), got)
		}
	}
	if _, err := pb.NewSigningServiceClient(conn).Sign(t.Context(), &pb.SignRequest{Item: large("k", "large", 64<<10)}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a large unary request: got %v, want InvalidArgument", err)
	}
	// An error's text repeats a client's words, and does not grow with them.
	long := item("k", "long")
	long.Format = string(make([]byte, 60<<10))
	if got := status.FromProto(st.one(long).GetError()); got.Code() != codes.InvalidArgument || len(got.Message()) > 4<<10 {
		t.Errorf("a long format: got %v with %d bytes", got.Code(), len(got.Message()))
	}
	if s.Token.Signs() != before {
		t.Errorf("the token signed %d of those", s.Token.Signs()-before)
	}
	it := item("k", "at-last")
	checkResult(t, s, k, it, st.one(it).GetSignature())
}

// What an administrator does holds for the next request of an open stream.
func TestChangesOnOpenStream(t *testing.T) {
	t.Parallel()
	f := gatewaytest.New(t, kindsPolicy)
	k := f.Key(t, "k-1", keys.Ed25519)
	s := serve(t, f)
	st := openStream(t, s.raw(t, "carol"))
	n := 0
	expect := func(step string, want codes.Code) {
		t.Helper()
		n++
		before := s.Token.Signs()
		it := item("k-1", fmt.Sprint("id-", n))
		r := st.one(it)
		if want == codes.OK {
			checkResult(t, s, k, it, r.GetSignature())
			return
		}
		if got := status.FromProto(r.GetError()); got.Code() != want {
			t.Errorf("%s: got %v, want %v", step, got, want)
		}
		if e := s.Store.Last(t); e.Outcome != audit.Denied || e.Request != it.GetId() {
			t.Errorf("%s: audit entry %+v, want denied", step, e)
		}
		if s.Token.Signs() != before {
			t.Errorf("%s: the request reached the token", step)
		}
	}
	state := func(to keys.State) {
		t.Helper()
		if _, err := f.SetKeyState(t.Context(), f.Root, "test", "k-1", to); err != nil {
			t.Fatal(err)
		}
	}
	policy := func(source string) {
		t.Helper()
		if _, err := f.ApplyPolicy(t.Context(), f.Root, "test", []byte(source)); err != nil {
			t.Fatal(err)
		}
	}
	expect("at first", codes.OK)
	state(keys.Disabled)
	expect("disabled", codes.FailedPrecondition)
	state(keys.Enabled)
	expect("enabled", codes.OK)
	policy(gatewaytest.Policy)
	expect("no rule", codes.NotFound)
	policy(kindsPolicy)
	expect("the rule again", codes.OK)
}
