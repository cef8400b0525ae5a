package openpgp

import (
	"bytes"
	"crypto"
	"encoding/binary"
	"fmt"
	"time"
)

// A Trailer is what a version 4 signature hashes after its message: what is said of the signature itself (section 5.2.4).
type Trailer struct {
	Type    SigType
	Hash    crypto.Hash
	Created time.Time
	Issuer  Fingerprint // zero: it names none
}

// maxTrailer bounds a trailer, in bytes: the length of its subpackets has two octets.
const maxTrailer = 6 + 1<<16 + 6

// ParseTrailer reads a trailer that is all of b, as Signature.Trailer makes it. Whoever is sent a message and its
// trailer to hash and sign learns from it what the signature will mean. It refuses what it does not know: other
// versions, hashes weaker than SHA-256, subpackets twice, and critical ones besides those it reads.
func ParseTrailer(b []byte) (Trailer, error) {
	bad := func(why string) (Trailer, error) {
		return Trailer{}, fmt.Errorf("%w: signature trailer of %d bytes: %s", ErrMalformed, len(b), why)
	}
	if len(b) < 12 || len(b) > maxTrailer {
		return bad("no such length")
	}
	head, end := b[:len(b)-6], b[len(b)-6:]
	if head[0] != 4 || end[0] != 4 || end[1] != 0xff || int64(binary.BigEndian.Uint32(end[2:])) != int64(len(head)) {
		return bad("not of version 4")
	}
	t := Trailer{Type: SigType(head[1])}
	for h, id := range hashIDs {
		if id == head[3] {
			t.Hash = h
		}
	}
	if t.Hash == 0 {
		return bad(fmt.Sprintf("hash algorithm %d", head[3]))
	}
	sub := head[6:]
	if int(binary.BigEndian.Uint16(head[4:])) != len(sub) {
		return bad("the subpackets have another length")
	}
	seen := map[byte]bool{}
	for len(sub) > 0 {
		size, n := subpacketLength(sub)
		if n == 0 || size < 1 || size > len(sub)-n {
			return bad("a subpacket is cut off")
		}
		typ, data := sub[n]&0x7f, sub[n+1:n+size]
		critical := sub[n]&0x80 != 0
		sub = sub[n+size:]
		if seen[typ] {
			return bad(fmt.Sprintf("subpacket %d is there twice", typ))
		}
		seen[typ] = true
		switch {
		case typ == subCreated && len(data) == 4:
			t.Created = time.Unix(int64(binary.BigEndian.Uint32(data)), 0).UTC()
		case typ == subIssuerFpr && len(data) == 21 && data[0] == 4:
			copy(t.Issuer[:], data[1:])
		case typ == subCreated, typ == subIssuerFpr, critical:
			return bad(fmt.Sprintf("subpacket %d is not understood", typ))
		}
	}
	if !seen[subCreated] {
		return bad("no time of creation")
	}
	return t, nil
}

// subpacketLength reads the length that b begins with (section 5.2.3.7) and tells how many octets it takes; 0: none.
func subpacketLength(b []byte) (size, n int) {
	switch {
	case b[0] < 192:
		return int(b[0]), 1
	case b[0] < 255 && len(b) >= 2:
		return int(b[0]-192)<<8 + int(b[1]) + 192, 2
	case b[0] == 255 && len(b) >= 5 && bytes.Equal(b[1:3], []byte{0, 0}):
		return int(binary.BigEndian.Uint32(b[1:])), 5
	}
	return 0, 0
}
