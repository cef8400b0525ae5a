package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/formats/openpgp"
	"github.com/signwarden/signwarden/gateway/client"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

func (a *app) pingCommand() *cobra.Command {
	var wait time.Duration
	c := &cobra.Command{
		Use:   "ping",
		Short: "Ask whether the gateway serves",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			conf, err := a.config()
			if err != nil {
				return err
			}
			cl, err := client.Dial(conf)
			if err != nil {
				return err
			}
			defer cl.Close()
			start := time.Now()
			if err := ping(cmd.Context(), cl, wait); err != nil {
				return err
			}
			took := time.Since(start)
			return a.print(struct {
				Address string  `json:"address"`
				MS      float64 `json:"ms"`
			}{conf.String(), float64(took.Microseconds()) / 1000}, func(w io.Writer) {
				fmt.Fprintf(w, "%s serves (%v)\n", conf.String(), took.Round(time.Millisecond))
			})
		},
	}
	c.Flags().DurationVar(&wait, "wait", 0, "keep trying for so long, like 10s")
	return c
}

// ping asks once, or until wait has passed while the gateway is unavailable.
func ping(ctx context.Context, c *client.Client, wait time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, max(wait, 10*time.Second))
	defer cancel()
	until := time.Now().Add(wait)
	for {
		err := c.Ping(ctx)
		if !errors.Is(err, sigerr.Unavailable) || time.Now().After(until) {
			return err
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}

func (a *app) keyCommand() *cobra.Command {
	c := &cobra.Command{Use: "key", Short: "Create, adopt, list, export, enable and disable keys"}
	c.AddCommand(a.keyCreate(), a.keyAdopt(), a.keyList(), a.keyShow(), a.keyExport(), a.keyCert(), a.keyCSR(), a.keyOpenPGP(),
		a.keyState("enable", keys.Enabled), a.keyState("disable", keys.Disabled))
	return c
}

// keyJSON is the stable form of a key in JSON output.
type keyJSON struct {
	Name        string       `json:"name"`
	Algorithm   string       `json:"algorithm"`
	State       string       `json:"state"`
	Created     time.Time    `json:"created"`
	Token       string       `json:"token"`
	TokenID     string       `json:"token_id"`
	MaySign     bool         `json:"may_sign"`
	Fingerprint string       `json:"spki_sha256"`
	OpenPGP     *openpgpJSON `json:"openpgp,omitempty"`
	X509        []x509JSON   `json:"x509,omitempty"`
}

type x509JSON struct {
	Subject     string    `json:"subject"`
	Issuer      string    `json:"issuer"`
	Expires     time.Time `json:"expires"`
	Fingerprint string    `json:"sha256"`
}

type openpgpJSON struct {
	UserID      string     `json:"user_id"`
	Layout      string     `json:"layout"`
	Fingerprint string     `json:"fingerprint"`
	Expires     *time.Time `json:"expires,omitempty"`
}

func toJSON(k client.Key) (keyJSON, error) {
	out := keyJSON{
		Name: k.Name, Algorithm: string(k.Algorithm), State: string(k.State), Created: k.Created, Token: k.Token,
		TokenID: hex.EncodeToString(k.TokenID), MaySign: k.MaySign, Fingerprint: keys.Key{Public: k.SPKI}.Fingerprint(),
	}
	for _, c := range k.X509 {
		sum := sha256.Sum256(c.Raw)
		out.X509 = append(out.X509, x509JSON{c.Subject.String(), c.Issuer.String(), c.NotAfter, hex.EncodeToString(sum[:])})
	}
	if k.OpenPGP != nil {
		cert, err := openpgp.ParseCertificate(k.OpenPGP.Certificate)
		if err != nil {
			return out, fmt.Errorf("certificate of %q: %w", k.Name, err)
		}
		out.OpenPGP = &openpgpJSON{UserID: k.OpenPGP.UserID, Layout: string(k.OpenPGP.Layout), Fingerprint: cert.Fingerprint().String()}
		if !k.OpenPGP.Expires.IsZero() {
			out.OpenPGP.Expires = &k.OpenPGP.Expires
		}
	}
	return out, nil
}

// printKey shows one key whole.
func (a *app) printKey(k client.Key) error {
	j, err := toJSON(k)
	if err != nil {
		return err
	}
	return a.print(j, func(w io.Writer) {
		row := func(name string, v any) { fmt.Fprintf(w, "%s\t%v\n", name, v) }
		row("name", j.Name)
		row("algorithm", j.Algorithm)
		row("state", j.State)
		row("created", j.Created.Format(time.RFC3339))
		row("token", fmt.Sprintf("%s, id %s", j.Token, j.TokenID))
		row("SPKI SHA-256", j.Fingerprint)
		row("you may sign", j.MaySign)
		if p := j.OpenPGP; p != nil {
			row("OpenPGP", p.Fingerprint)
			row("user id", p.UserID)
			row("layout", p.Layout)
			if p.Expires != nil {
				row("expires", p.Expires.Format(time.RFC3339))
			} else {
				row("expires", "never")
			}
		}
		for _, c := range j.X509 {
			row("X.509", c.Subject)
			row("  issuer", c.Issuer)
			row("  expires", c.Expires.Format(time.RFC3339))
			row("  SHA-256", c.Fingerprint)
		}
	})
}

func (a *app) keyCreate() *cobra.Command {
	var algorithm, uid, layout, expires string
	c := &cobra.Command{
		Use:   "create NAME --algorithm A",
		Short: "Generate a key in the token",
		Long: `create generates a key pair in the token: sensitive, not extractable, for
signing only. With --openpgp-uid the gateway makes an OpenPGP certificate too: a
certify-only primary key and this key as its signing subkey, or with
--layout single one key that does both.`,
		Example: `  signwarden key create release --algorithm rsa4096 --openpgp-uid "Release <release@example.org>" --expires 5y`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, argv []string) error {
			alg, err := keys.ParseAlgorithm(algorithm)
			if err != nil {
				return err
			}
			until, err := parseExpiry(expires, time.Now())
			if err != nil {
				return err
			}
			if uid == "" && cmd.Flags().Changed("layout") {
				return exit.UsageError("--layout is of an OpenPGP certificate: give --openpgp-uid too")
			}
			return a.with(func(c *client.Client) error {
				k, err := c.CreateKey(cmd.Context(), client.KeySpec{
					Name: argv[0], Algorithm: alg, UserID: uid, Layout: keys.Layout(layout), Expires: until,
				})
				if err != nil {
					return err
				}
				return a.printKey(k)
			})
		},
	}
	c.Flags().StringVar(&algorithm, "algorithm", "", "rsa2048, rsa3072, rsa4096, p256, p384 or ed25519")
	c.Flags().StringVar(&uid, "openpgp-uid", "", `user id of an OpenPGP certificate: "Name <address>"`)
	c.Flags().StringVar(&layout, "layout", string(keys.Subkey), "shape of the certificate: subkey or single")
	c.Flags().StringVar(&expires, "expires", "", "when the certificate expires: 90d, 12w, 18m (months), 5y, or a date 2030-01-31 (default: never)")
	exit.Require(c, "algorithm")
	return c
}

