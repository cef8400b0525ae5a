//go:build bench

package softhsm_test

import (
	"context"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signwarden/signwarden/gateway/client"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// TestOverload measures what one principal that floods the gateway does to another
// that asks for one signature at a time, and to itself; figures are ratios within
// one run.
func TestOverload(t *testing.T) {
	g := newGateway(t)
	for _, a := range []string{"rsa4096", "rsa2048", "p256"} {
		g.must(t, "signwarden", "key", "create", "load-"+a, "--algorithm", a)
	}
	g.must(t, "signwardend", "client", "create", "flood", "--dir", g.dir)
	g.policy(t, `
  - {name: flood, principals: [flood], keys: ["load-*"], may: [sign, read], formats: [openpgp], blind: true}
`)
	for _, a := range []string{"rsa4096", "rsa2048", "p256"} {
		t.Run(a, func(t *testing.T) { overload(t, g, "load-"+a) })
	}
}

// loader asks for signatures as one principal.
type loader struct {
	c    *client.Client
	key  string
	n    atomic.Int64
	ok   atomic.Int64
	mu   sync.Mutex
	took []time.Duration
}

func (l *loader) one(ctx context.Context) error {
	sum := sha256.Sum256(fmt.Append(nil, l.n.Add(1)))
	_, err := l.c.Sign(ctx, client.Request{Key: l.key, Digest: sum[:], Hash: crypto.SHA256, Format: "openpgp"})
	if err == nil {
		l.ok.Add(1)
	}
	return err
}

// run asks on n goroutines for d, and returns the rate of signatures.
func (l *loader) run(t *testing.T, n int, d time.Duration) float64 {
	before, began := l.ok.Load(), time.Now()
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			for time.Since(began) < d {
				at := time.Now()
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				err := l.one(ctx)
				cancel()
				if err != nil && !errors.Is(err, sigerr.Overloaded) && !errors.Is(err, sigerr.Timeout) {
					t.Error(err)
					return
				}
				if n == 1 {
					l.took = append(l.took, time.Since(at))
				}
			}
		})
	}
	wg.Wait()
	return float64(l.ok.Load()-before) / time.Since(began).Seconds()
}

func (l *loader) p99() time.Duration {
	slices.Sort(l.took)
	d := l.took[len(l.took)*99/100]
	l.took = nil
	return d
}

func overload(t *testing.T, g *gateway, key string) {
	lone := &loader{c: g.client(t, "admin"), key: key}
	flood := &loader{c: g.client(t, "flood"), key: key}
	const d = 3 * time.Second
	lone.run(t, 1, time.Second)
	lone.took = nil
	alone := lone.run(t, 1, d)
	unloaded := lone.p99()
	peak := flood.run(t, 64, d)
	done := make(chan float64)
	go func() { done <- flood.run(t, 640, d+time.Second) }()
	time.Sleep(time.Second / 2)
	with := lone.run(t, 1, d)
	loaded := lone.p99()
	over := <-done
	fmt.Printf("overload, %s: alone %.0f/s p99 %v; beside a flood %.0f/s p99 %v: %.1f times; goodput of the flood %.0f/s of %.0f/s: %.2f; gateway's memory %s\n",
		key, alone, unloaded.Round(time.Microsecond), with, loaded.Round(time.Microsecond), float64(loaded)/float64(unloaded), over, peak, (over+with)/peak, rss(t, g))
}

// rss is the gateway's resident memory.
func rss(t *testing.T, g *gateway) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", g.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	var total, resident int
	if _, err := fmt.Sscan(string(b), &total, &resident); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%d MiB", resident*os.Getpagesize()>>20)
}
