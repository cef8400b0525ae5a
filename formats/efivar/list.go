package efivar

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"slices"
)

// The types of signature lists that are made here (section 32.4.1). Others are read.
var (
	TypeX509   = mustGUID("a5c059a1-94e4-4aa7-87b5-ab155c2bf072") // EFI_CERT_X509_GUID
	TypeSHA256 = mustGUID("c1c41626-504c-4092-aca9-41f936934328") // EFI_CERT_SHA256_GUID
)

// A List is an EFI_SIGNATURE_LIST: entries of one type and one size.
type List struct {
	Type    GUID
	Header  []byte // empty for all types in use
	Entries []Entry
}

// An Entry is an EFI_SIGNATURE_DATA.
type Entry struct {
	Owner GUID // who put it there
	Data  []byte
}

const listHeader = 28

// X509 returns a list of one certificate: each is a list of its own, because their sizes differ.
func X509(owner GUID, cert *x509.Certificate) List {
	return List{Type: TypeX509, Entries: []Entry{{owner, slices.Clone(cert.Raw)}}}
}

// SHA256 returns a list of digests: of images, as pe.Image.Digest makes them.
func SHA256(owner GUID, digests ...[sha256.Size]byte) List {
	l := List{Type: TypeSHA256}
	for _, d := range digests {
		l.Entries = append(l.Entries, Entry{owner, d[:]})
	}
	return l
}

// Marshal returns the lists one after the other, which are the contents of a variable. It fails with ErrMalformed if a
// list is empty or its entries differ in size.
func Marshal(lists ...List) ([]byte, error) {
	var b []byte
	for _, l := range lists {
		if len(l.Entries) == 0 || len(l.Entries[0].Data) == 0 {
			return nil, fmt.Errorf("%w: signature list %s without entries", ErrMalformed, l.Type)
		}
		size := len(GUID{}) + len(l.Entries[0].Data)
		total := listHeader + len(l.Header) + size*len(l.Entries)
		if total > maxData-len(b) {
			return nil, fmt.Errorf("%w: signature lists of over %d bytes", ErrMalformed, maxData)
		}
		b = append(b, l.Type[:]...)
		b = binary.LittleEndian.AppendUint32(b, uint32(total))
		b = binary.LittleEndian.AppendUint32(b, uint32(len(l.Header)))
		b = binary.LittleEndian.AppendUint32(b, uint32(size))
		b = append(b, l.Header...)
		for _, e := range l.Entries {
			if len(GUID{})+len(e.Data) != size {
				return nil, fmt.Errorf("%w: signature list %s of entries of %d and %d bytes", ErrMalformed, l.Type,
					size, len(GUID{})+len(e.Data))
			}
			b = append(append(b, e.Owner[:]...), e.Data...)
		}
	}
	return b, nil
}

// ParseLists reads the contents of a variable, which may be empty. Marshal makes the same bytes of the result.
func ParseLists(b []byte) ([]List, error) {
	if len(b) > maxData {
		return nil, fmt.Errorf("%w: signature lists of %d bytes, over %d", ErrMalformed, len(b), maxData)
	}
	b = slices.Clone(b) // the result refers to it
	var all []List
	for len(b) > 0 {
		if len(b) < listHeader {
			return nil, fmt.Errorf("%w: %d bytes behind the last signature list", ErrMalformed, len(b))
		}
		total := uint64(binary.LittleEndian.Uint32(b[16:]))
		header := uint64(binary.LittleEndian.Uint32(b[20:]))
		size := uint64(binary.LittleEndian.Uint32(b[24:]))
		if total > uint64(len(b)) || size <= uint64(len(GUID{})) || total < listHeader+header+size ||
			(total-listHeader-header)%size != 0 {
			return nil, fmt.Errorf("%w: signature list of %d bytes with entries of %d", ErrMalformed, total, size)
		}
		l := List{Type: GUID(b[:16]), Header: b[listHeader : listHeader+header]}
		for e := range slices.Chunk(b[listHeader+header:total], int(size)) {
			l.Entries = append(l.Entries, Entry{GUID(e[:16]), e[16:]})
		}
		err := l.check()
		if err != nil {
			return nil, err
		}
		all = append(all, l)
		b = b[total:]
	}
	return all, nil
}

// check refuses what firmware would not take for what its type says (section 32.4.1).
func (l List) check() error {
	for _, e := range l.Entries {
		switch l.Type {
		case TypeX509:
			_, err := x509.ParseCertificate(e.Data)
			if err != nil {
				return fmt.Errorf("%w: certificate in a signature list: %v", ErrMalformed, err)
			}
		case TypeSHA256:
			if len(e.Data) != sha256.Size || len(l.Header) != 0 {
				return fmt.Errorf("%w: SHA-256 digest of %d bytes", ErrMalformed, len(e.Data))
			}
		}
	}
	return nil
}
