package main

import (
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/signwarden/signwarden/hsm/pinrecord"
)

func tokenCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "token",
		Short: "Say what an operator has done to the token",
		Args:  cobra.NoArgs,
	}
	c.AddCommand(retryPINCommand())
	return c
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
