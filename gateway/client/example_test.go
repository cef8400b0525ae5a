package client_test

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log"
	"math/big"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/signwarden/signwarden/gateway/client"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// Dial a gateway and sign one digest. The profile is what `signwardend client
// create` makes; profile is its path here.
func Example() {
	profile, stop := gatewayWithKey("release")
	defer stop()

	conf, err := client.LoadProfile(profile)
	if err != nil {
		log.Fatal(err)
	}
	c, err := client.Dial(conf)
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	digest := sha256.Sum256([]byte("what is to be signed"))
	sig, err := c.Sign(context.Background(), client.Request{
		Key: "release", Digest: digest[:], Hash: crypto.SHA256, Format: "cms",
		Claim: client.Claim{File: "disk.img"}, // for the audit log
	})
	switch {
	case errors.Is(err, sigerr.NotFound), errors.Is(err, sigerr.Denied), errors.Is(err, sigerr.Disabled):
		log.Fatalf("ask an administrator: %v", err)
	case err != nil:
		log.Fatal(err) // Unavailable and Overloaded have been tried again
	}
	fmt.Println(len(sig.Bytes), "bytes,", sig.Scheme)
	// Output: 256 bytes, rsa-pkcs1v15
}

// A crypto.Signer fits whatever of the standard library takes one, here a
// certificate for a key that never leaves the token.
func ExampleClient_Signer() {
	profile, stop := gatewayWithKey("ca")
	defer stop()
	c := mustDial(profile)
	defer c.Close()

	ctx := context.Background()
	key, err := c.Key(ctx, "ca")
	if err != nil {
		log.Fatal(err)
	}
	signer := c.Signer(ctx, key, "cms", client.Claim{Note: "root certificate"})
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Example root"},
		NotBefore: time.Now(), NotAfter: time.Now().AddDate(10, 0, 0), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, signer.Public(), signer)
	if err != nil {
		log.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(cert.Subject, cert.CheckSignatureFrom(cert))
	// Output: CN=Example root <nil>
}

// Many digests over one stream: goroutines share the client, and as many
// requests as there are goroutines are under way.
func ExampleClient_Sign() {
	profile, stop := gatewayWithKey("release")
	defer stop()
	c := mustDial(profile)
	defer c.Close()

	key, err := c.Key(context.Background(), "release")
	if err != nil {
		log.Fatal(err)
	}
	group, ctx := errgroup.WithContext(context.Background())
	group.SetLimit(64)
	signatures := make([][]byte, 1000)
	for i := range signatures {
		group.Go(func() error {
			digest := sha256.Sum256(fmt.Append(nil, "file ", i))
			sig, err := c.Sign(ctx, client.Request{
				// The same id again, within a minute, gets the same signature: a job that
				// is started again does not sign twice.
				ID:  fmt.Sprintf("job-17/%d", i),
				Key: "release", Digest: digest[:], Hash: crypto.SHA256, Format: "openpgp",
			})
			if err != nil {
				return fmt.Errorf("file %d: %w", i, err)
			}
			signatures[i] = sig.Bytes
			return rsa.VerifyPKCS1v15(key.PublicKey.(*rsa.PublicKey), crypto.SHA256, digest[:], sig.Bytes)
		})
	}
	fmt.Println(len(signatures), "signatures, error:", group.Wait())
	// Output: 1000 signatures, error: <nil>
}

func mustDial(profile string) *client.Client {
	conf, err := client.LoadProfile(profile)
	if err != nil {
		log.Fatal(err)
	}
	c, err := client.Dial(conf)
	if err != nil {
		log.Fatal(err)
	}
	return c
}
