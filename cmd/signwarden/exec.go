package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/formats/openpgp"
	"github.com/signwarden/signwarden/gateway/client"
	"github.com/signwarden/signwarden/gateway/config"
)

// The exit codes that shells and env(1) use.
const (
	exitNotExecutable = 126
	exitNotFound      = 127
	exitSignal        = 128 // and the signal's number
)

func (a *app) execCommand() *cobra.Command {
	var roots []string
	c := &cobra.Command{
		Use:   "exec -- COMMAND [ARG]...",
		Short: "Run a command whose gpg, PKCS#11 and SSH tools sign through the gateway",
		Long: `exec runs a command in a GNUPGHOME of its own, in which gpg finds an agent that
signs with the keys you may use, and their certificates. Nothing in your own
GNUPGHOME is read or changed, and everything is gone when the command has ended.
Signals are passed on; the exit code is the command's.

The command also finds those keys and their X.509 certificates in a PKCS#11 token,
"signwarden", through p11-kit: P11_KIT_SERVER_ADDRESS, PKCS11_MODULE_PATH,
PKCS11_PROVIDER_MODULE and OPENSSL_CONF are set for it. No PIN is asked for.

SSH_AUTH_SOCK is set as well: ssh-keygen -Y sign and git (gpg.format=ssh) sign with those
keys. ssh logs in by that agent only where a rule names ssh-auth. A command that is to log in
with your own agent gets it back: signwarden exec -- env SSH_AUTH_SOCK="$SSH_AUTH_SOCK" git push

Name a key to gpg by its user id, address or fingerprint: signwarden key list; to
PKCS#11 tools by its name, like pkcs11:token=signwarden;object=NAME;type=private. gpgsm
has the X.509 certificates of keys; one that a CA has issued needs its --trusted-root.`,
		Example: `  signwarden exec -- rpmsign --define '_gpg_name release@example.org' --addsign x.rpm
  signwarden exec -- gpg --detach-sign --local-user release@example.org SHA256SUMS
  signwarden exec -- git tag -s -u release@example.org v1.0
  signwarden exec -- sign-file sha256 pkcs11:object=kmod kmod.pem driver.ko`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, argv []string) error {
			return a.with(func(c *client.Client) error { return a.exec(cmd.Context(), c, roots, argv) })
		},
	}
	c.Flags().StringArrayVar(&roots, "trusted-root", nil, "PEM file with X.509 roots that gpgsm is told to trust")
	return c
}

func (a *app) exec(ctx context.Context, c *client.Client, roots, argv []string) (err error) {
	program, err := exec.LookPath(argv[0])
	if err != nil {
		a.say("signwarden: %v", err)
		if errors.Is(err, os.ErrPermission) {
			return silent(exitNotExecutable)
		}
		return silent(exitNotFound)
	}
	// From here on a signal is the command's, not ours: cleaning up comes after it.
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2, unix.SIGWINCH, unix.SIGCONT)
	defer signal.Stop(signals)

	sessions := map[string]*client.Session{}
	for _, p := range protocols {
		if sessions[p.format], err = c.Session(ctx, p.format); err != nil {
			return pending(signals, err)
		}
	}
	certs, err := certificates(ctx, c)
	if err != nil {
		return pending(signals, err)
	}
	home, err := newGnuPGHome()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, home.remove()) }()
	if err := home.populate(certs, roots); err != nil {
		return err
	}
	p11 := filepath.Join(home.dir, "p11")
	env, err := p11Environment(home.dir, p11, home.env)
	if err != nil {
		return err
	}
	ssh := filepath.Join(home.dir, "ssh")
	env = append(slices.DeleteFunc(env, func(v string) bool { return strings.HasPrefix(v, "SSH_AUTH_SOCK=") }), "SSH_AUTH_SOCK="+ssh)
	agent, err := a.startSockets(func(format string) *client.Session { return sessions[format] }, []socket{
		{protocol: config.ProtocolGPG, path: home.socket, conf: config.Socket{TrustedRoots: roots}},
		{protocol: config.ProtocolP11, path: p11},
		{protocol: config.ProtocolSSH, path: ssh},
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, agent.stop()) }()

	if err := pending(signals, nil); err != nil {
		return err // a command that nobody wants any more is not begun
	}
	cmd := exec.Command(program, a.forRPM(argv)[1:]...)
	cmd.Args[0] = argv[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = a.in, os.Stdout, os.Stderr
	cmd.Env = env
	if err := cmd.Start(); err != nil {
		a.say("signwarden: %v", err)
		return silent(exitNotExecutable)
	}
	return wait(cmd, signals, a.in)
}

