package p11token_test

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/signwarden/signwarden/agentproto"
	"github.com/signwarden/signwarden/agentproto/p11rpc"
	"github.com/signwarden/signwarden/agentproto/p11token"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

func unhex(t testing.TB, text string) []byte {
	t.Helper()
	b, err := hex.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func text(v p11rpc.Value) string { return strings.TrimRight(string(v.Bytes), " ") }

// slots lists the slots with their tokens' labels.
func (c *client) slots(t *testing.T) map[uint64]string {
	t.Helper()
	n := c.must(t, p11rpc.GetSlotList, p11rpc.Value{Kind: p11rpc.Byte, Num: 1}, ulongs(0))[0]
	if !n.Short {
		t.Error("a list without room for it")
	}
	got := c.must(t, p11rpc.GetSlotList, p11rpc.Value{Kind: p11rpc.Byte}, ulongs(n.Num))[0]
	out := map[uint64]string{}
	for _, id := range got.List {
		out[id] = text(c.must(t, p11rpc.GetTokenInfo, u(id))[0])
	}
	return out
}

// names are the labels of the private keys in a slot.
func (c *client) names(t *testing.T, slot uint64) []string {
	t.Helper()
	s := c.session(t, slot)
	var out []string
	for _, h := range c.find(t, s, class(private)) {
		a, _ := c.attribute(t, s, h, 3)
		out = append(out, string(a.Bytes))
	}
	return out
}

func initialized(t *testing.T, cfg p11token.Config) *client {
	t.Helper()
	cfg.Logger = testLogger(t)
	c := connect(t, cfg)
	c.must(t, p11rpc.Initialize, initArgs...)
	return c
}

// Ed25519 keys are in a slot of their own, which is there only with them.
func TestEd25519Apart(t *testing.T) {
	keys := newSoftKeys("rsa", "p256", "ed")
	c := initialized(t, p11token.Config{Keys: keysFor(keys)})
	if diff := cmp.Diff(map[uint64]string{1: "signwarden", 2: "ed25519-signwarden"}, c.slots(t)); diff != "" {
		t.Error(diff)
	}
	if got := c.names(t, 1); !slices.Equal(got, []string{"p256", "rsa"}) {
		t.Errorf("slot 1 has %q", got)
	}
	if got := c.names(t, 2); !slices.Equal(got, []string{"ed"}) {
		t.Errorf("slot 2 has %q", got)
	}
	for slot, want := range map[uint64]int{1: 12, 2: 1} {
		got := c.must(t, p11rpc.GetMechanismList, u(slot), ulongs(100))[0].List
		if len(got) != want {
			t.Errorf("slot %d has mechanisms %x", slot, got)
		}
		for _, m := range got {
			flags := c.must(t, p11rpc.GetMechanismInfo, u(slot), u(m))[2].Num
			if flags&0x800 == 0 {
				t.Errorf("mechanism 0x%x does not sign: flags 0x%x", m, flags)
			}
		}
	}
	c.refused(t, 0x70, p11rpc.GetMechanismInfo, u(1), u(0x1057))
	c.refused(t, 0x70, p11rpc.GetMechanismInfo, u(1), u(0x250)) // no digests: tools then hash by themselves

	c = initialized(t, p11token.Config{Keys: keysFor(newSoftKeys("rsa"))})
	if diff := cmp.Diff(map[uint64]string{1: "signwarden"}, c.slots(t)); diff != "" {
		t.Error(diff)
	}
	c = initialized(t, p11token.Config{Keys: keysFor(newSoftKeys())})
	if diff := cmp.Diff(map[uint64]string{1: "signwarden"}, c.slots(t)); diff != "" {
		t.Error("without a key:", diff)
	}
}

func TestGroups(t *testing.T) {
	keys := newSoftKeys("rsa", "rsa3", "p256", "p384", "ed")
	c := initialized(t, p11token.Config{Keys: keysFor(keys), Groups: []p11token.Group{
		{Label: "boot", Keys: []string{"rsa*"}},
		{Label: "kernel", Keys: []string{"p256", "rsa", "ed"}},
	}})
	if diff := cmp.Diff(map[uint64]string{1: "boot", 3: "kernel", 4: "ed25519-kernel"}, c.slots(t)); diff != "" {
		t.Error(diff)
	}
	for slot, want := range map[uint64][]string{1: {"rsa", "rsa3"}, 3: {"p256", "rsa"}, 4: {"ed"}} {
		if got := c.names(t, slot); !slices.Equal(got, want) {
			t.Errorf("slot %d has %q, want %q", slot, got, want)
		}
	}
	serials := map[string]bool{}
	for _, slot := range []uint64{1, 3, 4} {
		serials[text(c.must(t, p11rpc.GetTokenInfo, u(slot))[3])] = true
	}
	if len(serials) != 3 {
		t.Errorf("serial numbers %v", serials)
	}
	for _, slot := range []uint64{0, 5, 1 << 63} {
		c.refused(t, 0x3, p11rpc.GetTokenInfo, u(slot))
		c.refused(t, 0x3, p11rpc.OpenSession, u(slot), u(4))
	}
}

func TestCheckGroups(t *testing.T) {
	all := []string{"*"}
	for _, tt := range []struct {
		name   string
		groups []p11token.Group
		words  string // "": fine
	}{
		{"one", []p11token.Group{{"a", all}}, ""},
		{"two", []p11token.Group{{"a", all}, {"b", all}}, ""},
		{"the longest", []p11token.Group{{strings.Repeat("a", 24), all}}, ""},
		{"too long", []p11token.Group{{strings.Repeat("a", 25), all}}, "24"},
		{"empty", []p11token.Group{{"", all}}, "label"},
		{"a blank", []p11token.Group{{"a b", all}}, "blanks"},
		{"not ASCII", []p11token.Group{{"schlüssel", all}}, "ASCII"},
		{"twice", []p11token.Group{{"a", all}, {"a", all}}, "begin"},
		{"one begins with the other", []p11token.Group{{"gw", all}, {"gwed", all}}, "begin"},
		{"ours", []p11token.Group{{"ed25519-x", all}}, "Ed25519"},
		{"no keys", []p11token.Group{{"a", nil}}, "no keys"},
		{"an empty glob", []p11token.Group{{"a", []string{"x", ""}}}, "glob"},
		{"a bad glob", []p11token.Group{{"a", []string{"[a"}}}, "glob"},
		{"too many", make([]p11token.Group, 65), "64"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := p11token.New(p11token.Config{Keys: keysFor(newSoftKeys()), Groups: tt.groups})
			if (err == nil) != (tt.words == "") || err != nil && !strings.Contains(err.Error(), tt.words) {
				t.Errorf("%v; want words on %q", err, tt.words)
			}
		})
	}
}

