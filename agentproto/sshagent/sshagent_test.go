package sshagent_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/signwarden/signwarden/agentproto"
	"github.com/signwarden/signwarden/agentproto/lease"
	"github.com/signwarden/signwarden/agentproto/sshagent"
	"github.com/signwarden/signwarden/formats/sshsig"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// transact sends one request and returns the reply.
func transact(c net.Conn, request []byte) ([]byte, error) {
	errs := make(chan error, 1)
	go func() {
		_, err := c.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(request))), request...))
		errs <- err
	}()
	var size [4]byte
	_, err := io.ReadFull(c, size[:])
	reply := make([]byte, binary.BigEndian.Uint32(size[:]))
	if err == nil {
		_, err = io.ReadFull(c, reply)
	}
	return reply, errors.Join(err, <-errs)
}

// blob is what ssh-keygen -Y sign has signed.
func blob(namespace string) []byte {
	return (&sshsig.Blob{Namespace: namespace, Hash: crypto.SHA512, Digest: make([]byte, 64)}).Marshal()
}

// identities reads an SSH_AGENT_IDENTITIES_ANSWER.
func identities(t testing.TB, reply []byte) map[string]string {
	t.Helper()
	if len(reply) < 5 || reply[0] != 12 {
		t.Fatalf("reply %x is no list of keys", reply)
	}
	out, rest := map[string]string{}, reply[5:]
	for range binary.BigEndian.Uint32(reply[1:]) {
		var k struct {
			Blob    []byte
			Comment string
			Rest    []byte `ssh:"rest"`
		}
		if err := ssh.Unmarshal(rest, &k); err != nil {
			t.Fatal(err)
		}
		out[string(k.Blob)], rest = k.Comment, k.Rest
	}
	if len(rest) > 0 {
		t.Fatalf("%d bytes follow the keys", len(rest))
	}
	return out
}

// OpenSSH's own requests are answered as its agent does, where they are served at all.
func TestReplay(t *testing.T) {
	all := captured(t)
	theirs := identities(t, all["list"][0].reply)
	keys := &softKeys{public: map[string]crypto.PublicKey{}}
	for b, comment := range theirs {
		pub, err := ssh.ParsePublicKey([]byte(b))
		if err != nil {
			t.Fatal(err)
		}
		keys.public[comment] = pub.(ssh.CryptoPublicKey).CryptoPublicKey()
	}
	hashes := map[string]crypto.Hash{"ecdsa256": crypto.SHA256, "ecdsa384": crypto.SHA384, "ed25519": crypto.SHA512, "rsa2048": crypto.SHA512, "unbound": crypto.SHA512}
	signed := 0
	for name, exchanges := range all {
		c, _ := connect(t, sshagent.Config{Keys: keysOf(keys)})
		for _, x := range exchanges {
			reply, err := transact(c, x.request)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			calls := keys.takeCalls()
			switch x.request[0] {
			case 11:
				if got := identities(t, reply); !maps.Equal(got, theirs) || len(got) != 4 {
					t.Errorf("%s: keys %q, want %q", name, got, theirs)
				}
			case 13:
				signed++
				kind, what, _ := strings.Cut(name, "-")
				hash, ok := hashes[what]
				if name == "sign-sha256" {
					hash = crypto.SHA512 // of Ed25519; SHA-256 is within the blob
				} else if !ok {
					hash = crypto.SHA256
				}
				format := map[string]string{"sign": sshagent.FormatSig, "login": sshagent.FormatAuth}[kind]
				if len(calls) != 1 || calls[0].Format != format || calls[0].Hash != hash || !bytes.Contains(x.request, calls[0].Message) || len(calls[0].Message) < 60 {
					t.Errorf("%s: calls %+v, want one of %s, %v", name, calls, format, hash)
				}
				var got, want struct {
					Sig []byte `sshtype:"14"`
				}
				var gotSig, wantSig ssh.Signature
				err := errors.Join(ssh.Unmarshal(reply, &got), ssh.Unmarshal(x.reply, &want), ssh.Unmarshal(got.Sig, &gotSig), ssh.Unmarshal(want.Sig, &wantSig))
				if err != nil || gotSig.Format != wantSig.Format || !strings.Contains(gotSig.Format, "ecdsa") && len(gotSig.Blob) != len(wantSig.Blob) {
					t.Errorf("%s: signature %+v, want one like %+v: %v", name, gotSig, wantSig, err)
				}
				calls = nil
			default:
				if !bytes.Equal(reply, []byte{5}) {
					t.Errorf("%s: request %d is answered %x", name, x.request[0], reply)
				}
			}
			if len(calls) != 0 {
				t.Errorf("%s: request %d reached the keys: %+v", name, x.request[0], calls)
			}
		}
	}
	if signed != 11 {
		t.Errorf("%d signatures, want 11", signed)
	}
}

