package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	pb "github.com/signwarden/signwarden/gateway/gatewaypb"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

const (
	// openTimeout bounds the opening of a stream.
	openTimeout = 10 * time.Second
	// maxWindow bounds the unanswered items of a stream, whatever the gateway
	// allows: they are kept in memory.
	maxWindow = 4096
)

// stream is one SignStream: a goroutine that sends what callers hand over,
// several items a message, and one that receives and wakes them.
type stream struct {
	c      *Client
	st     grpc.BidiStreamingClient[pb.SignStreamRequest, pb.SignStreamResponse]
	cancel context.CancelFunc
	places chan struct{}     // one for each unanswered item; the server says how many
	out    chan *pb.SignItem // as many fit as there are places

	over  chan struct{} // closed when the receiver has ended; err is set before
	err   error
	quiet chan struct{} // closed when draining and nothing is pending: half-close

	mu       sync.Mutex // guards what follows; held for map operations only
	pending  map[string]chan *pb.SignResult
	draining bool
}

// open starts a stream and waits for its settings. It belongs to no request: it
// lives until it ends or the client closes.
func (c *Client) open() (*stream, error) {
	ctx, cancel := context.WithCancel(c.ctx)
	late := time.AfterFunc(openTimeout, cancel)
	st, err := c.signing.SignStream(ctx)
	var first *pb.SignStreamResponse
	if err == nil {
		first, err = st.Recv()
	}
	inTime := late.Stop()
	window := min(int(first.GetSettings().GetWindow()), maxWindow)
	switch {
	case c.ctx.Err() != nil:
		err = errClosed
	case !inTime:
		err = fmt.Errorf("%w: %s: no stream could be opened within %v", sigerr.Unavailable, c.address, openTimeout)
	case err != nil:
		err = c.wireError(err)
	case window < 1:
		err = fmt.Errorf("%w: %s: it opened a stream without a window", sigerr.Unavailable, c.address)
	}
	if err != nil {
		cancel()
		return nil, err
	}
	s := &stream{
		c: c, st: st, cancel: cancel,
		places: make(chan struct{}, window), out: make(chan *pb.SignItem, window),
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
	s.out <- it // never waits: it has a place
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
	if errors.Is(s.err, errClosed) {
		return s.err
	}
	switch sigerr.Kind(s.err) {
	case sigerr.Unauthenticated, sigerr.Invalid, sigerr.Unavailable:
		return s.err
	}
	// Not wrapped: of whatever kind the stream's end was, that of the request is
	// that it can be sent again.
	return fmt.Errorf("%w: the stream ended before the answer: %v", sigerr.Unavailable, s.err)
}

// send writes what callers hand over, as many in a message as are waiting.
func (s *stream) send() {
	for {
		m := &pb.SignStreamRequest{}
		size := 0
		var large *pb.SignItem // that comes after m, in parts
		add := func(it *pb.SignItem) {
			m.Items = append(m.Items, it)
			size += proto.Size(it)
		}
		select {
		case it := <-s.out:
			if len(it.GetMessage()) > pb.MaxPart {
				if s.sendParts(it) != nil {
					return // the receiver gets the reason
				}
				continue
			}
			add(it)
		case <-s.quiet:
			// An error here is seen by the receiver too.
			_ = s.st.CloseSend()
			return
		case <-s.over:
			return
		}
		// Callers that are about to hand over may do so first: without this the
		// runtime runs the receiver of an item before its next sender.
		runtime.Gosched()
	gather:
		for len(m.Items) < pb.MaxItems && size < pb.MaxMessage/2 {
			select {
			case it := <-s.out:
				if len(it.GetMessage()) > pb.MaxPart {
					large = it
					break gather
				}
				add(it)
			default:
				break gather
			}
		}
		if err := s.st.Send(m); err != nil {
			return
		}
		if large != nil && s.sendParts(large) != nil {
			return
		}
	}
}

// sendParts sends an item whose message is too large for one.
func (s *stream) sendParts(it *pb.SignItem) error {
	whole := it.GetMessage()
	size := uint32(len(whole))
	for len(whole) > pb.MaxPart {
		part := &pb.SignItem{Id: it.GetId(), Message: whole[:pb.MaxPart], MessageSize: size}
		if err := s.st.Send(&pb.SignStreamRequest{Items: []*pb.SignItem{part}}); err != nil {
			return err
		}
		whole = whole[pb.MaxPart:]
	}
	last := proto.CloneOf(&pb.SignItem{ // it may be sent again, whole
		Id: it.GetId(), Key: it.GetKey(), Hash: it.GetHash(), Scheme: it.GetScheme(), Format: it.GetFormat(),
		Claim: it.GetClaim(), SaltLength: it.GetSaltLength(),
	})
	last.Message, last.MessageSize = whole, size
	return s.st.Send(&pb.SignStreamRequest{Items: []*pb.SignItem{last}})
}

func (s *stream) receive() {
	defer s.cancel()
	for {
		m, err := s.st.Recv()
		if err == nil {
			s.deliver(m)
			continue
		}
		switch {
		case s.c.ctx.Err() != nil:
			s.err = errClosed
		case errors.Is(err, io.EOF):
			s.err = fmt.Errorf("%w: %s: it ended the stream", sigerr.Unavailable, s.c.address)
		default:
			s.err = s.c.wireError(err)
		}
		close(s.over)
		return
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
