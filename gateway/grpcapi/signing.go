package grpcapi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"runtime"
	"runtime/debug"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/signwarden/signwarden/gateway"
	pb "github.com/signwarden/signwarden/gateway/gatewaypb"
	"github.com/signwarden/signwarden/gateway/ident"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

const (
	frontEnd   = "grpc"
	signStream = pb.SigningService_SignStream_FullMethodName
)

type signing struct {
	pb.UnimplementedSigningServiceServer
	s *Server
}

func request(it *pb.SignItem) gateway.Request {
	c := it.GetClaim()
	return gateway.Request{
		ID: it.GetId(), Key: it.GetKey(), Digest: it.GetDigest(), Message: it.GetMessage(), Hash: it.GetHash().Hash(),
		Scheme: it.GetScheme().Scheme(), SaltLength: int(min(it.GetSaltLength(), math.MaxInt32)), Format: it.GetFormat(), FrontEnd: frontEnd,
		Claim: gateway.Claim{File: c.GetFile(), ContentSHA256: c.GetContentSha256(), NEVRA: c.GetNevra(), Note: c.GetNote()},
	}
}

func response(sig gateway.Signature) *pb.Signature {
	return &pb.Signature{Signature: sig.Bytes, Scheme: pb.SignatureSchemeOf(sig.Scheme), AuditRow: sig.AuditRow}
}

// checkItem bounds what an item makes us keep, and repeat in its answer.
func checkItem(it *pb.SignItem) error {
	if n := proto.Size(it) - len(it.GetMessage()); n > maxItem {
		return fmt.Errorf("%w: the item has %d bytes; at most %d are taken", sigerr.Invalid, n, maxItem)
	}
	return nil
}

// Sign implements the unary call.
func (s *signing) Sign(ctx context.Context, r *pb.SignRequest) (*pb.SignResponse, error) {
	if err := checkItem(r.GetItem()); err != nil {
		return nil, err
	}
	if r.GetItem().GetMessageSize() != 0 {
		return nil, fmt.Errorf("%w: parts of a message are for SignStream", sigerr.Invalid)
	}
	sig, err := s.s.c.Gateway.Sign(ctx, principal(ctx), request(r.GetItem()))
	if err != nil {
		return nil, err
	}
	return &pb.SignResponse{Signature: response(sig)}, nil
}

// SignStream implements the stream: this goroutine receives, one sends, and
// each item that is in the window has its own. Those stay for the next items: a
// new one would begin with a small stack, and copy it three times while it grows.
func (s *signing) SignStream(st grpc.BidiStreamingServer[pb.SignStreamRequest, pb.SignStreamResponse]) error {
	ctx := st.Context()
	leave, err := s.s.streams.enter(principal(ctx).Name())
	if err != nil {
		return err
	}
	defer leave()
	t := &stream{
		s: s.s, p: principal(ctx),
		items: make(chan item), results: make(chan result, s.s.c.Window), places: make(chan struct{}, s.s.c.Window),
	}
	sendErr := make(chan error, 1)
	go func() { sendErr <- t.send(st) }()

	err = t.receive(ctx, st)
	if t.part != nil {
		t.part.give()
	}
	close(t.items)
	t.wg.Wait()
	close(t.results)
	if serr := <-sendErr; err == nil {
		err = serr
	}
	return err
}

// stream is the state of one SignStream.
type stream struct {
	s       *Server
	p       ident.Principal
	items   chan item // to a goroutine that has none
	results chan result
	places  chan struct{} // one for each unanswered item
	part    *part         // nil: no message is being received in parts
	wg      sync.WaitGroup
}

// item is one that is in the window, and give what gives back its share of the
// budget.
type item struct {
	*pb.SignItem
	give func()
}

// result is an answer on its way to the sender.
type result struct {
	*pb.SignResult
	place bool // whether its item has a place, which the sender gives back
}

// receive starts the items of every message until the client has half-closed.
func (t *stream) receive(ctx context.Context, st grpc.BidiStreamingServer[pb.SignStreamRequest, pb.SignStreamResponse]) error {
	for {
		m, err := st.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if n := len(m.GetItems()); n > pb.MaxItems {
			return fmt.Errorf("%w: a message carries %d items; at most %d are taken", sigerr.Invalid, n, pb.MaxItems)
		}
		for _, it := range m.GetItems() {
			if len(it.GetId()) > gateway.MaxID {
				// Not answered as an item: the answer would repeat it, and a client
				// that does not read could have us keep many.
				return fmt.Errorf("%w: an id has %d bytes; at most %d are taken", sigerr.Invalid, len(it.GetId()), gateway.MaxID)
			}
			give, more, err := t.join(ctx, it)
			if err != nil {
				return err
			}
			if more {
				continue
			}
			select {
			case t.places <- struct{}{}:
				t.start(ctx, item{it, give})
			default:
				// The client keeps no window: answer here, so that it cannot
				// make work faster than it reads answers.
				err := fmt.Errorf("%w: more than %d items of this stream are unanswered", sigerr.Overloaded, cap(t.places))
				give()
				t.results <- result{t.fail(it, err), false}
			}
		}
	}
}

