package grpcapi_test

import (
	"errors"
	"fmt"
	"testing"

	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/signwarden/signwarden/gateway/gatewaytest"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// The health of the process and that of the service are two.
func TestHealth(t *testing.T) {
	t.Parallel()
	s := serve(t, gatewaytest.New(t, ""))
	health := healthpb.NewHealthClient(s.raw(t, "root"))
	const signing = "signwarden.v1.SigningService"
	check := func(want map[string]healthpb.HealthCheckResponse_ServingStatus) {
		t.Helper()
		for name, w := range want {
			r, err := health.Check(t.Context(), &healthpb.HealthCheckRequest{Service: name})
			if err != nil || r.GetStatus() != w {
				t.Errorf("%q: %v, %v; want %v", name, r.GetStatus(), err, w)
			}
		}
	}
	const yes, no = healthpb.HealthCheckResponse_SERVING, healthpb.HealthCheckResponse_NOT_SERVING
	check(map[string]healthpb.HealthCheckResponse_ServingStatus{"": yes, signing: yes})
	s.server.SetReady(false)
	check(map[string]healthpb.HealthCheckResponse_ServingStatus{"": yes, signing: no})
	s.server.SetReady(true)
	check(map[string]healthpb.HealthCheckResponse_ServingStatus{"": yes, signing: yes})
	if _, err := health.Check(t.Context(), &healthpb.HealthCheckRequest{Service: "other"}); err == nil {
		t.Error("a service that is not there has a health")
	}
}

// A client of several replicas begins nothing at one that is not ready. That one
// lacks the key here, so that a request which reached it would show.
func TestUnreadyReplica(t *testing.T) {
	t.Parallel()
	first := serve(t, gatewaytest.New(t, ""))
	first.Key(t, "k", keys.Ed25519)
	other := &service{Fixture: gatewaytest.New(t, ""), ca: first.ca, tls: first.tls, addr: "127.0.0.1:0"}
	other.start(t)
	other.server.SetReady(false)
	n := 0
	sign := func(all []*service) error {
		n++
		c := dialAll(t, all) // each with streams of its own
		_, err := c.Sign(t.Context(), clientRequest("k", fmt.Sprintf("id-%d", n)))
		return err
	}
	for range 5 {
		for _, all := range [][]*service{{first, other}, {other, first}} {
			if err := sign(all); err != nil {
				t.Errorf("a request: %v", err)
			}
		}
	}
	other.server.SetReady(true)
	first.server.SetReady(false)
	if err := sign([]*service{first, other}); !errors.Is(err, sigerr.NotFound) {
		t.Errorf("when the other one is ready, and this not: got %v, want its NotFound", err)
	}
}
