package policy_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/signwarden/signwarden/gateway/policy"
)

var epoch = time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)

// ruleOf is a rule as the matrix test makes it: the source is written from it,
// and the oracle reads it, so neither learns anything from the package.
type ruleOf struct {
	principals, keys, may, formats, hashes []string
	blind                                  bool
	content                                bool                // content: rpm, and formats: [rpm]
	packages                               map[string][]string // by field
	namespaces                             []string            // with formats: [ssh-sig]
	from, until                            int                 // hours after epoch; 0: unbounded
}

func (r ruleOf) yaml(name string) string {
	list := func(field string, words []string) string {
		if len(words) == 0 {
			return ""
		}
		return fmt.Sprintf("  %s: ['%s']\n", field, strings.Join(words, "', '"))
	}
	s := "- name: " + name + "\n" + list("principals", r.principals) + list("keys", r.keys) + list("may", r.may)
	if slices.Contains(r.may, "sign") {
		s += list("formats", r.formats) + list("hashes", r.hashes) + list("namespaces", r.namespaces) + fmt.Sprintf("  blind: %v\n", r.blind)
		if r.content {
			s += "  content: rpm\n  packages:\n"
			for _, f := range slices.Sorted(maps.Keys(r.packages)) {
				s += "  " + list(f, r.packages[f])
			}
			if len(r.packages) == 0 {
				s = strings.TrimSuffix(s, "  packages:\n")
			}
		}
	}
	if r.from != 0 {
		s += "  not_before: " + epoch.Add(time.Duration(r.from)*time.Hour).Format(time.RFC3339) + "\n"
	}
	if r.until != 0 {
		s += "  not_after: " + epoch.Add(time.Duration(r.until)*time.Hour).Format(time.RFC3339) + "\n"
	}
	return s
}

// The oracle: what the documentation of Rule says, by regular expressions and
// whole hours, and nothing of the package's own.
func (r ruleOf) named(who, key string) bool { return hits(r.principals, who) && hits(r.keys, key) }

func (r ruleOf) inTime(hour int) bool {
	return (r.from == 0 || hour >= r.from) && (r.until == 0 || hour <= r.until)
}

func (r ruleOf) allows(who, key, action, format, hash string, blind bool, p *policy.Package, namespace string, hour int) bool {
	if !r.named(who, key) || !r.inTime(hour) || !slices.Contains(r.may, action) {
		return false
	}
	if action != "sign" {
		return true
	}
	if r.content && (blind || p == nil) {
		return false
	}
	for field, globs := range r.packages {
		value := map[string]string{"names": p.Name, "epochs": p.Epoch, "versions": p.Version,
			"releases": p.Release, "arches": p.Arch, "vendors": p.Vendor}[field]
		if field == "epochs" && value == "" {
			value = "0"
		}
		if !hits(globs, value) {
			return false
		}
	}
	if r.namespaces != nil && (blind || !hits(r.namespaces, namespace)) {
		return false
	}
	return r.allowsFormat(format) && (len(r.hashes) == 0 || slices.Contains(r.hashes, hash)) && (r.blind || !blind)
}

func (r ruleOf) allowsFormat(f string) bool {
	return slices.Contains(r.formats, f) || slices.Contains(r.formats, "*") && f != "ssh-auth"
}

var compiled = map[string]*regexp.Regexp{}

func hits(globs []string, name string) bool {
	return name != "" && slices.ContainsFunc(globs, func(g string) bool {
		re := compiled[g]
		if re == nil {
			s := regexp.QuoteMeta(g)
			s = strings.ReplaceAll(s, `\*`, `[^/]*`)
			s = strings.ReplaceAll(s, `\?`, `[^/]`)
			s = strings.ReplaceAll(s, `\[\^a\]`, `[^a/]`)
			s = strings.ReplaceAll(s, `\[ab\]`, `[ab]`)
			re = regexp.MustCompile(`(?s)^` + s + `$`)
			compiled[g] = re
		}
		return re.MatchString(name)
	})
}

