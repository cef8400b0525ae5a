//go:build race

package hostiletest

const race = true
