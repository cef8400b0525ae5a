//go:build soak

package softhsm_test

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

// usage is what a process has.
type usage struct {
	kib, files, threads int
}

func usageOf(t testing.TB, pid int) usage {
	t.Helper()
	proc := fmt.Sprintf("/proc/%d/", pid)
	u := usage{}
	for line := range strings.Lines(string(readFile(t, proc+"status"))) {
		f := strings.Fields(line)
		switch {
		case len(f) > 1 && f[0] == "VmRSS:":
			u.kib, _ = strconv.Atoi(f[1])
		case len(f) > 1 && f[0] == "Threads:":
			u.threads, _ = strconv.Atoi(f[1])
		}
	}
	fds, err := os.ReadDir(proc + "fd")
	if err != nil {
		t.Fatal(err)
	}
	u.files = len(fds)
	return u
}

// metric is a number of the gateway's metrics.
func metric(t testing.TB, address, name string) int {
	t.Helper()
	r, err := http.Get("http://" + address + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	_, after, ok := strings.Cut(string(b), "\n"+name+" ")
	f, err := strconv.ParseFloat(strings.TrimSpace(strings.SplitN(after, "\n", 2)[0]), 64)
	if !ok || err != nil {
		t.Fatalf("no %s in the metrics: %v", name, err)
	}
	return int(f)
}

// soakSignatures is SIGNWARDEN_SOAK_SIGNATURES, 300,000 if it is not set.
func soakSignatures(t testing.TB) int {
	t.Helper()
	s := os.Getenv("SIGNWARDEN_SOAK_SIGNATURES")
	if s == "" {
		return 300_000
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// peaks are the most that something was, in KiB, while a load warmed up, and in each
// half of what followed.
type peaks [3]int

func (m *peaks) see(part, kib int) { m[part] = max(m[part], kib) }

// growth is by how much the second half went beyond the first.
func (m *peaks) growth() int { return m[2] - m[1] }

// samples is how often is looked in a load after it has warmed up.
const samples = 60

// What is no growth: noise, in KiB, and what is still allowed for each signature of a
// half. A leak of 16 bytes a signature is found in two million.
const (
	workerNoise  = 2 << 10
	gatewayNoise = 6 << 10
	leakBytes    = 4
)

// grew tells whether what was watched grew in the second half of so many signatures.
func (m *peaks) grew(all, noise int) bool {
	return m.growth() > noise+(leakBytes*all/2)>>10
}

// What has warmed up: a worker collects its garbage when it has 32 MiB of it, after some
// 60,000 signatures. A gateway remembers its answers in two generations, each of a
// minute, or 128 Ki of them. Of these each half of a load has all; it is to have more.
const (
	workerWarm  = 200_000
	gatewayWarm = 2*(128<<10) + 10_000
	gatewayFor  = 2*time.Minute + 5*time.Second
	leastSoak   = 2 * 150_000
)

// TestWorkerSoak has workers sign as fast as they can.
func TestWorkerSoak(t *testing.T) {
	f := newFaultToken(t, nil)
	ws := f.tok.Workers()
	all := soakSignatures(t)
	rss := make([]peaks, len(ws))
	load := func(part, n int) {
		l := signAll(16, n, func() error { _, err := f.signAs(t, faultKey, faultDeadline); return err })
		if l.failed() > 0 {
			t.Errorf("%v", l)
		}
		for k, w := range ws {
			rss[k].see(part, usageOf(t, w.PID).kib)
		}
	}
	load(0, workerWarm)
	for i := range samples {
		load(1+i*2/samples, all/samples)
	}
	for k, w := range f.tok.Workers() {
		if w.PID != ws[k].PID {
			t.Errorf("worker %d was replaced", k)
		}
		t.Logf("worker %d: %d signatures; at the most, warming up and in each half: %d KiB", k, w.Answered, rss[k])
		if rss[k].grew(all/len(ws), workerNoise) {
			t.Errorf("worker %d grew by %d KiB", k, rss[k].growth())
		}
	}
}

// SIGNWARDEN_SOAK_SIGNATURES P-256 signatures through a gateway, after it has warmed up:
// what it and its workers have in the second half is what they had in the first.
func TestTokenSoak(t *testing.T) {
	all := soakSignatures(t)
	if all < leastSoak {
		t.Fatalf("%d signatures tell nothing: %d, at the least", all, leastSoak)
	}
	address := freeAddress(t)
	f := newFaultGateway(t, "", "metrics:\n  listen: "+address+"\n")
	pids := f.workers(t)
	rss := make([]peaks, len(pids))
	var gw, live, routines, files peaks
	load := func(part, n int) {
		l := signAll(32, n, func() error { return f.sign(t, faultDeadline) })
		if l.failed() > 0 {
			t.Errorf("%v", l)
		}
		// Which happens to one that stalls, where the machine has much else to do.
		if got := f.workers(t); fmt.Sprint(pids) != fmt.Sprint(got) {
			t.Fatalf("workers %v were replaced by %v: the log says why; this wants a machine for itself", pids, got)
		}
		for k, pid := range pids {
			rss[k].see(part, usageOf(t, pid).kib)
		}
		u := usageOf(t, f.cmd.Process.Pid)
		gw.see(part, u.kib)
		files.see(part, u.files)
		routines.see(part, metric(t, address, "go_goroutines"))
		live.see(part, metric(t, address, "go_memstats_next_gc_bytes")>>11) // of which half lives
	}
	began := time.Now()
	warm := 0
	for ; warm < gatewayWarm && time.Since(began) < gatewayFor; warm += 5000 {
		load(0, 5000)
	}
	t.Logf("warm after %d signatures and %v", warm, time.Since(began).Round(time.Second))
	began = time.Now()
	for i := range samples {
		load(1+i*2/samples, all/samples)
	}
	t.Logf("%d signatures, %.0f a second; at the most, warming up and in each half: gateway %d KiB, of which %d KiB live, %d files, %d goroutines; workers %d KiB",
		all, float64(all)/time.Since(began).Seconds(), gw, live, files, routines, rss)
	if live.grew(all, gatewayNoise) || files.growth() > 4 || routines.growth() > 8 {
		t.Errorf("the gateway grew: %d KiB live, %d files, %d goroutines", live.growth(), files.growth(), routines.growth())
	}
	// Its memory is at most twice what lives, and what it began with.
	if gw.growth() > 2*gatewayNoise+leakBytes*all>>10 {
		t.Errorf("the gateway grew by %d KiB", gw.growth())
	}
	for k := range rss {
		if rss[k].grew(all/len(rss), workerNoise) {
			t.Errorf("worker %d grew by %d KiB", k, rss[k].growth())
		}
	}
}
