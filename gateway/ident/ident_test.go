package ident_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/signwarden/signwarden/gateway/ident"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

var notAfter = time.Date(2027, 6, 1, 12, 0, 0, 0, time.UTC)

// certificate makes a self-signed one. The URIs are put in as they are, past
// the checks of crypto/x509's maker, as a careless or hostile CA would.
func certificate(t *testing.T, cn string, uris ...string) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: cn},
		NotBefore: notAfter.AddDate(-1, 0, 0), NotAfter: notAfter,
		DNSNames: []string{},
	}
	if len(uris) > 0 {
		var names []asn1.RawValue
		for _, u := range uris {
			names = append(names, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(u)})
		}
		der, err := asn1.Marshal(names)
		if err != nil {
			t.Fatal(err)
		}
		tmpl.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: der}}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatalf("crypto/x509 does not parse it, so it never comes so far: %v", err)
	}
	return c
}

func verified(chain ...*x509.Certificate) tls.ConnectionState {
	return tls.ConnectionState{PeerCertificates: chain, VerifiedChains: [][]*x509.Certificate{chain}}
}

func TestFromTLS(t *testing.T) {
	tests := []struct {
		name, cn string
		uris     []string
		want     string // "" : refused
	}{
		{"common name", "alice", nil, "alice"},
		{"common name with an @", "alice@example.org", nil, "alice@example.org"},
		{"a SPIFFE id before the common name", "alice", []string{"spiffe://td.example/ci/build"}, "spiffe://td.example/ci/build"},
		{"a SPIFFE id alone", "", []string{"spiffe://td/x"}, "spiffe://td/x"},
		{"a trust domain", "", []string{"spiffe://td"}, "spiffe://td"},
		{"every character of a segment", "", []string{"spiffe://t-d_1.x/Az09.-_/..."}, "spiffe://t-d_1.x/Az09.-_/..."},

		{"empty common name", "", nil, ""},
		{"common name like a SPIFFE id", "spiffe://td/x", nil, ""},
		{"common name like a glob", "*", nil, ""},
		{"common name of two words", "alice smith", nil, ""},
		{"common name with a newline", "alice\n", nil, ""},
		{"common name with a letter that looks like another", "аlice", nil, ""},
		{"common name too long", strings.Repeat("a", 129), nil, ""},
		{"http URI", "alice", []string{"http://td/x"}, ""},
		{"two SPIFFE ids", "alice", []string{"spiffe://td/x", "spiffe://td/y"}, ""},
		{"the same id twice", "alice", []string{"spiffe://td/x", "spiffe://td/x"}, ""},
		{"a SPIFFE id and another URI", "alice", []string{"spiffe://td/x", "https://td/x"}, ""},
		{"glob in the path", "alice", []string{"spiffe://td/*"}, ""},
		{"brackets in the path", "alice", []string{"spiffe://td/[a]"}, ""},
		{"backslash", "alice", []string{`spiffe://td/a\b`}, ""},
		{"query", "alice", []string{"spiffe://td/x?y"}, ""},
		{"empty query", "alice", []string{"spiffe://td/x?"}, ""},
		{"no trust domain", "alice", []string{"spiffe:///x"}, ""},
		{"no authority", "alice", []string{"spiffe:td/x"}, ""},
		{"only a scheme", "alice", []string{"spiffe:"}, ""},
		{"user", "alice", []string{"spiffe://root@td/x"}, ""},
		{"port", "alice", []string{"spiffe://td:443/x"}, ""},
		{"fragment", "alice", []string{"spiffe://td/x#y"}, ""},
		{"upper case trust domain", "alice", []string{"spiffe://TD/x"}, ""},
		{"percent-encoded", "alice", []string{"spiffe://td/%78"}, ""},
		{"percent-encoded slash", "alice", []string{"spiffe://td/a%2Fb"}, ""},
		{"empty segment", "alice", []string{"spiffe://td//x"}, ""},
		{"slash at the end", "alice", []string{"spiffe://td/x/"}, ""},
		{"only a slash", "alice", []string{"spiffe://td/"}, ""},
		{"dot segment", "alice", []string{"spiffe://td/./x"}, ""},
		{"parent segment", "alice", []string{"spiffe://td/a/../x"}, ""},
		{"too long", "alice", []string{"spiffe://td/" + strings.Repeat("a", 2048)}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := certificate(t, tt.cn, tt.uris...)
			p, err := ident.FromTLS(verified(c))
			if tt.want == "" {
				if !errors.Is(err, sigerr.Unauthenticated) || p != (ident.Principal{}) {
					t.Fatalf("FromTLS = %q, %v; want nobody and Unauthenticated", p.Name(), err)
				}
				return
			}
			if err != nil || p.Name() != tt.want {
				t.Fatalf("FromTLS = %q, %v; want %q", p.Name(), err, tt.want)
			}
			sum := sha256.Sum256(c.Raw)
			if want := "mtls:" + hex.EncodeToString(sum[:]); p.Via() != want {
				t.Errorf("via %q, want %q", p.Via(), want)
			}
		})
	}
}

