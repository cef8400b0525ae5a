package grpcapi_test

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
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
	"github.com/signwarden/signwarden/gateway/sigerr"
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

// Messages of SSH over the wire: what Ed25519 signs is the message itself.
func TestSSHMessages(t *testing.T) {
	t.Parallel()
	s := serve(t, gatewaytest.New(t, gatewaytest.Policy+`
  - {name: git, principals: [ci], keys: ["*"], may: [sign], formats: [ssh-sig], namespaces: [git]}
`))
	c := s.client(t, "ci")
	ses, err := c.Session(t.Context(), "ssh-sig")
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range []keys.Algorithm{keys.Ed25519, keys.P384} {
		s.Key(t, string(a), a)
		k, err := c.Key(t.Context(), string(a))
		if err != nil {
			t.Fatal(err)
		}
		m := c.MessageSigner(t.Context(), k, "ssh-sig", client.Claim{})
		sig, err := m.SignMessage(nil, []byte("SSHSIG git"), digestOpts{crypto.SHA512})
		if err != nil { // which has verified it
			t.Fatal(err)
		}
		raw, err := ses.SignMessage(t.Context(), k.Name, "ssh-sig", crypto.SHA512, []byte("SSHSIG git"), "note")
		if err != nil || a == keys.Ed25519 && !bytes.Equal(raw, sig) {
			t.Errorf("%s: a session gets %x, %v; a signer %x", a, raw, err, sig)
		}
		if e := s.Store.Last(t); e.Namespace != "git" || e.ClaimNote != "note" || e.FrontEnd != "grpc" {
			t.Errorf("audit entry %+v", e)
		}
		before := s.Token.Signs()
		if _, err := ses.SignMessage(t.Context(), k.Name, "ssh-sig", crypto.SHA512, []byte("SSHSIG file"), ""); !errors.Is(err, sigerr.Denied) {
			t.Errorf("%s: another namespace: %v, want Denied", a, err)
		}
		sum := sha512.Sum512([]byte("SSHSIG git"))
		if _, err := m.Sign(nil, sum[:], digestOpts{crypto.SHA512}); err == nil {
			t.Errorf("%s: a digest is signed", a)
		}
		if got := s.Token.Signs(); got != before {
			t.Errorf("%s: the token signed %d times", a, got-before)
		}
	}
	root := s.client(t, "root")
	for _, tt := range []struct {
		q    client.PolicyQuery
		want bool
	}{
		{client.PolicyQuery{Format: "ssh-sig", Namespace: "git"}, true},
		{client.PolicyQuery{Format: "ssh-sig", Namespace: "file"}, false},
		{client.PolicyQuery{Format: "ssh-sig"}, false},
		{client.PolicyQuery{Format: "ssh-auth", User: "git"}, false},
	} {
		tt.q.Principal, tt.q.Key, tt.q.Hash = "ci", "ed25519", crypto.SHA512
		if d, err := root.TestPolicy(t.Context(), tt.q); err != nil || d.Allowed != tt.want {
			t.Errorf("policy test of %+v: %+v, %v; want %v", tt.q, d, err, tt.want)
		}
	}
	if _, err := root.TestPolicy(t.Context(), client.PolicyQuery{Key: "k", Format: "ssh-auth", Namespace: "git", Hash: crypto.SHA512}); !errors.Is(err, sigerr.Invalid) {
		t.Errorf("a login with a namespace: %v, want Invalid", err)
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
