package main

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/formats/cms"
	"github.com/signwarden/signwarden/formats/efivar"
	"github.com/signwarden/signwarden/formats/kmod"
	"github.com/signwarden/signwarden/formats/pe"
	"github.com/signwarden/signwarden/gateway/client"
)

// x509Job is one call of a command that signs with a key's X.509 certificate.
type x509Job struct {
	bulk
	target
	key, format string // of the policy
	hash        hashFlag
	h           crypto.Hash
	keep        bool // a signature that a module has
	alone       bool // take the other signatures of an image off
	skid        bool
	pem         bool
	suffix      string // of a detached signature; empty: the file carries it

	packers chan struct{} // a place for each packed module under way
}

// signing is one file on its way: in is read, the result goes to w.
type signing struct {
	in     untilDone
	size   int64
	w      io.Writer
	key    client.Key
	signer crypto.Signer
}

func (a *app) signKMod() *cobra.Command {
	j := &x509Job{bulk: bulk{a: a}, format: "kmod", packers: packers()}
	c := j.command("kmod --key NAME FILE...", "Sign kernel modules, in place",
		`kmod signs kernel modules as the kernel's scripts/sign-file does, byte for byte. Those
compressed with xz, zstd or gzip are unpacked, signed and packed again. A signature
that is there is replaced, or with --refuse-signed the module is left alone.

The kernel looks the certificate up by issuer and serial number (with --skid, by
key identifier): enrol the one that signwarden key export NAME --format x509 prints.`,
		isModule, j.module)
	c.Flags().BoolVar(&j.keep, "refuse-signed", false, "fail with a module that is signed")
	c.Flags().BoolVar(&j.skid, "skid", false, "name the certificate by its key identifier (sign-file -k)")
	return c
}

func (a *app) signEFI() *cobra.Command {
	j := &x509Job{bulk: bulk{a: a}, format: "authenticode"}
	c := j.command("efi --key NAME FILE...", "Sign EFI images, in place",
		`efi puts an Authenticode signature into EFI images (PE files), as sbsign and pesign do,
with the key's certificate and those that issued it. Other signatures stay, unless
--replace is given. An image whose layout tools would hash differently is refused.`,
		func(path string) bool { return filepath.Ext(path) == ".efi" },
		j.image)
	c.Flags().BoolVar(&j.alone, "replace", false, "take all other signatures off")
	return c
}

func (a *app) signCMS() *cobra.Command {
	j := &x509Job{bulk: bulk{a: a}, format: "cms", suffix: ".p7s"}
	c := j.command("cms --key NAME FILE...", "Make detached CMS signatures",
		`cms makes FILE.p7s, a detached CMS signature (RFC 5652, DER; with --pem PEM) with
signed attributes and the key's certificate chain.`,
		func(path string) bool { return filepath.Ext(path) != ".p7s" },
		j.detached)
	c.Example = `  signwarden sign cms --key images disk.img
  openssl cms -verify -binary -inform DER -in disk.img.p7s -content disk.img -CAfile cert.pem -purpose any -out /dev/null`
	c.Flags().BoolVar(&j.pem, "pem", false, "write PEM")
	return c
}

// maxVariable bounds the contents of an EFI variable, in bytes: firmware keeps
// some tens of kilobytes.
const maxVariable = 1 << 20

