package p11rpc_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/signwarden/signwarden/agentproto/internal/p11capture"
	"github.com/signwarden/signwarden/agentproto/p11rpc"
)

func body(call uint32, sig string, args []byte) []byte { return p11capture.Body(call, sig, args) }

// unhex decodes groups of hex digits between blanks.
func unhex(t testing.TB, text string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(text), ""))
	if err != nil {
		t.Fatalf("%q: %v", text, err)
	}
	return b
}

// Everything that real peers said decodes, and encodes to what it was.
func TestCaptures(t *testing.T) {
	for _, conn := range p11capture.Read(t, "testdata") {
		for i, m := range conn.Messages {
			got, err := roundTrip(m.Request, m.Body)
			if err != nil {
				t.Errorf("%s: message %d: %v", conn.File, i, err)
			} else if !bytes.Equal(got, m.Body) {
				t.Errorf("%s: message %d: encoded to\n%x, was\n%x", conn.File, i, got, m.Body)
			}
		}
	}
}

// roundTrip decodes a body and encodes it again.
func roundTrip(request bool, body []byte) ([]byte, error) {
	if request {
		m, err := p11rpc.ParseRequest(body)
		if err != nil {
			return nil, err
		}
		return m.AppendRequest(nil)
	}
	m, err := p11rpc.ParseResponse(body)
	if _, isRV := errors.AsType[p11rpc.RV](err); err != nil && !isRV {
		return nil, err
	}
	return m.AppendResponse(nil)
}

// The two forms of a mechanism, as clients of three versions sent them in C_SignInit.
func TestMechanismForms(t *testing.T) {
	pss := p11rpc.PSSParams{Hash: 0x250, MGF: 2, SaltLen: 0xde}
	for _, tt := range []struct {
		name, args string
		want       p11rpc.PSSParams
		param      bool
		key        uint64
		bad        bool
	}{
		{"0.24.1 and 0.25.5, ECDSA", "0000000000000001 00001041 ffffffff 0000000000000007", p11rpc.PSSParams{}, false, 7, false},
		{"0.26.4, ECDSA", "0000000000000001 00001041 0000000000000007", p11rpc.PSSParams{}, false, 7, false},
		{"0.25.5, PSS", "0000000000000001 0000000d 0000000000000250 0000000000000002 00000000000000de 0000000000000001", pss, true, 1, false},
		{"0.26.4, PSS", "0000000000000001 0000000d 01 0000000000000250 0000000000000002 00000000000000de 0000000000000001", pss, true, 1, false},
		{"0.26.4, PSS without", "0000000000000001 0000000d 00 0000000000000001", p11rpc.PSSParams{}, false, 1, false},
		{"0.24.1, no bytes", "0000000000000001 00001041 00000000 0000000000000007", p11rpc.PSSParams{}, false, 7, false},
		{"four other bytes", "0000000000000001 00001041 00000001 0000000000000007", p11rpc.PSSParams{}, false, 7, true},
		{"a bad flag", "0000000000000001 0000000d 02 0000000000000250 0000000000000002 00000000000000de 0000000000000001", p11rpc.PSSParams{}, false, 1, true},
		{"a flag alone", "0000000000000001 0000000d 01 0000000000000001", p11rpc.PSSParams{}, false, 1, true},
		{"too long", "0000000000000001 0000000d 0000 0000000000000250 0000000000000002 00000000000000de 0000000000000001", p11rpc.PSSParams{}, false, 1, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			raw := body(42, "uMu", unhex(t, tt.args))
			m, err := p11rpc.ParseRequest(raw)
			if err != nil {
				t.Fatal(err)
			}
			if m.Values[0].Num != 1 || m.Values[2].Num != tt.key {
				t.Errorf("session %d and key %d, want 1 and %d", m.Values[0].Num, m.Values[2].Num, tt.key)
			}
			got, param, err := m.Values[1].Mechanism.PSS()
			if got != tt.want || param != tt.param || (err != nil) != tt.bad {
				t.Errorf("%+v, %v, %v; want %+v, %v", got, param, err, tt.want, tt.param)
			}
			again, err := m.AppendRequest(nil)
			if err != nil || !bytes.Equal(again, raw) {
				t.Errorf("encoded to %x (%v), was %x", again, err, raw)
			}
		})
	}
}

func TestNullMechanism(t *testing.T) {
	m, err := p11rpc.ParseRequest(body(42, "uMu", unhex(t, "0000000000000001 ffffffff 0000000000000000")))
	if err != nil || !m.Values[1].Mechanism.Null {
		t.Errorf("%+v, %v", m, err)
	}
	_, err = p11rpc.ParseRequest(body(42, "uMu", unhex(t, "0000000000000001 ffffffff ffffffff 0000000000000000")))
	if err == nil {
		t.Error("a NULL mechanism with a parameter was taken")
	}
}

