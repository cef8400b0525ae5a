package openpgp

import (
	"bytes"
	"crypto"
	"fmt"
	"io"

	"github.com/ProtonMail/go-crypto/openpgp/armor"
)

// The block types of ASCII armor that this package reads and writes (section 6.2).
const (
	BlockPublicKey = "PGP PUBLIC KEY BLOCK"
	BlockSignature = "PGP SIGNATURE"
)

// DetachSign writes a signature over message to w. The message is read once, in constant memory. Nothing is written
// unless the signature verified.
func DetachSign(w io.Writer, message io.Reader, key Key, signer crypto.Signer, o SignOptions) error {
	err := key.holds(signer) // before a long message is read in vain
	if err != nil {
		return err
	}
	sig, err := NewSignature(key, SigBinary, o)
	if err != nil {
		return err
	}
	_, err = io.Copy(sig, message)
	if err != nil {
		return fmt.Errorf("reading the message: %w", err)
	}
	pkt, err := sig.Finish(signer)
	if err != nil {
		return err
	}
	if o.Armor {
		return Armor(w, BlockSignature, pkt)
	}
	_, err = w.Write(pkt)
	if err != nil {
		return fmt.Errorf("writing the signature: %w", err)
	}
	return nil
}

// Armor writes body to w in ASCII armor, with a checksum: section 6.1 advises against one, but rpm 4.18 takes no
// armor without.
func Armor(w io.Writer, blockType string, body []byte) error {
	if blockType != BlockPublicKey && blockType != BlockSignature {
		return fmt.Errorf("%w: armor of %q", ErrUnsupported, blockType)
	}
	var out bytes.Buffer // so that w sees all or nothing
	a, err := armor.Encode(&out, blockType, nil)
	if err != nil {
		return fmt.Errorf("making armor: %w", err)
	}
	_, err = a.Write(body)
	if err != nil {
		return fmt.Errorf("making armor: %w", err)
	}
	err = a.Close()
	if err != nil {
		return fmt.Errorf("making armor: %w", err)
	}
	out.WriteByte('\n') // go-crypto ends without one
	_, err = w.Write(out.Bytes())
	if err != nil {
		return fmt.Errorf("writing armor: %w", err)
	}
	return nil
}
