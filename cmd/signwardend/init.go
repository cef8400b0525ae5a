package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/gateway/audit"
	"github.com/signwarden/signwarden/gateway/config"
	"github.com/signwarden/signwarden/gateway/policy"
	"github.com/signwarden/signwarden/gateway/store"
	"github.com/signwarden/signwarden/hsm"
)

type initFlags struct {
	dir, listen             string
	dev                     bool
	module, tokenLabel, pin string
	hosts                   []string
}

func initCommand() *cobra.Command {
	var f initFlags
	c := &cobra.Command{
		Use:   "init --dir D [--dev]",
		Short: "Make a gateway's directory: configuration, private CA, store, first client",
		Long: `init makes the directory D with everything that serve needs: a private CA and a
server certificate, signwardend.yaml, the store, and a first administrator's
client profile in D/clients/admin. It overwrites nothing.

With --dev it also makes a SoftHSM2 token inside D, with random PINs in files
that only you can read, and lets the administrator sign with every key. That is
for trying things out: SoftHSM2 keeps keys in files.

Without --dev it takes a token that exists: --module, --token-label and
--pin-file, or it asks for them on a terminal.`,
		Example: `  signwardend init --dir ./gw --dev
  signwardend init --dir /etc/signwarden --module /usr/lib/libCryptoki2_64.so \
      --token-label release --pin-file /etc/signwarden.pin --listen 10.0.0.5:7443`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return f.run(cmd.Context(), os.Stdin, os.Stdout) },
	}
	c.Flags().StringVar(&f.dir, "dir", "", "directory to make")
	c.Flags().StringVar(&f.listen, "listen", "127.0.0.1:7443", "address to serve on, host:port")
	c.Flags().StringSliceVar(&f.hosts, "host", nil, "further host names or addresses for the server's certificate")
	c.Flags().BoolVar(&f.dev, "dev", false, "make a SoftHSM2 token for development")
	c.Flags().StringVar(&f.module, "module", "", "PKCS#11 module (with --dev: where SoftHSM2's is not found by itself)")
	c.Flags().StringVar(&f.tokenLabel, "token-label", "", "label of the token")
	c.Flags().StringVar(&f.pin, "pin-file", "", "file with the token's user PIN, readable by its owner only")
	exit.Require(c, "dir")
	return c
}

// softhsmModules are where distributions keep SoftHSM2's module.
var softhsmModules = []string{
	"/usr/lib/softhsm/libsofthsm2.so",                  // Debian, Ubuntu
	"/usr/lib64/pkcs11/libsofthsm2.so",                 // Fedora, RHEL
	"/usr/lib64/softhsm/libsofthsm2.so",                // openEuler, SUSE
	"/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so", // older Debian
	"/usr/lib/libsofthsm2.so",                          // Arch
}

func (f *initFlags) run(ctx context.Context, in *os.File, out io.Writer) (err error) {
	host, _, err := net.SplitHostPort(f.listen)
	if err != nil {
		return exit.UsageError("--listen %q is not host:port", f.listen)
	}
	dir, err := filepath.Abs(f.dir)
	if err != nil {
		return err
	}
	if f.dev {
		err = f.devDefaults()
	} else {
		err = f.ask(in, out)
	}
	if err != nil {
		return err
	}
	undo, err := makeDir(dir)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			undo()
		}
	}()
	conf := config.Config{
		Listen: f.listen,
		TLS:    config.TLS{Certificate: serverCertFile, Key: serverKeyFile, ClientCA: caCertFile},
		Token:  config.Token{Module: f.module, Label: f.tokenLabel, PINFile: f.pin},
		Store:  config.Store{SQLite: "signwarden.db"},
	}
	if f.dev {
		if conf.Token, err = makeDevToken(dir, f.module); err != nil {
			return err
		}
	} else if v := os.Getenv("SOFTHSM2_CONF"); v != "" {
		// The token was found by it; serve would not have it.
		conf.Token.Environment = map[string]string{"SOFTHSM2_CONF": v}
	}
	if err := f.write(ctx, dir, host, conf); err != nil {
		return err
	}
	profile := filepath.Join(dir, clientsDir, "admin", profileFile)
	fmt.Fprintf(out, `made %s
next, serve it:
  signwardend serve --dir %s
and in another terminal:
  export SIGNWARDEN_PROFILE=%s
  signwarden ping --wait 10s
  signwarden key create release --algorithm rsa4096 --openpgp-uid "Release <release@example.org>"
`, dir, dir, profile)
	return nil
}

