package sshsig_test

import (
	"bytes"
	"crypto"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/signwarden/signwarden/formats/sshsig"
)

// captured reads what OpenSSH had signed, by name.
func captured(t testing.TB) map[string][]byte {
	t.Helper()
	files, err := filepath.Glob("testdata/*.hex")
	if err != nil || len(files) != 9 {
		t.Fatalf("%d captures, %v; want 9", len(files), err)
	}
	out := map[string][]byte{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		b, err := hex.DecodeString(strings.TrimSpace(string(text)))
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		out[strings.TrimSuffix(filepath.Base(file), ".hex")] = b
	}
	return out
}

func TestCaptured(t *testing.T) {
	all := captured(t)
	blobs := map[string]sshsig.Blob{
		"sign-ed25519":  {Namespace: "git", Hash: crypto.SHA512},
		"sign-ecdsa256": {Namespace: "git", Hash: crypto.SHA512},
		"sign-sha256":   {Namespace: "file", Hash: crypto.SHA256},
	}
	logins := map[string]struct {
		algorithm string
		hash      crypto.Hash
		bound     bool
	}{
		"login-rsa2048":  {"rsa-sha2-512", crypto.SHA512, true},
		"login-sha256":   {"rsa-sha2-256", crypto.SHA256, true},
		"login-ecdsa256": {"ecdsa-sha2-nistp256", crypto.SHA256, true},
		"login-ecdsa384": {"ecdsa-sha2-nistp384", crypto.SHA384, true},
		"login-ed25519":  {"ssh-ed25519", crypto.SHA512, true},
		"login-unbound":  {"ssh-ed25519", crypto.SHA512, false},
	}
	for name, want := range blobs {
		b, err := sshsig.ParseBlob(all[name])
		if err != nil || b.Namespace != want.Namespace || b.Hash != want.Hash || !bytes.Equal(b.Marshal(), all[name]) {
			t.Errorf("%s: %+v, %v", name, b, err)
		}
		if _, err := sshsig.ParseLogin(all[name]); !errors.Is(err, sshsig.ErrMalformed) {
			t.Errorf("%s as a login: %v", name, err)
		}
	}
	for name, want := range logins {
		l, err := sshsig.ParseLogin(all[name])
		if err != nil || l.User != "root" || l.Algorithm != want.algorithm || l.Hash() != want.hash ||
			(l.HostKey != nil) != want.bound || len(l.SessionID) != 64 || !bytes.Equal(l.Marshal(), all[name]) {
			t.Errorf("%s: %+v, %v", name, l, err)
		}
		if _, err := sshsig.ParseBlob(all[name]); !errors.Is(err, sshsig.ErrMalformed) {
			t.Errorf("%s as a blob: %v", name, err)
		}
	}
	if len(blobs)+len(logins) != len(all) {
		t.Errorf("%d captures are not looked at", len(all)-len(blobs)-len(logins))
	}
	// The one collision of lengths that the package comment is about.
	if n := len(all["sign-sha256"]); n != crypto.SHA512.Size() {
		t.Errorf("a blob of the namespace file with SHA-256 has %d bytes", n)
	}
}

// field is a string as SSH encodes it.
func field(s string) string {
	return string(binary.BigEndian.AppendUint32(nil, uint32(len(s)))) + s
}

func TestParseBlobErrors(t *testing.T) {
	digest := strings.Repeat("d", 32)
	tests := []struct{ name, text, want string }{
		{"nothing", "", "begin"},
		{"magic only", "SSHSIG", "before the namespace"},
		{"magic in lower case", "sshsig" + field("git") + field("") + field("sha256") + field(digest), "begin"},
		{"empty namespace", "SSHSIG" + field("") + field("") + field("sha256") + field(digest), "namespace is empty"},
		{"long namespace", "SSHSIG" + field(strings.Repeat("n", 256)) + field("") + field("sha256") + field(digest), "256 bytes"},
		{"reserved", "SSHSIG" + field("git") + field("x") + field("sha256") + field(digest), "reserved"},
		{"SHA-1", "SSHSIG" + field("git") + field("") + field("sha1") + field(digest[:20]), `"sha1"`},
		{"short hash", "SSHSIG" + field("git") + field("") + field("sha512") + field(digest), "32 bytes"},
		{"long hash", "SSHSIG" + field("git") + field("") + field("sha512") + field(strings.Repeat("d", 65)), "65 bytes"},
		{"trailing", "SSHSIG" + field("git") + field("") + field("sha256") + field(digest) + "x", "1 bytes follow"},
		{"cut", "SSHSIG" + field("git") + field("") + field("sha256") + field(digest)[:35], "within the hash"},
		{"huge length", "SSHSIG\xff\xff\xff\xffgit", "4294967295 bytes"},
		// What is put into a file, whose signature is over a blob (PROTOCOL.sshsig), is not signed itself.
		{"the armored form", "SSHSIG\x00\x00\x00\x01" + field("key"), ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b, err := sshsig.ParseBlob([]byte(tt.text))
			if b != nil || !errors.Is(err, sshsig.ErrMalformed) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %+v, %v; want ErrMalformed with %q", b, err, tt.want)
			}
		})
	}
}

