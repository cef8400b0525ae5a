package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"reflect"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/signwarden/signwarden/agentproto"
	"github.com/signwarden/signwarden/agentproto/gpgagent"
	"github.com/signwarden/signwarden/agentproto/p11token"
	"github.com/signwarden/signwarden/agentproto/sshagent"
	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/cmd/internal/sched"
	"github.com/signwarden/signwarden/cmd/internal/sockets"
	"github.com/signwarden/signwarden/gateway"
	"github.com/signwarden/signwarden/gateway/config"
	"github.com/signwarden/signwarden/gateway/grpcapi"
	"github.com/signwarden/signwarden/gateway/ident"
)

func serveCommand() *cobra.Command {
	var d dirFlags
	c := &cobra.Command{
		Use:   "serve",
		Short: "Serve clients and agent sockets until SIGTERM",
		Long: `serve opens the token and the store and serves gRPC with mutual TLS, and the
agent sockets that the configuration lists. It never serves without TLS. The
PKCS#11 module is loaded by worker processes, which serve starts and replaces
(signwardend hsm-worker); they end with it.

SIGTERM or SIGINT: finish what is in flight and end.
SIGHUP: read certificates, the PIN and the configuration's agents again; open
streams go on.

A PIN that the token has refused is not tried again, by this start or another,
until the PIN file has another one or ` + "`signwardend token retry-pin`" + ` was said. A gateway
that serves sees either by itself.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			conf, err := d.load()
			if err != nil {
				return err
			}
			return serve(cmd.Context(), &d, conf)
		},
	}
	d.add(c)
	return c
}

// daemon is a serving gateway.
type daemon struct {
	flags  *dirFlags
	conf   config.Config
	log    *slog.Logger
	parts  *parts
	tls    *grpcapi.TLS
	server *grpcapi.Server
	agents agents
}

func tlsFiles(c config.TLS) grpcapi.TLSFiles {
	return grpcapi.TLSFiles{Certificate: c.Certificate, Key: c.Key, ClientCA: c.ClientCA}
}

func serve(ctx context.Context, flags *dirFlags, conf config.Config) error {
	// Before anything else: a signal that comes while the token opens counts.
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	defer signal.Stop(signals)

	d := &daemon{flags: flags, conf: conf, log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	// Before the workers start, which inherit it.
	err := sched.Batch()
	if err != nil {
		d.log.Warn("the gateway serves, and is slower under load", "error", err)
	}
	d.tls, err = grpcapi.NewTLS(tlsFiles(conf.TLS))
	if err != nil {
		return exit.Hint(fmt.Errorf("it does not serve without TLS: %w", err), "`signwardend check` examines the files")
	}
	// Listened on before the token opens: a taken port is found early.
	listener, err := net.Listen("tcp", conf.Listen)
	if err != nil {
		return exit.Hint(err, "is another signwardend running? change listen in the configuration")
	}
	defer listener.Close()
	d.parts, err = assemble(ctx, conf, d.log)
	if err != nil {
		return err
	}
	defer d.parts.close(d.log)
	d.server, err = grpcapi.New(grpcapi.Config{
		Gateway: d.parts.gateway, TLS: func() *tls.Config { return d.tls.Config() }, Window: conf.Limits.InFlightPerStream,
		DrainTimeout: time.Duration(conf.Limits.DrainTimeout), Logger: d.log,
	})
	if err != nil {
		return err
	}
	d.agents = agents{log: d.log, gateway: d.parts.gateway, running: map[string]*agent{}}
	if err := d.agents.apply(ctx, conf.Agents); err != nil {
		return err
	}
	stop, err := d.watch(ctx)
	if err != nil {
		return err
	}
	defer stop()
	fmt.Fprintf(os.Stderr, "signwardend: serving gRPC with mutual TLS on %s%s\n", listener.Addr(), d.agents.String())

	served := make(chan error, 1)
	go func() { served <- d.server.Serve(listener) }()
	for {
		select {
		case err := <-served:
			d.agents.stop()
			return fmt.Errorf("serving gRPC: %w", err)
		case sig := <-signals:
			if sig == unix.SIGHUP {
				d.reload(ctx)
				continue
			}
			d.log.Info("draining", "signal", sig.String())
			d.agents.stop()
			d.server.Shutdown()
			<-served
			return nil
		}
	}
}

// reload applies what can change while streams are open: certificates and
// agents. What is wrong is logged, and what was stays.
func (d *daemon) reload(ctx context.Context) {
	conf, err := d.flags.load()
	if err != nil {
		d.log.Error("reloading: the old configuration stays", "error", err)
		return
	}
	if err := d.tls.Reload(tlsFiles(conf.TLS)); err != nil {
		d.log.Error("reloading: the old certificates stay", "error", err)
		return
	}
	if err := d.parts.token.ReadPIN(); err != nil {
		d.log.Error("reloading: the old PIN stays", "error", err)
	}
	if err := d.agents.apply(ctx, conf.Agents); err != nil {
		d.log.Error("reloading: not every agent socket is served", "error", err)
	}
	was, is := d.conf, conf
	was.TLS, was.Agents, is.TLS, is.Agents = config.TLS{}, nil, config.TLS{}, nil
	if !reflect.DeepEqual(was, is) {
		d.log.Warn("reloading: listen, token, store, limits and metrics change at the next start only")
	}
	d.log.Info("reloaded", "agents", len(conf.Agents))
}

// agents are the sockets being served.
type agents struct {
	log     *slog.Logger
	gateway *gateway.Gateway
	running map[string]*agent // by path
}

type agent struct {
	conf config.Agent
	stop context.CancelFunc
	wg   sync.WaitGroup
}

// apply makes the sockets being served be those of want. It goes on after an
// error and returns the first.
func (a *agents) apply(ctx context.Context, want []config.Agent) error {
	keep := map[string]config.Agent{}
	for _, w := range want {
		keep[w.Path()] = w
	}
	for path, r := range a.running {
		if w, ok := keep[path]; !ok || !reflect.DeepEqual(w, r.conf) {
			r.end()
			delete(a.running, path)
		}
	}
	var first error
	for _, w := range want {
		if a.running[w.Path()] != nil {
			continue
		}
		r, err := a.start(ctx, w)
		if err == nil {
			a.running[w.Path()] = r
		} else if first == nil {
			first = err
		}
	}
	return first
}

func (a *agents) start(ctx context.Context, conf config.Agent) (*agent, error) {
	serve, err := a.handler(conf)
	if err != nil {
		return nil, fmt.Errorf("agent socket %s: %w", conf.Path(), err)
	}
	l, err := agentproto.Listen(agentproto.Config{Path: conf.Path(), UIDs: conf.UIDs, GIDs: conf.GIDs, Logger: a.log})
	if err != nil {
		return nil, fmt.Errorf("agent socket %s: %w", conf.Path(), err)
	}
	ctx, stop := context.WithCancel(ctx)
	r := &agent{conf: conf, stop: stop}
	r.wg.Go(func() {
		if err := l.Serve(ctx, serve); err != nil {
			a.log.Error("agent socket", "path", conf.Path(), "error", err)
		}
	})
	return r, nil
}

// handler serves one connection of a socket that comes up now.
func (a *agents) handler(conf config.Agent) (func(context.Context, net.Conn, agentproto.Peer), error) {
	bounds, roots, err := sockets.Bounds(conf.Socket)
	if err != nil {
		return nil, err
	}
	session := func(peer agentproto.Peer, frontEnd, format string) (*gateway.Session, error) {
		p, err := ident.FromPeer(peer.UID, conf.Principal)
		if err != nil {
			return nil, err
		}
		return a.gateway.Session(p, frontEnd, format), nil
	}
	log := a.log.With("socket", conf.Path())
	if conf.Protocol() == config.ProtocolP11 {
		groups, err := sockets.Tokens(conf.Socket)
		if err != nil {
			return nil, err
		}
		srv, err := p11token.New(p11token.Config{
			Lease: bounds, Groups: groups, Logger: log,
			Keys: func(peer agentproto.Peer) (p11token.Keys, error) { return session(peer, "pkcs11", "pkcs11") },
		})
		if err != nil {
			return nil, err
		}
		return srv.ServeConn, nil
	}
	if conf.Protocol() == config.ProtocolSSH {
		srv, err := sshagent.New(sshagent.Config{
			Lease: bounds, Logger: log,
			Keys: func(peer agentproto.Peer) (sshagent.Keys, error) {
				return session(peer, "ssh-agent", sshagent.FormatSig)
			},
		})
		if err != nil {
			return nil, err
		}
		return srv.ServeConn, nil
	}
	srv, err := gpgagent.New(gpgagent.Config{
		Lease: bounds, TrustedRoots: roots, Logger: log,
		Keys: func(peer agentproto.Peer) (gpgagent.Keys, error) { return session(peer, "gpg-agent", "openpgp") },
	})
	if err != nil {
		return nil, err
	}
	return srv.ServeConn, nil
}

func (r *agent) end() {
	r.stop()
	r.wg.Wait()
}

// stop ends all sockets; what they are doing they finish.
func (a *agents) stop() {
	for _, r := range a.running {
		r.stop()
	}
	for _, r := range a.running {
		r.wg.Wait()
	}
}

// protocolWords are for people.
var protocolWords = map[string]string{config.ProtocolGPG: "gpg-agent", config.ProtocolP11: "PKCS#11", config.ProtocolSSH: "ssh-agent"}

// String is for the line that says where the gateway listens.
func (a *agents) String() string {
	var b strings.Builder
	for path, r := range a.running {
		fmt.Fprintf(&b, ", %s for %s on %s", protocolWords[r.conf.Protocol()], r.conf.Principal, path)
	}
	return b.String()
}