// devDefaults finds SoftHSM2.
func (f *initFlags) devDefaults() error {
	if f.tokenLabel != "" || f.pin != "" {
		return exit.UsageError("--dev makes a token and PINs of its own; leave --token-label and --pin-file out")
	}
	if f.module == "" {
		i := slices.IndexFunc(softhsmModules, func(p string) bool { _, err := os.Stat(p); return err == nil })
		if i < 0 {
			return exit.Hint(errors.New("SoftHSM2's module libsofthsm2.so is not installed"),
				"apt-get install softhsm2, or dnf install softhsm; or name it with --module")
		}
		f.module = softhsmModules[i]
	}
	return nil
}

// ask asks on a terminal for what the flags leave out.
func (f *initFlags) ask(in *os.File, out io.Writer) error {
	for _, q := range []struct {
		flag, text string
		value      *string
	}{
		{"--module", "PKCS#11 module (path of the .so)", &f.module},
		{"--token-label", "label of the token", &f.tokenLabel},
		{"--pin-file", "file with the user PIN", &f.pin},
	} {
		if *q.value != "" {
			continue
		}
		if !term.IsTerminal(int(in.Fd())) {
			return exit.UsageError("%s is needed, or --dev for a development token", q.flag)
		}
		fmt.Fprintf(out, "%s: ", q.text)
		// A fresh reader each time: on a terminal it gets one line.
		line, err := bufio.NewReader(in).ReadString('\n')
		if err != nil {
			return fmt.Errorf("reading %s: %w", q.flag, err)
		}
		*q.value = strings.TrimSpace(line)
	}
	for _, p := range []*string{&f.module, &f.pin} {
		abs, err := filepath.Abs(*p)
		if err != nil {
			return err
		}
		*p = abs
	}
	return nil
}

// makeDir makes an empty directory of mode 0700, or takes one that is empty.
// undo removes what is in it by then, and the directory if it was made here.
func makeDir(dir string) (undo func(), err error) {
	made := false
	if err := ownDir(dir); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, os.ErrNotExist):
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
		made = true
	case err != nil:
		return nil, err
	case len(entries) > 0:
		return nil, exit.Hint(fmt.Errorf("%s exists and is not empty; nothing was changed", dir),
			"choose another --dir, or use it as it is: signwardend serve --dir %s", dir)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, err
	}
	return func() {
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			os.RemoveAll(filepath.Join(dir, e.Name()))
		}
		if made {
			os.Remove(dir)
		}
	}, nil
}

// ownDir refuses a directory that somebody else could change: who can rename in
// it can put a CA of his own into it. A missing one is fine.
func ownDir(dir string) error {
	var st unix.Stat_t
	err := unix.Lstat(dir, &st)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil
	case err != nil:
		return &os.PathError{Op: "lstat", Path: dir, Err: err}
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return exit.UsageError("%s is no directory, or a symbolic link to one", dir)
	case int(st.Uid) != os.Geteuid():
		return exit.Hint(fmt.Errorf("%s belongs to uid %d, who could change what is in it", dir, st.Uid),
			"run this as that user, or choose another --dir")
	case st.Mode&0o022 != 0:
		return exit.Hint(fmt.Errorf("%s can be written by others", dir), "chmod go-w %s, or choose another --dir", dir)
	}
	return nil
}

const devLabel = "signwarden-dev"