// TestMatrix asks tens of thousands of generated questions of generated rules
// and of the oracle above.
func TestMatrix(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	some := func(words ...string) []string {
		rnd.Shuffle(len(words), func(i, j int) { words[i], words[j] = words[j], words[i] })
		return slices.Clone(words[:1+rnd.IntN(min(3, len(words)))])
	}
	whos := []string{"alice", "bob", "a", "spiffe://td/ci/build", "spiffe://td/ci", "spiffe://td/ci/build/x", "spiffe://other/ci/build", ""}
	names := []string{"alpha", "rel-1", "rel-2", "rel-10", "b", ""}
	hours := []int{-1, 0, 4, 5, 6, 9, 10, 11}
	asked, allowed := 0, 0
	for asked < 25_000 {
		var rules []ruleOf
		source := "rules:\n"
		for i := range rnd.IntN(5) {
			r := ruleOf{
				principals: some("alice", "bob", "*", "?", "[ab]*", "spiffe://td/ci/*", "spiffe://td/*", "spiffe://*/ci/build", "spiffe://td/ci/build", "*[^a]*[^a]*[^a]*", "s*:*"),
				keys:       some("*", "rel-?", "rel-*", "alpha", "[ab]", "[ab]*", "rel-[^a]", "rel-1"),
				may:        some("sign", "read", "admin"),
				formats:    some("*", "rpm", "kmod", "ssh-sig", "ssh-auth"),
				blind:      rnd.IntN(2) == 0,
			}
			if slices.Contains(r.may, "sign") && rnd.IntN(3) == 0 {
				r.content, r.blind, r.formats, r.packages = true, false, []string{"rpm"}, map[string][]string{}
				for _, f := range []string{"names", "epochs", "versions", "releases", "arches", "vendors"} {
					if rnd.IntN(3) == 0 {
						r.packages[f] = some("*", "alpha", "rel-*", "[ab]*", "?", "0", "b")
					}
				}
			}
			if slices.Contains(r.may, "sign") && !r.content && rnd.IntN(3) == 0 {
				r.blind, r.formats, r.namespaces = false, []string{"ssh-sig"}, some("git", "file", "*", "g*", "[ab]*", "*/x")
			}
			if rnd.IntN(2) == 0 {
				r.hashes = some("sha256", "sha384", "sha512")
			}
			if rnd.IntN(3) == 0 {
				r.from = 5
			}
			if rnd.IntN(3) == 0 {
				r.until = 10
			}
			rules = append(rules, r)
			source += r.yaml(fmt.Sprintf("r%d", i))
		}
		set := parse(t, source)
		for range 400 {
			asked++
			who, key := whos[rnd.IntN(len(whos))], names[rnd.IntN(len(names))]
			action := []string{"sign", "sign", "read", "admin", "erase"}[rnd.IntN(5)]
			format, hash := []string{"rpm", "kmod", "ima", "ssh-sig", "ssh-auth", ""}[rnd.IntN(6)], []string{"sha256", "sha512", ""}[rnd.IntN(3)]
			blind, hour := rnd.IntN(2) == 0, hours[rnd.IntN(len(hours))]
			q := policy.Query{Principal: who, Key: key, Action: policy.Action(action), Format: format, Hash: hash,
				Blind: blind, Now: epoch.Add(time.Duration(hour) * time.Hour)}
			var pkg *policy.Package
			if format == "rpm" && !blind {
				part := func() string { return []string{"alpha", "rel-1", "b", "a/b", "0", ""}[rnd.IntN(6)] }
				pkg = &policy.Package{Name: part(), Epoch: part(), Version: part(), Release: part(), Arch: part(), Vendor: part()}
				q.Content = &policy.Content{Package: pkg}
			}
			namespace := ""
			if format == "ssh-sig" && !blind {
				namespace = []string{"git", "file", "a", "a/x", "other"}[rnd.IntN(5)]
				q.Content = &policy.Content{Namespace: namespace}
			}
			if format == "ssh-auth" && !blind {
				q.Content = &policy.Content{User: "root"}
			}
			by := slices.IndexFunc(rules, func(r ruleOf) bool { return r.allows(who, key, action, format, hash, blind, pkg, namespace, hour) })
			var reads []string
			for _, f := range []string{"rpm", "ssh-sig", "ssh-auth"} {
				if slices.ContainsFunc(rules, func(r ruleOf) bool {
					return r.named(who, key) && r.inTime(hour) && slices.Contains(r.may, "sign") && !r.blind && r.allowsFormat(f)
				}) {
					reads = append(reads, f)
				}
			}
			slices.Sort(reads)
			sees := slices.ContainsFunc(rules, func(r ruleOf) bool { return r.named(who, key) && r.inTime(hour) })
			signs := slices.ContainsFunc(rules, func(r ruleOf) bool {
				return r.named(who, key) && r.inTime(hour) && slices.Contains(r.may, "sign")
			})
			d := set.Allow(q)
			if d.Allowed != (by >= 0) || by >= 0 && d.Rule != fmt.Sprintf("r%d", by) || d.Allowed != (d.Reason == "") {
				t.Fatalf("Allow(%+v) = %+v; the oracle says rule %d of\n%s", q, d, by, source)
			}
			if got := set.Sees(who, key, q.Now); got != sees || d.Allowed && !got {
				t.Fatalf("Sees(%+v) = %v; the oracle says %v, Allow %v, of\n%s", q, got, sees, d.Allowed, source)
			}
			if got := set.MaySignSome(who, key, q.Now); got != signs || d.Allowed && action == "sign" && !got {
				t.Fatalf("MaySignSome(%+v) = %v; the oracle says %v, Allow %v, of\n%s", q, got, signs, d.Allowed, source)
			}
			if got := slices.Sorted(slices.Values(set.Reads(who, key, q.Now))); !slices.Equal(got, reads) {
				t.Fatalf("Reads(%+v) = %v; the oracle says %v, of\n%s", q, got, reads, source)
			}
			if set.MayAdministerAll(who, q.Now).Allowed && key != "" {
				q.Action = policy.Admin
				if !set.Allow(q).Allowed {
					t.Fatalf("%q administers all, and not %q, by\n%s", who, key, source)
				}
			}
			if d.Allowed {
				allowed++
			}
		}
	}
	t.Logf("%d questions, %d allowed", asked, allowed)
	if allowed < asked/50 || allowed > asked/2 {
		t.Errorf("%d of %d allowed: the rules that are made try too little", allowed, asked)
	}
}

