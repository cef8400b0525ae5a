package main

import (
	"cmp"
	"context"
	"crypto"
	"crypto/rsa"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/formats/rpm"
	"github.com/signwarden/signwarden/gateway/client"
)

// rpmJob is one call of sign rpm.
type rpmJob struct {
	bulk
	target
	key, ima string
	hash     hashFlag
	options  rpm.Options
	file     rpm.FileOptions
	headers  *budget
	undo     *rpm.Journal
}

// headerMemory is what the headers of all packages under way may take, in bytes:
// usually some hundred kilobytes for each, of some packages many megabytes. One
// that needs more is alone.
const headerMemory = 24 << 20

// imaMemory is how much more it is with signatures of the files.
const imaMemory = 12

func (a *app) signRPM() *cobra.Command {
	j := rpmJob{bulk: bulk{a: a}, headers: newBudget(headerMemory), undo: rpm.NewJournal()}
	c := &cobra.Command{
		Use:   "rpm --key NAME FILE...",
		Short: "Sign RPM packages, in place",
		Long: `rpm signs packages as rpmsign --resign does, but sends only digests (or the headers
of packages, where a rule of the gateway decides on them) and writes only what
changes: the signature header, in place. Signatures that were there are
replaced. A package is checked against its own digests first, its payload too
unless --no-payload-check is given.

A kill or power cut at any point leaves the old or the new package, at the latest
when a package of that directory is signed again: what is overwritten is first kept
beside it, in .signwarden-undo or .NAME.signwarden-undo.

An error with one file does not stop the others; then the exit code is 6. SIGINT
begins no more files and lets those under way finish.`,
		Example: `  signwarden sign rpm --key release --resume journal -r RPMS/
  signwarden sign rpm --key release --output-dir signed/ *.rpm`,
		RunE: func(cmd *cobra.Command, args []string) error { return j.sign(cmd.Context(), args) },
	}
	c.Flags().StringVar(&j.key, "key", "", "name of the key")
	c.Flags().BoolVar(&j.options.NoPayloadCheck, "no-payload-check", false, "leave the payload unread")
	c.Flags().BoolVar(&j.options.Payload, "rpmv3", false, "sign header and payload too, for rpm before 4.14")
	c.Flags().StringVar(&j.ima, "ima", "", "name of an RSA key for IMA signatures of the files in the package")
	c.Flags().BoolVar(&j.file.FollowLinks, "follow-symlinks", false, "sign the file that a symbolic link leads to")
	c.Flags().BoolVar(&j.file.HardLinks, "hard-links", false, "sign a file that has other names; in place all of them change")
	j.hash.flag(c)
	j.target.flags(c)
	j.bulk.flags(c)
	exit.Require(c, "key")
	return c
}

func (j *rpmJob) sign(ctx context.Context, args []string) error {
	var err error
	if j.options.Hash, err = j.hash.hash(); err != nil {
		return err
	}
	if j.output == "-" {
		return exit.UsageError("--output: a package is written to a file")
	}
	files, err := j.list(args, func(path string) bool { return filepath.Ext(path) == ".rpm" })
	if err != nil {
		return err
	}
	if err := j.check(files); err != nil {
		return err
	}
	return j.a.with(func(c *client.Client) error {
		k, err := j.a.openpgpKey(ctx, c, j.key)
		if err != nil {
			return err
		}
		var ima client.Key
		if j.ima != "" {
			if ima, err = c.Key(ctx, j.ima); err != nil {
				return err
			}
			var ok bool
			if j.options.Files, ok = ima.PublicKey.(*rsa.PublicKey); !ok {
				return exit.UsageError("--ima: key %q is %s; IMA signatures are made with an RSA key", ima.Name, ima.Algorithm)
			}
		}
		err = j.run(ctx, files, func(ctx context.Context, file string) (string, error) {
			return j.signFile(ctx, &j.bulk, file, k, func(nevra string, list []rpm.Request) ([][]byte, error) {
				claim := client.Claim{File: filepath.Base(file), NEVRA: nevra}
				return j.bulk.answers(list, packageSigner(ctx, c, k.Key, claim), c.Signer(ctx, ima, "ima", claim))
			})
		})
		return cmp.Or(err, j.undo.Close())
	})
}

// packageSigner signs packages: where the gateway wants to read what it signs it is
// a crypto.MessageSigner, which is shown their headers. rpm.Signing.Finish verifies
// what it answers.
func packageSigner(ctx context.Context, c *client.Client, k client.Key, claim client.Claim) crypto.Signer {
	if slices.Contains(k.Reads, "rpm") {
		return client.MessageSigner{Signer: c.Signer(ctx, k, "rpm", claim).Unverified()}
	}
	return c.Signer(ctx, k, "rpm", claim).Unverified()
}

// answers has the requests of one package signed: by pkg, those of its files by ima.
func (b *bulk) answers(list []rpm.Request, pkg, ima crypto.Signer) ([][]byte, error) {
	raw := make([][]byte, len(list))
	return raw, b.each(len(list), func(i int) (err error) {
		by := pkg
		if list[i].File >= 0 {
			by = ima
		}
		raw[i], err = list[i].Answer(by)
		return err
	})
}

// signRequests has the requests of one package signed, and returns the answers in
// their order.
type signRequests func(nevra string, list []rpm.Request) ([][]byte, error)

// signFile signs one package and returns where it is.
func (j *rpmJob) signFile(ctx context.Context, b *bulk, file string, k openpgpKey, sign signRequests) (string, error) {
	if _, err := j.undo.Recover(file, j.file); err != nil {
		return "", rpmHint(err)
	}
	f, err := openInput(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	in := untilDone{ctx, f}
	need, err := rpm.Memory(in, info.Size())
	if err != nil {
		return "", err
	}
	if j.options.Files != nil {
		need *= imaMemory
	}
	release := b.memory(j.headers, need)
	defer release()
	update, err := j.prepare(in, info.Size(), k, sign)
	if err != nil {
		return "", err
	}
	out := j.target.path(file, "")
	if out == file {
		return out, rpmHint(j.undo.ApplyInPlace(file, update, j.file))
	}
	switch info, err := os.Lstat(out); {
	case err != nil: // none, or it is told when it is written
	case info.Mode()&os.ModeType&^os.ModeSymlink != 0:
		return "", fmt.Errorf("%s is no regular file", out)
	case !j.replace:
		return "", exit.Hint(fmt.Errorf("%s exists", out), "replace it with --force")
	}
	return out, rpmHint(rpm.Rewrite(file, out, update, j.file))
}

// prepare reads a package and has it signed; the file is not changed.
func (j *rpmJob) prepare(in untilDone, size int64, k openpgpKey, sign signRequests) (*rpm.Update, error) {
	p, err := rpm.ReadPackage(in, size)
	if err != nil {
		return nil, err
	}
	s, err := rpm.Prepare(p, k.pgp, j.options)
	if err != nil {
		return nil, rpmHint(err)
	}
	raw, err := sign(p.Header.NEVRA.String(), s.Requests())
	if err != nil {
		return nil, fmt.Errorf("signing %s: %w", p.Header.NEVRA, err)
	}
	return s.Finish(raw)
}

// rpmHint says what to do about an error of package rpm.
func rpmHint(err error) error {
	switch {
	case errors.Is(err, rpm.ErrLink):
		return exit.Hint(err, "--follow-symlinks or --hard-links signs it all the same")
	case errors.Is(err, rpm.ErrDigest):
		return exit.Hint(err, "it is damaged or still being written; nothing was signed")
	case errors.Is(err, rpm.ErrLocked):
		return exit.Hint(err, "wait for the other run")
	}
	return err
}
