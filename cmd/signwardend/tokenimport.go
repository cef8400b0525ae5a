package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/hsm"
	"github.com/signwarden/signwarden/internal/keyfile"
)

type importFlags struct {
	tokenFlags
	key, passphrase, openpgpKey string
	label, id                   string
	certificate                 string
}

func tokenImportCommand() *cobra.Command {
	var f importFlags
	c := &cobra.Command{
		Use:   "import --key FILE --label L",
		Short: "Bring a private key from a file into the token",
		Long: `import brings a private key into the token, or into each of several under the same
id: RSA of 2048, 3072 or 4096 bits, P-256, P-384 or Ed25519, from PEM (PKCS #8,
PKCS #1, SEC 1), OpenSSH, or what gpg --export-secret-keys writes. In the token it
is sensitive, not extractable, and signs and does nothing else. One signature is
made and verified before it is said to be there; whatever fails, and an
interruption, is undone in every token. Only where a token's module crashes or hangs
may something be left in that one: it is said then, and token delete removes it.

The gateway does not use it before an administrator registers it: signwarden key
adopt. A registered key can be brought into a further token under its id.

Only the gateway's host can import, beside a gateway that serves or not: no private
key ever goes over the network. The file stays as it is: it is a copy of the key,
and whoever has it can sign. Keep it off line, or destroy it.`,
		Example: `  signwardend token import --dir /var/lib/signwarden --key release.pem --label release
  gpg --export-secret-keys release@example.org | signwardend token import --dir D --key - --label release
  openssl pkey -in encrypted.pem | signwardend token import --dir D --key - --label kmod --certificate kmod.crt`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return f.run(c, os.Stdin, os.Stdout, os.Stderr)
		},
	}
	f.add(c)
	c.Flags().StringVar(&f.key, "key", "", "file with the private key; - is standard input")
	c.Flags().StringVar(&f.passphrase, "passphrase-file", "", "file with the key's passphrase, readable by its owner only (default: it is asked for on the terminal)")
	c.Flags().StringVar(&f.openpgpKey, "openpgp-key", "", "fingerprint of the key that is meant, where an OpenPGP file has several that sign")
	c.Flags().StringVar(&f.label, "label", "", "CKA_LABEL, which no other object in the token has")
	c.Flags().StringVar(&f.id, "id", "", "CKA_ID in hexadecimal (default: a random one)")
	c.Flags().StringVar(&f.certificate, "certificate", "", "file with the key's X.509 certificate (PEM or DER), to be put beside it")
	exit.Require(c, "key")
	exit.Require(c, "label")
	return c
}

func (f *importFlags) run(c *cobra.Command, in io.Reader, out, says io.Writer) error {
	// A private key is in our memory: no core files, and nobody who is not root attaches.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("PR_SET_DUMPABLE: %w", err)
	}
	id := make([]byte, 16)
	rand.Read(id)
	var err error
	if f.id != "" {
		if id, err = parseID(f.id); err != nil {
			return err
		}
	}
	if len(f.label) > 128 || !utf8.ValidString(f.label) || strings.ContainsFunc(f.label, unicode.IsControl) {
		return exit.UsageError("--label: UTF-8 of at most 128 bytes without control characters")
	}
	conf, tokens, err := f.tokens(says)
	if err != nil {
		return err
	}
	defer closeAll(tokens)
	key, err := f.read(in, says)
	if err != nil {
		return err
	}
	public := key.(crypto.Signer).Public() // as hsm.Importable has seen
	der, err := readCertificate(f.certificate, public)
	if err != nil {
		return err
	}
	spki, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return err
	}
	ctx, stop := interruptible(c) // not before: until here an interruption ends the process
	defer stop()
	defer closeAll(tokens) // before stop, which has a further interruption end us: it waits for what is undone
	known, err := registrations(ctx, conf)
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // before init there are no names
		fmt.Fprintf(says, "warning: the store cannot be read, so it is not known whether the id is registered: %v\n", err)
	}
	k, registered := known[string(id)]
	if registered && (k.pending || !bytes.Equal(k.public, spki)) {
		return fmt.Errorf("the id %x is that of the key %s, which is another one; nothing was changed", id, k.name)
	}
	if err := importInto(ctx, tokens, f.label, id, key, der, says); err != nil {
		return err
	}
	for _, t := range tokens {
		fmt.Fprintf(out, "imported %s into token %s: id %x, SPKI SHA-256 %x\n", hsm.Algorithm(public), t.name, id, sha256.Sum256(spki))
	}
	if registered {
		fmt.Fprintf(out, "it is the registered key %s: the gateway finds it there on SIGHUP\n", k.name)
	} else {
		fmt.Fprintf(out, "next, register it: signwarden key adopt NAME --id %x\n", id)
	}
	return nil
}

