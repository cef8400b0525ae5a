package client_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/signwarden/signwarden/gateway/client"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// files writes a certificate that signs itself, and its key.
func files(t *testing.T, dir, name string, uris ...*url.URL) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, URIs: uris, NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(dir, name+".crt"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	writeFile(t, filepath.Join(dir, name+".key"), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})))
}

func TestLoadProfile(t *testing.T) {
	dir := t.TempDir()
	spiffe := &url.URL{Scheme: "spiffe", Host: "example.org", Path: "/build"}
	files(t, dir, "ca")
	files(t, dir, "client", spiffe)
	files(t, dir, "other")
	writeFile(t, filepath.Join(dir, "empty.crt"), "")
	const rest = "ca: ca.crt\ncertificate: client.crt\nkey: client.key\n"
	for _, tt := range []struct {
		name, text string
		says       []string // nil: it is fine
	}{
		{"relative", "address: gateway.example:7443\n" + rest, nil},
		{"absolute", "address: gateway.example:7443\nca: " + dir + "/ca.crt\ncertificate: client.crt\nkey: " + dir + "/client.key\n", nil},
		{"empty", "", []string{"address"}},
		{"no port", "address: gateway.example\n" + rest, []string{"address", `"gateway.example"`}},
		{"no host", "address: :7443\n" + rest, []string{"address", `":7443"`}},
		{"no address", rest, []string{"address"}},
		{"replicas", "address: gateway.example:7443\nreplicas: [b.example:7443, \"[::1]:7443\"]\n" + rest, nil},
		{"a replica without a port", "address: a:1\nreplicas: [b]\n" + rest, []string{"replicas", `"b"`}},
		{"an empty replica", "address: a:1\nreplicas: [\"\"]\n" + rest, []string{"replicas", `""`}},
		{"a replica twice", "address: a:1\nreplicas: [b:1, a:1]\n" + rest, []string{"replicas", `"a:1"`, "twice"}},
		{"no ca", "address: a:1\ncertificate: client.crt\nkey: client.key\n", []string{"ca is missing"}},
		{"no certificate", "address: a:1\nca: ca.crt\nkey: client.key\n", []string{"certificate is missing"}},
		{"no key", "address: a:1\nca: ca.crt\ncertificate: client.crt\n", []string{"key is missing"}},
		{"neither", "address: a:1\nkey: client.key\n", []string{"ca is missing"}},
		{"an unknown field", "address: a:1\nadress: b:1\n" + rest, []string{"adress"}},
		{"a field twice", "address: a:1\naddress: b:1\n" + rest, []string{"address"}},
		{"a second document", "address: a:1\n" + rest + "---\naddress: b:1\n", []string{"second"}},
		{"not YAML", "address: [\n", []string{""}},
		{"a list", "- address\n", []string{""}},
		{"no ca file", "address: a:1\nca: none.crt\ncertificate: client.crt\nkey: client.key\n", []string{"ca", filepath.Join(dir, "none.crt")}},
		{"an empty ca file", "address: a:1\nca: empty.crt\ncertificate: client.crt\nkey: client.key\n", []string{"ca", filepath.Join(dir, "empty.crt")}},
		{"no certificate file", "address: a:1\nca: ca.crt\ncertificate: none.crt\nkey: client.key\n", []string{"certificate", filepath.Join(dir, "none.crt")}},
		{"another's key", "address: a:1\nca: ca.crt\ncertificate: client.crt\nkey: other.key\n", []string{"key", filepath.Join(dir, "other.key")}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(dir, "client.yaml")
			writeFile(t, path, tt.text)
			c, err := client.LoadProfile(path)
			if tt.says != nil {
				if err == nil {
					t.Fatal("no error")
				}
				for _, says := range append(tt.says, path) {
					if !strings.Contains(err.Error(), says) {
						t.Errorf("got %v, want it to say %q", err, says)
					}
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			// The server's name is left to gRPC, which knows the address it dials.
			if c.Address != "gateway.example:7443" || c.TLS.ServerName != "" || len(c.Replicas) != 2*strings.Count(tt.text, "replicas") {
				t.Errorf("address %q, replicas %q, server name %q", c.Address, c.Replicas, c.TLS.ServerName)
			}
			cert, err := c.TLS.GetClientCertificate(nil)
			if err != nil {
				t.Fatal(err)
			}
			if got := cert.Leaf.URIs; len(got) != 1 || got[0].String() != spiffe.String() {
				t.Errorf("certificate with URIs %v, want %v", got, spiffe)
			}
		})
	}

	path := filepath.Join(dir, "named.yaml")
	writeFile(t, path, "address: 192.0.2.1:7443\nserver_name: gateway.example\n"+rest)
	c, err := client.LoadProfile(path)
	if err != nil || c.TLS.ServerName != "gateway.example" {
		t.Errorf("got %v; want the server name of the profile", err)
	}
	missing := filepath.Join(dir, "none.yaml")
	if _, err := client.LoadProfile(missing); err == nil || !strings.Contains(err.Error(), missing) {
		t.Errorf("no profile: got %v, want an error that names it", err)
	}
}

func TestDialNeeds(t *testing.T) {
	if _, err := client.Dial(client.Config{Address: "a:1"}); err == nil {
		t.Error("a client without TLS was made")
	}
	if _, err := client.Dial(client.Config{}); err == nil {
		t.Error("a client without an address was made")
	}
}
