package gateway_test

import (
	"crypto"
	"crypto/ed25519"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	"github.com/signwarden/signwarden/gateway"
	"github.com/signwarden/signwarden/gateway/audit"
	"github.com/signwarden/signwarden/gateway/gatewaytest"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

const sshPolicy = gatewaytest.Policy + `
  - {name: git, principals: [alice], keys: ["*"], may: [sign], formats: [ssh-sig], namespaces: [git, "file*"]}
  - {name: login, principals: [bob], keys: ["*"], may: [sign], formats: [ssh-auth]}
  - {name: blind, principals: [gpg], keys: ["*"], may: [sign], formats: [openpgp, ssh-sig], blind: true}
`

// sshMessage is a request for a message as gatewaytest.Read reads those of SSH.
func sshMessage(key, format, text string) gateway.Request {
	return gateway.Request{Key: key, Message: []byte(text), Hash: crypto.SHA512, Format: format, FrontEnd: "test"}
}

// Ed25519 signs the message itself, other keys its digest; the record says what was read.
func TestSignSSH(t *testing.T) {
	f := gatewaytest.New(t, sshPolicy)
	for _, a := range []keys.Algorithm{keys.Ed25519, keys.P256, keys.P384, keys.RSA2048} {
		k := f.Key(t, string(a), a)
		for _, tt := range []struct{ who, format, text, namespace, user string }{
			{"alice", "ssh-sig", "SSHSIG git", "git", ""},
			{"alice", "ssh-sig", "SSHSIG files", "files", ""},
			{"root", "ssh-sig", "SSHSIG other", "other", ""},
			{"bob", "ssh-auth", "login root", "", "root"},
		} {
			sig, err := f.Sign(t.Context(), gatewaytest.Principal(t, tt.who), sshMessage(string(a), tt.format, tt.text))
			if err != nil {
				t.Errorf("%s, %s: %v", a, tt.text, err)
				continue
			}
			sum := sha512.Sum512([]byte(tt.text))
			signed, scheme := sum[:], keys.Scheme("")
			if scheme, err = keys.SchemeFor(a, ""); err != nil {
				t.Fatal(err)
			}
			if a == keys.Ed25519 {
				signed, scheme = []byte(tt.text), keys.EdDSAMessage
				if !ed25519.Verify(publicKey(t, k).(ed25519.PublicKey), []byte(tt.text), sig.Bytes) {
					t.Errorf("%s: the signature is not over the message", tt.text)
				}
			}
			if err := keys.Verify(publicKey(t, k), scheme, crypto.SHA512, signed, sig.Bytes); err != nil || sig.Scheme != scheme {
				t.Errorf("%s, %s: scheme %s, %v", a, tt.text, sig.Scheme, err)
			}
			e := f.Store.Last(t)
			if e.Outcome != audit.Signed || e.Namespace != tt.namespace || e.User != tt.user || e.Scheme != string(scheme) ||
				e.Digest != hex.EncodeToString(sum[:]) || e.Format != tt.format {
				t.Errorf("%s, %s: audit entry %+v", a, tt.text, e)
			}
		}
	}
}

// What no rule allows reaches no token, and there is no way to have other bytes
// signed as they are.
func TestSignSSHDenied(t *testing.T) {
	f := gatewaytest.New(t, sshPolicy)
	f.Key(t, "ed", keys.Ed25519)
	f.Key(t, "rsa", keys.RSA2048)
	digest := func(key, format, text string) gateway.Request {
		r := gatewaytest.Request(key, "")
		r.Digest, r.Hash, r.Format = []byte(text), crypto.SHA512, format
		return r
	}
	with := func(r gateway.Request, change func(*gateway.Request)) gateway.Request {
		change(&r)
		return r
	}
	// A blob of the namespace "file" with SHA-256 is as long as a SHA-512 digest.
	disguised := "SSHSIG\x00\x00\x00\x04file\x00\x00\x00\x00\x00\x00\x00\x06sha256\x00\x00\x00\x20" + strings.Repeat("h", 32)
	plain := strings.Repeat("d", 64)
	if len(disguised) != 64 {
		t.Fatalf("%d bytes", len(disguised))
	}
	tests := []struct {
		name, who string
		r         gateway.Request
		want      error
		reason    string
	}{
		{"another namespace", "alice", sshMessage("ed", "ssh-sig", "SSHSIG email"), sigerr.Denied, `its namespaces are git, file*, not "email"`},
		{"another namespace, RSA", "alice", sshMessage("rsa", "ssh-sig", "SSHSIG email"), sigerr.Denied, `not "email"`},
		{"a login", "alice", sshMessage("ed", "ssh-auth", "login root"), sigerr.Denied, `format "ssh-auth"`},
		{"a login by who may do everything", "root", sshMessage("ed", "ssh-auth", "login root"), sigerr.Denied, `does not allow the format "ssh-auth"; it allows *`},
		{"a login as a signature", "alice", sshMessage("ed", "ssh-sig", "login root"), sigerr.Invalid, "not what signatures of format ssh-sig are made of"},
		{"a signature as a login", "bob", sshMessage("ed", "ssh-auth", "SSHSIG git"), sigerr.Invalid, "not what signatures of format ssh-auth are made of"},
		{"any other message", "root", sshMessage("ed", "ssh-sig", "text"), sigerr.Invalid, "not what signatures"},
		{"no namespace", "root", sshMessage("ed", "ssh-sig", "SSHSIG "), sigerr.Invalid, "no content"},
		{"a terminal's codes", "root", sshMessage("ed", "ssh-sig", "SSHSIG \x1b[2J"), sigerr.Invalid, "no text"},
		{"a message of another format", "root", sshMessage("ed", "openpgp", "SSHSIG git"), sigerr.Invalid, `"openpgp"`},
		{"a digest where rules decide", "alice", digest("rsa", "ssh-sig", plain), sigerr.Denied, "bare digests"},
		{"a digest for Ed25519", "gpg", digest("ed", "ssh-sig", plain), sigerr.Invalid, "send the message"},
		{"a digest of a login", "root", digest("ed", "ssh-auth", plain), sigerr.Denied, "ssh-auth"},
		{"a blob as a digest", "gpg", digest("ed", "openpgp", disguised), sigerr.Invalid, `begins with "SSHSIG"`},
		{"a blob as a digest, blind for all", "root", digest("ed", "pkcs11", disguised), sigerr.Invalid, `begins with "SSHSIG"`},
		{"asked for by name", "root", with(digest("ed", "openpgp", plain), func(r *gateway.Request) { r.Scheme = keys.EdDSAMessage }), sigerr.Invalid, "eddsa-message"},
		{"asked for by name, with a message", "root", with(sshMessage("ed", "ssh-sig", "SSHSIG git"), func(r *gateway.Request) { r.Scheme = keys.EdDSAMessage }), sigerr.Invalid, "eddsa-message"},
		{"a stranger", "mallory", sshMessage("ed", "ssh-sig", "SSHSIG git"), sigerr.NotFound, "not the caller's"},
		{"SHA-1", "alice", with(sshMessage("rsa", "ssh-sig", "SSHSIG git"), func(r *gateway.Request) { r.Hash = crypto.SHA1 }), sigerr.Invalid, "SHA-1"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			rows := len(f.Store.Entries(t))
			sig, err := f.Sign(t.Context(), gatewaytest.Principal(t, tt.who), tt.r)
			if !errors.Is(err, tt.want) || sig.Bytes != nil {
				t.Errorf("got %v, %v; want %v", sig.Bytes, err, tt.want)
			}
			e := f.Store.Last(t)
			if e.Outcome != audit.Denied || !strings.Contains(e.Reason, tt.reason) || len(f.Store.Entries(t)) != rows+1 {
				t.Errorf("audit entry %+v, want a reason with %q", e, tt.reason)
			}
			if f.Token.Signs() != 0 {
				t.Fatal("the token has signed")
			}
			if text, ok := strings.CutPrefix(string(tt.r.Message), "SSHSIG "); ok && tt.want == sigerr.Denied && e.Namespace != text {
				t.Errorf("the record does not say what was seen: %+v", e)
			}
		})
	}
	// The one rule that names logins gives nothing else.
	if _, err := f.Sign(t.Context(), gatewaytest.Principal(t, "bob"), sshMessage("ed", "ssh-sig", "SSHSIG git")); !errors.Is(err, sigerr.Denied) {
		t.Errorf("bob signs for git: %v", err)
	}
	// What was in the way was the prefix, not the length.
	if _, err := f.Sign(t.Context(), gatewaytest.Principal(t, "gpg"), digest("ed", "openpgp", plain)); err != nil {
		t.Errorf("a digest: %v", err)
	}
}

