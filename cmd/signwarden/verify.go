package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/formats/cms"
	"github.com/signwarden/signwarden/formats/dmverity"
	"github.com/signwarden/signwarden/formats/efivar"
	"github.com/signwarden/signwarden/formats/fsverity"
	"github.com/signwarden/signwarden/formats/kmod"
	"github.com/signwarden/signwarden/formats/openpgp"
	"github.com/signwarden/signwarden/formats/pe"
	"github.com/signwarden/signwarden/formats/rpm"
	"github.com/signwarden/signwarden/gateway/client"
)

// verifyJob is one call of a verify command.
type verifyJob struct {
	a              *app
	key, cert      string
	signature      string // of a detached one; empty: beside the file
	noPayloadCheck bool
	variable       efivar.Variable
	attributes     uint32 // of variable
	tree           fsverity.Parameters
	ready          func() error // reads the flags that only this command has; nil: none

	pgp     *openpgp.Certificate
	trusted []*x509.Certificate
}

// verified is what was found good; its JSON form is printed.
type verified struct {
	File string `json:"file"`
	By   string `json:"by"` // fingerprint or subject
}

func (a *app) verifyCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "verify",
		Short: "Verify signatures",
		Long: `verify checks signatures with the certificate of a key (--key, from the gateway) or
of a file (--cert, without one). Exit code 3: a signature does not verify, or there
is none.`,
	}
	for _, v := range []struct {
		use, short string
		openpgp    bool
		check      func(j *verifyJob, f untilDone, size int64) (by string, err error)
		flags      func(j *verifyJob, c *cobra.Command)
	}{
		{"openpgp FILE...", "Verify OpenPGP signatures: FILE.sig, FILE.asc, or in a clear-signed FILE", true, (*verifyJob).checkOpenPGP, (*verifyJob).signatureFlag},
		{"rpm FILE...", "Verify RPM packages", true, (*verifyJob).checkRPM, func(j *verifyJob, c *cobra.Command) {
			c.Flags().BoolVar(&j.noPayloadCheck, "no-payload-check", false, "leave the payload unread")
		}},
		{"kmod FILE...", "Verify kernel modules", false, (*verifyJob).checkKMod, nil},
		{"efi FILE...", "Verify EFI images: one good signature is enough", false, (*verifyJob).checkEFI, nil},
		{"efivar --variable NAME FILE...", "Verify updates of EFI variables", false, (*verifyJob).checkEFIVar, (*verifyJob).variableFlags},
		{"cms FILE...", "Verify detached CMS signatures: FILE.p7s", false, (*verifyJob).checkCMS, (*verifyJob).signatureFlag},
		{"fsverity FILE...", "Verify signatures for fs-verity: FILE" + fsveritySuffix, false, (*verifyJob).checkFSVerity, (*verifyJob).treeFlags},
		{"dmverity FILE...", "Verify signatures of root hashes: FILE" + dmveritySuffix, false, (*verifyJob).checkDMVerity, (*verifyJob).signatureFlag},
	} {
		j := &verifyJob{a: a}
		sub := &cobra.Command{
			Use: v.use, Short: v.short, Args: cobra.MinimumNArgs(1),
			RunE: func(cmd *cobra.Command, files []string) error {
				if j.signature != "" && len(files) > 1 {
					return exit.UsageError("--signature goes with one file; there are %d", len(files))
				}
				if j.ready != nil {
					if err := j.ready(); err != nil {
						return err
					}
				}
				if err := j.load(cmd.Context(), v.openpgp); err != nil {
					return err
				}
				return j.run(cmd.Context(), files, v.check)
			},
		}
		sub.Flags().StringVar(&j.key, "key", "", "name of the key whose certificate is asked from the gateway")
		sub.Flags().StringVar(&j.cert, "cert", "", "file with the certificate (OpenPGP), or certificates (PEM)")
		sub.MarkFlagsOneRequired("key", "cert")
		sub.MarkFlagsMutuallyExclusive("key", "cert")
		if v.flags != nil {
			v.flags(j, sub)
		}
		c.AddCommand(sub)
	}
	return c
}

func (j *verifyJob) signatureFlag(c *cobra.Command) {
	c.Flags().StringVar(&j.signature, "signature", "", "the signature, where it is not beside the file")
}