// Each kind of key signs, and another implementation verifies it.
func TestSign(t *testing.T) {
	keys := newKeys()
	a, _ := serve(t, sshagent.Config{Keys: keysOf(keys)})
	listed, err := a.List()
	if err != nil || len(listed) != 4 {
		t.Fatalf("%v, %v", listed, err)
	}
	if got := []string{listed[0].Comment, listed[1].Comment, listed[2].Comment, listed[3].Comment}; !slices.IsSorted(got) {
		t.Errorf("keys %q are not in the order of their names", got)
	}
	for _, k := range listed {
		flags := map[agent.SignatureFlags]string{0: k.Format}
		if k.Format == ssh.KeyAlgoRSA {
			flags = map[agent.SignatureFlags]string{agent.SignatureFlagRsaSha256: ssh.KeyAlgoRSASHA256, agent.SignatureFlagRsaSha512: ssh.KeyAlgoRSASHA512}
		}
		for flag, format := range flags {
			sig, err := a.SignWithFlags(k, blob("git"), flag)
			if err != nil || sig.Format != format {
				t.Errorf("%s: %+v, %v; want %s", k.Comment, sig, err, format)
				continue
			}
			if err := k.Verify(blob("git"), sig); err != nil {
				t.Errorf("%s: %v", k.Comment, err)
			}
			calls := keys.takeCalls()
			if len(calls) != 1 || calls[0].Key != k.Comment || !strings.Contains(calls[0].Note, "algorithm "+format) || !strings.Contains(calls[0].Note, "request ") {
				t.Errorf("%s: %+v", k.Comment, calls)
			}
		}
	}
}