// pending returns the exit code of a signal that asked us to end while there was
// no command yet, and else err.
func pending(signals <-chan os.Signal, err error) error {
	for {
		select {
		case s := <-signals:
			if n, ok := s.(unix.Signal); ok && slices.Contains([]unix.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT}, n) {
				return silent(exitSignal + int(n))
			}
		default:
			return err
		}
	}
}

// wait passes signals on until the command has ended. On a terminal SIGINT and
// SIGQUIT come from the keyboard, to the whole foreground group: the command has
// them already.
func wait(cmd *exec.Cmd, signals <-chan os.Signal, in *os.File) error {
	tty := term.IsTerminal(int(in.Fd()))
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		select {
		case s := <-signals:
			if tty && (s == unix.SIGINT || s == unix.SIGQUIT) {
				continue
			}
			// It may have ended meanwhile; then there is nobody to signal.
			_ = cmd.Process.Signal(s)
		case err := <-ended:
			x, ok := errors.AsType[*exec.ExitError](err)
			if !ok {
				return err
			}
			if ws, ok := x.Sys().(interface{ Signal() unix.Signal }); ok && x.ExitCode() < 0 {
				return silent(exitSignal + int(ws.Signal()))
			}
			return silent(x.ExitCode())
		}
	}
}

// certificates returns the keys that we may sign with and that have a certificate.
func certificates(ctx context.Context, c *client.Client) ([]client.Key, error) {
	all, err := c.Keys(ctx)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(k client.Key) bool { return !k.MaySign || k.OpenPGP == nil && len(k.X509) == 0 }), nil
}

// forRPM gives rpm a gpg to run where its own macro names one that is missing:
// Debian's rpm 4.18 wants /usr/bin/gpg2, which its gnupg package does not have.
func (a *app) forRPM(argv []string) []string {
	if !slices.Contains([]string{"rpm", "rpmsign", "rpmbuild"}, filepath.Base(argv[0])) {
		return argv
	}
	out, err := exec.Command("rpm", "--eval", "%{__gpg}").Output()
	if err != nil {
		return argv
	}
	wanted := strings.TrimSpace(string(out))
	gpg, err := exec.LookPath("gpg")
	if _, serr := os.Stat(wanted); serr == nil || err != nil {
		return argv
	}
	a.say("signwarden: rpm's %%__gpg is %s, which is missing; adding --define '__gpg %s'", wanted, gpg)
	return slices.Concat(argv[:1], []string{"--define", "__gpg " + gpg}, argv[1:])
}

// maxTempDir is the longest TMPDIR in which a GNUPGHOME has room for its sockets.
const maxTempDir = 60

// gnupgHome is a GNUPGHOME for one command.
type gnupgHome struct {
	dir, socket string
	env         []string
	socketDir   bool // gpgconf made a directory for the socket elsewhere
}

