//go:build bench

package softhsm_test

import (
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"
)

// signLoop is set in a child process of this test binary: a PKCS#11 program that signs
// with RSA-2048 on several threads, for some seconds, and prints the rate. Its value is
// the module, the key's CKA_ID or label, the PIN or nothing, and the threads.
const signLoop = "SIGNWARDEN_TEST_SIGN_LOOP"

func init() {
	if spec := os.Getenv(signLoop); spec != "" {
		if err := runSignLoop(strings.Split(spec, " ")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

func runSignLoop(spec []string) error {
	var threads int
	if _, err := fmt.Sscan(spec[3], &threads); err != nil {
		return err
	}
	ctx := pkcs11.New(spec[0])
	if err := ctx.Initialize(); err != nil {
		return err
	}
	slots, err := ctx.GetSlotList(true)
	if err != nil {
		return err
	}
	find := []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY)}
	if id, label := strings.CutPrefix(spec[1], "label="); label {
		find = append(find, pkcs11.NewAttribute(pkcs11.CKA_LABEL, id))
	} else if b, err := hex.DecodeString(spec[1]); err == nil {
		find = append(find, pkcs11.NewAttribute(pkcs11.CKA_ID, b))
	}
	data := append([]byte("\x30\x31\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x01\x05\x00\x04\x20"), make([]byte, 32)...)
	const d = 3 * time.Second
	counts, errs := make([]int, threads), make([]error, threads)
	var ready, wg sync.WaitGroup
	ready.Add(threads)
	start := make(chan time.Time)
	for i := range threads {
		s, err := ctx.OpenSession(slots[0], pkcs11.CKF_SERIAL_SESSION)
		if err != nil {
			return err
		}
		if i == 0 && spec[2] != "-" {
			if err := ctx.Login(s, pkcs11.CKU_USER, spec[2]); err != nil {
				return err
			}
		}
		wg.Go(func() {
			errs[i] = ctx.FindObjectsInit(s, find)
			found, _, err := ctx.FindObjects(s, 1)
			if errs[i] == nil {
				errs[i] = err
			}
			_ = ctx.FindObjectsFinal(s)
			ready.Done()
			for began := range start {
				for errs[i] == nil && time.Since(began) < d {
					if errs[i] = ctx.SignInit(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS, nil)}, found[0]); errs[i] == nil {
						_, errs[i] = ctx.Sign(s, data)
						counts[i]++
					}
				}
			}
		})
	}
	ready.Wait()
	now := time.Now()
	for range threads {
		start <- now
	}
	close(start)
	wg.Wait()
	n := 0
	for i := range counts {
		if errs[i] != nil {
			return errs[i]
		}
		n += counts[i]
	}
	fmt.Printf("%.1f\n", float64(n)/time.Since(now).Seconds())
	return nil
}

// RSA-2048 through our PKCS#11 socket and the gateway, beside SoftHSM loaded by the same
// program, and beside p11-kit's own server with SoftHSM behind.
func TestBenchP11(t *testing.T) {
	s := newP11Site(t)
	g := s.gateway
	g.must(t, "signwarden", "key", "create", "rsa", "--algorithm", "rsa2048")
	pin := strings.TrimSpace(string(readFile(t, g.dir+"/token/user.pin")))
	soft := append(os.Environ(), "SOFTHSM2_CONF="+g.dir+"/token/softhsm2.conf")
	_, id, _ := strings.Cut(g.must(t, "signwarden", "key", "show", "rsa", "-o", "json"), `"token_id": "`)
	id, _, _ = strings.Cut(id, `"`)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	run := func(env []string, module, key, pin string, threads int) float64 {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), self)
		cmd.Env = append(append([]string(nil), env...), fmt.Sprintf("%s=%s %s %s %d", signLoop, module, key, pin, threads))
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%v: %s", err, err.(*exec.ExitError).Stderr)
		}
		var rate float64
		if _, err := fmt.Sscan(string(out), &rate); err != nil {
			t.Fatal(err)
		}
		return rate
	}
	socket := filepath.Join(shortDir(t), "p11")
	agent := background(t, s.env, "signwarden", "agent", "--p11-socket", socket)
	agent.await(t, "PKCS#11 socket ")
	ours := append(append([]string(nil), s.env...), "P11_KIT_SERVER_ADDRESS=unix:path="+socket)

	server := filepath.Join(shortDir(t), "p11-kit")
	background(t, soft, "p11-kit", "server", "-f", "-n", server, "--provider", softhsmModule(t), "pkcs11:")
	waitFor(t, "p11-kit's socket", func() bool { _, err := os.Stat(server); return err == nil })
	theirs := append(os.Environ(), "P11_KIT_SERVER_ADDRESS=unix:path="+server)

	for _, threads := range []int{1, 4, 8} {
		var direct, our, kits []float64
		for range rounds {
			direct = append(direct, run(soft, softhsmModule(t), id, pin, threads))
			our = append(our, run(ours, p11Module(t), "label=rsa", "-", threads))
			kits = append(kits, run(theirs, p11Module(t), id, pin, threads))
		}
		for _, r := range [][]float64{direct, our, kits} {
			slices.Sort(r)
		}
		o, d, k := our[rounds/2], direct[rounds/2], kits[rounds/2]
		fmt.Printf("PKCS#11 socket, RSA-2048, %d threads: ours %.0f/s, SoftHSM directly %.0f/s: ratio %.2f; p11-kit server with SoftHSM %.0f/s\n", threads, o, d, o/d, k)
		if threads == 8 && o < 0.7*d {
			t.Errorf("%.2f of SoftHSM directly, want 0.7", o/d)
		}
		if threads == 4 && o <= k {
			t.Errorf("not faster than p11-kit's server")
		}
	}
}