// Only what crypto/tls verified counts, and of that the leaf.
func TestFromTLSTakesTheVerifiedLeaf(t *testing.T) {
	leaf, issuer, other := certificate(t, "alice"), certificate(t, "ca"), certificate(t, "mallory")
	for name, cs := range map[string]tls.ConnectionState{
		"nothing":      {},
		"not verified": {PeerCertificates: []*x509.Certificate{leaf}},
		"empty chain":  {PeerCertificates: []*x509.Certificate{leaf}, VerifiedChains: [][]*x509.Certificate{{}}},
	} {
		if p, err := ident.FromTLS(cs); !errors.Is(err, sigerr.Unauthenticated) || p != (ident.Principal{}) {
			t.Errorf("%s: FromTLS = %q, %v; want nobody and Unauthenticated", name, p.Name(), err)
		}
	}
	cs := verified(leaf, issuer)
	cs.PeerCertificates = []*x509.Certificate{other}
	if p, err := ident.FromTLS(cs); err != nil || p.Name() != "alice" {
		t.Errorf("FromTLS = %q, %v; want alice", p.Name(), err)
	}
}

func TestCheck(t *testing.T) {
	fromTLS, err := ident.FromTLS(verified(certificate(t, "alice")))
	if err != nil {
		t.Fatal(err)
	}
	local, err := ident.FromPeer(1000, "bob")
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name string
		p    ident.Principal
		now  time.Time
		want string // "": passes
	}{
		{"nobody", ident.Principal{}, notAfter, "no identity"},
		{"certificate that holds", fromTLS, notAfter.AddDate(0, -1, 0), ""},
		{"in its last second", fromTLS, notAfter, ""},
		{"expired", fromTLS, notAfter.Add(time.Second), `"alice" expired at 2027-06-01T12:00:00Z`},
		{"local peer", local, notAfter.AddDate(100, 0, 0), ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.p.Check(tt.now)
			if tt.want == "" && err != nil {
				t.Fatal(err)
			}
			if tt.want != "" && (!errors.Is(err, sigerr.Unauthenticated) || !strings.Contains(err.Error(), tt.want)) {
				t.Fatalf("error %v, want Unauthenticated: ...%s", err, tt.want)
			}
		})
	}
}

func TestFromPeer(t *testing.T) {
	p, err := ident.FromPeer(4294967294, "local-builds")
	if err != nil || p.Name() != "local-builds" || p.Via() != "unix:4294967294" {
		t.Errorf("FromPeer = %q via %q, %v", p.Name(), p.Via(), err)
	}
	for _, name := range []string{"", "*", "spiffe://td/x", "a b", "-a", "a/b", "a\n", strings.Repeat("a", 129)} {
		if p, err := ident.FromPeer(0, name); !errors.Is(err, sigerr.Invalid) || p != (ident.Principal{}) {
			t.Errorf("FromPeer(%q) = %q, %v; want nobody and Invalid", name, p.Name(), err)
		}
	}
}

func TestCheckName(t *testing.T) {
	for name, want := range map[string]bool{
		"a": true, "0": true, "A.b_c@d-e": true, strings.Repeat("a", 128): true,
		"": false, "@a": false, ".a": false, "a:b": false, "a[b]": false, "a?": false, `a\`: false, "é": false, "a\x00": false,
		strings.Repeat("a", 129): false,
	} {
		if err := ident.CheckName(name); (err == nil) != want || err != nil && !errors.Is(err, sigerr.Invalid) {
			t.Errorf("CheckName(%q) = %v, want ok %v", name, err, want)
		}
	}
}
