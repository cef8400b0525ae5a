package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/formats/openpgp"
	"github.com/signwarden/signwarden/gateway/client"
	"github.com/signwarden/signwarden/gateway/keys"
)

func (a *app) signCommand() *cobra.Command {
	c := &cobra.Command{Use: "sign", Short: "Sign files"}
	c.AddCommand(a.signOpenPGP())
	return c
}

// openpgpJob is one call of sign openpgp.
type openpgpJob struct {
	key, output, hash         string
	armor, clearsign, replace bool
}

func (a *app) signOpenPGP() *cobra.Command {
	var j openpgpJob
	c := &cobra.Command{
		Use:   "openpgp --key NAME [--armor | --clearsign] FILE...",
		Short: "Make OpenPGP signatures, detached or clear",
		Long: `openpgp signs each FILE: FILE.sig is a detached signature, with --armor FILE.asc,
and with --clearsign FILE.asc holds the text and its signature. Files are hashed
here, in constant memory (a text to clear-sign is held in memory, at most
64 MiB); only the digest is sent. A FILE of - is standard input, signed to
standard output.

A signature file that exists is left alone unless --force is given. An error with
one file does not stop the others; then the exit code is 6.`,
		Example: `  signwarden sign openpgp --key release --armor SHA256SUMS
  gpg --verify SHA256SUMS.asc SHA256SUMS`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, files []string) error {
			if j.output != "" && len(files) > 1 {
				return exit.UsageError("--output goes with one file; there are %d", len(files))
			}
			if _, ok := keys.Hashes[j.hash]; j.hash != "" && !ok {
				return exit.UsageError("--hash %q is not sha256, sha384 or sha512", j.hash)
			}
			return a.with(func(c *client.Client) error { return a.runOpenPGP(cmd.Context(), c, j, files) })
		},
	}
	c.Flags().StringVar(&j.key, "key", "", "name of the key")
	c.Flags().BoolVar(&j.armor, "armor", false, "ASCII armor")
	c.Flags().BoolVar(&j.clearsign, "clearsign", false, "put text and signature into one file")
	c.Flags().StringVar(&j.output, "output", "", "where to write, for one file; - is standard output")
	c.Flags().StringVar(&j.hash, "hash", "", "sha256, sha384 or sha512 (default: by the key)")
	c.Flags().BoolVar(&j.replace, "force", false, "replace signature files that exist")
	c.MarkFlagsMutuallyExclusive("armor", "clearsign")
	if err := c.MarkFlagRequired("key"); err != nil {
		panic(err) // the flag is defined above
	}
	return c
}

func (a *app) runOpenPGP(ctx context.Context, c *client.Client, j openpgpJob, files []string) error {
	k, err := c.Key(ctx, j.key)
	if err != nil {
		return err
	}
	if k.OpenPGP == nil {
		return exit.Hint(exit.UsageError("key %q has no OpenPGP certificate", k.Name), "make one with: signwarden key create NAME --openpgp-uid ...")
	}
	cert, err := openpgp.ParseCertificate(k.OpenPGP.Certificate)
	if err != nil {
		return fmt.Errorf("certificate of %q: %w", k.Name, err)
	}
	pgpKey, err := cert.SigningKey(k.PublicKey)
	if err != nil {
		return fmt.Errorf("certificate of %q: %w", k.Name, err)
	}
	failed := 0
	var first error
	for _, file := range files {
		err := a.signFile(ctx, c, j, k, pgpKey, file)
		if err == nil {
			continue
		}
		err = fmt.Errorf("%s: %w", file, err)
		if len(files) == 1 {
			return err
		}
		exit.Print(a.err, "signwarden", err)
		failed++
		first = err
	}
	if failed == len(files) {
		return exit.WithCode(fmt.Errorf("none of %d files was signed", failed), exit.Code(first))
	}
	if failed > 0 {
		return exit.WithCode(fmt.Errorf("%d of %d files were not signed", failed, len(files)), exit.SomeOfSeveral)
	}
	return nil
}

func (a *app) signFile(ctx context.Context, c *client.Client, j openpgpJob, k client.Key, pgpKey openpgp.Key, file string) error {
	in, out := a.in, j.output
	if file == "-" {
		if out == "" {
			out = "-"
		}
	} else {
		var err error
		if in, err = openRegular(file); err != nil {
			return err
		}
		defer in.Close()
	}
	if out == "" {
		out = file + ".sig"
		if j.armor || j.clearsign {
			out = file + ".asc"
		}
	}
	o := openpgp.SignOptions{Armor: j.armor, Hash: keys.Hashes[j.hash]}
	signer := c.Signer(ctx, k, "openpgp", client.Claim{File: filepath.Base(file)})
	write := func(w io.Writer) error {
		if j.clearsign {
			return openpgp.ClearSign(w, in, pgpKey, signer, o)
		}
		return openpgp.DetachSign(w, in, pgpKey, signer, o)
	}
	if out == "-" {
		return write(a.out)
	}
	if err := writeWhole(out, j.replace, write); err != nil {
		return err
	}
	a.say("signed %s: %s", file, out)
	return nil
}

// openRegular opens a file to be read to its end.
func openRegular(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("cannot be read: %w", errors.Unwrap(err))
	}
	info, err := f.Stat()
	if err == nil && info.IsDir() {
		err = errors.New("is a directory")
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// writeWhole makes path with what write writes, or not at all. The temporary
// file is made first, so that a directory one cannot write to is found out
// before anything is signed.
func writeWhole(path string, replace bool, write func(io.Writer) error) (err error) {
	if _, err := os.Lstat(path); err == nil && !replace {
		return exit.Hint(fmt.Errorf("%s exists", path), "replace it with --force, or write elsewhere with --output")
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("the signature cannot be written: %w", err)
	}
	defer func() {
		if err != nil {
			tmp.Close()
			os.Remove(tmp.Name())
		}
	}()
	if err := write(tmp); err != nil {
		return err
	}
	if err := tmp.Chmod(0o666 &^ umask()); err != nil {
		return err
	}
	if err := tmp.Sync(); err != nil {
		return fmt.Errorf("the signature cannot be written: %w", err)
	}
	if err := tmp.Close(); err != nil {
		return fmt.Errorf("the signature cannot be written: %w", err)
	}
	return os.Rename(tmp.Name(), path)
}
