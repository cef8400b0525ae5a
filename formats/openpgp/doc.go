// Package openpgp writes OpenPGP version 4 certificates and signatures with keys that it never sees.
//
// A key is a crypto.Signer; its public half and its creation time make a Key. NewCertificate makes the transferable
// public key that verifiers import. DetachSign and ClearSign sign a stream. Signature is the two-phase core under both:
// write the message into it, have the digest signed anywhere, and Assemble the packet.
//
// # What it promises
//
//  1. No byte reaches the caller's writer before the signature was checked: the finished packet is parsed by
//     github.com/ProtonMail/go-crypto, another implementation, and verified with the public key.
//     Memory does not depend on the size of what is signed or verified.
//  2. An error of the signer comes back wrapped, never replaced, and nothing was written.
//  3. Only SHA-256, SHA-384 and SHA-512 are signed, and never a digest shorter than the curve's order.
//  4. No subpacket is marked critical: rpm 4.18 refuses a certificate with a critical embedded signature.
//
// # What the signer is asked
//
// Sign gets a digest and opts. For RSA (PKCS #1 v1.5) and ECDSA (an ASN.1 DER signature comes back) opts.HashFunc is
// the hash that made the digest. For Ed25519 the digest is itself the message (RFC 9580, section 5.2.3.3) and
// opts.HashFunc is zero, as ed25519.PrivateKey demands. In all three cases opts has the method
//
//	DigestHash() crypto.Hash
//
// which names the hash that made the digest, for a signer that decides and records on it.
//
// # What it is not
//
// It holds no secret, opens no file and no connection, and imports nothing of Signwarden. It neither encrypts nor
// decrypts, makes no version 6 packets, and certifies nothing but its own keys.
//
// Section numbers are those of RFC 9580.
package openpgp

import "errors"

var (
	// ErrKeyNotFound says that a certificate does not hold the key asked for.
	ErrKeyNotFound = errors.New("key not in certificate")

	// ErrKeyUnusable says that a key is known but may not sign at that time: expired, not yet valid, revoked, or
	// not flagged for signing.
	ErrKeyUnusable = errors.New("key may not sign")

	// ErrUnsupported says that a key or hash is outside what this package signs with.
	ErrUnsupported = errors.New("unsupported algorithm")

	// ErrSignerOutput says that a signer answered without an error, but not with a signature that the key verifies.
	// Nothing was written. The key's state is unknown: another key may stand behind the handle, or the token is faulty.
	ErrSignerOutput = errors.New("signer returned a wrong signature")

	// ErrBadSignature says that a message carries no valid signature by the certificate.
	ErrBadSignature = errors.New("bad signature")

	// ErrChanged says that a text changed while it was being signed.
	ErrChanged = errors.New("text changed while it was signed")

	// ErrMalformed says that input is not what it should be: not OpenPGP, truncated, or over a limit.
	ErrMalformed = errors.New("malformed input")
)
