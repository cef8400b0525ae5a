package openpgp

import (
	"bytes"
	"io"
	"testing"

	"github.com/ProtonMail/go-crypto/openpgp/packet"
	"github.com/google/go-cmp/cmp"
)

// The borders of each length form, as go-crypto reads them.
func TestAppendPacket(t *testing.T) {
	for _, n := range []int{0, 1, 191, 192, 193, 255, 256, 8383, 8384, 65536} {
		body := bytes.Repeat([]byte{7}, n)
		p, err := packet.NewOpaqueReader(bytes.NewReader(appendPacket(nil, 61, body))).Next()
		if err != nil && err != io.EOF {
			t.Fatalf("%d: %v", n, err)
		}
		if p.Tag != 61 || !bytes.Equal(p.Contents, body) {
			t.Errorf("%d: read %d bytes of tag %d", n, len(p.Contents), p.Tag)
		}
		sub, err := packet.OpaqueSubpackets(appendSubpacket(nil, 20, body...))
		if err != nil {
			t.Fatalf("subpacket of %d: %v", n, err)
		}
		if len(sub) != 1 || sub[0].SubType != 20 || !bytes.Equal(sub[0].Contents, body) {
			t.Errorf("subpacket of %d: read %d", n, len(sub))
		}
	}
}

func TestAppendMPI(t *testing.T) {
	for _, tt := range []struct{ n, want []byte }{
		{nil, []byte{0, 0}},
		{[]byte{0, 0}, []byte{0, 0}},
		{[]byte{1}, []byte{0, 1, 1}},
		{[]byte{0, 0, 1, 0}, []byte{0, 9, 1, 0}},
		{[]byte{0x80, 0}, []byte{0, 16, 0x80, 0}},
		{[]byte{0x40, 5}, []byte{0, 15, 0x40, 5}},
	} {
		if diff := cmp.Diff(tt.want, appendMPI(nil, tt.n)); diff != "" {
			t.Errorf("%x: %s", tt.n, diff)
		}
	}
}
