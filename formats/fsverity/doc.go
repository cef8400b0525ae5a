// Package fsverity signs files for fs-verity as fsverity-utils' `fsverity sign` does, byte for byte with RSA, with keys
// that it never sees.
//
// fs-verity lets the kernel check a read-only file block by block, against a Merkle tree whose root it knows. The
// file's digest stands for that tree: Digest computes it of a stream. Sign makes a CMS message over the digest, which
// the kernel checks against its .fs-verity keyring when the file is opened, or whoever else reads it. The file itself
// is not changed.
//
// # What it promises
//
//  1. Memory does not depend on the size of a file: one block for each level of the tree is held.
//  2. Nothing is returned before the signature was checked with the certificate.
//  3. A signature is over the hash, block size and salt that were asked for; Verify takes no others.
//
// It opens no file and no connection, and imports of Signwarden only formats/cms, whose package comment says what a
// signer is asked. It does not enable fs-verity on a file.
//
// The format is described in the kernel's Documentation/filesystems/fsverity.rst, whose sections comments here name.
package fsverity

import "errors"

// ErrParameters says that a hash, block size or salt is none of fs-verity's.
var ErrParameters = errors.New("not a parameter of fs-verity")

// What fs-verity has ("FS_IOC_ENABLE_VERITY").
const (
	DefaultBlockSize = 4096
	MaxSalt          = 32 // bytes

	minBlockSize = 1024
	maxBlockSize = 64 << 10 // the largest page of Linux
)