func TestZeroRulesDeny(t *testing.T) {
	var r policy.Rules
	for _, a := range []policy.Action{policy.Sign, policy.Read, policy.Admin, ""} {
		d := r.Allow(policy.Query{Principal: "root", Key: "k", Action: a, Format: "rpm", Hash: "sha256", Now: epoch})
		if d.Allowed || d.Reason == "" {
			t.Errorf("Allow %q = %+v, want a denial with a reason", a, d)
		}
	}
	if r.Sees("root", "k", epoch) || r.MaySignSome("root", "k", epoch) || r.MayAdministerAll("root", epoch).Allowed {
		t.Error("no rules give something")
	}
	if r.Len() != 0 || len(r.Explain(policy.Query{})) != 0 {
		t.Error("no rules have a length")
	}
}

// What a rule with content says to a package, part by part.
func TestPackages(t *testing.T) {
	good := policy.Package{Name: "kernel-core", Version: "6.1", Release: "3.el9", Arch: "x86_64", Vendor: "Example"}
	q := policy.Query{Principal: "p", Key: "k", Action: policy.Sign, Format: "rpm", Hash: "sha256"}
	r := parse(t, rule("content: rpm", "formats: [rpm]", `packages: {names: [bash, "kernel*"], epochs: ["0"], versions: ["6.?"], releases: ["*.el9"], arches: [x86_64, noarch], vendors: [Example]}`))
	tests := []struct {
		name   string
		change func(*policy.Package)
		reason string
	}{
		{"as it is to be", func(*policy.Package) {}, ""},
		{"name", func(p *policy.Package) { p.Name = "kerne" }, `its names are bash, kernel*, not "kerne"`},
		{"a slash in the name", func(p *policy.Package) { p.Name = "kernel/x" }, `names`},
		{"epoch", func(p *policy.Package) { p.Epoch = "1" }, `its epochs are 0, not "1"`},
		{"version", func(p *policy.Package) { p.Version = "6.10" }, "versions"},
		{"release", func(p *policy.Package) { p.Release = "3.el8" }, "releases"},
		{"architecture", func(p *policy.Package) { p.Arch = "src" }, "arches"},
		{"vendor", func(p *policy.Package) { p.Vendor = "example" }, "vendors"},
		{"no vendor", func(p *policy.Package) { p.Vendor = "" }, "vendors"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := good
			tt.change(&p)
			q.Content = &policy.Content{Package: &p}
			d := r.Allow(q)
			if d.Allowed != (tt.reason == "") || !strings.Contains(d.Reason, tt.reason) {
				t.Errorf("%v: %+v; want a reason with %q", &p, d, tt.reason)
			}
		})
	}
	q.Content, q.Blind = &policy.Content{Package: &good}, true
	if d := r.Allow(q); d.Allowed {
		t.Errorf("a bare digest that comes with a package: %+v", d)
	}
	if got, want := (&policy.Package{Name: "a", Epoch: "0", Version: "1", Release: "2", Arch: "src"}).String(), "a-0:1-2.src"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// What rules say to signatures and logins of SSH.
