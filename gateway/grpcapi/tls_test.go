package grpcapi_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/signwarden/signwarden/gateway"
	"github.com/signwarden/signwarden/gateway/client"
	pb "github.com/signwarden/signwarden/gateway/gatewaypb"
	"github.com/signwarden/signwarden/gateway/gatewaytest"
	"github.com/signwarden/signwarden/gateway/grpcapi"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// untouched checks that nothing has reached the gateway.
func untouched(t *testing.T, s *service, rows int) {
	t.Helper()
	if got := len(s.Store.Entries(t)); got != rows || s.Token.Signs() != 0 {
		t.Errorf("%d new audit rows and %d signatures, want none", got-rows, s.Token.Signs())
	}
}

// Every connection that does not prove who it is ends before a request is read,
// and a person is told why.
func TestClientsRefused(t *testing.T) {
	t.Parallel()
	s := serve(t, gatewaytest.New(t, ""))
	s.Key(t, "k", keys.Ed25519)
	foreign := newAuthority(t)
	for _, tt := range []struct {
		name string
		p    pair
		tls  func(*tls.Config)
		kind error
		says string
	}{
		{"no certificate", s.ca.issue(t, "root"), func(c *tls.Config) { c.GetClientCertificate = nil },
			sigerr.Unauthenticated, "wants a client certificate"},
		{"expired", s.ca.issue(t, "root", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), nil,
			sigerr.Unauthenticated, "expired"},
		{"not valid yet", s.ca.issue(t, "root", func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }), nil,
			sigerr.Unauthenticated, "not valid yet"},
		{"a foreign CA", foreign.issue(t, "root"), nil, sigerr.Unauthenticated, "client CA did not issue it"},
		{"a server's certificate", s.ca.issue(t, "root", forServer), nil, sigerr.Unauthenticated, "client authentication"},
		{"TLS 1.2", s.ca.issue(t, "root"), func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 },
			sigerr.Unavailable, "TLS 1.3"},
		{"two URIs", s.ca.issue(t, "root", func(c *x509.Certificate) {
			c.URIs = []*url.URL{{Scheme: "spiffe", Host: "a", Path: "/b"}, {Scheme: "spiffe", Host: "a", Path: "/c"}}
		}), nil, sigerr.Unauthenticated, "2 URIs"},
		{"a name that is none", s.ca.issue(t, "*"), nil, sigerr.Unauthenticated, "principal name"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rows := len(s.Store.Entries(t))
			conf := profile(t, s.addr, s.ca.file, tt.p)
			if tt.tls != nil {
				tt.tls(conf.TLS)
			}
			c := dial(t, conf)
			calls := map[string]func() error{"ping": func() error { return c.Ping(t.Context()) }}
			if tt.kind != sigerr.Unavailable { // that would be tried again for seconds
				calls["sign"] = func() error { _, err := c.Sign(t.Context(), clientRequest("k", "id")); return err }
				calls["keys"] = func() error { _, err := c.Keys(t.Context()); return err }
			}
			for name, call := range calls {
				err := call()
				if !errors.Is(err, tt.kind) || !strings.Contains(err.Error(), tt.says) {
					t.Errorf("%s: got %v, want %v that says %q", name, err, tt.kind, tt.says)
				}
				t.Log(name, err)
			}
			untouched(t, s, rows)
		})
	}

	t.Run("plaintext", func(t *testing.T) {
		rows := len(s.Store.Entries(t))
		conn, err := grpc.NewClient(s.addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_, err = pb.NewSigningServiceClient(conn).Sign(t.Context(), &pb.SignRequest{Item: item("k", "id")})
		if status.Code(err) != codes.Unavailable {
			t.Errorf("got %v, want Unavailable", err)
		}
		untouched(t, s, rows)
	})
}

