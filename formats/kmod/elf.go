package kmod

import (
	"encoding/binary"
	"fmt"
)

// elfHeader is the size of the larger ELF header.
const elfHeader = 64

// checkELF refuses what is not a relocatable ELF file of size bytes, of which head is the start. The section headers
// of a module come last, so that a truncated one is noticed, as the kernel's elf_validity_check does.
func checkELF(head []byte, size int64) error {
	order, err := identELF(head)
	if err != nil {
		return err
	}
	var off uint64
	var entries []byte // e_shentsize, e_shnum
	if head[4] == 1 {
		off, entries = uint64(order.Uint32(head[32:])), head[46:50]
	} else {
		off, entries = order.Uint64(head[40:]), head[58:62]
	}
	table := uint64(order.Uint16(entries)) * uint64(order.Uint16(entries[2:]))
	if off == 0 || off > uint64(size) || table > uint64(size)-off {
		return fmt.Errorf("%w: truncated: section headers at %d in %d bytes", ErrMalformed, off, size)
	}
	return nil
}

// identELF checks the start of a file, and returns its byte order.
func identELF(head []byte) (binary.ByteOrder, error) {
	if len(head) < elfHeader || string(head[:4]) != "\x7fELF" || head[4] < 1 || head[4] > 2 {
		return nil, fmt.Errorf("%w: not an ELF file", ErrMalformed)
	}
	var order binary.ByteOrder = binary.LittleEndian
	if head[5] == 2 {
		order = binary.BigEndian
	}
	const relocatable = 1 // ET_REL
	if t := order.Uint16(head[16:]); t != relocatable {
		return nil, fmt.Errorf("%w: ELF file of type %d, not relocatable", ErrMalformed, t)
	}
	return order, nil
}
