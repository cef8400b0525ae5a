//go:build !corpus

package softhsm_test

import "github.com/signwarden/signwarden/formats/hostiletest"

// hostileFiles is how many damaged files each of the four formats is tried with;
// `make corpus` and formats/... try more of them.
const hostileFiles = hostiletest.Mutations / 4
