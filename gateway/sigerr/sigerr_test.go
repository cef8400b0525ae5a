package sigerr_test

import (
	"context"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"testing"

	"github.com/signwarden/signwarden/gateway/sigerr"
)

// A sentinel that somebody adds must be in Kinds, or every table that is
// checked against Kinds has a hole that no test sees.
func TestKindsHasEverySentinel(t *testing.T) {
	f, err := parser.ParseFile(token.NewFileSet(), "sigerr.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	declared := 0
	ast.Inspect(f, func(n ast.Node) bool {
		if _, ok := n.(*ast.FuncDecl); ok {
			return false
		}
		if v, ok := n.(*ast.ValueSpec); ok && ast.IsExported(v.Names[0].Name) {
			declared += len(v.Names)
		}
		return true
	})
	if got := len(sigerr.Kinds()); got != declared || got == 0 {
		t.Errorf("Kinds has %d errors; %d are declared", got, declared)
	}
	seen := map[error]bool{}
	texts := map[string]bool{}
	for _, k := range sigerr.Kinds() {
		if k == nil || seen[k] || texts[k.Error()] {
			t.Errorf("%v is nil, listed twice, or has another's text", k)
		}
		seen[k], texts[k.Error()] = true, true
	}
}

func TestKindsIsACopy(t *testing.T) {
	sigerr.Kinds()[0] = nil
	if sigerr.Kinds()[0] == nil {
		t.Error("a caller changed the table")
	}
}

func TestKind(t *testing.T) {
	for _, k := range sigerr.Kinds() {
		for name, err := range map[string]error{
			"itself":        k,
			"wrapped":       fmt.Errorf("key %q: %w", "a", k),
			"wrapped twice": fmt.Errorf("signing: %w", fmt.Errorf("key %q: %w", "a", k)),
			"joined":        errors.Join(errors.New("x"), fmt.Errorf("y: %w", k)),
			"two verbs":     fmt.Errorf("%w: %w", k, errors.New("x")),
		} {
			if got := sigerr.Kind(err); got != k {
				t.Errorf("%s %v: Kind = %v", name, k, got)
			}
		}
	}
	for _, err := range []error{nil, errors.New("denied by policy"), context.Canceled, context.DeadlineExceeded} {
		if got := sigerr.Kind(err); got != nil {
			t.Errorf("Kind(%v) = %v, want nil", err, got)
		}
	}
}

// Where an error wraps two, the earlier of Kinds is told, however they are
// wrapped: what a caller may not know comes before everything else.
func TestKindPrefers(t *testing.T) {
	kinds := sigerr.Kinds()
	if kinds[0] != sigerr.NotFound {
		t.Errorf("%v comes before NotFound", kinds[0])
	}
	for i, a := range kinds {
		for _, b := range kinds[i+1:] {
			for _, err := range []error{fmt.Errorf("%w: %w", a, b), fmt.Errorf("%w: %w", b, a), errors.Join(b, fmt.Errorf("x: %w", a))} {
				if got := sigerr.Kind(err); got != a {
					t.Errorf("Kind(%v) = %v, want %v", err, got, a)
				}
			}
		}
	}
}
