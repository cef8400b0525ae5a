package p11token_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/signwarden/signwarden/agentproto/internal/p11capture"
	"github.com/signwarden/signwarden/agentproto/p11rpc"
	"github.com/signwarden/signwarden/agentproto/p11token"
)

// capturedKeys are the keys in the captures of SoftHSM and in those of the prototype,
// and ours of the same kinds.
var capturedKeys = map[bool][]struct{ label, id, ours string }{
	false: {{"rsa-2048", "\x01", "rsa"}, {"rsa-3072", "\x02", "rsa3"}, {"rsa-4096", "\x03", "rsa3"}, {"ec-prime256v1", "\x04", "p256"}},
	true:  {{"rsa2048", "\x01", "rsa"}, {"rsa4096", "\x02", "rsa3"}, {"p256", "\x03", "p256"}},
}

// replay is one captured connection, with the numbers in it made ours.
type replay struct {
	c        *client
	sessions map[uint64]uint64 // captured to ours
	objects  map[uint64]uint64
	ids      map[string][]byte // CKA_ID likewise
}

// TestReplay feeds what clients of p11-kit 0.24.1, 0.25.5 and 0.26.4 sent, and asserts
// that each request is answered with a result where a real token had one, and with the same
// error where it had an error.
func TestReplay(t *testing.T) {
	signed := 0
	for _, conn := range p11capture.Read(t, "../p11rpc/testdata") {
		t.Run(conn.File, func(t *testing.T) {
			keys := newSoftKeys()
			for _, k := range capturedKeys[strings.Contains(conn.File, "go-server")] {
				keys.signers[k.label] = newSigners()[k.ours]
				keys.chains[k.label] = newChains()[k.ours]
			}
			r := &replay{
				c:        connect(t, p11token.Config{Keys: keysFor(keys), Logger: testLogger(t)}),
				sessions: map[uint64]uint64{},
			}
			r.pair(t, conn, keys)
			for i := 0; i+1 < len(conn.Messages); i += 2 {
				r.exchange(t, conn.Messages[i], conn.Messages[i+1])
			}
			signed += len(keys.takeCalls())
		})
	}
	if signed != 8 {
		t.Errorf("the captures led to %d signatures, want 8", signed)
	}
}

// hint is what a capture tells of one of its objects.
type hint struct {
	class     uint64
	id, label string
}

func (h *hint) learn(attributes []p11rpc.Attribute) {
	for _, a := range attributes {
		switch {
		case a.Missing || a.Null:
		case a.Type == 0:
			h.class = a.Num
		case a.Type == 3:
			h.label = string(a.Bytes)
		case a.Type == 0x102:
			h.id = string(a.Bytes)
		}
	}
}

// hints reads ahead what a connection tells of the objects in it.
func hints(t *testing.T, conn p11capture.Conn) map[uint64]*hint {
	t.Helper()
	out := map[uint64]*hint{}
	var template []p11rpc.Attribute
	for i := 0; i+1 < len(conn.Messages); i += 2 {
		request, err := p11rpc.ParseRequest(conn.Messages[i].Body)
		if err != nil {
			t.Fatal(err)
		}
		response, err := p11rpc.ParseResponse(conn.Messages[i+1].Body)
		if err != nil {
			continue
		}
		switch request.Call {
		case p11rpc.FindObjectsInit:
			template = request.Values[1].Attributes
		case p11rpc.FindObjects:
			for _, handle := range response.Values[0].List {
				if out[handle] == nil {
					out[handle] = &hint{}
				}
				out[handle].learn(template)
			}
		case p11rpc.GetAttributeValue:
			out[request.Values[1].Num].learn(response.Values[0].Attributes)
		}
	}
	return out
}

// pair finds for each object of a capture ours, by class and label. It looks at them
// through a connection of its own, which gives the same handles.
func (r *replay) pair(t *testing.T, conn p11capture.Conn, keys *softKeys) {
	t.Helper()
	c := open(t, keys)
	r.ids, r.objects = map[string][]byte{}, map[uint64]uint64{}
	labels := map[string]string{} // by captured id
	for _, k := range capturedKeys[strings.Contains(conn.File, "go-server")] {
		labels[k.id] = k.label
		a, _ := c.attribute(t, 1, c.handle(t, 1, private, k.label), 0x102)
		r.ids[k.id] = a.Bytes
	}
	for handle, h := range hints(t, conn) {
		if h.label == "" {
			h.label = labels[h.id]
		}
		r.objects[handle] = c.handle(t, 1, h.class, h.label)
	}
}

