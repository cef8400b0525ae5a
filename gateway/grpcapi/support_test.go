package grpcapi_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/signwarden/signwarden/gateway/audit"
	"github.com/signwarden/signwarden/gateway/client"
	pb "github.com/signwarden/signwarden/gateway/gatewaypb"
	"github.com/signwarden/signwarden/gateway/gatewaytest"
	"github.com/signwarden/signwarden/gateway/grpcapi"
	"github.com/signwarden/signwarden/gateway/keys"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// authority is a private CA with its files.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string // the CA's certificate, PEM
	dir  string
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial(t), Subject: pkix.Name{CommonName: "test CA"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{key: key, dir: t.TempDir()}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	a.file = filepath.Join(a.dir, "ca.crt")
	writePEM(t, a.file, "CERTIFICATE", der)
	return a
}

func serial(t testing.TB) *big.Int {
	t.Helper()
	n, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func writePEM(t testing.TB, path, kind string, der []byte) {
	t.Helper()
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

// pair is the files of a certificate and its key.
type pair struct {
	certificate, key string
	leaf             *x509.Certificate
}

// issue makes a certificate for a client of that name, as change leaves it.
func (a *authority) issue(t testing.TB, name string, change ...func(*x509.Certificate)) pair {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial(t), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(12 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	for _, c := range change {
		c(tmpl)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp(a.dir, "pair")
	if err != nil {
		t.Fatal(err)
	}
	p := pair{filepath.Join(dir, "leaf.crt"), filepath.Join(dir, "leaf.key"), leaf}
	writePEM(t, p.certificate, "CERTIFICATE", der)
	writePEM(t, p.key, "PRIVATE KEY", keyDER)
	return p
}

// forServer makes a certificate one of a server on this host.
func forServer(c *x509.Certificate) {
	c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	c.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
}

// service is a gateway behind a server, with the authority of both sides.
type service struct {
	*gatewaytest.Fixture
	ca   *authority
	tls  *grpcapi.TLS
	addr string

	server   *grpcapi.Server
	listener *killable
}

// serve starts a server for f. What is to change in f.Token is changed before.
func serve(t testing.TB, f *gatewaytest.Fixture, change ...func(*grpcapi.Config)) *service {
	t.Helper()
	ca := newAuthority(t)
	p := ca.issue(t, "gateway", forServer)
	conf, err := grpcapi.NewTLS(grpcapi.TLSFiles{Certificate: p.certificate, Key: p.key, ClientCA: ca.file})
	if err != nil {
		t.Fatal(err)
	}
	s := &service{Fixture: f, ca: ca, tls: conf, addr: "127.0.0.1:0"}
	s.start(t, change...)
	return s
}

// start starts a server, again on the same address where there was one.
func (s *service) start(t testing.TB, change ...func(*grpcapi.Config)) {
	t.Helper()
	c := grpcapi.Config{Gateway: s.Gateway, TLS: s.tls.Config}
	for _, ch := range change {
		ch(&c)
	}
	srv, err := grpcapi.New(c)
	if err != nil {
		t.Fatal(err)
	}
	var l net.Listener
	wait(t, "the address to be free", func() bool {
		l, err = net.Listen("tcp", s.addr)
		return err == nil
	})
	s.addr, s.server, s.listener = l.Addr().String(), srv, &killable{Listener: l}
	var wg sync.WaitGroup
	k := s.listener
	wg.Go(func() {
		if err := srv.Serve(k); err != nil && !k.isDead() {
			t.Errorf("serving: %v", err)
		}
	})
	t.Cleanup(func() { srv.Shutdown(); wg.Wait() })
}

// killable is a listener that can be killed with every connection, as a
// process is.
type killable struct {
	net.Listener
	mu    sync.Mutex // guards what follows
	dead  bool
	conns []net.Conn
}

func (k *killable) Accept() (net.Conn, error) {
	c, err := k.Listener.Accept()
	if err != nil {
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.conns = append(k.conns, c)
	if k.dead {
		c.Close()
	}
	return c, nil
}

func (k *killable) accepted() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.conns)
}

func (k *killable) isDead() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.dead
}

func (k *killable) kill() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.dead = true
	k.Listener.Close()
	for _, c := range k.conns {
		c.Close()
	}
}

// profile writes a client profile and loads it.
func profile(t testing.TB, addr, ca string, p pair) client.Config {
	t.Helper()
	path := filepath.Join(t.TempDir(), "client.yaml")
	text := "address: " + addr + "\nca: " + ca + "\ncertificate: " + p.certificate + "\nkey: " + p.key + "\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := client.LoadProfile(path)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// profile is that of a client of the service.
func (s *service) profile(t testing.TB, name string) client.Config {
	t.Helper()
	return profile(t, s.addr, s.ca.file, s.ca.issue(t, name))
}

// client makes a client with a certificate of that name.
func (s *service) client(t testing.TB, name string) *client.Client {
	t.Helper()
	return dial(t, s.profile(t, name))
}

func dial(t testing.TB, conf client.Config) *client.Client {
	t.Helper()
	c, err := client.Dial(conf)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// raw makes a bare gRPC connection with a certificate of that name.
func (s *service) raw(t testing.TB, name string) *grpc.ClientConn {
	t.Helper()
	return rawConn(t, s.addr, s.profile(t, name).TLS)
}

func rawConn(t testing.TB, addr string, c *tls.Config) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(credentials.NewTLS(c)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// rawStream is a SignStream in a test's hands.
type rawStream struct {
	t  testing.TB
	st grpc.BidiStreamingClient[pb.SignStreamRequest, pb.SignStreamResponse]

	window   uint32
	messages int // that carried results
	drained  bool
}

func openStream(t testing.TB, conn *grpc.ClientConn) *rawStream {
	t.Helper()
	st, err := pb.NewSigningServiceClient(conn).SignStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	m, err := st.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if m.GetSettings() == nil {
		t.Fatalf("the first response is %v, want settings", m)
	}
	return &rawStream{t: t, st: st, window: m.GetSettings().GetWindow()}
}

func (r *rawStream) send(items ...*pb.SignItem) {
	r.t.Helper()
	if err := r.st.Send(&pb.SignStreamRequest{Items: items}); err != nil {
		r.t.Fatal(err)
	}
}

// results reads until it has n results, and returns them in their order.
func (r *rawStream) results(n int) []*pb.SignResult {
	r.t.Helper()
	var out []*pb.SignResult
	for len(out) < n {
		m, err := r.st.Recv()
		if err != nil {
			r.t.Fatalf("after %d of %d results: %v", len(out), n, err)
		}
		if len(m.GetResults()) > 0 {
			r.messages++
		}
		r.drained = r.drained || m.GetDrain() != nil
		out = append(out, m.GetResults()...)
	}
	if len(out) > n {
		r.t.Fatalf("%d results, want %d", len(out), n)
	}
	return out
}

// one sends one item and returns its result.
func (r *rawStream) one(it *pb.SignItem) *pb.SignResult {
	r.t.Helper()
	r.send(it)
	res := r.results(1)[0]
	if res.GetId() != it.GetId() {
		r.t.Fatalf("the result is of %q, want %q", res.GetId(), it.GetId())
	}
	return res
}

// item asks for a signature over the SHA-256 of its id.
func item(key, id string) *pb.SignItem {
	sum := sha256.Sum256([]byte(id))
	return &pb.SignItem{
		Id: id, Key: key, Digest: sum[:], Hash: pb.HashAlgorithm_HASH_ALGORITHM_SHA256, Format: "openpgp",
	}
}

// clientRequest is the same for a client.
func clientRequest(key, id string) client.Request {
	it := item(key, id)
	return client.Request{ID: id, Key: key, Digest: it.GetDigest(), Hash: crypto.SHA256, Format: "openpgp"}
}

// checkResult checks a result's signature and its row of the audit log.
func checkResult(t testing.TB, s *service, k keys.Key, it *pb.SignItem, sig *pb.Signature) {
	t.Helper()
	checkSignature(t, s, k, it.GetId(), it.GetHash().Hash(), it.GetDigest(),
		client.Signature{Bytes: sig.GetSignature(), Scheme: sig.GetScheme().Scheme(), AuditRow: sig.GetAuditRow()})
}

func checkSignature(t testing.TB, s *service, k keys.Key, id string, h crypto.Hash, digest []byte, sig client.Signature) {
	t.Helper()
	if err := keys.Verify(public(t, k), sig.Scheme, h, digest, sig.Bytes); err != nil {
		t.Errorf("item %q: signature %x: %v", id, sig.Bytes, err)
		return
	}
	rows := s.Store.Entries(t)
	if sig.AuditRow < 0 || sig.AuditRow >= int64(len(rows)) {
		t.Errorf("item %q: audit row %d of %d", id, sig.AuditRow, len(rows))
		return
	}
	sum := sha256.Sum256(sig.Bytes)
	e := rows[sig.AuditRow]
	if e.Outcome != audit.Signed || e.Request != id || e.Key != k.Name || e.FrontEnd != "grpc" || e.Signature != hex.EncodeToString(sum[:]) {
		t.Errorf("item %q: audit entry %+v, want it signed", id, e)
	}
}

func public(t testing.TB, k keys.Key) crypto.PublicKey {
	t.Helper()
	pub, err := x509.ParsePKIXPublicKey(k.Public)
	if err != nil {
		t.Fatal(err)
	}
	return pub
}

// signed is how often each id is recorded as signed.
func signed(t testing.TB, f *gatewaytest.Fixture) map[string]int {
	t.Helper()
	out := map[string]int{}
	for _, e := range f.Store.Entries(t) {
		if e.Action == "sign" && e.Outcome == audit.Signed {
			out[e.Request]++
		}
	}
	return out
}

// retryInfo is the delay that a status suggests, or nil.
func retryInfo(s *status.Status) *durationpb.Duration {
	for _, d := range s.Details() {
		if r, ok := d.(*errdetails.RetryInfo); ok {
			return r.GetRetryDelay()
		}
	}
	return nil
}

// wait polls until cond holds; only a test that fails gets to the limit.
func wait(t testing.TB, what string, cond func() bool) {
	t.Helper()
	limit := time.Now().Add(20 * time.Second)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !cond() {
		if time.Now().After(limit) {
			t.Fatalf("waited in vain for %s", what)
		}
		<-tick.C
	}
}

// listen serves g on a free port until the test ends.
func listen(t testing.TB, g *grpc.Server) (addr string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := g.Serve(l); err != nil {
			t.Errorf("serving: %v", err)
		}
	})
	t.Cleanup(func() { g.Stop(); wg.Wait() })
	return l.Addr().String()
}
