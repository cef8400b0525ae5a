package grpcapi_test

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/signwarden/signwarden/gateway"
	"github.com/signwarden/signwarden/gateway/audit"
	"github.com/signwarden/signwarden/gateway/client"
	pb "github.com/signwarden/signwarden/gateway/gatewaypb"
	"github.com/signwarden/signwarden/gateway/gatewaytest"
	"github.com/signwarden/signwarden/gateway/grpcapi"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// withKeys fills the store before the gateway reads it.
func withKeys(all []keys.Key) func(*gateway.Config) {
	return func(c *gateway.Config) { c.Store.(*gatewaytest.Store).State.Keys = all }
}

func manyKeys(t *testing.T, n int) []keys.Key {
	t.Helper()
	pub, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	all := make([]keys.Key, n)
	for i := range all {
		all[i] = keys.Key{
			Name: fmt.Sprintf("k-%05d", i), Algorithm: keys.Ed25519, State: keys.Enabled,
			Token: "memory", ID: []byte{byte(i >> 8), byte(i)}, Public: spki, Created: time.Unix(1_700_000_000, 0),
		}
	}
	return all
}

// A key that others brought into the token is adopted, with its certificate.
func TestAdoptKey(t *testing.T) {
	t.Parallel()
	f := gatewaytest.New(t, kindsPolicy)
	pub, primary := f.Put(t, "theirs"), f.Put(t, "primary")
	s := serve(t, f)
	root := s.client(t, "root")
	cert := gatewaytest.Certificate(t, "A <a@example.org>", pub, primary)
	k, err := root.AdoptKey(t.Context(), client.Adoption{Name: "k-1", TokenID: []byte("theirs"), OpenPGP: cert, PrimaryID: []byte("primary")})
	if err != nil {
		t.Fatal(err)
	}
	if p, ok := k.PublicKey.(ed25519.PublicKey); !ok || !p.Equal(pub) || string(k.TokenID) != "theirs" || !k.Created.Equal(gatewaytest.Created) ||
		k.OpenPGP == nil || k.OpenPGP.Layout != keys.Subkey || string(k.OpenPGP.Certificate) != string(cert) {
		t.Errorf("key %+v", k)
	}
	for want, a := range map[error]client.Adoption{
		sigerr.Conflict: {Name: "k-2", TokenID: []byte("theirs")},
		sigerr.Invalid:  {Name: "k-2", TokenID: []byte("nobody's")},
	} {
		if _, err := root.AdoptKey(t.Context(), a); !errors.Is(err, want) {
			t.Errorf("%q: got %v, want %v", a.TokenID, err, want)
		}
	}
	if _, err := s.client(t, "carol").AdoptKey(t.Context(), client.Adoption{Name: "k-2", TokenID: []byte("primary")}); !errors.Is(err, sigerr.Denied) {
		t.Errorf("carol: %v", err)
	}
}

func TestListKeysInPages(t *testing.T) {
	t.Parallel()
	const n = 1203
	s := serve(t, gatewaytest.New(t, kindsPolicy+`
  - {name: some, principals: [dave], keys: ["k-000?7"], may: [read]}
`, withKeys(manyKeys(t, n))))
	all, err := s.client(t, "root").Keys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != n {
		t.Fatalf("%d keys, want %d", len(all), n)
	}
	for i, k := range all {
		if k.Name != fmt.Sprintf("k-%05d", i) || k.Algorithm != keys.Ed25519 || k.State != keys.Enabled || !k.MaySign ||
			k.Token != "memory" || len(k.TokenID) != 2 || !k.Created.Equal(time.Unix(1_700_000_000, 0)) {
			t.Fatalf("key %d is %+v", i, k)
		}
	}
	pages := 0
	for after, more := "", true; more; pages++ {
		r, err := pb.NewKeyServiceClient(s.raw(t, "root")).ListKeys(t.Context(), &pb.ListKeysRequest{After: after})
		if err != nil {
			t.Fatal(err)
		}
		after, more = r.GetNextAfter(), r.GetNextAfter() != ""
	}
	if pages != 3 {
		t.Errorf("%d pages, want 3", pages)
	}
	dave, err := s.client(t, "dave").Keys(t.Context())
	if err != nil || len(dave) != 10 || dave[0].MaySign {
		t.Errorf("dave: got %d keys, %v; want the 10 that he may read", len(dave), err)
	}
	if none, err := s.client(t, "nobody").Keys(t.Context()); err != nil || len(none) != 0 {
		t.Errorf("nobody: got %d keys, %v; want none", len(none), err)
	}
}

