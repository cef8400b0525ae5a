package p11rpc_test

import (
	"bytes"
	"testing"

	"github.com/signwarden/signwarden/agentproto/internal/p11capture"
)

// FuzzMessage: nothing panics, and what decodes encodes to its input.
func FuzzMessage(f *testing.F) {
	requests, responses := 0, 0
	for _, conn := range p11capture.Read(f, "testdata") {
		for _, m := range conn.Messages {
			f.Add(m.Request, m.Body)
			if m.Request {
				requests++
			} else {
				responses++
			}
		}
	}
	if requests != 467 || responses != requests {
		f.Fatalf("only %d requests and %d responses for seeds", requests, responses)
	}
	for _, args := range []string{
		"0000000000000001 00001041 ffffffff 0000000000000007",
		"0000000000000001 00001041 0000000000000007",
		"0000000000000001 0000000d 01 0000000000000250 0000000000000002 00000000000000de 0000000000000001",
		"0000000000000001 ffffffff 0000000000000000",
	} {
		f.Add(true, body(42, "uMu", unhex(f, args)))
	}
	f.Add(true, body(26, "uaA", unhex(f, "0000000000000001 00000002 40000211 01 00000018 00000001 00000001 01 00000001 00 40000600 01 00000008 00000001 0000000000000001")))
	f.Add(true, body(24, "uufA", unhex(f, "0000000000000001 0000000000000002 00000001 40000211 00000018 00000001 00000001 00000001")))
	f.Fuzz(func(t *testing.T, request bool, b []byte) {
		again, err := roundTrip(request, b)
		if err != nil {
			return
		}
		if !bytes.Equal(again, b) {
			t.Errorf("encoded to\n%x, was\n%x", again, b)
		}
	})
}
