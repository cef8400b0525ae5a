// Package sshsig reads what OpenSSH has a key sign: the blob of ssh-keygen -Y sign,
// which git uses too, and the request by which a user logs in. Whoever is to sign
// one, and does not trust who asks, learns so what it is.
//
// Both readers are strict: one encoding, no trailing bytes, every length bounded before it is used. No bytes are both,
// or anything else that is signed beside them: a blob begins with "SSHSIG", and a login request with the length of its
// session id, 0x00000014 to 0x00000040.
//
// That matters for Ed25519, where both are signed as they are and not as a digest. With the same key OpenPGP and
// PKCS#11 tools have digests of 32, 48 or 64 bytes signed as the message.
//
//   - A login request has over 90 bytes, so it is no digest.
//   - A blob with a SHA-256 digest and a namespace of four bytes, such as "file", has just 64. Whoever may have any
//     64 bytes signed could pass it for a SHA-512 digest; so whoever signs digests must refuse those that begin with
//     [Magic] ([IsBlob]). Of true digests one in 2^48 does.
//   - The other way round, a blob of 64 bytes would have to be the SHA-512 digest of some document: 32 of its bytes
//     are fixed, which is 2^256 tries.
package sshsig

import (
	"bytes"
	"crypto"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// Magic begins every blob (PROTOCOL.sshsig of OpenSSH).
const Magic = "SSHSIG"

// The bounds, in bytes. OpenSSH has none for a namespace or a user; nobody has longer ones.
const (
	// MaxMessage bounds what is read: a login request carries two public keys at most.
	MaxMessage = 16 << 10
	// MaxName bounds a namespace and a user.
	MaxName = 255
)

// ErrMalformed: the bytes are not what they were to be read as.
var ErrMalformed = errors.New("malformed")

// IsBlob reports whether b begins as a blob does.
func IsBlob(b []byte) bool { return bytes.HasPrefix(b, []byte(Magic)) }

// Blob is what a signature of ssh-keygen -Y sign is over.
type Blob struct {
	// Namespace says what the signature is for: git, file, ... It is not empty.
	Namespace string
	// Hash made Digest, of what was to be signed: SHA-256 or SHA-512.
	Hash   crypto.Hash
	Digest []byte
}

// hashNames are the hashes of a Blob.
var hashNames = map[string]crypto.Hash{"sha256": crypto.SHA256, "sha512": crypto.SHA512}

// ParseBlob reads a blob. Its reserved field must be empty, as it is.
func ParseBlob(b []byte) (*Blob, error) {
	if !IsBlob(b) {
		return nil, fmt.Errorf("%w: it does not begin with %q", ErrMalformed, Magic)
	}
	d := decoder{rest: b[len(Magic):], size: len(b)}
	namespace := d.field("namespace", MaxName)
	reserved := d.field("reserved", 0)
	name := d.field("hash_algorithm", MaxName)
	digest := d.field("hash", crypto.SHA512.Size())
	if err := d.end(); err != nil {
		return nil, err
	}
	h, ok := hashNames[string(name)]
	switch {
	case len(namespace) == 0:
		return nil, fmt.Errorf("%w: the namespace is empty", ErrMalformed)
	case len(reserved) != 0:
		return nil, fmt.Errorf("%w: the reserved field has %d bytes", ErrMalformed, len(reserved))
	case !ok:
		return nil, fmt.Errorf("%w: hash %.20q is not sha256 or sha512", ErrMalformed, name)
	case len(digest) != h.Size():
		return nil, fmt.Errorf("%w: the hash has %d bytes; one of %s has %d", ErrMalformed, len(digest), name, h.Size())
	}
	return &Blob{string(namespace), h, bytes.Clone(digest)}, nil
}

// Marshal is the inverse of ParseBlob.
func (b *Blob) Marshal() []byte {
	name := ""
	for n, h := range hashNames {
		if h == b.Hash {
			name = n
		}
	}
	out := []byte(Magic)
	for _, f := range []string{b.Namespace, "", name, string(b.Digest)} {
		out = appendField(out, f)
	}
	return out
}

// Login is what a user signs to log in: SSH_MSG_USERAUTH_REQUEST with the session id
// before it (RFC 4252 section 7).
type Login struct {
	SessionID []byte // of the connection: a hash of 20 to 64 bytes
	User      string // on the other host
	Algorithm string // of the signature
	PublicKey []byte // as SSH encodes it
	// HostKey is the server's, where the method is publickey-hostbound-v00@openssh.com
	// (OpenSSH 8.9), and nil where it is publickey.
	HostKey []byte
}

const (
	userAuthRequest = 50 // SSH_MSG_USERAUTH_REQUEST
	service         = "ssh-connection"
	method          = "publickey"
	methodHostBound = "publickey-hostbound-v00@openssh.com"
	minSessionID    = 20 // SHA-1
	maxSessionID    = 64 // SHA-512
	maxKey          = 4 << 10
)

// algorithm is how a login is signed.
type algorithm struct {
	hash    crypto.Hash
	keyType string
}

// algorithms of logins. Ed25519 hashes with SHA-512 by itself. Those with SHA-1 are missing,
// and so are certificates.
var algorithms = map[string]algorithm{
	"rsa-sha2-256":        {crypto.SHA256, "ssh-rsa"},
	"rsa-sha2-512":        {crypto.SHA512, "ssh-rsa"},
	"ecdsa-sha2-nistp256": {crypto.SHA256, "ecdsa-sha2-nistp256"},
	"ecdsa-sha2-nistp384": {crypto.SHA384, "ecdsa-sha2-nistp384"},
	"ssh-ed25519":         {crypto.SHA512, "ssh-ed25519"},
}

// ParseLogin reads a login request: to the service ssh-connection, with a plain public key.
func ParseLogin(b []byte) (*Login, error) {
	d := decoder{rest: b, size: len(b)}
	l := &Login{SessionID: d.field("session identifier", maxSessionID)}
	kind := d.byte("message number")
	l.User = string(d.field("user name", MaxName))
	to := d.field("service name", MaxName)
	how := string(d.field("method name", MaxName))
	signs := d.byte("boolean")
	l.Algorithm = string(d.field("public key algorithm name", MaxName))
	l.PublicKey = d.field("public key", maxKey)
	if how == methodHostBound {
		l.HostKey = d.field("server host key", maxKey)
	}
	if err := d.end(); err != nil {
		return nil, err
	}
	a, ok := algorithms[l.Algorithm]
	switch {
	case len(l.SessionID) < minSessionID:
		return nil, fmt.Errorf("%w: the session identifier has %d bytes", ErrMalformed, len(l.SessionID))
	case kind != userAuthRequest:
		return nil, fmt.Errorf("%w: message number %d is not SSH_MSG_USERAUTH_REQUEST", ErrMalformed, kind)
	case l.User == "":
		return nil, fmt.Errorf("%w: the user name is empty", ErrMalformed)
	case string(to) != service:
		return nil, fmt.Errorf("%w: service %.40q is not %s", ErrMalformed, to, service)
	case how != method && how != methodHostBound:
		return nil, fmt.Errorf("%w: method %.40q is not %s or %s", ErrMalformed, how, method, methodHostBound)
	case signs != 1:
		return nil, fmt.Errorf("%w: it is not to be signed", ErrMalformed)
	case !ok:
		return nil, fmt.Errorf("%w: algorithm %.60q: logins are signed with rsa-sha2-256, rsa-sha2-512, ecdsa-sha2-nistp256, ecdsa-sha2-nistp384 and ssh-ed25519, and plain keys", ErrMalformed, l.Algorithm)
	case how == methodHostBound && len(l.HostKey) == 0:
		return nil, fmt.Errorf("%w: the server's host key is empty", ErrMalformed)
	}
	k := decoder{rest: l.PublicKey, size: len(l.PublicKey)}
	if t := k.field("key type", MaxName); k.err != nil || string(t) != a.keyType {
		return nil, fmt.Errorf("%w: a public key of type %.60q does not sign with %s", ErrMalformed, t, l.Algorithm)
	}
	l.SessionID, l.PublicKey, l.HostKey = bytes.Clone(l.SessionID), bytes.Clone(l.PublicKey), bytes.Clone(l.HostKey)
	return l, nil
}

// Hash is that of the signature's algorithm.
func (l *Login) Hash() crypto.Hash { return algorithms[l.Algorithm].hash }

// Marshal is the inverse of ParseLogin.
func (l *Login) Marshal() []byte {
	how := method
	if l.HostKey != nil {
		how = methodHostBound
	}
	out := append(appendField(nil, string(l.SessionID)), userAuthRequest)
	for _, f := range []string{l.User, service, how} {
		out = appendField(out, f)
	}
	out = append(out, 1)
	out = appendField(appendField(out, l.Algorithm), string(l.PublicKey))
	if l.HostKey != nil {
		out = appendField(out, string(l.HostKey))
	}
	return out
}

// appendField appends a string as RFC 4251 section 5 has it.
func appendField(out []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint32(out, uint32(len(s))), s...)
}

