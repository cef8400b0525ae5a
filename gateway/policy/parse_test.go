package policy_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/signwarden/signwarden/gateway/policy"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// parse is Parse of a policy that must be right.
func parse(t testing.TB, source string) *policy.Rules {
	t.Helper()
	r, err := policy.Parse([]byte(source))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// rule is a policy of one rule r1 that allows everything but for the fields
// given, each "name: value" or "-name" to leave one out.
func rule(fields ...string) string {
	all := map[string]string{
		"name": "r1", "principals": "[p]", "keys": "[k]", "may": "[sign]", "formats": `["*"]`,
	}
	order := []string{"name", "principals", "keys", "may", "formats"}
	for _, f := range fields {
		name, value, ok := strings.Cut(f, ": ")
		if !ok {
			delete(all, strings.TrimPrefix(f, "-"))
			continue
		}
		if _, had := all[name]; !had {
			order = append(order, name)
		}
		all[name] = value
	}
	var b strings.Builder
	b.WriteString("rules:\n  -\n")
	for _, name := range order {
		if v, ok := all[name]; ok {
			fmt.Fprintf(&b, "    %s: %s\n", name, v)
		}
	}
	return b.String()
}

func TestParseErrors(t *testing.T) {
	read := []string{"may: [read]", "-formats"}
	tests := []struct {
		name, source string
		want         []string // parts of the error
	}{
		{"no name", rule("-name"), []string{"rule 1", "name:"}},
		{"bad name", rule(`name: "-x"`), []string{"rule 1", `"-x"`, "name:"}},
		{"name with a newline", rule(`name: "a\n"`), []string{"rule 1", "name:"}},
		{"long name", rule("name: " + strings.Repeat("a", 65)), []string{"rule 1", "name:"}},
		{"no principals", rule("-principals"), []string{`rule 1 ("r1")`, "principals:"}},
		{"empty principals", rule("principals: []"), []string{`"r1"`, "principals:"}},
		{"empty principal", rule(`principals: [p, ""]`), []string{`"r1"`, "principals:", "empty"}},
		{"bad principal glob", rule(`principals: ["a[b"]`), []string{`"r1"`, "principals:", `"a[b"`}},
		{"bad glob after a star", rule(`principals: ["x*["]`), []string{`"r1"`, "principals:"}},
		{"glob ends in a backslash", rule(`principals: ['a\']`), []string{`"r1"`, "principals:"}},
		{"slash in brackets", rule(`principals: ["spiffe:[/]x"]`), []string{`"r1"`, "principals:"}},
		{"escaped slash", rule(`principals: ['a\/b']`), []string{`"r1"`, "principals:"}},
		{"no keys", rule("-keys"), []string{`"r1"`, "keys:"}},
		{"bad key glob", rule(`keys: ["[]"]`), []string{`"r1"`, "keys:", `"[]"`}},
		{"no action", rule("-may", "-formats"), []string{`"r1"`, "may:"}},
		{"unknown action", rule("may: [sing]"), []string{`"r1"`, "may:", `"sing"`}},
		{"sign without formats", rule("-formats"), []string{`"r1"`, "formats:", "openpgp"}},
		{"unknown format", rule("formats: [rpms]"), []string{`"r1"`, "formats:", `"rpms"`}},
		{"weak hash", rule("hashes: [sha1]"), []string{`"r1"`, "hashes:", `"sha1"`}},
		{"formats without sign", rule("may: [read]"), []string{`"r1"`, "formats", "may: [sign]"}},
		{"blind without sign", rule(append(read, "blind: true")...), []string{`"r1"`, "blind", "may: [sign]"}},
		{"hashes without sign", rule(append(read, "hashes: [sha256]")...), []string{`"r1"`, "hashes", "may: [sign]"}},
		{"rate without sign", rule(append(read, "rate: 1/s")...), []string{`"r1"`, "rate", "may: [sign]"}},
		{"content without sign", rule(append(read, "content: rpm")...), []string{`"r1"`, "content", "may: [sign]"}},
		{"packages without sign", rule(append(read, "packages: {names: [a]}")...), []string{`"r1"`, "packages", "may: [sign]"}},
		{"packages without content", rule("packages: {names: [a]}"), []string{`"r1"`, "packages:", "content: rpm"}},
		{"empty list without content", rule("packages: {names: []}"), []string{`"r1"`, "packages:", "content: rpm"}},
		{"content that nobody reads", rule("content: kmod", "formats: [kmod]"), []string{`"r1"`, "content:", `"kmod"`, "rpm"}},
		{"content and blind", rule("content: rpm", "formats: [rpm]", "blind: true"), []string{`"r1"`, "blind:", "content"}},
		{"content and all formats", rule("content: rpm"), []string{`"r1"`, "formats:", "[rpm]"}},
		{"content and other formats", rule("content: rpm", "formats: [rpm, kmod]"), []string{`"r1"`, "formats:", "[rpm]"}},
		{"package part unknown", rule("content: rpm", "formats: [rpm]", "packages: {name: [a]}"), []string{`unknown field "name"`}},
		{"package list empty", rule("content: rpm", "formats: [rpm]", "packages: {arches: []}"), []string{`"r1"`, "packages.arches:"}},
		{"package glob", rule("content: rpm", "formats: [rpm]", `packages: {vendors: ["a[b"]}`), []string{`"r1"`, "packages.vendors:", `"a[b"`}},
		{"package epoch no text", rule("content: rpm", "formats: [rpm]", "packages: {epochs: [1]}"), []string{`"1"`, "quotes"}},
		{"packages of ssh-sig", rule("content: ssh-sig", "formats: [ssh-sig]", "packages: {names: [a]}"), []string{`"r1"`, "packages:", "content: rpm"}},
		{"namespaces without sign", rule(append(read, "namespaces: [git]")...), []string{`"r1"`, "namespaces", "may: [sign]"}},
		{"namespaces of all formats", rule("namespaces: [git]"), []string{`"r1"`, "formats:", "[ssh-sig]"}},
		{"namespaces of other formats", rule("namespaces: [git]", "formats: [ssh-sig, rpm]"), []string{`"r1"`, "formats:", "[ssh-sig]"}},
		{"namespaces and blind", rule("namespaces: [git]", "formats: [ssh-sig]", "blind: true"), []string{`"r1"`, "blind:", "namespaces"}},
		{"namespaces of packages", rule("content: rpm", "formats: [rpm]", "namespaces: [git]"), []string{`"r1"`, "namespaces:", "content: rpm"}},
		{"namespaces empty", rule("formats: [ssh-sig]", "namespaces: []"), []string{`"r1"`, "namespaces:"}},
		{"namespace glob", rule("formats: [ssh-sig]", `namespaces: ["a[b"]`), []string{`"r1"`, "namespaces:", `"a[b"`}},
		{"date only", rule("not_before: 2027-01-31"), []string{`"r1"`, "not_before:", `"2027-01-31"`}},
		{"no time", rule("not_after: tomorrow"), []string{`"r1"`, "not_after:", `"tomorrow"`}},
		{"times reversed", rule("not_before: 2027-01-02T00:00:00Z", "not_after: 2027-01-01T00:00:00Z"), []string{`"r1"`, "not_after", "not_before"}},
		{"weight without sign", rule(append(read, "weight: 2")...), []string{`"r1"`, "weight", "may: [sign]"}},
		{"no weight", rule("weight: 0"), []string{`"r1"`, "weight: 0 is not 1 to 100"}},
		{"negative weight", rule("weight: -1"), []string{`"r1"`, "weight: -1"}},
		{"octal weight", rule("weight: 010"), []string{"line 8", `"010"`}},
		{"fraction of a weight", rule("weight: 1.5"), []string{"line 8", `"1.5"`}},
		{"too heavy", rule("weight: 101"), []string{`"r1"`, "weight: 101"}},
		{"rate of none", rule("rate: 0/s"), []string{`"r1"`, "rate:", `"0/s"`}},
		{"negative rate", rule("rate: -1/s"), []string{`"r1"`, "rate:"}},
		{"signed rate", rule("rate: +1/s"), []string{`"r1"`, "rate:"}},
		{"rate per day", rule("rate: 1/d"), []string{`"r1"`, "rate:"}},
		{"rate without period", rule(`rate: "5"`), []string{`"r1"`, "rate:"}},
		{"huge rate", rule("rate: 1000000001/s"), []string{`"r1"`, "rate:"}},
		{"duplicate names", "rules:\n" + line("r1") + line("r2") + line("r1"), []string{"rule 3", `"r1"`, "taken"}},

		{"unknown field in a rule", rule("principal: [p]"), []string{"[8:5]", `unknown field "principal"`}},
		{"unknown field at the top", "rules: []\nrulez: []\n", []string{"[2:1]", `unknown field "rulez"`}},
		{"field twice", "rules: []\nrules: []\n", []string{"[2:1]", "already defined"}},
		{"no mapping", "- a\n", []string{"[1:1]"}},
		{"rules no list", "rules: a\n", []string{"[1:8]"}},
		{"a rule that is a word", "rules: [a]\n", []string{"[1:9]"}},
		{"a word for a list", rule("principals: p"), []string{"[4:17]"}},
		{"a word for a bool", rule("blind: yes"), []string{"[8:12]"}},
		{"tab", "rules:\n\t- a: b\n", []string{"[2:1]"}},
		{"second document", "rules: []\n---\nrules: []\n", []string{"line 2", "second YAML document"}},
		{"second document after an empty first", "---\n---\n" + rule(), []string{"line 2", "second YAML document"}},
		{"second document after a stop", "rules: []\n...\n" + rule(), []string{"line 2", "second YAML document"}},
		{"second empty document", "rules: []\n---\n", []string{"line 2", "second YAML document"}},
		{"over size", strings.Repeat("#", policy.MaxSource+1), []string{"524289 bytes", "524288"}},
		{"too many rules", "rules:\n" + strings.Repeat("- {name: r}\n", policy.MaxRules+1), []string{"10001 rules", "10000"}},

		// What would be read otherwise than it looks.
		{"number for a key", rule("keys: [1.10]"), []string{"line 5", `"1.10"`, "quotes"}},
		{"octal for a key", rule("keys: [007]"), []string{"line 5", `"007"`, "quotes"}},
		{"number for a name", rule("name: 12"), []string{"line 3", `"12"`, "quotes"}},
		{"not_after left empty", rule("not_after: "), []string{"line 8", `"not_after"`, "no value"}},
		{"not_after null", rule("not_after: null"), []string{"line 8", `"null"`}},
		{"empty in braces", "rules: [{name: a, not_after: }]", []string{"line 1", `"not_after"`, "no value"}},
		{"empty before another", rule("hashes: ", "rate: 1/s"), []string{"line 8", `"hashes"`, "no value"}},
		{"empty before the next rule", "rules:\n- name: a\n  not_after:\n- name: b\n", []string{"line 3", `"not_after"`, "no value"}},
		{"anchor", rule("principals: &a [p]"), []string{"line 4", "anchors"}},
		{"alias", rule("principals: *a"), []string{"line 4", "aliases"}},
		{"merge", rule("<<: {a: b}"), []string{"line 8", "<<"}},
		{"tag", rule("name: !!str a"), []string{"line 3", "tags"}},
		{"explicit key", "? rules\n: []\n", []string{"line 1", "?"}},
		{"directive", "%YAML 1.2\n---\nrules: []\n", []string{"line 1", "%"}},
		{"deep brackets", strings.Repeat("[", 100_000), []string{"line 1", "levels"}},
		{"deep dashes", strings.Repeat("- ", 100_000), []string{"line 1", "levels"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r, err := policy.Parse([]byte(tt.source))
			if r != nil || !errors.Is(err, sigerr.Invalid) {
				t.Fatalf("Parse = %v, %v; want an error that is Invalid", r, err)
			}
			for _, w := range tt.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("the error does not say %q:\n%v", w, err)
				}
			}
		})
	}
}

