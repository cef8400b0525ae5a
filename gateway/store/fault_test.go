package store_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/signwarden/signwarden/gateway/store"
)

// Tests that need a process of their own run this binary again with one of these set.
const (
	crashChild = "SIGNWARDEN_TEST_CRASH" // path of the database to write to until killed
	limitChild = "SIGNWARDEN_TEST_LIMIT" // run under a limit of file sizes
)

func TestMain(m *testing.M) {
	if path := os.Getenv(crashChild); path != "" {
		if err := commitForever(path); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	goleak.VerifyTestMain(m)
}

// TestFullDisk fills a file system of 2 MB: where the test may mount one.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size=2m"); err != nil {
		if os.Geteuid() == 0 {
			t.Logf("cannot mount: %v", err)
		}
		t.Log("not on a full file system here; TestFileSizeLimit tests the same on a limit")
		return
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Errorf("unmounting: %v", err)
		}
	})
	testFull(t, dir, func() error { return syscall.Mount("none", dir, "tmpfs", syscall.MS_REMOUNT, "size=64m") })
}

// TestFileSizeLimit is the same under RLIMIT_FSIZE, which any user can set, in
// a process of its own.
func TestFileSizeLimit(t *testing.T) {
	if os.Getenv(limitChild) == "" {
		t.Parallel()
		c := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestFileSizeLimit$", "-test.v")
		c.Env = append(os.Environ(), limitChild+"=1")
		out, err := c.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "--- PASS: TestFileSizeLimit") {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	signal.Ignore(syscall.SIGXFSZ) // write then returns EFBIG
	var was syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &was); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: 256 << 10, Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	testFull(t, t.TempDir(), func() error { return syscall.Setrlimit(syscall.RLIMIT_FSIZE, &was) })
}

// testFull commits in dir until there is no room. What was committed before is
// there, what failed is not there in part, and when grow has made room the
// store that was open all the time goes on without a gap.
func testFull(t *testing.T, dir string, grow func() error) {
	s := openSQLite(t, dir+"/store.db")
	k := plainKey("a")
	commit(t, s, store.Change{CreateKey: &k, Policy: []byte("p")})
	pad := strings.Repeat("x", 500)
	var want []string
	failures, since := 0, 0
	try := func(n int) error {
		var batch [][]byte
		for i := range n {
			batch = append(batch, fmt.Appendf(nil, "%d %s", len(want)+i, pad))
		}
		first, err := s.Commit(context.Background(), store.Change{Audit: batch})
		if err != nil {
			failures++
			return err
		}
		if first != int64(len(want)) {
			t.Fatalf("a commit begins at row %d, want %d", first, len(want))
		}
		for _, e := range batch {
			want = append(want, string(e))
		}
		return nil
	}
	check := func(when string) {
		t.Helper()
		got := rows(t, s)
		if len(got) != len(want) {
			t.Fatalf("%s: %d rows, want %d", when, len(got), len(want))
		}
		for i := range got {
			if got[i] != want[i] {
				t.Fatalf("%s: row %d is %.10q, want %.10q", when, i, got[i], want[i])
			}
		}
		wantState(t, s, "p", k)
	}
	for i := 0; since < 30; i++ {
		if i > 20_000 {
			t.Fatal("the disk does not get full")
		}
		if err := try(1 + i%64); err != nil {
			if failures == 1 {
				t.Logf("after %d rows: %v", len(want), err)
			}
			since++
		} else {
			since = 0
		}
	}
	check("full")
	k2 := plainKey("b")
	if _, err := s.Commit(context.Background(), store.Change{CreateKey: &k2, Policy: []byte(strings.Repeat("q", 400_000)), Audit: entries("never", 3)}); err == nil {
		t.Error("a change of 400 kB finds room on a full disk")
	}
	check("full, after an administrative change")

	if err := grow(); err != nil {
		t.Fatal(err)
	}
	before := len(want)
	for i := range 50 {
		if err := try(1 + i); err != nil {
			t.Fatalf("with room again: %v", err)
		}
	}
	check("with room again")
	integrity(t, s)
	t.Logf("%d rows before, %d commits failed, %d rows after", before, failures, len(want))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openSQLite(t, dir+"/store.db")
	check("opened again")
	if err := s.Close(); err != nil { // before the file system goes
		t.Fatal(err)
	}
}

