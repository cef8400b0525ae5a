package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/signwarden/signwarden/formats/openpgp"
	"github.com/signwarden/signwarden/gateway/client"
	"github.com/signwarden/signwarden/gateway/keys"
)

// howto is a tool, which keys it can use, and its command lines. In those, NAME is the key's
// name, URI its PKCS#11 URI and FPR the OpenPGP fingerprint.
type howto struct {
	tool   string
	format string // that the principal must be allowed, with ":namespace" for ssh-sig
	needs  func(client.Key) string
	lines  []string
}

// howtos are for a shell in a directory with the files that they name; NAME.pem is made by
// the first line of the answer. exec sets all variables, so that each stands for itself.
var howtos = []howto{
	{"gpg", "openpgp", needOpenPGP, []string{"signwarden exec -- gpg --local-user FPR --output file.sig --detach-sign file"}},
	{"git", "openpgp", needOpenPGP, []string{"signwarden exec -- git tag -s -u FPR -m v1.0 v1.0"}},
	{"rpmsign", "openpgp", needOpenPGPRPM, []string{"signwarden exec -- rpmsign --define '_gpg_name FPR' --addsign package.rpm"}},
	{"debsign", "openpgp", needOpenPGP, []string{"signwarden exec -- debsign -k FPR package.changes"}},
	{"ssh-keygen", "ssh-sig:file", needNothing, []string{
		"signwarden key export NAME --format ssh >NAME.pub",
		"signwarden exec -- ssh-keygen -Y sign -n file -f NAME.pub file",
	}},
	{"git, by SSH", "ssh-sig:git", needNothing, []string{
		"signwarden key export NAME --format ssh >NAME.pub",
		`signwarden exec -- git -c gpg.format=ssh -c user.signingkey="$PWD/NAME.pub" tag -s -m v1.0 v1.0`,
	}},
	{"gpgsm", "openpgp", needX509, []string{"signwarden execROOT -- gpgsm --local-user SHA1 --include-certs -1 --output file.p7s --detach-sign file"}},
	{"openssl cms, engine", formatPKCS11, needX509, []string{
		"signwarden exec -- openssl cms -sign -binary -engine pkcs11 -keyform engine -inkey 'URI;type=private' -signer NAME.pem -in file -outform der -out file.p7",
	}},
	{"openssl cms, provider", formatPKCS11, needX509, []string{
		"signwarden exec -- openssl cms -sign -binary -provider default -provider pkcs11 -inkey 'URI;type=private' -signer NAME.pem -in file -outform der -out file.p7",
	}},
	{"openssl dgst, engine", formatPKCS11, needP11, []string{
		"signwarden exec -- openssl dgst -sha256 -engine pkcs11 -keyform engine -sign 'URI;type=private' -out file.sig file",
	}},
	{"sign-file", formatPKCS11, needX509, []string{"signwarden exec -- sign-file sha256 'URI' NAME.pem module.ko"}},
	{"sbsign", formatPKCS11, needX509RSA, []string{
		"signwarden exec -- sbsign --engine pkcs11 --key 'URI;type=private' --cert NAME.pem --output signed.efi image.efi",
	}},
	{"systemd-sbsign", formatPKCS11, needX509RSA, []string{
		"signwarden exec -- /usr/lib/systemd/systemd-sbsign sign --private-key-source=provider:pkcs11 --private-key='URI;type=private' --certificate=NAME.pem --output=signed.efi image.efi",
	}},
	{"pesign", formatPKCS11, needX509RSA, []string{
		"mkdir nss && certutil -N -d sql:nss --empty-password",
		`signwarden exec -- sh -c 'modutil -force -dbdir sql:nss -add signwarden -libfile "$PKCS11_MODULE_PATH"'`,
		"signwarden exec -- pesign -n sql:nss -t signwarden -c NAME -i image.efi -o signed.efi -s",
	}},
	{"osslsigncode", formatPKCS11, needX509RSA, []string{
		`signwarden exec -- sh -c 'osslsigncode sign -pkcs11module "$PKCS11_MODULE_PATH" -pkcs11cert "URI;type=cert" -key "URI;type=private" -h sha256 -in image.efi -out signed.efi'`,
	}},
	{"evmctl", formatPKCS11, needX509RSA, []string{
		"signwarden exec -- evmctl ima_sign --engine pkcs11 --key 'URI;type=private' --hashalgo sha256 --sigfile --keyid-from-cert NAME.pem file",
	}},
	{"certtool", formatPKCS11, needX509, []string{
		`signwarden exec -- sh -c 'certtool --provider "$PKCS11_MODULE_PATH" --p7-detached-sign --load-certificate NAME.pem --load-privkey "URI;type=private" --hash SHA256 --infile file --outfile file.p7'`,
	}},
	{"jarsigner", formatPKCS11, needX509, []string{
		`signwarden exec -- sh -c 'printf "name = signwarden\nlibrary = %s\nslot = 1\n" "$PKCS11_MODULE_PATH"' >jar.cfg`,
		"signwarden exec -- jarsigner -keystore NONE -storetype PKCS11 -providerClass sun.security.pkcs11.SunPKCS11 -providerArg jar.cfg -storepass NONE -signedjar signed.jar file.jar NAME",
	}},
}

func needNothing(client.Key) string { return "" }

func needOpenPGP(k client.Key) string {
	if k.OpenPGP == nil {
		return "the key has no OpenPGP certificate, which is made with a key: signwarden key create NAME --openpgp-uid ..."
	}
	return ""
}

