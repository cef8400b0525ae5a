package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/gateway/client"
	"github.com/signwarden/signwarden/gateway/config"
)

// agentFlags say which sockets to serve.
type agentFlags struct {
	gpg    []string // paths and words
	p11    []string
	ssh    []string
	tokens []string // of p11
	bounds config.Socket
	file   string
	fromFD bool
}

func (a *app) agentCommand() *cobra.Command {
	var f agentFlags
	c := &cobra.Command{
		Use:   "agent [--gpg-socket PATH|auto|extra] [--p11-socket PATH|auto] [--ssh-socket PATH|auto]",
		Short: "Serve agent sockets on this host",
		Long: `agent serves agent sockets until it is ended: unmodified gpg, gpgsm, rpmsign, git and
debsign sign through them with the keys that you may use, tools that load keys
by PKCS#11, and ssh-keygen, git and ssh. It answers everything but the signing itself from memory. The sockets are
for your own uid.

For a gpg-agent socket, "auto" is where gpg looks for its agent, gpgconf --list-dirs agent-socket; "extra" is
the agent-extra-socket, for forwarding through SSH. signwarden agent setup makes a
GNUPGHOME ready. A socket can have bounds of its own: which keys it shows, for how long
it signs, and how often. The flags give those of each socket that --gpg-socket,
--p11-socket and --ssh-socket name; in the file of --config, or agent.yaml beside the client profile, each entry has its own:

  sockets:
    - gpg_socket: auto
    - {gpg_socket: /run/user/1000/jobs/17/S.gpg-agent, keys: ["nightly-*"], lifetime: 2h, signatures: 500}

At a PKCS#11 socket, tools that load p11-kit-client.so find the keys and their X.509
certificates in a token "signwarden", or in those of --p11-token, and sign without a PIN.
There "auto" is where p11-kit's client looks by itself, $XDG_RUNTIME_DIR/p11-kit/pkcs11;
for another path set P11_KIT_SERVER_ADDRESS=unix:path=PATH.

An ssh-agent socket signs what ssh-keygen -Y sign and git (gpg.format=ssh) ask for, where a
rule allows ssh-sig; rules can say which namespaces. Logins need a rule that names the
format ssh-auth ("*" is not enough), or a blind one for an RSA or EC key on the other sockets. "auto" is $XDG_RUNTIME_DIR/signwarden/ssh: tools have
to be told, SSH_AUTH_SOCK=PATH.

It starts while the gateway is away too: tools are told "Not operational" until it answers.`,
		Example: `  signwarden agent --gpg-socket auto
  signwarden agent --gpg-socket ~/jobs/17/S.gpg-agent --keys 'nightly-*' --lifetime 2h --signatures 500
  signwarden agent --gpg-socket auto --p11-socket auto --ssh-socket auto`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			all, err := a.sockets(&f)
			if err != nil {
				return err
			}
			return a.with(func(c *client.Client) error { return a.serveAgents(cmd.Context(), c, all) })
		},
	}
	fl := c.Flags()
	fl.StringArrayVar(&f.gpg, "gpg-socket", nil, "path of a gpg-agent socket, auto, or extra; more than once")
	fl.StringArrayVar(&f.p11, "p11-socket", nil, "path of a PKCS#11 socket, or auto; more than once")
	fl.StringArrayVar(&f.ssh, "ssh-socket", nil, "path of an ssh-agent socket, or auto; more than once")
	addTokenFlag(c, &f.tokens)
	fl.StringArrayVar(&f.bounds.Keys, "keys", nil, "name or glob of keys that the socket shows (default: all that you may sign with)")
	fl.DurationVar((*time.Duration)(&f.bounds.Lifetime), "lifetime", 0, "how long the socket signs, like 2h (default: no bound)")
	fl.IntVar(&f.bounds.Signatures, "signatures", 0, "how many signatures the socket gives (default: no bound)")
	fl.StringArrayVar(&f.bounds.TrustedRoots, "trusted-root", nil, "PEM file with X.509 roots that gpgsm is told to trust")
	fl.StringVar(&f.file, "config", "", "file of agent sockets")
	fl.BoolVar(&f.fromFD, "systemd", false, "serve the sockets that systemd passes (LISTEN_FDS)")
	for _, name := range []string{"gpg-socket", "p11-socket", "ssh-socket"} {
		c.MarkFlagsMutuallyExclusive(name, "config")
		c.MarkFlagsMutuallyExclusive(name, "systemd")
	}
	c.AddCommand(a.agentSetupCommand())
	return c
}