func TestParseLoginErrors(t *testing.T) {
	// login is a request whose parts can be changed.
	login := func(change func(p map[string]string)) string {
		p := map[string]string{
			"session": field(strings.Repeat("s", 32)), "kind": "\x32", "user": field("root"), "service": field("ssh-connection"),
			"method": field("publickey"), "signs": "\x01", "algorithm": field("ssh-ed25519"),
			"key": field(field("ssh-ed25519") + field(strings.Repeat("k", 32))), "end": "",
		}
		change(p)
		text := ""
		for _, name := range []string{"session", "kind", "user", "service", "method", "signs", "algorithm", "key", "end"} {
			text += p[name]
		}
		return text
	}
	set := func(name, value string) string { return login(func(p map[string]string) { p[name] = value }) }
	if l, err := sshsig.ParseLogin([]byte(login(func(map[string]string) {}))); err != nil || l.User != "root" {
		t.Fatalf("as it is to be: %+v, %v", l, err)
	}
	tests := []struct{ name, text, want string }{
		{"nothing", "", "before the session identifier"},
		{"short session", set("session", field("short")), "5 bytes"},
		{"long session", set("session", field(strings.Repeat("s", 65))), "65 bytes"},
		{"another message", set("kind", "\x33"), "message number 51"},
		{"no user", set("user", field("")), "user name is empty"},
		{"long user", set("user", field(strings.Repeat("u", 256))), "256 bytes"},
		{"another service", set("service", field("ssh-userauth")), `"ssh-userauth"`},
		{"host-based", set("method", field("hostbased")), `"hostbased"`},
		{"a question", set("signs", "\x00"), "not to be signed"},
		{"true, but not 1", set("signs", "\x02"), "not to be signed"},
		{"SHA-1", login(func(p map[string]string) {
			p["algorithm"], p["key"] = field("ssh-rsa"), field(field("ssh-rsa"))
		}), `"ssh-rsa"`},
		{"a certificate", set("algorithm", field("ssh-ed25519-cert-v01@openssh.com")), "plain keys"},
		{"another key type", set("algorithm", field("rsa-sha2-512")), "does not sign"},
		{"no key type", set("key", field("")), "does not sign"},
		{"bound to nothing", set("method", field("publickey-hostbound-v00@openssh.com")), "before the server host key"},
		{"bound to an empty key", login(func(p map[string]string) {
			p["method"], p["end"] = field("publickey-hostbound-v00@openssh.com"), field("")
		}), "host key is empty"},
		{"trailing", set("end", "x"), "1 bytes follow"},
		{"a host key too much", set("end", field("key")), "7 bytes follow"},
		{"too large", set("end", strings.Repeat("x", sshsig.MaxMessage)), "at most 16384"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l, err := sshsig.ParseLogin([]byte(tt.text))
			if l != nil || !errors.Is(err, sshsig.ErrMalformed) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %+v, %v; want ErrMalformed with %q", l, err, tt.want)
			}
		})
	}
}

// Whatever is read, it is one of the two, and encodes to what it was; and no
// login request is as short as a digest.
func FuzzParse(f *testing.F) {
	for _, b := range captured(f) {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		blob, berr := sshsig.ParseBlob(b)
		login, lerr := sshsig.ParseLogin(b)
		if (blob == nil) == (berr == nil) || (login == nil) == (lerr == nil) || blob != nil && login != nil {
			t.Fatalf("blob %v, %v; login %v, %v", blob, berr, login, lerr)
		}
		if blob != nil && (!bytes.Equal(blob.Marshal(), b) || !sshsig.IsBlob(b)) {
			t.Errorf("blob %+v is encoded as %x, not %x", blob, blob.Marshal(), b)
		}
		if login != nil && (!bytes.Equal(login.Marshal(), b) || login.Hash() == 0 || len(b) <= crypto.SHA512.Size()) {
			t.Errorf("login %+v is encoded as %x, not %x", login, login.Marshal(), b)
		}
	})
}