// Each kind of value in each of its forms.
func TestValues(t *testing.T) {
	for _, tt := range []struct {
		name     string
		response bool
		call     uint32
		sig      string
		args     string
		want     []p11rpc.Value
	}{
		{"byte and room for numbers", false, 4, "yfu", "01 00000003", []p11rpc.Value{
			{Kind: p11rpc.Byte, Num: 1}, {Kind: p11rpc.UlongRoom, Num: 3},
		}},
		{"numbers", true, 4, "au", "01 00000002 0000000000000001 0000000000000002", []p11rpc.Value{p11rpc.List([]uint64{1, 2}, 2)}},
		{"how many numbers", true, 4, "au", "00 00000002", []p11rpc.Value{p11rpc.List([]uint64{1, 2}, 0)}},
		{"how many numbers do not fit", true, 4, "au", "00 00000002", []p11rpc.Value{p11rpc.List([]uint64{1, 2}, 1)}},
		{"versions, texts and a number", true, 3, "vsusv", "0228 00000002 4120 0000000000000000 00000001 20 0102", []p11rpc.Value{
			p11rpc.V(2, 40), p11rpc.S("A", 2), p11rpc.U(0), p11rpc.S("", 1), p11rpc.V(1, 2),
		}},
		{"bytes and room for bytes", false, 43, "uayfy", "0000000000000001 01 00000002 abcd ffffffff", []p11rpc.Value{
			p11rpc.U(1), p11rpc.B([]byte{0xab, 0xcd}), {Kind: p11rpc.ByteRoom, Num: p11rpc.NullRoom},
		}},
		{"no bytes", false, 43, "uayfy", "0000000000000001 01 ffffffff 00000000", []p11rpc.Value{
			p11rpc.U(1), {Kind: p11rpc.Bytes, Null: true}, {Kind: p11rpc.ByteRoom},
		}},
		{"how many bytes", true, 43, "ay", "00 00000100", []p11rpc.Value{p11rpc.Length(256)}},
		{"text that ends in no NUL", false, 9, "uayz", "0000000000000001 01 00000001 31 00000001 41", []p11rpc.Value{
			p11rpc.U(1), p11rpc.B([]byte("1")), {Kind: p11rpc.Text, Bytes: []byte("A")},
		}},
		{
			"attributes of each class", false, 26, "uaA", "0000000000000001 00000008" +
				"00000001 01 00000001 01" +
				"00000000 01 00000008 0000000000000003" +
				"00000100 01 00000004 0000000000000000" + // by a 32-bit client
				"00000102 01 00000002 00000002 abcd" +
				"00000110 01 00000008 00000008 3230323630313031" +
				"40000600 01 00000008 00000001 0000000000000001" +
				"00000003 01 00000000 ffffffff" +
				"00000011 00",
			[]p11rpc.Value{p11rpc.U(1), {Kind: p11rpc.Attributes, Attributes: []p11rpc.Attribute{
				{Type: 1, Len: 1, Num: 1},
				{Type: 0, Len: 8, Num: 3},
				{Type: 0x100, Len: 4},
				{Type: 0x102, Len: 2, Bytes: []byte{0xab, 0xcd}},
				{Type: 0x110, Len: 8, Bytes: []byte("20260101")},
				{Type: 0x40000600, Len: 8, List: []uint64{1}},
				{Type: 3, Null: true},
				{Type: 0x11, Missing: true},
			}}},
		},
		{
			"a template in a template", false, 26, "uaA", "0000000000000001 00000001" +
				"40000211 01 00000018 00000001 00000001 01 00000001 00",
			[]p11rpc.Value{p11rpc.U(1), {Kind: p11rpc.Attributes, Attributes: []p11rpc.Attribute{
				{Type: 0x40000211, Len: 24, Attributes: []p11rpc.Attribute{{Type: 1, Len: 1}}},
			}}},
		},
		{
			"attributes that are asked for", false, 24, "uufA", "0000000000000001 0000000000000002 00000003" +
				"00000102 000000ff 40000211 00000018 00000001 00000001 00000001 40000212 00000000",
			[]p11rpc.Value{p11rpc.U(1), p11rpc.U(2), {Kind: p11rpc.Wanted, Wanted: []p11rpc.WantedAttribute{
				{Type: 0x102, Room: 255},
				{Type: 0x40000211, Room: 24, Nested: []p11rpc.WantedAttribute{{Type: 1, Room: 1}}},
				{Type: 0x40000212},
			}}},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			parse := p11rpc.ParseRequest
			if tt.response {
				parse = p11rpc.ParseResponse
			}
			raw := body(tt.call, tt.sig, unhex(t, tt.args))
			got, err := parse(raw)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got.Values); diff != "" {
				t.Error(diff)
			}
			again, err := roundTrip(!tt.response, raw)
			if err != nil || !bytes.Equal(again, raw) {
				t.Errorf("encoded to %x (%v), was %x", again, err, raw)
			}
		})
	}
}

