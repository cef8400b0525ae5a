package p11rpc

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime/debug"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
)

// server is one connection being served.
type server struct {
	cfg Config
	nc  net.Conn
	r   *bufio.Reader

	ctx    context.Context // of the handlers
	cancel context.CancelFunc
	wg     sync.WaitGroup // the goroutines that answer
	jobs   chan job       // to those of them that have nothing to do

	places chan struct{}       // one for each request that is not answered
	bytes  *semaphore.Weighted // of their bodies
	lanes  lanes

	// wmu guards nc's writing side and broken. It is held for one write, which
	// WriteTimeout bounds; responses wait for each other, requests do not.
	wmu    sync.Mutex
	broken error // the first error of a write, or a panic: nothing is written after it
}

// Serve settles on a version with the client and answers its requests until it
// hangs up or ctx ends. It returns when every handler has, and leaves nc open. The
// error is nil if the client hung up between two requests.
//
// What is under way when the client closes its side is finished and answered, since
// the same looks like the shutdown of an agentproto.Listener. It is given up when ctx
// ends, a response cannot be written, or what comes is no frame.
func Serve(ctx context.Context, nc net.Conn, cfg Config) error {
	cfg = cfg.withDefaults()
	s := &server{
		cfg: cfg, nc: nc, r: bufio.NewReader(nc),
		jobs: make(chan job), places: make(chan struct{}, cfg.MaxInFlight), bytes: semaphore.NewWeighted(int64(cfg.MaxHeld)),
	}
	s.ctx, s.cancel = context.WithCancel(ctx)
	defer s.cancel()
	stop := context.AfterFunc(s.ctx, func() { nc.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()

	err := s.negotiate()
	for err == nil {
		err = s.next()
	}
	switch {
	case errors.Is(err, io.EOF):
		err = nil
	case errors.Is(err, io.ErrUnexpectedEOF): // closed within a request: the others are finished
	default:
		s.cancel()
	}
	close(s.jobs)
	s.wg.Wait()
	s.wmu.Lock()
	defer s.wmu.Unlock()
	if s.broken != nil {
		return s.broken
	}
	return err
}

// negotiate answers the client's version with the one that is spoken: the lower of
// the highest that each knows. An unknown one is never refused, since a client may then
// be told of no token.
func (s *server) negotiate() error {
	err := s.setReadDeadline(s.cfg.FrameTimeout)
	if err != nil {
		return err
	}
	theirs, err := s.r.ReadByte()
	if err != nil {
		return err
	}
	return s.write([]byte{min(theirs, MaxVersion)})
}

// setReadDeadline looks at ctx after it has set the deadline, so that the one
// which the end of ctx sets is never overwritten for good.
func (s *server) setReadDeadline(d time.Duration) error {
	err := s.nc.SetReadDeadline(time.Now().Add(d))
	if err != nil {
		return err
	}
	return s.ctx.Err()
}

// next reads a request and has it answered. It waits for a place before it reads the body.
func (s *server) next() error {
	err := s.setReadDeadline(s.cfg.IdleTimeout)
	if err != nil {
		return err
	}
	_, err = s.r.Peek(1)
	if err != nil {
		return err
	}
	err = s.setReadDeadline(s.cfg.FrameTimeout)
	if err != nil {
		return err
	}
	h, err := readHeader(s.r)
	if err != nil {
		return noEOF(err)
	}
	if h.body > MaxBody {
		err = errors.Join(skip(s.r, h.options), skip(s.r, h.body))
		if err != nil {
			return err
		}
		return s.respond(h.code, appendError(nil, DataLenRange))
	}
	give, err := s.take(int64(h.body))
	if err != nil {
		return err
	}
	err = s.setReadDeadline(s.cfg.FrameTimeout) // again: take may have waited long
	var body []byte
	if err == nil {
		body, err = readBody(s.r, h)
	}
	if err != nil {
		give()
		return err
	}
	s.start(h, body, give)
	return nil
}

// take waits until there is room for a request with a body of n bytes. One that is
// larger than all the room is let in alone.
func (s *server) take(n int64) (give func(), err error) {
	select {
	case s.places <- struct{}{}:
	case <-s.ctx.Done():
		return nil, s.ctx.Err()
	}
	n = min(n, int64(s.cfg.MaxHeld))
	err = s.bytes.Acquire(s.ctx, n)
	if err != nil {
		return nil, err
	}
	return func() { s.bytes.Release(n); <-s.places }, nil
}

// A job is a request that is to be answered.
type job struct {
	code   uint32
	id     CallID
	args   []Value
	handle Handler
	err    error // why it cannot be
	lane   *lane
	give   func()
}

// start has a request answered behind the earlier ones of its session, and its room given
// back. One that waits for nothing is answered before start returns.
func (s *server) start(h header, body []byte, give func()) {
	j := job{code: h.code, give: give}
	j.id, j.args, j.handle, j.err = s.parse(body)
	j.lane = s.lanes.enter(sessionOf(j.id, j.args))
	if s.cfg.Quick(j.id) && j.lane.free() {
		s.answer(j)
		return
	}
	select {
	case s.jobs <- j:
	default:
		s.wg.Go(func() { s.work(j) })
	}
}

// work answers one request after the other, on a stack that has grown.
func (s *server) work(j job) {
	for more := true; more; j, more = <-s.jobs {
		s.answer(j)
		j = job{} // what it held is let go, and this may wait long for the next
	}
}

func (s *server) answer(j job) {
	defer j.give()
	j.lane.wait()
	var response []byte
	err := j.err
	if err == nil {
		response, err = s.run(j.handle, j.id, j.args)
	}
	if err != nil {
		response = appendError(nil, s.outcome(j.id, err))
	}
	s.lanes.leave(j.lane)
	_ = s.respond(j.code, response) // an error ends the connection, and next sees it
}

// parse finds what is asked for. An argument of a call that nobody serves is not decoded.
func (s *server) parse(body []byte) (CallID, []Value, Handler, error) {
	id, sig, rest, err := parseHead(body)
	if err != nil {
		return id, nil, nil, errors.Join(ArgumentsBad, err)
	}
	handle := s.cfg.Calls[id]
	if handle == nil || calls[id].request != sig {
		return id, nil, nil, FunctionNotSupported
	}
	args, err := parseValues(sig, rest)
	if err != nil {
		return id, nil, nil, errors.Join(ArgumentsBad, err)
	}
	return id, args, handle, nil
}

// run calls the handler and encodes what it returns.
func (s *server) run(handle Handler, id CallID, args []Value) (response []byte, err error) {
	defer func() {
		r := recover()
		if r != nil {
			// The state of a client whose handler stopped half way is not to be trusted.
			s.cfg.Logger.Error("call panicked", "call", id.String(), "panic", r, "stack", string(debug.Stack()))
			s.fail(fmt.Errorf("panic in %v", id))
			err = GeneralError
		}
	}()
	results, err := handle(s.ctx, args)
	if err != nil {
		return nil, err
	}
	return Message{id, results}.AppendResponse(nil)
}

// outcome is what the client is told of an error.
func (s *server) outcome(id CallID, err error) RV {
	rv, ok := errors.AsType[RV](err)
	if !ok {
		s.cfg.Logger.Error("call failed", "call", id.String(), "err", err)
		return GeneralError
	}
	return rv
}

func (s *server) respond(code uint32, body []byte) error {
	b := make([]byte, 0, headerSize+len(body))
	return s.write(append(appendHeader(b, code, len(body)), body...))
}

func (s *server) write(b []byte) error {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	if s.broken != nil {
		return s.broken
	}
	err := s.nc.SetWriteDeadline(time.Now().Add(s.cfg.WriteTimeout))
	if err == nil {
		_, err = s.nc.Write(b)
	}
	if err != nil {
		s.broken = err
		s.cancel()
	}
	return err
}

// fail gives the connection up.
func (s *server) fail(err error) {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	if s.broken == nil {
		s.broken = err
	}
	s.cancel()
}

// lanes order the requests of each session.
type lanes struct {
	mu   sync.Mutex       // guards last; held for map operations only
	last map[uint64]*lane // by session; gone when its last request has left
}

// lane is a request's place behind the one before it.
type lane struct {
	session uint64
	before  <-chan struct{} // nil: nobody
	done    chan struct{}
}

// enter is called in the order in which requests come. Session 0 is no session:
// its requests wait for nobody.
func (l *lanes) enter(session uint64) *lane {
	if session == 0 {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.last == nil {
		l.last = make(map[uint64]*lane)
	}
	mine := &lane{session: session, done: make(chan struct{})}
	if before := l.last[session]; before != nil {
		mine.before = before.done
	}
	l.last[session] = mine
	return mine
}

// free says whether wait would not.
func (l *lane) free() bool {
	if l == nil || l.before == nil {
		return true
	}
	select {
	case <-l.before:
		return true
	default:
		return false
	}
}

func (l *lane) wait() {
	if l != nil && l.before != nil {
		<-l.before
	}
}

func (l *lanes) leave(mine *lane) {
	if mine == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	close(mine.done)
	if l.last[mine.session] == mine {
		delete(l.last, mine.session)
	}
}
