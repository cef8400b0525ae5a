package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/formats/openpgp"
	"github.com/signwarden/signwarden/gateway/client"
	"github.com/signwarden/signwarden/gateway/keys"
)

func (a *app) keyOpenPGP() *cobra.Command {
	c := &cobra.Command{
		Use:   "openpgp",
		Short: "Change the OpenPGP certificate of a key",
		Long: `openpgp changes certificates: the gateway makes the self-signatures, and records
them. Nothing is taken out of a certificate, but by replace, so signatures that were
made stay good.
Give the new one to whoever verifies: signwarden key export NAME.`,
	}
	c.AddCommand(a.openpgpRenew(), a.openpgpAddUID(), a.openpgpRotate(), a.openpgpRevoke(), a.openpgpReplace())
	return c
}

// changing runs a change of a key's certificate and prints the key.
func (a *app) changing(change func(ctx context.Context, c *client.Client, name string) (client.Key, error)) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, argv []string) error {
		return a.with(func(c *client.Client) error {
			k, err := change(cmd.Context(), c, argv[0])
			if err != nil {
				return err
			}
			return a.printKey(k)
		})
	}
}

func (a *app) openpgpRenew() *cobra.Command {
	var expires string
	c := &cobra.Command{
		Use:   "renew NAME --expires WHEN",
		Short: "Let a certificate expire at another time",
		Long: `renew gives the certificate another time of expiry: its primary key, its user ids
and the subkeys of all registered keys in it that are not disabled. One that has
expired can be renewed too.`,
		Example: `  signwarden key openpgp renew release --expires 2y`,
		Args:    cobra.ExactArgs(1),
		RunE: a.changing(func(ctx context.Context, c *client.Client, name string) (client.Key, error) {
			if expires == "never" {
				return c.RenewOpenPGP(ctx, name, time.Time{})
			}
			until, err := parseExpiry(expires, time.Now())
			if err != nil {
				return client.Key{}, err
			}
			return c.RenewOpenPGP(ctx, name, until)
		}),
	}
	c.Flags().StringVar(&expires, "expires", "", "90d, 12w, 18m (months), 5y, a date 2030-01-31, or never")
	exit.Require(c, "expires")
	return c
}

func (a *app) openpgpAddUID() *cobra.Command {
	var uid string
	c := &cobra.Command{
		Use:     "add-uid NAME --uid ID",
		Short:   "Add a user id to a certificate",
		Example: `  signwarden key openpgp add-uid release --uid "Release team <team@example.org>"`,
		Args:    cobra.ExactArgs(1),
		RunE: a.changing(func(ctx context.Context, c *client.Client, name string) (client.Key, error) {
			return c.AddUserID(ctx, name, uid)
		}),
	}
	c.Flags().StringVar(&uid, "uid", "", `user id: "Name <address>"`)
	exit.Require(c, "uid")
	return c
}

func (a *app) openpgpRotate() *cobra.Command {
	var r client.Rotation
	var algorithm, expires, overlap string
	c := &cobra.Command{
		Use:   "rotate NAME --to NEW",
		Short: "Add a new signing subkey, as a key of its own",
		Long: `rotate generates a key NEW whose pair is another signing subkey of NAME's
certificate. Both can sign from then on, each by its name; gpg takes the newer
subkey of those that the agent shows it. Distribute the certificate, have jobs sign
with NEW, then disable NAME. With --overlap the old subkey expires after that time;
what it signed before stays good.

Rules name keys: see that they name NEW too.`,
		Example: `  signwarden key openpgp rotate release --to release-2028 --overlap 90d`,
		Args:    cobra.ExactArgs(1),
		RunE: a.changing(func(ctx context.Context, c *client.Client, name string) (client.Key, error) {
			r.Algorithm = keys.Algorithm(algorithm)
			var err error
			if r.Expires, err = parseExpiry(expires, time.Now()); err != nil {
				return client.Key{}, err
			}
			if r.Retire, err = parseExpiry(overlap, time.Now()); err != nil {
				return client.Key{}, exit.UsageError("%s", strings.Replace(err.Error(), "--expires", "--overlap", 1))
			}
			return c.RotateOpenPGP(ctx, name, r)
		}),
	}
	c.Flags().StringVar(&r.To, "to", "", "name of the new key")
	c.Flags().StringVar(&algorithm, "algorithm", "", "of the new key (default: that of the old one)")
	c.Flags().StringVar(&expires, "expires", "", "when the new subkey expires (default: with the certificate)")
	c.Flags().StringVar(&overlap, "overlap", "", "how long the old subkey still lives: 90d, 12w, or until a date (default: as it is)")
	exit.Require(c, "to")
	return c
}

func (a *app) openpgpRevoke() *cobra.Command {
	var reason, text string
	c := &cobra.Command{
		Use:   "revoke NAME --reason WHY",
		Short: "End a certificate, for good",
		Long: `revoke revokes the whole certificate of a key, which cannot be undone, and disables
every key in it. Signatures made before are bad to software that has the revoked
certificate if the reason is "compromised", and in gpg's eyes always. Distribute it:
signwarden key export NAME.

Reasons: superseded (by a new key), retired (no longer used), compromised (somebody
else may have signed with it), unspecified.`,
		Example: `  signwarden key openpgp revoke old-release --reason superseded --text "see release"`,
		Args:    cobra.ExactArgs(1),
		RunE: a.changing(func(ctx context.Context, c *client.Client, name string) (client.Key, error) {
			k, err := c.RevokeOpenPGP(ctx, name, reason, text)
			if err == nil {
				fmt.Fprintf(a.err, "the certificate of %s is revoked; give it to whoever has it: signwarden key export %s\n", name, name)
			}
			return k, err
		}),
	}
	c.Flags().StringVar(&reason, "reason", "", "superseded, retired, compromised or unspecified")
	c.Flags().StringVar(&text, "text", "", "what people are to know")
	exit.Require(c, "reason")
	return c
}

func (a *app) openpgpReplace() *cobra.Command {
	return &cobra.Command{
		Use:   "replace NAME FILE",
		Short: "Take a certificate that was changed where its primary key is",
		Long: `replace is for a key that was adopted under a certificate whose primary key is off
line: renew or extend the certificate there, with gpg, and give the gateway the result.
It is the same certificate, in which the key and every other enabled one of the
gateway's may sign: one that was revoked is not taken, disable the key instead. What
FILE lacks the gateway's copy lacks from then on. FILE is - for standard input.`,
		Example: `  gpg --armor --export release@example.org | signwarden key openpgp replace release -`,
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, argv []string) error {
			cert, err := a.readFile(argv[1], openpgp.MaxCertificate)
			if err != nil {
				return err
			}
			return a.changing(func(ctx context.Context, c *client.Client, name string) (client.Key, error) {
				return c.ReplaceOpenPGP(ctx, name, cert)
			})(cmd, argv)
		},
	}
}