func integrity(t *testing.T, s *store.SQLite) {
	t.Helper()
	var got string
	write, _ := s.Pools()
	if err := write.QueryRow("PRAGMA integrity_check").Scan(&got); err != nil || got != "ok" {
		t.Errorf("integrity_check: %q, %v", got, err)
	}
}

// commitForever commits batches of entries, each with its row's number for its
// text, and prints "first n" after each Commit that returned.
func commitForever(path string) error {
	s, err := store.OpenSQLite(context.Background(), path)
	if err != nil {
		return err
	}
	_, last, err := s.Audit(context.Background(), -1, 1)
	if err != nil {
		return err
	}
	next := 0
	if len(last) == 1 {
		if next, err = strconv.Atoi(string(last[0])); err != nil {
			return err
		}
		next++
	}
	for {
		n := 1 + rand.IntN(40)
		var c store.Change
		for i := range n {
			c.Audit = append(c.Audit, strconv.AppendInt(nil, int64(next+i), 10))
		}
		if n%5 == 0 {
			c.Policy = []byte(strconv.Itoa(next))
		}
		first, err := s.Commit(context.Background(), c)
		if err != nil {
			return err
		}
		if first != int64(next) {
			return fmt.Errorf("row %d, want %d", first, next)
		}
		next += n
		if _, err := fmt.Printf("%d %d\n", first, n); err != nil {
			return err
		}
	}
}

// TestKill kills a process that commits, at any moment, and again on the same
// file: what Commit had returned is there, and the store opens as if nothing
// had happened.
func TestKill(t *testing.T) {
	t.Parallel()
	path := t.TempDir() + "/store.db"
	for round := range 10 {
		returned := killed(t, path)
		s, err := store.OpenSQLite(t.Context(), path)
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		all := rows(t, s)
		for i, e := range all {
			if e != strconv.Itoa(i) {
				t.Fatalf("round %d: row %d is %q: a gap, or a row twice", round, i, e)
			}
		}
		if len(all) < returned {
			t.Errorf("round %d: %d rows; Commit had returned for %d", round, len(all), returned)
		}
		integrity(t, s)
		t.Logf("round %d: Commit had returned for %d rows, %d are there", round, returned, len(all))
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// killed runs commitForever for a while and returns the number of rows after
// the last commit that it told of.
func killed(t *testing.T, path string) int {
	t.Helper()
	c := exec.Command(os.Args[0])
	c.Env = append(os.Environ(), crashChild+"="+path)
	var stderr strings.Builder
	c.Stderr = &stderr
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(out)
	end := 0
	var kill *time.Timer
	for {
		line, err := lines.ReadString('\n')
		if err == io.EOF {
			break // what is cut off was not told
		}
		var first, n int
		if _, err := fmt.Sscanf(line, "%d %d\n", &first, &n); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		end = first + n
		if kill == nil { // it is at work now
			kill = time.AfterFunc(time.Duration(rand.IntN(60_000))*time.Microsecond, func() { c.Process.Kill() })
		}
	}
	err = c.Wait()
	if ws, ok := c.ProcessState.Sys().(syscall.WaitStatus); !ok || ws.Signal() != syscall.SIGKILL || end == 0 {
		t.Fatalf("the child ended by itself, after %d rows: %v\n%s", end, err, stderr.String())
	}
	return end
}

// BenchmarkCommit is the cost of a durable audit record: one commit of so many.
func BenchmarkCommit(b *testing.B) {
	entry := []byte(strings.Repeat("x", 600))
	for _, n := range []int{1, 32, 256} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			s := openSQLite(b, b.TempDir()+"/store.db")
			batch, answers := make([][]byte, n), make([][]byte, n)
			for i := range batch {
				batch[i], answers[i] = entry, entry[:96]
			}
			for b.Loop() {
				if _, err := s.Commit(b.Context(), store.Change{Audit: batch, Answers: answers}); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(n)*float64(b.N)/b.Elapsed().Seconds(), "rows/s")
		})
	}
}