func TestSSH(t *testing.T) {
	const source = `
rules:
  - {name: git, principals: [git], keys: [k], may: [sign], formats: [ssh-sig], namespaces: [git, "file*"]}
  - {name: any, principals: [any], keys: [k], may: [sign], formats: [ssh-sig]}
  - {name: content, principals: [content], keys: [k], may: [sign], formats: [ssh-sig], content: ssh-sig}
  - {name: all, principals: [all], keys: [k], may: [sign], formats: ["*"], blind: true}
  - {name: login, principals: [login], keys: [k], may: [sign], formats: [ssh-auth]}
`
	sig := func(namespace string) *policy.Content { return &policy.Content{Namespace: namespace} }
	login := &policy.Content{User: "root"}
	tests := []struct {
		who, format string
		content     *policy.Content
		reason      string
	}{
		{"git", "ssh-sig", sig("git"), ""},
		{"git", "ssh-sig", sig("file.x"), ""},
		{"git", "ssh-sig", sig("files/x"), `its namespaces are git, file*, not "files/x"`},
		{"git", "ssh-sig", sig("Git"), `not "Git"`},
		{"git", "ssh-sig", nil, "bare digests: it decides on what the gateway reads (content: ssh-sig)"},
		{"git", "ssh-auth", login, "does not allow the format"},
		{"any", "ssh-sig", sig("whatever"), ""},
		{"any", "ssh-sig", nil, "bare digests (blind: true)"},
		{"content", "ssh-sig", sig("whatever"), ""},
		{"content", "ssh-sig", nil, "content: ssh-sig"},
		{"all", "ssh-sig", sig("whatever"), ""},
		{"all", "ssh-sig", nil, ""},
		{"all", "ssh-auth", login, `does not allow the format "ssh-auth"; it allows *`},
		{"all", "ssh-auth", nil, "does not allow the format"},
		{"login", "ssh-auth", login, ""},
		{"login", "ssh-auth", nil, "bare digests"},
		{"login", "ssh-sig", sig("git"), "does not allow the format"},
	}
	r := parse(t, source)
	for _, tt := range tests {
		d := r.Allow(policy.Query{Principal: tt.who, Key: "k", Action: policy.Sign, Format: tt.format, Hash: "sha512", Blind: tt.content == nil, Content: tt.content})
		if d.Allowed != (tt.reason == "") || !strings.Contains(d.Reason, tt.reason) {
			t.Errorf("%s, %s, %+v: %+v; want a reason with %q", tt.who, tt.format, tt.content, d, tt.reason)
		}
	}
}

// Content is of its format, and text.
func TestContentCheck(t *testing.T) {
	pkg := &policy.Package{Name: "a"}
	for _, tt := range []struct {
		format string
		c      policy.Content
		want   string
	}{
		{"rpm", policy.Content{Package: pkg}, ""},
		{"rpm", policy.Content{}, "no content"},
		{"rpm", policy.Content{Package: pkg, Namespace: "git"}, "no content"},
		{"rpm", policy.Content{Package: &policy.Package{Name: "a\n"}}, "no text"},
		{"ssh-sig", policy.Content{Namespace: "git"}, ""},
		{"ssh-sig", policy.Content{}, "no content"},
		{"ssh-sig", policy.Content{Namespace: "git", User: "root"}, "no content"},
		{"ssh-sig", policy.Content{Namespace: "git\x1b"}, "no text"},
		{"ssh-sig", policy.Content{Namespace: "\xff"}, "no text"},
		{"ssh-sig", policy.Content{Namespace: strings.Repeat("n", 256)}, "256 bytes"},
		{"ssh-auth", policy.Content{User: "root"}, ""},
		{"ssh-auth", policy.Content{Namespace: "git"}, "no content"},
		{"ssh-auth", policy.Content{User: "ro\x00t"}, "no text"},
		{"kmod", policy.Content{Namespace: "git"}, "no content"},
	} {
		err := tt.c.Check(tt.format)
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s, %+v: %v; want %q", tt.format, tt.c, err, tt.want)
		}
	}
}

