// Package efivar makes and checks authenticated updates of the Secure Boot variables PK, KEK, db and dbx, the .auth
// files of sign-efi-sig-list and sbvarsign, with keys that it never sees.
//
// An update is an EFI_VARIABLE_AUTHENTICATION_2 descriptor, which holds a time and a CMS signature, and the variable's
// new contents: signature lists of certificates and digests. Sign makes one, Parse and Update.Verify read and check it.
//
// # What it promises
//
//  1. Nothing is returned before the signature was checked with the certificate.
//  2. The signer is asked only about contents that are well-formed signature lists, or none, which deletes the
//     variable: firmware that takes a bad list may not start again.
//  3. The signature has the form that all firmware takes: SignedData without ContentInfo, the signer's certificate in
//     it, no signed attributes, and a length of two octets, where EDK2 looks for the hash at a fixed place.
//
// It opens no file and no connection, and imports of Signwarden only formats/cms, whose package comment says what a
// signer is asked.
//
// Section numbers are those of the UEFI Specification 2.10. "EDK2" is AuthService.c of its AuthVariableLib.
package efivar

import "errors"

// ErrMalformed says that input is not an update or a signature list, is truncated, or is over a limit.
var ErrMalformed = errors.New("malformed EFI variable data")

// maxData bounds the contents of a variable, in bytes. The dbx of uefi.org has 25 KiB; flash has room for some 64.
const maxData = 1 << 20
