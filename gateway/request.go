package gateway

import (
	"bytes"
	"crypto"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/signwarden/signwarden/gateway/audit"
	"github.com/signwarden/signwarden/gateway/ident"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/policy"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// Request asks for one signature over one digest, or over the digest of one
// message.
type Request struct {
	// ID makes the request idempotent for a minute: the same id with the same
	// content gets the same signature and one audit record, with other content
	// sigerr.Conflict. Empty: not idempotent.
	ID string
	// Key is the name of the key.
	Key string
	// Digest, and the Hash that made it; the length must be the hash's. Ed25519
	// signs the digest's bytes as its message.
	Digest []byte
	Hash   crypto.Hash
	// Message, in place of Digest, is what is to be hashed. The gateway hashes it
	// and reads, by Format, what it is; a format that it cannot read is refused. With
	// the formats of SSH Ed25519 signs the message itself.
	Message []byte
	// Scheme; empty: the usual one of the key's algorithm.
	Scheme keys.Scheme
	// SaltLength is that of PSS, in bytes; 0: as long as the hash.
	SaltLength int
	// Format is what the front-end knows, or was told, the signature is for.
	// Against a bare digest nothing can check it, so the rule that allows the
	// request must allow blind signing. A Message is read as what it says.
	Format string
	// FrontEnd is what took the request: grpc, gpg-agent, ...
	FrontEnd string
	// Claim is what the client says of the artefact: recorded, never decided on.
	Claim Claim
}

// Claim is a client's words. They are cut to MaxClaim bytes each.
type Claim struct {
	File, ContentSHA256, NEVRA, Note string
}

// MaxClaim bounds each field of a Claim, and MaxID an idempotency id, in bytes.
const (
	MaxClaim = 1024
	MaxID    = 64
)

// Read reads what a message of a format is, made to be hashed with hash. It
// knows the formats of policy.ContentFormats, and takes no longer than reading
// the message once does. Its errors are told to the caller.
//
// Ed25519 keys sign a message of SSH as it is. So what it reads as ssh-sig or ssh-auth
// must not be anything else that is signed: neither a digest (32, 48 or 64 bytes,
// but for those with the prefix that Sign refuses) nor a message of another format.
type Read func(format string, hash crypto.Hash, message []byte) (*policy.Content, error)

// sshPrefix begins every message of the format ssh-sig (PROTOCOL.sshsig of OpenSSH).
const sshPrefix = "SSHSIG"

// check refuses a request that is wrong whatever key it names, so that its
// answer tells nothing about keys.
func (r *Request) check() error {
	if err := keys.CheckName(r.Key); err != nil {
		return sigerr.NotFound // the same words as for a name that could exist
	}
	if keys.HashName(r.Hash) == "" {
		name := "hash"
		if r.Hash != 0 {
			name = r.Hash.String()
		}
		return fmt.Errorf("%w: %s digests are not signed; use SHA-256, SHA-384 or SHA-512", sigerr.Invalid, name)
	}
	if r.Message != nil && r.Digest != nil {
		return fmt.Errorf("%w: a request has a digest or a message, not both", sigerr.Invalid)
	}
	if r.Message == nil && len(r.Digest) != r.Hash.Size() {
		return fmt.Errorf("%w: the digest has %d bytes; one of %s has %d", sigerr.Invalid, len(r.Digest), r.Hash, r.Hash.Size())
	}
	// A message of ssh-sig can have 64 bytes. Passed for a digest and signed with
	// Ed25519 it would be a signature that no rule on ssh-sig has seen. One true digest
	// in 2^48 begins so.
	if bytes.HasPrefix(r.Digest, []byte(sshPrefix)) {
		return fmt.Errorf("%w: the digest begins with %q, so it is none; send what SSH signs as a message of format %s", sigerr.Invalid, sshPrefix, policy.SSHSig)
	}
	if !slices.Contains(policy.Formats, r.Format) {
		return fmt.Errorf("%w: format %q is not one of %s", sigerr.Invalid, r.Format, strings.Join(policy.Formats, ", "))
	}
	if r.Message != nil && !slices.Contains(policy.ContentFormats, r.Format) {
		return fmt.Errorf("%w: the gateway reads messages of %s; send the digest of one of %q", sigerr.Invalid, strings.Join(policy.ContentFormats, ", "), r.Format)
	}
	if len(r.ID) > MaxID || strings.ContainsFunc(r.ID, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return fmt.Errorf("%w: the idempotency id must be at most %d printable ASCII characters", sigerr.Invalid, MaxID)
	}
	return nil
}

// entry is what the audit log says of r; the decision fills in the rest. It is
// made before r is checked, so everything in it is cut to size.
func (r *Request) entry(p ident.Principal, now time.Time) audit.Entry {
	hash := keys.HashName(r.Hash)
	if hash == "" && r.Hash != 0 {
		hash = r.Hash.String()
	}
	return audit.Entry{
		Time: now, Action: "sign", Principal: p.Name(), Via: p.Via(), FrontEnd: r.FrontEnd,
		Request: clip(r.ID), Key: clip(r.Key), Format: clip(r.Format), Scheme: string(r.Scheme),
		Hash: hash, Digest: hex.EncodeToString(r.Digest[:min(len(r.Digest), 64)]),
		ClaimFile: clip(r.Claim.File), ClaimSHA256: clip(r.Claim.ContentSHA256),
		ClaimNEVRA: clip(r.Claim.NEVRA), ClaimNote: clip(r.Claim.Note),
	}
}

// clip cuts s to MaxClaim bytes, at a rune's edge, and puts U+FFFD for control
// characters, which the log would write with six bytes each.
func clip(s string) string {
	s = s[:min(len(s), 2*MaxClaim)]
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return utf8.RuneError
		}
		return r
	}, s)
	if len(s) <= MaxClaim {
		return s
	}
	cut := MaxClaim
	for cut > 0 && !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut]
}
