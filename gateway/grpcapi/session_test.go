package grpcapi_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509/pkix"
	"errors"
	"strings"
	"sync"
	"testing"

	"github.com/signwarden/signwarden/gateway"
	"github.com/signwarden/signwarden/gateway/audit"
	"github.com/signwarden/signwarden/gateway/gatewaytest"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// A session that is opened while the gateway is away says so, and has the keys
// when it is there; what it has it keeps when the gateway goes away again.
func TestOpenSession(t *testing.T) {
	t.Parallel()
	f := gatewaytest.New(t, kindsPolicy)
	f.Key(t, "k-1", keys.Ed25519)
	s := serve(t, f)
	s.server.Shutdown()

	ses := s.client(t, "carol").OpenSession("openpgp")
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := ses.PublicKeys(ended); !errors.Is(err, sigerr.Canceled) {
		t.Errorf("before the first attempt: got %v, want Canceled", err)
	}
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { ses.Run(ctx) })
	defer wg.Wait()
	defer stop()
	if _, err := ses.PublicKeys(t.Context()); !errors.Is(err, sigerr.Unavailable) {
		t.Errorf("while the gateway is away: got %v, want Unavailable", err)
	}
	if _, err := ses.Certificates(t.Context()); !errors.Is(err, sigerr.Unavailable) {
		t.Errorf("certificates while the gateway is away: got %v, want Unavailable", err)
	}
	s.start(t)
	wait(t, "the keys", func() bool {
		all, err := ses.PublicKeys(t.Context())
		return err == nil && all["k-1"] != nil
	})
	s.server.Shutdown()
	if all, err := ses.PublicKeys(t.Context()); err != nil || len(all) != 1 {
		t.Errorf("when it is away again: got %v, %v", all, err)
	}
}

// Certificates are those of the keys that may be signed with, in process and over gRPC.
func TestSessionCertificates(t *testing.T) {
	t.Parallel()
	f := gatewaytest.New(t, kindsPolicy)
	f.Key(t, "k-1", keys.P256)
	f.Key(t, "k-2", keys.P256)
	f.Key(t, "readable", keys.P256)
	want := map[string][]byte{}
	for _, name := range []string{"k-1", "readable"} {
		k, err := f.CertifyKey(t.Context(), f.Root, "test", name, gateway.X509Spec{Subject: pkix.Name{CommonName: name}, Usage: gateway.CodeSign})
		if err != nil {
			t.Fatal(err)
		}
		want[name] = k.X509[0]
	}
	ses, err := serve(t, f).client(t, "carol").Session(t.Context(), "openpgp")
	if err != nil {
		t.Fatal(err)
	}
	got, err := ses.Certificates(t.Context())
	if err != nil || len(got) != 1 || !bytes.Equal(got["k-1"], want["k-1"]) {
		t.Errorf("got %d certificates, %v; want that of k-1", len(got), err)
	}
	got, err = f.Session(f.Root, "test", "openpgp").Certificates(t.Context())
	if err != nil || len(got) != 2 || !bytes.Equal(got["readable"], want["readable"]) {
		t.Errorf("in process: got %d certificates, %v; want two", len(got), err)
	}
}

// An error names the request by which the audit log knows it.
func TestSessionNamesRequest(t *testing.T) {
	t.Parallel()
	f := gatewaytest.New(t, kindsPolicy)
	f.Key(t, "readable", keys.Ed25519)
	s := serve(t, f)
	ses, err := s.client(t, "carol").Session(t.Context(), "openpgp")
	if err != nil {
		t.Fatal(err)
	}
	it, sum := item("readable", "text"), sha256.Sum256([]byte("text"))
	_, err = ses.Sign(t.Context(), "readable", it.GetHash().Hash(), sum[:], "")
	e := s.Store.Last(t)
	if err == nil || e.Outcome != audit.Denied || e.Request == "" || !strings.Contains(err.Error(), "request "+e.Request+": ") {
		t.Errorf("got %v, want the request of the audit entry %+v", err, e)
	}
}