// load gets the certificate, from the gateway or from a file.
func (j *verifyJob) load(ctx context.Context, pgp bool) error {
	var text []byte
	if j.cert != "" {
		var err error
		if text, err = j.a.readFile(j.cert, openpgp.MaxCertificate); err != nil {
			return err
		}
	} else {
		err := j.a.with(func(c *client.Client) error {
			k, err := c.Key(ctx, j.key)
			if err != nil {
				return err
			}
			format := "x509"
			if pgp {
				format = "openpgp"
			}
			k.X509 = k.X509[:min(1, len(k.X509))] // not its issuers: others have certificates of theirs
			text, err = export(k, format)
			return err
		})
		if err != nil {
			return err
		}
	}
	if pgp {
		var err error
		j.pgp, err = openpgp.ParseCertificate(text)
		return err
	}
	for {
		block, rest := pem.Decode(text)
		if block == nil {
			break
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return err
		}
		j.trusted, text = append(j.trusted, cert), rest
	}
	if len(j.trusted) == 0 {
		return exit.UsageError("%s holds no PEM certificate", j.cert)
	}
	return nil
}

// run checks every file, and goes on after a bad one.
func (j *verifyJob) run(ctx context.Context, files []string, check func(*verifyJob, untilDone, int64) (string, error)) error {
	var good []verified
	code := exit.OK
	for _, file := range files {
		by, err := j.one(ctx, file, check)
		if err != nil {
			exit.Print(j.a.err, "signwarden", exit.OneLine(fmt.Errorf("%s: %w", file, err)))
			code = max(code, exit.Code(err))
			continue
		}
		good = append(good, verified{file, by})
	}
	err := j.a.print(good, func(w io.Writer) {
		for _, v := range good {
			fmt.Fprintf(w, "%s: good signature by %s\n", exit.Line(v.File), exit.Line(v.By))
		}
	})
	if err == nil && code != exit.OK {
		err = silent(code) // it has been told
	}
	return err
}

