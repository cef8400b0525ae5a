// Package kmod signs Linux kernel modules as the kernel's scripts/sign-file does, byte for byte, with keys that it
// never sees.
//
// A signed module is the module, a CMS message over it, a struct module_signature and a magic line
// (Documentation/admin-guide/module-signing.rst; include/linux/module_signature.h). Modules compressed with xz, zstd
// or gzip are unpacked, signed and packed again: the kernel checks the signature of what is inside.
//
// # What it promises
//
//  1. Nothing is written before the signature was checked with the certificate, and nothing after an error of it.
//  2. The signer is asked only about a complete relocatable ELF file: a truncated module never reaches it.
//  3. Memory does not depend on the size of a module, and unpacking stops at MaxModule and at maxRatio.
//  4. A module carries one signature: an old one is refused or replaced, never signed over. The kernel reads only the
//     last, but what follows a module is part of what the next signature covers.
//
// The module is read twice, once for the digest and once for the output. If it changed in between, Sign fails with
// ErrChanged after it has written: write to a temporary file.
//
// It opens no file and no connection, and imports of Signwarden only formats/cms, whose package comment says what a
// signer is asked. SHA-1 is refused, which old kernels defaulted to.
package kmod

import "errors"

var (
	// ErrMalformed says that input is not a kernel module, is truncated, or is over a limit.
	ErrMalformed = errors.New("malformed kernel module")

	// ErrSigned says that the module is signed and Options.Replace is not set.
	ErrSigned = errors.New("module is already signed")

	// ErrNotSigned says that the module carries no signature.
	ErrNotSigned = errors.New("module is not signed")

	// ErrChanged says that the module changed while it was being signed. What was written is to be thrown away.
	ErrChanged = errors.New("module changed while it was signed")
)

// What is taken at most.
const (
	MaxModule    = 1 << 30  // bytes of a module, unpacked: with debug information some have hundreds of megabytes
	maxRatio     = 100      // of unpacked to packed size; modules have 3 to 8
	ratioFrom    = 1 << 20  // bytes unpacked before maxRatio counts
	maxSignature = 32 << 10 // bytes of one CMS message
	maxLayers    = 3        // signatures on top of each other, by tools that did not look
	allLayers    = maxLayers + 1
)
