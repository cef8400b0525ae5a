package main

import (
	"context"
	"crypto"
	"encoding/hex"
	"io"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/formats/dmverity"
	"github.com/signwarden/signwarden/formats/fsverity"
	"github.com/signwarden/signwarden/gateway/client"
)

// Suffixes of detached signatures. fs-verity's tools have none of their own.
const (
	fsveritySuffix = ".fsv-sig"
	dmveritySuffix = ".p7s" // what systemd looks for beside NAME.roothash
)

// treeFlags are the flags that say how the tree over a file is built.
type treeFlags struct {
	hash, salt string
	blockSize  int
}

func (f *treeFlags) flags(c *cobra.Command) {
	if have := c.Flags().Lookup("hash"); have != nil {
		have.Usage, have.DefValue = "sha256 or sha512, of the tree", "sha256"
	} else {
		c.Flags().StringVar(&f.hash, "hash", "sha256", "sha256 or sha512, of the tree")
	}
	c.Flags().IntVar(&f.blockSize, "block-size", fsverity.DefaultBlockSize, "of the tree, in bytes")
	c.Flags().StringVar(&f.salt, "salt", "", "of the tree, in hexadecimal digits; at most 32 bytes")
}

func (f *treeFlags) parameters() (fsverity.Parameters, error) {
	h, err := hashFlag(f.hash).hash()
	if err != nil {
		return fsverity.Parameters{}, err
	}
	salt, err := hex.DecodeString(f.salt)
	if err != nil {
		return fsverity.Parameters{}, exit.UsageError("--salt %q is not hexadecimal", f.salt)
	}
	p := fsverity.Parameters{Hash: h, BlockSize: f.blockSize, Salt: salt}
	if f.blockSize == 0 { // fsverity's zero value means the default; here it is a mistake
		p.BlockSize = -1
	}
	if err := p.Check(); err != nil {
		return p, exit.UsageError("%w", err)
	}
	return p, nil
}

func (a *app) signFSVerity() *cobra.Command {
	j := &x509Job{bulk: bulk{a: a}, format: "cms", suffix: fsveritySuffix}
	var tree treeFlags
	var p fsverity.Parameters
	c := j.command("fsverity --key NAME FILE...", "Sign files for fs-verity",
		`fsverity makes FILE`+fsveritySuffix+`, as fsverity sign does: a CMS signature of the digest of FILE's
Merkle tree, which the kernel checks with the keys of its .fs-verity keyring when
fsverity enable --signature has been given it. The tree's hash, block size and salt
must be the same there. The digest is computed here, in constant memory.`,
		func(path string) bool { return filepath.Ext(path) != fsveritySuffix },
		func(s signing) error {
			der, err := fsverity.Sign(s.in, s.signer, s.key.X509[0], p)
			if err != nil {
				return err
			}
			_, err = s.w.Write(der)
			return err
		})
	c.Example = `  signwarden sign fsverity --key files app.bin
  fsverity enable app.bin --signature=app.bin` + fsveritySuffix
	tree.flags(c)
	sign := c.RunE
	c.RunE = func(cmd *cobra.Command, args []string) (err error) {
		tree.hash = string(j.hash)
		if p, err = tree.parameters(); err != nil {
			return err
		}
		return sign(cmd, args)
	}
	return c
}

func (a *app) signDMVerity() *cobra.Command {
	j := &x509Job{bulk: bulk{a: a}, format: "cms", suffix: dmveritySuffix}
	c := j.command("dmverity --key NAME FILE...", "Sign root hashes of dm-verity devices",
		`dmverity makes FILE`+dmveritySuffix+` of a FILE with a root hash in it, as veritysetup format
--root-hash-file writes it, or with --root-hash the file that --output names: a
detached CMS signature of the hash's digits. The kernel checks it with the keys of
its keyrings (veritysetup open --root-hash-signature), and systemd takes it as
NAME.roothash.p7s or in a partition of verity signatures.`,
		func(path string) bool { return filepath.Ext(path) == ".roothash" },
		func(s signing) error {
			text, err := readRootHash(s.in)
			if err != nil {
				return err
			}
			return j.rootHash(text, s)
		})
	c.Example = `  veritysetup format --root-hash-file disk.roothash disk.img disk.verity
  signwarden sign dmverity --key images disk.roothash`
	var text string
	c.Flags().StringVar(&text, "root-hash", "", "the root hash itself, in place of a FILE")
	sign := c.RunE
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if !cmd.Flags().Changed("root-hash") {
			return sign(cmd, args)
		}
		return j.signRootHash(cmd.Context(), text, args)
	}
	return c
}

func readRootHash(r io.Reader) (string, error) {
	b, err := io.ReadAll(io.LimitReader(r, dmverity.MaxFile+1))
	if err != nil {
		return "", err
	}
	return dmverity.ParseRootHash(b)
}

// rootHash signs one root hash.
func (j *x509Job) rootHash(text string, s signing) error {
	der, err := dmverity.Sign(text, s.signer, s.key.X509[0], j.h)
	if err != nil {
		return err
	}
	_, err = s.w.Write(der)
	return err
}

// signRootHash signs a root hash of the command line.
func (j *x509Job) signRootHash(ctx context.Context, text string, args []string) error {
	if len(args) > 0 || j.files0 != "" || j.resume != "" || j.output == "" {
		return exit.UsageError("--root-hash goes with --output, and with no files")
	}
	text, err := dmverity.ParseRootHash([]byte(text))
	if err != nil {
		return exit.UsageError("--root-hash: %w", err)
	}
	return j.signAll(ctx, []string{text}, func(ctx context.Context, c *client.Client, k client.Key, _ string) (string, error) {
		var signer crypto.Signer = waiting{c.Signer(ctx, k, j.format, client.Claim{Note: "root hash " + text}), &j.bulk}
		write := func(w io.Writer) error { return j.rootHash(text, signing{w: w, key: k, signer: signer}) }
		if j.output == "-" {
			return j.output, write(j.a.out)
		}
		return j.output, writeWhole(j.output, j.replace, write)
	})
}
