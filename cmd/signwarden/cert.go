package main

import (
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/gateway/client"
)

// maxChainFile bounds a PEM file of certificates, in bytes.
const maxChainFile = 256 << 10

func (a *app) keyCert() *cobra.Command {
	var selfSigned bool
	var subject, usage, expires, file string
	c := &cobra.Command{
		Use:   "cert NAME --self-signed --subject S --usage U | cert NAME --import chain.pem",
		Short: "Give a key an X.509 certificate",
		Long: `cert gives a key its X.509 certificate, in place of an earlier one. With
--self-signed the gateway makes it, from the subject and the usage alone. With
--import it is one that a CA has issued for a request made with key csr: a PEM file
with the key's certificate first, then each one's issuer. A chain of another public
key, or one that does not hold together, is refused and changes nothing.`,
		Example: `  signwarden key cert modules --self-signed --subject "CN=Example modules,O=Example" --usage kmod --expires 10y
  signwarden key cert boot --import chain.pem`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, argv []string) error {
			if !selfSigned {
				chain, err := a.readChain(file)
				if err != nil {
					return err
				}
				return a.with(func(c *client.Client) error {
					k, err := c.ImportChain(cmd.Context(), argv[0], chain)
					if err != nil {
						return err
					}
					return a.printKey(k)
				})
			}
			name, err := parseSubject(subject)
			if err != nil {
				return err
			}
			until, err := parseExpiry(expires, time.Now())
			if err != nil {
				return err
			}
			return a.with(func(c *client.Client) error {
				k, err := c.CertifyKey(cmd.Context(), argv[0], client.X509Spec{Subject: name, Usage: usage, Expires: until})
				if err != nil {
					return err
				}
				return a.printKey(k)
			})
		},
	}
	c.Flags().BoolVar(&selfSigned, "self-signed", false, "have the gateway make it")
	c.Flags().StringVar(&file, "import", "", "PEM file with a chain; - is standard input")
	c.Flags().StringVar(&subject, "subject", "", `subject, like "CN=Example modules,O=Example,C=DE"`)
	c.Flags().StringVar(&usage, "usage", "codesign", "codesign, kmod or efi")
	c.Flags().StringVar(&expires, "expires", "", "when it expires: 90d, 12w, 18m (months), 10y, or a date (default: never)")
	c.MarkFlagsOneRequired("self-signed", "import")
	c.MarkFlagsMutuallyExclusive("self-signed", "import")
	c.MarkFlagsRequiredTogether("self-signed", "subject")
	return c
}

func (a *app) keyCSR() *cobra.Command {
	var subject string
	c := &cobra.Command{
		Use:   "csr NAME --subject S",
		Short: "Print a certificate signing request for a key",
		Long: `csr prints a PKCS #10 request, PEM, for a CA to issue a certificate from. Give the
key the result with: signwarden key cert NAME --import chain.pem`,
		Example: `  signwarden key csr boot --subject "CN=Example boot,O=Example" > boot.csr`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, argv []string) error {
			name, err := parseSubject(subject)
			if err != nil {
				return err
			}
			return a.with(func(c *client.Client) error {
				der, err := c.CreateSigningRequest(cmd.Context(), argv[0], name)
				if err != nil {
					return err
				}
				text := pemBlock("CERTIFICATE REQUEST", der)
				return a.print(map[string]string{"name": argv[0], "request": string(text)},
					func(io.Writer) { _, _ = a.out.Write(text) })
			})
		},
	}
	c.Flags().StringVar(&subject, "subject", "", `subject, like "CN=Example boot,O=Example"`)
	exit.Require(c, "subject")
	return c
}

// readChain reads the certificates of a PEM file.
func (a *app) readChain(path string) ([][]byte, error) {
	text, err := a.readFile(path, maxChainFile)
	if err != nil {
		return nil, err
	}
	var chain [][]byte
	for {
		block, rest := pem.Decode(text)
		if block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, exit.UsageError("%s holds a PEM %s; a chain has certificates only", path, block.Type)
		}
		chain, text = append(chain, block.Bytes), rest
	}
	if len(chain) == 0 {
		return nil, exit.UsageError("%s holds no PEM certificate", path)
	}
	return chain, nil
}

// parseSubject reads CN=...,O=... as RFC 4514 writes it, with \ before a comma in
// a value. Attributes are CN, O, OU, C, ST and L.
func parseSubject(s string) (pkix.Name, error) {
	var n pkix.Name
	var parts []string
	var part strings.Builder
	escaped := false
	for _, r := range s {
		switch {
		case escaped:
			part.WriteRune(r)
			escaped = false
		case r == '\\':
			escaped = true
		case r == ',':
			parts = append(parts, part.String())
			part.Reset()
		default:
			part.WriteRune(r)
		}
	}
	parts = append(parts, part.String())
	for _, p := range parts {
		attr, value, ok := strings.Cut(strings.TrimSpace(p), "=")
		value = strings.TrimSpace(value)
		if !ok || value == "" || escaped {
			return n, exit.UsageError("--subject: %q is not like CN=Example,O=Example", s)
		}
		switch strings.ToUpper(strings.TrimSpace(attr)) {
		case "CN":
			if n.CommonName != "" {
				return n, exit.UsageError("--subject: %q has two common names", s)
			}
			n.CommonName = value
		case "O":
			n.Organization = append(n.Organization, value)
		case "OU":
			n.OrganizationalUnit = append(n.OrganizationalUnit, value)
		case "C":
			n.Country = append(n.Country, value)
		case "ST":
			n.Province = append(n.Province, value)
		case "L":
			n.Locality = append(n.Locality, value)
		default:
			return n, exit.UsageError("--subject: %q is not CN, O, OU, C, ST or L", attr)
		}
	}
	if n.CommonName == "" {
		return n, fmt.Errorf("--subject: %w", exit.UsageError("%q has no common name (CN)", s))
	}
	return n, nil
}

// pemBlock is one PEM block.
func pemBlock(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}
