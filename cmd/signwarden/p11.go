package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/signwarden/signwarden/agentproto"
	"github.com/signwarden/signwarden/agentproto/p11token"
	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/cmd/internal/sockets"
	"github.com/signwarden/signwarden/gateway/client"
	"github.com/signwarden/signwarden/gateway/config"
)

// formatPKCS11 is the format of what is signed for a PKCS#11 client: what its program
// makes of it nobody can tell.
const formatPKCS11 = "pkcs11"

func (a *app) p11Command() *cobra.Command {
	var tokens []string
	c := &cobra.Command{
		Use:   "p11 --stdio",
		Short: "Serve a PKCS#11 token to p11-kit on standard input and output",
		Long: `p11 is for p11-kit to run. In a module file, such as ~/.config/pkcs11/modules/signwarden.module,
or one in /etc/pkcs11/modules for root, this line has every program that uses p11-kit see the
token with the keys that you may use, without a daemon:

  remote: |signwarden p11 --stdio

It holds no key and asks for no PIN. Signatures are made in the format pkcs11.`,
		Example: `  p11tool --list-all pkcs11:token=signwarden
  PKCS11_MODULE_PATH=/usr/lib/x86_64-linux-gnu/p11-kit-proxy.so sbsign --engine pkcs11 \
    --key 'pkcs11:token=signwarden;object=boot;type=private' --cert boot.pem linux.efi`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			parsed, err := parseTokens(tokens)
			if err != nil {
				return err
			}
			conf := config.Socket{P11Tokens: parsed}
			return a.with(func(c *client.Client) error { return a.serveStdio(cmd.Context(), c, conf) })
		},
	}
	c.Flags().Bool("stdio", false, "serve the process that is at standard input and output")
	addTokenFlag(c, &tokens)
	exit.Require(c, "stdio")
	return c
}

func addTokenFlag(c *cobra.Command, tokens *[]string) {
	c.Flags().StringArrayVar(tokens, "p11-token", nil, "a PKCS#11 token and its keys, LABEL=NAME,NAME,..., names or globs; can be repeated (default: signwarden=*)")
}

// parseTokens reads LABEL=NAME,NAME,... for each token.
func parseTokens(tokens []string) ([]config.P11Token, error) {
	var out []config.P11Token
	for _, text := range tokens {
		label, keys, ok := strings.Cut(text, "=")
		if !ok {
			return nil, exit.UsageError("--p11-token %q is not LABEL=NAME,NAME,...", text)
		}
		out = append(out, config.P11Token{Label: label, Keys: strings.Split(keys, ",")})
	}
	if _, err := sockets.Tokens(config.Socket{P11Tokens: out}); err != nil {
		return nil, exit.UsageError("--p11-token: %w", err)
	}
	return out, nil
}

// p11Socket resolves the word auto: where p11-kit's client looks for a server that no
// environment variable names.
func p11Socket(path string) (string, error) {
	if path != config.WordAuto {
		return filepath.Abs(path)
	}
	dir := os.Getenv("XDG_RUNTIME_DIR")
	if dir == "" {
		return "", exit.Hint(errors.New("XDG_RUNTIME_DIR is not set, so p11-kit has no place for its socket"),
			"name a path, and give it to tools: P11_KIT_SERVER_ADDRESS=unix:path=PATH")
	}
	return filepath.Join(dir, "p11-kit", "pkcs11"), nil
}

func serveP11(s serving) (handler, error) {
	srv, err := newP11Server(s)
	if err != nil {
		return nil, err
	}
	return srv.ServeConn, nil
}

func newP11Server(s serving) (*p11token.Server, error) {
	groups, err := sockets.Tokens(s.conf)
	if err != nil {
		return nil, err
	}
	return p11token.New(p11token.Config{
		Keys:   func(agentproto.Peer) (p11token.Keys, error) { return s.keys, nil },
		Groups: groups,
		Lease:  s.bounds,
		Logger: s.log,
	})
}

// serveStdio serves the process at standard input and output until it hangs up.
func (a *app) serveStdio(ctx context.Context, c *client.Client, conf config.Socket) error {
	conn, err := newStdioConn()
	if err != nil {
		return err
	}
	session, err := c.Session(ctx, formatPKCS11)
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	srv, err := newP11Server(serving{conf: conf, keys: session, log: a.log})
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() { session.Run(ctx); close(done) }()
	peer := agentproto.Peer{UID: uint32(os.Getuid()), GID: uint32(os.Getgid()), PID: int32(os.Getppid())}
	srv.ServeConn(ctx, conn, peer)
	cancel()
	<-done
	return nil
}

// stdioConn makes one connection of standard input and output: two pipes, or
// twice the socket that p11-kit gives its child.
type stdioConn struct {
	in, out *os.File
}

// newStdioConn takes copies of the descriptors that can be waited for with a deadline.
// They are the peer's other end, and nobody else's.
func newStdioConn() (net.Conn, error) {
	c := &stdioConn{}
	for fd, file := range map[int]**os.File{0: &c.in, 1: &c.out} {
		name := fmt.Sprintf("descriptor %d", fd)
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
		if err == nil {
			err = unix.SetNonblock(dup, true)
		}
		if err != nil {
			return nil, fmt.Errorf("using %s: %w", name, err)
		}
		*file = os.NewFile(uintptr(dup), name)
	}
	if err := c.SetDeadline(time.Time{}); err != nil {
		return nil, exit.Hint(fmt.Errorf("standard input and output are no sockets or pipes: %w", err),
			"p11-kit runs this program: see `signwarden p11 --help`")
	}
	return c, nil
}

func (c *stdioConn) Read(b []byte) (int, error)  { return c.in.Read(b) }
func (c *stdioConn) Write(b []byte) (int, error) { return c.out.Write(b) }
func (c *stdioConn) Close() error                { return errors.Join(c.in.Close(), c.out.Close()) }

func (c *stdioConn) LocalAddr() net.Addr  { return stdioAddr{} }
func (c *stdioConn) RemoteAddr() net.Addr { return stdioAddr{} }

func (c *stdioConn) SetReadDeadline(t time.Time) error  { return c.in.SetReadDeadline(t) }
func (c *stdioConn) SetWriteDeadline(t time.Time) error { return c.out.SetWriteDeadline(t) }
func (c *stdioConn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// stdioAddr is the address of a connection that has none.
type stdioAddr struct{}

func (stdioAddr) Network() string { return "stdio" }
func (stdioAddr) String() string  { return "stdio" }
