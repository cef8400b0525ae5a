package worker

import "time"

// A module has a picture of what its token holds, and some do not look again: of a SoftHSM
// whose files were put back, processes that run may go on without the keys, or with what
// was there meanwhile, while one that starts finds them. So where a worker says that there
// is no such key, or signs with another one, all are replaced. The key may indeed be gone,
// however often it is asked for: their successors are not before they are twice as old.
var minDoubt = 5 * time.Second

const (
	maxDoubt    = 2 * time.Minute
	forgetDoubt = 10 * time.Minute // after the last replacement the next one is a first
)

// Doubt says that what the token holds under an id is not what is registered. Workers are
// replaced, for their successors to look anew; called again and again, ever less often.
func (t *Token) Doubt([]byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.doubt()
}

// doubt is called with mu held.
func (t *Token) doubt() {
	now := time.Now()
	if now.Sub(t.doubted) > forgetDoubt {
		t.trusted = minDoubt
	}
	replaced := 0
	for _, p := range t.live {
		if p.draining || p.why != "" || now.Sub(p.born) < t.trusted {
			continue
		}
		p.replace(CauseToken)
		replaced++
	}
	if replaced > 0 {
		t.doubted, t.trusted = now, min(2*t.trusted, maxDoubt)
		t.log.Warn("the token does not hold what is registered, as its workers see it: new ones look again")
	}
}
