package audit_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/signwarden/signwarden/gateway/audit"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// sink stores entries in memory, and can be held and made to fail. It fails the
// test where two goroutines call it at once.
type sink struct {
	t    *testing.T
	hold chan struct{} // where set, each commit waits for one receive

	mu      sync.Mutex // guards the rest, for the time of one commit
	rows    []string
	batches []int
	fail    func(entries [][]byte) error
	base    int64 // the number of the first row
}

func (s *sink) commit(ctx context.Context, records []audit.Record) (int64, error) {
	var entries [][]byte
	for _, r := range records {
		entries = append(entries, r.Entry)
	}
	if !s.mu.TryLock() {
		s.t.Error("two commits at once")
		s.mu.Lock()
	}
	defer s.mu.Unlock()
	if d, ok := ctx.Deadline(); !ok || time.Until(d) > time.Minute {
		s.t.Errorf("a commit without a bound: %v", d)
	}
	s.batches = append(s.batches, len(entries))
	if s.hold != nil {
		<-s.hold
	}
	if s.fail != nil {
		if err := s.fail(entries); err != nil {
			return 77, err // a number that means nothing
		}
	}
	first := s.base + int64(len(s.rows))
	for _, e := range entries {
		s.rows = append(s.rows, string(e))
	}
	return first, nil
}

func (s *sink) row(n int64) string { return s.rows[n-s.base] }

func entry(n int) audit.Entry { return audit.Entry{Time: at, Request: fmt.Sprint(n)} }

// appended is what one Append returned.
type appended struct {
	n   int
	row int64
	err error
}

// fill appends n entries in goroutines, in order, and waits until each is in
// the queue or blocked at it; the bubble of synctest tells when.
func fill(l *audit.Log, from, n int, out chan<- appended) {
	for i := from; i < from+n; i++ {
		go func() {
			row, err := l.Append(entry(i))
			out <- appended{i, row, err}
		}()
		synctest.Wait()
	}
}

// Entries that wait while one commit runs go together into the next, in the
// order in which they came, numbered as the sink says.
func TestGroupCommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &sink{t: t, hold: make(chan struct{}), base: 1000}
		l := audit.New(s.commit)
		out := make(chan appended, 100)
		fill(l, 0, 1, out)
		fill(l, 1, 50, out)
		s.hold <- struct{}{}
		synctest.Wait()
		if len(out) != 1 {
			t.Errorf("%d answered after the first commit, want 1", len(out))
		}
		s.hold <- struct{}{}
		l.Close()
		synctest.Wait()
		if want := []int{1, 50}; fmt.Sprint(s.batches) != fmt.Sprint(want) {
			t.Errorf("commits of %v entries, want %v", s.batches, want)
		}
		for range 51 {
			a := <-out
			if a.err != nil || a.row != 1000+int64(a.n) {
				t.Errorf("entry %d: row %d, %v; want row %d", a.n, a.row, a.err, 1000+a.n)
			}
			if got, want := s.row(a.row), string(entry(a.n).Canonical()); got != want {
				t.Errorf("row %d is %s, want %s", a.row, got, want)
			}
		}
	})
}

// No commit is of more than 1024, however many wait; and they keep their order.
func TestMaxBatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 2500
		s := &sink{t: t, hold: make(chan struct{})}
		l := audit.New(s.commit)
		out := make(chan appended, n+1)
		fill(l, 0, 1, out)
		fill(l, 1, n, out)
		close(s.hold)
		for range n + 1 {
			if a := <-out; a.err != nil || a.n <= 1024 && a.row != int64(a.n) {
				t.Errorf("entry %d: row %d, %v", a.n, a.row, a.err)
			}
		}
		l.Close()
		total := 0
		for _, b := range s.batches {
			total += b
			if b > 1024 {
				t.Errorf("a commit of %d entries", b)
			}
		}
		if total != n+1 || s.batches[0] != 1 || s.batches[1] != 1024 || len(s.batches) > 6 {
			t.Errorf("commits of %v entries, want 1, 1024 and a few more, of %d in all", s.batches, n+1)
		}
	})
}

