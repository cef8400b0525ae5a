package grpcapi

import (
	"bytes"
	"log/slog"
	"net"
	"testing"

	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // registers the codec
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	pb "github.com/signwarden/signwarden/gateway/gatewaypb"
)

// Connections of strangers over the bound of their address are closed at once;
// a place is given back by closing, and by saying who one is.
func TestLimitListener(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := newLimitListener(inner, slog.New(slog.DiscardHandler))
	l.strangers = newCounter(2)
	defer l.Close()
	accepted := make(chan net.Conn, 8)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	dial := func() net.Conn {
		t.Helper()
		c, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	refused := func() {
		t.Helper()
		if _, err := dial().Read(make([]byte, 1)); err == nil {
			t.Error("it is served")
		}
	}
	dial()
	dial()
	first, second := <-accepted, <-accepted
	refused()
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	_ = first.Close() // gives no second place back
	dial()
	<-accepted
	refused()
	second.(*limitConn).known()
	dial()
	<-accepted
	refused()
	if len(l.places) != 3 {
		t.Errorf("%d connections are counted, want 3", len(l.places))
	}
}

// A message of two-byte items is not decoded further than tells that there are
// too many, and one that is within the bound is decoded whole.
func TestBoundedCodec(t *testing.T) {
	c := boundedCodec{encoding.GetCodecV2("proto")}
	decode := func(b []byte) (*pb.SignStreamRequest, error) {
		m := &pb.SignStreamRequest{}
		return m, c.Unmarshal(mem.BufferSlice{mem.SliceBuffer(b)}, m)
	}
	m, err := decode(bytes.Repeat([]byte{0x0a, 0}, pb.MaxMessage/2))
	if err != nil || len(m.GetItems()) != pb.MaxItems+1 {
		t.Errorf("half a million items: %d are decoded, %v; want %d", len(m.GetItems()), err, pb.MaxItems+1)
	}
	want := &pb.SignStreamRequest{}
	for range pb.MaxItems {
		want.Items = append(want.Items, &pb.SignItem{Id: "id", Key: "key", Digest: make([]byte, 32)})
	}
	b, err := proto.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	if m, err = decode(b); err != nil || !proto.Equal(m, want) {
		t.Errorf("%d items come back as %d, %v", pb.MaxItems, len(m.GetItems()), err)
	}
	padded := append(bytes.Repeat([]byte{0x78, 1}, pb.MaxItems), 0x0a, 0, 0x0a, 0) // field 15 is unknown
	for _, bad := range [][]byte{{0x0a}, {0x0a, 5, 1}, {0xff}, append(bytes.Clone(b), 0x0a, 0xff, 0xff), padded} {
		if _, err := decode(bad); err == nil {
			t.Errorf("%x is decoded", bad[max(0, len(bad)-8):])
		}
	}
}

// What the bounded codec takes of a message within the bound is what the usual
// one takes, and of a longer one it takes no more than tells so.
func FuzzBoundedCodec(f *testing.F) {
	whole, err := proto.Marshal(&pb.SignStreamRequest{Items: []*pb.SignItem{{Id: "id", Key: "k", Digest: make([]byte, 32)}, {}}})
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range [][]byte{nil, whole, whole[:len(whole)-1], bytes.Repeat([]byte{0x0a, 0}, pb.MaxItems+2), {0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f}} {
		f.Add(seed)
	}
	usual := encoding.GetCodecV2("proto")
	bounded := boundedCodec{usual}
	f.Fuzz(func(t *testing.T, b []byte) {
		got, want := &pb.SignStreamRequest{}, &pb.SignStreamRequest{}
		err := bounded.Unmarshal(mem.BufferSlice{mem.SliceBuffer(b)}, got)
		if len(got.GetItems()) > pb.MaxItems+1 {
			t.Fatalf("%d items are decoded", len(got.GetItems()))
		}
		werr := usual.Unmarshal(mem.BufferSlice{mem.SliceBuffer(b)}, want)
		if werr != nil || len(want.GetItems()) > pb.MaxItems {
			return // refused either way: as malformed, or as too many
		}
		if err == nil && len(got.GetItems()) != len(want.GetItems()) {
			t.Fatalf("%d items, want %d", len(got.GetItems()), len(want.GetItems()))
		}
		if err != nil && len(b) < 2*pb.MaxItems {
			t.Fatalf("refused: %v", err) // it has no room for so many fields
		}
	})
}
