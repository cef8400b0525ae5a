package gpgagent_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"fmt"
	"net"
	"testing"

	"github.com/signwarden/signwarden/agentproto"
	"github.com/signwarden/signwarden/agentproto/assuan"
	"github.com/signwarden/signwarden/agentproto/gpgagent"
)

// BenchmarkKeyInfoList is what sq does all the time, with 1,000 keys.
func BenchmarkKeyInfoList(b *testing.B) {
	signers := make(map[string]crypto.Signer)
	for i := range 1000 {
		k, err := ecdsa.GenerateKey(elliptic.P256(), nil)
		if err != nil {
			b.Fatal(err)
		}
		signers[fmt.Sprint(i)] = k
	}
	srv, err := gpgagent.New(gpgagent.Config{Keys: keysFor(&softKeys{signers: signers})})
	if err != nil {
		b.Fatal(err)
	}
	near, far := net.Pipe()
	done := make(chan struct{})
	go func() { defer close(done); srv.ServeConn(context.Background(), far, agentproto.Peer{}) }()
	c, err := assuan.NewClient(near)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		_, err = c.Transact("KEYINFO --list")
		if err != nil {
			b.Fatal(err)
		}
	}
	c.Close()
	<-done
}
