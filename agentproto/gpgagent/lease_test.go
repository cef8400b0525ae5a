package gpgagent_test

import (
	"context"
	"crypto"
	"crypto/sha1"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/signwarden/signwarden/agentproto/gpgagent"
	"github.com/signwarden/signwarden/agentproto/lease"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

func newLease(t *testing.T, cfg lease.Config) *lease.Lease {
	t.Helper()
	l, err := lease.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// A key that the lease does not name is told as one that does not exist, by every command.
func TestLeaseHidesKeys(t *testing.T) {
	all := newSigners()
	keys := &softKeys{signers: map[string]crypto.Signer{"ed": all["ed"], "rsa": all["rsa"]}}
	c := connect(t, gpgagent.Config{Keys: keysFor(keys), Lease: newLease(t, lease.Config{Keys: []string{"e*"}})})
	ed, rsa := gripOf(t, all["ed"].Public()), gripOf(t, all["rsa"].Public())
	for _, tt := range []struct{ command, want string }{
		{"HAVEKEY " + ed, "OK"},
		{"HAVEKEY " + rsa, "ERR 67108881 No secret key <GPG Agent>"},
		{"KEYINFO " + rsa, "ERR 67108891 Not found <GPG Agent>"},
		{"KEYINFO --list", "S KEYINFO " + ed + " D - - - C - - - | OK"},
		{"READKEY " + rsa, "ERR 67141713 No such file or directory <GPG Agent>"},
		{"SIGKEY " + rsa, "OK"},
		{"SETHASH 8 " + strings.Repeat("00", 32), "OK"},
		{"PKSIGN", "ERR 67108881 No secret key <GPG Agent>"},
	} {
		if got := talk(t, c, tt.command); got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.command, got, tt.want)
		}
	}
	if calls := keys.takeCalls(); len(calls) != 0 {
		t.Errorf("a key was reached: %+v", calls)
	}
}

// Signatures are counted over all connections of the socket; one that fails costs nothing.
func TestLeaseIsSpent(t *testing.T) {
	all := newSigners()
	keys := &softKeys{signers: all}
	cfg := gpgagent.Config{Keys: keysFor(keys), Lease: newLease(t, lease.Config{Signatures: 2})}
	var replies []string
	sign := func() {
		t.Helper()
		c := connect(t, cfg)
		talk(t, c, "SIGKEY "+gripOf(t, all["ed"].Public()))
		talk(t, c, "SETHASH 8 "+strings.Repeat("00", 32))
		reply, _, _ := strings.Cut(talk(t, c, "PKSIGN"), " (")
		replies = append(replies, reply)
	}
	keys.setSign(func(context.Context) error { return fmt.Errorf("broken: %w", sigerr.TokenFailed) })
	sign()
	keys.setSign(nil)
	keys.mangle = func(b []byte) []byte { return b[1:] }
	sign()
	keys.mangle = nil
	sign()
	sign()
	sign()
	want := "ERR 67108993 Hardware problem <GPG Agent>,ERR 67108993 Hardware problem <GPG Agent>,D,D,ERR 67108897 Resources exhausted <GPG Agent>"
	if got := strings.Join(replies, ","); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if calls := keys.takeCalls(); len(calls) != 4 {
		t.Errorf("%d calls, want 4: the last one was refused before", len(calls))
	}
}

// gpg itself meets a socket whose time is over, or whose signatures are spent: the
// number tells which, and the key is there all the time.
func TestGPGLease(t *testing.T) {
	for name, tt := range map[string]struct {
		cfg   lease.Config
		words string
		code  int
	}{
		"expired": {lease.Config{Expires: time.Now().Add(-time.Second)}, "Ticket expired", 67109101},
		"spent":   {lease.Config{Signatures: 1}, "Resources exhausted", 67108897},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLease(t, tt.cfg)
			h := newGPGHome(t, func(c *gpgagent.Config) { c.Lease = l })
			if name == "spent" {
				if _, err := l.Take(); err != nil {
					t.Fatal(err)
				}
			}
			code, out := h.run(t, "gpg", "--batch", "--status-fd", "1", "-u", "ed", "-o", h.path("sig"), "--detach-sign", h.write(t, "msg", "x"))
			if code != 2 || !strings.Contains(out, fmt.Sprintf("[GNUPG:] FAILURE sign %d\n", tt.code)) || !strings.Contains(out, tt.words) {
				t.Errorf("exit status %d: %s", code, out)
			}
			if calls := h.keys.takeCalls(); len(calls) != 0 {
				t.Errorf("a key was reached: %+v", calls)
			}
		})
	}
}

// certifiedKeys are keys with certificates, or an error in their place.
type certifiedKeys struct {
	*softKeys
	certs map[string][]byte
	err   error
}

func (k certifiedKeys) Certificates(context.Context) (map[string][]byte, error) {
	return k.certs, k.err
}

// The certificate of a key that the peer may sign with is trusted, if the lease shows the key.
func TestOwnCertificateIsTrusted(t *testing.T) {
	keys := certifiedKeys{&softKeys{}, map[string][]byte{"ed": []byte("certificate"), "rsa": []byte("another")}, nil}
	fpr := func(name string) string { return fmt.Sprintf("%X", sha1.Sum(keys.certs[name])) }
	cfg := gpgagent.Config{Keys: keysFor(keys), Lease: newLease(t, lease.Config{Keys: []string{"ed"}})}
	c := connect(t, cfg)
	for command, want := range map[string]string{
		"ISTRUSTED " + fpr("ed"):    "S TRUSTLISTFLAG relax | OK",
		"ISTRUSTED " + fpr("rsa"):   "ERR 67108962 Not trusted <GPG Agent>",
		"ISTRUSTED " + unknownGrip:  "ERR 67108962 Not trusted <GPG Agent>",
		"LISTTRUSTED " + fpr("ed"):  "ERR 67109115 Forbidden <GPG Agent>",
		"MARKTRUSTED " + fpr("rsa"): "ERR 67109115 Forbidden <GPG Agent>",
	} {
		if got := talk(t, c, command); got != want {
			t.Errorf("%s: got %q, want %q", command, got, want)
		}
	}
	keys.err = errors.Join(sigerr.Unavailable)
	cfg.Keys = keysFor(keys)
	if got := talk(t, connect(t, cfg), "ISTRUSTED "+fpr("ed")); got != "ERR 67109040 Not operational <GPG Agent>" {
		t.Errorf("while the gateway is away: %q", got)
	}
}