func line(name string) string {
	return fmt.Sprintf("- {name: %s, principals: [p], keys: [k], may: [read]}\n", name)
}

// A file of one long line must not come back whole in the error.
func TestParseErrorIsBounded(t *testing.T) {
	for _, source := range []string{
		"rules: " + strings.Repeat("x", 200_000),
		strings.Repeat("x", 200_000) + ": a",
		strings.Repeat(`"`, 10_000),
		"rules: [{name: " + strings.Repeat("x", 200_000) + ", " + strings.Repeat("y", 200_000) + ": [x]}]",
	} {
		_, err := policy.Parse([]byte(source))
		if err == nil {
			t.Errorf("%.20q parses", source)
		} else if n := len(err.Error()); n > 2000 {
			t.Errorf("%.20q gives an error of %d bytes", source, n)
		}
	}
}

// Aliases multiply: nine of nine, eleven times over, is what this would hold.
func TestParseAliasBomb(t *testing.T) {
	var b strings.Builder
	b.WriteString("rules:\n - name: a\n   principals:\n   - &a0 [x,x,x,x,x,x,x,x,x]\n")
	for i := 1; i < 12; i++ {
		fmt.Fprintf(&b, "   - &a%d [%s*a%d]\n", i, strings.Repeat(fmt.Sprintf("*a%d,", i-1), 8), i-1)
	}
	start := time.Now()
	if _, err := policy.Parse([]byte(b.String())); !errors.Is(err, sigerr.Invalid) {
		t.Fatalf("error %v, want Invalid", err)
	}
	if d := time.Since(start); d > time.Second {
		t.Errorf("took %v", d)
	}
}

