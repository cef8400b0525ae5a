package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/signwarden/signwarden/cmd/internal/exit"
)

func clientCommand() *cobra.Command {
	c := &cobra.Command{Use: "client", Short: "Issue client profiles"}
	var d dirFlags
	var address string
	var life time.Duration
	create := &cobra.Command{
		Use:   "create NAME --dir D",
		Short: "Issue a client profile in D/clients/NAME",
		Long: `create issues a client certificate with the gateway's private CA and writes the
profile D/clients/NAME: move that directory to the client, and point
SIGNWARDEN_PROFILE or --profile at its client.yaml. Its holder is the principal
NAME. It may do nothing before a rule says so: see signwarden policy apply.`,
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error { return clientCreate(&d, args[0], address, life) },
	}
	d.add(create)
	create.Flags().StringVar(&address, "address", "", "gateway's address for this client, host:port (default: where it listens)")
	create.Flags().DurationVar(&life, "valid", clientLife, "how long the certificate is valid")
	c.AddCommand(create)
	return c
}

func clientCreate(d *dirFlags, name, address string, life time.Duration) error {
	if life <= 0 {
		return exit.UsageError("--valid %v is no time to come", life)
	}
	conf, err := d.load()
	if err != nil {
		return err
	}
	for _, agent := range conf.Agents {
		if agent.Principal == name {
			return exit.Hint(fmt.Errorf("%q is the principal of the local users of %s; a certificate of that name would be them", name, agent.Path()),
				"choose another name")
		}
	}
	dir := d.dir
	if dir == "" {
		dir = filepath.Dir(d.config)
	}
	ca, err := loadAuthority(filepath.Join(dir, caCertFile), filepath.Join(dir, caKeyFile))
	if errors.Is(err, os.ErrNotExist) {
		return exit.Hint(fmt.Errorf("the gateway has no private CA here: %w", err),
			"issue the client's certificate where your own CA is, with the principal's name as common name or SPIFFE id")
	}
	if err != nil {
		return err
	}
	if address == "" {
		address = clientAddress(conf.Listen)
	}
	path, err := createProfile(dir, name, address, ca, life)
	if err != nil {
		return err
	}
	fmt.Printf("made %s\nnext: export SIGNWARDEN_PROFILE=%s, and give %q rights with `signwarden policy apply`\n", path, path, name)
	return nil
}
