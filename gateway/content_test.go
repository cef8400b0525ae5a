package gateway_test

import (
	"context"
	"crypto"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/signwarden/signwarden/gateway"
	"github.com/signwarden/signwarden/gateway/audit"
	"github.com/signwarden/signwarden/gateway/gatewaytest"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/policy"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

const readers = gatewaytest.Policy + `
  - {name: ours, principals: [ci], keys: [k], may: [sign], formats: [rpm], content: rpm, packages: {names: ["ours-*"], vendors: [Example]}}
  - {name: any, principals: [any], keys: [k], may: [sign], formats: ["*"]}
  - {name: look, principals: [look], keys: [k], may: [read]}
`

// message is a request for a message as gatewaytest.Read reads it.
func message(parts ...string) gateway.Request {
	return gateway.Request{
		Key: "k", Message: []byte(strings.Join(parts, "\n")), Hash: crypto.SHA256, Format: "rpm", FrontEnd: "test",
		Claim: gateway.Claim{NEVRA: "claimed-1-1.noarch"},
	}
}

func TestSignMessage(t *testing.T) {
	f := gatewaytest.New(t, readers)
	k := f.Key(t, "k", keys.Ed25519)
	for _, who := range []string{"ci", "any", "root"} {
		r := message("ours-tools", "2", "1.0", "3", "noarch", "Example")
		sig, err := f.Sign(t.Context(), gatewaytest.Principal(t, who), r)
		if err != nil {
			t.Fatalf("%s: %v", who, err)
		}
		sum := sha256.Sum256(r.Message)
		if err := keys.Verify(publicKey(t, k), sig.Scheme, crypto.SHA256, sum[:], sig.Bytes); err != nil {
			t.Errorf("%s: the signature is not over the message's digest: %v", who, err)
		}
		e := f.Store.Last(t)
		if e.Outcome != audit.Signed || e.NEVRA != "ours-tools-2:1.0-3.noarch" || e.Vendor != "Example" ||
			e.ClaimNEVRA != "claimed-1-1.noarch" || e.Digest != hex.EncodeToString(sum[:]) {
			t.Errorf("%s: audit entry %+v", who, e)
		}
	}
	for who, want := range map[string][]string{"ci": {"rpm"}, "any": {"rpm", "ssh-sig"}, "root": nil, "look": nil} {
		v, err := f.Gateway.Key(t.Context(), gatewaytest.Principal(t, who), "k")
		if err != nil || !slices.Equal(v.Reads, want) {
			t.Errorf("%s: reads %v, %v; want %v", who, v.Reads, err, want)
		}
	}
}

// What is turned away reaches no token, and its record says what was seen.
func TestSignMessageDenied(t *testing.T) {
	read := 0
	f := gatewaytest.New(t, readers, func(c *gateway.Config) {
		c.Read = func(format string, h crypto.Hash, b []byte) (*policy.Content, error) {
			read++
			return gatewaytest.Read(format, h, b)
		}
	})
	f.Key(t, "k", keys.P256)
	edit := func(change func(*gateway.Request), parts ...string) gateway.Request {
		r := message(parts...)
		change(&r)
		return r
	}
	good := []string{"ours-a", "", "1", "1", "noarch", "Example"}
	blind := gatewaytest.Request("k", "text")
	blind.Format = "rpm"
	tests := []struct {
		name, who string
		r         gateway.Request
		want      error
		reason    string
		reads     int
	}{
		{"another package", "ci", message("theirs", "", "1", "1", "noarch", "Example"), sigerr.Denied, `its names are ours-*, not "theirs"`, 1},
		{"another vendor", "ci", message("ours-a", "", "1", "1", "noarch", "Evil"), sigerr.Denied, "vendors", 1},
		{"a bare digest", "ci", blind, sigerr.Denied, "does not allow bare digests", 0},
		{"a bare digest, of any", "any", blind, sigerr.Denied, "does not allow bare digests", 0},
		{"no package", "ci", message("x"), sigerr.Invalid, "1 lines", 1},
		{"an empty message", "any", edit(func(r *gateway.Request) { r.Message = []byte{} }), sigerr.Invalid, "1 lines", 1},
		{"a long part", "any", message(strings.Repeat("a", 256), "", "1", "1", "noarch", ""), sigerr.Invalid, "256 bytes", 1},
		{"a control character", "any", message("a\tb", "", "1", "1", "noarch", ""), sigerr.Invalid, "no text", 1},
		{"no UTF-8", "any", message("a", "", "1", "1", "noarch", "\xff"), sigerr.Invalid, "no text", 1},
		{"both", "any", edit(func(r *gateway.Request) { r.Digest = blind.Digest }, good...), sigerr.Invalid, "not both", 0},
		{"a format that is not read", "any", edit(func(r *gateway.Request) { r.Format = "kmod" }, good...), sigerr.Invalid, `"kmod"`, 0},
		{"a weak hash", "any", edit(func(r *gateway.Request) { r.Hash = crypto.SHA1 }, good...), sigerr.Invalid, "SHA-1", 0},
		{"may only look", "look", message(good...), sigerr.Denied, "does not give sign", 0},
		{"a stranger", "mallory", message(good...), sigerr.NotFound, "not the caller's", 0},
		{"a stranger's nonsense", "mallory", message("x"), sigerr.NotFound, "not the caller's", 0},
		{"no such key", "root", edit(func(r *gateway.Request) { r.Key = "none" }, good...), sigerr.NotFound, "no such key", 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			signs, rows := f.Token.Signs(), len(f.Store.Entries(t))
			read = 0
			sig, err := f.Sign(t.Context(), gatewaytest.Principal(t, tt.who), tt.r)
			if !errors.Is(err, tt.want) || sig.Bytes != nil {
				t.Errorf("got %v, %v; want %v", sig.Bytes, err, tt.want)
			}
			e := f.Store.Last(t)
			if e.Outcome != audit.Denied || !strings.Contains(e.Reason, tt.reason) || len(f.Store.Entries(t)) != rows+1 {
				t.Errorf("audit entry %+v, want a reason with %q", e, tt.reason)
			}
			if f.Token.Signs() != signs || read != tt.reads {
				t.Errorf("the token signed %d times, %d messages were read; want 0, %d", f.Token.Signs()-signs, read, tt.reads)
			}
			if tt.reads == 1 && tt.want == sigerr.Denied && e.NEVRA == "" {
				t.Errorf("the record does not say what was seen: %+v", e)
			}
		})
	}
}

