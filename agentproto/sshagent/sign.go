package sshagent

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"slices"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/signwarden/signwarden/formats/sshsig"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// The formats that Keys is asked for.
const (
	FormatSig  = "ssh-sig"
	FormatAuth = "ssh-auth"
)

// shownKey is a key that the peer may see.
type shownKey struct {
	name   string
	public crypto.PublicKey
	blob   []byte // as SSH encodes it
}

// shown is every key that the peer may see now, by name. Where two names have one key the
// first stands for both.
func (c *conn) shown() ([]shownKey, error) {
	pubs, err := c.keys.PublicKeys(c.ctx)
	if err != nil {
		return nil, err
	}
	shown := make([]shownKey, 0, len(pubs))
	seen := make(map[string]bool, len(pubs))
	for _, name := range slices.Sorted(maps.Keys(pubs)) {
		if !c.srv.cfg.Lease.Shows(name) {
			continue
		}
		pub, err := ssh.NewPublicKey(pubs[name])
		if err != nil {
			continue // of a kind that SSH does not know
		}
		blob := pub.Marshal()
		if !seen[string(blob)] {
			seen[string(blob)] = true
			shown = append(shown, shownKey{name, pubs[name], blob})
		}
	}
	return shown, nil
}

// algorithm is how a key signs in SSH. Ed25519 hashes with SHA-512 by itself.
type algorithm struct {
	name string
	hash crypto.Hash
}

var errSHA1 = fmt.Errorf("%w: ssh-rsa signs with SHA-1, which is not done; have the client ask for rsa-sha2-256 or rsa-sha2-512", sigerr.Invalid)

// algorithmOf is the one that a request's flags ask for. They are for RSA, and mean nothing with
// other keys.
func algorithmOf(pub crypto.PublicKey, flags uint32) (algorithm, error) {
	const known = agent.SignatureFlagRsaSha256 | agent.SignatureFlagRsaSha512
	if flags&^uint32(known) != 0 {
		return algorithm{}, fmt.Errorf("%w: signature flags 0x%x", sigerr.Invalid, flags)
	}
	switch k := pub.(type) {
	case *rsa.PublicKey:
		// OpenSSH's agent looks at the one for SHA-256 first as well.
		switch f := agent.SignatureFlags(flags); {
		case f&agent.SignatureFlagRsaSha256 != 0:
			return algorithm{ssh.KeyAlgoRSASHA256, crypto.SHA256}, nil
		case f&agent.SignatureFlagRsaSha512 != 0:
			return algorithm{ssh.KeyAlgoRSASHA512, crypto.SHA512}, nil
		}
		return algorithm{}, errSHA1
	case *ecdsa.PublicKey:
		switch k.Curve.Params().BitSize {
		case 256:
			return algorithm{ssh.KeyAlgoECDSA256, crypto.SHA256}, nil
		case 384:
			return algorithm{ssh.KeyAlgoECDSA384, crypto.SHA384}, nil
		}
	case ed25519.PublicKey:
		return algorithm{ssh.KeyAlgoED25519, crypto.SHA512}, nil
	}
	return algorithm{}, fmt.Errorf("%w: SSH signatures with a %T are not made", sigerr.Invalid, pub)
}

// failure is an error of a signature with what is logged of it.
type failure struct {
	request, key, format, algorithm string
	err                             error
}

// signRequest is SSH_AGENTC_SIGN_REQUEST.
type signRequest struct {
	Blob  []byte `sshtype:"13"`
	Data  []byte
	Flags uint32
}