// importInto brings a key into all tokens or none.
func importInto(ctx context.Context, tokens []tokenAdmin, label string, id []byte, key crypto.PrivateKey, der []byte, says io.Writer) error {
	for i, t := range tokens {
		_, err := t.Import(ctx, label, id, key)
		done := i // tokens that have the key
		if err == nil {
			done++
			err = ctx.Err() // which came too late for the token
		}
		if err == nil && der != nil {
			err = t.ImportCertificate(ctx, id, der)
		}
		if err == nil {
			continue
		}
		err = fmt.Errorf("token %s: %w", t.name, err)
		if ctx.Err() != nil {
			err = exit.Hint(err, "what was begun is undone where the token lets it; look with `signwardend token list`, and destroy what was left with `signwardend token delete`")
		} else if errors.Is(err, hsm.ErrExists) {
			err = exit.Hint(err, "`signwardend token list` shows what has it; choose another --label or --id")
		} else if e, ok := errors.AsType[*hsm.Error](err); ok && e.Class == hsm.ClassCrashed {
			err = exit.Hint(err, "look with `signwardend token list`, and destroy what was left with `signwardend token delete`")
		}
		return undoImport(ctx, tokens[:done], id, err, says)
	}
	return nil
}

// undoTimeout bounds the undoing of an import in all tokens.
const undoTimeout = time.Minute

// undoImport destroys what has come into tokens before another one failed.
func undoImport(ctx context.Context, tokens []tokenAdmin, id []byte, cause error, says io.Writer) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	for _, t := range tokens {
		if err := t.Delete(ctx, id); err != nil && !errors.Is(err, hsm.ErrNotFound) {
			fmt.Fprintf(says, "warning: the key with id %x is left in token %s, where it could not be destroyed: %v\n", id, t.name, err)
		}
	}
	return cause
}

// read reads the private key, and warns where others can read it too.
func (f *importFlags) read(in io.Reader, says io.Writer) (crypto.PrivateKey, error) {
	if f.key != "-" {
		file, err := os.Open(f.key)
		if err != nil {
			return nil, err
		}
		defer file.Close()
		st, err := file.Stat()
		if err != nil {
			return nil, err
		}
		if st.Mode().Perm()&0o077 != 0 {
			fmt.Fprintf(says, "warning: %s has mode %#o: others than its owner may have read this private key\n", f.key, st.Mode().Perm())
		}
		in = file
	}
	b, err := io.ReadAll(io.LimitReader(in, keyfile.MaxSize+1))
	if err != nil {
		return nil, fmt.Errorf("reading the private key: %w", err)
	}
	defer clear(b)
	key, err := keyfile.Parse(b, keyfile.Options{OpenPGP: f.openpgpKey, Passphrase: f.askPassphrase})
	if err == nil {
		err = hsm.Importable(key)
	}
	if err != nil {
		return nil, exit.WithCode(fmt.Errorf("%s: %w", f.key, err), exit.Usage)
	}
	return key, nil
}

// askPassphrase reads the passphrase from its file, or from the terminal: standard
// input may be the key.
func (f *importFlags) askPassphrase() ([]byte, error) {
	if f.passphrase != "" {
		pass, err := hsm.ReadPIN(f.passphrase) // the same rules: mode, one line, length
		if err != nil {
			return nil, fmt.Errorf("--passphrase-file: %w", err)
		}
		return []byte(pass.Reveal()), nil
	}
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return nil, errors.New("there is no terminal to ask for it; give --passphrase-file")
	}
	defer tty.Close()
	// Who is interrupted leaves the terminal as it was.
	was, err := term.GetState(int(tty.Fd()))
	if err != nil {
		return nil, err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	fmt.Fprint(tty, "passphrase of the private key: ")
	defer fmt.Fprintln(tty)
	type answer struct {
		pass []byte
		err  error
	}
	came := make(chan answer, 1)
	go func() { // reading a terminal cannot be cut off: it ends with the process, where it has to
		pass, err := term.ReadPassword(int(tty.Fd()))
		came <- answer{pass, err}
	}()
	select {
	case a := <-came:
		return a.pass, a.err
	case <-ctx.Done():
		return nil, errors.Join(errors.New("interrupted"), term.Restore(int(tty.Fd()), was))
	}
}

// readCertificate reads the one certificate of a file and sees that it is the key's;
// nil where there is no file.
func readCertificate(path string, public crypto.PublicKey) ([]byte, error) {
	if path == "" {
		return nil, nil
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	b, err := io.ReadAll(io.LimitReader(file, 4*hsm.MaxCertificate))
	if err != nil {
		return nil, err
	}
	if block, _ := pem.Decode(b); block != nil {
		b = block.Bytes // the first: a chain has its issuers behind it
	}
	cert, err := x509.ParseCertificate(b)
	if err != nil {
		return nil, exit.UsageError("%s: no certificate: %w", path, err)
	}
	if k, ok := public.(interface{ Equal(crypto.PublicKey) bool }); !ok || !k.Equal(cert.PublicKey) {
		return nil, exit.UsageError("%s: the certificate of %q is for another key; nothing was changed", path, cert.Subject)
	}
	return b, nil
}
