package p11token

import (
	"bytes"
	"crypto"
	"crypto/rsa"
	_ "crypto/sha256" // made by crypto.Hash.New
	_ "crypto/sha512"

	"github.com/signwarden/signwarden/agentproto/p11rpc"
)

// mechanism is a way to sign that the token offers.
type mechanism struct {
	ckm     uint64
	name    string // for the log and the audit note
	keyType uint64
	hash    crypto.Hash // made here of the data; 0: the data are a digest
	pss     bool
	// digest finds the digest in the data of a mechanism without a hash.
	digest func(data []byte) (crypto.Hash, []byte, error)
}

// mechanisms are all there are, and every one signs. CKM_RSA_X_509 is not one of them: of a
// block that the client has padded nobody can say what it holds.
var mechanisms = []mechanism{
	{0x0001, "RSA-PKCS", ckkRSA, 0, false, digestInfo},
	{0x0040, "SHA256-RSA-PKCS", ckkRSA, crypto.SHA256, false, nil},
	{0x0041, "SHA384-RSA-PKCS", ckkRSA, crypto.SHA384, false, nil},
	{0x0042, "SHA512-RSA-PKCS", ckkRSA, crypto.SHA512, false, nil},
	{0x000d, "RSA-PKCS-PSS", ckkRSA, 0, true, byLength},
	{0x0043, "SHA256-RSA-PKCS-PSS", ckkRSA, crypto.SHA256, true, nil},
	{0x0044, "SHA384-RSA-PKCS-PSS", ckkRSA, crypto.SHA384, true, nil},
	{0x0045, "SHA512-RSA-PKCS-PSS", ckkRSA, crypto.SHA512, true, nil},
	{0x1041, "ECDSA", ckkEC, 0, false, byLength},
	{0x1044, "ECDSA-SHA256", ckkEC, crypto.SHA256, false, nil},
	{0x1045, "ECDSA-SHA384", ckkEC, crypto.SHA384, false, nil},
	{0x1046, "ECDSA-SHA512", ckkEC, crypto.SHA512, false, nil},
	{0x1057, "EDDSA", ckkECEdwards, 0, false, byLength},
}

func (m *mechanism) ed25519() bool { return m.keyType == ckkECEdwards }

func mechanismOf(ckm uint64) *mechanism {
	for i := range mechanisms {
		if mechanisms[i].ckm == ckm {
			return &mechanisms[i]
		}
	}
	return nil
}

// mechanismInfos has a CK_MECHANISM_INFO for each type of key: sizes in bits, and the flags
// SIGN and, of curves, EC_F_P, EC_NAMEDCURVE and EC_UNCOMPRESS.
var mechanismInfos = map[uint64]struct{ min, max, flags uint64 }{
	ckkRSA:       {2048, 16384, 0x800},
	ckkEC:        {256, 521, 0x800 | 0x100000 | 0x800000 | 0x1000000},
	ckkECEdwards: {255, 255, 0x800 | 0x800000},
}

// hashes are those whose digests are signed, with what goes before one in a DigestInfo
// (RFC 8017 section 9.2, note 1), and how PSS parameters name them.
var hashes = []struct {
	hash     crypto.Hash
	info     []byte
	ckm, mgf uint64
}{
	{crypto.SHA256, []byte("\x30\x31\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x01\x05\x00\x04\x20"), 0x250, 2},
	{crypto.SHA384, []byte("\x30\x41\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x02\x05\x00\x04\x30"), 0x260, 3},
	{crypto.SHA512, []byte("\x30\x51\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x03\x05\x00\x04\x40"), 0x270, 4},
}

// digestInfo takes the one DER encoding of a DigestInfo, with NULL parameters: what
// will be signed is made anew of hash and digest, and has to be what the client asked for.
func digestInfo(data []byte) (crypto.Hash, []byte, error) {
	for _, h := range hashes {
		digest, ok := bytes.CutPrefix(data, h.info)
		if ok && len(digest) == h.hash.Size() {
			return h.hash, digest, nil
		}
	}
	return 0, nil, refuse(ckrDataInvalid, "the %d bytes to be signed are no DigestInfo of SHA-256, SHA-384 or SHA-512", len(data))
}

// byLength takes for the hash the one whose digests are so long: the mechanism does not name one.
func byLength(data []byte) (crypto.Hash, []byte, error) {
	for _, h := range hashes {
		if len(data) == h.hash.Size() {
			return h.hash, data, nil
		}
	}
	return 0, nil, refuse(ckrDataLenRange, "the %d bytes to be signed are no digest of SHA-256, SHA-384 or SHA-512", len(data))
}

// parameters checks the parameter of a mechanism for a key. pss is nil for every one
// that takes none.
func (m *mechanism) parameters(k *key, p p11rpc.Mechanism) (pss *rsa.PSSOptions, err error) {
	params, given, err := p.PSS()
	if err != nil || given != m.pss {
		return nil, refuse(ckrMechanismParamInvalid, "%s with a parameter of %d bytes", m.name, len(p.Param))
	}
	if !m.pss {
		return nil, nil
	}
	for _, h := range hashes {
		if h.ckm != params.Hash || h.mgf != params.MGF || m.hash != 0 && m.hash != h.hash {
			continue
		}
		pub, ok := k.public.(*rsa.PublicKey)
		if !ok {
			return nil, ckrKeyTypeInconsistent
		}
		// RFC 8017 section 9.1.1: the encoded message has modBits-1 bits.
		most := (pub.N.BitLen()-1+7)/8 - h.hash.Size() - 2
		// None is refused too: crypto/rsa has no word for it, as its 0 is the longest.
		if params.SaltLen < 1 || most < 1 || params.SaltLen > uint64(most) {
			return nil, refuse(ckrMechanismParamInvalid, "%s with a salt of %d bytes; with the key and hash it has 1 to %d", m.name, params.SaltLen, most)
		}
		return &rsa.PSSOptions{Hash: h.hash, SaltLength: int(params.SaltLen)}, nil
	}
	return nil, refuse(ckrMechanismParamInvalid, "%s with hash 0x%x and mask 0x%x; it is made with SHA-256, SHA-384 or SHA-512, the same in both", m.name, params.Hash, params.MGF)
}
