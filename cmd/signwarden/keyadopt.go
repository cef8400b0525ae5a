package main

import (
	"encoding/hex"

	"github.com/spf13/cobra"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/formats/openpgp"
	"github.com/signwarden/signwarden/gateway/client"
)

func (a *app) keyAdopt() *cobra.Command {
	var id, certificate, primary string
	c := &cobra.Command{
		Use:   "adopt NAME --id HEX",
		Short: "Register a key that is in the token already",
		Long: `adopt registers a key that the gateway did not make: one that an operator has brought
into the token with signwardend token import, or that was there before. Its id is what
signwardend token list shows, on the gateway's host. The key signs once, and the
signature is verified, before it is registered; in the token nothing changes. It takes
an administrator of every key.

Whether the key can be taken out of the token, or has copies elsewhere, adopt cannot
know. token list says what the token says.

With --openpgp the key keeps the certificate that its users have: it must sign in it, as
the primary key or as a subkey. Where it is a subkey, --primary-id says where in the
token the primary key is. Without that the primary key is taken to be kept off line, and
the gateway cannot renew, rotate or revoke the certificate.`,
		Example: `  signwarden key adopt release --id 5f1c
  signwarden key adopt release --id 5f1c --openpgp release.asc --primary-id 77aa`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, argv []string) error {
			ad := client.Adoption{Name: argv[0]}
			var err error
			for _, f := range []struct {
				flag, value string
				to          *[]byte
			}{{"--id", id, &ad.TokenID}, {"--primary-id", primary, &ad.PrimaryID}} {
				if *f.to, err = hex.DecodeString(f.value); err != nil {
					return exit.UsageError("%s %q is not hexadecimal", f.flag, f.value)
				}
			}
			if certificate != "" {
				if ad.OpenPGP, err = a.readFile(certificate, openpgp.MaxCertificate); err != nil {
					return err
				}
			}
			return a.with(func(c *client.Client) error {
				k, err := c.AdoptKey(cmd.Context(), ad)
				if err != nil {
					return err
				}
				return a.printKey(k)
			})
		},
	}
	c.Flags().StringVar(&id, "id", "", "CKA_ID of the key in the token, in hexadecimal")
	c.Flags().StringVar(&certificate, "openpgp", "", "file with the OpenPGP certificate that the key is to keep")
	c.Flags().StringVar(&primary, "primary-id", "", "CKA_ID of the certificate's primary key, where that is another key in the token")
	exit.Require(c, "id")
	return c
}
