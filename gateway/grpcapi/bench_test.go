package grpcapi_test

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/signwarden/signwarden/gateway/gatewaytest"
	"github.com/signwarden/signwarden/gateway/keys"
)

// BenchmarkStream is a client with 256 digests in flight; key and store are in
// memory, so what is measured is the way there and back.
func BenchmarkStream(b *testing.B) {
	s := serve(b, gatewaytest.New(b, ""))
	s.Key(b, "k", keys.P256)
	cl := s.client(b, "root")
	if _, err := cl.Sign(b.Context(), clientRequest("k", "first")); err != nil {
		b.Fatal(err)
	}
	r := clientRequest("k", "text")
	var next atomic.Int64
	b.ReportAllocs()
	b.ResetTimer()
	var wg sync.WaitGroup
	for range 256 {
		wg.Go(func() {
			r := r
			for n := next.Add(1); n <= int64(b.N); n = next.Add(1) {
				r.ID = fmt.Sprint("id-", n)
				if _, err := cl.Sign(b.Context(), r); err != nil {
					b.Error(err)
				}
			}
		})
	}
	wg.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "signatures/s")
}
