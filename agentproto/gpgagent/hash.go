package gpgagent

import "crypto"

// hashAlgo is a hash as clients name it.
type hashAlgo struct {
	id   string // of libgcrypt and of OpenPGP alike
	name string
	hash crypto.Hash // 0: known, and never signed
}

// hashes are the ones that clients can ask for. Those that are refused are too
// weak to sign with, or too rare to be worth the risk: SHA-224 is refused with MD5,
// SHA-1 and RIPEMD-160, whose DigestInfo in Go is moreover not that of OpenPGP.
var hashes = []hashAlgo{
	{"1", "md5", 0},
	{"2", "sha1", 0},
	{"3", "rmd160", 0},
	{"8", "sha256", crypto.SHA256},
	{"9", "sha384", crypto.SHA384},
	{"10", "sha512", crypto.SHA512},
	{"11", "sha224", 0},
}

// hashOf finds a hash that may be signed, by id or by name.
func hashOf(id, name string) (crypto.Hash, bool) {
	for _, h := range hashes {
		if h.hash != 0 && (h.id == id || h.name == name) {
			return h.hash, true
		}
	}
	return 0, false
}
