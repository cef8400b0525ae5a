// Package policy decides who may do what with which key. It is pure: rules and
// a question in, a decision out; no clock, no I/O, no state. What no rule
// allows is denied, and there is no rule that denies. The order of rules does not
// change what is allowed, only which rule is named, and whose rate counts.
package policy

import (
	"fmt"
	"path"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Action is what a caller wants with a key.
type Action string

// The actions. Admin is to create a key of that name and to enable, disable
// and read it; for "*" it is also to change these rules and to read the audit log.
const (
	Sign  Action = "sign"
	Read  Action = "read"
	Admin Action = "admin"
)

// Formats is what a signature can be for.
var Formats = []string{
	"openpgp", "rpm", "kmod", "authenticode", "efi-variable", "cms", "ima",
	"ssh-sig", "ssh-auth", "cosign", "pkcs11",
}

// ContentFormats are the formats whose content the gateway can read, and so
// decide on: a request may carry what is hashed in place of a digest.
var ContentFormats = []string{"rpm", SSHSig, SSHAuth}

// The formats of SSH: signatures of ssh-keygen -Y sign, and so of git, and logins.
const (
	SSHSig  = "ssh-sig"
	SSHAuth = "ssh-auth"
)

// Content is what the gateway itself has read of a message: no claim. What it
// holds depends on the message's format.
type Content struct {
	Package   *Package // rpm
	Namespace string   // ssh-sig
	User      string   // ssh-auth: who is to be logged in
}

// Check refuses content that is not of that format, or whose names could not be
// told from another's where they are written.
func (c *Content) Check(format string) error {
	switch format {
	case "rpm":
		if c.Package == nil || *c != (Content{Package: c.Package}) {
			break
		}
		return c.Package.Check()
	case SSHSig:
		if c.Namespace == "" || *c != (Content{Namespace: c.Namespace}) {
			break
		}
		return checkText("its namespace", c.Namespace)
	case SSHAuth:
		if c.User == "" || *c != (Content{User: c.User}) {
			break
		}
		return checkText("its user", c.User)
	}
	return fmt.Errorf("what was read is no content of format %q", format)
}

func checkText(what, s string) error {
	if len(s) > MaxPart {
		return fmt.Errorf("%s has %d bytes; at most %d are read", what, len(s), MaxPart)
	}
	if !utf8.ValidString(s) || strings.ContainsFunc(s, unicode.IsControl) {
		return fmt.Errorf("%s, %q, is no text", what, s)
	}
	return nil
}

// Package is what the gateway itself has read of an RPM package: no claim.
type Package struct {
	Name, Epoch, Version, Release, Arch string // Epoch is empty where it has none
	Vendor                              string
}

// String returns name-[epoch:]version-release.arch.
func (p *Package) String() string {
	epoch := ""
	if p.Epoch != "" {
		epoch = p.Epoch + ":"
	}
	return fmt.Sprintf("%s-%s%s-%s.%s", p.Name, epoch, p.Version, p.Release, p.Arch)
}

// MaxPart bounds each part of a Package, a namespace and a user, in bytes. rpm has
// no bound; names of files have this one.
const MaxPart = 255

// Check refuses a package whose name could not be told from another's where it
// is written: a part that is too long, is not UTF-8, or has control characters.
func (p *Package) Check() error {
	for _, s := range []string{p.Name, p.Epoch, p.Version, p.Release, p.Arch, p.Vendor} {
		if err := checkText("a part of its name", s); err != nil {
			return err
		}
	}
	return nil
}

// Packages says which packages a rule is for, each part by exact values or
// globs; an empty list is any. As with names of keys, "*" does not match a '/'.
type Packages struct {
	Names    []string `yaml:"names"`
	Epochs   []string `yaml:"epochs"` // a package without one has epoch 0
	Versions []string `yaml:"versions"`
	Releases []string `yaml:"releases"`
	Arches   []string `yaml:"arches"` // source packages: src, nosrc
	Vendors  []string `yaml:"vendors"`
}

// parts lists the fields, each with the value of it that a package has.
func (p *Packages) parts(of *Package) []part {
	epoch := of.Epoch
	if epoch == "" {
		epoch = "0"
	}
	return []part{
		{"names", p.Names, of.Name},
		{"epochs", p.Epochs, epoch},
		{"versions", p.Versions, of.Version},
		{"releases", p.Releases, of.Release},
		{"arches", p.Arches, of.Arch},
		{"vendors", p.Vendors, of.Vendor},
	}
}

type part struct {
	field    string
	patterns []string
	value    string
}

// Rule allows some principals some actions on some keys.
type Rule struct {
	Name string
	// Principals are exact names or globs in the manner of path.Match; nothing
	// in a glob but a '/' itself matches a '/', so "*" is no SPIFFE id.
	Principals []string
	// Keys are exact names or globs.
	Keys []string
	May  []Action
	// Formats that may be signed, or "*", which is all but ssh-auth: who may sign
	// anything is not to be logged in anywhere unless that is said. Needed with Sign.
	Formats []string
	// Blind allows to sign a digest that arrives without the bytes it was made of.
	// The gateway then has only the caller's word for its format. A rule without
	// Blind allows what the gateway reads, of ContentFormats.
	Blind bool
	// Content, one of ContentFormats, says that the gateway must have read what
	// is signed, and that Packages and Namespaces hold for it. Empty: neither.
	Content  string
	Packages Packages
	// Namespaces of ssh-sig, by exact names or globs; empty: any.
	Namespaces []string
	// Hashes that may have made the digest; empty: all that are signed at all.
	Hashes []string
	// NotBefore and NotAfter bound when the rule holds; zero: unbounded.
	NotBefore, NotAfter time.Time
	// Rate bounds the signatures that each principal gets with each key by this
	// rule; zero: unbounded.
	Rate Rate
	// Weight is the share of the token that each principal gets where requests of
	// several wait for it, in proportion to the others': 1 to MaxWeight.
	Weight int
}

// MaxWeight bounds the weight of a rule.
const MaxWeight = 100

// Rate is a token bucket: Count signatures at once, refilled in Per.
type Rate struct {
	Count int
	Per   time.Duration
}

// String is the form that a policy file has.
func (r Rate) String() string {
	for unit, per := range ratePeriods {
		if per == r.Per {
			return fmt.Sprintf("%d/%s", r.Count, unit)
		}
	}
	return fmt.Sprintf("%d/%v", r.Count, r.Per)
}

// Query is one question.
type Query struct {
	Principal string
	Key       string
	Action    Action
	Now       time.Time

	// For Sign:
	Format  string
	Blind   bool     // the digest is bare: nothing was read of what it is of
	Hash    string   // as in Rule.Hashes
	Content *Content // what was read; nil: nothing
}

// Decision is the answer to a Query.
type Decision struct {
	Allowed bool
	Rule    string // the rule that allows it; empty where none does
	Reason  string // why not; empty where allowed
	Rate    Rate
	Weight  int // of the rule that allows it
}

// Rules is a checked set of rules. It is immutable and safe for concurrent use.
// The zero value denies everything.
type Rules struct {
	rules []Rule
}

// Len is the number of rules.
func (r *Rules) Len() int { return len(r.rules) }

// Allow answers q. Where no rule allows it, the reason is that of the rule that
// came closest, in the words of a person who has to change the policy.
//
// Where several allow it, one without a rate is taken before one with; so a rate
// bounds only those whom no other rule lets sign without. Of several with rates
// the first is taken.
func (r *Rules) Allow(q Query) Decision {
	best := noRule
	var rated Decision
	for i := range r.rules {
		rule := &r.rules[i]
		m := rule.refuses(q)
		if m.step == allowed {
			d := Decision{Allowed: true, Rule: rule.Name, Rate: rule.Rate, Weight: rule.Weight}
			if d.Rate.Count == 0 {
				return d
			}
			if !rated.Allowed {
				rated = d
			}
			continue
		}
		if m.step > best.step {
			best = m
			best.text = fmt.Sprintf("rule %q %s", rule.Name, m.text)
		}
	}
	if rated.Allowed {
		return rated
	}
	return Decision{Reason: best.text}
}

// Sees reports whether a principal may know that a key exists: some rule that
// holds now gives it some action on that key.
func (r *Rules) Sees(principal, key string, now time.Time) bool {
	for i := range r.rules {
		rule := &r.rules[i]
		if matches(rule.Principals, principal) && matches(rule.Keys, key) && rule.holds(now) {
			return true
		}
	}
	return false
}

// MaySignSome reports whether a principal may sign something with a key now.
func (r *Rules) MaySignSome(principal, key string, now time.Time) bool {
	for i := range r.rules {
		rule := &r.rules[i]
		if slices.Contains(rule.May, Sign) && matches(rule.Principals, principal) &&
			matches(rule.Keys, key) && rule.holds(now) {
			return true
		}
	}
	return false
}

// Reads returns the formats of ContentFormats in which a principal may sign with a
// key now only what the gateway has read, by some rule at least.
func (r *Rules) Reads(principal, key string, now time.Time) []string {
	var out []string
	for i := range r.rules {
		rule := &r.rules[i]
		if rule.Blind || !slices.Contains(rule.May, Sign) || !matches(rule.Principals, principal) ||
			!matches(rule.Keys, key) || !rule.holds(now) {
			continue
		}
		for _, f := range ContentFormats {
			if rule.allowsFormat(f) && !slices.Contains(out, f) {
				out = append(out, f)
			}
		}
	}
	return out
}

// MayAdministerAll reports whether a principal is an administrator of
// everything: some rule gives it Admin on the key "*", spelled so.
func (r *Rules) MayAdministerAll(principal string, now time.Time) Decision {
	for i := range r.rules {
		rule := &r.rules[i]
		if slices.Contains(rule.May, Admin) && slices.Contains(rule.Keys, "*") &&
			matches(rule.Principals, principal) && rule.holds(now) {
			return Decision{Allowed: true, Rule: rule.Name}
		}
	}
	return Decision{Reason: fmt.Sprintf("no rule gives %q admin on all keys (keys: [\"*\"])", principal)}
}

// Explain tells for each rule, in order, what it says to q.
func (r *Rules) Explain(q Query) []string {
	out := make([]string, 0, len(r.rules))
	for i := range r.rules {
		m := r.rules[i].refuses(q)
		text := m.text
		if m.step == allowed {
			text = "allows it"
		}
		out = append(out, fmt.Sprintf("%s: %s", r.rules[i].Name, text))
	}
	return out
}

// step orders how far a query came in a rule; Allow tells of the furthest.
type step int

const (
	passedNothing step = iota
	passedPrincipal
	passedKey
	passedAction
	passedFormat
	passedHash
	passedBlind
	passedContent
	allowed
)

type match struct {
	step step
	text string
}

var noRule = match{step: passedNothing, text: "no rule names this principal"}

// refuses tells at which step the rule turns q away, or allowed.
func (r *Rule) refuses(q Query) match {
	switch {
	case !matches(r.Principals, q.Principal):
		return match{passedNothing, "is not for this principal"}
	case !matches(r.Keys, q.Key):
		return match{passedPrincipal, "is not for this key"}
	case !slices.Contains(r.May, q.Action):
		return match{passedKey, fmt.Sprintf("does not give %s", q.Action)}
	}
	if q.Action == Sign {
		switch {
		case !r.allowsFormat(q.Format):
			return match{passedAction, fmt.Sprintf("does not allow the format %q; it allows %s", q.Format, strings.Join(r.Formats, ", "))}
		case len(r.Hashes) > 0 && !slices.Contains(r.Hashes, q.Hash):
			return match{passedFormat, fmt.Sprintf("does not allow the hash %s; it allows %s", q.Hash, strings.Join(r.Hashes, ", "))}
		case r.Content != "" && (q.Blind || q.Content == nil):
			return match{passedBlind, fmt.Sprintf("does not allow bare digests: it decides on what the gateway reads (content: %s)", r.Content)}
		case q.Blind && !r.Blind:
			return match{passedHash, "does not allow bare digests (blind: true)"}
		case q.Content != nil:
			if text := r.refusesContent(q.Content); text != "" {
				return match{passedBlind, text}
			}
		}
	}
	if !r.holds(q.Now) {
		return match{passedContent, fmt.Sprintf("holds only %s", r.window())}
	}
	return match{allowed, ""}
}

// refusesContent tells why the rule is not for what was read; "": it is.
func (r *Rule) refusesContent(c *Content) string {
	if c.Package != nil {
		for _, p := range r.Packages.parts(c.Package) {
			if len(p.patterns) > 0 && !matches(p.patterns, p.value) {
				return fmt.Sprintf("is not for this package: its %s are %s, not %q", p.field, strings.Join(p.patterns, ", "), p.value)
			}
		}
	}
	if len(r.Namespaces) > 0 && !matches(r.Namespaces, c.Namespace) {
		return fmt.Sprintf("is not for this namespace: its namespaces are %s, not %q", strings.Join(r.Namespaces, ", "), c.Namespace)
	}
	return ""
}

func (r *Rule) allowsFormat(f string) bool {
	return slices.Contains(r.Formats, f) || f != SSHAuth && slices.Contains(r.Formats, "*")
}

func (r *Rule) holds(now time.Time) bool {
	return (r.NotBefore.IsZero() || !now.Before(r.NotBefore)) && (r.NotAfter.IsZero() || !now.After(r.NotAfter))
}

func (r *Rule) window() string {
	var parts []string
	if !r.NotBefore.IsZero() {
		parts = append(parts, "from "+r.NotBefore.UTC().Format(time.RFC3339))
	}
	if !r.NotAfter.IsZero() {
		parts = append(parts, "until "+r.NotAfter.UTC().Format(time.RFC3339))
	}
	return strings.Join(parts, " ")
}

// matches reports whether name is, or is matched by, one of the patterns.
// Parse has checked them, so Match's error cannot occur; were it to, it is no match.
func matches(patterns []string, name string) bool {
	if name == "" {
		return false
	}
	for _, p := range patterns {
		if p == name {
			return true
		}
		// path.Match lets [^x] match a '/', and that would let a glob of parts
		// reach into a SPIFFE id.
		if strings.Count(p, "/") != strings.Count(name, "/") {
			continue
		}
		if ok, err := path.Match(p, name); err == nil && ok {
			return true
		}
	}
	return false
}
