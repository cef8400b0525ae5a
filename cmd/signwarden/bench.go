package main

import (
	"context"
	"crypto"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/gateway/client"
	"github.com/signwarden/signwarden/gateway/keys"
)

// benchJob is one call of bench sign.
type benchJob struct {
	key, format          string
	streams, concurrency int
	count                int64
	duration             time.Duration
	verify               bool
}

// benchResult is what it measured.
type benchResult struct {
	Key        string  `json:"key"`
	Algorithm  string  `json:"algorithm"`
	Streams    int     `json:"streams"`
	InFlight   int     `json:"concurrency"`
	Signatures int64   `json:"signatures"`
	Verified   bool    `json:"verified"`
	Seconds    float64 `json:"seconds"`
	PerSecond  float64 `json:"signatures_per_second"`
	P50        float64 `json:"p50_ms"`
	P99        float64 `json:"p99_ms"`
	Errors     int64   `json:"errors"`
}

func (a *app) benchCommand() *cobra.Command {
	c := &cobra.Command{Use: "bench", Short: "Measure"}
	var j benchJob
	sign := &cobra.Command{
		Use:   "sign --key NAME",
		Short: "Sign random digests as fast as the gateway answers",
		Long: `sign asks for signatures over random SHA-256 (with p384: SHA-384) digests and tells the rate and
the latency. Each is a real signature, decided on and recorded in the audit log.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if j.streams < 1 || j.concurrency < 1 || j.streams > 64 || j.concurrency > 4096 {
				return exit.UsageError("--streams is 1 to 64, --concurrency 1 to 4096")
			}
			r, err := a.bench(cmd.Context(), j)
			if err != nil {
				return err
			}
			err = a.print(r, func(w io.Writer) {
				fmt.Fprintf(w, "%d signatures with %s (%s) in %.1f s: %.1f/s, p50 %.2f ms, p99 %.2f ms, %d errors\n",
					r.Signatures, r.Key, r.Algorithm, r.Seconds, r.PerSecond, r.P50, r.P99, r.Errors)
			})
			if err == nil && r.Errors > 0 {
				err = fmt.Errorf("%d requests failed", r.Errors)
			}
			return err
		},
	}
	sign.Flags().StringVar(&j.key, "key", "", "name of the key")
	sign.Flags().StringVar(&j.format, "format", "openpgp", "format to ask for")
	sign.Flags().IntVar(&j.streams, "streams", 1, "connections, each with one stream")
	sign.Flags().IntVar(&j.concurrency, "concurrency", 64, "requests in flight, over all streams")
	sign.Flags().DurationVar(&j.duration, "duration", 10*time.Second, "for how long")
	sign.Flags().Int64Var(&j.count, "count", 0, "so many signatures, however long they take")
	sign.Flags().BoolVar(&j.verify, "verify", false, "verify every signature here too")
	sign.MarkFlagsMutuallyExclusive("duration", "count")
	exit.Require(sign, "key")
	c.AddCommand(sign)
	return c
}

func (a *app) bench(ctx context.Context, j benchJob) (benchResult, error) {
	clients := make([]*client.Client, j.streams)
	for i := range clients {
		c, err := a.dial()
		if err != nil {
			return benchResult{}, err
		}
		defer c.Close()
		clients[i] = c
	}
	key, err := clients[0].Key(ctx, j.key)
	if err != nil {
		return benchResult{}, err
	}
	run := &benchRun{job: j, key: key, hash: crypto.SHA256}
	if key.Algorithm == keys.P384 {
		run.hash = crypto.SHA384
	}
	// One signature beforehand: the streams open, and an error that every
	// request would meet is told once.
	for _, c := range clients {
		if _, err := run.one(ctx, c); err != nil {
			return benchResult{}, err
		}
	}
	if j.count == 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, j.duration)
		defer cancel()
	}
	start := time.Now()
	var wg sync.WaitGroup
	for i := range j.concurrency {
		wg.Go(func() { run.loop(ctx, clients[i%len(clients)]) })
	}
	wg.Wait()
	return run.result(time.Since(start)), ctxUnlessDeadline(ctx)
}

// ctxUnlessDeadline tells an interrupted run from one that came to its end.
func ctxUnlessDeadline(ctx context.Context) error {
	if err := ctx.Err(); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil
}

type benchRun struct {
	job  benchJob
	key  client.Key
	hash crypto.Hash

	started atomic.Int64
	errors  atomic.Int64

	mu   sync.Mutex // guards took; each worker appends once
	took []time.Duration
}

// loop signs until the count is reached or ctx ends.
func (b *benchRun) loop(ctx context.Context, c *client.Client) {
	var took []time.Duration
	for ctx.Err() == nil && (b.job.count == 0 || b.started.Add(1) <= b.job.count) {
		d, err := b.one(ctx, c)
		switch {
		case err == nil:
			took = append(took, d)
		case ctx.Err() == nil:
			b.errors.Add(1)
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.took = append(b.took, took...)
}

func (b *benchRun) one(ctx context.Context, c *client.Client) (time.Duration, error) {
	digest := make([]byte, b.hash.Size())
	rand.Read(digest)
	start := time.Now()
	sig, err := c.Sign(ctx, client.Request{Key: b.key.Name, Digest: digest, Hash: b.hash, Format: b.job.format})
	took := time.Since(start)
	if err == nil && b.job.verify {
		err = keys.Verify(b.key.PublicKey, sig.Scheme, b.hash, digest, sig.Bytes)
	}
	return took, err
}

func (b *benchRun) result(elapsed time.Duration) benchResult {
	slices.Sort(b.took)
	at := func(q float64) float64 {
		if len(b.took) == 0 {
			return 0
		}
		return float64(b.took[int(q*float64(len(b.took)-1))].Microseconds()) / 1000
	}
	return benchResult{
		Key: b.key.Name, Algorithm: string(b.key.Algorithm), Streams: b.job.streams, InFlight: b.job.concurrency,
		Signatures: int64(len(b.took)), Verified: b.job.verify, Seconds: elapsed.Seconds(),
		PerSecond: float64(len(b.took)) / elapsed.Seconds(), P50: at(0.5), P99: at(0.99), Errors: b.errors.Load(),
	}
}
