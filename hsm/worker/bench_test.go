package worker_test

import (
	"bufio"
	"context"
	"crypto"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/signwarden/signwarden/hsm"
	"github.com/signwarden/signwarden/hsm/worker"
)

// rawCommand is a process that signs with bare C_Sign: what workers are
// measured against.
const rawCommand = "test-raw"

type rawOrder struct {
	Conf, Label, ID string
	Mech            uint
	For             time.Duration
}

func rawSigner() int {
	n, err := signRaw()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println(n)
	return 0
}

func signRaw() (int, error) {
	var o rawOrder
	in := bufio.NewReader(os.Stdin)
	line, err := in.ReadString('\n')
	if err == nil {
		err = json.Unmarshal([]byte(line), &o)
	}
	if err != nil {
		return 0, err
	}
	os.Setenv("SOFTHSM2_CONF", o.Conf)
	ctx := pkcs11.New(softhsm)
	if err := ctx.Initialize(); err != nil {
		return 0, err
	}
	slots, err := ctx.GetSlotList(true)
	if err != nil {
		return 0, err
	}
	i := slices.IndexFunc(slots, func(s uint) bool {
		t, err := ctx.GetTokenInfo(s)
		return err == nil && strings.TrimRight(t.Label, "\x00 ") == o.Label
	})
	sh, err := ctx.OpenSession(slots[i], pkcs11.CKF_SERIAL_SESSION)
	if err == nil {
		err = ctx.Login(sh, pkcs11.CKU_USER, userPIN)
	}
	if err == nil {
		err = ctx.FindObjectsInit(sh, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), pkcs11.NewAttribute(pkcs11.CKA_ID, []byte(o.ID))})
	}
	if err != nil {
		return 0, err
	}
	hs, _, err := ctx.FindObjects(sh, 1)
	if err == nil {
		err = ctx.FindObjectsFinal(sh)
	}
	if err != nil {
		return 0, err
	}
	data := digest(1)
	fmt.Println("ready")
	if _, err := in.ReadString('\n'); err != nil {
		return 0, err
	}
	n := 0
	for end := time.Now().Add(o.For); time.Now().Before(end); n++ {
		if err := ctx.SignInit(sh, []*pkcs11.Mechanism{pkcs11.NewMechanism(o.Mech, nil)}, hs[0]); err != nil {
			return n, err
		}
		if _, err := ctx.Sign(sh, data); err != nil {
			return n, err
		}
	}
	return n, nil
}

// turnTime is how long a turn of a comparison takes.
const turnTime = 400 * time.Millisecond

// rawRate is signatures a second of n such processes.
func rawRate(b *testing.B, n int, o rawOrder) float64 {
	o.For = turnTime
	order, _ := json.Marshal(o)
	var total atomic.Int64
	var wg sync.WaitGroup
	var ready sync.WaitGroup
	begin := make(chan struct{})
	ready.Add(n)
	for range n {
		wg.Go(func() {
			cmd := exec.Command("/proc/self/exe", rawCommand)
			cmd.Stderr = os.Stderr
			in, _ := cmd.StdinPipe()
			out, _ := cmd.StdoutPipe()
			if err := cmd.Start(); err != nil {
				b.Error(err)
			}
			fmt.Fprintf(in, "%s\n", order)
			r := bufio.NewReader(out)
			_, err := r.ReadString('\n')
			ready.Done()
			<-begin
			fmt.Fprintln(in)
			var k int64
			if _, serr := fmt.Fscan(r, &k); err != nil || serr != nil {
				b.Errorf("raw: %v, %v", err, serr)
			}
			cmd.Wait()
			total.Add(k)
		})
	}
	ready.Wait()
	close(begin)
	wg.Wait()
	return float64(total.Load()) / turnTime.Seconds()
}

// rate is signatures a second of n callers.
func rate(b *testing.B, n int, sign func(ctx context.Context) error) float64 {
	ctx, cancel := context.WithTimeout(b.Context(), time.Minute)
	defer cancel()
	var total atomic.Int64
	var wg sync.WaitGroup
	end := time.Now().Add(turnTime)
	for range n {
		wg.Go(func() {
			for time.Now().Before(end) {
				if err := sign(ctx); err != nil {
					b.Error(err)
					return
				}
				total.Add(1)
			}
		})
	}
	wg.Wait()
	return float64(total.Load()) / turnTime.Seconds()
}

// BenchmarkSign compares, turn by turn: bare C_Sign in two processes, two
// workers with 1, 2, 8 and 32 callers, and a pool of two sessions in this
// process with 1 and 8. Figures are in docs/PERFORMANCE.md. Run it with -benchtime 1x.
func BenchmarkSign(b *testing.B) {
	c := newToken(b)
	c.Logger = nil
	tok := open(b, c)
	pool, err := hsm.Open(b.Context(), hsm.Config{Module: softhsm, Env: env, TokenLabel: c.TokenLabel, PIN: c.PIN, Sessions: 2})
	if err != nil {
		b.Fatal(err)
	}
	defer pool.Close()
	deep := c
	deep.Depth = 16
	deeper := open(b, deep)
	for _, a := range []struct {
		algorithm string
		mech      uint
	}{{"p256", pkcs11.CKM_ECDSA}, {"rsa2048", pkcs11.CKM_RSA_PKCS}, {"rsa4096", pkcs11.CKM_RSA_PKCS}} {
		generate(b, tok, a.algorithm, a.algorithm)
		by := func(t *worker.Token) func(context.Context) error {
			return func(ctx context.Context) error {
				_, err := t.Sign(ctx, "", 1, []byte(a.algorithm), digest(1), crypto.SHA256)
				return err
			}
		}
		inProcess := func(ctx context.Context) error {
			_, err := pool.Sign(ctx, []byte(a.algorithm), digest(1), crypto.SHA256)
			return err
		}
		b.Run(a.algorithm, func(b *testing.B) {
			sums := map[string][]float64{}
			for range 5 {
				one := rawRate(b, 1, rawOrder{Conf: env["SOFTHSM2_CONF"], Label: c.TokenLabel, ID: a.algorithm, Mech: a.mech})
				two := rawRate(b, 2, rawOrder{Conf: env["SOFTHSM2_CONF"], Label: c.TokenLabel, ID: a.algorithm, Mech: a.mech})
				sums["raw1"], sums["raw2"] = append(sums["raw1"], one), append(sums["raw2"], two)
				for _, n := range []int{1, 2, 8, 32} {
					sums[fmt.Sprintf("workers-%d", n)] = append(sums[fmt.Sprintf("workers-%d", n)], rate(b, n, by(tok)))
				}
				sums["deep-32"] = append(sums["deep-32"], rate(b, 32, by(deeper)))
				for _, n := range []int{1, 8} {
					sums[fmt.Sprintf("pool-%d", n)] = append(sums[fmt.Sprintf("pool-%d", n)], rate(b, n, inProcess))
				}
			}
			for name, v := range sums {
				slices.Sort(v)
				b.ReportMetric(v[len(v)/2], name)
			}
		})
	}
}

var _ = worker.Command
