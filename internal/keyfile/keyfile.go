// Package keyfile reads a private key from a file as distributions have them: PEM of
// PKCS #8, PKCS #1 and SEC 1, OpenSSH, and what gpg --export-secret-keys writes.
//
// It is pure, keeps nothing, and puts no part of a key or a passphrase into an error.
// It is for signwardend, on its way to bring a key into a token; the client of a
// gateway never sees a private key.
package keyfile

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/crypto/ssh"
)

// MaxSize bounds a file, in bytes. An OpenPGP key with many certifications is the
// longest there is.
const MaxSize = 1 << 20

var (
	// ErrMalformed: it is no private key in a form that we read, or a damaged one.
	ErrMalformed = errors.New("no private key that can be read")
	// ErrPassphrase: there is none, or it is not the key's.
	ErrPassphrase = errors.New("the key's passphrase is needed")
	// ErrUnsupported: it is encrypted in a way, or of a kind, that others can read.
	ErrUnsupported = errors.New("unsupported")
	// ErrWhich: there are several keys in the file, and it was not said which.
	ErrWhich = errors.New("which of the keys is meant is not clear")
)

// Options say how to read a file.
type Options struct {
	// Passphrase is called, once at most, where the key is encrypted.
	Passphrase func() ([]byte, error)
	// OpenPGP is the fingerprint of one of the keys of an OpenPGP file, in
	// hexadecimal, or its last 16 digits or more; empty: the only one that can sign.
	OpenPGP string
}

// Parse reads the private key of a file: *rsa.PrivateKey, *ecdsa.PrivateKey or
// ed25519.PrivateKey. Its errors wrap those above.
func Parse(b []byte, o Options) (crypto.PrivateKey, error) {
	if len(b) > MaxSize {
		return nil, fmt.Errorf("%w: more than %d bytes", ErrMalformed, MaxSize)
	}
	if o.Passphrase == nil {
		o.Passphrase = func() ([]byte, error) { return nil, errors.New("none was given") }
	}
	armored := bytes.Contains(b, []byte("-----BEGIN PGP "))
	if armored || len(b) > 0 && b[0]&0x80 != 0 {
		return parseOpenPGP(b, armored, o)
	}
	if o.OpenPGP != "" {
		return nil, fmt.Errorf("%w: it is no OpenPGP file, and has one key", ErrMalformed)
	}
	block, err := only(b)
	if err != nil {
		return nil, err
	}
	defer clear(block.Bytes)
	return parseBlock(block, o)
}

// only returns the one block with a private key; files have others beside it, such as
// certificates and EC PARAMETERS.
func only(b []byte) (*pem.Block, error) {
	var found *pem.Block
	for {
		block, rest := pem.Decode(b)
		if block == nil {
			break
		}
		b = rest
		if !strings.HasSuffix(block.Type, "PRIVATE KEY") {
			continue
		}
		if found != nil {
			return nil, fmt.Errorf("%w: there are two", ErrWhich)
		}
		found = block
	}
	if found == nil {
		return nil, fmt.Errorf("%w: neither PEM (PRIVATE KEY) nor an OpenPGP secret key", ErrMalformed)
	}
	return found, nil
}

func parseBlock(block *pem.Block, o Options) (crypto.PrivateKey, error) {
	const decrypt = "decrypt it on the way: openssl pkey -in FILE | signwardend token import --key -"
	var key crypto.PrivateKey
	var err error
	switch {
	case block.Type == "ENCRYPTED PRIVATE KEY" || block.Headers["DEK-Info"] != "" || block.Headers["Proc-Type"] != "":
		return nil, fmt.Errorf("%w: an encrypted PEM key; %s", ErrUnsupported, decrypt)
	case block.Type == "PRIVATE KEY":
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	case block.Type == "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	case block.Type == "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	case block.Type == "OPENSSH PRIVATE KEY":
		return parseOpenSSH(block, o)
	default:
		return nil, fmt.Errorf("%w: a PEM block %.40q", ErrUnsupported, block.Type)
	}
	if err != nil { // its text may tell of the key
		return nil, fmt.Errorf("%w: the PEM block %q is damaged, or of a key that is none of RSA, EC and Ed25519", ErrMalformed, block.Type)
	}
	return key, nil
}

func parseOpenSSH(block *pem.Block, o Options) (crypto.PrivateKey, error) {
	text := pem.EncodeToMemory(block)
	defer clear(text)
	key, err := ssh.ParseRawPrivateKey(text)
	if _, ok := errors.AsType[*ssh.PassphraseMissingError](err); ok {
		pass, perr := o.Passphrase()
		if perr != nil {
			return nil, fmt.Errorf("%w: %w", ErrPassphrase, perr)
		}
		defer clear(pass)
		if key, err = ssh.ParseRawPrivateKeyWithPassphrase(text, pass); errors.Is(err, x509.IncorrectPasswordError) {
			return nil, fmt.Errorf("%w: that was not it", ErrPassphrase)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%w: a damaged OpenSSH key, or of a kind that is not read", ErrMalformed)
	}
	if p, ok := key.(*ed25519.PrivateKey); ok {
		key = *p
	}
	return key, nil
}