// A sink that fails, fails those entries and no other, however it failed: with
// nothing stored, or with everything stored.
func TestFailingSink(t *testing.T) {
	broken := errors.New("disk on fire")
	for _, stored := range []bool{false, true} {
		t.Run(fmt.Sprintf("stored %v", stored), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &sink{t: t, hold: make(chan struct{})}
				s.fail = func(entries [][]byte) error {
					if !strings.Contains(string(entries[0]), `"1"`) {
						return nil
					}
					if stored {
						for _, e := range entries {
							s.rows = append(s.rows, string(e))
						}
					}
					return broken
				}
				l := audit.New(s.commit)
				out := make(chan appended, 20)
				fill(l, 0, 1, out)
				fill(l, 1, 5, out) // the batch that fails: 1 to 5
				s.hold <- struct{}{}
				synctest.Wait()
				fill(l, 6, 4, out) // waits behind it
				s.hold <- struct{}{}
				s.hold <- struct{}{}
				l.Close()
				gone := int64(5)
				if stored {
					gone = 0
				}
				for range 10 {
					a := <-out
					switch failed := a.n >= 1 && a.n <= 5; {
					case failed && (!errors.Is(a.err, broken) || !strings.Contains(a.err.Error(), "5 audit entries") || a.row != 0):
						t.Errorf("entry %d: row %d, %v; want row 0 and the sink's error", a.n, a.row, a.err)
					case !failed && a.err != nil:
						t.Errorf("entry %d: %v", a.n, a.err)
					case a.n >= 6 && a.row != int64(a.n)-gone:
						t.Errorf("entry %d: row %d, want %d", a.n, a.row, int64(a.n)-gone)
					}
				}
				if fmt.Sprint(s.batches) != "[1 5 4]" {
					t.Errorf("commits of %v entries, want [1 5 4]", s.batches)
				}
			})
		})
	}
}

// A sink that hangs is given a context that ends, and the log goes on.
func TestHangingSink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hang := true
		l := audit.New(func(ctx context.Context, _ []audit.Record) (int64, error) {
			if hang {
				<-ctx.Done()
				return 0, ctx.Err()
			}
			return 5, nil
		})
		start := time.Now()
		if _, err := l.Append(entry(0)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Append: %v, want the deadline", err)
		}
		if d := time.Since(start); d > 10*time.Second {
			t.Errorf("took %v", d)
		}
		hang = false
		if row, err := l.Append(entry(1)); row != 5 || err != nil {
			t.Errorf("then Append = %d, %v", row, err)
		}
		l.Close()
	})
}

// Close waits for what Append has taken, refuses what comes after, and may be
// called again, also while it waits.
func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &sink{t: t, hold: make(chan struct{})}
		l := audit.New(s.commit)
		out := make(chan appended, 20)
		fill(l, 0, 1, out)
		fill(l, 1, 9, out)
		closed := make(chan struct{}, 2)
		for range 2 {
			go func() {
				l.Close()
				closed <- struct{}{}
			}()
		}
		synctest.Wait()
		if _, err := l.Append(entry(10)); !errors.Is(err, audit.ErrClosed) {
			t.Errorf("Append while it closes: %v, want ErrClosed", err)
		}
		if len(closed) != 0 {
			t.Error("Close returned with a commit under way")
		}
		s.hold <- struct{}{}
		synctest.Wait()
		if len(closed) != 0 {
			t.Error("Close returned with entries in the queue")
		}
		s.hold <- struct{}{}
		synctest.Wait()
		if len(closed) != 2 || len(out) != 10 || len(s.rows) != 10 {
			t.Errorf("%d of 2 Closes returned, %d of 10 answered, %d of 10 rows", len(closed), len(out), len(s.rows))
		}
		for range 10 {
			if a := <-out; a.err != nil || a.row != int64(a.n) {
				t.Errorf("entry %d: row %d, %v", a.n, a.row, a.err)
			}
		}
		l.Close()
		if _, err := l.Append(entry(11)); !errors.Is(err, audit.ErrClosed) {
			t.Errorf("Append after Close: %v, want ErrClosed", err)
		}
		if len(s.rows) != 10 {
			t.Errorf("%d rows, want 10", len(s.rows))
		}
	})
}

// Close with more waiting than the queue holds: the appenders that are blocked
// at it were there before, and are recorded.
func TestCloseWithAFullQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 1500
		s := &sink{t: t, hold: make(chan struct{})}
		l := audit.New(s.commit)
		out := make(chan appended, n)
		fill(l, 0, n, out)
		go l.Close() // not waited for: synctest does not see who waits for a mutex
		close(s.hold)
		l.Close()
		for range n {
			if a := <-out; a.err != nil {
				t.Errorf("entry %d: %v", a.n, a.err)
			}
		}
		if len(s.rows) != n {
			t.Errorf("%d rows, want %d", len(s.rows), n)
		}
	})
}

