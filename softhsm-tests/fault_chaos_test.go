//go:build chaos

package softhsm_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"
)

// 100,000 signatures while one C_Sign of a hundred fails in one of some 40 ways.
func TestChaosFaultMix(t *testing.T) {
	f := newFaultGateway(t, "")
	f.injectMix(t)
	const all = 100_000
	began := time.Now()
	l := signAll(32, all, func() error { return f.sign(t, faultDeadline) })
	t.Logf("%.0f signatures a second", all/time.Since(began).Seconds())
	f.checkMix(t, l, all)
}

// Every half second for a minute a worker is killed, crashes, or hangs, under load: no
// error, nobody waits for more than a second, nothing is recorded twice.
func TestChaosWorkers(t *testing.T) {
	f := newFaultGateway(t, "")
	deaths := []func(pid int) error{
		func(pid int) error { return syscall.Kill(pid, syscall.SIGKILL) },
		func(pid int) error { return syscall.Kill(pid, syscall.SIGSEGV) },
		func(pid int) error { return syscall.Kill(pid, syscall.SIGSTOP) },
		func(int) error { f.Set(t, "C_Sign nth=1 hang"); return nil },
		func(int) error { f.Set(t, "C_Sign nth=1 segv"); return nil },
		func(int) error { f.Set(t, "C_Sign nth=1 abort"); return nil },
	}
	end := time.Now().Add(chaosFor)
	var load sync.WaitGroup
	var l *tally
	load.Go(func() {
		l = signUntil(16, func() error { return f.sign(t, faultDeadline) }, func(int64) bool { return time.Now().After(end) })
	})
	blows := map[string]int{}
	var at []time.Time
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for i := 0; time.Now().Before(end); i++ {
		<-tick.C
		pids := f.workers(t)
		if len(pids) == 0 {
			blows["nobody there"]++
			continue
		}
		how := i % len(deaths)
		at = append(at, time.Now())
		if err := deaths[how](pids[rand.IntN(len(pids))]); err != nil && err != syscall.ESRCH {
			t.Error(err)
		}
		blows[fmt.Sprint("way ", how)]++
	}
	load.Wait()
	f.Set(t)
	recovery := l.recoveries(at, 250*time.Millisecond)
	p99 := recovery[len(recovery)*99/100]
	t.Logf("%v; recovery p50 %v, p90 %v, p99 %v, most %v; %v", blows, recovery[len(recovery)/2], recovery[len(recovery)*9/10], p99, recovery[len(recovery)-1], l)
	if n := l.failed(); n > 0 {
		t.Errorf("%d errors", n)
	}
	if p99 > time.Second {
		t.Errorf("recovery: p99 %v", p99)
	}
	signed, failed := f.recorded(t)
	if len(signed) != len(l.took) || len(failed) > 0 {
		t.Errorf("%d requests recorded as signed, %d were; failures %v", len(signed), len(l.took), failed)
	}
	for id, n := range signed {
		if n != 1 {
			t.Errorf("request %s has %d records", id, n)
		}
	}
}

// chaosFor is how long workers are killed.
const chaosFor = time.Minute

// recoveries are, for each blow, the longest that a request took which was under way
// then or asked within a moment after it; sorted.
func (l *tally) recoveries(blows []time.Time, moment time.Duration) []time.Duration {
	worst := make([]time.Duration, len(blows))
	for i, b := range blows {
		for k, began := range l.began {
			if began.Before(b.Add(moment)) && began.Add(l.took[k]).After(b) {
				worst[i] = max(worst[i], l.took[k])
			}
		}
	}
	slices.Sort(worst)
	return worst
}
