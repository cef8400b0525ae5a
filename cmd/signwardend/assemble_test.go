package main

import "testing"

func TestSplit(t *testing.T) {
	for _, k := range []struct{ workers, sessions, cpus, n, each int }{
		{0, 0, 4, 4, 1},
		{0, 2, 4, 2, 1},
		{0, 8, 4, 4, 2},
		{3, 0, 4, 3, 1},
		{2, 8, 4, 2, 4},
		{2, 5, 4, 2, 2}, // never more than 5 in all
		{1, 1, 4, 1, 1},
	} {
		if n, each := split(k.workers, k.sessions, k.cpus); n != k.n || each != k.each {
			t.Errorf("%d workers, %d sessions, %d CPUs: got %d of %d, want %d of %d", k.workers, k.sessions, k.cpus, n, each, k.n, k.each)
		}
	}
}
