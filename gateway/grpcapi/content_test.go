package grpcapi_test

import (
	"crypto"
	"crypto/sha256"
	"fmt"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signwarden/signwarden/gateway/client"
	pb "github.com/signwarden/signwarden/gateway/gatewaypb"
	"github.com/signwarden/signwarden/gateway/gatewaytest"
	"github.com/signwarden/signwarden/gateway/keys"
)

const contentPolicy = gatewaytest.Policy + `
  - {name: ours, principals: [ci], keys: [k], may: [sign], formats: [rpm], content: rpm, packages: {names: [ours]}}
`

// packageText is a message as gatewaytest.Read reads it.
func packageText(name string) []byte { return []byte(name + "\n\n1\n2\nnoarch\nExample") }

// Messages over the wire: the client's MessageSigner, the keys' message formats,
// policy test.
func TestMessages(t *testing.T) {
	t.Parallel()
	s := serve(t, gatewaytest.New(t, contentPolicy))
	s.Key(t, "k", keys.P256)
	c := s.client(t, "ci")
	k, err := c.Key(t.Context(), "k")
	if err != nil {
		t.Fatal(err)
	}
	if len(k.Reads) != 1 || k.Reads[0] != "rpm" {
		t.Fatalf("the key reads %v, want rpm", k.Reads)
	}
	m := c.MessageSigner(t.Context(), k, "rpm", client.Claim{})
	if _, err := m.SignMessage(nil, packageText("ours"), crypto.SHA256); err != nil { // which has verified it
		t.Fatal(err)
	}
	if e := s.Store.Last(t); e.NEVRA != "ours-1-2.noarch" || e.Vendor != "Example" {
		t.Errorf("audit entry %+v", e)
	}
	before := s.Token.Signs()
	if _, err := m.SignMessage(nil, packageText("theirs"), crypto.SHA256); status.Code(pbError(err)) != codes.PermissionDenied {
		t.Errorf("another package: %v, want a denial", err)
	}
	sum := sha256.Sum256(packageText("ours"))
	if _, err := m.Sign(nil, sum[:], crypto.SHA256); status.Code(pbError(err)) != codes.PermissionDenied {
		t.Errorf("a bare digest: %v, want a denial", err)
	}
	if _, err := m.SignMessage(nil, packageText("ours"), crypto.SHA1); err == nil {
		t.Error("SHA-1: no error")
	}
	if got := s.Token.Signs(); got != before {
		t.Errorf("the token signed %d times", got-before)
	}
	for name, want := range map[string]bool{"ours": true, "theirs": false, "": false} {
		q := client.PolicyQuery{Key: "k", Format: "rpm", Hash: crypto.SHA256}
		if name != "" {
			q.Package = &client.Package{Name: name, Version: "1", Release: "2", Arch: "noarch"}
		}
		if d, err := c.TestPolicy(t.Context(), q); err != nil || d.Allowed != want {
			t.Errorf("policy test of %q: %+v, %v; want %v", name, d, err, want)
		}
	}
}

func pbError(err error) error {
	st, _ := pb.ToStatus(err)
	return st.Err()
}

// A message of the greatest size is taken, by itself and among others; a larger
// one is refused, and does not end the stream of one that is just too large.
func TestMessageSizes(t *testing.T) {
	t.Parallel()
	s := serve(t, gatewaytest.New(t, ""))
	s.Key(t, "k", keys.Ed25519)
	c := s.client(t, "root")
	k, err := c.Key(t.Context(), "k")
	if err != nil {
		t.Fatal(err)
	}
	part := func(id string, size, n int) *pb.SignItem {
		it := item("k", id)
		it.Digest, it.Format, it.Message, it.MessageSize = nil, "rpm", make([]byte, n), uint32(size)
		return it
	}
	// gatewaytest.Read refuses zeros: that it says so shows that they have arrived.
	st := openStream(t, s.raw(t, "root"))
	for left := pb.MaxContent; left > pb.MaxPart; left -= pb.MaxPart {
		st.send(part("largest", pb.MaxContent, pb.MaxPart))
	}
	if got := st.one(part("largest", pb.MaxContent, (pb.MaxContent-1)%pb.MaxPart+1)).GetError(); codes.Code(got.GetCode()) != codes.InvalidArgument || !strings.Contains(got.GetMessage(), "1 lines") {
		t.Errorf("of the greatest size: %v", got)
	}
	for name, items := range map[string][]*pb.SignItem{
		"larger":             {part("a", pb.MaxContent+1, pb.MaxPart)},
		"another between":    {part("a", 100, 50), part("b", 0, 50)},
		"another's part":     {part("a", 100, 50), part("b", 100, 50)},
		"another size":       {part("a", 100, 50), part("a", 101, 51)},
		"more than it said":  {part("a", 100, 50), part("a", 100, 51)},
		"an empty part":      {part("a", 100, 50), part("a", 100, 0)},
		"a first empty part": {part("a", 100, 0)},
	} {
		st := openStream(t, s.raw(t, "root"))
		st.send(items...)
		if _, err := st.st.Recv(); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v, want InvalidArgument", name, err)
		}
	}
	if _, err := pb.NewSigningServiceClient(s.raw(t, "root")).Sign(t.Context(), &pb.SignRequest{Item: part("a", 100, 100)}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a part by itself: %v, want InvalidArgument", err)
	}
	// A stream that ends amid its parts gives back what it had taken: five of these
	// would be more than there is.
	for range 8 {
		st := openStream(t, s.raw(t, "root"))
		st.send(part("half", pb.MaxContent, pb.MaxPart))
		if err := st.st.CloseSend(); err != nil {
			t.Fatal(err)
		}
		if _, err := st.st.Recv(); err == nil {
			t.Error("half a message was answered")
		}
	}
	m := c.MessageSigner(t.Context(), k, "rpm", client.Claim{})
	if _, err := m.SignMessage(nil, make([]byte, client.MaxMessage+1), digestOpts{crypto.SHA256}); err == nil || !strings.Contains(err.Error(), "16777217") {
		t.Errorf("the client sends one byte more: %v", err)
	}
	// Twelve of 12 MiB are more than one principal may have under way, and wait.
	var wg sync.WaitGroup
	for i := range 12 {
		wg.Go(func() {
			text := append(packageText(fmt.Sprintf("p%d", i)), make([]byte, 12<<20)...)
			_, err := m.SignMessage(nil, text, digestOpts{crypto.SHA256})
			if err == nil || !strings.Contains(err.Error(), "a part of its name has") {
				t.Errorf("message %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	if _, err := m.SignMessage(nil, packageText("last"), digestOpts{crypto.SHA256}); err != nil {
		t.Errorf("after all those: %v", err)
	}
}
