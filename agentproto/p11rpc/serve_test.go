package p11rpc_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/signwarden/signwarden/agentproto/p11rpc"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// served is a connection whose other end is served.
type served struct {
	*p11rpc.Client
	nc  net.Conn
	end chan error // what Serve returned
}

// serve serves cfg on one end of a pipe until the test ends. version is what the client says.
func serve(t *testing.T, cfg p11rpc.Config, version byte) *served {
	t.Helper()
	near, far := net.Pipe()
	return serveOn(t, t.Context(), near, far, cfg, version)
}

func serveOn(t *testing.T, ctx context.Context, near, far net.Conn, cfg p11rpc.Config, version byte) *served {
	t.Helper()
	s := &served{nc: near, end: make(chan error, 1)}
	var wg sync.WaitGroup
	wg.Go(func() {
		defer far.Close()
		s.end <- p11rpc.Serve(ctx, far, cfg)
	})
	t.Cleanup(func() { near.Close(); wg.Wait() })
	var err error
	s.Client, err = p11rpc.NewClient(near, version)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// socketPair is a connection whose ends can be closed one by one, as those of a pipe cannot.
func socketPair(t *testing.T) (near, far net.Conn) {
	t.Helper()
	l, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	near, err = net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	far, err = l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return near, far
}

// wantRV calls and expects an error.
func (s *served) wantRV(t *testing.T, want p11rpc.RV, id p11rpc.CallID, args ...p11rpc.Value) {
	t.Helper()
	_, err := s.Call(id, args...)
	if rv, ok := errors.AsType[p11rpc.RV](err); !ok || rv != want {
		t.Errorf("%v: %v, want %v", id, err, want)
	}
}

// numbers answers GetSessionInfo, whose first result it makes the session's number.
func numbers(_ context.Context, args []p11rpc.Value) ([]p11rpc.Value, error) {
	return []p11rpc.Value{p11rpc.U(args[0].Num), p11rpc.U(0), p11rpc.U(0), p11rpc.U(0)}, nil
}

// alive asserts that the connection still answers.
func (s *served) alive(t *testing.T) {
	t.Helper()
	got, err := s.Call(p11rpc.GetSessionInfo, p11rpc.U(77))
	if err != nil || got[0].Num != 77 {
		t.Errorf("the connection answers %v, %v", got, err)
	}
}

var infoOnly = p11rpc.Config{Calls: map[p11rpc.CallID]p11rpc.Handler{p11rpc.GetSessionInfo: numbers}}

func TestVersions(t *testing.T) {
	for theirs, want := range map[byte]byte{0: 0, 1: 1, 2: 2, 3: 2, 255: 2} {
		s := serve(t, infoOnly, theirs)
		if s.Version != want {
			t.Errorf("to version %d the answer is %d, want %d", theirs, s.Version, want)
		}
		s.alive(t)
	}
}

// What is not served, not known or of another signature is told so, and the connection goes on.
func TestNotSupported(t *testing.T) {
	s := serve(t, infoOnly, 2)
	ask := func(b []byte) error {
		_, err := s.SendBody(b)
		if err != nil {
			t.Fatal(err)
		}
		_, _, err = s.Receive()
		return err
	}
	for id := range uint32(100) {
		want := p11rpc.FunctionNotSupported
		if id == uint32(p11rpc.GetSessionInfo) {
			want = p11rpc.ArgumentsBad
		}
		sig := "u"
		if err := ask(body(id, sig, nil)); !errors.Is(err, want) {
			t.Errorf("call %d: %v, want %v", id, err, want)
		}
	}
	for name, b := range map[string][]byte{
		"a number of another world": body(1<<31, "u", make([]byte, 8)),
		"another signature":         body(uint32(p11rpc.GetSessionInfo), "uu", make([]byte, 16)),
		"a mechanism of any length": body(58, "uMaA", unhex(t, "0000000000000001 00000000 00000000")),
	} {
		if err := ask(b); !errors.Is(err, p11rpc.FunctionNotSupported) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, b := range map[string][]byte{
		"no body":               nil,
		"half a head":           {0, 0, 0, 13, 0},
		"bytes that follow":     body(uint32(p11rpc.GetSessionInfo), "u", make([]byte, 9)),
		"a signature of 4 GB":   unhex(t, "0000000d fffffff0 75"),
		"a signature too short": unhex(t, "0000000d 00000002 75"),
	} {
		if err := ask(b); !errors.Is(err, p11rpc.ArgumentsBad) {
			t.Errorf("%s: %v", name, err)
		}
	}
	s.alive(t)
}

// A handler's error is its RV, and where it has none General error, with a line in our log.
func TestErrors(t *testing.T) {
	var log bytes.Buffer
	var err error
	cfg := p11rpc.Config{
		Calls: map[p11rpc.CallID]p11rpc.Handler{
			p11rpc.CloseSession:   func(context.Context, []p11rpc.Value) ([]p11rpc.Value, error) { return nil, err },
			p11rpc.GetSessionInfo: numbers,
			p11rpc.OpenSession:    func(context.Context, []p11rpc.Value) ([]p11rpc.Value, error) { return nil, nil }, // lacks its result
		},
		Logger: slog.New(slog.NewTextHandler(&log, nil)),
	}
	s := serve(t, cfg, 2)
	for _, tt := range []struct {
		name string
		err  error
		want p11rpc.RV
		log  string
	}{
		{"an RV", p11rpc.RV(0xb3), 0xb3, ""},
		{"an RV with words", errors.Join(p11rpc.RV(0xb3), errors.New("words")), 0xb3, ""},
		{"no RV", errors.New("disk on fire"), p11rpc.GeneralError, "disk on fire"},
		{"CKR_OK", p11rpc.RV(0), p11rpc.GeneralError, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			log.Reset()
			err = tt.err
			s.wantRV(t, tt.want, p11rpc.CloseSession, p11rpc.U(1))
			if got := log.String(); (tt.log == "") != (got == "") || !strings.Contains(got, tt.log) {
				t.Errorf("log %q, want %q", got, tt.log)
			}
		})
	}
	s.wantRV(t, p11rpc.GeneralError, p11rpc.OpenSession, p11rpc.U(1), p11rpc.U(4))
	s.alive(t)
}

func frame(code, options, bodyLen uint32, rest ...byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, code)
	b = binary.BigEndian.AppendUint32(b, options)
	b = binary.BigEndian.AppendUint32(b, bodyLen)
	return append(b, rest...)
}

