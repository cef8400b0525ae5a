package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/signwarden/signwarden/agentproto"
	"github.com/signwarden/signwarden/agentproto/gpgagent"
	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/gateway/client"
)

func (a *app) agentCommand() *cobra.Command {
	var socket string
	c := &cobra.Command{
		Use:   "agent --gpg-socket PATH|auto",
		Short: "Serve a gpg-agent socket on this host",
		Long: `agent serves a gpg-agent socket until it is ended: unmodified gpg, rpmsign, git and
debsign sign through it with the keys that you may use. It answers everything but
the signing itself from memory. The socket is for your own uid.

"auto" is where gpg looks for its agent: gpgconf --list-dirs agent-socket. Put
"no-autostart" into gpg.conf, so that gpg starts no agent of its own, and import
the certificates: signwarden key export NAME | gpg --import`,
		Example: `  signwarden agent --gpg-socket auto`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			path, err := gpgSocket(socket, os.Environ())
			if err != nil {
				return err
			}
			return a.with(func(c *client.Client) error {
				session, err := c.Session(cmd.Context(), "openpgp")
				if err != nil {
					return err
				}
				s, err := a.startAgent(session, path)
				if err != nil {
					return err
				}
				all, _ := session.PublicKeys(cmd.Context())
				a.say("signwarden: gpg-agent socket %s, %d keys", path, len(all))
				<-cmd.Context().Done()
				return s.stop()
			})
		},
	}
	c.Flags().StringVar(&socket, "gpg-socket", "", "path of the socket, or auto")
	exit.Require(c, "gpg-socket")
	return c
}

// gpgSocket resolves "auto": where gpg, in that environment, looks for its agent.
func gpgSocket(path string, env []string) (string, error) {
	if path != "auto" {
		return filepath.Abs(path)
	}
	cmd := exec.Command("gpgconf", "--list-dirs", "agent-socket")
	cmd.Env = env
	out, err := cmd.Output()
	if err != nil {
		return "", exit.Hint(fmt.Errorf("asking gpgconf where gpg looks for its agent: %w", err),
			"install GnuPG (apt-get install gnupg, dnf install gnupg2), or name the path")
	}
	// gpgconf percent-escapes; a path without '%' is as it is.
	return strings.ReplaceAll(strings.ReplaceAll(strings.TrimSpace(string(out)), "%3a", ":"), "%25", "%"), nil
}

// served is an agent socket being served, and its session kept fresh.
type served struct {
	cancel context.CancelFunc
	done   chan error
}

func (a *app) startAgent(session *client.Session, path string) (*served, error) {
	l, err := agentproto.Listen(agentproto.Config{Path: path, Logger: a.log})
	if err != nil {
		return nil, err
	}
	srv, err := gpgagent.New(gpgagent.Config{
		Keys:   func(agentproto.Peer) (gpgagent.Keys, error) { return session, nil },
		Logger: a.log,
	})
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &served{cancel: cancel, done: make(chan error, 2)}
	go func() { s.done <- l.Serve(ctx, srv.ServeConn) }()
	go func() { session.Run(ctx); s.done <- nil }()
	return s, nil
}

// stop lets what is being signed finish, and removes the socket.
func (s *served) stop() error {
	s.cancel()
	return errors.Join(<-s.done, <-s.done)
}

// umask returns the process's umask, which can only be read by setting it;
// it is called from one goroutine.
func umask() os.FileMode {
	m := unix.Umask(0o077)
	unix.Umask(m)
	return os.FileMode(m)
}
