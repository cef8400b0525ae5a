// Package rpm signs RPM packages with keys that it never sees, and verifies them.
//
// ReadPackage reads a package's lead, signature header and main header, and leaves the payload where it is. Prepare checks
// the package against its own digests, and says what is to be signed; Signing.Finish takes the signatures, made
// anywhere, and returns an Update: the new signature header. Signing.Sign is both with a crypto.Signer at hand. ApplyInPlace
// and Rewrite bring an Update into a file.
//
// # What it promises
//
//  1. Nothing is given to a signer before the package's own digests were found right: those of the header always, those
//     of the payload unless the caller forgoes them.
//  2. Each signature was verified with the public key before there is an Update.
//  3. After an Update the package has the new signatures and no other: neither of another algorithm, nor the list of
//     OpenPGP signatures (tag 278) that makes rpm 6 disregard the rest.
//  4. Header and payload are never changed, only what stands before them.
//  5. Reading takes memory for the two headers, which are capped, and a fixed buffer for the payload, whatever its size.
//
// # What is signed
//
// A version 4 signature is over the main header (tag 268 with an RSA key, 267 with any other). The header has a digest of
// the payload since rpm 4.14. Where it has none, or the caller asks, there is a signature over header and payload besides
// (tags 1002 and 1005).
//
// # What it is not
//
// It holds no secret and opens no connection; only file.go, undo.go and attr.go know of files. It does not unpack payloads, nor
// compare versions, nor read what a package does when it is installed.
//
// The format is described in rpm's docs/manual: format_lead.md, format_header.md, format_v3.md, format_v4.md and
// format_v6.md, which comments here name.
package rpm

import "errors"

var (
	// ErrMalformed says that input is not an RPM package, is truncated, or is over a limit.
	ErrMalformed = errors.New("malformed package")

	// ErrDigest says that a package is not what its own digests say: it was damaged, or is still being written.
	ErrDigest = errors.New("package does not match its own digest")

	// ErrNoDigest says that a package has no digest to be checked against.
	ErrNoDigest = errors.New("package has no digest of its own")

	// ErrUnsupported says that a package or key is outside what this package signs.
	ErrUnsupported = errors.New("unsupported")

	// ErrNotSigned says that a package has no signature that a verifier would look at.
	ErrNotSigned = errors.New("package is not signed")

	// ErrSignerOutput says that a signer answered without an error, but not with a signature that the key verifies.
	// There is no Update. For package signatures the error is openpgp.ErrSignerOutput.
	ErrSignerOutput = errors.New("signer returned a wrong file signature")
)