// makeDevToken makes a SoftHSM2 token in dir/token, with random PINs.
func makeDevToken(dir, module string) (config.Token, error) {
	tokens := filepath.Join(dir, "token", "tokens")
	if err := os.MkdirAll(tokens, 0o700); err != nil {
		return config.Token{}, err
	}
	conf := filepath.Join(dir, "token", "softhsm2.conf")
	text := fmt.Sprintf("directories.tokendir = %s\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n", tokens)
	if err := writeNew(conf, []byte(text), 0o600); err != nil {
		return config.Token{}, err
	}
	so, user := hsm.NewPIN(rand.Text()), hsm.NewPIN(rand.Text())
	for name, pin := range map[string]hsm.PIN{"so.pin": so, "user.pin": user} {
		if err := writeNew(filepath.Join(dir, "token", name), []byte(pin.Reveal()+"\n"), 0o600); err != nil {
			return config.Token{}, err
		}
	}
	if err := hsm.InitToken(module, map[string]string{"SOFTHSM2_CONF": conf}, devLabel, so, user); err != nil {
		return config.Token{}, fmt.Errorf("making the development token: %w", err)
	}
	return config.Token{
		Module: module, Label: devLabel, PINFile: "token/user.pin",
		Environment: map[string]string{"SOFTHSM2_CONF": "./token/softhsm2.conf"},
	}, nil
}

// write makes everything but the token, and opens the token to see that it works.
func (f *initFlags) write(ctx context.Context, dir, host string, conf config.Config) error {
	at := func(name string) string { return filepath.Join(dir, name) }
	if err := os.Mkdir(at("tls"), 0o700); err != nil {
		return err
	}
	ca, err := newAuthority()
	if err != nil {
		return fmt.Errorf("making the CA: %w", err)
	}
	if err := ca.save(at(caCertFile), at(caKeyFile)); err != nil {
		return err
	}
	hosts := append([]string{"localhost", "127.0.0.1", "::1"}, f.hosts...)
	if ip := net.ParseIP(host); host != "" && !slices.Contains(hosts, host) && (ip == nil || !ip.IsUnspecified()) {
		hosts = append(hosts, host)
	}
	if err := ca.issueServer(hosts, at(serverCertFile), at(serverKeyFile)); err != nil {
		return err
	}
	b, err := yaml.Marshal(conf)
	if err != nil {
		return err
	}
	if err := writeNew(at(config.FileName), append([]byte(configHead), b...), 0o600); err != nil {
		return err
	}
	loaded, err := config.Load(at(config.FileName))
	if err != nil {
		return err
	}
	pool, err := openToken(ctx, loaded, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	if err := pool.Close(); err != nil {
		return err
	}
	if err := firstPolicy(ctx, loaded.Store.SQLite, f.dev); err != nil {
		return err
	}
	_, err = createProfile(dir, "admin", clientAddress(f.listen), ca, clientLife)
	return err
}

const configHead = `# The gateway's configuration. Paths are relative to this file. After a change:
# signwardend check --dir . , then restart, or SIGHUP for tls and agents.
#
# Sockets for users of this host:
# agents:
#   - {gpg_socket: /run/signwarden/S.gpg-agent, principal: local-builds, uids: [1000]}
#   - {p11_socket: /run/signwarden/p11, principal: local-builds, uids: [1000]}

`

// clientAddress is what clients of this host dial for a listen address.
func clientAddress(listen string) string {
	host, port, err := net.SplitHostPort(listen)
	if ip := net.ParseIP(host); err == nil && (host == "" || ip != nil && ip.IsUnspecified()) {
		return net.JoinHostPort("127.0.0.1", port)
	}
	return listen
}

const adminRule = `# Who may do what with which key. What no rule allows is denied.
rules:
  - name: administrators
    principals: [admin]
    keys: ["*"]
    may: [admin, read]
`

const devRule = `  # Made by init --dev. Remove it, and say who may sign what.
  - name: dev-admin-signs
    principals: [admin]
    keys: ["*"]
    may: [sign]
    formats: ["*"]
    blind: true
`

// firstPolicy makes the store and puts the first rules into it, recorded like
// every later change.
func firstPolicy(ctx context.Context, path string, dev bool) error {
	source := adminRule
	if dev {
		source += devRule
	}
	if _, err := policy.Parse([]byte(source)); err != nil {
		return err
	}
	s, err := store.OpenSQLite(ctx, path)
	if err != nil {
		return err
	}
	e := audit.Entry{Time: time.Now(), Action: "policy.apply", Outcome: audit.Done, Principal: "signwardend init",
		Via: fmt.Sprintf("unix:%d", os.Getuid()), FrontEnd: "init", Detail: "the first rules"}
	_, err = s.Commit(ctx, store.Change{Policy: []byte(source), Audit: [][]byte{e.Canonical()}})
	return errors.Join(err, s.Close())
}
