package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/gateway/client"
	"github.com/signwarden/signwarden/gateway/ident"
)

// How long what init makes is valid. A profile is easily made again.
const (
	caLife     = 10 * 365 * 24 * time.Hour
	serverLife = 825 * 24 * time.Hour
	clientLife = 825 * 24 * time.Hour
)

// authority is a private CA: it issues the server's and the clients'
// certificates of one gateway, and nothing else.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority() (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: "Signwarden private CA"},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(caLife),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return &authority{cert, key}, err
}

func loadAuthority(certFile, keyFile string) (*authority, error) {
	cert, err := readPEM(certFile, "CERTIFICATE")
	if err != nil {
		return nil, err
	}
	key, err := readPEM(keyFile, "PRIVATE KEY")
	if err != nil {
		return nil, err
	}
	a := &authority{}
	if a.cert, err = x509.ParseCertificate(cert); err != nil {
		return nil, fmt.Errorf("%s: %w", certFile, err)
	}
	k, err := x509.ParsePKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", keyFile, err)
	}
	var ok bool
	if a.key, ok = k.(*ecdsa.PrivateKey); !ok || !a.key.PublicKey.Equal(a.cert.PublicKey) {
		return nil, fmt.Errorf("%s is not the key of %s", keyFile, certFile)
	}
	return a, nil
}

func readPEM(path, kind string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != kind {
		return nil, fmt.Errorf("%s does not begin with a PEM %s", path, kind)
	}
	return block.Bytes, nil
}

func serial() *big.Int {
	b := make([]byte, 16)
	rand.Read(b)
	b[0] &= 0x7f // positive, RFC 5280 section 4.1.2.2
	return new(big.Int).SetBytes(b)
}

// save writes the CA as certFile and keyFile.
func (a *authority) save(certFile, keyFile string) error {
	return savePair(a.cert.Raw, a.key, certFile, keyFile)
}

// issueServer writes a certificate for the given host names and addresses.
func (a *authority) issueServer(hosts []string, certFile, keyFile string) error {
	tmpl := &x509.Certificate{
		Subject:     pkix.Name{CommonName: "signwardend"},
		NotAfter:    time.Now().Add(serverLife),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			tmpl.IPAddresses = append(tmpl.IPAddresses, ip)
		} else {
			tmpl.DNSNames = append(tmpl.DNSNames, h)
		}
	}
	return a.issue(tmpl, certFile, keyFile)
}

// issueClient writes a certificate that makes its holder the principal name.
func (a *authority) issueClient(name string, life time.Duration, certFile, keyFile string) error {
	return a.issue(&x509.Certificate{
		Subject:     pkix.Name{CommonName: name},
		NotAfter:    time.Now().Add(life),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, certFile, keyFile)
}

func (a *authority) issue(tmpl *x509.Certificate, certFile, keyFile string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	tmpl.SerialNumber, tmpl.NotBefore = serial(), time.Now().Add(-time.Minute)
	tmpl.KeyUsage, tmpl.BasicConstraintsValid = x509.KeyUsageDigitalSignature, true
	if tmpl.NotAfter.After(a.cert.NotAfter) {
		tmpl.NotAfter = a.cert.NotAfter
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, key.Public(), a.key)
	if err != nil {
		return err
	}
	return savePair(der, key, certFile, keyFile)
}

func savePair(cert []byte, key *ecdsa.PrivateKey, certFile, keyFile string) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	if err := writeNew(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600); err != nil {
		return err
	}
	return writeNew(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), 0o644)
}

// writeNew writes a file that must not exist.
func writeNew(path string, b []byte, mode os.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Close())
}

// The files of a gateway's directory, beside its configuration.
const (
	caCertFile     = "tls/ca.crt"
	caKeyFile      = "tls/ca.key"
	serverCertFile = "tls/server.crt"
	serverKeyFile  = "tls/server.key"
	clientsDir     = "clients"
	profileFile    = "client.yaml"
)

// createProfile issues D/clients/NAME: a certificate, its key, the CA's
// certificate, and the profile that names them. On an error nothing stays.
func createProfile(dir, name, address string, ca *authority, life time.Duration) (path string, err error) {
	if err := ident.CheckName(name); err != nil {
		return "", err
	}
	d := filepath.Join(dir, clientsDir, name)
	if err := os.MkdirAll(filepath.Dir(d), 0o700); err != nil {
		return "", err
	}
	err = os.Mkdir(d, 0o700)
	if errors.Is(err, os.ErrExist) {
		return "", exit.Hint(fmt.Errorf("the client profile %s exists", d), "choose another name, or remove the directory to issue this one anew")
	}
	if err != nil {
		return "", err
	}
	defer func() {
		if err != nil {
			os.RemoveAll(d)
		}
	}()
	if err := ca.issueClient(name, life, filepath.Join(d, "client.crt"), filepath.Join(d, "client.key")); err != nil {
		return "", err
	}
	caPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw})
	if err := writeNew(filepath.Join(d, "ca.crt"), caPEM, 0o644); err != nil {
		return "", err
	}
	b, err := yaml.Marshal(client.Profile{Address: address, CA: "ca.crt", Certificate: "client.crt", Key: "client.key"})
	if err != nil {
		return "", err
	}
	path = filepath.Join(d, profileFile)
	return path, writeNew(path, b, 0o600)
}