func (j *verifyJob) one(ctx context.Context, file string, check func(*verifyJob, untilDone, int64) (string, error)) (string, error) {
	f, err := openInput(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	by, err := check(j, untilDone{ctx, f}, info.Size())
	if err != nil && ctx.Err() == nil {
		err = exit.WithCode(err, exit.NotVerified)
	}
	return by, err
}

// beside opens the detached signature of a file.
func (j *verifyJob) beside(file string, suffixes ...string) (*os.File, error) {
	if j.signature != "" {
		return openInput(j.signature)
	}
	for _, s := range suffixes {
		f, err := os.Open(file + s)
		if !errors.Is(err, os.ErrNotExist) {
			return f, err
		}
	}
	return nil, exit.Hint(fmt.Errorf("there is no signature beside it (%q)", suffixes), "name it with --signature")
}

// message reads the detached CMS signature of a file.
func (j *verifyJob) message(file, suffix string) ([]byte, error) {
	sig, err := j.beside(file, suffix)
	if err != nil {
		return nil, err
	}
	defer sig.Close()
	return io.ReadAll(io.LimitReader(sig, cms.MaxSize+1))
}

func (j *verifyJob) checkOpenPGP(f untilDone, size int64) (string, error) {
	head := make([]byte, len(clearHead))
	if n, err := f.ReadAt(head, 0); err == nil && bytes.Equal(head[:n], []byte(clearHead)) && j.signature == "" {
		info, err := openpgp.VerifyClear(j.pgp, io.NewSectionReader(f, 0, size), nil)
		return info.Signer.String(), err
	}
	sig, err := j.beside(f.f.Name(), ".sig", ".asc")
	if err != nil {
		return "", err
	}
	defer sig.Close()
	info, err := openpgp.VerifyDetached(j.pgp, f, sig)
	return info.Signer.String(), err
}

// clearHead begins a clear-signed text (RFC 9580 section 7).
const clearHead = "-----BEGIN PGP SIGNED MESSAGE-----"

func (j *verifyJob) checkRPM(f untilDone, size int64) (string, error) {
	p, err := rpm.ReadPackage(f, size)
	if err != nil {
		return "", err
	}
	good, err := p.Verify(j.pgp, !j.noPayloadCheck)
	if err != nil {
		return "", err
	}
	return good[0].Info.Signer.String(), nil
}

func subjects(signers []cms.Signer, err error) (string, error) {
	if err != nil || len(signers) == 0 {
		return "", err
	}
	return signers[0].Certificate.Subject.String(), nil
}

func (j *verifyJob) checkKMod(f untilDone, size int64) (string, error) {
	return subjects(kmod.Verify(f, size, j.trusted))
}

func (j *verifyJob) checkEFI(f untilDone, size int64) (string, error) {
	m, err := pe.Parse(f, size)
	if err != nil {
		return "", err
	}
	all, err := m.Verify(j.trusted)
	if err != nil {
		return "", err
	}
	for _, s := range all {
		if s.Err == nil {
			return subjects(s.Signers, nil)
		}
	}
	return "", pe.ErrNotSigned
}

// variableFlags has the variable named that an update is of, which the file does
// not do.
func (j *verifyJob) variableFlags(c *cobra.Command) {
	var name, vendor string
	var add bool
	c.Flags().StringVar(&name, "variable", "", "PK, KEK, db, dbx, or with --vendor any other")
	c.Flags().StringVar(&vendor, "vendor", "", "GUID of the variable's vendor (default: that of PK, KEK, db or dbx)")
	c.Flags().BoolVar(&add, "append", false, "the update adds to what the variable holds")
	exit.Require(c, "variable")
	j.ready = func() error {
		v, ok := efivar.Lookup(name)
		if !ok && vendor == "" {
			return exit.UsageError("--variable %q is not PK, KEK, db or dbx; name the --vendor of any other", name)
		}
		if vendor != "" {
			guid, err := efivar.ParseGUID(vendor)
			if err != nil {
				return exit.UsageError("--vendor %q is no GUID", vendor)
			}
			v = efivar.Variable{Name: name, Vendor: guid}
		}
		j.variable, j.attributes = v, efivar.Replacing
		if add {
			j.attributes = efivar.Appending
		}
		return nil
	}
}

func (j *verifyJob) checkEFIVar(f untilDone, _ int64) (string, error) {
	b, err := io.ReadAll(io.LimitReader(f, efivar.MaxUpdate+1))
	if err != nil {
		return "", err
	}
	u, err := efivar.Parse(b)
	if err != nil {
		return "", err
	}
	who, err := subjects(u.Verify(j.variable, j.attributes, j.trusted))
	if errors.Is(err, cms.ErrBadSignature) {
		err = exit.Hint(err, "it may be of another --variable or --vendor, or with or without --append")
	}
	return who, err
}

func (j *verifyJob) checkCMS(f untilDone, _ int64) (string, error) {
	der, err := j.message(f.f.Name(), ".p7s")
	if err != nil {
		return "", err
	}
	if block, _ := pem.Decode(der); block != nil {
		der = block.Bytes
	}
	s, err := cms.Parse(der)
	if err != nil {
		return "", err
	}
	return subjects(s.Verify(func(h crypto.Hash) ([]byte, error) {
		digest := h.New()
		if _, err := f.f.Seek(0, io.SeekStart); err != nil {
			return nil, err
		}
		_, err := io.Copy(digest, f)
		return digest.Sum(nil), err
	}, j.trusted))
}

func (j *verifyJob) treeFlags(c *cobra.Command) {
	var tree treeFlags
	tree.flags(c)
	j.signatureFlag(c)
	j.ready = func() (err error) {
		j.tree, err = tree.parameters()
		return err
	}
}

func (j *verifyJob) checkFSVerity(f untilDone, _ int64) (string, error) {
	sig, err := j.message(f.f.Name(), fsveritySuffix)
	if err != nil {
		return "", err
	}
	who, err := subjects(fsverity.Verify(f, sig, j.trusted, j.tree))
	if errors.Is(err, cms.ErrBadSignature) {
		err = exit.Hint(err, "it may be of another --hash, --block-size or --salt")
	}
	return who, err
}

func (j *verifyJob) checkDMVerity(f untilDone, _ int64) (string, error) {
	sig, err := j.message(f.f.Name(), dmveritySuffix)
	if err != nil {
		return "", err
	}
	text, err := readRootHash(f)
	if err != nil {
		return "", err
	}
	return subjects(dmverity.Verify(text, sig, j.trusted))
}