// What is no frame ends the connection: nothing that follows it can be trusted.
func TestBadFrames(t *testing.T) {
	for name, b := range map[string][]byte{
		"number 0":                frame(0, 0, 16, body(13, "u", make([]byte, 8))[:16]...),
		"long options":            frame(1, 4097, 16),
		"a body of 2 GB and more": frame(1, 0, 1<<31),
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, infoOnly, 2)
			go s.nc.Write(b) // the rest of it may not be read
			if err := <-s.end; err == nil || errors.Is(err, io.EOF) {
				t.Errorf("it ended with %v", err)
			}
		})
	}
	t.Run("cut off", func(t *testing.T) {
		near, far := socketPair(t)
		s := serveOn(t, t.Context(), near, far, infoOnly, 2)
		_, err := s.nc.Write(frame(1, 0, 17, 0, 0))
		if err != nil {
			t.Fatal(err)
		}
		s.nc.Close()
		if err := <-s.end; !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("it ended with %v", err)
		}
	})
	t.Run("between two requests", func(t *testing.T) {
		near, far := socketPair(t)
		s := serveOn(t, t.Context(), near, far, infoOnly, 2)
		s.alive(t)
		s.nc.Close()
		if err := <-s.end; err != nil {
			t.Errorf("it ended with %v", err)
		}
	})
}

func TestOptionsAreReadPast(t *testing.T) {
	s := serve(t, infoOnly, 0)
	b := body(13, "u", binary.BigEndian.AppendUint64(nil, 5))
	go func() {
		s.nc.Write(frame(0x20, 4096, uint32(len(b)), make([]byte, 4096)...))
		s.nc.Write(b)
	}()
	code, got, err := s.Receive()
	if code != 0x20 || err != nil || got[0].Num != 5 {
		t.Errorf("%x, %v, %v", code, got, err)
	}
}

// A body that is too long is read past and refused; one of the longest size is taken.
func TestLongBody(t *testing.T) {
	var got []int
	cfg := p11rpc.Config{Calls: map[p11rpc.CallID]p11rpc.Handler{
		p11rpc.SignUpdate: func(_ context.Context, args []p11rpc.Value) ([]p11rpc.Value, error) {
			got = append(got, len(args[1].Bytes))
			return nil, nil
		},
		p11rpc.GetSessionInfo: numbers,
	}}
	s := serve(t, cfg, 2)
	most := p11rpc.MaxBody - len(body(44, "uay", make([]byte, 13)))
	s.wantRV(t, p11rpc.DataLenRange, p11rpc.SignUpdate, p11rpc.U(1), p11rpc.B(make([]byte, most+1)))
	_, err := s.Call(p11rpc.SignUpdate, p11rpc.U(1), p11rpc.B(make([]byte, most)))
	if err != nil || !slices.Equal(got, []int{most}) {
		t.Errorf("%v; bodies of %d were handled", err, got)
	}
	s.alive(t)
}

