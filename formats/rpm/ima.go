package rpm

import (
	"crypto"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"fmt"
)

// IMA's signature of version 2, as ima-evm-utils writes it: EVM_IMA_XATTR_DIGSIG, the version, HASH_ALGO_SHA256 of the
// kernel, the key ID, the length of the signature and the signature.
const (
	imaDigsig  = 0x03
	imaVersion = 0x02
	imaSHA256  = 0x04
	imaHeader  = 9 // bytes before the signature
)

// fileSigning is the signing of a package's files: one signature for each digest, whatever number of files has it.
type fileSigning struct {
	key     *rsa.PublicKey
	files   []int    // for each file, the index of its digest; -1: it has none
	digests [][]byte // each once
	first   []int    // for each digest, the first file that has it
}

func newFileSigning(h *Header, key *rsa.PublicKey) (*fileSigning, error) {
	if key.N == nil || key.N.BitLen() < 2048 || key.N.BitLen() > 8192 {
		return nil, fmt.Errorf("%w: RSA key not of 2048 to 8192 bits", ErrUnsupported)
	}
	list, err := h.h.texts(tagFileDigests, maxFiles)
	if err != nil {
		return nil, err
	}
	if len(list) == 0 {
		return nil, nil // a package without files
	}
	names, err := h.h.texts(tagBaseNames, maxFiles)
	if err != nil {
		return nil, err
	}
	if len(names) != len(list) {
		return nil, fmt.Errorf("%w: %d digests of %d files", ErrMalformed, len(list), len(names))
	}
	algo, _, err := h.h.number(tagFileDigestAlgo, typeInt32)
	if err != nil {
		return nil, err
	}
	if algo != fileDigestAlgoSHA2 {
		return nil, fmt.Errorf("%w: file digests of algorithm %d, not SHA-256", ErrUnsupported, algo)
	}
	s := &fileSigning{key: key}
	seen := map[string]int{}
	for i, text := range list {
		// Directories, links and ghosts have none.
		if len(text) == 0 {
			s.files = append(s.files, -1)
			continue
		}
		digest, err := hexDigest(fmt.Sprintf("file %d", i), string(text), crypto.SHA256.Size())
		if err != nil {
			return nil, err
		}
		n, ok := seen[string(digest)]
		if !ok {
			n = len(s.digests)
			seen[string(digest)] = n
			s.digests = append(s.digests, digest)
			s.first = append(s.first, i)
		}
		s.files = append(s.files, n)
	}
	return s, nil
}

// checkRoom says that there is no room for the signatures: it is found out before thousands of them have been made.
func (s *fileSigning) checkRoom(p *Package) error {
	n := int64(s.textSize())
	if n > maxSigHeader || memoryOf(int64(len(p.Header.h.raw)), int64(len(p.sig.raw)), n) > maxMemory {
		return fmt.Errorf("%w: %d files need %d bytes for their signatures", ErrUnsupported, len(s.files), n)
	}
	return nil
}

// textSize is how many bytes the signatures of all files have in the signature header: hexadecimal digits, and a zero.
func (s *fileSigning) textSize() int {
	n := len(s.files)
	for _, f := range s.files {
		if f >= 0 {
			n += 2 * (imaHeader + s.key.Size())
		}
	}
	return n
}

func (s *fileSigning) requests() []Request {
	var list []Request
	for i, d := range s.digests {
		list = append(list, Request{Digest: d, Opts: hashOpts(crypto.SHA256), File: s.first[i]})
	}
	return list
}

// assemble makes the tags of the signature header: for each file its signature in hexadecimal digits, empty for a file
// without a digest, and the length of the longest in bytes.
func (s *fileSigning) assemble(raw [][]byte) ([]datum, error) {
	var sigs [][]byte
	length := 0
	for i, sig := range raw {
		err := rsa.VerifyPKCS1v15(s.key, crypto.SHA256, s.digests[i], sig)
		if err != nil {
			return nil, fmt.Errorf("%w: file %d: %v", ErrSignerOutput, s.first[i], err)
		}
		b := appendIMA(nil, s.key, sig)
		length = max(length, len(b))
		sigs = append(sigs, b)
	}
	if length == 0 {
		return nil, nil
	}
	text := make([]byte, 0, s.textSize())
	for _, n := range s.files {
		if n >= 0 {
			text = hex.AppendEncode(text, sigs[n])
		}
		text = append(text, 0)
	}
	return []datum{
		{tagFileSigs, typeStringArray, len(s.files), text},
		{tagFileSigLength, typeInt32, 1, binary.BigEndian.AppendUint32(nil, uint32(length))},
	}, nil
}

// appendIMA adds a signature as it stands in security.ima.
func appendIMA(b []byte, key *rsa.PublicKey, sig []byte) []byte {
	id := sha1.Sum(x509.MarshalPKCS1PublicKey(key)) // an identifier, as evmctl makes it
	b = append(b, imaDigsig, imaVersion, imaSHA256)
	b = append(b, id[len(id)-4:]...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(sig)))
	return append(b, sig...)
}

// FileSignatures returns the IMA signatures of the package, one for each file as it stands in security.ima, nil for a
// file without; nil if the package has none. They are not verified.
func (p *Package) FileSignatures() ([][]byte, error) {
	list, err := p.sig.texts(tagFileSigs, maxFiles)
	if err != nil || list == nil {
		return nil, err
	}
	sigs := make([][]byte, len(list))
	for i, s := range list {
		if len(s) == 0 {
			continue
		}
		sigs[i], err = hex.DecodeString(string(s))
		if err != nil {
			return nil, fmt.Errorf("%w: signature of file %d: %v", ErrMalformed, i, err)
		}
	}
	return sigs, nil
}
