package rpm

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/signwarden/signwarden/formats/openpgp"
)

// Options are the choices of one signing. The zero value is good.
type Options struct {
	Hash crypto.Hash // zero: the key's default
	Time time.Time   // of the signatures; zero: now

	// Payload adds a signature over header and payload ("rpmv3"). A package whose header has no digest of its
	// payload gets one anyway, and is read for it.
	Payload bool

	// OpenPGP writes the signature to tag 278 too, the list that rpm 6 looks at first. A package of version 6 always
	// has it there, and in no other tag.
	OpenPGP bool

	// Legacy writes the signature of a version 6 package to tag 267 or 268 too, where rpm 4 looks for it.
	Legacy bool

	// NoPayloadCheck leaves the payload unread where no signature is over it.
	NoPayloadCheck bool

	// Files is the key of IMA signatures over the package's files. nil: those that are there stay.
	Files *rsa.PublicKey
}

// A Request is one digest to be signed.
type Request struct {
	Digest []byte
	Opts   crypto.SignerOpts // as formats/openpgp documents
	File   int               // the index of a file in the package; -1: the package

	header, trailer []byte
}

// Message returns the bytes that Digest is of, for a signer that hashes and looks for itself: the main header, which
// ParseHeader reads, and OpenPGP's trailer. It is nil for a digest that covers more, or a file.
func (r Request) Message() []byte {
	if r.header == nil {
		return nil
	}
	return slices.Concat(r.header, r.trailer)
}

// A Signing is a package that is about to be signed: its Requests are to be answered, in order, to Finish. Not safe for
// concurrent use.
type Signing struct {
	p        *Package
	key      openpgp.Key
	o        Options
	header   *openpgp.Signature // nil: none
	payload  *openpgp.Signature // nil: none
	files    *fileSigning       // nil: none
	requests []Request
}

// Prepare checks the package against its own digests, and starts the signatures that o asks for. The payload is read
// once, or not at all.
func Prepare(p *Package, key openpgp.Key, o Options) (*Signing, error) {
	s := &Signing{p: p, key: key, o: o}
	if o.Time.IsZero() {
		s.o.Time = time.Now() // one time for all
	}
	if p.Header.Format == 6 {
		if o.Payload {
			return nil, fmt.Errorf("%w: signature over the payload of a version 6 package", ErrUnsupported)
		}
		s.o.OpenPGP = true
	} else {
		s.o.Legacy = true
	}
	err := s.start()
	if err != nil {
		return nil, err
	}
	var also io.Writer
	if s.payload != nil {
		also = s.payload
	}
	err = p.check(s.payload != nil || !o.NoPayloadCheck, also)
	if err != nil {
		return nil, err
	}
	return s, s.ask()
}

// start makes the signatures, so that a key that may not sign is found before the payload is read.
func (s *Signing) start() error {
	var err error
	so := openpgp.SignOptions{Hash: s.o.Hash, Time: s.o.Time}
	h := s.p.Header
	// A header of rpm 3 has no region, and rpm has no digest over it to hold a signature against (format_v3.md).
	if h.h.region {
		s.header, err = openpgp.NewSignature(s.key, openpgp.SigBinary, so)
		if err != nil {
			return err
		}
	}
	if s.o.Payload || !h.coversPayload() {
		s.payload, err = openpgp.NewSignature(s.key, openpgp.SigBinary, so)
		if err != nil {
			return err
		}
	}
	if s.o.Files != nil {
		s.files, err = newFileSigning(h, s.o.Files)
		if err == nil && s.files != nil {
			err = s.files.checkRoom(s.p)
		}
		if err != nil {
			return fmt.Errorf("file signatures: %w", err)
		}
	}
	return nil
}

// ask lists the requests.
func (s *Signing) ask() error {
	if s.header != nil {
		_, err := s.header.Write(s.p.Header.h.raw)
		if err != nil {
			return err
		}
		err = s.request(s.header, s.p.Header.h.raw)
		if err != nil {
			return err
		}
	}
	if s.payload != nil {
		err := s.request(s.payload, nil)
		if err != nil {
			return err
		}
	}
	if s.files != nil {
		s.requests = append(s.requests, s.files.requests()...)
	}
	return nil
}