// parseExpiry reads a count of days, weeks, months or years from now, or a date.
func parseExpiry(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if t, err := time.Parse(time.DateOnly, s); err == nil {
		return t, nil
	}
	n, err := strconv.Atoi(s[:len(s)-1])
	if err == nil && n > 0 && n < 10000 {
		now = now.UTC().Truncate(time.Second)
		switch s[len(s)-1] {
		case 'd':
			return now.AddDate(0, 0, n), nil
		case 'w':
			return now.AddDate(0, 0, 7*n), nil
		case 'm':
			return now.AddDate(0, n, 0), nil
		case 'y':
			return now.AddDate(n, 0, 0), nil
		}
	}
	return time.Time{}, exit.UsageError("--expires %q is not like 90d, 12w, 18m, 5y or 2030-01-31", s)
}

func (a *app) keyList() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the keys you may see",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(func(c *client.Client) error {
				all, err := c.Keys(cmd.Context())
				if err != nil {
					return err
				}
				out := make([]keyJSON, 0, len(all))
				for _, k := range all {
					j, err := toJSON(k)
					if err != nil {
						return err
					}
					out = append(out, j)
				}
				return a.print(out, func(w io.Writer) {
					fmt.Fprintln(w, "NAME\tALGORITHM\tSTATE\tSIGN\tCREATED\tOPENPGP USER ID")
					for _, k := range out {
						uid, sign := "-", "no"
						if k.OpenPGP != nil {
							uid = k.OpenPGP.UserID
						}
						if k.MaySign {
							sign = "yes"
						}
						fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", k.Name, k.Algorithm, k.State, sign, k.Created.Format(time.DateOnly), uid)
					}
				})
			})
		},
	}
}