// A client refuses a gateway that is not the profile's, and says why.
func TestGatewayRefused(t *testing.T) {
	t.Parallel()
	s := serve(t, gatewaytest.New(t, ""))
	s.Key(t, "k", keys.Ed25519)
	rows := len(s.Store.Entries(t))
	foreign := newAuthority(t)
	for _, tt := range []struct {
		name string
		conf client.Config
		kind error
		says string
	}{
		{"another CA", profile(t, s.addr, foreign.file, s.ca.issue(t, "root")), sigerr.Unauthenticated, "certificate is not trusted"},
		{"another name", func() client.Config {
			c := s.profile(t, "root")
			c.TLS.ServerName = "signwarden.example"
			return c
		}(), sigerr.Unauthenticated, "server_name"},
		{"a plaintext server", profile(t, listen(t, grpc.NewServer()), s.ca.file, s.ca.issue(t, "root")), sigerr.Unavailable, "TLS"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := dial(t, tt.conf)
			err := c.Ping(t.Context())
			_, serr := c.Sign(t.Context(), clientRequest("k", "id"))
			for name, err := range map[string]error{"ping": err, "sign": serr} {
				if !errors.Is(err, tt.kind) || !strings.Contains(err.Error(), tt.says) {
					t.Errorf("%s: got %v, want %v that says %q", name, err, tt.kind, tt.says)
				}
				t.Log(name, err)
			}
			untouched(t, s, rows)
		})
	}
}

// A certificate that expires under an open stream ends its use there.
func TestExpiryOnOpenStream(t *testing.T) {
	t.Parallel()
	var late atomic.Bool
	f := gatewaytest.New(t, "", func(c *gateway.Config) {
		c.Now = func() time.Time {
			if late.Load() {
				return time.Now().Add(13 * time.Hour)
			}
			return time.Now()
		}
	})
	k := f.Key(t, "k", keys.Ed25519)
	s := serve(t, f)
	conn, cl := s.raw(t, "root"), s.client(t, "root")
	st := openStream(t, conn)
	it := item("k", "in-time")
	checkResult(t, s, k, it, st.one(it).GetSignature())
	if _, err := cl.Sign(t.Context(), clientRequest("k", "in-time-too")); err != nil {
		t.Fatal(err)
	}
	late.Store(true)
	rows, signs := len(s.Store.Entries(t)), s.Token.Signs()
	if got := status.FromProto(st.one(item("k", "late")).GetError()); got.Code() != codes.Unauthenticated {
		t.Errorf("got %v, want Unauthenticated", got)
	}
	_, err := cl.Sign(t.Context(), clientRequest("k", "late"))
	if !errors.Is(err, sigerr.Unauthenticated) || !strings.Contains(err.Error(), "expired") {
		t.Errorf("client: got %v, want Unauthenticated that says expired", err)
	}
	if _, err := cl.Keys(t.Context()); !errors.Is(err, sigerr.Unauthenticated) {
		t.Errorf("listing keys: got %v, want Unauthenticated", err)
	}
	if got := len(s.Store.Entries(t)); got != rows || s.Token.Signs() != signs {
		t.Errorf("%d audit rows and %d signatures of nobody", got-rows, s.Token.Signs()-signs)
	}
}

func TestSPIFFE(t *testing.T) {
	t.Parallel()
	const id = "spiffe://example.org/ns/build/sa/koji"
	s := serve(t, gatewaytest.New(t, gatewaytest.Policy+`
  - {name: build, principals: ["`+id+`"], keys: [k], may: [sign], formats: [openpgp], blind: true}
`))
	k := s.Key(t, "k", keys.Ed25519)
	u, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	// The common name, which may do everything, is not what counts.
	p := s.ca.issue(t, "root", func(c *x509.Certificate) { c.URIs = []*url.URL{u} })
	cl := dial(t, profile(t, s.addr, s.ca.file, p))
	r := clientRequest("k", "id")
	sig, err := cl.Sign(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	checkSignature(t, s, k, r.ID, r.Hash, r.Digest, sig)
	if e := s.Store.Last(t); e.Principal != id || e.Rule != "build" || !strings.HasPrefix(e.Via, "mtls:") {
		t.Errorf("audit entry %+v, want the SPIFFE id", e)
	}
	if _, err := cl.SetKeyState(t.Context(), "k", keys.Disabled); !errors.Is(err, sigerr.Denied) {
		t.Errorf("disabling the key: got %v, want Denied", err)
	}
}

// Health and reflection are for those with a certificate.
func TestHealthAndReflection(t *testing.T) {
	t.Parallel()
	s := serve(t, gatewaytest.New(t, ""))
	check := func(conn *grpc.ClientConn) error {
		r, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{})
		if err == nil && r.GetStatus() != healthpb.HealthCheckResponse_SERVING {
			err = errors.New(r.GetStatus().String())
		}
		return err
	}
	list := func(conn *grpc.ClientConn) ([]string, error) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		st, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
		if err != nil {
			return nil, err
		}
		_ = st.Send(&reflectionpb.ServerReflectionRequest{
			MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{},
		}) // Recv has the error
		m, err := st.Recv()
		if err != nil {
			return nil, err
		}
		var names []string
		for _, n := range m.GetListServicesResponse().GetService() {
			names = append(names, n.GetName())
		}
		return names, nil
	}
	conn := s.raw(t, "anyone")
	if err := check(conn); err != nil {
		t.Errorf("health: %v", err)
	}
	names, err := list(conn)
	if err != nil {
		t.Errorf("reflection: %v", err)
	}
	for _, want := range []string{"SigningService", "KeyService", "PolicyService", "AuditService"} {
		if !slices.Contains(names, "signwarden.v1."+want) {
			t.Errorf("reflection lists %v, want signwarden.v1.%s", names, want)
		}
	}
	c := s.profile(t, "anyone").TLS
	c.GetClientCertificate = nil
	for _, conn := range []*grpc.ClientConn{rawConn(t, s.addr, c), rawConn(t, s.addr, profile(t, s.addr, s.ca.file, s.ca.issue(t, "*")).TLS)} {
		if err := check(conn); err == nil {
			t.Error("health answers a client that did not prove who it is")
		}
		if names, err := list(conn); err == nil {
			t.Errorf("reflection tells %v to a client that did not prove who it is", names)
		}
	}
}