func (s *Signing) request(sig *openpgp.Signature, message []byte) error {
	digest, err := sig.Digest()
	if err != nil {
		return err
	}
	r := Request{Digest: digest, Opts: sig.SignerOpts(), File: -1, header: message, trailer: sig.Trailer()}
	s.requests = append(s.requests, r)
	return nil
}

// Requests are the digests to be signed: by the key those with File -1, by Options.Files the others.
func (s *Signing) Requests() []Request { return slices.Clone(s.requests) }

// Finish makes the Update from what a crypto.Signer returned for each of the Requests. It fails with
// openpgp.ErrSignerOutput or ErrSignerOutput if one is not a signature, and may then be called again.
func (s *Signing) Finish(raw [][]byte) (*Update, error) {
	if len(raw) != len(s.requests) {
		return nil, fmt.Errorf("%d signatures for %d requests", len(raw), len(s.requests))
	}
	drop := signatureTags
	if s.files != nil {
		drop = append([]uint32{tagFileSigs, tagFileSigLength}, signatureTags...)
	}
	list := s.p.sig.keep(drop)
	tags := s.tags()
	if s.header != nil {
		pkt, err := s.header.Assemble(raw[0])
		if err != nil {
			return nil, err
		}
		raw = raw[1:]
		if s.o.Legacy {
			list = append(list, datum{tags.header, typeBin, len(pkt), pkt})
		}
		if s.o.OpenPGP {
			b := append(base64.StdEncoding.AppendEncode(nil, pkt), 0)
			list = append(list, datum{tagOpenPGP, typeStringArray, 1, b})
		}
	}
	if s.payload != nil {
		pkt, err := s.payload.Assemble(raw[0])
		if err != nil {
			return nil, err
		}
		raw = raw[1:]
		list = append(list, datum{tags.payload, typeBin, len(pkt), pkt})
	}
	if s.files != nil {
		data, err := s.files.assemble(raw)
		if err != nil {
			return nil, fmt.Errorf("file signatures: %w", err)
		}
		list = append(list, data...)
	}
	return s.p.update(list)
}

// tags are where signatures of the key go. DSA and GPG stand for ECDSA and Ed25519 as well (format_v4.md, "Signature").
func (s *Signing) tags() (t struct{ header, payload uint32 }) {
	t.header, t.payload = tagDSA, tagGPG
	if _, ok := s.key.Public.(*rsa.PublicKey); ok {
		t.header, t.payload = tagRSA, tagPGP
	}
	return t
}

// Sign has the Requests signed and makes the Update. files is the signer of Options.Files, and may be the same. See
// Request.Answer.
func (s *Signing) Sign(signer, files crypto.Signer) (*Update, error) {
	err := holds(signer, s.key.Public)
	if err != nil {
		return nil, err
	}
	if s.files != nil {
		err = holds(files, s.o.Files)
		if err != nil {
			return nil, fmt.Errorf("file signatures: %w", err)
		}
	}
	var raw [][]byte
	for _, r := range s.requests {
		by := signer
		if r.File >= 0 {
			by = files
		}
		sig, err := r.Answer(by)
		if err != nil {
			return nil, fmt.Errorf("signing %s: %w", s.p.Header.NEVRA, err)
		}
		raw = append(raw, sig)
	}
	return s.Finish(raw)
}

// Answer has r signed, for Finish: a crypto.MessageSigner is given the Message, where there is one, and any other the Digest.
func (r Request) Answer(by crypto.Signer) ([]byte, error) {
	if m, ok := by.(crypto.MessageSigner); ok && r.header != nil {
		return m.SignMessage(rand.Reader, r.Message(), r.Opts)
	}
	return by.Sign(rand.Reader, r.Digest, r.Opts)
}

// holds says whether signer's key is pub.
func holds(signer crypto.Signer, pub crypto.PublicKey) error {
	k, ok := pub.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || signer == nil || !k.Equal(signer.Public()) {
		return errors.New("the signer holds another key")
	}
	return nil
}