func TestKeys(t *testing.T) {
	t.Parallel()
	s := serve(t, gatewaytest.New(t, kindsPolicy))
	root, carol := s.client(t, "root"), s.client(t, "carol")
	expires := time.Now().Add(1000 * time.Hour).Truncate(time.Second)
	k, err := root.CreateKey(t.Context(), client.KeySpec{
		Name: "k-1", Algorithm: keys.P256, UserID: "Release <release@example.org>", Layout: keys.Single, Expires: expires,
	})
	if err != nil {
		t.Fatal(err)
	}
	if o := k.OpenPGP; o == nil || o.UserID != "Release <release@example.org>" || o.Layout != keys.Single || !o.Expires.Equal(expires) || len(o.Certificate) == 0 {
		t.Errorf("OpenPGP %+v", o)
	}
	if s.Token.Pairs() != 1 || keys.AlgorithmOf(k.PublicKey) != keys.P256 {
		t.Errorf("%d pairs in the token, public key %T", s.Token.Pairs(), k.PublicKey)
	}
	if _, err := root.CreateKey(t.Context(), client.KeySpec{Name: "k-2", Algorithm: keys.Ed25519}); err != nil {
		t.Error(err)
	}
	got, err := carol.Key(t.Context(), "k-1")
	if err != nil || !got.MaySign || got.State != keys.Enabled || string(got.SPKI) != string(k.SPKI) {
		t.Errorf("carol sees %+v, %v", got, err)
	}
	for _, to := range []keys.State{keys.Disabled, keys.Enabled} {
		got, err := root.SetKeyState(t.Context(), "k-1", to)
		if err != nil || got.State != to {
			t.Errorf("to %s: got %s, %v", to, got.State, err)
		}
		if e := s.Store.Last(t); e.Action != "key.state" || e.Outcome != audit.Done || e.Principal != "root" || e.FrontEnd != "grpc" {
			t.Errorf("to %s: audit entry %+v", to, e)
		}
	}
	pairs := s.Token.Pairs()
	for name, tt := range map[string]struct {
		err  error
		kind error
	}{
		"a name that is taken":  {second(root.CreateKey(t.Context(), client.KeySpec{Name: "k-1", Algorithm: keys.P256})), sigerr.Conflict},
		"an algorithm unknown":  {second(root.CreateKey(t.Context(), client.KeySpec{Name: "k-3", Algorithm: "dsa"})), sigerr.Invalid},
		"a state unknown":       {second(root.SetKeyState(t.Context(), "k-1", "lost")), sigerr.Invalid},
		"create without a rule": {second(carol.CreateKey(t.Context(), client.KeySpec{Name: "k-4", Algorithm: keys.P256})), sigerr.Denied},
		"state without a rule":  {second(carol.SetKeyState(t.Context(), "k-1", keys.Disabled)), sigerr.Denied},
		"no such key":           {second(root.Key(t.Context(), "none")), sigerr.NotFound},
		"another's key":         {second(s.client(t, "dave").Key(t.Context(), "k-1")), sigerr.NotFound},
	} {
		if sigerr.Kind(tt.err) != tt.kind {
			t.Errorf("%s: got %v, want %v", name, tt.err, tt.kind)
		}
	}
	if got, err := root.Key(t.Context(), "k-1"); err != nil || got.State != keys.Enabled || s.Token.Pairs() != pairs {
		t.Errorf("after the refusals: state %s, %v, %d pairs", got.State, err, s.Token.Pairs()-pairs)
	}
}

func second[T any](_ T, err error) error { return err }

