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

// goroutines asks the gateway's metrics.
func goroutines(t testing.TB, address string) int {
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
	_, after, ok := strings.Cut(string(b), "\ngo_goroutines ")
	n, err := strconv.Atoi(strings.TrimSpace(strings.SplitN(after, "\n", 2)[0]))
	if !ok || err != nil {
		t.Fatalf("no go_goroutines in the metrics: %v", err)
	}
	return n
}

// What is no growth without end, in KiB. A gateway remembers its answers of the last two
// minutes. A worker collects its garbage when it has 32 MiB, which 100,000 signatures
// hardly make.
const (
	gatewayGrowth = 64 << 10
	workerGrowth  = 36 << 10
)

// SIGNWARDEN_SOAK_SIGNATURES P-256 signatures, 100,000 if it is not set: what the gateway
// and its workers have after all of them is what they had after half.
func TestTokenSoak(t *testing.T) {
	all := 100_000
	if s := os.Getenv("SIGNWARDEN_SOAK_SIGNATURES"); s != "" {
		var err error
		if all, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	metrics := freeAddress(t)
	f := newFaultGateway(t, "", "metrics:\n  listen: "+metrics+"\n")
	sample := func() (gateway usage, workers []usage, routines int) {
		t.Helper()
		// What is left of the load ends by itself.
		waitFor(t, "the gateway is idle", func() bool {
			was := goroutines(t, metrics)
			time.Sleep(200 * time.Millisecond)
			return goroutines(t, metrics) == was
		})
		for _, pid := range f.workers(t) {
			workers = append(workers, usageOf(t, pid))
		}
		return usageOf(t, f.cmd.Process.Pid), workers, goroutines(t, metrics)
	}
	load := func(n int) {
		t.Helper()
		began := time.Now()
		l := signAll(32, n, func() error { return f.sign(t, faultDeadline) })
		t.Logf("%.0f a second; %v", float64(n)/time.Since(began).Seconds(), l)
		if l.failed() > 0 {
			t.Errorf("%d errors", l.failed())
		}
	}
	pids := fmt.Sprint(f.workers(t))
	load(all / 2)
	g, ws, n := sample()
	load(all - all/2)
	g2, ws2, n2 := sample()
	t.Logf("gateway %+v, then %+v; goroutines %d, then %d; workers %+v, then %+v", g, g2, n, n2, ws, ws2)
	if pids != fmt.Sprint(f.workers(t)) {
		t.Errorf("workers %s were replaced by %v", pids, f.workers(t))
	}
	if g2.kib-g.kib > gatewayGrowth || g2.files > g.files+4 || n2 > n+8 {
		t.Errorf("the gateway grew")
	}
	for i := range ws {
		if w, w2 := ws[i], ws2[i]; w2.kib-w.kib > workerGrowth || w2.files > w.files || w2.threads > w.threads+2 {
			t.Errorf("worker %d grew", i)
		}
	}
}
