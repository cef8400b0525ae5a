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

// RSA-2048 through our PKCS#11 sockets, the gateway's own and that of signwarden agent, beside
// SoftHSM loaded by the same program, and beside p11-kit's own server with SoftHSM behind: that
// decides, verifies and records nothing, and what it takes is the protocol's and its client's.
func TestBenchP11(t *testing.T) {
	g := initGateway(t, shortDir(t)+"/gw")
	local := filepath.Join(shortDir(t), "p11")
	conf := g.dir + "/signwardend.yaml"
	writeFile(t, conf, fmt.Sprintf("%sagents:\n  - {p11_socket: %s, principal: admin, uids: [%d]}\n", readFile(t, conf), local, os.Getuid()))
	g.serve(t)
	g.must(t, "signwarden", "key", "create", "rsa", "--algorithm", "rsa2048")
	pin := strings.TrimSpace(string(readFile(t, g.dir+"/token/user.pin")))
	soft := append(os.Environ(), "SOFTHSM2_CONF="+g.dir+"/token/softhsm2.conf")
	_, id, _ := strings.Cut(g.must(t, "signwarden", "key", "show", "rsa", "-o", "json"), `"token_id": "`)
	id, _, _ = strings.Cut(id, `"`)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	remote := filepath.Join(shortDir(t), "p11")
	background(t, g.env, "signwarden", "agent", "--p11-socket", remote).await(t, "PKCS#11 socket ")
	server := filepath.Join(shortDir(t), "p11-kit")
	background(t, soft, "p11-kit", "server", "-f", "-n", server, "--provider", softhsmModule(t), "pkcs11:")
	waitFor(t, "p11-kit's socket", func() bool { _, err := os.Stat(server); return err == nil })

	ways := []struct {
		name             string
		env              []string
		module, key, pin string
	}{
		{"SoftHSM directly", soft, softhsmModule(t), id, pin},
		{"gateway's socket", append(os.Environ(), "P11_KIT_SERVER_ADDRESS=unix:path="+local), p11Module(t), "label=rsa", "-"},
		{"signwarden agent", append(os.Environ(), "P11_KIT_SERVER_ADDRESS=unix:path="+remote), p11Module(t), "label=rsa", "-"},
		{"p11-kit server", append(os.Environ(), "P11_KIT_SERVER_ADDRESS=unix:path="+server), p11Module(t), id, pin},
	}
	for _, threads := range []int{1, 4, 8} {
		rates := make([][]float64, len(ways))
		for range rounds {
			for i, w := range ways {
				cmd := exec.CommandContext(t.Context(), self)
				cmd.Env = append(slices.Clone(w.env), fmt.Sprintf("%s=%s %s %s %d", signLoop, w.module, w.key, w.pin, threads))
				out, err := cmd.Output()
				if err != nil {
					t.Fatalf("%s: %v: %s", w.name, err, err.(*exec.ExitError).Stderr)
				}
				var rate float64
				if _, err := fmt.Sscan(string(out), &rate); err != nil {
					t.Fatal(err)
				}
				rates[i] = append(rates[i], rate)
			}
		}
		fmt.Printf("PKCS#11, RSA-2048, %d threads:", threads)
		for i, w := range ways {
			slices.Sort(rates[i])
			fmt.Printf(" %s %.0f/s (%.2f)", w.name, rates[i][rounds/2], rates[i][rounds/2]/rates[0][rounds/2])
		}
		fmt.Println()
		if ours, theirs := rates[1][rounds/2], rates[3][rounds/2]; ours < 0.4*theirs {
			t.Errorf("%d threads: with policy, verification and record the gateway has %.2f of the rate of p11-kit's server, which has none of them; want 0.4", threads, ours/theirs)
		}
	}
}