func TestPolicyService(t *testing.T) {
	t.Parallel()
	s := serve(t, gatewaytest.New(t, kindsPolicy))
	root, carol := s.client(t, "root"), s.client(t, "carol")
	next := kindsPolicy + "  - {name: new, principals: [dave], keys: [d], may: [read]}\n"
	n, err := root.ApplyPolicy(t.Context(), []byte(next))
	if err != nil || n != 5 {
		t.Errorf("apply: got %d rules, %v; want 5", n, err)
	}
	if got, err := root.Policy(t.Context()); err != nil || string(got) != next || string(s.Store.State.Policy) != next {
		t.Errorf("get: %q, %v", got, err)
	}
	for name, tt := range map[string]struct {
		err  error
		kind error
	}{
		"one that does not parse":      {second(root.ApplyPolicy(t.Context(), []byte("rules: 7"))), sigerr.Invalid},
		"one that locks out":           {second(root.ApplyPolicy(t.Context(), []byte("rules: []"))), sigerr.Conflict},
		"one that is too large":        {second(root.ApplyPolicy(t.Context(), make([]byte, 513<<10))), sigerr.Invalid},
		"one larger than messages are": {second(root.ApplyPolicy(t.Context(), make([]byte, 2<<20))), sigerr.Invalid},
		"apply without a rule":         {second(carol.ApplyPolicy(t.Context(), []byte(next))), sigerr.Denied},
		"get without a rule":           {second(carol.Policy(t.Context())), sigerr.Denied},
		"test for another":             {second(carol.TestPolicy(t.Context(), client.PolicyQuery{Principal: "root", Key: "k", Format: "rpm"})), sigerr.Denied},
		"test without a format":        {second(root.TestPolicy(t.Context(), client.PolicyQuery{Key: "k"})), sigerr.Invalid},
		"test of SHA-1":                {second(root.TestPolicy(t.Context(), client.PolicyQuery{Key: "k", Format: "rpm", Hash: crypto.SHA1})), sigerr.Invalid},
	} {
		if sigerr.Kind(tt.err) != tt.kind {
			t.Errorf("%s: got %v, want %v", name, tt.err, tt.kind)
		}
	}
	if got := string(s.Store.State.Policy); got != next {
		t.Errorf("the policy is %q after the refusals", got)
	}
	for name, tt := range map[string]struct {
		c    *client.Client
		q    client.PolicyQuery
		want bool
		rule string
		each int
	}{
		"defaults":         {carol, client.PolicyQuery{Key: "k-1", Format: "openpgp"}, true, "carol", 0},
		"another format":   {carol, client.PolicyQuery{Key: "k-1", Format: "rpm"}, false, "", 0},
		"read":             {carol, client.PolicyQuery{Key: "readable", Action: "read"}, true, "reader", 0},
		"admin":            {carol, client.PolicyQuery{Key: "readable", Action: "admin"}, false, "", 0},
		"by administrator": {root, client.PolicyQuery{Principal: "dave", Key: "d", Action: "read"}, true, "new", 5},
		"SHA-384":          {root, client.PolicyQuery{Key: "d", Format: "rpm", Hash: crypto.SHA384}, true, "root", 5},
	} {
		d, err := tt.c.TestPolicy(t.Context(), tt.q)
		if err != nil || d.Allowed != tt.want || d.Rule != tt.rule || len(d.Rules) != tt.each || d.Allowed == (d.Reason != "" && d.Rule == "") {
			t.Errorf("%s: got %+v, %v", name, d, err)
		}
	}
}

func TestAuditService(t *testing.T) {
	t.Parallel()
	s := serve(t, gatewaytest.New(t, kindsPolicy))
	root := s.client(t, "root")
	s.Key(t, "k-1", keys.Ed25519)
	// Rows of some 24 KiB, in all more than a client takes in one message.
	note := strings.Repeat("\x01", 1024)
	const n = 200
	st := openStream(t, s.raw(t, "root"))
	for i := range n {
		it := item("k-1", fmt.Sprint("id-", i))
		it.Claim = &pb.Claim{File: note, ContentSha256: note, Nevra: note, Note: note}
		if r := st.one(it); r.GetSignature() == nil {
			t.Fatal(r)
		}
	}
	all := s.Store.Entries(t)
	var got []audit.Entry
	for from := int64(0); ; {
		first, rows, err := root.AuditEntries(t.Context(), from, 1000)
		if err != nil {
			t.Fatal(err)
		}
		if first != from {
			t.Fatalf("rows from %d, want %d", first, from)
		}
		if len(rows) == 0 {
			break
		}
		for _, r := range rows {
			e, err := audit.Parse(r)
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, e)
		}
		from += int64(len(rows))
	}
	if !slices.Equal(got, all) {
		t.Errorf("%d rows, want the %d of the log", len(got), len(all))
	}
	first, rows, err := root.AuditEntries(t.Context(), -1, 3)
	if err != nil || first != int64(len(all)-3) || len(rows) != 3 || string(rows[2]) != string(all[len(all)-1].Canonical()) {
		t.Errorf("the last 3: got %d from %d, %v", len(rows), first, err)
	}
	first, rows, err = root.AuditEntries(t.Context(), -1, 1000)
	if err != nil || len(rows) == 0 || first+int64(len(rows)) != int64(len(all)) || string(rows[len(rows)-1]) != string(all[len(all)-1].Canonical()) {
		t.Errorf("the last 1,000: got %d from %d, %v; want as many of the last as fit", len(rows), first, err)
	}
	if _, _, err := root.AuditEntries(t.Context(), 0, 1001); !errors.Is(err, sigerr.Invalid) {
		t.Errorf("1,001 rows: got %v, want Invalid", err)
	}
	if _, _, err := s.client(t, "carol").AuditEntries(t.Context(), 0, 1); !errors.Is(err, sigerr.Denied) {
		t.Errorf("without a rule: got %v, want Denied", err)
	}
}

