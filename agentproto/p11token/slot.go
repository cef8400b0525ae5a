package p11token

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"path"
	"slices"

	"github.com/signwarden/signwarden/agentproto/p11rpc"
)

// ed25519Prefix begins the labels of the tokens for Ed25519 keys.
const ed25519Prefix = "ed25519-"

// slot is a slot with its token. Each group has two: libp11 0.4.12 refuses every key
// of a token in which it finds one of Ed25519, so those are apart, and their
// slot is there only if there are any.
type slot struct {
	id      uint64
	label   string
	keys    []string // names and globs
	ed25519 bool
}

func newSlots(groups []Group) []slot {
	var out []slot
	for _, g := range groups {
		n := uint64(len(out))
		out = append(out,
			slot{id: n + 1, label: g.Label, keys: g.Keys},
			slot{id: n + 2, label: ed25519Prefix + g.Label, keys: g.Keys, ed25519: true})
	}
	return out
}

// has reports whether a key of that name belongs to the slot's group.
func (s *slot) has(name string) bool {
	return slices.ContainsFunc(s.keys, func(glob string) bool {
		ok, _ := path.Match(glob, name) // New has checked the glob
		return ok
	})
}

// serial tells tokens apart: it is made of the label, so it stays.
func (s *slot) serial() string {
	sum := sha256.Sum256([]byte(s.label))
	return hex.EncodeToString(sum[:8])
}

// What the token says of itself.
const (
	manufacturer = "Signwarden"
	description  = "Signwarden signing gateway"
	model        = "gateway"
)

// Flags of CK_SLOT_INFO and CK_TOKEN_INFO. LOGIN_REQUIRED and USER_PIN_INITIALIZED are
// not set: so no tool asks for a PIN.
const (
	ckfTokenPresent     = 0x001
	ckfRNG              = 0x001
	ckfWriteProtected   = 0x002
	ckfTokenInitialized = 0x400

	unavailable = 1<<64 - 1 // CK_UNAVAILABLE_INFORMATION
)

func (c *conn) getInfo(context.Context, []p11rpc.Value) ([]p11rpc.Value, error) {
	return []p11rpc.Value{
		p11rpc.V(2, 40), p11rpc.S(manufacturer, 32), p11rpc.U(0), p11rpc.S(description, 32), p11rpc.V(1, 0),
	}, nil
}

// getSlotList answers with what was seen last where the keys cannot be had: the
// search that follows says why.
func (c *conn) getSlotList(ctx context.Context, args []p11rpc.Value) ([]p11rpc.Value, error) {
	v, err := c.look(ctx)
	if err != nil {
		c.warn("listing keys", "err", err)
	}
	var ids []uint64
	for _, s := range c.srv.slots {
		if !s.ed25519 || v.shows(s.id) {
			ids = append(ids, s.id)
		}
	}
	return []p11rpc.Value{p11rpc.List(ids, args[1].Num)}, nil
}

// slot finds a slot by its id.
func (c *conn) slot(id uint64) (*slot, error) {
	if id < 1 || id > uint64(len(c.srv.slots)) {
		return nil, ckrSlotIDInvalid
	}
	return &c.srv.slots[id-1], nil
}

func (c *conn) getSlotInfo(_ context.Context, args []p11rpc.Value) ([]p11rpc.Value, error) {
	s, err := c.slot(args[0].Num)
	if err != nil {
		return nil, err
	}
	return []p11rpc.Value{
		p11rpc.S(description+": "+s.label, 64), p11rpc.S(manufacturer, 32), p11rpc.U(ckfTokenPresent), p11rpc.V(1, 0), p11rpc.V(1, 0),
	}, nil
}

func (c *conn) getTokenInfo(_ context.Context, args []p11rpc.Value) ([]p11rpc.Value, error) {
	s, err := c.slot(args[0].Num)
	if err != nil {
		return nil, err
	}
	open := c.sessionsOf(s)
	const maxPIN = 255 // for tools that log in unasked
	return []p11rpc.Value{
		p11rpc.S(s.label, 32), p11rpc.S(manufacturer, 32), p11rpc.S(model, 16), p11rpc.S(s.serial(), 16),
		p11rpc.U(ckfRNG | ckfWriteProtected | ckfTokenInitialized),
		p11rpc.U(MaxSessions), p11rpc.U(open), p11rpc.U(MaxSessions), p11rpc.U(unavailable), // and of read-write sessions
		p11rpc.U(maxPIN), p11rpc.U(0),
		p11rpc.U(unavailable), p11rpc.U(unavailable), p11rpc.U(unavailable), p11rpc.U(unavailable), // memory
		p11rpc.V(1, 0), p11rpc.V(1, 0), p11rpc.S("", 16),
	}, nil
}

func (c *conn) getMechanismList(_ context.Context, args []p11rpc.Value) ([]p11rpc.Value, error) {
	s, err := c.slot(args[0].Num)
	if err != nil {
		return nil, err
	}
	var list []uint64
	for _, m := range mechanisms {
		if m.ed25519() == s.ed25519 {
			list = append(list, m.ckm)
		}
	}
	return []p11rpc.Value{p11rpc.List(list, args[1].Num)}, nil
}

func (c *conn) getMechanismInfo(_ context.Context, args []p11rpc.Value) ([]p11rpc.Value, error) {
	s, err := c.slot(args[0].Num)
	if err != nil {
		return nil, err
	}
	m := mechanismOf(args[1].Num)
	if m == nil || m.ed25519() != s.ed25519 {
		return nil, ckrMechanismInvalid
	}
	i := mechanismInfos[m.keyType]
	return []p11rpc.Value{p11rpc.U(i.min), p11rpc.U(i.max), p11rpc.U(i.flags)}, nil
}