func TestGlobs(t *testing.T) {
	tests := []struct {
		glob, name string
		want       bool
	}{
		{"*", "alice", true},
		{"*", "spiffe://td/x", false},
		{"spiffe://td/*", "spiffe://td/x", true},
		{"spiffe://td/*", "spiffe://td/", true},
		{"spiffe://td/*", "spiffe://td", false},
		{"spiffe://td/*", "spiffe://td/x/y", false},
		{"spiffe://td/*/*", "spiffe://td/x/y", true},
		{"spiffe://td/x", "spiffe://td/x", true},
		{"spiffe://td/x", "spiffe://td/x/", false},
		{"spiffe://td/x", "spiffe://TD/x", false},
		{"spiffe:*", "spiffe://td/x", false},
		{"spiffe:??td?x", "spiffe://td/x", false},
		// path.Match lets a class take a '/'.
		{"spiffe:[^a][^a]td[^a]x", "spiffe://td/x", false},
		{"spiffe:[!-0][!-0]td[!-0]x", "spiffe://td/x", false},
		{"*[^a]*[^a]*[^a]*", "spiffe://td/x", false},
		{"spiffe:*/td/[^a]", "spiffe://td/x", false},
		{"[a-c]x", "bx", true},
		{"[^a-c]x", "bx", false},
		{`\*`, "*", true},
		{`\*`, "a", false},
		{"Alice", "alice", false},
		{"alice", "", false},
		{"*", "", false},
	}
	for _, tt := range tests {
		t.Run(tt.glob+" "+tt.name, func(t *testing.T) {
			r := parse(t, rule("principals: ['"+tt.glob+"']"))
			q := policy.Query{Principal: tt.name, Key: "k", Action: policy.Sign, Format: "rpm", Hash: "sha256"}
			if got := r.Allow(q).Allowed; got != tt.want {
				t.Errorf("as a principal: %v, want %v", got, tt.want)
			}
			r = parse(t, rule("keys: ['"+tt.glob+"']"))
			q.Principal, q.Key = "p", tt.name
			if got := r.Allow(q).Allowed; got != tt.want {
				t.Errorf("as a key: %v, want %v", got, tt.want)
			}
		})
	}
}

func TestWindow(t *testing.T) {
	until := epoch.Add(time.Hour)
	tests := []struct {
		name         string
		before, last bool // the rule has not_before, not_after
		now          time.Time
		want         bool
	}{
		{"just before", true, true, epoch.Add(-1), false},
		{"at not_before", true, true, epoch, true},
		{"inside", true, true, epoch.Add(time.Minute), true},
		{"at not_after", true, true, until, true},
		{"just after", true, true, until.Add(1), false},
		{"another zone", true, true, until.In(time.FixedZone("x", 7200)), true},
		{"no end", true, false, epoch.AddDate(100, 0, 0), true},
		{"no start", false, true, time.Time{}, true},
		{"no start, past the end", false, true, until.Add(1), false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			fields := []string{"may: [sign, admin]", `keys: ["*"]`}
			if tt.before {
				fields = append(fields, "not_before: "+epoch.Format(time.RFC3339))
			}
			if tt.last {
				fields = append(fields, "not_after: "+until.Format(time.RFC3339))
			}
			r := parse(t, rule(fields...))
			d := r.Allow(policy.Query{Principal: "p", Key: "k", Action: policy.Sign, Format: "rpm", Hash: "sha256", Now: tt.now})
			got := []bool{d.Allowed, r.Sees("p", "k", tt.now), r.MaySignSome("p", "k", tt.now), r.MayAdministerAll("p", tt.now).Allowed}
			if want := slices.Repeat([]bool{tt.want}, 4); !slices.Equal(got, want) {
				t.Errorf("Allow, Sees, MaySignSome, MayAdministerAll: %v, want %v", got, want)
			}
			if !tt.want && !strings.Contains(d.Reason, `rule "r1" holds only `) {
				t.Errorf("reason %q does not tell the window", d.Reason)
			}
		})
	}
}

func TestMayAdministerAll(t *testing.T) {
	tests := []struct {
		name, source string
		want         bool
	}{
		{"admin of all", rule("may: [admin]", "-formats", `keys: ["*"]`), true},
		{"among others", rule("may: [read, admin]", "-formats", `keys: [k, "*"]`), true},
		{"sign of all", rule(`keys: ["*"]`), false},
		{"globs that happen to match all", rule("may: [admin]", "-formats", `keys: ["?*", "**", "[^a]*"]`), false},
		{"another principal", rule("may: [admin]", "-formats", `keys: ["*"]`, "principals: [q]"), false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := parse(t, tt.source).MayAdministerAll("p", epoch)
			if d.Allowed != tt.want || tt.want && d.Rule != "r1" || !tt.want && !strings.Contains(d.Reason, `"p"`) {
				t.Errorf("%+v, want allowed %v", d, tt.want)
			}
		})
	}
}