func TestParseAccepts(t *testing.T) {
	tests := []struct {
		name, source string
		rules        int
	}{
		{"nothing", "", 0},
		{"a comment", "# nothing yet\n", 0},
		{"an empty document", "---\n", 0},
		{"rules without a value", "rules:\n", 0},
		{"no rules", "rules: []\n", 0},
		{"start and stop", "# c\n---\nrules: []\n...\n# c\n", 0},
		{"carriage returns", strings.ReplaceAll(rule(), "\n", "\r\n"), 1},
		{"every field", rule(`principals: ["spiffe://td/ci/*", bob]`, "may: [sign, read, admin]", "formats: [rpm, kmod]",
			"blind: true", "hashes: [sha256, sha512]", "not_before: 2026-01-01T00:00:00Z",
			"not_after: 2027-01-01T00:00:00+02:00", "rate: 100/s"), 1},
		{"content", rule("content: rpm", "formats: [rpm]", `packages: {names: ["kernel*", bash], epochs: ["0"], versions: ["*"], releases: ["*.el9"], arches: [x86_64], vendors: ["Example*"]}`), 1},
		{"content of any package", rule("content: rpm", "formats: [rpm]"), 1},
		{"lists by dashes, at their key's column", "rules:\n- name: a\n  principals:\n  - p # who\n\n  - q\n  keys:\n    - k\n  may: [read]\n", 1},
		{"a number in quotes", rule(`keys: ["1.10"]`), 1},
		{"not_after equals not_before", rule("not_before: 2027-01-01T00:00:00Z", "not_after: 2027-01-01T00:00:00Z"), 1},
		{"flow form", `{rules: [{name: a, principals: [p], keys: [k], may: [read]}]}`, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := parse(t, tt.source).Len(); got != tt.rules {
				t.Errorf("%d rules, want %d", got, tt.rules)
			}
		})
	}
}