func (a *app) signEFIVar() *cobra.Command {
	j := &x509Job{bulk: bulk{a: a}, format: "efi-variable", suffix: ".auth"}
	var name string
	var add bool
	c := j.command("efivar --key NAME --variable PK|KEK|db|dbx FILE...", "Sign updates of EFI variables",
		`efivar makes FILE.auth, an authenticated update that sets a Secure Boot variable to the
signature lists in FILE (EFI_SIGNATURE_LIST, as cert-to-efi-sig-list makes them), or
with --append adds them to it. An empty FILE makes an update that deletes the variable.`,
		func(path string) bool { return filepath.Ext(path) == ".esl" },
		func(s signing) error {
			v, ok := efivar.Lookup(name)
			if !ok {
				return exit.UsageError("--variable %q is not PK, KEK, db or dbx", name)
			}
			data, err := io.ReadAll(io.LimitReader(s.in, maxVariable+1))
			if err != nil {
				return err
			}
			if len(data) > maxVariable {
				return fmt.Errorf("has over %d bytes", maxVariable)
			}
			if _, err := efivar.ParseLists(data); err != nil {
				return err
			}
			o := efivar.Options{Certificate: s.key.X509[0], Chain: s.key.X509[1:], Hash: j.h, Time: time.Now().UTC().Truncate(time.Second)}
			if add {
				o.Attributes = efivar.Appending
			}
			out, err := efivar.Sign(s.signer, v, data, o)
			if err != nil {
				return err
			}
			_, err = s.w.Write(out)
			return err
		})
	c.Example = `  cert-to-efi-sig-list -g "$(uuidgen)" db.pem db.esl
  signwarden sign efivar --key kek --variable db db.esl`
	c.Flags().StringVar(&name, "variable", "", "PK, KEK, db or dbx")
	c.Flags().BoolVar(&add, "append", false, "add to what the variable holds")
	exit.Require(c, "variable")
	return c
}

// isModule goes by the name: a directory of modules holds other files too.
func isModule(path string) bool {
	name := strings.TrimSuffix(strings.TrimSuffix(strings.TrimSuffix(path, ".xz"), ".zst"), ".gz")
	return filepath.Ext(name) == ".ko"
}

// packers bounds how many modules are unpacked and packed at a time: each takes
// some ten megabytes for that, and a processor.
func packers() chan struct{} { return make(chan struct{}, runtime.NumCPU()) }

func (j *x509Job) module(s signing) error {
	c, err := kmod.CompressionOf(s.in, s.size)
	if err != nil {
		return err
	}
	if c != kmod.Plain {
		j.packers <- struct{}{}
		defer func() { <-j.packers }()
		s.signer = lending{s.signer, j.packers}
	}
	return kmod.Sign(s.w, s.in, s.size, s.signer, kmod.Options{Certificate: s.key.X509[0], Hash: j.h, SubjectKeyID: j.skid, Replace: !j.keep})
}

func (j *x509Job) image(s signing) error {
	m, err := pe.Parse(s.in, s.size)
	if err != nil {
		return err
	}
	return m.Sign(s.w, s.signer, pe.Options{Certificate: s.key.X509[0], Chain: s.key.X509[1:], Hash: j.h, SigningTime: time.Now(), Replace: j.alone})
}

// lending is a signer whose caller gives a place away while it signs.
type lending struct {
	crypto.Signer
	place chan struct{}
}

func (l lending) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	<-l.place
	defer func() { l.place <- struct{}{} }()
	return l.Signer.Sign(rand, digest, opts)
}

// command builds the command; sign makes what is written of one file.
func (j *x509Job) command(use, short, long string, keep func(string) bool, sign func(signing) error) *cobra.Command {
	c := &cobra.Command{
		Use: use, Short: short,
		Long: long + `

The key needs an X.509 certificate: signwarden key cert. Files are hashed here; only
the digest is sent. An error with one file does not stop the others; then the exit
code is 6.`,
		RunE: func(cmd *cobra.Command, args []string) error { return j.sign(cmd.Context(), args, keep, sign) },
	}
	c.Flags().StringVar(&j.key, "key", "", "name of the key")
	j.hash.flag(c)
	j.target.flags(c)
	j.bulk.flags(c)
	exit.Require(c, "key")
	return c
}

func (j *x509Job) sign(ctx context.Context, args []string, keep func(string) bool, sign func(signing) error) error {
	files, err := j.list(args, keep)
	if err != nil {
		return err
	}
	if err := j.check(files); err != nil {
		return err
	}
	return j.signAll(ctx, files, func(ctx context.Context, c *client.Client, k client.Key, file string) (string, error) {
		signer := waiting{c.Signer(ctx, k, j.format, client.Claim{File: filepath.Base(file)}), &j.bulk}
		return j.signFile(ctx, k, signer, file, sign)
	})
}

