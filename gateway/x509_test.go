package gateway_test

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/signwarden/signwarden/gateway"
	"github.com/signwarden/signwarden/gateway/audit"
	"github.com/signwarden/signwarden/gateway/gatewaytest"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
	"github.com/signwarden/signwarden/gateway/store"
)

func subject(cn string) pkix.Name {
	return pkix.Name{CommonName: cn, Organization: []string{"Example"}}
}

func TestCertifyKey(t *testing.T) {
	f := gatewaytest.New(t, "")
	for _, a := range []keys.Algorithm{keys.RSA2048, keys.P256, keys.P384, keys.Ed25519} {
		for _, usage := range []gateway.Usage{gateway.CodeSign, gateway.KMod, gateway.EFI} {
			name := string(a) + "-" + string(usage)
			k := f.Key(t, name, a)
			k, err := f.CertifyKey(t.Context(), f.Root, "test", name, gateway.X509Spec{Subject: subject(name), Usage: usage})
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			c, err := x509.ParseCertificate(k.X509[0])
			if err != nil {
				t.Fatal(err)
			}
			if err := c.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if string(c.RawSubjectPublicKeyInfo) != string(k.Public) || c.Subject.CommonName != name || c.IsCA ||
				c.KeyUsage != x509.KeyUsageDigitalSignature || c.NotAfter.Year() != 9999 || len(c.SubjectKeyId) != 20 {
				t.Errorf("%s: certificate %+v", name, c)
			}
			if got := len(c.UnknownExtKeyUsage); (got == 1) != (usage == gateway.KMod) {
				t.Errorf("%s: %d unknown extended key usages", name, got)
			}
			e := f.Store.Last(t)
			if e.Action != "key.cert" || e.Outcome != audit.Done || e.Key != name || !strings.Contains(e.Detail, "self-signed") {
				t.Errorf("audit entry %+v", e)
			}
		}
	}
}

// issue makes a certificate of pub by a CA of the test's own.
func issue(t *testing.T, pub crypto.PublicKey, change func(*x509.Certificate)) (leaf, ca []byte) {
	t.Helper()
	token := gatewaytest.NewToken()
	caPub, err := token.Generate(t.Context(), "", []byte{1}, "p256")
	if err != nil {
		t.Fatal(err)
	}
	signer := token.Signer([]byte{1})
	caTmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: subject("CA"), NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	ca, err = x509.CreateCertificate(rand.Reader, caTmpl, caTmpl, caPub, signer)
	if err != nil {
		t.Fatal(err)
	}
	caCert, err := x509.ParseCertificate(ca)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: subject("leaf"), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	change(tmpl)
	leaf, err = x509.CreateCertificate(rand.Reader, tmpl, caCert, pub, signer)
	if err != nil {
		t.Fatal(err)
	}
	return leaf, ca
}

func publicKey(t *testing.T, k keys.Key) crypto.PublicKey {
	t.Helper()
	pub, err := x509.ParsePKIXPublicKey(k.Public)
	if err != nil {
		t.Fatal(err)
	}
	return pub
}

// A request that the gateway makes, a certificate issued from it, its chain imported.
func TestCSRAndImport(t *testing.T) {
	f := gatewaytest.New(t, twoTeams)
	f.Key(t, "a-1", keys.RSA2048)
	der, err := f.CSR(t.Context(), f.Root, "test", "a-1", subject("a-1"))
	if err != nil {
		t.Fatal(err)
	}
	if e := f.Store.Last(t); e.Action != "key.csr" || e.Outcome != audit.Done || !strings.Contains(e.Detail, "CN=a-1") {
		t.Errorf("audit entry %+v", e)
	}
	req, err := x509.ParseCertificateRequest(der)
	if err != nil {
		t.Fatal(err)
	}
	if err := req.CheckSignature(); err != nil {
		t.Error(err)
	}
	same := func(*x509.Certificate) {}
	leaf, ca := issue(t, req.PublicKey, same)
	k, err := f.ImportChain(t.Context(), f.Root, "test", "a-1", [][]byte{leaf, ca})
	if err != nil || len(k.X509) != 2 {
		t.Fatalf("got %d certificates, %v", len(k.X509), err)
	}
	otherLeaf, otherCA := issue(t, publicKey(t, f.Key(t, "a-2", keys.P256)), same)
	expired, expiredCA := issue(t, req.PublicKey, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })
	for _, tt := range []struct {
		name  string
		who   string
		chain [][]byte
		want  error
		says  string
	}{
		{"another key's", "root", [][]byte{otherLeaf, otherCA}, sigerr.Invalid, "another public key"},
		{"not issued by the next", "root", [][]byte{leaf, otherCA}, sigerr.Invalid, "not issued by the next"},
		{"order", "root", [][]byte{ca, leaf}, sigerr.Invalid, "another public key"},
		{"expired", "root", [][]byte{expired, expiredCA}, sigerr.Invalid, "expired"},
		{"empty", "root", nil, sigerr.Invalid, "0 certificates"},
		{"garbage", "root", [][]byte{{1, 2, 3}}, sigerr.Invalid, "certificate 1"},
		{"too long", "root", make([][]byte, 9), sigerr.Invalid, "9 certificates"},
		{"too large", "root", [][]byte{make([]byte, 9<<10)}, sigerr.Invalid, "bytes"},
		{"not an administrator", "alice", [][]byte{leaf, ca}, sigerr.Denied, "admin"},
		{"another's", "bob", [][]byte{leaf, ca}, sigerr.NotFound, "no such key"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := f.ImportChain(t.Context(), gatewaytest.Principal(t, tt.who), "test", "a-1", tt.chain)
			if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("got %v, want %v that says %q", err, tt.want, tt.says)
			}
			if e := f.Store.Last(t); e.Action != "key.cert" || e.Outcome != audit.Denied {
				t.Errorf("audit entry %+v", e)
			}
			v, err := f.Gateway.Key(t.Context(), f.Root, "a-1")
			if err != nil || len(v.X509) != 2 || string(v.X509[0]) != string(leaf) {
				t.Errorf("the chain changed (%v)", err)
			}
		})
	}
}