// The same id with a message and with its digest is one request, and each must be allowed by itself.
func TestMessageAndDigestOfOneID(t *testing.T) {
	f := gatewaytest.New(t, readers)
	f.Key(t, "k", keys.Ed25519)
	r := message("ours-a", "", "1", "1", "noarch", "Example")
	r.ID = "one"
	sum := sha256.Sum256(r.Message)
	bare := r
	bare.Message, bare.Digest = nil, sum[:]
	ci, root := gatewaytest.Principal(t, "ci"), f.Root
	first, err := f.Sign(t.Context(), ci, r)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := f.Sign(t.Context(), ci, r); err != nil || string(again.Bytes) != string(first.Bytes) || again.AuditRow != first.AuditRow {
		t.Errorf("again: %+v, %v; want the first answer", again, err)
	}
	if _, err := f.Sign(t.Context(), ci, bare); !errors.Is(err, sigerr.Denied) {
		t.Errorf("its digest: %v, want Denied", err)
	}
	for _, r := range []gateway.Request{r, bare} {
		if _, err := f.Sign(t.Context(), root, r); err != nil {
			t.Errorf("root: %v", err)
		}
	}
	if got := f.Token.Signs(); got != 2 {
		t.Errorf("the token signed %d times, want 2", got)
	}
}

// A rule that changes while the token works is held against what was read.
func TestMessageRuleChanges(t *testing.T) {
	f := gatewaytest.New(t, readers)
	f.Key(t, "k", keys.Ed25519)
	f.Token.Before = hookOnce(func() {
		next := strings.ReplaceAll(readers, "ours-*", "mine-*")
		if _, err := f.ApplyPolicy(t.Context(), f.Root, "test", []byte(next)); err != nil {
			t.Error(err)
		}
	})
	_, err := f.Sign(t.Context(), gatewaytest.Principal(t, "ci"), message("ours-a", "", "1", "1", "noarch", "Example"))
	if !errors.Is(err, sigerr.Denied) {
		t.Errorf("got %v, want Denied", err)
	}
	if e := f.Store.Last(t); e.Outcome != audit.Denied || !strings.Contains(e.Reason, "mine-*") {
		t.Errorf("audit entry %+v", e)
	}
}

// hookOnce is a Token.Before that runs f before the first signature.
func hookOnce(f func()) func(context.Context, []byte) error {
	var once sync.Once
	return func(context.Context, []byte) error {
		once.Do(f)
		return nil
	}
}