// signAll runs one for each file, with the key and its certificate at hand.
func (j *x509Job) signAll(ctx context.Context, files []string, one func(context.Context, *client.Client, client.Key, string) (string, error)) error {
	var err error
	if j.h, err = j.hash.hash(); err != nil {
		return err
	}
	return j.a.with(func(c *client.Client) error {
		k, err := c.Key(ctx, j.key)
		if err != nil {
			return err
		}
		if len(k.X509) == 0 {
			return noX509(k.Name)
		}
		return j.run(ctx, files, func(ctx context.Context, file string) (string, error) { return one(ctx, c, k, file) })
	})
}

func noX509(name string) error {
	return exit.Hint(exit.UsageError("key %q has no X.509 certificate", name),
		"make one: signwarden key cert %s --self-signed --subject CN=... --usage codesign|kmod|efi; or see signwarden key csr", name)
}

func (j *x509Job) signFile(ctx context.Context, k client.Key, signer crypto.Signer, file string, sign func(signing) error) (string, error) {
	f, err := openInput(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", errors.New("is no regular file")
	}
	out := j.target.path(file, j.suffix)
	write := func(w io.Writer) error {
		return sign(signing{untilDone{ctx, f}, info.Size(), w, k, signer})
	}
	switch {
	case out == "-":
		return out, write(j.a.out)
	case out == file:
		return out, replaceFile(file, f, write)
	}
	return out, writeWhole(out, j.replace, write)
}

// detached makes a CMS signature over a file that is read once, in constant memory.
func (j *x509Job) detached(s signing) error {
	h := j.h
	if h == 0 {
		var err error
		if h, err = cms.DefaultHash(s.key.PublicKey); err != nil {
			return err
		}
	}
	digest := h.New()
	if _, err := io.Copy(digest, s.in); err != nil {
		return err
	}
	der, err := cms.Sign(s.signer, digest.Sum(nil), cms.Options{
		Certificate: s.key.X509[0], Certificates: s.key.X509, Hash: h, Attributes: true, SigningTime: time.Now(),
	})
	if err != nil {
		return err
	}
	if j.pem {
		der = pemBlock("CMS", der)
	}
	_, err = s.w.Write(der)
	return err
}

// replaceFile puts what write makes of an open file in its place, whole or not at
// all, with its mode, owner and extended attributes. Links are refused: a rename
// would leave the file behind them as it was.
func replaceFile(path string, f *os.File, write func(io.Writer) error) (err error) {
	var st, named unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	if err := unix.Lstat(path, &named); err != nil {
		return err
	}
	if named.Mode&unix.S_IFMT == unix.S_IFLNK || st.Nlink > 1 {
		return exit.Hint(errors.New("is a symbolic link or has other names"), "--output-dir writes a copy")
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("it cannot be written: %w", err)
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
	// The owner first: a change of owner takes set-uid bits away.
	if err := tmp.Chown(int(st.Uid), int(st.Gid)); err != nil {
		return fmt.Errorf("keeping its owner: %w", err)
	}
	if err := unix.Fchmod(int(tmp.Fd()), st.Mode&0o7777); err != nil {
		return fmt.Errorf("keeping its mode: %w", err)
	}
	if err := copyAttributes(int(tmp.Fd()), int(f.Fd())); err != nil {
		return fmt.Errorf("keeping its extended attributes: %w", err)
	}
	if err := tmp.Sync(); err != nil {
		return fmt.Errorf("it cannot be written: %w", err)
	}
	if err := tmp.Close(); err != nil {
		return fmt.Errorf("it cannot be written: %w", err)
	}
	return os.Rename(tmp.Name(), path)
}

// copyAttributes copies extended attributes but for IMA's and EVM's, which are of
// the old content.
func copyAttributes(to, from int) error {
	names := make([]byte, 64<<10)
	n, err := unix.Flistxattr(from, names)
	if errors.Is(err, unix.ENOTSUP) {
		return nil
	}
	if err != nil {
		return err
	}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names[:n]), "\x00"), "\x00") {
		if name == "" || name == "security.ima" || name == "security.evm" {
			continue
		}
		value := make([]byte, 64<<10)
		n, err := unix.Fgetxattr(from, name, value)
		if err != nil {
			return err
		}
		if err := unix.Fsetxattr(to, name, value[:n], 0); err != nil {
			return err
		}
	}
	return nil
}
