package grpcapi

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"sync/atomic"
)

// TLSFiles are PEM files: the server's certificate chain and key, and the
// certificates that issue client certificates.
type TLSFiles struct {
	Certificate, Key, ClientCA string
}

// LoadTLS reads the files. The configuration speaks TLS 1.3 only and takes no
// client without a certificate that ClientCA issued. It keeps no session
// tickets: every connection proves itself anew.
func LoadTLS(f TLSFiles) (*tls.Config, error) {
	cert, err := tls.LoadX509KeyPair(f.Certificate, f.Key)
	if err != nil {
		return nil, fmt.Errorf("server certificate %s with key %s: %w", f.Certificate, f.Key, err)
	}
	pem, err := os.ReadFile(f.ClientCA)
	if err != nil {
		return nil, fmt.Errorf("client CA: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("client CA %s holds no PEM certificate", f.ClientCA)
	}
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		Certificates:           []tls.Certificate{cert},
		ClientAuth:             tls.RequireAndVerifyClientCert,
		ClientCAs:              pool,
		NextProtos:             []string{"h2"},
		SessionTicketsDisabled: true,
	}, nil
}

// TLS is a configuration that can be replaced while connections are open; they
// keep theirs. It is safe for concurrent use.
type TLS struct {
	current atomic.Pointer[tls.Config]
}

// NewTLS loads the files.
func NewTLS(f TLSFiles) (*TLS, error) {
	t := &TLS{}
	return t, t.Reload(f)
}

// Reload reads the files. On an error the old configuration stays.
func (t *TLS) Reload(f TLSFiles) error {
	c, err := LoadTLS(f)
	if err != nil {
		return err
	}
	t.current.Store(c)
	return nil
}

// Config returns what holds now.
func (t *TLS) Config() *tls.Config { return t.current.Load() }
