package hsm_test

import (
	"context"
	"crypto"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/signwarden/signwarden/hsm"
)

// sharing runs op b.N times on n goroutines.
func sharing(b *testing.B, n int, op func(g int) error) {
	var left atomic.Int64
	left.Store(int64(b.N))
	var wg sync.WaitGroup
	b.ResetTimer()
	for g := range n {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				if err := op(g); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "sig/s")
}

// raw signs with C_SignInit and C_Sign and nothing else, one goroutine for
// each session: what the pool is measured against.
func raw(b *testing.B, p *hsm.Pool, id string, mech uint, data []byte, sessions int) {
	ctx, slot := p.LoadedCtx()
	sh := make([]pkcs11.SessionHandle, sessions)
	for i := range sh {
		s, err := ctx.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION)
		if err != nil {
			b.Fatal(err)
		}
		defer ctx.CloseSession(s)
		sh[i] = s
	}
	h := rawFind(b, ctx, sh[0], id)
	sharing(b, sessions, func(g int) error {
		if err := ctx.SignInit(sh[g], []*pkcs11.Mechanism{pkcs11.NewMechanism(mech, nil)}, h); err != nil {
			return err
		}
		_, err := ctx.Sign(sh[g], data)
		return err
	})
}

func rawFind(t testing.TB, ctx *pkcs11.Ctx, sh pkcs11.SessionHandle, id string) pkcs11.ObjectHandle {
	t.Helper()
	err := ctx.FindObjectsInit(sh, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), pkcs11.NewAttribute(pkcs11.CKA_ID, id)})
	if err != nil {
		t.Fatal(err)
	}
	hs, _, err := ctx.FindObjects(sh, 2)
	if err == nil {
		err = ctx.FindObjectsFinal(sh)
	}
	if err != nil || len(hs) != 1 {
		t.Fatalf("found %d keys: %v", len(hs), err)
	}
	return hs[0]
}

// BenchmarkSign compares the pool with bare C_Sign, turn by turn, with as many
// sessions: with one caller for each, whose context never ends ("inline") or
// has a deadline ("pool"), and with four ("busy").
//
// Medians of 6 turns, signatures a second, SoftHSM 2.6.1, 2 shared cores that
// other work used too, so ± 15 %:
//
//	           raw  inline  pool  busy inline  busy
//	p256      7734    7342  6540         6874  6569
//	ed25519   3289    3220  2266         2682  3243
//	rsa2048   1073    1096  1146          986  1100
//	rsa4096    242     233   235          212   227
func BenchmarkSign(b *testing.B) {
	const sessions = 2
	c := newToken(b)
	c.Sessions = sessions
	p := openPool(b, c)
	ctx, cancel := context.WithTimeout(b.Context(), 1<<40)
	defer cancel()
	loads := []struct {
		name    string
		ctx     context.Context
		callers int
	}{
		{"inline", context.Background(), sessions},
		{"pool", ctx, sessions},
		{"busy inline", context.Background(), 4 * sessions},
		{"busy", ctx, 4 * sessions},
	}
	for _, a := range []struct {
		algorithm string
		mech      uint
		opts      crypto.SignerOpts
	}{
		{"p256", pkcs11.CKM_ECDSA, crypto.SHA256},
		{"p384", pkcs11.CKM_ECDSA, crypto.SHA256},
		{"ed25519", hsm.CKMEdDSA, crypto.SHA256},
		{"rsa2048", pkcs11.CKM_RSA_PKCS, crypto.SHA256},
		{"rsa4096", pkcs11.CKM_RSA_PKCS, crypto.SHA256},
	} {
		generate(b, p, a.algorithm, a.algorithm)
		for turn := range 5 {
			b.Run(fmt.Sprintf("%s/raw/%d", a.algorithm, turn), func(b *testing.B) { raw(b, p, a.algorithm, a.mech, d256, sessions) })
			for _, l := range loads {
				b.Run(fmt.Sprintf("%s/%s/%d", a.algorithm, l.name, turn), func(b *testing.B) {
					sharing(b, l.callers, func(int) error {
						_, err := p.Sign(l.ctx, []byte(a.algorithm), d256, a.opts)
						return err
					})
				})
			}
		}
	}
}

// BenchmarkSessions: how many sessions one process should have. P-256, medians
// of 3, signatures a second, on the machine of BenchmarkSign:
//
//	sessions    raw  1 caller    2   16    64
//	1          9854      4041 6856 7129  6622
//	2          9705      3622 8261 7972  8176
//	4         10049      3538 7644 8720  8169
//	8         10626      4158 8215 7591  8076
//
// One process gains nothing from a second core in SoftHSM, whose locks are
// global: more of it takes more processes.
func BenchmarkSessions(b *testing.B) {
	for _, n := range []int{1, 2, 4, 8} {
		c := newToken(b)
		c.Sessions = n
		p := openPool(b, c)
		generate(b, p, "k", "p256")
		b.Run(fmt.Sprintf("raw/%d", n), func(b *testing.B) { raw(b, p, "k", pkcs11.CKM_ECDSA, d256, n) })
		for _, callers := range []int{1, 2, 16, 64} {
			b.Run(fmt.Sprintf("pool/%d/callers/%d", n, callers), func(b *testing.B) {
				sharing(b, callers, func(int) error {
					_, err := p.Sign(b.Context(), []byte("k"), d256, crypto.SHA256)
					return err
				})
			})
		}
	}
}
