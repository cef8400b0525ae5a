package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/gateway"
	"github.com/signwarden/signwarden/gateway/config"
	"github.com/signwarden/signwarden/gateway/store"
	"github.com/signwarden/signwarden/hsm/pinrecord"
	"github.com/signwarden/signwarden/hsm/worker"
)

func tokenCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "token",
		Short: "List, import and delete what is in the token, and say what an operator did to it",
		Args:  cobra.NoArgs,
	}
	c.AddCommand(tokenListCommand(), tokenImportCommand(), tokenDeleteCommand(), retryPINCommand())
	return c
}

// tokenFlags name a configuration, and one of its tokens or all.
type tokenFlags struct {
	dirFlags
	token string
}

func (f *tokenFlags) add(c *cobra.Command) {
	f.dirFlags.add(c)
	c.Flags().StringVar(&f.token, "token", "", "name of one of several tokens (default: all)")
}

// A tokenAdmin is a configured token, for acts that each have a worker of their own.
type tokenAdmin struct {
	*worker.Admin
	name string
}

// tokens are the configured tokens that are meant. Nothing has been opened yet: a
// gateway that serves may run beside. Close each.
func (f *tokenFlags) tokens(log io.Writer) (config.Config, []tokenAdmin, error) {
	conf, err := f.load()
	if err != nil {
		return conf, nil, err
	}
	var names []string
	var meant []config.NamedToken
	for _, t := range conf.AllTokens() {
		names = append(names, t.Name)
		if f.token == "" || f.token == t.Name {
			meant = append(meant, t)
		}
	}
	if len(meant) == 0 {
		return conf, nil, exit.UsageError("--token %q: the tokens are %s", f.token, strings.Join(names, ", "))
	}
	var out []tokenAdmin
	for _, t := range meant {
		c := only(conf, t)
		pin, err := readPIN(c.Token)
		if err != nil {
			closeAll(out)
			return conf, nil, err
		}
		out = append(out, tokenAdmin{name: t.Name, Admin: worker.Administer(worker.Config{
			Module: c.Token.Module, Env: c.Token.Environment, TokenLabel: c.Token.Label, Profile: c.Token.Profile, PIN: pin,
			Tries:        pinrecord.New(pinRecord(c), c.Token.Module, c.Token.Label),
			StartTimeout: time.Duration(c.Token.StartTimeout),
			Logger:       slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelWarn})),
		})})
	}
	return conf, out, nil
}

func closeAll(all []tokenAdmin) {
	for _, t := range all {
		t.Close() // it waits, and does not fail
	}
}

// interruptible is a command's context, which ends when somebody interrupts it, or its
// terminal goes: what was begun in a token is then undone. Until stop is called, after
// that, another interruption does nothing.
func interruptible(c *cobra.Command) (ctx context.Context, stop context.CancelFunc) {
	signals := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // as by nohup
		signals = append(signals, syscall.SIGHUP)
	}
	return signal.NotifyContext(c.Context(), signals...)
}

// A registration is what the store says of an id.
type registration struct {
	name    string
	public  []byte // SubjectPublicKeyInfo; nil: not registered yet
	pending bool   // it is being made, or was when the gateway ended
}

// registrations are the ids of which the store knows. Where there is no store it is
// fs.ErrNotExist: whoever destroys must not take that for an empty one.
func registrations(ctx context.Context, conf config.Config) (map[string]registration, error) {
	known := map[string]registration{}
	s, err := store.ReadSQLite(ctx, conf.Store.SQLite)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	state, err := s.Load(ctx)
	if err != nil {
		return nil, err
	}
	for _, p := range state.Pending {
		known[string(p.ID)] = registration{name: p.KeyName, pending: true}
	}
	for _, k := range state.Keys {
		known[string(k.ID)] = registration{name: k.Name, public: k.Public}
		if k.OpenPGP != nil && len(k.OpenPGP.PrimaryID) > 0 {
			known[string(k.OpenPGP.PrimaryID)] = registration{name: k.Name + " (OpenPGP primary key)", public: k.OpenPGP.PrimaryPublic}
		}
	}
	return known, nil
}

func parseID(s string) ([]byte, error) {
	id, err := hex.DecodeString(s)
	if err != nil || len(id) == 0 || len(id) > gateway.MaxTokenID {
		return nil, exit.UsageError("--id %q: 1 to %d bytes in hexadecimal, as `signwardend token list` shows them", s, gateway.MaxTokenID)
	}
	return id, nil
}

func retryPINCommand() *cobra.Command {
	var d dirFlags
	c := &cobra.Command{
		Use:   "retry-pin",
		Short: "Have the PIN tried once more that the token has refused",
		Long: `retry-pin says that the token was mended, and not the PIN file: its user PIN was
unlocked, or set to the one in the file. The PIN is then tried once more, by the
next start or by the gateway that runs. After a change of the PIN file it is not
needed.

Each wrong try counts: most tokens lock their PIN after three to ten.`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return retryPIN(&d, os.Stdout) },
	}
	d.add(c)
	return c
}

func retryPIN(d *dirFlags, out io.Writer) error {
	conf, err := d.load()
	if err != nil {
		return err
	}
	none := true
	for _, t := range conf.AllTokens() {
		said, err := pinrecord.Forget(pinRecord(only(conf, t)))
		if err != nil {
			return err
		}
		if said != "" {
			none = false
			fmt.Fprintf(out, "forgotten: %s\n", said)
		}
	}
	if none {
		fmt.Fprintln(out, "no refusal of the PIN is on record")
	}
	return nil
}