func (r *replay) exchange(t *testing.T, request, response p11capture.Message) {
	t.Helper()
	if !request.Request || response.Request || request.Code != response.Code {
		t.Fatalf("request %x is followed by %x", request.Code, response.Code)
	}
	m, err := p11rpc.ParseRequest(request.Body)
	if err != nil {
		t.Fatal(err)
	}
	want, wantErr := p11rpc.ParseResponse(response.Body)
	args := r.ours(m)
	got, gotErr := r.c.Call(m.Call, args...)
	wantRV, _ := errors.AsType[p11rpc.RV](wantErr)
	gotRV, isRV := errors.AsType[p11rpc.RV](gotErr)
	if gotErr != nil && !isRV {
		t.Fatalf("%v: %v", m.Call, gotErr)
	}
	if m.Call == p11rpc.Login && wantRV == 0xa0 {
		wantRV = 0 // CKR_PIN_INCORRECT: we take any PIN
	}
	if gotRV != wantRV {
		t.Errorf("request %x, %v: 0x%x, a real token says 0x%x", request.Code, m.Call, uint64(gotRV), uint64(wantRV))
	}
	if gotErr == nil && wantErr == nil {
		r.compare(t, m, args, got, want.Values)
	}
}

// ours replaces the numbers in a request. Room is what a client has learned of the length
// of its own token's values: where it had some, we have enough.
func (r *replay) ours(m p11rpc.Message) []p11rpc.Value {
	args := slices.Clone(m.Values)
	switch m.Call {
	case p11rpc.Initialize, p11rpc.Finalize, p11rpc.GetInfo, p11rpc.GetSlotList:
	case p11rpc.GetSlotInfo, p11rpc.GetTokenInfo, p11rpc.GetMechanismList, p11rpc.OpenSession:
		args[0].Num = 1
	case p11rpc.GetMechanismInfo:
		args[0].Num, args[1].Num = 1, 1 // SoftHSM has many that we have not
	default:
		args[0].Num = r.sessions[args[0].Num]
	}
	switch m.Call {
	case p11rpc.GetAttributeValue:
		args[1].Num = r.objects[args[1].Num]
		args[2].Wanted = slices.Clone(args[2].Wanted)
		for i := range args[2].Wanted {
			if args[2].Wanted[i].Room > 0 {
				args[2].Wanted[i].Room = 1 << 16
			}
		}
	case p11rpc.SignInit:
		args[2].Num = r.objects[args[2].Num]
	case p11rpc.FindObjectsInit:
		args[1].Attributes = slices.Clone(args[1].Attributes)
		for i, a := range args[1].Attributes {
			id, ok := r.ids[string(a.Bytes)]
			if a.Type == 0x102 && ok {
				args[1].Attributes[i].Bytes, args[1].Attributes[i].Len = id, uint32(len(id))
			}
		}
	}
	return args
}

// onlySoftHSM are attributes that we do not know of a key, or do not have.
var onlySoftHSM = []uint64{
	0x163,      // CKA_LOCAL
	0x40000600, // CKA_ALLOWED_MECHANISMS
}

// compare compares the shapes of two responses.
func (r *replay) compare(t *testing.T, m p11rpc.Message, args, got, want []p11rpc.Value) {
	t.Helper()
	switch m.Call {
	case p11rpc.FindObjects:
		if len(want[0].List) > 0 && len(got[0].List) == 0 {
			t.Errorf("found none of %d objects", len(want[0].List))
		}
	case p11rpc.OpenSession:
		r.sessions[want[0].Num] = got[0].Num
	case p11rpc.GetAttributeValue:
		only := slices.ContainsFunc(args[2].Wanted, func(w p11rpc.WantedAttribute) bool { return slices.Contains(onlySoftHSM, w.Type) })
		if got[1].Num != want[1].Num && !only {
			t.Errorf("attributes %v of %d: 0x%x, a real token says 0x%x", args[2].Wanted, m.Values[1].Num, got[1].Num, want[1].Num)
		}
	case p11rpc.Sign, p11rpc.SignFinal:
		if got[0].Short != want[0].Short {
			t.Errorf("%v: a signature: %v, by a real token: %v", m.Call, !got[0].Short, !want[0].Short)
		}
	}
}
