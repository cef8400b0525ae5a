package main

import (
	"cmp"
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/formats/openpgp"
	"github.com/signwarden/signwarden/gateway/client"
	"github.com/signwarden/signwarden/gateway/keys"
)

func (a *app) signCommand() *cobra.Command {
	c := &cobra.Command{Use: "sign", Short: "Sign files"}
	c.AddCommand(a.signOpenPGP(), a.signRPM(), a.signKMod(), a.signEFI(), a.signEFIVar(), a.signCMS(), a.signFSVerity(), a.signDMVerity(), a.signAuto())
	return c
}

// target is where signatures go, and what stands in their way.
type target struct {
	output, dir string
	replace     bool
}

func (t *target) flags(c *cobra.Command) {
	c.Flags().StringVar(&t.output, "output", "", "where to write, for one file; - is standard output")
	c.Flags().StringVar(&t.dir, "output-dir", "", "directory to write to")
	c.Flags().BoolVar(&t.replace, "force", false, "replace files that exist")
	c.MarkFlagsMutuallyExclusive("output", "output-dir")
}

// check refuses what cannot be meant.
func (t *target) check(files []string) error {
	if t.output != "" && len(files) > 1 {
		return exit.UsageError("--output goes with one file; there are %d; see --output-dir", len(files))
	}
	if t.dir == "" {
		return nil
	}
	info, err := os.Stat(t.dir)
	if err != nil {
		return fmt.Errorf("--output-dir: %w", err)
	}
	if !info.IsDir() {
		return exit.UsageError("--output-dir %s is no directory", t.dir)
	}
	taken := map[string]string{}
	for _, f := range files {
		name := filepath.Base(f)
		if other, ok := taken[name]; ok {
			return exit.UsageError("%s and %s would both be %s", other, f, filepath.Join(t.dir, name))
		}
		taken[name] = f
	}
	return nil
}

// path is where what is made of file goes: file's own name and suffix, in the
// output directory where there is one.
func (t *target) path(file, suffix string) string {
	switch {
	case t.output != "":
		return t.output
	case t.dir != "":
		return filepath.Join(t.dir, filepath.Base(file)+suffix)
	}
	return file + suffix
}

// openpgpKey is a key as OpenPGP signatures need it.
type openpgpKey struct {
	client.Key
	pgp openpgp.Key
}

// openpgpKey asks the gateway for a key that has an OpenPGP certificate.
func (a *app) openpgpKey(ctx context.Context, c *client.Client, name string) (openpgpKey, error) {
	k, err := c.Key(ctx, name)
	if err != nil {
		return openpgpKey{}, err
	}
	return asOpenPGP(k)
}

// asOpenPGP reads a key's OpenPGP certificate.
func asOpenPGP(k client.Key) (openpgpKey, error) {
	if k.OpenPGP == nil {
		return openpgpKey{}, exit.Hint(exit.UsageError("key %q has no OpenPGP certificate", k.Name), "make one with: signwarden key create NAME --openpgp-uid ...")
	}
	cert, err := openpgp.ParseCertificate(k.OpenPGP.Certificate)
	if err != nil {
		return openpgpKey{}, fmt.Errorf("certificate of %q: %w", k.Name, err)
	}
	pgp, err := cert.SigningKey(k.PublicKey)
	if err != nil {
		return openpgpKey{}, fmt.Errorf("certificate of %q: %w", k.Name, err)
	}
	return openpgpKey{k, pgp}, nil
}

// hashFlag is a --hash flag.
type hashFlag string

func (h *hashFlag) flag(c *cobra.Command) {
	c.Flags().StringVar((*string)(h), "hash", "", "sha256, sha384 or sha512 (default: by the key)")
}

func (h hashFlag) hash() (crypto.Hash, error) {
	if h == "" {
		return 0, nil
	}
	v, ok := keys.Hashes[string(h)]
	if !ok {
		return 0, exit.UsageError("--hash %q is not sha256, sha384 or sha512", string(h))
	}
	return v, nil
}

// openpgpJob is one call of sign openpgp.
type openpgpJob struct {
	bulk
	target
	key              string
	hash             hashFlag
	armor, clearsign bool
}

