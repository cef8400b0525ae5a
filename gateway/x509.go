package gateway

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"math/big"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/signwarden/signwarden/gateway/audit"
	"github.com/signwarden/signwarden/gateway/ident"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/policy"
	"github.com/signwarden/signwarden/gateway/sigerr"
	"github.com/signwarden/signwarden/gateway/store"
)

// Usage is what a certificate is for.
type Usage string

// The usages. Each has key usage digitalSignature and extended key usage
// codeSigning (RFC 5280 sections 4.2.1.3 and 4.2.1.12).
const (
	CodeSign Usage = "codesign"
	// KMod also has the extended key usage by which shim keeps a machine owner's
	// key from booting anything: it is good for kernel modules only.
	KMod Usage = "kmod"
	EFI  Usage = "efi"
)

// oidModuleSigning is 1.3.6.1.4.1.2312.16.1.2, which shim and the kernel know as
// "module signing only".
var oidModuleSigning = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 2312, 16, 1, 2}

// usages says what each usage adds to a certificate.
var usages = map[Usage]func(*x509.Certificate){
	CodeSign: func(*x509.Certificate) {},
	KMod: func(c *x509.Certificate) {
		c.UnknownExtKeyUsage = []asn1.ObjectIdentifier{oidModuleSigning}
	},
	EFI: func(*x509.Certificate) {},
}

// The bounds of certificates.
const (
	MaxChain       = 8       // certificates in a chain
	MaxCertificate = 8 << 10 // bytes of one

	// notBeforeSlack lets a machine whose clock is a little late accept a new one.
	notBeforeSlack = time.Hour
)

// X509Spec says what self-signed certificate to make.
type X509Spec struct {
	Subject pkix.Name
	Usage   Usage
	Expires time.Time // zero: 99991231235959Z, "no well-defined date" (RFC 5280 section 4.1.2.5)
}

var noExpiry = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)

// CertifyKey makes a self-signed certificate for a key and stores it as the
// key's chain, in place of an earlier one. Needs an admin rule for the key.
func (g *Gateway) CertifyKey(ctx context.Context, p ident.Principal, frontEnd, name string, spec X509Spec) (keys.Key, error) {
	return g.setChain(ctx, p, frontEnd, name, func(k *keys.Registered, now time.Time) ([][]byte, string, error) {
		add, ok := usages[spec.Usage]
		if err := checkSubject(spec.Subject); err != nil {
			return nil, "", err
		}
		switch {
		case !ok:
			return nil, "", fmt.Errorf("%w: usage %q is not codesign, kmod or efi", sigerr.Invalid, spec.Usage)
		case !spec.Expires.IsZero() && !spec.Expires.After(now):
			return nil, "", fmt.Errorf("%w: the certificate would expire at %s, which is past", sigerr.Invalid, spec.Expires.UTC().Format(time.RFC3339))
		}
		serial := make([]byte, 16)
		rand.Read(serial)
		serial[0] = serial[0]&0x7f | 0x40 // positive, and of one length
		skid := sha256.Sum256(k.Public)
		tmpl := &x509.Certificate{
			SerialNumber: new(big.Int).SetBytes(serial), Subject: spec.Subject,
			NotBefore: now.Add(-notBeforeSlack), NotAfter: spec.Expires,
			BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
			// RFC 7093 section 2, method 1, over the whole SubjectPublicKeyInfo.
			SubjectKeyId: skid[:20], AuthorityKeyId: skid[:20],
		}
		if spec.Expires.IsZero() {
			tmpl.NotAfter = noExpiry
		}
		add(tmpl)
		der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, k.PublicKey, g.signerFor(ctx, k))
		return [][]byte{der}, fmt.Sprintf("self-signed, usage %s", spec.Usage), err
	})
}

// checkSubject holds a subject to the upper bounds of RFC 5280 appendix A.1, and
// to a few values of each attribute.
func checkSubject(n pkix.Name) error {
	const maxValues = 4
	if n.CommonName == "" {
		return fmt.Errorf("%w: the subject needs a common name (CN)", sigerr.Invalid)
	}
	for _, attr := range []struct {
		name   string
		max    int
		values []string
	}{
		{"CN", 64, []string{n.CommonName}}, {"O", 64, n.Organization}, {"OU", 64, n.OrganizationalUnit},
		{"C", 2, n.Country}, {"ST", 128, n.Province}, {"L", 128, n.Locality},
	} {
		if len(attr.values) > maxValues {
			return fmt.Errorf("%w: the subject has %d values of %s; at most %d are taken", sigerr.Invalid, len(attr.values), attr.name, maxValues)
		}
		for _, v := range attr.values {
			if utf8.RuneCountInString(v) > attr.max || !utf8.ValidString(v) || strings.ContainsFunc(v, unicode.IsControl) {
				return fmt.Errorf("%w: %s must be UTF-8 of at most %d characters without control characters", sigerr.Invalid, attr.name, attr.max)
			}
		}
	}
	return nil
}

// ImportChain stores a chain that others have issued for a key: its own
// certificate first, then each one's issuer. The root may be left out. Needs an
// admin rule for the key.
func (g *Gateway) ImportChain(ctx context.Context, p ident.Principal, frontEnd, name string, chain [][]byte) (keys.Key, error) {
	return g.setChain(ctx, p, frontEnd, name, func(k *keys.Registered, now time.Time) ([][]byte, string, error) {
		return chain, "imported", checkChain(chain, k.PublicKey, now)
	})
}

