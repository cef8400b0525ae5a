package grpcapi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"sync"

	"google.golang.org/grpc"

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
		ID: it.GetId(), Key: it.GetKey(), Digest: it.GetDigest(), Hash: it.GetHash().Hash(),
		Scheme: it.GetScheme().Scheme(), Format: it.GetFormat(), FrontEnd: frontEnd,
		Claim: gateway.Claim{File: c.GetFile(), ContentSHA256: c.GetContentSha256(), NEVRA: c.GetNevra(), Note: c.GetNote()},
	}
}

func response(sig gateway.Signature) *pb.Signature {
	return &pb.Signature{Signature: sig.Bytes, Scheme: pb.SignatureSchemeOf(sig.Scheme), AuditRow: sig.AuditRow}
}

// Sign implements the unary call.
func (s *signing) Sign(ctx context.Context, r *pb.SignRequest) (*pb.SignResponse, error) {
	sig, err := s.s.c.Gateway.Sign(ctx, principal(ctx), request(r.GetItem()))
	if err != nil {
		return nil, err
	}
	return &pb.SignResponse{Signature: response(sig)}, nil
}

// SignStream implements the stream: this goroutine receives, one sends, and
// each item that is in the window has its own.
func (s *signing) SignStream(st grpc.BidiStreamingServer[pb.SignStreamRequest, pb.SignStreamResponse]) error {
	ctx := st.Context()
	results := make(chan *pb.SignResult, s.s.c.Window)
	sendErr := make(chan error, 1)
	go func() { sendErr <- s.send(st, results) }()

	items := &stream{s: s.s, p: principal(ctx), results: results, places: make(chan struct{}, s.s.c.Window)}
	err := items.receive(ctx, st)
	items.wg.Wait()
	close(results)
	return errors.Join(<-sendErr, err)
}

// stream is the receiving half of one SignStream.
type stream struct {
	s       *Server
	p       ident.Principal
	results chan<- *pb.SignResult
	places  chan struct{} // one for each unanswered item
	wg      sync.WaitGroup
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
			select {
			case t.places <- struct{}{}:
				t.wg.Go(func() { t.results <- t.sign(ctx, it); <-t.places })
			default:
				// The client keeps no window: answer here, so that it cannot
				// make work faster than it reads answers.
				t.results <- t.fail(it, fmt.Errorf("%w: more than %d items of this stream are unanswered", sigerr.Overloaded, cap(t.places)))
			}
		}
	}
}

func (t *stream) sign(ctx context.Context, it *pb.SignItem) (res *pb.SignResult) {
	defer func() {
		if r := recover(); r != nil {
			t.s.log.Error("panic", "method", signStream, "value", r, "stack", string(debug.Stack()))
			res = t.fail(it, errors.New("panic"))
		}
	}()
	sig, err := t.s.c.Gateway.Sign(ctx, t.p, request(it))
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
func (s *signing) send(st grpc.BidiStreamingServer[pb.SignStreamRequest, pb.SignStreamResponse], results <-chan *pb.SignResult) error {
	err := st.Send(&pb.SignStreamResponse{Settings: &pb.Settings{Window: uint32(s.s.c.Window)}})
	drain := s.s.drain
	for {
		m := &pb.SignStreamResponse{}
		select {
		case r, ok := <-results:
			if !ok {
				return err
			}
			m.Results = append(m.Results, r)
			gather(m, results)
		case <-drain:
			drain = nil
			m.Drain = &pb.Drain{}
		}
		if err == nil {
			err = st.Send(m)
		}
	}
}

// gather adds what is ready now to m.
func gather(m *pb.SignStreamResponse, results <-chan *pb.SignResult) {
	for len(m.Results) < pb.MaxItems {
		select {
		case r, ok := <-results:
			if !ok {
				return // closed: the next receive sees it again
			}
			m.Results = append(m.Results, r)
		default:
			return
		}
	}
}
