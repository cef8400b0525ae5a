package main

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/hsm"
)

func tokenListCommand() *cobra.Command {
	var f tokenFlags
	c := &cobra.Command{
		Use:   "list",
		Short: "List the keys and certificates in the token",
		Long: `list tells of every key and certificate in the token, or in each of several: kind,
algorithm, CKA_ID, label, the name under which the gateway has it, and what the
token says of a private key: whether it can be taken out, and whether it was made
in the token or came from outside. It reads no private key, changes nothing, and
works beside a gateway that serves.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx, stop := interruptible(c)
			defer stop()
			return tokenList(ctx, &f, os.Stdout, os.Stderr)
		},
	}
	f.add(c)
	return c
}

func tokenList(ctx context.Context, f *tokenFlags, out, says io.Writer) error {
	conf, tokens, err := f.tokens(says)
	if err != nil {
		return err
	}
	defer closeAll(tokens)
	known, err := registrations(ctx, conf)
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // before init there are no names
		fmt.Fprintf(says, "warning: the store cannot be read, so no names are shown: %v\n", err)
	}
	var errs []error
	exposed := 0
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "TOKEN\tKIND\tALGORITHM\tID\tLABEL\tKEY\tREMARKS")
	all := listAll(ctx, tokens)
	for i, t := range tokens {
		if err := all[i].err; err != nil {
			errs = append(errs, err)
			continue
		}
		objects := all[i].objects
		slices.SortStableFunc(objects, func(a, b hsm.Object) int {
			return cmp.Or(cmp.Compare(a.Label, b.Label), cmp.Compare(string(a.ID), string(b.ID)), cmp.Compare(a.Kind, b.Kind))
		})
		for _, o := range objects {
			if canLeave(o) {
				exposed++
			}
			name := "-"
			if k, ok := known[string(o.ID)]; ok {
				name = k.name
			}
			fmt.Fprintf(w, "%s\t%v\t%s\t%s\t%s\t%s\t%s\n", t.name, o.Kind, cmp.Or(o.Algorithm, "?"),
				cmp.Or(hex.EncodeToString(o.ID), "-"), exit.Line(cmp.Or(o.Label, "-")), name, exit.Line(remarks(o)))
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if exposed > 0 {
		fmt.Fprintf(says, "warning: %d private or secret keys can be taken out of their token by who knows its PIN; they are marked EXTRACTABLE or NOT SENSITIVE\n", exposed)
	}
	return errors.Join(errs...)
}

// A holding is what one token holds, or why it is not known.
type holding struct {
	objects []hsm.Object
	err     error
}

// listAll lists the tokens at the same time, in their order.
func listAll(ctx context.Context, tokens []tokenAdmin) []holding {
	all := make([]holding, len(tokens))
	var wg sync.WaitGroup
	for i, t := range tokens {
		wg.Go(func() {
			objects, err := t.List(ctx)
			if err != nil {
				err = fmt.Errorf("token %s: %w", t.name, err)
			}
			all[i] = holding{objects, err}
		})
	}
	wg.Wait()
	return all
}

// canLeave says whether the token tells of a private key that it can be read or wrapped.
func canLeave(o hsm.Object) bool {
	return (o.Kind == hsm.PrivateKey || o.Kind == hsm.SecretKey) && (o.Extractable == hsm.Yes || o.Sensitive == hsm.No)
}

func remarks(o hsm.Object) string {
	var r []string
	add := func(is bool, what string) {
		if is {
			r = append(r, what)
		}
	}
	switch o.Kind {
	case hsm.Certificate:
		add(o.Subject != "", o.Subject)
		add(o.Serial != "", "serial "+o.Serial)
	case hsm.PrivateKey, hsm.SecretKey:
		add(o.Extractable == hsm.Yes, "EXTRACTABLE")
		add(o.Sensitive == hsm.No, "NOT SENSITIVE")
		add(o.Extractable == hsm.No && o.NeverExtractable == hsm.No && o.Local == hsm.Yes, "was extractable once")
		add(o.Local == hsm.Yes, "made here")
		add(o.Local == hsm.No, "from outside")
		add(o.Extractable == hsm.NotSaid, "not said whether extractable")
	}
	return strings.Join(r, ", ")
}