// checkChain refuses a chain that is not for pub or that does not hold together.
func checkChain(chain [][]byte, pub crypto.PublicKey, now time.Time) error {
	if len(chain) == 0 || len(chain) > MaxChain {
		return fmt.Errorf("%w: the chain has %d certificates; it must have 1 to %d", sigerr.Invalid, len(chain), MaxChain)
	}
	certs := make([]*x509.Certificate, len(chain))
	for i, der := range chain {
		if len(der) > MaxCertificate {
			return fmt.Errorf("%w: certificate %d has %d bytes; at most %d are taken", sigerr.Invalid, i+1, len(der), MaxCertificate)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return fmt.Errorf("%w: certificate %d: %w", sigerr.Invalid, i+1, err)
		}
		certs[i] = c
	}
	if k, ok := pub.(interface{ Equal(crypto.PublicKey) bool }); !ok || !k.Equal(certs[0].PublicKey) {
		return fmt.Errorf("%w: the first certificate (%s) is of another public key", sigerr.Invalid, certs[0].Subject)
	}
	if now.After(certs[0].NotAfter) {
		return fmt.Errorf("%w: the certificate expired at %s", sigerr.Invalid, certs[0].NotAfter.Format(time.RFC3339))
	}
	for i, c := range certs[:len(certs)-1] {
		if err := c.CheckSignatureFrom(certs[i+1]); err != nil {
			return fmt.Errorf("%w: certificate %d (%s) is not issued by the next (%s): %w", sigerr.Invalid, i+1, c.Subject, certs[i+1].Subject, err)
		}
	}
	return nil
}

// CSR makes a certificate signing request (PKCS #10, RFC 2986) for a key. Needs
// an admin rule for the key.
func (g *Gateway) CSR(ctx context.Context, p ident.Principal, frontEnd, name string, subject pkix.Name) ([]byte, error) {
	a, k, err := g.beginX509(ctx, p, "key.csr", frontEnd, name)
	if err != nil {
		return nil, err
	}
	if err := checkSubject(subject); err != nil {
		return nil, g.fail(a, audit.Denied, err)
	}
	a.e.Detail = clip("subject " + subject.String())
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: subject}, g.signerFor(ctx, k))
	if err != nil {
		_, err = g.refuse(a.e, audit.Failed, tokenError(err), err.Error())
		return nil, err
	}
	a.e.Outcome = audit.Done
	if _, err := g.audit.Append(a.e); err != nil {
		return nil, g.unrecorded(err)
	}
	return der, nil
}

// beginX509 opens an act on a key that the caller administers.
func (g *Gateway) beginX509(ctx context.Context, p ident.Principal, action, frontEnd, name string) (act, *keys.Registered, error) {
	a, err := g.begin(ctx, p, action, name, frontEnd)
	if err != nil {
		return a, nil, err
	}
	k, d, err := a.s.manage(p, name, policy.Admin, a.e.Time)
	a.e.Rule = d.Rule
	if err == nil && k.State != keys.Enabled {
		err = fmt.Errorf("%w: %s; enable it first", sigerr.Disabled, name)
	}
	if err != nil {
		return a, nil, g.fail(a, audit.Denied, err)
	}
	a.e.KeyFingerprint = k.Fingerprint()
	return a, k, nil
}

// setChain opens an act, has make produce the chain, and stores it.
func (g *Gateway) setChain(ctx context.Context, p ident.Principal, frontEnd, name string,
	make func(*keys.Registered, time.Time) (chain [][]byte, detail string, err error),
) (keys.Key, error) {
	a, k, err := g.beginX509(ctx, p, "key.cert", frontEnd, name)
	if err != nil {
		return keys.Key{}, err
	}
	chain, detail, err := make(k, a.e.Time)
	if sigerr.Kind(err) == sigerr.Invalid {
		return keys.Key{}, g.fail(a, audit.Denied, err)
	}
	if err != nil {
		_, err = g.refuse(a.e, audit.Failed, tokenError(err), err.Error())
		return keys.Key{}, err
	}
	sum := sha256.Sum256(chain[0])
	a.e.Detail = fmt.Sprintf("%s, %d certificates, the first with sha256 %x", detail, len(chain), sum)
	g.admin.Lock()
	defer g.admin.Unlock()
	// Asked again: another administrator may have been faster.
	if _, _, err := g.snap.Load().manage(p, name, policy.Admin, a.e.Time); err != nil {
		return keys.Key{}, g.fail(a, audit.Denied, err)
	}
	err = g.commit(ctx, a, store.Change{SetX509: &store.SetX509{Name: name, Chain: chain}}, func(s *snapshot) bool {
		now := s.keys.Get(name)
		return now != nil && len(now.X509) > 0 && string(now.X509[0]) == string(chain[0])
	})
	if err != nil {
		return keys.Key{}, err
	}
	return g.snap.Load().keys.Get(name).Key, nil
}

// signerFor is a crypto.Signer for certificates of a registered key.
func (g *Gateway) signerFor(ctx context.Context, k *keys.Registered) crypto.Signer {
	return &tokenSigner{ctx: ctx, token: g.c.Token, id: k.ID, algorithm: k.Algorithm, public: k.PublicKey}
}
