package worker

import "runtime"

// A thread runs functions on one OS thread that lives until end. Children are
// to die with their parent (PR_SET_PDEATHSIG), but what the kernel calls the
// parent is the thread that forked: were it to end, they would die with it.
type thread struct {
	work chan func()
	done chan struct{}
}

func newThread() *thread {
	t := &thread{work: make(chan func()), done: make(chan struct{})}
	go func() {
		defer close(t.done)
		runtime.LockOSThread()
		for f := range t.work {
			f()
		}
		runtime.UnlockOSThread() // it has no children any more, and may go on
	}()
	return t
}

// run returns when f has.
func (t *thread) run(f func()) {
	ran := make(chan struct{})
	t.work <- func() { defer close(ran); f() }
	<-ran
}

func (t *thread) end() {
	close(t.work)
	<-t.done
}
