package kmod

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// magic ends a signed module (include/linux/module_signature.h).
const magic = "~Module signature appended~\n"

// structSize is the size of struct module_signature: algo, hash, id_type, signer_len, key_id_len, three bytes of
// padding, and the length of the signature in big-endian order. All but id_type and the length are zero with CMS.
const (
	structSize = 12
	idPKCS7    = 2 // PKEY_ID_PKCS7
	tailSize   = maxLayers*(maxSignature+structSize+len(magic)) + len(magic)
)

// appendTrailer adds what follows a module: the CMS message and how to find it from the end.
func appendTrailer(b, sig []byte) []byte {
	b = append(b, sig...)
	b = append(b, 0, 0, idPKCS7, 0, 0, 0, 0, 0)
	b = binary.BigEndian.AppendUint32(b, uint32(len(sig)))
	return append(b, magic...)
}

// cutTrailers takes the signatures off the end of tail, which are the last bytes of a module, but at most as many as
// layers. It returns the length of what is left and the last signature, the one the kernel reads; nil if there is none.
func cutTrailers(tail []byte, layers int) (int, []byte, error) {
	var last []byte
	for n := 0; n < layers && bytes.HasSuffix(tail, []byte(magic)); n++ {
		if n == maxLayers {
			return 0, nil, fmt.Errorf("%w: over %d signatures", ErrMalformed, maxLayers)
		}
		rest := tail[:len(tail)-len(magic)]
		if len(rest) < structSize {
			return 0, nil, fmt.Errorf("%w: signature trailer", ErrMalformed)
		}
		s := rest[len(rest)-structSize:]
		rest = rest[:len(rest)-structSize]
		// mod_check_sig wants id_type and zeros here; the key types before PKCS #7 are of kernels before 4.3.
		if !bytes.Equal(s[:8], []byte{0, 0, idPKCS7, 0, 0, 0, 0, 0}) {
			return 0, nil, fmt.Errorf("%w: signature trailer of another kind: % x", ErrMalformed, s[:8])
		}
		size := binary.BigEndian.Uint32(s[8:])
		if size == 0 || size > maxSignature || int(size) >= len(rest) {
			return 0, nil, fmt.Errorf("%w: signature of %d bytes", ErrMalformed, size)
		}
		tail = rest[:len(rest)-int(size)]
		if last == nil {
			last = rest[len(tail):]
		}
	}
	return len(tail), last, nil
}