// A token that signs something else than the message is found out.
func TestSignSSHVerifies(t *testing.T) {
	f := gatewaytest.New(t, sshPolicy)
	f.Key(t, "ed", keys.Ed25519)
	f.Token.After = func(sig []byte) []byte { sig[0] ^= 1; return sig }
	_, err := f.Sign(t.Context(), f.Root, sshMessage("ed", "ssh-sig", "SSHSIG git"))
	if e := f.Store.Last(t); !errors.Is(err, sigerr.TokenFailed) || e.Outcome != audit.Failed || e.Namespace != "git" {
		t.Errorf("got %v, audit entry %+v", err, e)
	}
}

// Within an id a message gets the same answer, and its digest none.
func TestSSHMessageAndDigestOfOneID(t *testing.T) {
	f := gatewaytest.New(t, sshPolicy)
	f.Key(t, "ed", keys.Ed25519)
	r := sshMessage("ed", "ssh-sig", "SSHSIG git")
	r.ID = "one"
	first, err := f.Sign(t.Context(), f.Root, r)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := f.Sign(t.Context(), f.Root, r); err != nil || string(again.Bytes) != string(first.Bytes) || f.Token.Signs() != 1 {
		t.Errorf("again: %+v, %v; the token signed %d times", again, err, f.Token.Signs())
	}
	sum := sha512.Sum512(r.Message)
	r.Message, r.Digest = nil, sum[:]
	if sig, err := f.Sign(t.Context(), f.Root, r); !errors.Is(err, sigerr.Invalid) {
		t.Errorf("its digest: %+v, %v", sig, err)
	}
	r.Message, r.Digest = []byte("SSHSIG file"), nil
	if sig, err := f.Sign(t.Context(), f.Root, r); !errors.Is(err, sigerr.Conflict) {
		t.Errorf("another message: %+v, %v", sig, err)
	}
}

// A session of this process sends messages too.
func TestSessionSignsMessages(t *testing.T) {
	f := gatewaytest.New(t, sshPolicy)
	k := f.Key(t, "ed", keys.Ed25519)
	s := f.Session(gatewaytest.Principal(t, "alice"), "ssh-agent", "ssh-sig")
	sig, err := s.SignMessage(t.Context(), "ed", "ssh-sig", crypto.SHA512, []byte("SSHSIG git"), "note")
	if err != nil || !ed25519.Verify(publicKey(t, k).(ed25519.PublicKey), []byte("SSHSIG git"), sig) {
		t.Errorf("got %x, %v", sig, err)
	}
	if e := f.Store.Last(t); e.FrontEnd != "ssh-agent" || e.ClaimNote != "note" || e.Namespace != "git" {
		t.Errorf("audit entry %+v", e)
	}
}