// No tool asks for a PIN, and one that logs in anyway can.
func TestNoPIN(t *testing.T) {
	c := open(t, newSoftKeys("rsa"))
	info := c.must(t, p11rpc.GetTokenInfo, u(1))
	if flags := info[4].Num; flags != 0x403 {
		t.Errorf("token flags 0x%x; want RNG, WRITE_PROTECTED and TOKEN_INITIALIZED only", flags)
	}
	before := c.names(t, 1)
	pin := p11rpc.B([]byte("anything"))
	c.must(t, p11rpc.Login, u(1), u(1), pin)
	c.refused(t, 0x100, p11rpc.Login, u(1), u(1), pin)
	if state := c.must(t, p11rpc.GetSessionInfo, u(1))[1].Num; state != 1 {
		t.Errorf("state %d after a login", state)
	}
	if got := c.names(t, 1); !slices.Equal(got, before) {
		t.Errorf("a login changes what is seen: %q, was %q", got, before)
	}
	c.must(t, p11rpc.Logout, u(1))
	c.refused(t, 0x101, p11rpc.Logout, u(1))
	c.must(t, p11rpc.Login, u(1), u(1), p11rpc.Value{Kind: p11rpc.Bytes, Null: true})
	c.must(t, p11rpc.Login, u(1), u(2), pin)           // for an operation
	c.refused(t, 0x103, p11rpc.Login, u(1), u(0), pin) // the security officer
}

func TestPeerWithoutKeys(t *testing.T) {
	var peer agentproto.Peer
	c := initialized(t, p11token.Config{Keys: func(p agentproto.Peer) (p11token.Keys, error) {
		peer = p
		return nil, fmt.Errorf("%w: uid %d", sigerr.Unauthenticated, p.UID)
	}})
	s := c.session(t, 1)
	c.refused(t, 0x200, p11rpc.FindObjectsInit, u(s), p11rpc.Value{Kind: p11rpc.Attributes})
	if peer.UID != 7 {
		t.Errorf("peer %+v", peer)
	}
}

func TestSessions(t *testing.T) {
	c := initialized(t, p11token.Config{Keys: keysFor(newSoftKeys("rsa", "ed"))})
	c.refused(t, 0xb4, p11rpc.OpenSession, u(1), u(0))
	ro, rw := c.session(t, 1), c.must(t, p11rpc.OpenSession, u(1), u(6))[0].Num
	other := c.session(t, 2)
	if state := c.must(t, p11rpc.GetSessionInfo, u(rw)); state[0].Num != 1 || state[1].Num != 2 || state[2].Num != 6 {
		t.Errorf("%v", state)
	}
	c.must(t, p11rpc.CloseSession, u(ro))
	c.refused(t, 0xb3, p11rpc.CloseSession, u(ro))
	c.refused(t, 0xb3, p11rpc.GetSessionInfo, u(ro))
	c.must(t, p11rpc.CloseAllSessions, u(1))
	c.refused(t, 0xb3, p11rpc.GetSessionInfo, u(rw))
	c.must(t, p11rpc.GetSessionInfo, u(other))

	for range p11token.MaxSessions - 1 {
		c.session(t, 1)
	}
	c.refused(t, 0xb1, p11rpc.OpenSession, u(1), u(4))
	if n := c.must(t, p11rpc.GetTokenInfo, u(1))[6].Num; n != p11token.MaxSessions-1 {
		t.Errorf("%d sessions counted", n)
	}
	c.must(t, p11rpc.CloseSession, u(other))
	c.session(t, 1)
}

