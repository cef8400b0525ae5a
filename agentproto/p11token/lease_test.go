package p11token_test

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/signwarden/signwarden/agentproto/lease"
	"github.com/signwarden/signwarden/agentproto/p11rpc"
	"github.com/signwarden/signwarden/agentproto/p11token"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// A lease takes keys away, and signatures beyond its number or its time, for all connections
// together; a signature that was not made costs none.
func TestLease(t *testing.T) {
	now := time.Unix(1e9, 0)
	l, err := lease.New(lease.Config{
		Keys: []string{"p*"}, Signatures: 2, Expires: now.Add(time.Hour), Now: func() time.Time { return now },
	})
	if err != nil {
		t.Fatal(err)
	}
	keys := newSoftKeys("rsa", "p256", "p384")
	cfg := p11token.Config{Keys: keysFor(keys), Lease: l}
	c := initialized(t, cfg)
	if got := c.names(t, 1); !slices.Equal(got, []string{"p256", "p384"}) {
		t.Errorf("shown are %q", got)
	}
	other := initialized(t, cfg)
	begin := func(c *client) uint64 {
		s := c.session(t, 1)
		c.must(t, p11rpc.SignInit, u(s), mech(0x1041), u(c.handle(t, s, private, "p256")))
		return s
	}
	data := p11rpc.B(make([]byte, 32))

	keys.set(func(k *softKeys) { k.before = func(context.Context) error { return sigerr.Unavailable } })
	c.refused(t, 0x32, p11rpc.Sign, u(begin(c)), data, room(512))
	keys.set(func(k *softKeys) { k.before, k.mangle = nil, func([]byte) []byte { return nil } })
	c.refused(t, 0x30, p11rpc.Sign, u(begin(c)), data, room(512))
	keys.set(func(k *softKeys) { k.mangle = nil })
	c.refused(t, 0x21, p11rpc.Sign, u(begin(c)), p11rpc.B(make([]byte, 31)), room(512)) // nothing was asked
	keys.takeCalls()

	c.must(t, p11rpc.Sign, u(begin(c)), data, room(512))
	other.must(t, p11rpc.Sign, u(begin(other)), data, room(512))
	c.refused(t, 0x200, p11rpc.Sign, u(begin(c)), data, room(512))
	other.refused(t, 0x200, p11rpc.Sign, u(begin(other)), data, room(512))
	if n := len(keys.takeCalls()); n != 2 {
		t.Errorf("%d requests, want 2", n)
	}

	l, err = lease.New(lease.Config{Expires: now.Add(time.Hour), Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	cfg.Lease = l
	c = initialized(t, cfg)
	c.must(t, p11rpc.Sign, u(begin(c)), data, room(512))
	now = now.Add(time.Hour)
	c.refused(t, 0x200, p11rpc.Sign, u(begin(c)), data, room(512))
}