// newGnuPGHome makes the directory and asks gpgconf where gpg will look for its
// agent in it: beside the other files, or under /run/user where that exists.
func newGnuPGHome() (*gnupgHome, error) {
	// A socket's path has 107 bytes at most (unix(7)), and gpg's own sockets have
	// names of up to 20 in this directory.
	base, err := filepath.Abs(os.TempDir())
	if err != nil {
		return nil, err
	}
	hint := "TMPDIR must name a directory that you may write to"
	if len(base) > maxTempDir {
		hint = fmt.Sprintf("the path of TMPDIR has %d bytes, too many for the sockets in it, so /tmp was tried; have TMPDIR name a directory of at most %d", len(base), maxTempDir)
		base = "/tmp"
	}
	dir, err := os.MkdirTemp(base, "signwarden-")
	if err != nil {
		return nil, exit.Hint(fmt.Errorf("making a GNUPGHOME: %w", err), "%s", hint)
	}
	h := &gnupgHome{dir: dir}
	h.env = append(slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "GNUPGHOME=") || strings.HasPrefix(v, "GPG_AGENT_INFO=")
	}), "GNUPGHOME="+dir)
	h.socket, err = gpgSocket("auto", h.env)
	if err != nil {
		return nil, errors.Join(err, h.remove())
	}
	if filepath.Dir(h.socket) != dir {
		// It fails where /run/user is missing, but then gpg looks in the home.
		h.socketDir = h.run(nil, "gpgconf", "--create-socketdir") == nil
	}
	return h, nil
}

// populate configures gpg and gpgsm and imports the certificates, trusted: they
// come from the gateway, over its authenticated connection.
func (h *gnupgHome) populate(all []client.Key, roots []string) error {
	for name, text := range map[string]string{
		// An agent of gpg's own would take the socket over, and hold no keys.
		"gpg.conf": noAutostart + "\n",
		// The CRL of the issuer of one's own certificate would be for dirmngr to fetch,
		// which is not started either.
		"gpgsm.conf": noAutostart + "\ndisable-crl-checks\n",
	} {
		if err := os.WriteFile(filepath.Join(h.dir, name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	if err := h.populateX509(all, roots); err != nil {
		return err
	}
	all = slices.DeleteFunc(slices.Clone(all), func(k client.Key) bool { return k.OpenPGP == nil })
	if len(all) == 0 {
		return nil
	}
	var certs, trust bytes.Buffer
	for _, k := range all {
		cert, err := openpgp.ParseCertificate(k.OpenPGP.Certificate)
		if err != nil {
			return fmt.Errorf("certificate of %q: %w", k.Name, err)
		}
		certs.Write(k.OpenPGP.Certificate)
		fmt.Fprintf(&trust, "%s:6:\n", cert.Fingerprint())
	}
	if err := h.run(&certs, "gpg", "--batch", "--quiet", "--import"); err != nil {
		return err
	}
	return h.run(&trust, "gpg", "--batch", "--quiet", "--import-ownertrust")
}

// populateX509 gives gpgsm, where there is one, the chains of keys and the roots.
func (h *gnupgHome) populateX509(all []client.Key, roots []string) error {
	all = slices.DeleteFunc(slices.Clone(all), func(k client.Key) bool { return len(k.X509) == 0 })
	if _, err := exec.LookPath("gpgsm"); err != nil || len(all) == 0 {
		return nil
	}
	for _, file := range roots {
		if err := h.run(nil, "gpgsm", "--batch", "--quiet", "--import", file); err != nil {
			return err
		}
	}
	return h.importX509(all)
}

func (h *gnupgHome) run(in *bytes.Buffer, name string, args ...string) error {
	cmd := exec.Command(name, args...)
	cmd.Env = h.env
	if in != nil {
		cmd.Stdin = in
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return exit.Hint(fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(out)),
			"is GnuPG installed? apt-get install gnupg, or dnf install gnupg2")
	}
	return nil
}

func (h *gnupgHome) remove() error {
	if h.socketDir {
		// Best effort: it is empty, and below /run/user.
		_ = h.run(nil, "gpgconf", "--remove-socketdir")
	}
	return os.RemoveAll(h.dir)
}
