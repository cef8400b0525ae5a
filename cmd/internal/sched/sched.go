// Package sched tells the kernel what kind of process this is.
package sched

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// Batch makes this process one of throughput (SCHED_BATCH, sched(7)), with the niceness
// that it has: where all CPUs work, its threads do not interrupt others when they wake, but
// take their share after them, and then find more to do at a time. Where a CPU is idle
// nothing changes. What this process starts inherits it.
//
// A gateway wakes for each message and each signature, and where it interrupted its
// workers for that, and they it, they would spend a tenth of their time on changing places
// (docs/PERFORMANCE.md).
//
// A process that has been given another policy than the default one keeps it.
func Batch() error {
	done := map[string]bool{}
	for { // until no thread has been started meanwhile by one that was not done
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return fmt.Errorf("listing our threads: %w", err)
		}
		fresh := false
		for _, task := range tasks {
			if done[task.Name()] {
				continue
			}
			done[task.Name()], fresh = true, true
			if err := batch(task.Name()); err != nil {
				return fmt.Errorf("SCHED_BATCH: %w", err)
			}
		}
		if !fresh {
			return nil
		}
	}
}

func batch(task string) error {
	tid, err := strconv.Atoi(task)
	if err != nil {
		return err
	}
	attr, err := unix.SchedGetAttr(tid, 0)
	switch {
	case errors.Is(err, unix.ESRCH):
		return nil // it has ended
	case err != nil || attr.Policy != unix.SCHED_NORMAL:
		return err
	}
	attr.Policy = unix.SCHED_BATCH
	err = unix.SchedSetAttr(tid, attr, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}
