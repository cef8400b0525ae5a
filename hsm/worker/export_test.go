package worker

import (
	"testing"
	"time"
)

// SetReplacePause changes how old a worker is before it is replaced.
func SetReplacePause(t *testing.T, d time.Duration) {
	was := replacePause
	replacePause = d
	t.Cleanup(func() { replacePause = was })
}