// Real goroutines, for the race detector: each appender's rows are its own and
// rise, every row is there once, and Close in the midst loses nothing.
func TestConcurrentAppends(t *testing.T) {
	const appenders, each = 1000, 10
	s := &sink{t: t}
	l := audit.New(s.commit)
	var mu sync.Mutex
	rows := map[int64]string{}
	refused := 0
	var wg sync.WaitGroup
	for i := range appenders {
		wg.Go(func() {
			last := int64(-1)
			for j := range each {
				e := entry(i*each + j)
				row, err := l.Append(e)
				mu.Lock()
				switch _, taken := rows[row]; {
				case errors.Is(err, audit.ErrClosed):
					refused++
				case err != nil || taken || row <= last:
					t.Errorf("row %d after %d, taken %v: %v", row, last, taken, err)
				default:
					rows[row], last = string(e.Canonical()), row
				}
				n := len(rows)
				mu.Unlock()
				if n == appenders*each*9/10 {
					go l.Close()
				}
			}
		})
	}
	wg.Wait()
	l.Close()
	if len(rows)+refused != appenders*each || len(s.rows) != len(rows) {
		t.Errorf("%d rows stored, %d answered, %d refused of %d", len(s.rows), len(rows), refused, appenders*each)
	}
	for row, want := range rows {
		if s.row(row) != want {
			t.Fatalf("row %d is %s, want %s", row, s.row(row), want)
		}
	}
	t.Logf("%d entries in %d commits", len(rows), len(s.batches))
}

// An entry that comes alone is committed at once, however many are announced by then
// that it is not to wait for; of many that are announced, a quarter makes a group.
func TestExpected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &sink{t: t}
		l := audit.New(s.commit)
		start := time.Now()
		alone := l.Expect("ci")
		time.Sleep(time.Second) // at the token
		if _, err := alone.Append(entry(0), nil); err != nil || time.Since(start) != time.Second {
			t.Errorf("%v, after %v", err, time.Since(start))
		}
		alone.Cancel() // does nothing

		const n = 80
		var all []*audit.Expected
		for range n {
			all = append(all, l.Expect("ci"))
		}
		time.Sleep(8 * time.Millisecond)
		out := make(chan appended, n)
		add := func(i int) {
			go func() {
				row, err := all[i].Append(entry(i), []byte{byte(i)})
				out <- appended{i, row, err}
			}()
			synctest.Wait()
		}
		for i := range n/4 - 1 {
			add(i)
		}
		if len(out) != 0 {
			t.Errorf("%d are committed, without waiting for a quarter", len(out))
		}
		add(n/4 - 1)
		if len(out) != n/4 {
			t.Errorf("%d of the first quarter are committed, want %d", len(out), n/4)
		}
		// One more waits an eighth of the time that it took, and no longer.
		before := time.Now()
		add(n / 4)
		if len(out) != n/4 {
			t.Error("the next does not wait")
		}
		time.Sleep(time.Millisecond)
		synctest.Wait()
		if len(out) != n/4+1 {
			t.Errorf("the next waits for more than %v", time.Since(before))
		}
		// Where the others do not come nobody waits for them.
		add(n/4 + 1)
		for _, x := range all[n/4+2:] {
			x.Cancel()
			x.Cancel()
		}
		synctest.Wait()
		if len(out) != n/4+2 || time.Since(before) != time.Millisecond {
			t.Errorf("%d are committed when the others are called off, after %v", len(out), time.Since(before))
		}
		l.Close()
		if want := []int{1, n / 4, 1, 1}; fmt.Sprint(s.batches) != fmt.Sprint(want) {
			t.Errorf("commits of %v entries, want %v", s.batches, want)
		}
		for range n/4 + 2 {
			if a := <-out; a.err != nil || s.row(a.row) != string(entry(a.n).Canonical()) {
				t.Errorf("entry %d: row %d, %v", a.n, a.row, a.err)
			}
		}
	})
}