// A quick call is answered while another session's waits, and behind its own session's.
func TestQuick(t *testing.T) {
	g, cfg := newGated(1)
	cfg.Calls[p11rpc.GetSessionInfo] = numbers
	cfg.Quick = func(id p11rpc.CallID) bool { return id == p11rpc.GetSessionInfo }
	s := serve(t, cfg, 2)
	go func() {
		s.Send(p11rpc.SignUpdate, p11rpc.U(1), p11rpc.B([]byte("x")))
		s.Send(p11rpc.GetSessionInfo, p11rpc.U(1))
		s.Send(p11rpc.GetSessionInfo, p11rpc.U(2))
	}()
	for i, want := range []uint32{0x12, 0x10, 0x11} {
		code, _, err := s.Receive()
		if code != want || err != nil {
			t.Errorf("answer to %x (%v), want %x", code, err, want)
		}
		if i == 0 {
			close(g.gates[1])
		}
	}
}

// gated is a handler that tells when it begins, by its session, and waits until it is let on.
type gated struct {
	mu    sync.Mutex
	begun []uint64
	gates map[uint64]chan struct{}
}

func (g *gated) handle(ctx context.Context, args []p11rpc.Value) ([]p11rpc.Value, error) {
	n := args[0].Num
	g.mu.Lock()
	g.begun = append(g.begun, n)
	gate := g.gates[n]
	g.mu.Unlock()
	if gate == nil {
		return nil, nil
	}
	select {
	case <-gate:
		return nil, nil
	case <-ctx.Done():
		return nil, p11rpc.RV(0x50)
	}
}

func (g *gated) began() []uint64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Sorted(slices.Values(g.begun))
}

func newGated(sessions ...uint64) (*gated, p11rpc.Config) {
	g := &gated{gates: map[uint64]chan struct{}{}}
	for _, n := range sessions {
		g.gates[n] = make(chan struct{})
	}
	return g, p11rpc.Config{Calls: map[p11rpc.CallID]p11rpc.Handler{
		p11rpc.SignInit: g.handle, p11rpc.SignUpdate: g.handle, p11rpc.CloseAllSessions: g.handle,
	}}
}

// send sends in the background, since a pipe waits for its reader.
func (s *served) send(t *testing.T, sessions ...uint64) {
	go func() {
		for _, n := range sessions {
			_, err := s.Send(p11rpc.SignUpdate, p11rpc.U(n), p11rpc.B([]byte("x")))
			if err != nil {
				return // the test ended first
			}
		}
	}()
}

// Requests of different sessions run side by side and are answered as they finish;
// those of one session one after another.
func TestLanes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, cfg := newGated(1, 2)
		s := serve(t, cfg, 2)
		s.send(t, 1, 1, 2, 3)
		synctest.Wait()
		if got := g.began(); !slices.Equal(got, []uint64{1, 2, 3}) {
			t.Errorf("begun: %v, want one of each session", got)
		}
		receive := func(want uint32) {
			t.Helper()
			code, _, err := s.Receive()
			if code != want || err != nil {
				t.Errorf("answer to %x (%v), want %x", code, err, want)
			}
		}
		receive(0x13) // session 3, which nothing holds up
		close(g.gates[2])
		receive(0x12)
		g.mu.Lock()
		gate := g.gates[1]
		g.gates[1] = make(chan struct{})
		g.mu.Unlock()
		close(gate)
		receive(0x10)
		synctest.Wait()
		if got := g.began(); !slices.Equal(got, []uint64{1, 1, 2, 3}) {
			t.Errorf("begun: %v", got)
		}
		// A call whose first argument is a slot's number is behind no session's.
		_, err := s.Call(p11rpc.CloseAllSessions, p11rpc.U(3))
		if err != nil {
			t.Error(err)
		}
		close(g.gates[1])
		receive(0x11)
	})
}

// In one session a hundred requests that are sent at once run in their order.
func TestLaneOrder(t *testing.T) {
	var seen []byte // no lock: the race detector sees two handlers at a time
	s := serve(t, p11rpc.Config{Calls: map[p11rpc.CallID]p11rpc.Handler{
		p11rpc.SignUpdate: func(_ context.Context, args []p11rpc.Value) ([]p11rpc.Value, error) {
			seen = append(seen, args[1].Bytes...)
			return nil, nil
		},
	}}, 2)
	const n = 100
	go func() {
		for i := range n {
			s.Send(p11rpc.SignUpdate, p11rpc.U(9), p11rpc.B([]byte{byte(i)}))
		}
	}()
	for range n {
		_, _, err := s.Receive()
		if err != nil {
			t.Fatal(err)
		}
	}
	for i, b := range seen {
		if int(b) != i {
			t.Fatalf("order %v", seen)
		}
	}
	if len(seen) != n {
		t.Errorf("%d requests ran", len(seen))
	}
}

