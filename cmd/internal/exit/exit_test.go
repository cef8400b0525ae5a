package exit_test

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

func TestCode(t *testing.T) {
	for _, tt := range []struct {
		name string
		err  error
		want int
	}{
		{"none", nil, 0},
		{"plain", errors.New("x"), 1},
		{"usage", exit.UsageError("x"), 2},
		{"hinted usage", exit.Hint(exit.UsageError("x"), "y"), 2},
		{"denied", fmt.Errorf("a: %w", sigerr.Denied), 4},
		{"hinted kind", exit.Hint(fmt.Errorf("a: %w", sigerr.Unavailable), "y"), 5},
		{"code over kind", exit.WithCode(sigerr.Denied, exit.SomeOfSeveral), 6},
	} {
		if got := exit.Code(tt.err); got != tt.want {
			t.Errorf("%s: got %d, want %d", tt.name, got, tt.want)
		}
	}
	if exit.Hint(nil, "x") != nil || exit.WithCode(nil, 3) != nil {
		t.Error("no error became one")
	}
	for _, kind := range sigerr.Kinds() {
		if got := exit.Code(fmt.Errorf("a: %w", kind)); got < 1 || got > 5 {
			t.Errorf("%v: exit code %d", kind, got)
		}
	}
}

func TestPrint(t *testing.T) {
	var b bytes.Buffer
	exit.Print(&b, "prog", exit.Hint(errors.New("message"), "do %s", "this"))
	if got, want := b.String(), "prog: message\nhint: do this\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	b.Reset()
	exit.Print(&b, "prog", fmt.Errorf("signing: %w", sigerr.Denied))
	if !strings.Contains(b.String(), "\nhint: ") {
		t.Errorf("got %q, want the hint of its kind", b.String())
	}
}

// What a file is called, or holds, does not make lines of its own.
func TestLine(t *testing.T) {
	for s, want := range map[string]string{
		"": "", "plain.rpm": "plain.rpm", `with "quotes" \ and blanks`: `with "quotes" \ and blanks`, "Grüße 日本.rpm": "Grüße 日本.rpm",
		"a\nsigned b":       `a\nsigned b`,
		"\x1b[2Jclean":      `\x1b[2Jclean`,
		"not \xff UTF-8":    `not \xff UTF-8`,
		"right \u202e left": `right \u202e left`,
		"tab\tand \r":       `tab\tand \r`,
	} {
		if got := exit.Line(s); got != want {
			t.Errorf("%q: got %q, want %q", s, got, want)
		}
	}
	if exit.OneLine(nil) != nil {
		t.Error("no error became one")
	}
	var b bytes.Buffer
	exit.Print(&b, "prog", exit.OneLine(fmt.Errorf("a\nprog: b: %w", exit.Hint(sigerr.Denied, "c"))))
	if got, want := b.String(), "prog: a\\nprog: b: "+sigerr.Denied.Error()+"\nhint: c\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// What goes wrong before a command begins is usage; after, it is what it is.
func TestExecute(t *testing.T) {
	for _, tt := range []struct {
		args string
		want int
	}{{"run", 1}, {"run x", 2}, {"run --nope", 2}, {"nope", 2}, {"need", 2}, {"need --f x", 0}} {
		root := &cobra.Command{Use: "prog", SilenceErrors: true, SilenceUsage: true}
		need := &cobra.Command{Use: "need", RunE: func(*cobra.Command, []string) error { return nil }}
		need.Flags().String("f", "", "")
		exit.Require(need, "f")
		root.AddCommand(need, &cobra.Command{Use: "run", Args: cobra.NoArgs, RunE: func(*cobra.Command, []string) error { return errors.New("x") }})
		root.SetArgs(strings.Fields(tt.args))
		if got := exit.Code(exit.Execute(t.Context(), root)); got != tt.want {
			t.Errorf("%q: exit code %d, want %d", tt.args, got, tt.want)
		}
	}
}
