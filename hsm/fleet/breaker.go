package fleet

import "time"

// State is that of a token's circuit breaker.
type State byte

const (
	Closed   State = iota // it works, and gets requests
	Broken                // it does not; it is probed when its pause is over
	HalfOpen              // it is being probed
)

func (s State) String() string { return [...]string{"closed", "open", "half-open"}[s] }

// A breaker keeps requests from a token that does not work. Its user guards it.
type breaker struct {
	state State
	opens int           // times that it went from closed to open
	pause time.Duration // before the next probe
}

func (b *breaker) works() bool { return b.state == Closed }

// open is for a token that has failed; it returns whether it had worked before.
func (b *breaker) open() (first bool) {
	switch b.state {
	case Closed:
		b.opens++
		b.pause = firstPause
	case HalfOpen:
		b.pause = min(2*b.pause, maxPause)
	default:
		return false
	}
	first = b.state == Closed
	b.state = Broken
	return first
}

// probe begins one, when the pause is over.
func (b *breaker) probe() { b.state = HalfOpen }

// close is for a token that works again.
func (b *breaker) close() { b.state, b.pause = Closed, firstPause }