// decoder takes fields off the front of rest. After an error it takes no more; end tells of it.
type decoder struct {
	rest []byte
	size int // of the whole
	err  error
}

func (d *decoder) fail(format string, args ...any) {
	if d.err == nil {
		d.err = fmt.Errorf("%w: "+format, slices.Insert(args, 0, any(ErrMalformed))...)
	}
}

// field takes a string of at most limit bytes. It is part of what is read.
func (d *decoder) field(name string, limit int) []byte {
	if d.size > MaxMessage {
		d.fail("%d bytes; at most %d are read", d.size, MaxMessage)
	}
	if d.err != nil {
		return nil
	}
	if len(d.rest) < 4 {
		d.fail("it ends before the %s", name)
		return nil
	}
	n := binary.BigEndian.Uint32(d.rest)
	switch {
	case uint64(n) > uint64(limit):
		d.fail("the %s has %d bytes; at most %d are read", name, n, limit)
		return nil
	case uint64(n) > uint64(len(d.rest)-4):
		d.fail("it ends within the %s", name)
		return nil
	}
	f := d.rest[4 : 4+n]
	d.rest = d.rest[4+n:]
	return f
}

func (d *decoder) byte(name string) byte {
	if d.err == nil && len(d.rest) == 0 {
		d.fail("it ends before the %s", name)
	}
	if d.err != nil {
		return 0
	}
	b := d.rest[0]
	d.rest = d.rest[1:]
	return b
}

// end returns the first error; what is left over is one.
func (d *decoder) end() error {
	if d.err == nil && len(d.rest) > 0 {
		d.fail("%d bytes follow its end", len(d.rest))
	}
	return d.err
}
