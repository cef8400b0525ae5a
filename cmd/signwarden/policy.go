package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/formats/rpm"
	"github.com/signwarden/signwarden/gateway/client"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/policy"
)

func (a *app) policyCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "policy",
		Short: "Say who may do what with which key",
		Long: `The policy is one YAML file of rules. What no rule allows is denied.

rules:
  - name: release-team              # unique
    principals: [alice, "spiffe://example.org/ci/*"]   # exact or glob; * does not cross /
    keys: ["release-*"]             # exact or glob
    may: [sign, read]               # sign, read, admin
    formats: [openpgp, rpm]         # or "*", all but ssh-auth; needed with sign
    blind: true                     # may sign bare digests: gpg, rpmsign, this client
                                    # without content. They can be of anything: with an
                                    # RSA or EC key, of a login by ssh too
    hashes: [sha256, sha512]        # default: sha256, sha384, sha512
    not_before: 2027-01-01T00:00:00Z
    not_after: 2027-12-31T23:59:59Z
    rate: 5000/h                    # each principal and key: per s, m or h
    weight: 10                      # share of a busy token, to others' 1: 1 to 100
  - name: our-packages
    principals: [ci]
    keys: [release]
    may: [sign]
    formats: [rpm]
    content: rpm                    # the gateway reads the package's header itself,
    packages:                       # and decides on it; each list is optional
      names: ["kernel*", bash]
      epochs: ["0"]
      versions: ["6.*"]
      releases: ["*.el10"]
      arches: [x86_64, noarch]      # source packages: src, nosrc
      vendors: ["Example"]
  - name: git-signatures
    principals: [alice]
    keys: [release]
    may: [sign]
    formats: [ssh-sig]
    namespaces: [git, "file*"]      # of ssh-keygen -Y sign; the gateway reads them itself

Administrators are principals with may: [admin] on keys: ["*"].`,
	}
	c.AddCommand(a.policyApply(), a.policyShow(), a.policyTest())
	return c
}

func (a *app) policyApply() *cobra.Command {
	var file string
	c := &cobra.Command{
		Use:   "apply -f policy.yaml",
		Short: "Replace the rules",
		Long: `apply replaces the rules by those of a file (- reads standard input). A file that
is wrong, or under which you would no longer be an administrator, changes nothing.
Requests on open streams are decided by the new rules at once.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			source, err := a.readFile(file, policy.MaxSource)
			if err != nil {
				return err
			}
			return a.with(func(c *client.Client) error {
				n, err := c.ApplyPolicy(cmd.Context(), source)
				if err != nil {
					return err
				}
				return a.print(map[string]int{"rules": n}, func(w io.Writer) { fmt.Fprintf(w, "%d rules are in force\n", n) })
			})
		},
	}
	c.Flags().StringVarP(&file, "file", "f", "", "policy file; - is standard input")
	exit.Require(c, "file")
	return c
}

// readFile reads a file or standard input, at most limit bytes.
func (a *app) readFile(path string, limit int64) ([]byte, error) {
	f := a.in
	if path != "-" {
		var err error
		if f, err = os.Open(path); err != nil {
			return nil, err
		}
		defer f.Close()
	}
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	if int64(len(b)) > limit {
		return nil, exit.UsageError("%s has over %d bytes", path, limit)
	}
	return b, nil
}

func (a *app) policyShow() *cobra.Command {
	return &cobra.Command{
		Use:   "show",
		Short: "Print the rules in force, as they were applied",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(func(c *client.Client) error {
				source, err := c.Policy(cmd.Context())
				if err != nil {
					return err
				}
				return a.print(map[string]string{"source": string(source)}, func(w io.Writer) { _, _ = a.out.Write(source) })
			})
		},
	}
}

func (a *app) policyTest() *cobra.Command {
	var q client.PolicyQuery
	var hash, pkg string
	c := &cobra.Command{
		Use:   "test --key K [--principal P] [--format F | --rpm FILE | --namespace N | --login USER]",
		Short: "Tell what would be decided, by which rule, and why",
		Long: `test asks the rules in force what they would say to a request for a bare digest, or
with --rpm to one that shows the gateway the header of that package; with --namespace
to a signature of ssh-keygen -Y sign or git, and with --login to a login by ssh. It signs
nothing, and does not look at the key: whether it exists, or is disabled.
gpg and rpmsign ask, through an agent socket, for the format openpgp.
Exit code 0: allowed; 4: denied.`,
		Example: `  signwarden policy test --principal alice --key release --format openpgp
  signwarden policy test --principal ci --key release --rpm bash-5.2-1.x86_64.rpm
  signwarden policy test --principal alice --key release --namespace git`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			h, ok := keys.Hashes[hash]
			if !ok {
				return exit.UsageError("--hash %q is not sha256, sha384 or sha512", hash)
			}
			q.Hash = h
			if pkg != "" {
				var err error
				if q.Package, err = readNEVRA(pkg); err != nil {
					return err
				}
				q.Format = "rpm"
			}
			switch {
			case q.Namespace != "":
				q.Format = policy.SSHSig
			case q.User != "":
				q.Format = policy.SSHAuth
			}
			if (q.Action == "sign") == (q.Format == "") {
				return exit.UsageError("--format goes with signing, and signing needs it")
			}
			return a.with(func(c *client.Client) error { return a.testPolicy(cmd, c, q) })
		},
	}
	c.Flags().StringVar(&q.Principal, "principal", "", "who (default: you)")
	c.Flags().StringVar(&q.Key, "key", "", "name of the key; it need not exist")
	c.Flags().StringVar(&q.Action, "action", "sign", "sign, read or admin")
	c.Flags().StringVar(&q.Format, "format", "", "what the signature is for, like openpgp or rpm")
	c.Flags().StringVar(&hash, "hash", "sha256", "the digest's hash")
	c.Flags().StringVar(&pkg, "rpm", "", "a package that would be signed")
	c.Flags().StringVar(&q.Namespace, "namespace", "", "an SSH signature of that namespace, like git")
	c.Flags().StringVar(&q.User, "login", "", "a login by ssh as that user")
	c.MarkFlagsMutuallyExclusive("rpm", "format", "namespace", "login")
	exit.Require(c, "key")
	return c
}

// readNEVRA reads what the gateway would see of a package.
func readNEVRA(path string) (*client.Package, error) {
	f, err := openInput(path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	p, err := rpm.ReadPackage(f, info.Size())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	n := p.Header.NEVRA
	out := &client.Package{Name: n.Name, Version: n.Version, Release: n.Release, Arch: n.Arch, Vendor: p.Header.Vendor}
	if n.HasEpoch {
		out.Epoch = strconv.FormatUint(uint64(n.Epoch), 10)
	}
	return out, nil
}

func (a *app) testPolicy(cmd *cobra.Command, c *client.Client, q client.PolicyQuery) error {
	d, err := c.TestPolicy(cmd.Context(), q)
	if err != nil {
		return err
	}
	err = a.print(d, func(w io.Writer) {
		if d.Allowed {
			fmt.Fprintf(w, "allowed by rule %q\n", d.Rule)
		} else {
			fmt.Fprintf(w, "denied: %s\n", d.Reason)
		}
		for _, r := range d.Rules {
			fmt.Fprintf(w, "  %s\n", r)
		}
	})
	if err == nil && !d.Allowed {
		err = exit.WithCode(errors.New("the rules do not allow it"), exit.Denied)
	}
	return err
}
