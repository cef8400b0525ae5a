//go:build !soak

package softhsm_test

import "time"

// loadFor is 0: each client of TestAgentLoad signs a few times. make soak goes on
// for a minute.
const loadFor time.Duration = 0
