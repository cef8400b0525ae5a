package openpgp

import (
	"bytes"
	"crypto"
	"fmt"
	"io"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp/packet"
	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"
)

// MaxSignature is the most that is read of a detached signature, in bytes, and maxSignatures how many packets may be
// in it: each is hashed for, so the number multiplies the work.
const (
	MaxSignature  = 64 << 10
	maxSignatures = 16
)

// SignatureInfo says what a good signature claims.
type SignatureInfo struct {
	Signer  Fingerprint // of the key or subkey that signed
	Primary Fingerprint // of its certificate
	Created time.Time   // as the signer says
	Hash    crypto.Hash
	Type    SigType
}

// VerifyDetached checks that sig, binary or armored, holds a signature over message by a key of the certificate that
// was good for signing when the signature was made. A signature from before a key expired stays good. Among several
// signatures one is enough. It fails with ErrBadSignature if there is none, with ErrMalformed if sig cannot
// be read, or with the error of a reader.
func VerifyDetached(cert *Certificate, message, sig io.Reader) (SignatureInfo, error) {
	return verifyAt(cert, message, sig, time.Now())
}

func verifyAt(cert *Certificate, message, sig io.Reader, now time.Time) (SignatureInfo, error) {
	b, err := io.ReadAll(io.LimitReader(sig, MaxSignature+1))
	if err != nil {
		return SignatureInfo{}, fmt.Errorf("reading the signature: %w", err)
	}
	raw, err := dearmor(b, BlockSignature, MaxSignature)
	if err != nil {
		return SignatureInfo{}, fmt.Errorf("signature: %w", err)
	}
	err = countSignatures(raw)
	if err != nil {
		return SignatureInfo{}, err
	}
	e, err := cert.entity()
	if err != nil {
		return SignatureInfo{}, fmt.Errorf("%w: certificate: %v", ErrMalformed, err)
	}
	md, err := openpgp.VerifyDetachedSignatureReader(openpgp.EntityList{e}, message, bytes.NewReader(raw), policy(now))
	if err != nil {
		return SignatureInfo{}, fmt.Errorf("%w: %v", ErrBadSignature, err)
	}
	_, err = io.Copy(io.Discard, md.UnverifiedBody)
	if err != nil {
		return SignatureInfo{}, fmt.Errorf("reading the message: %w", err)
	}
	// go-crypto sets IsVerified when it is through with the check, whatever came of it.
	if !md.IsVerified || md.SignatureError != nil || md.Signature == nil || md.SignedBy == nil {
		return SignatureInfo{}, fmt.Errorf("%w: %v", ErrBadSignature, md.SignatureError)
	}
	info := SignatureInfo{
		Primary: cert.master,
		Created: md.Signature.CreationTime.UTC(),
		Hash:    md.Signature.Hash,
		Type:    SigType(md.Signature.SigType),
	}
	copy(info.Signer[:], md.SignedBy.PublicKey.Fingerprint)
	return info, nil
}

// countSignatures refuses what is not just signature packets, and too many of them.
func countSignatures(raw []byte) error {
	r := packet.NewReader(bytes.NewReader(raw))
	n := 0
	for ; ; n++ {
		p, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("%w: signature: %v", ErrMalformed, err)
		}
		if _, ok := p.(*packet.Signature); !ok {
			return fmt.Errorf("%w: a %T among the signatures", ErrMalformed, p)
		}
	}
	if n == 0 || n > maxSignatures {
		return fmt.Errorf("%w: %d signatures, not 1 to %d", ErrMalformed, n, maxSignatures)
	}
	return nil
}