// calls knows every method: what root asks, whether that changes something, and
// how many audit rows that leaves.
func calls(conn *grpc.ClientConn) map[string]struct {
	rows int
	call func(context.Context) error
} {
	sg, ks := pb.NewSigningServiceClient(conn), pb.NewKeyServiceClient(conn)
	ps, as := pb.NewPolicyServiceClient(conn), pb.NewAuditServiceClient(conn)
	return map[string]struct {
		rows int
		call func(context.Context) error
	}{
		"SigningService.Sign": {1, func(ctx context.Context) error {
			return second(sg.Sign(ctx, &pb.SignRequest{Item: item("k", "unary")}))
		}},
		"SigningService.SignStream": {1, func(ctx context.Context) error {
			st, err := sg.SignStream(ctx)
			if err != nil {
				return err
			}
			if err := st.Send(&pb.SignStreamRequest{Items: []*pb.SignItem{item("k", "stream")}}); err != nil {
				return err
			}
			for {
				m, err := st.Recv()
				if err != nil {
					return err
				}
				for _, r := range m.GetResults() {
					return status.FromProto(r.GetError()).Err()
				}
			}
		}},
		"KeyService.CreateKey": {1, func(ctx context.Context) error {
			return second(ks.CreateKey(ctx, &pb.CreateKeyRequest{Name: "new", Algorithm: "ed25519"}))
		}},
		"KeyService.AdoptKey": {1, func(ctx context.Context) error {
			return second(ks.AdoptKey(ctx, &pb.AdoptKeyRequest{Name: "adopted", TokenId: []byte("theirs")}))
		}},
		"KeyService.SetKeyState": {1, func(ctx context.Context) error {
			return second(ks.SetKeyState(ctx, &pb.SetKeyStateRequest{Name: "other", State: "disabled"}))
		}},
		"KeyService.CertifyKey": {1, func(ctx context.Context) error {
			return second(ks.CertifyKey(ctx, &pb.CertifyKeyRequest{Name: "k", Subject: &pb.Name{CommonName: "k"}, Usage: "kmod"}))
		}},
		"KeyService.ImportChain": {1, func(ctx context.Context) error {
			r, _ := ks.GetKey(ctx, &pb.GetKeyRequest{Name: "k"}) // the certificate of CertifyKey, for who may see it
			return second(ks.ImportChain(ctx, &pb.ImportChainRequest{Name: "k", Chain: r.GetKey().GetX509Chain()}))
		}},
		"KeyService.CreateSigningRequest": {1, func(ctx context.Context) error {
			return second(ks.CreateSigningRequest(ctx, &pb.CreateSigningRequestRequest{Name: "k", Subject: &pb.Name{CommonName: "k"}}))
		}},
		"KeyService.AmendOpenPGP": {1, func(ctx context.Context) error {
			return second(ks.AmendOpenPGP(ctx, &pb.AmendOpenPGPRequest{Name: "pgp", Change: &pb.AmendOpenPGPRequest_AddUserId{AddUserId: "x"}}))
		}},
		"KeyService.RotateOpenPGP": {1, func(ctx context.Context) error {
			return second(ks.RotateOpenPGP(ctx, &pb.RotateOpenPGPRequest{Name: "pgp", To: "rotated"}))
		}},
		"KeyService.GetKey": {0, func(ctx context.Context) error {
			return second(ks.GetKey(ctx, &pb.GetKeyRequest{Name: "k"}))
		}},
		"KeyService.ListKeys": {0, func(ctx context.Context) error {
			return second(ks.ListKeys(ctx, &pb.ListKeysRequest{}))
		}},
		"PolicyService.ApplyPolicy": {1, func(ctx context.Context) error {
			return second(ps.ApplyPolicy(ctx, &pb.ApplyPolicyRequest{Source: gatewaytest.Policy + "\n"}))
		}},
		"PolicyService.GetPolicy": {0, func(ctx context.Context) error {
			return second(ps.GetPolicy(ctx, &pb.GetPolicyRequest{}))
		}},
		"PolicyService.TestPolicy": {0, func(ctx context.Context) error {
			return second(ps.TestPolicy(ctx, &pb.TestPolicyRequest{Principal: "dave", Key: "k", Format: "openpgp"}))
		}},
		"AuditService.ListEntries": {0, func(ctx context.Context) error {
			return second(as.ListEntries(ctx, &pb.ListEntriesRequest{}))
		}},
	}
}