func TestCertifyKeyRefused(t *testing.T) {
	f := gatewaytest.New(t, twoTeams)
	f.Key(t, "a-1", keys.P256)
	good := gateway.X509Spec{Subject: subject("x"), Usage: gateway.CodeSign}
	edit := func(change func(*gateway.X509Spec)) gateway.X509Spec { s := good; change(&s); return s }
	for _, tt := range []struct {
		name, who string
		spec      gateway.X509Spec
		want      error
	}{
		{"not an administrator", "alice", good, sigerr.Denied},
		{"usage", "root", edit(func(s *gateway.X509Spec) { s.Usage = "tls" }), sigerr.Invalid},
		{"no name", "root", edit(func(s *gateway.X509Spec) { s.Subject = pkix.Name{} }), sigerr.Invalid},
		{"long name", "root", edit(func(s *gateway.X509Spec) { s.Subject.CommonName = strings.Repeat("x", 65) }), sigerr.Invalid},
		{"control character", "root", edit(func(s *gateway.X509Spec) { s.Subject.Organization = []string{"a\nb"} }), sigerr.Invalid},
		{"many values", "root", edit(func(s *gateway.X509Spec) { s.Subject.Organization = make([]string, 5) }), sigerr.Invalid},
		{"expired", "root", edit(func(s *gateway.X509Spec) { s.Expires = time.Now().Add(-time.Hour) }), sigerr.Invalid},
	} {
		before := f.Token.Signs()
		_, err := f.CertifyKey(t.Context(), gatewaytest.Principal(t, tt.who), "test", "a-1", tt.spec)
		if !errors.Is(err, tt.want) || f.Token.Signs() != before {
			t.Errorf("%s: got %v and %d signatures, want %v and none", tt.name, err, f.Token.Signs()-before, tt.want)
		}
	}
	if _, err := f.SetKeyState(t.Context(), f.Root, "test", "a-1", keys.Disabled); err != nil {
		t.Fatal(err)
	}
	if _, err := f.CertifyKey(t.Context(), f.Root, "test", "a-1", good); !errors.Is(err, sigerr.Disabled) {
		t.Errorf("a disabled key: got %v, want Disabled", err)
	}
	if _, err := f.CSR(t.Context(), f.Root, "test", "a-1", good.Subject); !errors.Is(err, sigerr.Disabled) {
		t.Errorf("a request for a disabled key: got %v, want Disabled", err)
	}
}

// A token that lies makes no certificate; a store that fails keeps the old one.
func TestCertifyKeyFaults(t *testing.T) {
	f := gatewaytest.New(t, "")
	f.Key(t, "k", keys.Ed25519)
	spec := gateway.X509Spec{Subject: subject("k"), Usage: gateway.CodeSign}
	f.Token.After = func(sig []byte) []byte { sig[0] ^= 1; return sig }
	if _, err := f.CertifyKey(t.Context(), f.Root, "test", "k", spec); !errors.Is(err, sigerr.TokenFailed) {
		t.Errorf("a lying token: got %v, want a token failure", err)
	}
	f.Token.After = nil
	boom := errors.New("disk full")
	f.Store.SetFail(func(store.Change) (error, error) { return boom, nil }, nil)
	if _, err := f.CertifyKey(t.Context(), f.Root, "test", "k", spec); !errors.Is(err, sigerr.Unavailable) {
		t.Errorf("a full disk: got %v, want Unavailable", err)
	}
	f.Store.SetFail(nil, nil)
	if v, err := f.Gateway.Key(t.Context(), f.Root, "k"); err != nil || v.X509 != nil {
		t.Errorf("got %d certificates, %v; want none", len(v.X509), err)
	}
}
