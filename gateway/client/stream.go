package client

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	pb "github.com/signwarden/signwarden/gateway/gatewaypb"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// errMoveOn says that a stream takes no more requests and that this one was not
// sent on it.
var errMoveOn = errors.New("the stream takes no more requests")

// maxItem bounds one item so that MaxItems of them could never exceed a message
// by much; the sender also counts.
const maxItem = 64 << 10

// openTimeout bounds the opening of a stream, for which other requests wait too.
const openTimeout = 10 * time.Second

// stream is one SignStream: a goroutine that sends what callers hand over,
// several items a message, and one that receives and wakes them.
type stream struct {
	st     grpc.BidiStreamingClient[pb.SignStreamRequest, pb.SignStreamResponse]
	cancel context.CancelFunc
	out    chan *pb.SignItem
	places chan struct{} // one for each unanswered item; the server says how many

	over  chan struct{} // closed when the receiver has ended; err is set before
	err   error
	quiet chan struct{} // closed when draining and nothing is pending: half-close

	mu       sync.Mutex // guards what follows; held for map operations only
	pending  map[string]chan *pb.SignResult
	draining bool
}

// open starts a stream and waits for its settings. The caller holds c.mu. ctx
// bounds the waiting; the stream itself lives until it ends or the client closes.
func (c *Client) open(ctx context.Context) (*stream, error) {
	ctx, done := context.WithTimeout(ctx, openTimeout)
	defer done()
	sctx, cancel := context.WithCancel(c.ctx)
	stop := context.AfterFunc(ctx, cancel)
	st, err := c.signing.SignStream(sctx)
	var first *pb.SignStreamResponse
	if err == nil {
		first, err = st.Recv()
	}
	if !stop() || err != nil {
		cancel()
		if ctx.Err() != nil {
			return nil, contextError(ctx)
		}
		return nil, wireError(err)
	}
	window := int(first.GetSettings().GetWindow())
	if window < 1 {
		cancel()
		return nil, fmt.Errorf("%w: it opened a stream without a window", sigerr.Unavailable)
	}
	s := &stream{
		st: st, cancel: cancel,
		out: make(chan *pb.SignItem), places: make(chan struct{}, window),
		over: make(chan struct{}), quiet: make(chan struct{}),
		pending: map[string]chan *pb.SignResult{},
	}
	c.wg.Go(s.send)
	c.wg.Go(s.receive)
	return s, nil
}

// usable reports whether the stream still takes requests.
func (s *stream) usable() bool {
	select {
	case <-s.over:
		return false
	default:
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.draining
}

// do sends one item and waits for its result.
func (s *stream) do(ctx context.Context, it *pb.SignItem) (*pb.SignResult, error) {
	if n := proto.Size(it); n > maxItem {
		return nil, fmt.Errorf("%w: the request has %d bytes; at most %d are sent", sigerr.Invalid, n, maxItem)
	}
	select {
	case s.places <- struct{}{}:
	case <-s.over:
		return nil, errMoveOn
	case <-ctx.Done():
		return nil, contextError(ctx)
	}
	// A place is given back when the item is answered, which is not when its
	// caller goes away: the server counts the unanswered.
	answer, err := s.register(it.GetId())
	if err != nil {
		<-s.places
		return nil, err
	}
	select {
	case s.out <- it:
	case <-s.over:
		return nil, s.lost()
	}
	select {
	case r := <-answer:
		return r, nil
	case <-ctx.Done():
		return nil, contextError(ctx)
	case <-s.over:
		select {
		case r := <-answer: // it came with the last message
			return r, nil
		default:
			return nil, s.lost()
		}
	}
}

func (s *stream) register(id string) (<-chan *pb.SignResult, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining {
		return nil, errMoveOn
	}
	if s.pending[id] != nil {
		return nil, fmt.Errorf("%w: the id %q is in flight already", sigerr.Conflict, id)
	}
	answer := make(chan *pb.SignResult, 1)
	s.pending[id] = answer
	return answer, nil
}

// lost is the error of a request that the stream's end left unanswered: it may
// have been signed and recorded; sent again under its id it is not signed twice.
func (s *stream) lost() error {
	if errors.Is(s.err, sigerr.Unauthenticated) || errors.Is(s.err, sigerr.Invalid) {
		return s.err
	}
	return fmt.Errorf("%w: the stream ended before it answered: %w", sigerr.Unavailable, s.err)
}

// send writes what callers hand over, as many in a message as are waiting.
func (s *stream) send() {
	for {
		m := &pb.SignStreamRequest{}
		size := 0
		add := func(it *pb.SignItem) {
			m.Items = append(m.Items, it)
			size += proto.Size(it)
		}
		select {
		case it := <-s.out:
			add(it)
		case <-s.quiet:
			// An error here is seen by the receiver too.
			_ = s.st.CloseSend()
			return
		case <-s.over:
			return
		}
	gather:
		for len(m.Items) < pb.MaxItems && size < pb.MaxMessage/2 {
			select {
			case it := <-s.out:
				add(it)
			default:
				break gather
			}
		}
		if err := s.st.Send(m); err != nil {
			return // the receiver gets the reason
		}
	}
}

func (s *stream) receive() {
	defer s.cancel()
	for {
		m, err := s.st.Recv()
		if err != nil {
			s.err = wireError(err)
			close(s.over)
			return
		}
		s.deliver(m)
	}
}

func (s *stream) deliver(m *pb.SignStreamResponse) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range m.GetResults() {
		if answer := s.pending[r.GetId()]; answer != nil {
			delete(s.pending, r.GetId())
			answer <- r // never blocks: one answer, one place in the channel
			<-s.places
		}
	}
	if m.GetDrain() != nil {
		s.draining = true
	}
	if s.draining && len(s.pending) == 0 {
		select {
		case <-s.quiet:
		default:
			close(s.quiet)
		}
	}
}

func contextError(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("%w: no answer from the gateway", sigerr.Timeout)
	}
	return sigerr.Canceled
}
