package softhsm_test

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signwarden/signwarden/gateway/sigerr"
)

// tally is what a load came to.
type tally struct {
	mu    sync.Mutex // guards the next three; held for a few instructions
	took  []time.Duration
	began []time.Time    // of each of took, before it is sorted
	kinds map[string]int // of errors
	first map[string]string
	asked atomic.Int64
}

// put notes how one request ended.
func (l *tally) put(began time.Time, err error) {
	took := time.Since(began)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil {
		l.took, l.began = append(l.took, took), append(l.began, began)
		return
	}
	kind := "other"
	if k := sigerr.Kind(err); k != nil {
		kind = k.Error()
	}
	if strings.Contains(err.Error(), "WRONG") {
		kind = "wrong"
	}
	if l.kinds == nil {
		l.kinds, l.first = map[string]int{}, map[string]string{}
	}
	if l.kinds[kind]++; l.first[kind] == "" {
		l.first[kind] = err.Error()
	}
}

func (l *tally) failed() (n int) {
	for _, k := range l.kinds {
		n += k
	}
	return n
}

// slowest is the latency that a share of the answered requests was not beyond.
func (l *tally) slowest(share float64) time.Duration {
	if len(l.took) == 0 {
		return 0
	}
	slices.Sort(l.took)
	l.began = nil // of no use any more
	return l.took[min(int(share*float64(len(l.took))), len(l.took)-1)].Round(100 * time.Microsecond)
}

func (l *tally) String() string {
	s := fmt.Sprintf("%d signed; latency p50 %v, p99 %v, p99.9 %v, most %v", len(l.took), l.slowest(.5), l.slowest(.99), l.slowest(.999), l.slowest(1))
	for k, n := range l.kinds {
		s += fmt.Sprintf("; %d %s (%s)", n, k, l.first[k])
	}
	return s
}

// signUntil has n callers sign until stop says so.
func signUntil(n int, sign func() error, stop func(asked int64) bool) *tally {
	l := &tally{}
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			for !stop(l.asked.Add(1)) {
				began := time.Now()
				err := sign()
				l.put(began, err)
			}
		})
	}
	wg.Wait()
	return l
}

// signAll has callers sign so many times in all.
func signAll(callers, all int, sign func() error) *tally {
	return signUntil(callers, sign, func(asked int64) bool { return asked > int64(all) })
}

// The codes of the mix: all that recover by themselves, and of those that refuse a
// request as it stands one (class A): nothing can hide it, another try would be refused
// too, so its share is what a client sees, and with more of them that would be beyond one
// in a thousand. All of class A are in TestFaultMatrix. None of class G: that stops all,
// by design.
const mixRefuse = "0x70"

var mixRecover = []string{
	"0x90", "0x91", "0x150", // B
	"0xB3", "0xB0", "0x82", "0x60", // C
	"0x101",                               // D
	"0xB1", "0x6", "0x31", "0x2", "0x201", // E
	"0x1", "0x3", "0x5", "0x9", "0xA", "0x30", "0x32", "0x50", "0xE0", "0xE1", "0x104", "0x105", "0xB8", "0xB4", "0x121", "0x190", "0x1A0", "0x1A1",
	"0x51", "0x180", "0x80000001", "0x80000100", "0xCE534351", "0x8FFFFFFF", // F, vendors' too
	"0x12345", // no code at all, class F
}

// injectMix fails one C_Sign of a hundred, by one of some 40 codes.
func (f *faultGateway) injectMix(t testing.TB) {
	t.Helper()
	f.Set(t, "seed 1", "C_Sign p=0.01 rv="+strings.Join(append(slices.Clone(mixRecover), mixRefuse), ","))
}

// checkMix looks at what a load under injectMix came to.
func (f *faultGateway) checkMix(t testing.TB, l *tally, all int) {
	t.Helper()
	injected := f.Injected(0)
	t.Logf("%d faults injected, %d codes: %v", injected, len(mixRecover)+1, l)
	if injected < all/200 {
		t.Errorf("only %d faults were injected", injected)
	}
	if lost := all - len(l.took) - l.failed(); lost != 0 || l.kinds["wrong"] != 0 {
		t.Errorf("%d lost, %d wrong", lost, l.kinds["wrong"])
	}
	if most := max(all/1000, 3); l.failed() > most {
		t.Errorf("%d errors, want no more than %d", l.failed(), most)
	}
	// The one code of class A, which is told as what it is; all others are not told at all.
	if other := l.failed() - l.kinds[sigerr.Unsupported.Error()]; other > 0 {
		t.Errorf("%d errors of another kind than a refusal by the token: %v", other, l)
	}
	f.Set(t)
	signed, failed := f.recorded(t)
	if len(signed) != len(l.took) {
		t.Errorf("%d requests have a record of a signature, %d were signed", len(signed), len(l.took))
	}
	for id, n := range signed {
		if n != 1 {
			t.Errorf("request %s has %d records", id, n)
		}
	}
	// A client is told that the token failed; the record says how.
	for what, n := range failed {
		t.Logf("recorded %d times: %s", n, what)
		if !strings.Contains(what, "CKR_") && !strings.Contains(what, "CK_RV 0x") {
			t.Errorf("a failure is recorded without its cause: %s", what)
		}
	}
}

// One C_Sign of a hundred fails, and hardly anybody sees it.
func TestFaultMix(t *testing.T) {
	f := newFaultGateway(t, "")
	f.injectMix(t)
	const all = 2000
	f.checkMix(t, signAll(16, all, func() error { return f.sign(t, faultDeadline) }), all)
}
