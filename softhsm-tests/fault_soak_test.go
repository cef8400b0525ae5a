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

// thirds are the most that something was in each third of a load, in KiB.
type thirds [3]int

func (m *thirds) see(third, kib int) { m[third] = max(m[third], kib) }

// growth is by how much the last third went beyond the one before. The first warms up.
func (m *thirds) growth() int { return m[2] - m[1] }

// samples is how often is looked in a load.
const samples = 60

// What is no growth: noise, in KiB, and what is still allowed for each signature of a
// third. A leak of 16 bytes a signature is found in two million.
const (
	workerNoise  = 2 << 10
	gatewayNoise = 6 << 10
	leakBytes    = 4
)

// grew tells whether what was watched grew in the last third of all signatures.
func (m *thirds) grew(all, noise int) bool {
	return m.growth() > noise+leakBytes*(all/3)>>10
}

// TestWorkerSoak has workers sign as fast as they can. A worker collects its
// garbage when it has 32 MiB of it: after some 60,000 signatures it is as large as it
// will be.
func TestWorkerSoak(t *testing.T) {
	f := newFaultToken(t, nil)
	ws := f.tok.Workers()
	all := soakSignatures(t)
	rss := make([]thirds, len(ws))
	for i := range samples {
		l := signAll(16, all/samples, func() error { _, err := f.signAs(t, faultKey, faultDeadline); return err })
		if l.failed() > 0 {
			t.Errorf("%v", l)
		}
		for k, w := range ws {
			rss[k].see(i*3/samples, usageOf(t, w.PID).kib)
		}
	}
	for k, w := range f.tok.Workers() {
		if w.PID != ws[k].PID {
			t.Errorf("worker %d was replaced", k)
		}
		t.Logf("worker %d: %d signatures, at the most %d KiB in each third", k, w.Answered, rss[k])
		if rss[k].grew(all/len(ws), workerNoise) {
			t.Errorf("worker %d grew by %d KiB", k, rss[k].growth())
		}
	}
}

// SIGNWARDEN_SOAK_SIGNATURES P-256 signatures through a gateway: what it and its workers
// have in the last third is what they had in the one before. The gateway remembers its
// answers of the last two minutes, so that the first third is to be longer than that.
func TestTokenSoak(t *testing.T) {
	all := soakSignatures(t)
	metrics := freeAddress(t)
	f := newFaultGateway(t, "", "metrics:\n  listen: "+metrics+"\n")
	pids := f.workers(t)
	rss := make([]thirds, len(pids))
	var gw, live, routines, files thirds
	began := time.Now()
	for i := range samples {
		l := signAll(32, all/samples, func() error { return f.sign(t, faultDeadline) })
		if l.failed() > 0 {
			t.Errorf("%v", l)
		}
		third := i * 3 / samples
		for k, pid := range pids {
			rss[k].see(third, usageOf(t, pid).kib)
		}
		u := usageOf(t, f.cmd.Process.Pid)
		gw.see(third, u.kib)
		files.see(third, u.files)
		routines.see(third, metric(t, metrics, "go_goroutines"))
		live.see(third, metric(t, metrics, "go_memstats_next_gc_bytes")>>11) // of which half lives
		t.Logf("after %v: gateway %+v, lives %d KiB", time.Since(began).Round(time.Second), u, metric(t, metrics, "go_memstats_next_gc_bytes")>>11)
	}
	t.Logf("%d signatures, %.0f a second; at the most in each third: gateway %d KiB, of which its heap lives %d KiB, %d files, %d goroutines; workers %d KiB",
		all, float64(all)/time.Since(began).Seconds(), gw, live, files, routines, rss)
	if fmt.Sprint(pids) != fmt.Sprint(f.workers(t)) {
		t.Errorf("workers %v were replaced by %v", pids, f.workers(t))
	}
	if live.grew(all, gatewayNoise) || files.growth() > 4 || routines.growth() > 8 {
		t.Errorf("the gateway grew")
	}
	for k := range rss {
		if rss[k].grew(all/len(rss), workerNoise) {
			t.Errorf("worker %d grew by %d KiB", k, rss[k].growth())
		}
	}
}
