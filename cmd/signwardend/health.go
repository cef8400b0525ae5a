package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"golang.org/x/net/netutil"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/gateway/config"
	"github.com/signwarden/signwarden/gateway/metrics"
	"github.com/signwarden/signwarden/hsm/fleet"
	"github.com/signwarden/signwarden/hsm/worker"
)

// How often it is looked whether signatures can be had, and how often a token
// that nobody uses is asked whether it works.
const (
	readyEvery  = time.Second
	pingEvery   = 5 * time.Second
	pingTimeout = 3 * time.Second
)

// maxScrapers bounds the connections of the listener for metrics.
const maxScrapers = 64

// tokenObserver tells the metrics what a token tells.
type tokenObserver struct{ *metrics.Token }

func (o tokenObserver) Ended(why worker.Cause) { o.Token.Ended(string(why)) }

func observeToken(m *metrics.Metrics, label string) worker.Observer {
	if m == nil {
		return nil
	}
	var causes []string
	for _, c := range worker.Causes {
		causes = append(causes, string(c))
	}
	return tokenObserver{m.Token(label, causes...)}
}

func tokenStats(name string, s worker.Stats) metrics.TokenStats {
	return metrics.TokenStats{Name: name, Workers: s.Workers, InFlight: s.InFlight, Waiting: s.Waiting, Sessions: s.Sessions, Up: s.Err == nil}
}

// fleetStats are those of every member, also of one that was never open. One that
// gets no requests is not up, whatever it says of itself.
func fleetStats(members []fleet.Status) []metrics.TokenStats {
	var all []metrics.TokenStats
	for _, m := range members {
		s := tokenStats(m.Name, m.Stats)
		s.Up = s.Up && m.State == fleet.Closed
		s.Several = &metrics.SeveralStats{Breaker: m.State.String(), Opens: m.Opens, Keys: m.Keys, Other: m.Other}
		all = append(all, s)
	}
	return all
}

// watch serves metrics, where there are any, and keeps what health checks are
// told, until stop.
func (d *daemon) watch(ctx context.Context) (stop func(), err error) {
	var running sync.WaitGroup
	ctx, cancel := context.WithCancel(ctx)
	server := &http.Server{
		ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 5 * time.Second, WriteTimeout: 15 * time.Second, IdleTimeout: 2 * time.Minute,
		MaxHeaderBytes: 16 << 10, ErrorLog: slog.NewLogLogger(d.log.Handler(), slog.LevelDebug),
	}
	if m := d.parts.metrics; m != nil {
		l, err := listenMetrics(d.conf.Metrics)
		if err != nil {
			cancel()
			return nil, err
		}
		server.Handler = m.Handler()
		running.Go(func() {
			if err := server.Serve(netutil.LimitListener(l, maxScrapers)); !errors.Is(err, http.ErrServerClosed) {
				d.log.Error("metrics are not served any more", "error", err)
			}
		})
	}
	running.Go(func() { d.watchReadiness(ctx) })
	return func() { cancel(); server.Close(); running.Wait() }, nil
}

func listenMetrics(c config.Metrics) (net.Listener, error) {
	network, address := c.Network()
	if network == "unix" {
		if st, err := os.Lstat(address); err == nil && st.Mode().Type() == fs.ModeSocket {
			os.Remove(address) // of a process that is gone: the store is locked by now
		}
	}
	l, err := net.Listen(network, address)
	if err != nil {
		return nil, exit.Hint(fmt.Errorf("metrics: %w", err), "change metrics.listen in the configuration")
	}
	if network == "unix" {
		if err := os.Chmod(address, 0o660); err != nil {
			l.Close()
			return nil, fmt.Errorf("metrics: %w", err)
		}
	}
	return l, nil
}

// watchReadiness looks every second whether signatures can be had, and tells.
func (d *daemon) watchReadiness(ctx context.Context) {
	tick := time.NewTicker(readyEvery)
	defer tick.Stop()
	was, pinged := error(nil), time.Now()
	for {
		err := d.parts.ready(ctx, &pinged)
		if ctx.Err() != nil {
			return
		}
		d.server.SetReady(err == nil)
		if d.parts.metrics != nil {
			d.parts.metrics.SetReady(lacks(err))
		}
		switch {
		case err != nil && (was == nil || was.Error() != err.Error()):
			d.log.Error("the gateway is not ready", "error", err)
		case err == nil && was != nil:
			d.log.Info("the gateway is ready again")
		}
		was = err
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// The parts for which no signatures can be had, as /readyz names them: to
// everybody, and the rest to the log.
var (
	errToken = errors.New("token")
	errStore = errors.New("store")
)

// lacks names the part of which ready has told; a token whose PIN an operator has
// to see to is one of its own.
func lacks(err error) string {
	operator, ok := errors.AsType[interface {
		error
		Operator() bool
	}](err)
	switch {
	case err == nil:
		return ""
	case ok && operator.Operator():
		return "pin"
	case errors.Is(err, errToken):
		return "token"
	}
	return "store"
}

// ready says why no signatures can be had, by errToken or errStore. A token that nobody uses is asked, not
// more often than pingEvery; one that is used tells by itself.
func (p *parts) ready(ctx context.Context, pinged *time.Time) error {
	s := p.token.Stats()
	if s.Err != nil {
		return fmt.Errorf("%w: %w", errToken, s.Err)
	}
	if s.InFlight == 0 && s.Waiting == 0 && time.Since(*pinged) > pingEvery {
		*pinged = time.Now()
		ctx, cancel := context.WithTimeout(ctx, pingTimeout)
		defer cancel()
		if err := p.token.Ping(ctx); err != nil {
			return fmt.Errorf("%w: %w", errToken, err)
		}
	}
	if err := p.gateway.Ready(ctx); err != nil {
		return fmt.Errorf("%w: %w", errStore, err)
	}
	return nil
}
