package keyfile

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"fmt"
	"io"
	"strings"

	"github.com/ProtonMail/go-crypto/openpgp/armor"
	pgpecdsa "github.com/ProtonMail/go-crypto/openpgp/ecdsa"
	pgped25519 "github.com/ProtonMail/go-crypto/openpgp/ed25519"
	pgpeddsa "github.com/ProtonMail/go-crypto/openpgp/eddsa"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
)

// maxPackets bounds the packets of a file, and maxKeys its secret keys.
const (
	maxPackets = 4096
	maxKeys    = 64
)

// A candidate is a secret key of an OpenPGP file.
type candidate struct {
	*packet.PrivateKey
	subkey bool
	// What its self-signatures say of it, without a check: they choose no more than
	// what is the only key that can sign.
	flagged, signs bool
}

func (c candidate) fingerprint() string { return fmt.Sprintf("%X", c.Fingerprint) }

func (c candidate) String() string {
	s := c.fingerprint() + " (primary"
	if c.subkey {
		s = c.fingerprint() + " (subkey"
	}
	if c.flagged && c.signs {
		s += ", signs"
	}
	if c.Dummy() {
		s += ", not in this file"
	}
	return s + ")"
}

// parseOpenPGP reads the packets themselves, since the key is wanted and not the
// certificate: whether its self-signatures are still good is no matter of the token.
func parseOpenPGP(b []byte, armored bool, o Options) (crypto.PrivateKey, error) {
	var r io.Reader = bytes.NewReader(b)
	if armored {
		block, err := armor.Decode(r)
		if err != nil {
			return nil, fmt.Errorf("%w: OpenPGP armor: %w", ErrMalformed, err)
		}
		if block.Type != "PGP PRIVATE KEY BLOCK" {
			return nil, fmt.Errorf("%w: a %.40s; gpg --armor --export-secret-keys writes a PGP PRIVATE KEY BLOCK", ErrMalformed, block.Type)
		}
		r = block.Body
	}
	all, err := candidates(r)
	if err != nil {
		return nil, err
	}
	c, err := choose(all, o.OpenPGP)
	if err != nil {
		return nil, err
	}
	if c.Dummy() {
		return nil, fmt.Errorf("%w: the secret part of %s is not in this file (it is on a card, or kept off line)", ErrUnsupported, c.fingerprint())
	}
	if c.Encrypted {
		pass, err := o.Passphrase()
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrPassphrase, err)
		}
		defer clear(pass)
		if err := c.Decrypt(pass); err != nil {
			return nil, fmt.Errorf("%w: that was not it, or the protection is not supported", ErrPassphrase)
		}
	}
	return plain(c.PrivateKey)
}

func candidates(r io.Reader) ([]candidate, error) {
	var all []candidate
	packets := packet.NewReader(io.LimitReader(r, MaxSize))
	for n := 0; ; n++ {
		p, err := packets.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("%w: OpenPGP packets: %v", ErrMalformed, kindOf(err))
		}
		_, secret := p.(*packet.PrivateKey)
		if n == maxPackets || secret && len(all) == maxKeys {
			return nil, fmt.Errorf("%w: more packets or keys than a key file has", ErrMalformed)
		}
		switch p := p.(type) {
		case *packet.PrivateKey:
			if !canSign(p.PubKeyAlgo) {
				all = append(all, candidate{}) // so that what follows is not taken for another one's
				continue
			}
			all = append(all, candidate{PrivateKey: p, subkey: p.IsSubkey})
		case *packet.Signature:
			if len(all) == 0 || !p.FlagsValid || p.SigType == packet.SigTypePrimaryKeyBinding {
				continue
			}
			last := &all[len(all)-1]
			last.flagged, last.signs = true, last.signs || p.FlagSign
		}
	}
	var signing []candidate
	for _, c := range all {
		if c.PrivateKey != nil {
			signing = append(signing, c)
		}
	}
	if len(signing) == 0 {
		return nil, fmt.Errorf("%w: an OpenPGP file without a secret key of RSA, ECDSA or EdDSA; gpg --export-secret-keys writes one", ErrMalformed)
	}
	return signing, nil
}

