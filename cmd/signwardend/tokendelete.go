package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/hsm"
)

func tokenDeleteCommand() *cobra.Command {
	var f tokenFlags
	var id string
	var yes bool
	c := &cobra.Command{
		Use:   "delete --id HEX --yes",
		Short: "Destroy a key that is not registered, and its certificates, in the token",
		Long: `delete destroys the private and the public key with a CKA_ID, and the certificates
with it, in the token, or in each of several. There is no way back. A key that the
gateway has registered, or is making, is refused: disable it instead. Without --yes
it shows what would be destroyed.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx, stop := interruptible(c)
			defer stop()
			return tokenDelete(ctx, &f, id, yes, os.Stdout, os.Stderr)
		},
	}
	f.add(c)
	c.Flags().StringVar(&id, "id", "", "CKA_ID of the key, in hexadecimal")
	c.Flags().BoolVar(&yes, "yes", false, "destroy it, and do not only show it")
	exit.Require(c, "id")
	return c
}

func tokenDelete(ctx context.Context, f *tokenFlags, hexID string, yes bool, out, says io.Writer) error {
	id, err := parseID(hexID)
	if err != nil {
		return err
	}
	conf, tokens, err := f.tokens(says)
	if err != nil {
		return err
	}
	defer closeAll(tokens)
	known, err := registrations(ctx, conf)
	if err != nil {
		return exit.Hint(fmt.Errorf("it cannot be told whether the key is registered: %w", err), "nothing was destroyed; mend the store, or its path in the configuration, first")
	}
	if k, ok := known[string(id)]; ok {
		return exit.Hint(fmt.Errorf("the id %x is that of the key %s; nothing was destroyed", id, k.name),
			"signwarden key disable stops a registered key")
	}
	if !yes {
		return showDoomed(ctx, tokens, id, out)
	}
	gone := 0
	var errs []error
	for _, t := range tokens {
		err := t.Delete(ctx, id)
		switch {
		case err == nil:
			gone++
			fmt.Fprintf(out, "destroyed %x in token %s\n", id, t.name)
		case !errors.Is(err, hsm.ErrNotFound):
			errs = append(errs, fmt.Errorf("token %s: %w", t.name, err))
		}
	}
	if gone == 0 && len(errs) == 0 {
		return fmt.Errorf("id %x: %w", id, hsm.ErrNotFound)
	}
	return errors.Join(errs...)
}

// showDoomed shows what would be destroyed, and says so by its error.
func showDoomed(ctx context.Context, tokens []tokenAdmin, id []byte, out io.Writer) error {
	n := 0
	for i, held := range listAll(ctx, tokens) {
		if held.err != nil {
			return held.err
		}
		for _, o := range held.objects {
			if string(o.ID) == string(id) && o.Kind != hsm.SecretKey {
				n++
				fmt.Fprintf(out, "token %s: %v %s, %s, id %s\n", tokens[i].name, o.Kind, exit.Line(o.Label), o.Algorithm, hex.EncodeToString(o.ID))
			}
		}
	}
	if n == 0 {
		return fmt.Errorf("id %x: %w", id, hsm.ErrNotFound)
	}
	return exit.UsageError("nothing was destroyed: to destroy these %d objects for good, say --yes", n)
}