// A path that is not quite a method's must reach none: policy by path, such as
// a proxy's, would not have seen it as one.
func TestMalformedPath(t *testing.T) {
	t.Parallel()
	s := serve(t, gatewaytest.New(t, ""))
	s.Key(t, "k", keys.Ed25519)
	const sign = "signwarden.v1.SigningService/Sign"
	for _, tt := range []struct {
		path   string
		status string
		signs  int
	}{
		{"/" + sign, "0", 1}, // the others fail for their path alone
		{sign, "12", 0},
		{"//" + sign, "12", 0},
		{"/x/" + sign, "12", 0},
		{"/" + sign + "/", "12", 0},
		{"/signwarden.v1.SigningService//Sign", "12", 0},
		{"/signwarden.v1.signingservice/sign", "12", 0},
	} {
		t.Run(tt.path, func(t *testing.T) {
			rows, before := len(s.Store.Entries(t)), s.Token.Signs()
			got, err := rawCall(t, s, tt.path)
			if got != tt.status || err != nil && tt.signs > 0 {
				t.Errorf("status %q, %v; want %q", got, err, tt.status)
			}
			if n := len(s.Store.Entries(t)) - rows; n != tt.signs || s.Token.Signs()-before != tt.signs {
				t.Errorf("%d audit rows and %d signatures, want %d of each", n, s.Token.Signs()-before, tt.signs)
			}
		})
	}
}

// rawCall sends one unary call over HTTP/2 by hand and returns its grpc-status.
func rawCall(t *testing.T, s *service, path string) (grpcStatus string, err error) {
	t.Helper()
	conf := s.profile(t, "root").TLS
	conf.NextProtos = []string{"h2"}
	conn, err := tls.Dial("tcp", s.addr, conf)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	var headers bytes.Buffer
	enc := hpack.NewEncoder(&headers)
	for _, h := range [][2]string{
		{":method", "POST"}, {":scheme", "https"}, {":path", path}, {":authority", s.addr},
		{"content-type", "application/grpc"}, {"te", "trailers"},
	} {
		if err := enc.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]}); err != nil {
			t.Fatal(err)
		}
	}
	body, err := proto.Marshal(&pb.SignRequest{Item: item("k", "")})
	if err != nil {
		t.Fatal(err)
	}
	frame := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(body))), body...)

	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	fr := http2.NewFramer(conn, conn)
	fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	err = errors.Join(
		fr.WriteSettings(),
		fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: headers.Bytes(), EndHeaders: true}),
		fr.WriteData(1, true, frame),
	)
	if err != nil {
		t.Fatal(err)
	}
	for {
		f, err := fr.ReadFrame()
		if err != nil {
			return "", err
		}
		switch f := f.(type) {
		case *http2.MetaHeadersFrame:
			for _, h := range f.Fields {
				if h.Name == "grpc-status" {
					return h.Value, nil
				}
			}
		case *http2.RSTStreamFrame:
			return "", errors.New(f.ErrCode.String())
		}
	}
}

