package worker

import "time"

// Cause is why a worker ended.
type Cause string

const (
	CauseCrashed  Cause = "crash"   // it died, or talked nonsense
	CauseHung     Cause = "hang"    // the watchdog killed it
	CauseStalled  Cause = "stall"   // it was late, and others were not
	CauseLent     Cause = "lend"    // an act that writes needed its sessions
	CauseRecycled Cause = "recycle" // it was old, or had answered enough
	CauseToken    Cause = "token"   // its token did not work
	CauseDoubt    Cause = "doubt"   // it did not see what is registered
	CauseLogin    Cause = "login"   // its login was lost
	CauseStart    Cause = "start"   // it was to replace another one, and could not log in
	CauseClosed   Cause = "close"   // nobody needs it any more
)

// Causes is every Cause.
var Causes = []Cause{CauseCrashed, CauseHung, CauseStalled, CauseLent, CauseRecycled, CauseToken, CauseDoubt, CauseLogin, CauseStart, CauseClosed}

// Observer is told how long requests to sign take, and of the end of workers.
// Its methods return at once: the first is called with a lock held.
type Observer interface {
	// Answered tells how long a request waited for a worker that had room, and how
	// long it was with the worker that answered it, which has a short queue too.
	Answered(queued, worked time.Duration)
	// Ended tells of a worker that signed, or was to.
	Ended(why Cause)
}

func (t *Token) ended(why Cause) {
	if t.c.Observer != nil {
		t.c.Observer.Ended(why)
	}
}

// Stats is the state of a token at a moment.
type Stats struct {
	Workers  int // that take requests
	InFlight int // requests that they have
	Waiting  int // requests that wait for one with room
	Sessions int // the bound on signatures at the token at a time
	// Silent is for how long no worker that has requests has answered one, and Pace
	// what one of those takes, by estimate; of a token that has not signed yet, a
	// generous one.
	Silent, Pace time.Duration
	// Err says why no request can be answered now, as Sign would: nil where one can.
	Err error
}

// Stats is cheap enough for every second.
func (t *Token) Stats() Stats {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := Stats{Sessions: t.info.Sessions, Waiting: t.waiting.waiting, Err: t.unable()}
	for _, p := range t.live {
		s.InFlight += len(p.inFlight)
		if n := len(p.inFlight); n > 0 {
			if silent := time.Since(p.progress); s.Silent == 0 || silent < s.Silent {
				s.Silent, s.Pace = silent, t.pace(p)
			}
		}
		if !p.draining {
			s.Workers++
		}
	}
	return s
}
