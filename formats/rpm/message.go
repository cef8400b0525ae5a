package rpm

import (
	"crypto"
	"fmt"

	"github.com/signwarden/signwarden/formats/openpgp"
)

// MaxMessage bounds a message that ReadMessage takes, in bytes. kernel-source of openSUSE, with 80,000 files, has a header
// of 11 MiB.
const MaxMessage = 16 << 20

// ReadMessage reads what a header signature covers, as Request.Message gives it: a main header, then OpenPGP's trailer of a
// signature over a document, made with that hash. Whoever is to sign it, and does not trust who asks, learns so what the
// package is. Nothing else is a message: neither a certification nor a signature over header and payload can pass for one.
func ReadMessage(b []byte, hash crypto.Hash) (*Header, openpgp.Trailer, error) {
	if len(b) > MaxMessage {
		return nil, openpgp.Trailer{}, fmt.Errorf("%w: message of %d bytes, over %d", ErrMalformed, len(b), MaxMessage)
	}
	h, rest, err := ParseHeader(b)
	if err != nil {
		return nil, openpgp.Trailer{}, err
	}
	t, err := openpgp.ParseTrailer(rest)
	if err != nil {
		return nil, openpgp.Trailer{}, fmt.Errorf("after the header of %.100q: %w", h.NEVRA.Name, err)
	}
	if t.Type != openpgp.SigBinary || t.Hash != hash {
		return nil, openpgp.Trailer{}, fmt.Errorf("%w: after the header of %.100q: trailer of a signature of type 0x%02x by %v, not 0x00 by %v",
			ErrMalformed, h.NEVRA.Name, byte(t.Type), t.Hash, hash)
	}
	return h, t, nil
}