// kindOf keeps what go-crypto says of a packet to its kind.
func kindOf(err error) string {
	s, _, _ := strings.Cut(err.Error(), ":")
	return s
}

func canSign(a packet.PublicKeyAlgorithm) bool {
	switch a {
	case packet.PubKeyAlgoRSA, packet.PubKeyAlgoRSASignOnly, packet.PubKeyAlgoECDSA, packet.PubKeyAlgoEdDSA, packet.PubKeyAlgoEd25519:
		return true
	}
	return false
}

// choose finds the key of a fingerprint, or the only one that can be meant.
func choose(all []candidate, fingerprint string) (candidate, error) {
	want := strings.ToUpper(strings.ReplaceAll(strings.TrimPrefix(fingerprint, "0x"), " ", ""))
	if want != "" && len(want) < 16 {
		return candidate{}, fmt.Errorf("%w: of a fingerprint 16 digits are wanted at least", ErrWhich)
	}
	var fit, names []string
	var found candidate
	for _, c := range all {
		names = append(names, c.String())
		switch {
		case want != "" && !strings.HasSuffix(c.fingerprint(), want):
			continue
		case want == "" && (c.Dummy() || c.flagged && !c.signs):
			continue
		}
		fit, found = append(fit, c.fingerprint()), c
	}
	if len(fit) == 1 {
		return found, nil
	}
	return candidate{}, fmt.Errorf("%w: the file has %s; name one with --openpgp-key", ErrWhich, strings.Join(names, ", "))
}

// plain turns go-crypto's types of keys into those of the standard library.
func plain(k *packet.PrivateKey) (crypto.PrivateKey, error) {
	damaged := fmt.Errorf("%w: the halves of the OpenPGP key %X do not belong together", ErrMalformed, k.Fingerprint)
	switch key := k.PrivateKey.(type) {
	case *rsa.PrivateKey:
		if key.Validate() != nil {
			return nil, damaged
		}
		return key, nil
	case *pgpecdsa.PrivateKey:
		curve, err := nist(&k.PublicKey)
		if err != nil {
			return nil, err
		}
		if key.D.Sign() <= 0 || key.D.BitLen() > curve.Params().BitSize {
			return nil, damaged
		}
		out, err := ecdsa.ParseRawPrivateKey(curve, key.D.FillBytes(make([]byte, (curve.Params().BitSize+7)/8)))
		if err != nil || out.X.Cmp(key.X) != 0 || out.Y.Cmp(key.Y) != 0 {
			return nil, damaged
		}
		return out, nil
	case *pgpeddsa.PrivateKey:
		c, err := k.Curve()
		if err != nil || c != packet.Curve25519 {
			return nil, fmt.Errorf("%w: EdDSA on another curve than Ed25519", ErrUnsupported)
		}
		return edwards(key.D, key.X, damaged)
	case *pgped25519.PrivateKey:
		if len(key.Key) < ed25519.SeedSize {
			return nil, damaged
		}
		return edwards(key.Key[:ed25519.SeedSize], key.Point, damaged)
	}
	return nil, fmt.Errorf("%w: an OpenPGP key of algorithm %d", ErrUnsupported, k.PubKeyAlgo)
}

func nist(k *packet.PublicKey) (elliptic.Curve, error) {
	c, err := k.Curve()
	if err == nil {
		switch c {
		case packet.CurveNistP256:
			return elliptic.P256(), nil
		case packet.CurveNistP384:
			return elliptic.P384(), nil
		}
	}
	return nil, fmt.Errorf("%w: ECDSA on another curve than P-256 and P-384", ErrUnsupported)
}

// edwards makes a key of its seed, of which OpenPGP leaves out leading zeros.
func edwards(seed, point []byte, damaged error) (crypto.PrivateKey, error) {
	if len(seed) > ed25519.SeedSize {
		return nil, damaged
	}
	whole := make([]byte, ed25519.SeedSize)
	defer clear(whole)
	copy(whole[ed25519.SeedSize-len(seed):], seed)
	key := ed25519.NewKeyFromSeed(whole)
	if !bytes.HasSuffix(point, key.Public().(ed25519.PublicKey)) || len(point) > 1+ed25519.PublicKeySize {
		return nil, damaged
	}
	return key, nil
}