func TestReload(t *testing.T) {
	t.Parallel()
	s := serve(t, gatewaytest.New(t, ""))
	k := s.Key(t, "k", keys.Ed25519)
	first := s.tls.Config().Certificates[0].Leaf
	st := openStream(t, s.raw(t, "root"))
	served := func(name string, want *x509.Certificate) {
		t.Helper()
		conf := s.profile(t, "root").TLS
		conf.NextProtos = []string{"h2"}
		conn, err := tls.Dial("tcp", s.addr, conf)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		defer conn.Close()
		if got := conn.ConnectionState().PeerCertificates[0]; !got.Equal(want) {
			t.Errorf("%s: certificate %v is served, want %v", name, got.SerialNumber, want.SerialNumber)
		}
		it := item("k", name)
		checkResult(t, s, k, it, st.one(it).GetSignature())
	}
	served("at-first", first)
	second := s.ca.issue(t, "gateway", forServer)
	files := grpcapi.TLSFiles{Certificate: second.certificate, Key: second.key, ClientCA: s.ca.file}
	if err := s.tls.Reload(files); err != nil {
		t.Fatal(err)
	}
	served("reloaded", second.leaf)

	third := s.ca.issue(t, "gateway", forServer)
	empty := filepath.Join(t.TempDir(), "empty.crt")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string]grpcapi.TLSFiles{
		"another-key":    {Certificate: third.certificate, Key: second.key, ClientCA: s.ca.file},
		"no-certificate": {Certificate: third.certificate + ".none", Key: third.key, ClientCA: s.ca.file},
		"no-CA":          {Certificate: third.certificate, Key: third.key, ClientCA: s.ca.file + ".none"},
		"an-empty-CA":    {Certificate: third.certificate, Key: third.key, ClientCA: empty},
	} {
		err := s.tls.Reload(bad)
		if err == nil || !strings.Contains(err.Error(), bad.Certificate) && !strings.Contains(err.Error(), bad.ClientCA) {
			t.Errorf("%s: got %v, want an error that names the file", name, err)
		}
		served(name, second.leaf)
	}

	// Another client CA holds for new connections at once.
	other := newAuthority(t)
	files.ClientCA = other.file
	if err := s.tls.Reload(files); err != nil {
		t.Fatal(err)
	}
	if err := s.client(t, "root").Ping(t.Context()); !errors.Is(err, sigerr.Unauthenticated) {
		t.Errorf("a client of the old CA: got %v, want Unauthenticated", err)
	}
	it := item("k", "open-still")
	checkResult(t, s, k, it, st.one(it).GetSignature())
}

// lines is a log that a test can wait on.
type lines chan string

func (l lines) Write(b []byte) (int, error) {
	select {
	case l <- string(b):
	default: // nobody waits for so many
	}
	return len(b), nil
}

// An operator who is asked about a refused certificate finds it in the log.
func TestRefusedClientIsLogged(t *testing.T) {
	t.Parallel()
	log := make(lines, 64)
	s := serve(t, gatewaytest.New(t, ""), func(c *grpcapi.Config) { c.Logger = slog.New(slog.NewTextHandler(log, nil)) })
	if err := dial(t, profile(t, s.addr, s.ca.file, newAuthority(t).issue(t, "root"))).Ping(t.Context()); err == nil {
		t.Fatal("a foreign certificate is accepted")
	}
	for {
		select {
		case line := <-log:
			if strings.Contains(line, "client refused") && strings.Contains(line, "unknown authority") && strings.Contains(line, "127.0.0.1") {
				return
			}
		case <-t.Context().Done():
			t.Fatal("the log says nothing")
		}
	}
}

// Every connection proves itself anew: there are no tickets to resume with.
func TestNoResumption(t *testing.T) {
	t.Parallel()
	s := serve(t, gatewaytest.New(t, ""))
	conf := s.profile(t, "root").TLS.Clone()
	conf.ClientSessionCache, conf.NextProtos = tls.NewLRUClientSessionCache(4), []string{"h2"}
	for range 3 {
		c, err := tls.Dial("tcp", s.addr, conf)
		if err != nil {
			t.Fatal(err)
		}
		// A ticket would come before the first bytes of HTTP/2.
		if _, err := c.Read(make([]byte, 9)); err != nil {
			t.Fatal(err)
		}
		if c.ConnectionState().DidResume {
			t.Error("the connection was resumed")
		}
		c.Close()
	}
}
