package openpgp

import (
	"encoding/binary"
	"math/bits"
)

// Packet type IDs, section 5.
const (
	tagSignature    = 2
	tagPublicKey    = 6
	tagUserID       = 13
	tagPublicSubkey = 14
)

// Signature subpacket type IDs, section 5.2.3.7.
const (
	subCreated       = 2
	subKeyLifetime   = 9
	subPrefSymmetric = 11
	subIssuer        = 16
	subPrefHash      = 21
	subPrefCompress  = 22
	subPrimaryUserID = 25
	subKeyFlags      = 27
	subReason        = 29
	subFeatures      = 30
	subEmbedded      = 32
	subIssuerFpr     = 33
)

// appendPacket adds a packet in OpenPGP format, never in the legacy one (section 4.2).
func appendPacket(b []byte, tag byte, body []byte) []byte {
	b = append(b, 0xc0|tag)
	b = appendLength(b, len(body))
	return append(b, body...)
}

// appendSubpacket adds a signature subpacket. Bit 7 of the type, critical, stays clear: see the package comment.
func appendSubpacket(b []byte, typ byte, data ...byte) []byte {
	b = appendLength(b, len(data)+1) // section 5.2.3.7: the length counts the type octet
	b = append(b, typ)
	return append(b, data...)
}

// appendLength adds the length of a packet (section 4.2.1) or a subpacket. Two octets reach further in a subpacket,
// to 16319, but five are right in both.
func appendLength(b []byte, n int) []byte {
	switch {
	case n < 192:
		return append(b, byte(n))
	case n < 8384:
		return append(b, byte((n-192)>>8)+192, byte(n-192))
	default:
		return binary.BigEndian.AppendUint32(append(b, 0xff), uint32(n))
	}
}

// appendMPI adds a multiprecision integer (section 3.2): its length in bits, then its octets without leading zeros.
// A signature of a token is of fixed width; its leading zero octets must go, or the length is a lie.
func appendMPI(b, n []byte) []byte {
	for len(n) > 0 && n[0] == 0 {
		n = n[1:]
	}
	length := 0
	if len(n) > 0 {
		length = (len(n)-1)*8 + bits.Len8(n[0])
	}
	b = binary.BigEndian.AppendUint16(b, uint16(length))
	return append(b, n...)
}
