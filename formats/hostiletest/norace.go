//go:build !race

package hostiletest

const race = false