// What is refused reaches no key, and the log says why.
func TestSignRefused(t *testing.T) {
	keys := newKeys()
	a, log := serve(t, sshagent.Config{Keys: keysOf(keys)})
	listed, err := a.List()
	if err != nil {
		t.Fatal(err)
	}
	key := map[string]*agent.Key{}
	for _, k := range listed {
		key[k.Comment] = k
	}
	theirs, err := ssh.NewPublicKey(foreign(t))
	if err != nil {
		t.Fatal(err)
	}
	loginWith := func(k ssh.PublicKey, algorithm string) []byte {
		return (&sshsig.Login{SessionID: make([]byte, 32), User: "root", Algorithm: algorithm, PublicKey: k.Marshal()}).Marshal()
	}
	tests := []struct {
		name  string
		key   ssh.PublicKey
		data  []byte
		flags agent.SignatureFlags
		want  string
	}{
		{"SHA-1", key["rsa"], blob("git"), 0, "SHA-1"},
		{"an unknown flag", key["rsa"], blob("git"), 8 | agent.SignatureFlagRsaSha512, "0xc"},
		{"an unknown flag, Ed25519", key["ed25519"], blob("git"), 1, "0x1"},
		{"another's key", theirs, blob("git"), 0, "of the socket's keys it is none"},
		{"text", key["ed25519"], []byte("text"), 0, "nothing else is signed"},
		{"a digest", key["ed25519"], make([]byte, 64), 0, "nothing else is signed"},
		{"nothing", key["ed25519"], nil, 0, "nothing else is signed"},
		{"a blob with more behind it", key["ed25519"], append(blob("git"), 0), 0, "no blob"},
		{"a blob of no namespace", key["ed25519"], blob(""), 0, "namespace is empty"},
		{"a login with another key", key["ed25519"], loginWith(theirs, "ssh-ed25519"), 0, "a login with another key"},
		{"a login with another algorithm", key["rsa"], loginWith(key["rsa"], "rsa-sha2-256"), agent.SignatureFlagRsaSha512, "is to be signed with rsa-sha2-512"},
		{"a login with SHA-1", key["rsa"], loginWith(key["rsa"], "ssh-rsa"), agent.SignatureFlagRsaSha512, `"ssh-rsa"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			before := len(log.String())
			sig, err := a.SignWithFlags(tt.key, tt.data, tt.flags)
			if err == nil || len(keys.takeCalls()) != 0 {
				t.Errorf("got %+v, %v", sig, err)
			}
			if said := strings.ReplaceAll(log.String()[before:], `\"`, `"`); !strings.Contains(said, tt.want) || !strings.Contains(said, "request=") {
				t.Errorf("the log says %q, want %q", said, tt.want)
			}
		})
	}
	if sig, err := a.SignWithFlags(key["ed25519"], loginWith(key["ed25519"], "ssh-ed25519"), 0); err != nil || key["ed25519"].Verify(loginWith(key["ed25519"], "ssh-ed25519"), sig) != nil {
		t.Errorf("a login as it is to be: %v", err)
	}
}

// foreign is the Ed25519 key of the captures.
func foreign(t testing.TB) crypto.PublicKey {
	t.Helper()
	b := captured(t)["sign-ed25519"][1].request
	var r struct {
		Blob []byte `sshtype:"13"`
		Rest []byte `ssh:"rest"`
	}
	if err := ssh.Unmarshal(b, &r); err != nil {
		t.Fatal(err)
	}
	pub, err := ssh.ParsePublicKey(r.Blob)
	if err != nil {
		t.Fatal(err)
	}
	return pub.(ssh.CryptoPublicKey).CryptoPublicKey()
}

// Nothing but the two requests is served.
func TestOthersRefused(t *testing.T) {
	keys := newKeys()
	a, log := serve(t, sshagent.Config{Keys: keysOf(keys)})
	listed, err := a.List()
	if err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]func() error{
		"add a key":        func() error { return a.Add(agent.AddedKey{PrivateKey: newSigners()["ed25519"]}) },
		"with constraints": func() error { return a.Add(agent.AddedKey{PrivateKey: newSigners()["rsa"], LifetimeSecs: 9}) },
		"remove a key":     func() error { return a.Remove(listed[0]) },
		"remove all keys":  a.RemoveAll,
		"what=lock":        func() error { return a.Lock([]byte("pass phrase")) },
		"what=unlock":      func() error { return a.Unlock([]byte("pass phrase")) },
		"":                 func() error { _, err := a.Extension("query", nil); return err },
	} {
		if err := f(); err == nil {
			t.Errorf("%s: no error", name)
		}
		if !strings.Contains(log.String(), name) {
			t.Errorf("the log does not tell of %q:\n%s", name, log)
		}
	}
	if strings.Contains(log.String(), "pass") {
		t.Errorf("the log has a pass phrase:\n%s", log)
	}
	if again, err := a.List(); err != nil || len(again) != len(listed) {
		t.Errorf("after all that: %v, %v", again, err)
	}
}

// Failures of Keys are told as such, in the log, and cost the lease nothing.
func TestFailures(t *testing.T) {
	l, err := lease.New(lease.Config{Signatures: 1})
	if err != nil {
		t.Fatal(err)
	}
	keys := newKeys()
	a, log := serve(t, sshagent.Config{Keys: keysOf(keys), Lease: l})
	listed, err := a.List()
	if err != nil {
		t.Fatal(err)
	}
	sign := func() error { _, err := a.Sign(listed[0], blob("git")); return err }
	fail := func(want string, change func(*softKeys)) {
		t.Helper()
		keys.set(change)
		if err := sign(); err == nil {
			t.Errorf("%s: no error", want)
		}
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log does not say %q:\n%s", want, log)
		}
		keys.set(func(k *softKeys) { k.before, k.mangle, k.list = nil, nil, nil })
	}
	for _, kind := range sigerr.Kinds() {
		fail(kind.Error(), func(k *softKeys) { k.before = func(context.Context) error { return fmt.Errorf("%w: told", kind) } })
	}
	fail("no kind", func(k *softKeys) { k.before = func(context.Context) error { return errors.New("no kind") } })
	fail("signature of 63 bytes", func(k *softKeys) { k.mangle = func(b []byte) []byte { return b[:63] } })
	fail("list is gone", func(k *softKeys) { k.list = fmt.Errorf("%w: list is gone", sigerr.Unavailable) })
	keys.set(func(k *softKeys) { k.list = sigerr.Unavailable })
	if _, err := a.List(); err == nil {
		t.Error("a list that there is not")
	}
	keys.set(func(k *softKeys) { k.list = nil })
	if err := sign(); err != nil {
		t.Errorf("the lease's one signature: %v", err)
	}
	keys.takeCalls()
	if err := sign(); err == nil || len(keys.takeCalls()) != 0 || !strings.Contains(log.String(), "are spent") {
		t.Errorf("beyond the lease: %v", err)
	}
}

// A lease hides keys, and a peer without keys is told so at each request.
func TestShown(t *testing.T) {
	l, err := lease.New(lease.Config{Keys: []string{"p*"}})
	if err != nil {
		t.Fatal(err)
	}
	keys := newKeys()
	a, _ := serve(t, sshagent.Config{Keys: keysOf(keys), Lease: l})
	listed, err := a.List()
	if err != nil || len(listed) != 2 || listed[0].Comment != "p256" {
		t.Fatalf("%v, %v", listed, err)
	}
	hidden, err := ssh.NewPublicKey(newSigners()["ed25519"].Public())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Sign(hidden, blob("git")); err == nil || len(keys.takeCalls()) != 0 {
		t.Errorf("a hidden key: %v", err)
	}
	none, log := serve(t, sshagent.Config{Keys: func(agentproto.Peer) (sshagent.Keys, error) { return nil, sigerr.Unauthenticated }})
	if _, err := none.List(); err == nil || !strings.Contains(log.String(), sigerr.Unauthenticated.Error()) {
		t.Errorf("a peer of no principal: %v\n%s", err, log)
	}
	if _, err := none.Sign(hidden, blob("git")); err == nil {
		t.Error("a peer of no principal signs")
	}

	// Two names of one key are one key.
	keys = newKeys()
	keys.public = map[string]crypto.PublicKey{"another": newSigners()["ed25519"].Public()}
	a, _ = serve(t, sshagent.Config{Keys: keysOf(keys)})
	listed, err = a.List()
	if err != nil || len(listed) != 4 || listed[0].Comment != "another" {
		t.Errorf("%v, %v", listed, err)
	}
}

// More keys than OpenSSH's clients take are cut, and the rest still signs.
func TestManyKeys(t *testing.T) {
	keys := &softKeys{public: map[string]crypto.PublicKey{}, signers: map[string]crypto.Signer{"zz": newSigners()["ed25519"]}}
	for i := range sshagent.MaxKeys + 10 {
		pub := make([]byte, 32)
		binary.BigEndian.PutUint32(pub, uint32(i))
		keys.public[fmt.Sprintf("k%05d", i)] = ed25519.PublicKey(pub)
	}
	c, log := connect(t, sshagent.Config{Keys: keysOf(keys)})
	reply, err := transact(c, []byte{11})
	if err != nil || len(identities(t, reply)) != sshagent.MaxKeys || len(reply) > sshagent.MaxReply {
		t.Fatalf("%d bytes, %v", len(reply), err)
	}
	if !strings.Contains(log.String(), "listed=2048") {
		t.Errorf("the log does not tell:\n%s", log)
	}
	a, _ := serve(t, sshagent.Config{Keys: keysOf(keys)})
	pub, err := ssh.NewPublicKey(newSigners()["ed25519"].Public())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Sign(pub, blob("git")); err != nil {
		t.Errorf("a key that is not listed: %v", err)
	}
	long := strings.Repeat("n", 64<<10)
	keys.set(func(k *softKeys) {
		k.signers = nil
		k.public = map[string]crypto.PublicKey{}
		for i := range 8 {
			pub := make([]byte, 32)
			pub[0] = byte(i)
			k.public[fmt.Sprint(i, long)] = ed25519.PublicKey(pub)
		}
	})
	reply, err = transact(c, []byte{11})
	if err != nil || len(identities(t, reply)) != 3 || len(reply) > sshagent.MaxReply {
		t.Errorf("long names: %d bytes, %v", len(reply), err)
	}
}

// Frames that are none end the connection, before anything is allocated for them.
func TestFrames(t *testing.T) {
	for name, frame := range map[string]string{"empty": "\x00\x00\x00\x00", "too long": "\x00\x01\x00\x01\x0b", "huge": "\xff\xff\xff\xff\x0b"} {
		c, log := connect(t, sshagent.Config{Keys: keysOf(newKeys())})
		go c.Write([]byte(frame))
		if b, err := io.ReadAll(c); err != nil || len(b) > 0 {
			t.Errorf("%s: %x, %v", name, b, err)
		}
		if !strings.Contains(log.String(), "1 to 65536 are read") {
			t.Errorf("%s: the log says %q", name, log)
		}
	}
	c, _ := connect(t, sshagent.Config{Keys: keysOf(newKeys())})
	for _, request := range []string{"\x0bx", "\x0d", "\x0d\x00\x00\x00\x01", "\xff"} {
		if reply, err := transact(c, []byte(request)); err != nil || string(reply) != "\x05" {
			t.Errorf("%x: %x, %v", request, reply, err)
		}
	}
	if reply, err := transact(c, append([]byte{17}, make([]byte, sshagent.MaxRequest-1)...)); err != nil || string(reply) != "\x05" {
		t.Errorf("the longest: %x, %v", reply, err)
	}
}

// Time: a request that stops half way, a token that hangs, a shutdown.
func TestTimes(t *testing.T) {
	t.Run("half a request", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c, log := connect(t, sshagent.Config{Keys: keysOf(newKeys()), FrameTimeout: time.Second})
			time.Sleep(time.Hour) // idle before the first byte is nothing
			if _, err := c.Write([]byte{0, 0}); err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			if b, err := io.ReadAll(c); len(b) > 0 || err != nil || time.Since(start) != time.Second {
				t.Errorf("%x, %v after %v", b, err, time.Since(start))
			}
			if !strings.Contains(log.String(), "timeout") {
				t.Errorf("the log says %q", log)
			}
		})
	})
	t.Run("a token that hangs", func(t *testing.T) {
		newSigners() // outside of the bubble's clock nothing differs, but it takes a while
		synctest.Test(t, func(t *testing.T) {
			keys := newKeys()
			keys.before = func(ctx context.Context) error { <-ctx.Done(); return errors.New("cut off") }
			a, log := serve(t, sshagent.Config{Keys: keysOf(keys)})
			pub, err := ssh.NewPublicKey(newSigners()["ed25519"].Public())
			if err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			if _, err := a.Sign(pub, blob("git")); err == nil || time.Since(start) != sshagent.DefaultSignTimeout {
				t.Errorf("%v after %v", err, time.Since(start))
			}
			if !strings.Contains(log.String(), sigerr.Timeout.Error()) {
				t.Errorf("the log says %q", log)
			}
		})
	})
	t.Run("a shutdown", func(t *testing.T) {
		srv, err := sshagent.New(sshagent.Config{Keys: keysOf(newKeys())})
		if err != nil {
			t.Fatal(err)
		}
		near, far := net.Pipe()
		defer near.Close()
		ctx, stop := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { srv.ServeConn(ctx, far, agentproto.Peer{}) })
		if reply, err := transact(near, []byte{11}); err != nil || reply[0] != 12 {
			t.Errorf("%x, %v", reply, err)
		}
		stop()
		wg.Wait()
	})
}

// One reply for each request, whatever it is; and what reaches the keys is what sshsig reads.
func FuzzRequest(f *testing.F) {
	for _, exchanges := range captured(f) {
		for _, x := range exchanges {
			f.Add(x.request)
		}
	}
	pub := foreign(f)
	f.Fuzz(func(t *testing.T, request []byte) {
		if len(request) == 0 || len(request) > sshagent.MaxRequest {
			return
		}
		keys := &softKeys{public: map[string]crypto.PublicKey{"k": pub}}
		c, _ := connect(t, sshagent.Config{Keys: keysOf(keys)})
		reply, err := transact(c, request)
		if err != nil || len(reply) == 0 {
			t.Fatalf("%x, %v", reply, err)
		}
		calls := keys.takeCalls()
		if (reply[0] == 14) != (len(calls) == 1) || reply[0] != 14 && reply[0] != 12 && reply[0] != 5 {
			t.Errorf("%x with %d calls", reply, len(calls))
		}
		for _, call := range calls {
			_, berr := sshsig.ParseBlob(call.Message)
			_, lerr := sshsig.ParseLogin(call.Message)
			if call.Format == sshagent.FormatSig && berr != nil || call.Format == sshagent.FormatAuth && lerr != nil {
				t.Errorf("a message that is no %s: %x", call.Format, call.Message)
			}
		}
	})
}