// start has an item signed, by a goroutine that has none, or a new one.
func (t *stream) start(ctx context.Context, it item) {
	select {
	case t.items <- it:
	default:
		t.wg.Go(func() {
			for more := true; more; it, more = <-t.items {
				res := t.sign(ctx, it.SignItem)
				it.give()
				t.results <- result{res, true}
				it = item{} // it is done, and this may wait long for the next
			}
		})
	}
}

// part is a message that is being received.
type part struct {
	id   string
	size int
	got  []byte
	give func() // what the whole of it takes of the budget
}

// join puts the parts of a message together: more is that there are some to come.
// What a message takes of its principal's budget is waited for before its first
// part is kept; give gives it back.
func (t *stream) join(ctx context.Context, it *pb.SignItem) (give func(), more bool, err error) {
	size, n := int(it.GetMessageSize()), len(it.GetMessage())
	switch {
	case size == 0 && t.part == nil:
		give, err = t.s.content.take(ctx, t.p.Name(), n)
		return give, false, err
	case size > pb.MaxContent:
		return nil, false, fmt.Errorf("%w: a message has %d bytes; at most %d are taken", sigerr.Invalid, size, pb.MaxContent)
	case t.part == nil:
		give, err = t.s.content.take(ctx, t.p.Name(), size)
		if err != nil {
			return nil, false, err
		}
		t.part = &part{id: it.GetId(), size: size, got: make([]byte, 0, size), give: give}
	}
	p := t.part
	if p.id != it.GetId() || p.size != size || n == 0 || n > size-len(p.got) {
		return nil, false, fmt.Errorf("%w: the parts of a message do not fit together", sigerr.Invalid)
	}
	p.got = append(p.got, it.GetMessage()...)
	if len(p.got) < size {
		return nil, true, nil
	}
	it.Message, t.part = p.got, nil
	return p.give, false, nil
}

func (t *stream) sign(ctx context.Context, it *pb.SignItem) (res *pb.SignResult) {
	defer func() {
		if r := recover(); r != nil {
			t.s.log.Error("panic", "method", signStream, "value", r, "stack", string(debug.Stack()))
			res = t.fail(it, errors.New("panic"))
		}
	}()
	if it.GetId() == "" {
		return t.fail(it, fmt.Errorf("%w: an item of a stream needs an id", sigerr.Invalid))
	}
	if err := checkItem(it); err != nil {
		return t.fail(it, err)
	}
	r := request(it)
	it.Message = nil // the gateway frees it when it has been read
	sig, err := t.s.c.Gateway.Sign(ctx, t.p, r)
	if err != nil {
		return t.fail(it, err)
	}
	return &pb.SignResult{Id: it.GetId(), Outcome: &pb.SignResult_Signature{Signature: response(sig)}}
}

func (t *stream) fail(it *pb.SignItem, err error) *pb.SignResult {
	return &pb.SignResult{Id: it.GetId(), Outcome: &pb.SignResult_Error{Error: t.s.status(signStream, err).Proto()}}
}

// send writes the settings, then what is ready, several results a message, and
// once the word that the stream is to move on. It reads results until they are
// closed even after an error, so that nobody waits to hand one over.
func (t *stream) send(st grpc.BidiStreamingServer[pb.SignStreamRequest, pb.SignStreamResponse]) error {
	err := st.Send(&pb.SignStreamResponse{Settings: &pb.Settings{Window: uint32(cap(t.places))}})
	drain := t.s.drain
	for {
		m := &pb.SignStreamResponse{}
		select {
		case r, ok := <-t.results:
			if !ok {
				return err
			}
			// Whoever has another result at hand may add it: without this the
			// runtime runs the receiver of a result before its next sender.
			runtime.Gosched()
			t.gather(m, r)
		case <-drain:
			drain = nil
			m.Drain = &pb.Drain{}
		}
		if err == nil {
			err = st.Send(m)
		}
	}
}

// gather puts r into m and adds what else is ready now. It gives the items'
// places back before the client can have the answers: a client that fills the
// window again at once must find it so.
func (t *stream) gather(m *pb.SignStreamResponse, r result) {
	for size := 0; ; {
		if r.place {
			<-t.places
		}
		m.Results = append(m.Results, r.SignResult)
		size += proto.Size(r.SignResult)
		if len(m.Results) == pb.MaxItems || size > pb.MaxMessage/2 {
			return
		}
		var ok bool
		select {
		case r, ok = <-t.results:
			if !ok {
				return // closed: the next receive sees it again
			}
		default:
			return
		}
	}
}