// sockets are those that the flags, the file and systemd name.
func (a *app) sockets(f *agentFlags) ([]socket, error) {
	var passed map[string]*os.File
	if f.fromFD {
		var err error
		passed, err = passedFiles()
		if err != nil {
			return nil, err
		}
	}
	confs, err := a.socketConfigs(f)
	if err != nil {
		return nil, err
	}
	var all []socket
	for _, conf := range confs {
		s := socket{protocol: conf.Protocol(), conf: conf}
		name, isFD := strings.CutPrefix(conf.Path(), config.WordFD)
		if isFD {
			s.file = passed[name]
			delete(passed, name)
			if s.file == nil {
				return nil, exit.UsageError("socket: systemd passes no descriptor named %q: is that the FileDescriptorName of a socket unit, and was --systemd given?", name)
			}
		} else if s.path, err = resolve(conf); err != nil {
			return nil, err
		}
		all = append(all, s)
	}
	// What is passed and not in the file is served without bounds.
	for name, file := range passed {
		protocol, _, _ := strings.Cut(name, "-")
		conf := config.Socket{GPGSocket: config.WordFD + name}
		switch protocol {
		case config.ProtocolP11:
			conf = config.Socket{P11Socket: config.WordFD + name}
		case config.ProtocolSSH:
			conf = config.Socket{SSHSocket: config.WordFD + name}
		}
		all = append(all, socket{protocol: protocol, file: file, conf: conf})
	}
	if len(all) == 0 {
		return nil, exit.Hint(exit.UsageError("it is not said which sockets to serve"), "--gpg-socket auto, --p11-socket auto, --ssh-socket auto, --config FILE or --systemd; see `signwarden agent --help`")
	}
	return all, nil
}

// socketConfigs are what the flags or the file say of sockets. A default file that is
// not there says nothing.
func (a *app) socketConfigs(f *agentFlags) ([]config.Socket, error) {
	var confs []config.Socket
	for _, path := range f.gpg {
		s := f.bounds
		s.GPGSocket = path
		if err := s.Check(); err != nil {
			return nil, exit.UsageError("%w", err)
		}
		if strings.HasPrefix(path, config.WordFD) {
			return nil, exit.UsageError("--gpg-socket: %s is for the file of --config", path)
		}
		confs = append(confs, s)
	}
	p11, err := f.p11Configs()
	if err != nil {
		return nil, err
	}
	ssh, err := f.sshConfigs()
	if confs = slices.Concat(confs, p11, ssh); err != nil || len(confs) > 0 {
		return confs, err
	}
	if len(f.bounds.Keys) > 0 || f.bounds.Lifetime != 0 || f.bounds.Signatures != 0 || len(f.bounds.TrustedRoots) > 0 {
		return nil, exit.UsageError("--keys, --lifetime, --signatures and --trusted-root are for --gpg-socket, --p11-socket and --ssh-socket; other sockets have them in a file")
	}
	file := f.file
	if file == "" {
		profile, err := a.profilePath()
		if err != nil {
			return nil, err
		}
		file = filepath.Join(filepath.Dir(profile), config.AgentFileName)
	}
	conf, err := config.LoadAgent(file)
	if errors.Is(err, fs.ErrNotExist) && f.file == "" {
		return nil, nil
	}
	return conf.Sockets, err
}