// Each rule of the policy turns the question away one step later than the one
// before, so that each is the closest of those above and including it.
func TestReasonNamesTheClosest(t *testing.T) {
	steps := []struct{ rule, reason string }{
		{"{name: principal, principals: [q], keys: [k], may: [read]}", "no rule names this principal"},
		{"{name: key, principals: [p], keys: [other], may: [read]}", `rule "key" is not for this key`},
		{"{name: action, principals: [p], keys: [k], may: [read]}", `rule "action" does not give sign`},
		{"{name: format, principals: [p], keys: [k], may: [sign], formats: [kmod, cms], hashes: [sha512]}",
			`rule "format" does not allow the format "rpm"; it allows kmod, cms`},
		{"{name: hash, principals: [p], keys: [k], may: [sign], formats: [rpm], hashes: [sha384, sha512]}",
			`rule "hash" does not allow the hash sha256; it allows sha384, sha512`},
		{"{name: blind, principals: [p], keys: [k], may: [sign], formats: ['*'], not_after: 2020-01-01T00:00:00Z}",
			`rule "blind" does not allow bare digests (blind: true)`},
		{"{name: content, principals: [p], keys: [k], may: [sign], formats: [rpm], content: rpm}",
			`rule "content" does not allow bare digests: it decides on what the gateway reads (content: rpm)`},
		{"{name: window, principals: [p], keys: [k], may: [sign], formats: ['*'], blind: true, not_before: 2019-01-01T00:00:00+01:00, not_after: 2020-01-01T00:00:00Z}",
			`rule "window" holds only from 2018-12-31T23:00:00Z until 2020-01-01T00:00:00Z`},
		{"{name: yes, principals: [p], keys: [k], may: [sign], formats: ['*'], blind: true}", ""},
	}
	q := policy.Query{Principal: "p", Key: "k", Action: policy.Sign, Format: "rpm", Hash: "sha256", Blind: true, Now: epoch}
	for i, s := range steps {
		lines := []string{}
		for _, above := range steps[:i+1] {
			lines = append(lines, " - "+above.rule)
		}
		for _, order := range []string{"as written", "reversed"} {
			d := parse(t, "rules:\n"+strings.Join(lines, "\n")).Allow(q)
			if d.Reason != s.reason || d.Allowed != (s.reason == "") {
				t.Errorf("after %d rules, %s: %+v, want reason %q", i+1, order, d, s.reason)
			}
			slices.Reverse(lines)
		}
	}

	all := "rules:\n"
	want := []string{
		"principal: is not for this principal",
		"key: is not for this key",
		"action: does not give sign",
		`format: does not allow the format "rpm"; it allows kmod, cms`,
		"hash: does not allow the hash sha256; it allows sha384, sha512",
		"blind: does not allow bare digests (blind: true)",
		"content: does not allow bare digests: it decides on what the gateway reads (content: rpm)",
		"window: holds only from 2018-12-31T23:00:00Z until 2020-01-01T00:00:00Z",
		"yes: allows it",
	}
	for _, s := range steps {
		all += " - " + s.rule + "\n"
	}
	if diff := cmp.Diff(want, parse(t, all).Explain(q)); diff != "" {
		t.Errorf("Explain (-want +got):\n%s", diff)
	}
}

// Allow is on the path of every signature: this is its worst, where the last
// of many rules allows.
func BenchmarkAllow(b *testing.B) {
	var s strings.Builder
	s.WriteString("rules:\n")
	for i := range 1000 {
		fmt.Fprintf(&s, "- {name: r%d, principals: ['spiffe://td/team-%d/*'], keys: ['rel-%d-*'], may: [sign], formats: [rpm], blind: true}\n", i, i, i)
	}
	r := parse(b, s.String())
	for name, q := range map[string]policy.Query{
		"last":   {Principal: "spiffe://td/team-999/x", Key: "rel-999-a", Action: policy.Sign, Format: "rpm", Hash: "sha256", Blind: true},
		"denied": {Principal: "spiffe://td/nobody", Key: "rel-999-a", Action: policy.Sign, Format: "rpm", Hash: "sha256", Blind: true},
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				r.Allow(q)
			}
		})
	}
}
