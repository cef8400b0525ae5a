package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/signwarden/signwarden/agentproto"
	"github.com/signwarden/signwarden/agentproto/gpgagent"
	"github.com/signwarden/signwarden/agentproto/lease"
	"github.com/signwarden/signwarden/agentproto/sshagent"
	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/cmd/internal/sockets"
	"github.com/signwarden/signwarden/gateway/client"
	"github.com/signwarden/signwarden/gateway/config"
)

// socket is a socket to be served: at path, or where it is listening already.
type socket struct {
	protocol string // of protocols
	path     string
	file     *os.File
	conf     config.Socket
}

// handler serves one connection.
type handler = func(ctx context.Context, c net.Conn, p agentproto.Peer)

// protocol is what can be spoken on a socket.
type protocol struct {
	words  string // for people
	format string // of the requests that it makes, where they do not name their own
	serve  func(serving) (handler, error)
}

// serving is what a socket is served with.
type serving struct {
	conf   config.Socket
	keys   *client.Session
	bounds *lease.Lease
	roots  []string
	log    *slog.Logger
}

// protocols by the name that the sockets' descriptors begin with.
var protocols = map[string]protocol{
	config.ProtocolGPG: {"gpg-agent", "openpgp", serveGPG},
	config.ProtocolP11: {"PKCS#11", formatPKCS11, serveP11},
	config.ProtocolSSH: {"ssh-agent", sshagent.FormatSig, serveSSH},
}

func serveSSH(s serving) (handler, error) {
	srv, err := sshagent.New(sshagent.Config{
		Keys:   func(agentproto.Peer) (sshagent.Keys, error) { return s.keys, nil },
		Lease:  s.bounds,
		Logger: s.log,
	})
	if err != nil {
		return nil, err
	}
	return srv.ServeConn, nil
}

func serveGPG(s serving) (handler, error) {
	srv, err := gpgagent.New(gpgagent.Config{
		Keys:         func(agentproto.Peer) (gpgagent.Keys, error) { return s.keys, nil },
		Lease:        s.bounds,
		TrustedRoots: s.roots,
		Logger:       s.log,
	})
	if err != nil {
		return nil, err
	}
	return srv.ServeConn, nil
}

// served is sockets being served, and their sessions kept fresh.
type served struct {
	lines    []string // one for people of each socket
	failed   chan struct{}
	sessions map[string]*client.Session // by format
	ready    []listening

	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu   sync.Mutex // guards errs; held to add one
	errs []error
}

type listening struct {
	l     *agentproto.Listener
	serve handler
}

// startSockets listens on all sockets, or on none, and serves them. session is asked once
// for each format.
func (a *app) startSockets(session func(format string) *client.Session, all []socket) (*served, error) {
	s := &served{failed: make(chan struct{}), sessions: map[string]*client.Session{}}
	for _, want := range all {
		if err := s.listen(session, want, a.log); err != nil {
			for _, r := range s.ready {
				err = errors.Join(err, r.l.Close())
			}
			return nil, err
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	failed := sync.OnceFunc(func() { close(s.failed) })
	for _, r := range s.ready {
		s.wg.Go(func() {
			if err := r.l.Serve(ctx, r.serve); err != nil {
				s.mu.Lock()
				s.errs = append(s.errs, fmt.Errorf("serving %s: %w", r.l.Path(), err))
				s.mu.Unlock()
				failed()
			}
		})
	}
	for _, keys := range s.sessions {
		s.wg.Go(func() { keys.Run(ctx) })
	}
	return s, nil
}

// listen adds one socket to those that are ready.
func (s *served) listen(session func(format string) *client.Session, want socket, log *slog.Logger) error {
	p, ok := protocols[want.protocol]
	if !ok {
		return exit.UsageError("systemd passes a descriptor named %q: FileDescriptorName must be the protocol, gpg, p11 or ssh, or begin with it, like gpg-job",
			strings.TrimPrefix(want.conf.Path(), config.WordFD))
	}
	bounds, roots, err := sockets.Bounds(want.conf)
	if err != nil {
		return err
	}
	l, err := want.listen(log)
	if err != nil {
		return err
	}
	keys := s.sessions[p.format]
	if keys == nil {
		keys = session(p.format)
		s.sessions[p.format] = keys
	}
	serve, err := p.serve(serving{want.conf, keys, bounds, roots, log.With("socket", l.Path())})
	if err != nil {
		return errors.Join(err, l.Close())
	}
	s.ready = append(s.ready, listening{l, serve})
	s.lines = append(s.lines, fmt.Sprintf("%s socket %s%s", p.words, l.Path(), describe(want.conf)))
	return nil
}

func (s *socket) listen(log *slog.Logger) (*agentproto.Listener, error) {
	if s.file != nil {
		return agentproto.Inherit(agentproto.Config{Logger: log}, s.file)
	}
	return agentproto.Listen(agentproto.Config{Path: s.path, Logger: log})
}

// describe tells what bounds a socket.
func describe(s config.Socket) string {
	var b strings.Builder
	if len(s.Keys) > 0 {
		fmt.Fprintf(&b, ", keys %s", strings.Join(s.Keys, " "))
	}
	if s.Lifetime > 0 {
		fmt.Fprintf(&b, ", until %s", time.Now().Add(time.Duration(s.Lifetime)).Format(time.RFC3339))
	}
	if s.Signatures > 0 {
		fmt.Fprintf(&b, ", %d signatures", s.Signatures)
	}
	return b.String()
}

// stop lets what is being signed finish, and removes the sockets that are ours.
func (s *served) stop() error {
	s.cancel()
	s.wg.Wait()
	return errors.Join(s.errs...)
}
