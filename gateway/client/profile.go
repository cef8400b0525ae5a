package client

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"

	"github.com/goccy/go-yaml"
)

// Profile is a client's configuration file. Paths are relative to the file.
type Profile struct {
	// Address of the gateway, host:port.
	Address string `yaml:"address"`
	// Replicas are the addresses of more gateways with the same keys.
	Replicas []string `yaml:"replicas,omitempty"`
	// CA that issued the gateway's certificate, PEM.
	CA string `yaml:"ca"`
	// Certificate chain and private key of this client, PEM.
	Certificate string `yaml:"certificate"`
	Key         string `yaml:"key"`
	// ServerName to expect in the certificate of every gateway; empty: the host
	// of its address.
	ServerName string `yaml:"server_name,omitempty"`
}

// LoadProfile reads a profile and the files it names. Errors name the file.
func LoadProfile(path string) (Config, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("client profile: %w", err)
	}
	var p Profile
	dec := yaml.NewDecoder(bytes.NewReader(b), yaml.Strict())
	if err := dec.Decode(&p); err != nil && !errors.Is(err, io.EOF) {
		return Config{}, fmt.Errorf("client profile %s: %s", path, yaml.FormatError(err, false, true))
	}
	if err := dec.Decode(&Profile{}); !errors.Is(err, io.EOF) {
		return Config{}, fmt.Errorf("client profile %s: a second YAML document follows the first", path)
	}
	seen := map[string]bool{}
	for i, a := range append([]string{p.Address}, p.Replicas...) {
		field := "address"
		if i > 0 {
			field = "replicas"
		}
		if host, _, err := net.SplitHostPort(a); err != nil || host == "" {
			return Config{}, fmt.Errorf("client profile %s: %s: %q is not host:port", path, field, a)
		}
		if seen[a] {
			return Config{}, fmt.Errorf("client profile %s: %s: %q is there twice", path, field, a)
		}
		seen[a] = true
	}
	at := func(name string) string {
		if filepath.IsAbs(name) {
			return name
		}
		return filepath.Join(filepath.Dir(path), name)
	}
	for _, f := range []struct{ field, name string }{{"ca", p.CA}, {"certificate", p.Certificate}, {"key", p.Key}} {
		if f.name == "" {
			return Config{}, fmt.Errorf("client profile %s: %s is missing", path, f.field)
		}
	}
	pem, err := os.ReadFile(at(p.CA))
	if err != nil {
		return Config{}, fmt.Errorf("client profile %s: ca: %w", path, err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return Config{}, fmt.Errorf("client profile %s: ca: %s holds no PEM certificate", path, at(p.CA))
	}
	cert, err := tls.LoadX509KeyPair(at(p.Certificate), at(p.Key))
	if err != nil {
		return Config{}, fmt.Errorf("client profile %s: certificate %s with key %s: %w", path, at(p.Certificate), at(p.Key), err)
	}
	return Config{
		Address: p.Address, Replicas: p.Replicas,
		TLS: &tls.Config{
			// ServerName empty: gRPC expects the host of the address it dials.
			MinVersion: tls.VersionTLS13, RootCAs: roots, ServerName: p.ServerName,
			// Not Certificates: those are left out where the server's list of
			// issuers lacks ours, and "certificate required" would be all one
			// is told. Sent always, a foreign one is refused as such.
			GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil },
		},
	}, nil
}