func TestMalformed(t *testing.T) {
	deep := func(levels int) string {
		return strings.Repeat("00000001 40000211 01 00000018 ", levels) + "00000000"
	}
	for _, tt := range []struct {
		name string
		body []byte
	}{
		{"empty", nil},
		{"half a call", []byte{0, 0, 0}},
		{"half a signature", body(4, "yfu", nil)[:9]},
		{"a signature that is longer than the rest", unhex(t, "00000004 00000009 79")},
		{"a signature that is too long", body(4, strings.Repeat("y", 65), nil)},
		{"no such call", body(90, "u", make([]byte, 8))},
		{"call 0", body(0, "", nil)},
		{"another signature", body(4, "yfuu", make([]byte, 13))},
		{"the signature of the response", body(4, "au", unhex(t, "00 00000000"))},
		{"half a number", body(6, "u", make([]byte, 7))},
		{"bytes that follow", body(6, "u", make([]byte, 9))},
		{"a flag of 2", body(44, "uay", unhex(t, "0000000000000001 02 00000000"))},
		{"bytes that are longer than the rest", body(44, "uay", unhex(t, "0000000000000001 01 00000003 abcd"))},
		{"bytes of 4 GB", body(44, "uay", unhex(t, "0000000000000001 01 fffffffe abcd"))},
		{"attributes by the billion", body(26, "uaA", unhex(t, "0000000000000001 ffffffff 00000001 00"))},
		{"one attribute too few", body(26, "uaA", unhex(t, "0000000000000001 00000002 00000001 00"))},
		{"257 attributes", body(26, "uaA", append(unhex(t, "0000000000000001 00000101"), bytes.Repeat([]byte{0, 0, 0, 1, 0}, 257)...))},
		{"257 that are asked for", body(24, "uufA", append(unhex(t, "0000000000000001 0000000000000001 00000101"), make([]byte, 257*8)...))},
		{"templates nine deep", body(26, "uaA", unhex(t, "0000000000000001"+deep(8)))},
		{"an attribute with two lengths", body(26, "uaA", unhex(t, "0000000000000001 00000001 00000102 01 00000003 00000002 abcd"))},
		{"mechanisms by the billion", body(26, "uaA", unhex(t, "0000000000000001 00000001 40000600 01 00000008 ffffffff"))},
		{"a mechanism cut off", body(42, "uMu", unhex(t, "0000000000000001 00001041 000000"))},
		{"a mechanism before what has no fixed length", body(58, "uMaA", unhex(t, "0000000000000001 00001041 00000000"))},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m, err := p11rpc.ParseRequest(tt.body)
			if err == nil {
				t.Errorf("taken as %+v", m)
			}
		})
	}
	if _, err := p11rpc.ParseRequest(body(26, "uaA", unhex(t, "0000000000000001"+deep(7)))); err != nil {
		t.Errorf("templates eight deep: %v", err)
	}
	if _, err := p11rpc.ParseRequest(body(26, "uaA", append(unhex(t, "0000000000000001 00000100"), bytes.Repeat([]byte{0, 0, 0, 1, 0}, 256)...))); err != nil {
		t.Errorf("256 attributes: %v", err)
	}
}

// A count is checked before anything is allocated for it.
func TestNoAllocationOnAWord(t *testing.T) {
	huge := [][]byte{
		body(26, "uaA", unhex(t, "0000000000000001 0fffffff 00000001 00")),
		body(24, "uufA", unhex(t, "0000000000000001 0000000000000001 0fffffff")),
		body(44, "uay", unhex(t, "0000000000000001 01 7fffffff")),
		body(26, "uaA", unhex(t, "0000000000000001 00000001 40000600 01 00000008 0fffffff")),
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range 100 {
		for _, b := range huge {
			_, err := p11rpc.ParseRequest(b)
			if err == nil {
				t.Fatal("taken")
			}
		}
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 4<<20 {
		t.Errorf("400 refusals allocated %d bytes", n)
	}
}

func TestEncodeRefuses(t *testing.T) {
	for _, tt := range []struct {
		name string
		m    p11rpc.Message
	}{
		{"too few", p11rpc.Message{Call: p11rpc.OpenSession, Values: []p11rpc.Value{p11rpc.U(1)}}},
		{"too many", p11rpc.Message{Call: p11rpc.GetTokenInfo, Values: []p11rpc.Value{p11rpc.U(1), p11rpc.U(1)}}},
		{"of another kind", p11rpc.Message{Call: p11rpc.GetTokenInfo, Values: []p11rpc.Value{p11rpc.B(nil)}}},
	} {
		if b, err := tt.m.AppendRequest(nil); err == nil {
			t.Errorf("%s: %x", tt.name, b)
		}
	}
}

func TestErrorResponse(t *testing.T) {
	_, err := p11rpc.ParseResponse(body(0, "u", binary.BigEndian.AppendUint64(nil, 0xa0)))
	if rv, ok := errors.AsType[p11rpc.RV](err); !ok || rv != 0xa0 {
		t.Errorf("%v, want RV 0xa0", err)
	}
}