// Each method that changes something leaves one audit row, for who may and for
// who may not; a caller whose certificate has expired gets nowhere. A method
// that is added without a line in calls fails here.
func TestEveryMethod(t *testing.T) {
	t.Parallel()
	var expired atomic.Bool
	f := gatewaytest.New(t, "", func(c *gateway.Config) {
		c.Now = func() time.Time {
			if expired.Load() {
				return time.Now().Add(13 * time.Hour)
			}
			return time.Now()
		}
	})
	f.Key(t, "k", keys.Ed25519)
	f.Key(t, "other", keys.Ed25519)
	f.Put(t, "theirs")
	if _, err := f.CreateKey(t.Context(), f.Root, "test", gateway.KeySpec{Name: "pgp", Algorithm: keys.Ed25519, UserID: "p"}); err != nil {
		t.Fatal(err)
	}
	s := serve(t, f)
	root, nobody := calls(s.raw(t, "root")), calls(s.raw(t, "nobody"))

	var methods []string
	for _, file := range []protoreflect.FileDescriptor{pb.File_signwarden_v1_signing_proto, pb.File_signwarden_v1_admin_proto} {
		for i := range file.Services().Len() {
			sd := file.Services().Get(i)
			for j := range sd.Methods().Len() {
				methods = append(methods, string(sd.Name())+"."+string(sd.Methods().Get(j).Name()))
			}
		}
	}
	for _, m := range methods {
		c, ok := root[m]
		if !ok {
			t.Errorf("%s: this test does not know what it is to leave in the audit log", m)
			continue
		}
		t.Run(m, func(t *testing.T) {
			rows := len(s.Store.Entries(t))
			if err := nobody[m].call(t.Context()); err == nil && c.rows > 0 {
				t.Error("it is done for nobody in particular")
			}
			if got := len(s.Store.Entries(t)) - rows; got < c.rows || got > 1 {
				t.Errorf("a refusal left %d audit rows, want %d", got, c.rows)
			}
			rows = len(s.Store.Entries(t))
			if err := c.call(t.Context()); err != nil {
				t.Errorf("for root: %v", err)
			}
			if got := len(s.Store.Entries(t)) - rows; got != c.rows {
				t.Errorf("it left %d audit rows, want %d", got, c.rows)
			}
			if e := s.Store.Last(t); c.rows > 0 && (e.Principal != "root" || e.FrontEnd != "grpc" || e.Outcome != audit.Signed && e.Outcome != audit.Done) {
				t.Errorf("audit entry %+v", e)
			}
		})
	}
	if len(methods) != len(root) {
		t.Errorf("%d methods are served and the test knows %d", len(methods), len(root))
	}
	expired.Store(true)
	rows, signs := len(s.Store.Entries(t)), s.Token.Signs()
	for m, c := range root {
		if err := c.call(t.Context()); status.Code(err) != codes.Unauthenticated {
			t.Errorf("%s with an expired certificate: got %v, want Unauthenticated", m, err)
		}
	}
	if got := len(s.Store.Entries(t)); got != rows || s.Token.Signs() != signs {
		t.Errorf("%d audit rows and %d signatures of nobody", got-rows, s.Token.Signs()-signs)
	}
}

func TestNewNeeds(t *testing.T) {
	t.Parallel()
	s := serve(t, gatewaytest.New(t, ""))
	for name, c := range map[string]grpcapi.Config{
		"no gateway": {TLS: s.tls.Config},
		"no TLS":     {Gateway: s.Gateway},
	} {
		if _, err := grpcapi.New(c); err == nil {
			t.Errorf("%s: a server was made", name)
		}
	}
}
