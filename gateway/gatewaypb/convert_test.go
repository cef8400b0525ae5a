package gatewaypb_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	pb "github.com/signwarden/signwarden/gateway/gatewaypb"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

func TestStatusKeepsKind(t *testing.T) {
	seen := map[codes.Code]error{}
	for _, kind := range sigerr.Kinds() {
		s, known := pb.ToStatus(fmt.Errorf("%w: words", kind))
		if !known || s.Code() == codes.OK || s.Code() == codes.Unknown {
			t.Errorf("%v: status %v, known %v", kind, s, known)
		}
		if other := seen[s.Code()]; other != nil {
			t.Errorf("%v and %v are both %v", kind, other, s.Code())
		}
		seen[s.Code()] = kind
		got := pb.FromStatus(s)
		if sigerr.Kind(got) != kind || got.Error() != kind.Error()+": words" {
			t.Errorf("%v came back as %v of kind %v", kind, got, sigerr.Kind(got))
		}
		if has := len(s.Details()) > 0; has != (kind == sigerr.Overloaded) {
			t.Errorf("%v: details %v", kind, s.Details())
		}
	}
	s, known := pb.ToStatus(errors.New("slot 7"))
	if known || s.Code() != codes.Unknown || strings.Contains(s.Message(), "slot") {
		t.Errorf("an unknown error: status %v, known %v; want Unknown without its text", s, known)
	}
	if err := pb.FromStatus(s); sigerr.Kind(err) != nil {
		t.Errorf("an unknown error came back as %v", sigerr.Kind(err))
	}
}

type later struct{}

func (later) Error() string             { return sigerr.Overloaded.Error() + ": words" }
func (later) Unwrap() error             { return sigerr.Overloaded }
func (later) RetryAfter() time.Duration { return 90 * time.Second }

// An error that knows when to try again says so to the client.
func TestRetryAfter(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want time.Duration
	}{{later{}, 90 * time.Second}, {sigerr.Overloaded, pb.RetryDelay}, {sigerr.Denied, 0}} {
		s, _ := pb.ToStatus(fmt.Errorf("%w", tt.err))
		err := pb.FromStatus(s)
		r, ok := err.(interface{ RetryAfter() time.Duration })
		if !ok || r.RetryAfter() != tt.want {
			t.Errorf("%v: came back as %v, want to try again after %v", tt.err, err, tt.want)
		}
	}
}

func TestEnums(t *testing.T) {
	for name, h := range keys.Hashes {
		if got := pb.HashAlgorithmOf(h).Hash(); got != h {
			t.Errorf("%s came back as %v", name, got)
		}
	}
	for n := range pb.HashAlgorithm_name {
		if e := pb.HashAlgorithm(n); pb.HashAlgorithmOf(e.Hash()) != e {
			t.Errorf("%v came back as %v", e, pb.HashAlgorithmOf(e.Hash()))
		}
	}
	for n := range pb.SignatureScheme_name {
		if e := pb.SignatureScheme(n); pb.SignatureSchemeOf(e.Scheme()) != e {
			t.Errorf("%v came back as %v", e, pb.SignatureSchemeOf(e.Scheme()))
		}
	}
	for _, a := range keys.Algorithms {
		if s, err := keys.SchemeFor(a, pb.SignatureScheme(99).Scheme()); err == nil {
			t.Errorf("a scheme of a later version became %q for %s", s, a)
		}
	}
}