// Before C_Initialize and after C_Finalize nothing answers; afterwards a client may begin anew.
func TestInitialize(t *testing.T) {
	c := connect(t, p11token.Config{Keys: keysFor(newSoftKeys("rsa")), Logger: testLogger(t)})
	slotList := []p11rpc.Value{{Kind: p11rpc.Byte}, ulongs(0)}
	c.refused(t, 0x190, p11rpc.GetSlotList, slotList...)
	c.refused(t, 0x190, p11rpc.OpenSession, u(1), u(4))
	c.refused(t, 0x07, p11rpc.Initialize, p11rpc.B([]byte("hello")), initArgs[1], initArgs[2])
	c.must(t, p11rpc.Initialize, initArgs...)
	c.refused(t, 0x191, p11rpc.Initialize, initArgs...)
	s := c.session(t, 1)
	c.must(t, p11rpc.Login, u(s), u(1), p11rpc.B([]byte("1")))
	c.must(t, p11rpc.Finalize)
	c.refused(t, 0x190, p11rpc.Finalize)
	c.refused(t, 0x190, p11rpc.GetSessionInfo, u(s))
	c.must(t, p11rpc.Initialize, initArgs...)
	c.refused(t, 0xb3, p11rpc.GetSessionInfo, u(s))
	if state := c.must(t, p11rpc.GetSessionInfo, u(c.session(t, 1)))[1].Num; state != 0 {
		t.Errorf("state %d: still logged in", state)
	}
}

func TestInfo(t *testing.T) {
	c := initialized(t, p11token.Config{Keys: keysFor(newSoftKeys())})
	info := c.must(t, p11rpc.GetInfo)
	if info[0].Num != 0x0228 || text(info[1]) != "Signwarden" || len(info[1].Bytes) != 32 || len(info[3].Bytes) != 32 {
		t.Errorf("%+v", info)
	}
	slot := c.must(t, p11rpc.GetSlotInfo, u(1))
	if len(slot[0].Bytes) != 64 || len(slot[1].Bytes) != 32 || slot[2].Num != 1 {
		t.Errorf("%+v", slot)
	}
	token := c.must(t, p11rpc.GetTokenInfo, u(1))
	for i, want := range map[int]int{0: 32, 1: 32, 2: 16, 3: 16, 17: 16} {
		if len(token[i].Bytes) != want {
			t.Errorf("field %d has %d bytes, want %d", i, len(token[i].Bytes), want)
		}
	}
}

func TestRandom(t *testing.T) {
	c := open(t, newSoftKeys())
	a, b := c.must(t, p11rpc.GenerateRandom, u(1), room(32))[0].Bytes, c.must(t, p11rpc.GenerateRandom, u(1), room(32))[0].Bytes
	if len(a) != 32 || bytes.Equal(a, b) {
		t.Errorf("%x, %x", a, b)
	}
	for n, want := range map[uint64]int{0: 0, p11rpc.NullRoom: 0, p11token.MaxRandom: p11token.MaxRandom} {
		if got := c.must(t, p11rpc.GenerateRandom, u(1), room(n))[0].Bytes; len(got) != want {
			t.Errorf("%d bytes, want %d", len(got), want)
		}
	}
	c.refused(t, 0x07, p11rpc.GenerateRandom, u(1), room(p11token.MaxRandom+1))
	c.refused(t, 0x120, p11rpc.SeedRandom, u(1), p11rpc.B([]byte("seed")))
}

// Every call that would make, change or delete something, and all others, are not served.
func TestOthersNotServed(t *testing.T) {
	c := open(t, newSoftKeys("rsa"))
	served := []uint32{1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 18, 19, 24, 26, 27, 28, 42, 43, 44, 45, 63, 64}
	for id := range uint32(90) {
		if slices.Contains(served, id) {
			continue
		}
		body := append(append([]byte{0, 0, 0, byte(id), 0, 0, 0, 1}, 'u'), make([]byte, 8)...)
		_, err := c.SendBody(body)
		if err != nil {
			t.Fatal(err)
		}
		_, _, err = c.Receive()
		if err != p11rpc.FunctionNotSupported {
			t.Errorf("call %d: %v", id, err)
		}
	}
}

// Who is refused over and over fills no log; the next line says how many were left out.
func TestRefusalsInTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer // written before each answer
		c := connect(t, p11token.Config{Keys: keysFor(newSoftKeys("p256")), Logger: slog.New(slog.NewTextHandler(&log, nil))})
		c.must(t, p11rpc.Initialize, initArgs...)
		c.session(t, 1)
		for range 1000 {
			c.refused(t, 0x70, p11rpc.SignInit, u(1), mech(0x3), u(1))
		}
		if n := strings.Count(log.String(), "call refused"); n != 100 {
			t.Errorf("%d lines for 1000 refusals at once, want 100", n)
		}
		time.Sleep(time.Second)
		c.refused(t, 0x70, p11rpc.SignInit, u(1), mech(0x3), u(1))
		if !strings.Contains(log.String(), "left_out_before=900") {
			t.Error("the log does not say how many lines were left out")
		}
	})
}
