//go:build soak

package softhsm_test

import "time"

// loadFor is how long TestAgentLoad goes on.
const loadFor = time.Minute
