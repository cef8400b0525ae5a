// Package cms writes and checks CMS SignedData (RFC 5652) with keys that it never sees.
//
// Sign makes a message around a digest that the caller made, so the content may have any size and stay where it is.
// Prepare and Message.Assemble are the two phases under it: what is to be signed comes out, the signature made
// anywhere goes in. Kernel modules, EFI images, EFI variables, fs-verity and detached files differ only in Options.
//
// # What it promises
//
//  1. Nothing is returned before the signature was checked with the certificate's public key.
//  2. An error of the signer comes back wrapped, never replaced.
//  3. Only SHA-256, SHA-384 and SHA-512 are signed and verified, and an ECDSA digest is as long as the curve's order
//     asks for.
//  4. An RSA signature has the length of the modulus: a token that cuts leading zeros is mended, not believed.
//  5. What Parse reads is bounded: in bytes, certificates, signers and attributes. It does not follow nesting that it
//     does not know.
//
// # What the signer is asked
//
// Sign gets a digest. With RSASSA-PSS opts is an *rsa.PSSOptions with a salt as long as the hash. Else opts.HashFunc
// is the hash, and opts has the method
//
//	DigestHash() crypto.Hash
//
// with the same answer, as the signers of formats/openpgp have it.
//
// Ed25519 is refused: RFC 8419, section 3.1, signs the attributes themselves, not a digest of them, and without
// attributes the content itself. A gateway of digests cannot do either, and neither the kernel nor EFI firmware
// verifies it.
//
// # What it is not
//
// It holds no secret, opens no file and no connection, and imports nothing of Signwarden. It does not encrypt, makes
// one signer per message, writes DER only, reads DER only, and knows no revocation.
//
// Section numbers are those of RFC 5652 if nothing else is said.
package cms

import "errors"

var (
	// ErrUnsupported says that a key, hash or structure is outside what this package signs or verifies.
	ErrUnsupported = errors.New("unsupported algorithm")

	// ErrWrongKey says that the signer's key is not the certificate's.
	ErrWrongKey = errors.New("key is not the certificate's")

	// ErrSignerOutput says that a signer answered without an error, but not with a signature that the certificate
	// verifies. The key's state is unknown: another key may stand behind the handle, or the token is faulty.
	ErrSignerOutput = errors.New("signer returned a wrong signature")

	// ErrMalformed says that input is not what it should be: not CMS, truncated, or over a limit.
	ErrMalformed = errors.New("malformed input")

	// ErrBadSignature says that a message carries no valid signature over the content by the certificates given.
	ErrBadSignature = errors.New("bad signature")
)
