package grpcapi_test

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/signwarden/signwarden/gateway"
	pb "github.com/signwarden/signwarden/gateway/gatewaypb"
	"github.com/signwarden/signwarden/gateway/gatewaytest"
	"github.com/signwarden/signwarden/gateway/keys"
)

// An id of the greatest length is served; one that is longer ends the stream,
// since its answer would repeat it, and reaches no token.
func TestLongID(t *testing.T) {
	t.Parallel()
	s := serve(t, gatewaytest.New(t, ""))
	k := s.Key(t, "k", keys.Ed25519)
	st := openStream(t, s.raw(t, "root"))
	longest := item("k", strings.Repeat("i", gateway.MaxID))
	checkResult(t, s, k, longest, st.one(longest).GetSignature())
	before := s.Token.Signs()
	st.send(item("k", strings.Repeat("i", gateway.MaxID+1)))
	if _, err := st.st.Recv(); status.Code(err) != codes.InvalidArgument {
		t.Errorf("got %v, want InvalidArgument", err)
	}
	if got := s.Token.Signs(); got != before {
		t.Errorf("the token signed %d times", got-before)
	}
}

// A principal has so many streams, over all its connections; a place is free
// again when one ends, and others have their own.
func TestStreamsOfOnePrincipal(t *testing.T) {
	t.Parallel()
	s := serve(t, gatewaytest.New(t, ""))
	const all, each = 64, 16 // of a principal, of a connection
	var streams []*rawStream
	for range all / each {
		conn := s.raw(t, "root")
		for range each {
			streams = append(streams, openStream(t, conn))
		}
	}
	open := func(name string) error {
		t.Helper()
		st, err := pb.NewSigningServiceClient(s.raw(t, name)).SignStream(t.Context())
		if err == nil {
			_, err = st.Recv()
		}
		return err
	}
	if err := open("root"); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("one more: got %v, want ResourceExhausted", err)
	}
	if err := open("other"); err != nil {
		t.Errorf("another principal's first: %v", err)
	}
	if err := streams[0].st.CloseSend(); err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := streams[0].st.Recv(); err != nil {
			break
		}
	}
	if err := open("root"); err != nil {
		t.Errorf("after one has ended: %v", err)
	}
}

// Headers are read up to their bound, and a request with more is refused.
func TestHeaderSize(t *testing.T) {
	t.Parallel()
	s := serve(t, gatewaytest.New(t, ""))
	ks := pb.NewKeyServiceClient(s.raw(t, "root"))
	list := func(n int) error {
		ctx := metadata.AppendToOutgoingContext(t.Context(), "x-filler", strings.Repeat("x", n))
		_, err := ks.ListKeys(ctx, &pb.ListKeysRequest{})
		return err
	}
	if err := list(15 << 10); err != nil {
		t.Errorf("15 KiB: %v", err)
	}
	if err := list(16 << 10); err == nil {
		t.Error("16 KiB and the rest of the headers are taken")
	}
}
