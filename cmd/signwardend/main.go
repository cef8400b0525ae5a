// Command signwardend is the signing gateway: it holds the token and the
// policy, signs, and records.
package main

import (
	"context"
	"os"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/hsm/worker"
)

func main() {
	// Before anything else: what serve starts for each of its workers. It has no
	// flags and no use for people.
	if len(os.Args) == 2 && os.Args[1] == worker.Command {
		os.Exit(worker.Main())
	}
	err := exit.Execute(context.Background(), rootCommand())
	if err != nil {
		exit.Print(os.Stderr, "signwardend", err)
	}
	// Not by returning from main: modules such as SoftHSM 2.6 crash in their
	// destructors when the process ends the long way.
	os.Exit(exit.Code(err))
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "signwardend",
		Short: "The Signwarden signing gateway",
		Long: `signwardend is the Signwarden signing gateway. It reaches private keys that stay
in a PKCS#11 token, decides who may sign what, verifies and records every
signature, and serves clients over gRPC with mutual TLS and users of this host
over gpg-agent, PKCS#11 and ssh-agent sockets.

Begin with: signwardend init --dir D --dev`,
		Version:           version(),
		SilenceUsage:      true,
		SilenceErrors:     true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
	}
	root.AddCommand(initCommand(), serveCommand(), clientCommand(), checkCommand(), tokenCommand())
	return root
}

func version() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

// dirFlags are the two ways to name a configuration.
type dirFlags struct{ dir, config string }

func (d *dirFlags) add(c *cobra.Command) {
	c.Flags().StringVar(&d.dir, "dir", "", "the gateway's directory, as made by init")
	c.Flags().StringVar(&d.config, "config", "", "the configuration, where it is not DIR/signwardend.yaml")
	c.MarkFlagsOneRequired("dir", "config")
	c.MarkFlagsMutuallyExclusive("dir", "config")
}