func TestBounds(t *testing.T) {
	for _, tt := range []struct {
		name               string
		inFlight, held     int
		atOnce, afterwards int
	}{
		{"requests", 3, 0, 3, 4},
		{"bytes", 0, 2 * len(body(44, "uay", make([]byte, 14))), 2, 3},
		{"one that is larger than all room", 0, 1, 1, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				sessions := []uint64{1, 2, 3, 4, 5, 6}
				g, cfg := newGated(sessions...)
				cfg.MaxInFlight, cfg.MaxHeld = tt.inFlight, tt.held
				s := serve(t, cfg, 2)
				s.send(t, sessions...)
				synctest.Wait()
				if got := g.began(); len(got) != tt.atOnce {
					t.Errorf("%d requests begun, want %d", len(got), tt.atOnce)
				}
				close(g.gates[1])
				_, _, err := s.Receive()
				if err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				if got := g.began(); len(got) != tt.afterwards {
					t.Errorf("%d requests begun after an answer, want %d", len(got), tt.afterwards)
				}
				for _, n := range sessions[1:] {
					close(g.gates[n])
				}
				for range sessions[1:] {
					_, _, err := s.Receive()
					if err != nil {
						t.Fatal(err)
					}
				}
			})
		})
	}
}

// A handler that panics ends its connection.
func TestPanic(t *testing.T) {
	var log bytes.Buffer
	s := serve(t, p11rpc.Config{
		Calls:  map[p11rpc.CallID]p11rpc.Handler{p11rpc.Finalize: func(context.Context, []p11rpc.Value) ([]p11rpc.Value, error) { panic("boom") }},
		Logger: slog.New(slog.NewTextHandler(&log, nil)),
	}, 2)
	_, err := s.Call(p11rpc.Finalize)
	if !errors.Is(err, io.EOF) {
		t.Errorf("the client sees %v", err)
	}
	if err := <-s.end; err == nil || !strings.Contains(log.String(), "boom") {
		t.Errorf("it ended with %v and logged %q", err, log.String())
	}
}

// A client that closes its writing side gets the answers to what it has asked.
func TestHalfClose(t *testing.T) {
	near, far := socketPair(t)
	g, cfg := newGated(1)
	s := serveOn(t, t.Context(), near, far, cfg, 2)
	_, err := s.Send(p11rpc.SignUpdate, p11rpc.U(1), p11rpc.B(nil))
	if err == nil {
		err = near.(*net.UnixConn).CloseWrite()
	}
	if err != nil {
		t.Fatal(err)
	}
	close(g.gates[1])
	code, _, err := s.Receive()
	if code != 0x10 || err != nil {
		t.Errorf("answer to %x: %v", code, err)
	}
	if err := <-s.end; err != nil {
		t.Errorf("it ended with %v", err)
	}
}

// When ctx ends the handlers' does, and Serve returns when they have.
func TestShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		g, cfg := newGated(1)
		near, far := net.Pipe()
		s := serveOn(t, ctx, near, far, cfg, 2)
		s.send(t, 1)
		synctest.Wait()
		if got := g.began(); len(got) != 1 {
			t.Fatalf("begun: %v", got)
		}
		cancel()
		code, _, err := s.Receive()
		if rv, ok := errors.AsType[p11rpc.RV](err); code != 0x10 || !ok || rv != 0x50 {
			t.Errorf("answer to %x: %v", code, err)
		}
		<-s.end
	})
}

func TestTimeouts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, tt := range []struct {
			name string
			do   func(s *served)
			want time.Duration
		}{
			{"within a request", func(s *served) { s.nc.Write([]byte{0, 0}) }, p11rpc.DefaultFrameTimeout},
			{"between requests", func(*served) {}, p11rpc.DefaultIdleTimeout},
			{"a client that does not read", func(s *served) {
				s.nc.Write(frame(1, 0, 17, body(13, "u", make([]byte, 8))...))
			}, p11rpc.DefaultWriteTimeout},
		} {
			s := serve(t, infoOnly, 2)
			start := time.Now()
			tt.do(s)
			err := <-s.end
			if !errors.Is(err, context.DeadlineExceeded) && !isTimeout(err) || time.Since(start) != tt.want {
				t.Errorf("%s: ended after %v with %v, want %v", tt.name, time.Since(start), err, tt.want)
			}
		}
	})
}

func isTimeout(err error) bool {
	e, ok := errors.AsType[net.Error](err)
	return ok && e.Timeout()
}

// A peer that says nothing, not even its version, is cut.
func TestSilentPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		defer near.Close()
		start := time.Now()
		err := p11rpc.Serve(t.Context(), far, infoOnly)
		if !isTimeout(err) || time.Since(start) != p11rpc.DefaultFrameTimeout {
			t.Errorf("ended after %v with %v", time.Since(start), err)
		}
	})
}