// sign is the answer to SSH_AGENTC_SIGN_REQUEST.
func (c *conn) sign(request []byte) ([]byte, *failure) {
	f := &failure{request: rand.Text()}
	var r signRequest
	if f.err = ssh.Unmarshal(request, &r); f.err != nil {
		return nil, f
	}
	var shown []shownKey
	if shown, f.err = c.shown(); f.err != nil {
		return nil, f
	}
	i := slices.IndexFunc(shown, func(k shownKey) bool { return bytes.Equal(k.blob, r.Blob) })
	if i < 0 {
		f.err = fmt.Errorf("%w: of the socket's keys it is none", sigerr.NotFound)
		return nil, f
	}
	k := shown[i]
	f.key = k.name
	var a algorithm
	if a, f.err = algorithmOf(k.public, r.Flags); f.err != nil {
		return nil, f
	}
	f.algorithm = a.name
	if f.format, f.err = formatOf(r.Data, k, a); f.err != nil {
		return nil, f
	}
	var sig []byte
	if sig, f.err = c.request(f, k, a, r.Data); f.err != nil {
		return nil, f
	}
	c.log.Debug("signed", "request", f.request, "key", f.key, "format", f.format, "algorithm", f.algorithm)
	return ssh.Marshal(struct {
		Signature []byte `sshtype:"14"`
	}{ssh.Marshal(ssh.Signature{Format: a.name, Blob: sig})}), nil
}

// formatOf finds out what data are, to be signed with k by a.
func formatOf(data []byte, k shownKey, a algorithm) (string, error) {
	if sshsig.IsBlob(data) {
		_, err := sshsig.ParseBlob(data)
		if err != nil {
			return FormatSig, fmt.Errorf("%w: the data are no blob of ssh-keygen -Y sign: %w", sigerr.Invalid, err)
		}
		return FormatSig, nil
	}
	login, err := sshsig.ParseLogin(data)
	switch {
	case err != nil:
		return "", fmt.Errorf("%w: the data are neither a blob of ssh-keygen -Y sign nor a login, and nothing else is signed: %w", sigerr.Invalid, err)
	case login.Algorithm != a.name:
		return FormatAuth, fmt.Errorf("%w: a login with %s is to be signed with %s", sigerr.Invalid, login.Algorithm, a.name)
	case !bytes.Equal(login.PublicKey, k.blob):
		return FormatAuth, fmt.Errorf("%w: a login with another key is to be signed with %s", sigerr.Invalid, k.name)
	}
	return FormatAuth, nil
}

// request asks Keys if the lease leaves a signature; what fails costs it none.
func (c *conn) request(f *failure, k shownKey, a algorithm, data []byte) (sig []byte, err error) {
	giveBack, err := c.srv.cfg.Lease.Take()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			giveBack()
		}
	}()
	ctx, cancel := context.WithTimeout(c.ctx, c.srv.cfg.SignTimeout)
	defer cancel()
	note := fmt.Sprintf("request %s, algorithm %s, program %s", f.request, a.name, c.program)
	sig, err = c.keys.SignMessage(ctx, k.name, f.format, a.hash, data, note)
	if err != nil {
		if sigerr.Kind(err) == nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
			err = fmt.Errorf("%w: %w", sigerr.Timeout, err) // whatever a broken-off call said
		}
		return nil, err
	}
	return encode(k.public, sig)
}

// encode turns a signature into SSH's form (RFC 5656 section 3.1.2, RFC 8332, RFC 8709). One
// of the wrong length is a failure of the token.
func encode(pub crypto.PublicKey, sig []byte) ([]byte, error) {
	want := ed25519.SignatureSize
	switch k := pub.(type) {
	case *rsa.PublicKey:
		want = k.Size()
	case *ecdsa.PublicKey:
		want = 2 * ((k.Curve.Params().N.BitLen() + 7) / 8)
	}
	if len(sig) != want {
		return nil, fmt.Errorf("%w: signature of %d bytes for a %T", sigerr.TokenFailed, len(sig), pub)
	}
	if _, ok := pub.(*ecdsa.PublicKey); !ok {
		return sig, nil
	}
	return ssh.Marshal(struct{ R, S *big.Int }{
		new(big.Int).SetBytes(sig[:want/2]), new(big.Int).SetBytes(sig[want/2:]),
	}), nil
}