func (a *app) signOpenPGP() *cobra.Command {
	j := openpgpJob{bulk: bulk{a: a}}
	c := &cobra.Command{
		Use:   "openpgp --key NAME [--armor | --clearsign] FILE...",
		Short: "Make OpenPGP signatures, detached or clear",
		Long: `openpgp signs each FILE: FILE.sig is a detached signature, with --armor FILE.asc,
and with --clearsign FILE.asc holds the text and its signature. Files are hashed
here, in constant memory; only the digest is sent. A FILE of - is standard input,
signed to standard output; a text from there is kept in a temporary file until it
is clear-signed.

A signature file that exists is left alone unless --force is given. An error with
one file does not stop the others; then the exit code is 6.`,
		Example: `  signwarden sign openpgp --key release --armor SHA256SUMS
  gpg --verify SHA256SUMS.asc SHA256SUMS`,
		RunE: func(cmd *cobra.Command, args []string) error { return j.sign(cmd.Context(), args) },
	}
	c.Flags().StringVar(&j.key, "key", "", "name of the key")
	c.Flags().BoolVar(&j.armor, "armor", false, "ASCII armor")
	c.Flags().BoolVar(&j.clearsign, "clearsign", false, "put text and signature into one file")
	j.hash.flag(c)
	j.target.flags(c)
	j.bulk.flags(c)
	c.MarkFlagsMutuallyExclusive("armor", "clearsign")
	exit.Require(c, "key")
	return c
}

func (j *openpgpJob) sign(ctx context.Context, args []string) error {
	hash, err := j.hash.hash()
	if err != nil {
		return err
	}
	isSignature := func(path string) bool {
		return filepath.Ext(path) == ".sig" || filepath.Ext(path) == ".asc"
	}
	files, err := j.list(args, func(path string) bool { return !isSignature(path) })
	if err != nil {
		return err
	}
	if err := j.check(files); err != nil {
		return err
	}
	if j.resume != "" && (j.output == "-" || slices.Contains(files, "-")) {
		return exit.UsageError("--resume goes with files, not with - for standard input or output")
	}
	return j.a.with(func(c *client.Client) error {
		k, err := j.a.openpgpKey(ctx, c, j.key)
		if err != nil {
			return err
		}
		return j.run(ctx, files, func(ctx context.Context, file string) (string, error) {
			signer := waiting{c.Signer(ctx, k.Key, "openpgp", client.Claim{File: filepath.Base(file)}), &j.bulk}
			return j.signFile(ctx, k.pgp, signer, file, openpgp.SignOptions{Armor: j.armor, Hash: hash})
		})
	})
}

// signFile makes one signature and returns where it is.
func (j *openpgpJob) signFile(ctx context.Context, key openpgp.Key, signer crypto.Signer, file string, o openpgp.SignOptions) (string, error) {
	suffix := ".sig"
	if j.armor || j.clearsign {
		suffix = ".asc"
	}
	in, out := j.a.in, j.target.path(file, suffix)
	if file == "-" {
		out = cmp.Or(j.output, "-")
	} else {
		var err error
		if in, err = openInput(file); err != nil {
			return "", err
		}
		defer in.Close()
	}
	write := func(w io.Writer) error {
		if j.clearsign {
			text, done, err := twice(untilDone{ctx, in})
			if err != nil {
				return err
			}
			defer done()
			return openpgp.ClearSign(w, text, key, signer, o)
		}
		return openpgp.DetachSign(w, untilDone{ctx, in}, key, signer, o)
	}
	if out == "-" {
		return out, write(j.a.out)
	}
	return out, writeWhole(out, j.replace, write)
}

// twice returns a reader of what is left of a file that can be read again: what
// comes through a pipe is put into a temporary file, which is gone with done.
func twice(in untilDone) (r io.ReadSeeker, done func(), err error) {
	at, err := in.f.Seek(0, io.SeekCurrent)
	if err == nil {
		return io.NewSectionReader(in, at, math.MaxInt64-at), func() {}, nil
	}
	tmp, err := os.CreateTemp("", "signwarden-*")
	if err != nil {
		return nil, nil, fmt.Errorf("the text cannot be kept: %w", err)
	}
	os.Remove(tmp.Name())
	if _, err := io.Copy(tmp, in); err != nil {
		tmp.Close()
		return nil, nil, err
	}
	if _, err := tmp.Seek(0, io.SeekStart); err != nil {
		tmp.Close()
		return nil, nil, err
	}
	return tmp, func() { tmp.Close() }, nil
}

// openInput opens what is to be read to its end: a file, pipe or device.
func openInput(path string) (*os.File, error) {
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
// before anything is signed. A device or pipe is written to, not replaced.
func writeWhole(path string, replace bool, write func(io.Writer) error) (err error) {
	info, err := os.Lstat(path)
	if err == nil && !replace {
		return exit.Hint(fmt.Errorf("%s exists", path), "replace it with --force, or write elsewhere with --output")
	}
	if err == nil && info.Mode()&(os.ModeDevice|os.ModeNamedPipe) != 0 {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return fmt.Errorf("the signature cannot be written: %w", err)
		}
		return errors.Join(write(f), f.Close())
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
	if replace {
		return os.Rename(tmp.Name(), path)
	}
	// Not a rename: what somebody else has made there meanwhile is not ours to replace.
	if err := os.Link(tmp.Name(), path); err != nil {
		return fmt.Errorf("the signature cannot be written: %w", err)
	}
	return os.Remove(tmp.Name())
}
