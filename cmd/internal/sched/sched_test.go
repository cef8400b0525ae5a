package sched

import (
	"os"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// Every thread is of the policy, those that come later too, and keeps its niceness.
func TestBatch(t *testing.T) {
	if err := unix.Setpriority(unix.PRIO_PROCESS, 0, 7); err != nil {
		t.Fatal(err)
	}
	before, err := unix.SchedGetAttr(0, 0)
	if err != nil || before.Policy != unix.SCHED_NORMAL && before.Policy != unix.SCHED_BATCH {
		t.Fatalf("policy %v, %v", before, err)
	}
	for range 2 {
		if err := Batch(); err != nil {
			t.Fatal(err)
		}
	}
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil || len(tasks) == 0 {
		t.Fatalf("%d threads, %v", len(tasks), err)
	}
	nice := false
	for _, task := range tasks {
		tid, err := strconv.Atoi(task.Name())
		if err != nil {
			t.Fatal(err)
		}
		attr, err := unix.SchedGetAttr(tid, 0)
		if err != nil {
			continue // it has ended
		}
		if attr.Policy != unix.SCHED_BATCH {
			t.Errorf("thread %d has policy %d", tid, attr.Policy)
		}
		nice = nice || attr.Nice == 7
	}
	if !nice {
		t.Error("no thread has kept its niceness")
	}
}
