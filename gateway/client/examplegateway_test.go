package client_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"log"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/signwarden/signwarden/gateway"
	"github.com/signwarden/signwarden/gateway/gatewaytest"
	"github.com/signwarden/signwarden/gateway/grpcapi"
	"github.com/signwarden/signwarden/gateway/ident"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/store"
)

// gatewayWithKey serves a gateway with a key in memory, RSA-2048, and returns a
// client profile for it. The examples have no testing.T.
func gatewayWithKey(name string) (profile string, stop func()) {
	dir := must(os.MkdirTemp("", "sw"))
	issue := authorityIn(dir)
	issue("gateway", x509.ExtKeyUsageServerAuth)
	issue("root", x509.ExtKeyUsageClientAuth)
	g := must(gateway.New(context.Background(), gateway.Config{
		Store: &gatewaytest.Store{State: store.State{Policy: []byte(gatewaytest.Policy)}}, Token: gatewaytest.NewToken(), TokenLabel: "memory",
	}))
	root := must(ident.FromPeer(0, "root"))
	must(g.CreateKey(context.Background(), root, "example", gateway.KeySpec{Name: name, Algorithm: keys.RSA2048}))
	conf := must(grpcapi.NewTLS(grpcapi.TLSFiles{
		Certificate: filepath.Join(dir, "gateway.crt"), Key: filepath.Join(dir, "gateway.key"), ClientCA: filepath.Join(dir, "ca.crt"),
	}))
	srv := must(grpcapi.New(grpcapi.Config{Gateway: g, TLS: conf.Config}))
	l := must(net.Listen("tcp", "127.0.0.1:0"))
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	profile = filepath.Join(dir, "client.yaml")
	text := fmt.Sprintf("address: %s\nca: ca.crt\ncertificate: root.crt\nkey: root.key\n", l.Addr())
	if err := os.WriteFile(profile, []byte(text), 0o600); err != nil {
		log.Fatal(err)
	}
	return profile, func() {
		srv.Shutdown()
		if err := <-served; err != nil {
			log.Fatal(err)
		}
		g.Close()
		os.RemoveAll(dir)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		log.Fatal(err)
	}
	return v
}

// authorityIn makes a CA in dir; issue makes a certificate by it and its key.
func authorityIn(dir string) (issue func(name string, usage x509.ExtKeyUsage)) {
	write := func(file, kind string, der []byte) {
		if err := os.WriteFile(filepath.Join(dir, file), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			log.Fatal(err)
		}
	}
	template := func(name string) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		}
	}
	caKey := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	ca := template("CA")
	ca.IsCA, ca.BasicConstraintsValid, ca.KeyUsage = true, true, x509.KeyUsageCertSign
	der := must(x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey))
	ca = must(x509.ParseCertificate(der))
	write("ca.crt", "CERTIFICATE", der)
	return func(name string, usage x509.ExtKeyUsage) {
		key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
		c := template(name)
		c.KeyUsage, c.ExtKeyUsage, c.IPAddresses = x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{usage}, []net.IP{net.IPv4(127, 0, 0, 1)}
		write(name+".crt", "CERTIFICATE", must(x509.CreateCertificate(rand.Reader, c, ca, key.Public(), caKey)))
		write(name+".key", "PRIVATE KEY", must(x509.MarshalPKCS8PrivateKey(key)))
	}
}