func (a *app) keyShow() *cobra.Command {
	var how bool
	c := &cobra.Command{
		Use:   "show NAME",
		Short: "Tell of one key",
		Long: `show tells of one key. With --howto it prints the command lines of the tools that can
sign with it, by its algorithm, its certificates and what the rules let you do, to be
copied; and for the other tools why not.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, argv []string) error {
			return a.with(func(c *client.Client) error {
				k, err := c.Key(cmd.Context(), argv[0])
				if err != nil {
					return err
				}
				if how {
					return a.howto(cmd.Context(), c, k)
				}
				return a.printKey(k)
			})
		},
	}
	c.Flags().BoolVar(&how, "howto", false, "print each tool's command line for the key")
	return c
}

func (a *app) keyState(verb string, to keys.State) *cobra.Command {
	return &cobra.Command{
		Use:   verb + " NAME",
		Short: fmt.Sprintf("Put a key into the state %q", to),
		Long: map[keys.State]string{
			keys.Enabled:  "enable lets a disabled key sign again.",
			keys.Disabled: "disable stops a key: it signs nothing from the very next request on, on streams that are open too.",
		}[to],
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, argv []string) error {
			return a.with(func(c *client.Client) error {
				k, err := c.SetKeyState(cmd.Context(), argv[0], to)
				if err != nil {
					return err
				}
				j, err := toJSON(k)
				if err != nil {
					return err
				}
				return a.print(j, func(w io.Writer) { fmt.Fprintf(w, "%s is %s\n", k.Name, k.State) })
			})
		},
	}
}

func (a *app) keyExport() *cobra.Command {
	var format, signer string
	var namespaces []string
	c := &cobra.Command{
		Use:   "export NAME --format openpgp|spki|ssh|x509",
		Short: "Print the public half of a key",
		Long: `export prints the public half of a key: openpgp, the armored certificate that
gpg and rpm import; spki, a PEM PUBLIC KEY; ssh, a line for authorized_keys, a .pub file
or git's user.signingkey, and with --signer one for allowed_signers; x509, the PEM chain,
the key's own certificate first. There is no way to export a private half.`,
		Example: `  signwarden key export release --format ssh >release.pub
  signwarden key export release --format ssh --signer release@example.org --namespaces git >>allowed_signers`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, argv []string) error {
			prefix, err := allowedSigner(format, signer, namespaces)
			if err != nil {
				return err
			}
			return a.with(func(c *client.Client) error {
				k, err := c.Key(cmd.Context(), argv[0])
				if err != nil {
					return err
				}
				text, err := export(k, format)
				if err != nil {
					return err
				}
				text = append([]byte(prefix), text...)
				return a.print(map[string]string{"name": k.Name, "format": format, "text": string(text)},
					func(w io.Writer) { _, _ = a.out.Write(text) })
			})
		},
	}
	c.Flags().StringVar(&format, "format", "openpgp", "openpgp, spki, ssh or x509")
	c.Flags().StringVar(&signer, "signer", "", "with ssh: who is to be allowed, like release@example.org")
	c.Flags().StringSliceVar(&namespaces, "namespaces", nil, "with --signer: for what, like git,file (default: anything)")
	return c
}

// allowedSigner is what goes before a key in allowed_signers (ssh-keygen(1)).
func allowedSigner(format, signer string, namespaces []string) (string, error) {
	switch {
	case signer == "" && len(namespaces) == 0:
		return "", nil
	case signer == "":
		return "", exit.UsageError("--namespaces are of an allowed signer: give --signer too")
	case format != "ssh":
		return "", exit.UsageError("--signer is for --format ssh")
	case strings.ContainsAny(signer, " \t\r\n\"#"):
		return "", exit.UsageError("--signer %q: a principal of SSH has no blanks, quotes or #", signer)
	case strings.ContainsAny(strings.Join(namespaces, ","), "\r\n\""):
		return "", exit.UsageError("--namespaces: no quotes or ends of lines")
	case len(namespaces) == 0:
		return signer + " ", nil
	}
	return fmt.Sprintf("%s namespaces=\"%s\" ", signer, strings.Join(namespaces, ",")), nil
}

func export(k client.Key, format string) ([]byte, error) {
	switch format {
	case "openpgp":
		if k.OpenPGP == nil {
			return nil, exit.Hint(exit.UsageError("key %q has no OpenPGP certificate", k.Name),
				"one is made with the key: signwarden key create NAME --openpgp-uid ...; --format spki and ssh work for every key")
		}
		cert, err := openpgp.ParseCertificate(k.OpenPGP.Certificate)
		if err != nil {
			return nil, fmt.Errorf("certificate of %q: %w", k.Name, err)
		}
		var b bytes.Buffer
		err = cert.Armor(&b)
		return b.Bytes(), err
	case "x509":
		if len(k.X509) == 0 {
			return nil, noX509(k.Name)
		}
		var out []byte
		for _, c := range k.X509 {
			out = append(out, pemBlock("CERTIFICATE", c.Raw)...)
		}
		return out, nil
	case "spki":
		return pemBlock("PUBLIC KEY", k.SPKI), nil
	case "ssh":
		pub, err := ssh.NewPublicKey(k.PublicKey)
		if err != nil {
			return nil, err
		}
		line := bytes.TrimSuffix(ssh.MarshalAuthorizedKey(pub), []byte("\n"))
		return fmt.Appendf(line, " %s\n", k.Name), nil
	}
	return nil, exit.UsageError("--format %q is not openpgp, spki, ssh or x509", format)
}