func needOpenPGPRPM(k client.Key) string {
	if k.Algorithm == keys.P256 || k.Algorithm == keys.P384 {
		return "rpm before 4.20 takes no ECDSA signatures; " + string(k.Algorithm) + " keys sign packages for newer ones by signwarden sign rpm"
	}
	return needOpenPGP(k)
}

func needP11(k client.Key) string {
	if k.Algorithm == keys.Ed25519 {
		return "p11-kit does not pass Ed25519 signatures on; RSA and NIST curves it does"
	}
	return ""
}

func needX509(k client.Key) string {
	if why := needP11(k); why != "" {
		return why
	}
	if len(k.X509) == 0 {
		return "the key has no X.509 certificate: signwarden key cert " + k.Name + " --self-signed --subject CN=" + k.Name + ", or --import"
	}
	return ""
}

func needX509RSA(k client.Key) string {
	if !strings.HasPrefix(string(k.Algorithm), "rsa") {
		return "the tool, or who verifies it, takes RSA keys only; this one is of " + string(k.Algorithm)
	}
	return needX509(k)
}

// toolJSON is what howto tells of one tool.
type toolJSON struct {
	Tool     string   `json:"tool"`
	Commands []string `json:"commands,omitempty"`
	WhyNot   string   `json:"why_not,omitempty"` // and there are no commands
}

type howtoJSON struct {
	Name    string     `json:"name"`
	Prepare []string   `json:"prepare,omitempty"`
	Tools   []toolJSON `json:"tools"`
}

// howto tells which tools can use a key, as what it is and as the rules let us.
func (a *app) howto(ctx context.Context, c *client.Client, k client.Key) error {
	out, err := howtoOf(ctx, c, k)
	if err != nil {
		return err
	}
	return a.print(out, func(io.Writer) {
		// Not in columns: these lines are to be copied.
		for _, line := range out.Prepare {
			fmt.Fprintf(a.out, "%s\n", line)
		}
		for _, t := range out.Tools {
			fmt.Fprintf(a.out, "\n# %s\n", t.Tool)
			if t.WhyNot != "" {
				fmt.Fprintf(a.out, "#   no: %s\n", t.WhyNot)
			}
			for _, line := range t.Commands {
				fmt.Fprintln(a.out, line)
			}
		}
	})
}

func howtoOf(ctx context.Context, c *client.Client, k client.Key) (howtoJSON, error) {
	fill, err := placeholders(k)
	if err != nil {
		return howtoJSON{}, err
	}
	out := howtoJSON{Name: k.Name}
	if len(k.X509) > 0 {
		out.Prepare = append(out.Prepare, fill.Replace("signwarden key export NAME --format x509 >NAME.pem"))
	}
	refused := map[string]string{} // by format
	for _, h := range howtos {
		if _, asked := refused[h.format]; !asked {
			if refused[h.format], err = refusal(ctx, c, k, h.format); err != nil {
				return howtoJSON{}, err
			}
		}
		t := toolJSON{Tool: h.tool, WhyNot: h.needs(k)}
		if t.WhyNot == "" {
			t.WhyNot = refused[h.format]
		}
		if t.WhyNot == "" {
			for _, line := range h.lines {
				t.Commands = append(t.Commands, fill.Replace(line))
			}
		}
		out.Tools = append(out.Tools, t)
	}
	// What can be done comes first.
	slices.SortStableFunc(out.Tools, func(x, y toolJSON) int { return strings.Compare(x.WhyNot, y.WhyNot) })
	return out, nil
}

// refusal is why we may not sign with a key, through an agent, in a format (and a
// namespace of it, after a colon); empty: we may.
func refusal(ctx context.Context, c *client.Client, k client.Key, format string) (string, error) {
	if k.State != keys.Enabled {
		return fmt.Sprintf("the key is %s; an administrator can change that: signwarden key enable %s", k.State, k.Name), nil
	}
	format, namespace, _ := strings.Cut(format, ":")
	d, err := c.TestPolicy(ctx, client.PolicyQuery{Key: k.Name, Action: "sign", Format: format, Namespace: namespace})
	if err != nil || d.Allowed {
		return "", err
	}
	if namespace != "" {
		return fmt.Sprintf("you may not sign with it so: a rule for you with formats: [%s] and namespaces: [%s] is needed", format, namespace), nil
	}
	return fmt.Sprintf("you may not sign with it so: a rule for you with formats: [%s] and blind: true is needed", format), nil
}

// placeholders are what stands for the key in a command line. Names of keys need no quotes.
func placeholders(k client.Key) (*strings.Replacer, error) {
	pairs := []string{"NAME", k.Name, "URI", "pkcs11:token=signwarden;object=" + k.Name}
	if k.OpenPGP != nil {
		cert, err := openpgp.ParseCertificate(k.OpenPGP.Certificate)
		if err != nil {
			return nil, fmt.Errorf("certificate of %q: %w", k.Name, err)
		}
		pairs = append(pairs, "FPR", cert.Fingerprint().String())
	}
	if len(k.X509) > 0 {
		// gpgsm signs only where its agent has the root, which for a CA's is not known here.
		root := ""
		if needsRoot(k) {
			root = " --trusted-root ROOT.pem"
		}
		pairs = append(pairs, "SHA1", x509Fingerprint(k.X509[0].Raw), "execROOT", "exec"+root)
	}
	return strings.NewReplacer(pairs...), nil
}
