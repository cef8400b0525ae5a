package worker_test

import (
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/signwarden/signwarden/hsm/worker"
)

// seen is an observer that remembers.
type seen struct {
	mu       sync.Mutex
	answered int64
	negative int
	ended    map[worker.Cause]int
}

func (s *seen) Answered(queued, worked time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answered++
	if queued < 0 || worked <= 0 || worked > time.Minute {
		s.negative++
	}
}

func (s *seen) Ended(why worker.Cause) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended[why]++
}

func (s *seen) count(why worker.Cause) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ended[why]
}

// Each signature is told once, and each end with its cause.
func TestObserved(t *testing.T) {
	for _, tt := range []struct {
		cause worker.Cause
		do    func(t *testing.T, c worker.Config, tok *worker.Token)
	}{
		{worker.CauseCrashed, func(t *testing.T, _ worker.Config, tok *worker.Token) {
			syscall.Kill(tok.Workers()[0].PID, syscall.SIGSEGV)
		}},
		{worker.CauseHung, func(t *testing.T, _ worker.Config, tok *worker.Token) {
			syscall.Kill(tok.Workers()[0].PID, syscall.SIGSTOP)
		}},
		{worker.CauseToken, func(t *testing.T, c worker.Config, _ *worker.Token) { order(t, c, "Sign", "0x30") }},
		{worker.CauseLogin, func(t *testing.T, c worker.Config, _ *worker.Token) { order(t, c, "Sign", "0x101") }},
		{worker.CauseRecycled, nil},
	} {
		t.Run(string(tt.cause), func(t *testing.T) {
			worker.SetReplacePause(t, time.Millisecond)
			o := &seen{ended: map[worker.Cause]int{}}
			c, _ := recorded(t)
			c.CallTimeout, c.Observer = 500*time.Millisecond, o
			if tt.do == nil {
				c.RecycleOps = 100
			}
			tok, err := worker.Open(t.Context(), c)
			if err != nil {
				t.Fatal(err)
			}
			defer tok.Close()
			until(t, "all workers serve", func() bool { return tok.Stats().Workers == c.Workers })
			l := newLoad(t, tok, generate(t, tok, "k", "p256"), 8)
			l.wait(t, 50)
			if tt.do != nil {
				tt.do(t, c, tok)
			}
			until(t, "the end is told", func() bool { return o.count(tt.cause) > 0 })
			l.wait(t, 50)
			l.end()
			s := tok.Stats()
			if s.Err != nil || s.InFlight != 0 || s.Waiting != 0 || s.Sessions != c.Workers {
				t.Errorf("when nobody asks: %+v", s)
			}
			o.mu.Lock()
			defer o.mu.Unlock()
			for cause, n := range o.ended {
				if cause != tt.cause {
					t.Errorf("%d ends by %s", n, cause)
				}
			}
			if o.answered != l.signed.Load() || o.negative > 0 {
				t.Errorf("%d signatures told, of %d; %d with times that cannot be", o.answered, l.signed.Load(), o.negative)
			}
		})
	}
}
