package worker

import "time"

// A module has a picture of what its token holds, and some do not look again: of a SoftHSM
// whose files were put back, processes that run may go on without the keys, or with what
// was there meanwhile, while one that starts finds them. So where a worker says that there
// is no such key, or signs with another one, all are replaced. The key may indeed be gone,
// however often it is asked for: the next time is minDoubt later, then twice that, up to
// maxDoubt; after forgetDoubt it is as the first.
const (
	minDoubt    = 5 * time.Second
	maxDoubt    = 2 * time.Minute
	forgetDoubt = 10 * time.Minute
)

// doubts says when workers were last replaced for that, and for how long they are not.
type doubts struct {
	last  time.Time
	pause time.Duration
}

// due says whether they are to be replaced now, and takes note that they are.
func (d *doubts) due(now time.Time) bool {
	since := now.Sub(d.last)
	if since < d.pause {
		return false
	}
	if d.pause = min(2*d.pause, maxDoubt); d.pause == 0 || since > forgetDoubt {
		d.pause = minDoubt
	}
	d.last = now
	return true
}

// Doubt says that what the token holds under an id is not what is registered. Workers are
// replaced, for their successors to look anew; called again and again, ever less often.
func (t *Token) Doubt([]byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.doubt()
}

// doubt is called with mu held.
func (t *Token) doubt() {
	if !t.doubts.due(time.Now()) {
		return
	}
	for _, p := range t.live {
		if !p.draining && p.why == "" {
			p.replace(CauseDoubt)
		}
	}
	t.log.Warn("the token does not hold what is registered, as its workers see it: new ones look again")
}