// p11Configs are what the flags say of PKCS#11 sockets.
func (f *agentFlags) p11Configs() ([]config.Socket, error) {
	tokens, err := parseTokens(f.tokens)
	switch {
	case err != nil:
		return nil, err
	case len(tokens) > 0 && len(f.p11) == 0:
		return nil, exit.UsageError("--p11-token is for --p11-socket")
	case len(f.bounds.TrustedRoots) > 0 && len(f.p11)+len(f.ssh) > 0 && len(f.gpg) == 0:
		return nil, exit.UsageError("--trusted-root is for --gpg-socket")
	}
	var confs []config.Socket
	for _, path := range f.p11 {
		s := f.bounds
		s.TrustedRoots, s.P11Socket, s.P11Tokens = nil, path, tokens
		if err := s.Check(); err != nil {
			return nil, exit.UsageError("%w", err)
		}
		if strings.HasPrefix(path, config.WordFD) {
			return nil, exit.UsageError("--p11-socket: %s is for the file of --config", path)
		}
		confs = append(confs, s)
	}
	return confs, nil
}

// sshConfigs are what the flags say of ssh-agent sockets.
func (f *agentFlags) sshConfigs() ([]config.Socket, error) {
	var confs []config.Socket
	for _, path := range f.ssh {
		s := f.bounds
		s.TrustedRoots, s.SSHSocket = nil, path
		if err := s.Check(); err != nil {
			return nil, exit.UsageError("%w", err)
		}
		if strings.HasPrefix(path, config.WordFD) {
			return nil, exit.UsageError("--ssh-socket: %s is for the file of --config", path)
		}
		confs = append(confs, s)
	}
	return confs, nil
}

// sshSocket resolves the word auto. SSH's tools look nowhere by themselves.
func sshSocket(path string) (string, error) {
	if path != config.WordAuto {
		return filepath.Abs(path)
	}
	dir := os.Getenv("XDG_RUNTIME_DIR")
	if dir == "" {
		return "", exit.Hint(errors.New("XDG_RUNTIME_DIR is not set, so there is no place for the ssh-agent socket"),
			"name a path, and give it to tools: SSH_AUTH_SOCK=PATH")
	}
	return filepath.Join(dir, "signwarden", "ssh"), nil
}

// resolve is the path that a socket's word stands for.
func resolve(s config.Socket) (string, error) {
	switch s.Protocol() {
	case config.ProtocolP11:
		return p11Socket(s.P11Socket)
	case config.ProtocolSSH:
		return sshSocket(s.SSHSocket)
	}
	return gpgSocket(s.GPGSocket, os.Environ())
}

// serveAgents serves until ctx ends.
func (a *app) serveAgents(ctx context.Context, c *client.Client, all []socket) error {
	s, err := a.startSockets(c.OpenSession, all)
	if err != nil {
		return err
	}
	for _, line := range s.lines {
		a.say("signwarden: %s", line)
	}
	select {
	case <-ctx.Done():
	case <-s.failed:
	}
	return s.stop()
}

// gpgSocket resolves the words auto and extra: where gpg, in that environment, looks
// for its agent, and where its agent would listen for forwarded connections.
func gpgSocket(path string, env []string) (string, error) {
	dir := map[string]string{config.WordAuto: "agent-socket", config.WordExtra: "agent-extra-socket"}[path]
	if dir == "" {
		return filepath.Abs(path)
	}
	cmd := exec.Command("gpgconf", "--list-dirs", dir)
	cmd.Env = env
	out, err := cmd.Output()
	if err != nil {
		return "", exit.Hint(fmt.Errorf("asking gpgconf where gpg looks for its agent: %w", err),
			"install GnuPG (apt-get install gnupg, dnf install gnupg2), or name the path")
	}
	// gpgconf percent-escapes; a path without '%' is as it is.
	return strings.ReplaceAll(strings.ReplaceAll(strings.TrimSpace(string(out)), "%3a", ":"), "%25", "%"), nil
}

// umask returns the process's umask, which can only be read by setting it;
// it is called from one goroutine.
func umask() os.FileMode {
	m := unix.Umask(0o077)
	unix.Umask(m)
	return os.FileMode(m)
}
