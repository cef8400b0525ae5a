// Package pe signs EFI images (PE and PE32+ files) with Authenticode, as sbsign and pesign do, with keys that it never
// sees.
//
// A signature covers the whole image but its checksum, the directory entry of the certificate table and that table,
// which is at the end of the file and holds any number of signatures. Parse finds these places; Image.Sign adds a
// signature, Image.Verify checks them, Image.Remove takes them off.
//
// # What it promises
//
//  1. Nothing is written before the signature was checked with the certificate, and nothing after an error of it.
//  2. The digest is the one that firmware computes. Others agree with it only where headers and sections follow each
//     other without a gap or an overlap; an image where they do not is refused with ErrLayout.
//  3. The signer is asked only about an image that Parse accepted, with a certificate table that can be read.
//  4. Signatures of others are kept, unless Options.Replace is set. One by the same certificate is replaced, so that
//     signing twice is signing once.
//  5. Memory does not depend on the size of the image.
//
// The image is read twice, once for the digest and once for the output. If it changed in between, Sign fails with
// ErrChanged after it has written: write to a temporary file.
//
// It opens no file and no connection, and imports of Signwarden only formats/cms, whose package comment says what a
// signer is asked.
//
// "PE" in comments is Microsoft's PE Format, "Authenticode" its Windows Authenticode Portable Executable Signature
// Format 1.0, "EDK2" the function HashPeImage in DxeImageVerificationLib.
package pe

import "errors"

var (
	// ErrMalformed says that input is not a PE image, is truncated, or is over a limit.
	ErrMalformed = errors.New("malformed PE image")

	// ErrLayout says that tools and firmware would not agree on the digest of the image: there are gaps or overlaps
	// between headers and sections.
	ErrLayout = errors.New("image layout without an agreed digest")

	// ErrNotSigned says that the image carries no signature.
	ErrNotSigned = errors.New("image is not signed")

	// ErrChanged says that the image changed while it was being signed. What was written is to be thrown away.
	ErrChanged = errors.New("image changed while it was signed")
)

// What is taken at most.
const (
	maxSize       = 1<<32 - 1 - maxTable // offsets in an image have 32 bits
	maxSections   = 96                   // PE, "COFF File Header": the Windows loader's limit
	maxTable      = 4 << 20              // bytes of the certificate table; a signature has some 2 KiB
	maxSignatures = 16
)
