package main

import (
	"cmp"
	"context"
	"errors"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/formats/kmod"
	"github.com/signwarden/signwarden/formats/pe"
	"github.com/signwarden/signwarden/formats/rpm"
	"github.com/signwarden/signwarden/gateway/client"
)

// autoJob is one call of sign auto.
type autoJob struct {
	bulk
	target
	key     string
	packers chan struct{}
	headers *budget
	undo    *rpm.Journal
}

func (a *app) signAuto() *cobra.Command {
	j := autoJob{bulk: bulk{a: a}, packers: packers(), headers: newBudget(headerMemory), undo: rpm.NewJournal()}
	c := &cobra.Command{
		Use:   "auto --key NAME FILE...",
		Short: "Sign files that carry their signature, by what they hold",
		Long: `auto looks into each file and signs it in place as sign rpm, sign efi or sign kmod
does. What it is never goes by the name alone; a kernel module, which looks like any
object file, must have the name of one too. Any other file is refused: sign openpgp
and sign cms make detached signatures of anything.

The key needs an OpenPGP certificate for packages, and an X.509 certificate for
images and modules.`,
		RunE: func(cmd *cobra.Command, args []string) error { return j.sign(cmd.Context(), args) },
	}
	c.Flags().StringVar(&j.key, "key", "", "name of the key")
	j.target.flags(c)
	j.bulk.flags(c)
	exit.Require(c, "key")
	return c
}

func (j *autoJob) sign(ctx context.Context, args []string) error {
	files, err := j.list(args, func(path string) bool {
		format, err := recognize(path)
		return err != nil || format != "" // what cannot be read is told with the file
	})
	if err != nil {
		return err
	}
	if err := j.check(files); err != nil {
		return err
	}
	return j.a.with(func(c *client.Client) error {
		k, err := c.Key(ctx, j.key)
		if err != nil {
			return err
		}
		err = j.run(ctx, files, func(ctx context.Context, file string) (string, error) { return j.signFile(ctx, c, k, file) })
		return cmp.Or(err, j.undo.Close())
	})
}

// signFile signs one file as the command for its format does.
func (j *autoJob) signFile(ctx context.Context, c *client.Client, k client.Key, file string) (string, error) {
	format, err := recognize(file)
	if err != nil {
		return "", err
	}
	claim := client.Claim{File: filepath.Base(file)}
	x := x509Job{target: j.target, packers: j.packers}
	switch format {
	case "rpm":
		pgp, err := asOpenPGP(k)
		if err != nil {
			return "", err
		}
		r := rpmJob{target: j.target, headers: j.headers, undo: j.undo}
		return r.signFile(ctx, &j.bulk, file, pgp, func(nevra string, list []rpm.Request) ([][]byte, error) {
			claim.NEVRA = nevra
			return j.bulk.answers(list, packageSigner(ctx, c, k, claim), nil)
		})
	case "authenticode", "kmod":
		if len(k.X509) == 0 {
			return "", noX509(k.Name)
		}
		signer := waiting{c.Signer(ctx, k, format, claim), &j.bulk}
		if format == "kmod" {
			return x.signFile(ctx, k, signer, file, x.module)
		}
		return x.signFile(ctx, k, signer, file, x.image)
	}
	return "", exit.Hint(errors.New("is no package, EFI image or kernel module"), "sign openpgp and sign cms make detached signatures of any file")
}

// recognize tells what format's signature a file can carry; "" is none.
func recognize(path string) (string, error) {
	f, err := openInput(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return "", err
	}
	switch {
	case rpm.Recognize(f):
		return "rpm", nil
	case pe.Recognize(f, info.Size()):
		return "authenticode", nil
	case isModule(path) && kmod.Recognize(f, info.Size()):
		return "kmod", nil
	}
	return "", nil
}