func TestRate(t *testing.T) {
	for s, want := range map[string]policy.Rate{
		"1/s":    {Count: 1, Per: time.Second},
		"60/m":   {Count: 60, Per: time.Minute},
		"5000/h": {Count: 5000, Per: time.Hour},
	} {
		d := parse(t, rule("rate: "+s)).Allow(policy.Query{Principal: "p", Key: "k", Action: policy.Sign, Format: "rpm"})
		if !d.Allowed || d.Rate != want {
			t.Errorf("rate %s: got %+v, want %+v", s, d, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	seeds := []string{
		"", "rules: []\n---\n", rule(), rule("not_after: "), rule("keys: [1.10]"), rule(`principals: ["a[^b-c]\\*?"]`),
		rule("content: rpm", "formats: [rpm]", "packages: {names: [a, 'b*'], vendors: ['*']}"),
		rule("hashes: [sha256]", "blind: true", "rate: 5/s", "not_before: 2027-01-01T00:00:00Z"),
		"rules:\n - {name: a, <<: {principals: &x [p]}, keys: *x}", "? a\n: |\n  b\n", "rules: >-\n  x\n\"", "\xff\xfe\x00",
	}
	for _, s := range seeds {
		f.Add([]byte(s), "spiffe://td/x", "k-1")
	}
	f.Fuzz(func(t *testing.T, source []byte, principal, key string) {
		r, err := policy.Parse(source)
		if err != nil {
			if r != nil || !errors.Is(err, sigerr.Invalid) {
				t.Fatalf("Parse = %v, %v", r, err)
			}
			return
		}
		for _, a := range []policy.Action{policy.Sign, policy.Read, policy.Admin, ""} {
			q := policy.Query{Principal: principal, Key: key, Action: a, Format: "rpm", Hash: "sha256", Now: time.Unix(1.8e9, 0)}
			d := r.Allow(q)
			if d.Allowed != (d.Rule != "") || d.Allowed != (d.Reason == "") {
				t.Fatalf("Allow(%+v) = %+v", q, d)
			}
			if d.Allowed && !r.Sees(principal, key, q.Now) {
				t.Fatalf("%+v is allowed and not seen", q)
			}
		}
		if n := len(r.Explain(policy.Query{Principal: principal, Key: key})); n != r.Len() {
			t.Fatalf("Explain has %d lines for %d rules", n, r.Len())
		}
	})
}

// The weight is that of the rule that allows it, and 1 where it has none.
func TestWeight(t *testing.T) {
	for source, want := range map[string]int{rule("blind: true"): 1, rule("weight: 1"): 1, rule("weight: 100", "rate: 1/s"): 100} {
		d := parse(t, source).Allow(policy.Query{Principal: "p", Key: "k", Action: policy.Sign, Format: "rpm"})
		if !d.Allowed || d.Weight != want {
			t.Errorf("%s: %+v, want weight %d", source, d, want)
		}
	}
}
