// Command signwarden is the client: it signs files and brings agent sockets up
// on a build host, administers keys and policy, and reads the audit log. It
// sends digests to a gateway and holds no key.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/gateway/client"
)

// softMemory is what the garbage collector keeps the program within as long as
// less is in use: packed modules leave megabytes behind, each.
func softMemory() int64 { return 14<<20 + int64(runtime.NumCPU())*11<<20 }

func main() {
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(softMemory())
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	// The first signal asks a command to end; the second ends the program.
	context.AfterFunc(ctx, stop)
	err := exit.Execute(ctx, newRoot(os.Stdin, os.Stdout, os.Stderr))
	// The handler stays to the end: a signal that comes when all is done does not
	// turn it into a failure.
	if s, ok := errors.AsType[silent](err); ok {
		os.Exit(int(s))
	}
	if err != nil {
		exit.Print(os.Stderr, "signwarden", err)
	}
	os.Exit(exit.Code(err))
}

// silent is an exit code whose reason has been told: by the command that exec
// ran, or with the file that failed.
type silent int

func (s silent) Error() string { return fmt.Sprintf("exit code %d", int(s)) }

// app is what the commands share.
type app struct {
	in       *os.File
	out, err io.Writer
	profile  string
	format   string // table, json or jsonl
	log      *slog.Logger
}

func newRoot(in *os.File, out, errOut io.Writer) *cobra.Command {
	a := &app{in: in, out: out, err: errOut, log: slog.New(slog.NewTextHandler(errOut, nil))}
	root := &cobra.Command{
		Use:   "signwarden",
		Short: "Sign with keys that stay in a Signwarden gateway's token",
		Long: `signwarden signs with keys that never leave the token of a Signwarden gateway.
Only digests are sent.

Unmodified tools sign through it:
  signwarden exec -- rpmsign --define '_gpg_name release@example.org' --addsign x.rpm
  signwarden agent --gpg-socket auto

It also signs by itself, and administers keys, policy and the audit log.

The gateway and our certificate are named by a client profile: --profile,
SIGNWARDEN_PROFILE, or $XDG_CONFIG_HOME/signwarden/client.yaml.

Exit codes: 0 done, 1 failed, 2 wrong usage or input, 3 a signature did not
verify, 4 denied, 5 the gateway is unavailable, 6 some of several files failed.`,
		Version:           version(),
		SilenceUsage:      true,
		SilenceErrors:     true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
		PersistentPreRunE: func(*cobra.Command, []string) error {
			if !slices.Contains([]string{"table", "json", "jsonl"}, a.format) {
				return fmt.Errorf("-o %q is not table, json or jsonl", a.format)
			}
			return nil
		},
	}
	root.SetOut(out)
	root.SetErr(errOut)
	root.PersistentFlags().StringVar(&a.profile, "profile", "", "client profile (default: $SIGNWARDEN_PROFILE, or $XDG_CONFIG_HOME/signwarden/client.yaml)")
	root.PersistentFlags().StringVarP(&a.format, "output-format", "o", "table", "how data is printed: table, json, or jsonl for a line a file")
	root.AddCommand(a.pingCommand(), a.keyCommand(), a.policyCommand(), a.signCommand(), a.verifyCommand(), a.agentCommand(),
		a.p11Command(), a.execCommand(), a.doctorCommand(), a.auditCommand(), a.benchCommand())
	return root
}

func version() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

// profilePath is where the profile is to be.
func (a *app) profilePath() (string, error) {
	if a.profile != "" {
		return a.profile, nil
	}
	if p := os.Getenv("SIGNWARDEN_PROFILE"); p != "" {
		return p, nil
	}
	dir, err := os.UserConfigDir()
	if err != nil {
		return "", exit.Hint(err, "name the client profile with --profile or SIGNWARDEN_PROFILE")
	}
	return filepath.Join(dir, "signwarden", "client.yaml"), nil
}

// config reads the profile.
func (a *app) config() (client.Config, error) {
	path, err := a.profilePath()
	if err != nil {
		return client.Config{}, err
	}
	c, err := client.LoadProfile(path)
	if errors.Is(err, os.ErrNotExist) {
		return c, exit.Hint(err, "name the client profile with --profile or SIGNWARDEN_PROFILE; `signwardend client create NAME` makes one")
	}
	c.Logger = a.log
	return c, err
}

// dial reads the profile and makes a client.
func (a *app) dial() (*client.Client, error) {
	c, err := a.config()
	if err != nil {
		return nil, err
	}
	return client.Dial(c)
}

// with runs f with a client.
func (a *app) with(f func(*client.Client) error) error {
	c, err := a.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	return f(c)
}

// print writes v as JSON, or has table write it in columns.
func (a *app) print(v any, table func(w io.Writer)) error {
	if a.format != "table" {
		enc := json.NewEncoder(a.out)
		if a.format == "json" {
			enc.SetIndent("", "  ")
		}
		enc.SetEscapeHTML(false)
		return enc.Encode(v)
	}
	w := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
	table(w)
	return w.Flush()
}

// say tells a person something on stderr.
func (a *app) say(format string, args ...any) { fmt.Fprintf(a.err, format+"\n", args...) }