// Who has one entry at a time does not wait for those of one who has many.
func TestExpectedOfTwo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &sink{t: t}
		l := audit.New(s.commit)
		var flood []*audit.Expected
		for range 100 {
			flood = append(flood, l.Expect("flood"))
		}
		lone := l.Expect("lone")
		time.Sleep(time.Second)
		waiting := make(chan error)
		go func() { _, err := flood[0].Append(entry(0), nil); waiting <- err }()
		synctest.Wait()
		start := time.Now()
		if _, err := lone.Append(entry(1), nil); err != nil || time.Since(start) != 0 {
			t.Errorf("%v, after %v", err, time.Since(start))
		}
		// And does not break up their groups: the other waits for as long as it would.
		if err := <-waiting; err != nil || time.Since(start) != 50*time.Millisecond {
			t.Errorf("one of the many: %v, after %v", err, time.Since(start))
		}
		// Nor when the others of its caller are called off.
		two := []*audit.Expected{l.Expect("two"), l.Expect("two"), l.Expect("two"), l.Expect("two"), l.Expect("two")}
		time.Sleep(time.Second)
		start = time.Now()
		go func() { _, err := two[0].Append(entry(2), nil); waiting <- err }()
		synctest.Wait()
		if len(s.batches) != 2 {
			t.Errorf("commits of %v: one of five is not waited with", s.batches)
		}
		two[1].Cancel()
		if err := <-waiting; err != nil || time.Since(start) != 0 {
			t.Errorf("when another is called off: %v, after %v", err, time.Since(start))
		}
		for _, x := range append(flood[1:], two[2:]...) {
			x.Cancel()
		}
		l.Close()
		if want := []int{1, 1, 1}; fmt.Sprint(s.batches) != fmt.Sprint(want) {
			t.Errorf("commits of %v entries, want %v", s.batches, want)
		}
	})
}

// Where some who have one entry at a time follow each other, those of who has many wait no
// longer than they would alone, and one commit.
func TestExpectedAmongRipe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const takes = 10 * time.Millisecond
		s := &sink{t: t}
		l := audit.New(func(ctx context.Context, r []audit.Record) (int64, error) {
			time.Sleep(takes)
			return s.commit(ctx, r)
		})
		many := make([]*audit.Expected, 100)
		for i := range many {
			many[i] = l.Expect("many")
		}
		var wg sync.WaitGroup
		for i := range 3 {
			wg.Go(func() {
				for range 200 {
					x := l.Expect(fmt.Sprint("lone ", i))
					time.Sleep(time.Millisecond)
					if _, err := x.Append(entry(i), nil); err != nil {
						t.Error(err)
					}
				}
			})
		}
		time.Sleep(time.Second)
		start := time.Now()
		if _, err := many[0].Append(entry(9), nil); err != nil || time.Since(start) > 50*time.Millisecond+2*takes {
			t.Errorf("one of many: %v, after %v", err, time.Since(start))
		}
		wg.Wait()
		for _, x := range many[1:] {
			x.Cancel()
		}
		l.Close()
	})
}

// Whoever is not announced waits for nobody.
func TestUnexpectedAmongExpected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &sink{t: t}
		l := audit.New(s.commit)
		for range 100 {
			defer l.Expect("ci").Cancel()
		}
		x := l.Expect("ci")
		time.Sleep(time.Second)
		waiting := make(chan error)
		go func() { _, err := x.Append(entry(1), nil); waiting <- err }()
		synctest.Wait()
		start := time.Now()
		if _, err := l.Append(entry(0)); err != nil || time.Since(start) != 0 {
			t.Errorf("%v, after %v", err, time.Since(start))
		}
		if err := <-waiting; err != nil || time.Since(start) != 50*time.Millisecond {
			t.Errorf("who is: %v, after %v", err, time.Since(start))
		}
		l.Close()
		if _, err := l.Expect("ci").Append(entry(1), nil); !errors.Is(err, audit.ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
	})
}

// A sink that panics in one request does not hold up the next.
func TestSinkPanics(t *testing.T) {
	calls := 0
	l := audit.New(func(context.Context, []audit.Record) (int64, error) {
		if calls++; calls == 1 {
			panic("broken")
		}
		return 7, nil
	})
	func() {
		defer func() {
			if recover() == nil {
				t.Error("the panic is swallowed")
			}
		}()
		_, _ = l.Append(entry(1))
	}()
	if row, err := l.Append(entry(2)); row != 7 || err != nil {
		t.Errorf("the next: row %d, %v", row, err)
	}
	l.Close()
}
