// Command crypto11 signs as programs do that load keys by github.com/ThalesGroup/crypto11, such as cosign, step-ca and
// gokeyless, for the tests of softhsm-tests. It verifies all that it signs.
//
// Usage: crypto11 MODULE TOKEN RSA-LABEL EC-LABEL ISSUER-LABEL
//
// The EC key has a certificate, and its issuer's has that label.
package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"os"

	"github.com/ThalesGroup/crypto11"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "crypto11:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 5 {
		return errors.New("usage: crypto11 MODULE TOKEN RSA-LABEL EC-LABEL ISSUER-LABEL")
	}
	ctx, err := crypto11.Configure(&crypto11.Config{Path: args[0], TokenLabel: args[1], LoginNotSupported: true})
	if err != nil {
		return fmt.Errorf("opening the token: %w", err)
	}
	defer ctx.Close()
	if err := signRSA(ctx, args[2]); err != nil {
		return fmt.Errorf("%s: %w", args[2], err)
	}
	if err := signEC(ctx, args[3]); err != nil {
		return fmt.Errorf("%s: %w", args[3], err)
	}
	return chain(ctx, args[3], args[4])
}

func pair(ctx *crypto11.Context, label string) (crypto11.Signer, error) {
	k, err := ctx.FindKeyPair(nil, []byte(label))
	if err == nil && k == nil {
		err = errors.New("no such key pair")
	}
	return k, err
}

func signRSA(ctx *crypto11.Context, label string) error {
	k, err := pair(ctx, label)
	if err != nil {
		return err
	}
	pub, ok := k.Public().(*rsa.PublicKey)
	if !ok {
		return fmt.Errorf("a %T", k.Public())
	}
	digest := sha256.Sum256([]byte("text"))
	sig, err := k.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err == nil {
		err = rsa.VerifyPKCS1v15(pub, crypto.SHA256, digest[:], sig)
	}
	if err != nil {
		return fmt.Errorf("PKCS #1 v1.5: %w", err)
	}
	for _, salt := range []int{rsa.PSSSaltLengthEqualsHash, 20, 222} {
		opts := &rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: salt}
		sig, err := k.Sign(rand.Reader, digest[:], opts)
		if err == nil {
			err = rsa.VerifyPSS(pub, crypto.SHA256, digest[:], sig, opts)
		}
		if err != nil {
			return fmt.Errorf("PSS, salt length %d: %w", salt, err)
		}
	}
	return nil
}

func signEC(ctx *crypto11.Context, label string) error {
	k, err := pair(ctx, label)
	if err != nil {
		return err
	}
	pub, ok := k.Public().(*ecdsa.PublicKey)
	if !ok {
		return fmt.Errorf("a %T", k.Public())
	}
	digest := sha256.Sum256([]byte("text"))
	sig, err := k.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err == nil && !ecdsa.VerifyASN1(pub, digest[:], sig) {
		err = errors.New("the signature does not verify")
	}
	return err
}

// chain finds a key's certificate and its issuer's, and verifies the one by the other.
func chain(ctx *crypto11.Context, label, issuer string) error {
	leaf, err := ctx.FindCertificate(nil, []byte(label), nil)
	if err != nil || leaf == nil {
		return fmt.Errorf("certificate of %s: %v, %w", label, leaf, err)
	}
	ca, err := ctx.FindCertificate(nil, []byte(issuer), nil)
	if err != nil || ca == nil {
		return fmt.Errorf("certificate of %s: %v, %w", issuer, ca, err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	_, err = leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if err != nil {
		return err
	}
	all, err := ctx.FindAllPairedCertificates()
	if err != nil || len(all) < 2 {
		return fmt.Errorf("%d pairs with a certificate, %w", len(all), err)
	}
	return nil
}
