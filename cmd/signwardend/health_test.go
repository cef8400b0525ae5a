package main

import (
	"errors"
	"fmt"
	"reflect"
	"testing"

	"github.com/signwarden/signwarden/gateway/metrics"
	"github.com/signwarden/signwarden/gateway/sigerr"
	"github.com/signwarden/signwarden/hsm"
	"github.com/signwarden/signwarden/hsm/fleet"
	"github.com/signwarden/signwarden/hsm/worker"
)

// A part and nothing of what it said: paths, labels and the store's words are not
// for everybody.
func TestLacks(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want string
	}{
		{nil, ""},
		{fmt.Errorf("%w: %w", errToken, &hsm.Error{Op: "/path/module.so", Class: hsm.ClassGone, Detail: "gone"}), "token"},
		{fmt.Errorf("%w: %w", errToken, errors.New("worker: no answer")), "token"},
		{fmt.Errorf("%w: %w", errToken, fmt.Errorf("label: %w", &hsm.Error{Op: "PIN", Class: hsm.ClassOperator, Detail: "/path/record"})), "pin"},
		{fmt.Errorf("%w: %w", errStore, fmt.Errorf("%w: /path/db is full", sigerr.Unavailable)), "store"},
	} {
		if got := lacks(tt.err); got != tt.want {
			t.Errorf("%v: %q, want %q", tt.err, got, tt.want)
		}
	}
}

// Every member has its state told, also one that was never open; and one that gets
// no requests is not up, though its workers are well.
func TestFleetStats(t *testing.T) {
	got := fleetStats([]fleet.Status{
		{Name: "a", State: fleet.Closed, Keys: 3, Opens: 1, Stats: worker.Stats{Workers: 2, InFlight: 1, Waiting: 5, Sessions: 4}},
		{Name: "well but open", State: fleet.Broken, Opens: 2, Other: 1, Stats: worker.Stats{Workers: 2, Sessions: 4}},
		{Name: "half", State: fleet.HalfOpen},
		{Name: "failing", State: fleet.Closed, Stats: worker.Stats{Err: errors.New("no worker")}},
		{Name: "never", State: fleet.Broken, Err: errors.New("not there")},
	})
	want := []metrics.TokenStats{
		{Name: "a", Workers: 2, InFlight: 1, Waiting: 5, Sessions: 4, Up: true, Several: &metrics.SeveralStats{Breaker: "closed", Keys: 3, Opens: 1}},
		{Name: "well but open", Workers: 2, Sessions: 4, Several: &metrics.SeveralStats{Breaker: "open", Opens: 2, Other: 1}},
		{Name: "half", Several: &metrics.SeveralStats{Breaker: "half-open"}},
		{Name: "failing", Up: false, Several: &metrics.SeveralStats{Breaker: "closed"}},
		{Name: "never", Several: &metrics.SeveralStats{Breaker: "open"}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}
