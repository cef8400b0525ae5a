package policy

import (
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// MaxSource bounds a policy file, in bytes, and MaxRules its rules.
const (
	MaxSource = 512 << 10
	MaxRules  = 10_000
)

// file is the YAML form. Unknown fields are errors.
type file struct {
	Rules []fileRule `yaml:"rules"`
}

type fileRule struct {
	Name       string   `yaml:"name"`
	Principals []string `yaml:"principals"`
	Keys       []string `yaml:"keys"`
	May        []Action `yaml:"may"`
	Formats    []string `yaml:"formats"`
	Blind      bool     `yaml:"blind"`
	Content    string   `yaml:"content"`
	Packages   Packages `yaml:"packages"`
	Namespaces []string `yaml:"namespaces"`
	Hashes     []string `yaml:"hashes"`
	NotBefore  string   `yaml:"not_before"`
	NotAfter   string   `yaml:"not_after"`
	Rate       string   `yaml:"rate"`
	Weight     *int     `yaml:"weight"`
}

// Parse reads a policy file. Errors wrap [sigerr.Invalid] and name the rule and
// the field, or the line.
func Parse(source []byte) (*Rules, error) {
	if len(source) > MaxSource {
		return nil, fmt.Errorf("%w: policy has %d bytes; at most %d are read", sigerr.Invalid, len(source), MaxSource)
	}
	var f file
	if err := decodeFile(source, &f); err != nil {
		return nil, fmt.Errorf("%w: policy: %w", sigerr.Invalid, err)
	}
	if len(f.Rules) > MaxRules {
		return nil, fmt.Errorf("%w: policy has %d rules; at most %d are read", sigerr.Invalid, len(f.Rules), MaxRules)
	}
	rules := &Rules{}
	seen := map[string]bool{}
	for i, fr := range f.Rules {
		r, err := fr.rule()
		if err != nil {
			return nil, fmt.Errorf("%w: policy: rule %d (%q): %w", sigerr.Invalid, i+1, fr.Name, err)
		}
		if seen[r.Name] {
			return nil, fmt.Errorf("%w: policy: rule %d: the name %q is taken by an earlier rule", sigerr.Invalid, i+1, r.Name)
		}
		seen[r.Name] = true
		rules.rules = append(rules.rules, r)
	}
	return rules, nil
}

var ruleNameRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

func (f fileRule) rule() (Rule, error) {
	r := Rule{
		Name: f.Name, Principals: f.Principals, Keys: f.Keys, May: f.May,
		Formats: f.Formats, Blind: f.Blind, Content: f.content(), Packages: f.Packages, Namespaces: f.Namespaces, Hashes: f.Hashes,
	}
	if !ruleNameRE.MatchString(f.Name) {
		return r, errors.New("name: use a letter or digit, then up to 63 letters, digits, '.', '_' or '-'")
	}
	if err := checkPatterns("principals", f.Principals); err != nil {
		return r, err
	}
	if err := checkPatterns("keys", f.Keys); err != nil {
		return r, err
	}
	if len(f.May) == 0 {
		return r, errors.New("may: say at least one of sign, read, admin")
	}
	for _, a := range f.May {
		if a != Sign && a != Read && a != Admin {
			return r, fmt.Errorf("may: %q is not one of sign, read, admin", a)
		}
	}
	if err := f.checkSign(); err != nil {
		return r, err
	}
	var err error
	if r.NotBefore, err = parseTime("not_before", f.NotBefore); err != nil {
		return r, err
	}
	if r.NotAfter, err = parseTime("not_after", f.NotAfter); err != nil {
		return r, err
	}
	if !r.NotBefore.IsZero() && !r.NotAfter.IsZero() && r.NotAfter.Before(r.NotBefore) {
		return r, errors.New("not_after is before not_before")
	}
	if r.Rate, err = parseRate(f.Rate); err != nil {
		return r, err
	}
	r.Weight = 1
	if f.Weight != nil {
		r.Weight = *f.Weight
	}
	if r.Weight < 1 || r.Weight > MaxWeight {
		return r, fmt.Errorf("weight: %d is not 1 to %d", r.Weight, MaxWeight)
	}
	return r, nil
}

// checkSign checks the fields that say what may be signed: all are refused
// where the rule does not give sign, since they would promise nothing.
func (f fileRule) checkSign() error {
	if !slices.Contains(f.May, Sign) {
		if len(f.Formats) > 0 || f.Blind || f.Content != "" || f.hasPackages() || f.Namespaces != nil || len(f.Hashes) > 0 || f.Rate != "" || f.Weight != nil {
			return errors.New("formats, blind, content, packages, namespaces, hashes, rate and weight mean something only with may: [sign]")
		}
		return nil
	}
	if len(f.Formats) == 0 {
		return fmt.Errorf("formats: say what may be signed: \"*\", or some of %s", strings.Join(Formats, ", "))
	}
	for _, x := range f.Formats {
		if x != "*" && !slices.Contains(Formats, x) {
			return fmt.Errorf("formats: %q is not \"*\" or one of %s", x, strings.Join(Formats, ", "))
		}
	}
	if err := f.checkContent(); err != nil {
		return err
	}
	for _, h := range f.Hashes {
		if _, ok := keys.Hashes[h]; !ok {
			return fmt.Errorf("hashes: %q is not one of sha256, sha384, sha512; nothing weaker is ever signed", h)
		}
	}
	return nil
}

// content is what the rule decides on: namespaces say it by themselves.
func (f fileRule) content() string {
	if f.Content == "" && f.Namespaces != nil {
		return SSHSig
	}
	return f.Content
}

// checkContent checks what a rule says of what the gateway reads.
func (f fileRule) checkContent() error {
	content := f.content()
	switch {
	case content != "rpm" && f.hasPackages():
		return errors.New("packages: only with content: rpm does the gateway know what package it signs")
	case content == "":
		return nil
	case !slices.Contains(ContentFormats, content):
		return fmt.Errorf("content: the gateway reads %s, not %q", strings.Join(ContentFormats, ", "), content)
	case content != SSHSig && f.Namespaces != nil:
		return fmt.Errorf("namespaces: they are of ssh-sig, and the rule is for content: %s", content)
	case f.Blind && f.Content == "":
		return errors.New("blind: a rule with namespaces refuses bare digests")
	case f.Blind:
		return errors.New("blind: a rule with content refuses bare digests")
	case (len(f.Formats) != 1 || f.Formats[0] != content) && f.Content == "":
		return errors.New("formats: with namespaces it is [ssh-sig]")
	case len(f.Formats) != 1 || f.Formats[0] != content:
		return fmt.Errorf("formats: with content: %s it is [%[1]s]", content)
	}
	if f.Namespaces != nil {
		if err := checkPatterns("namespaces", f.Namespaces); err != nil {
			return err
		}
	}
	for _, p := range f.Packages.parts(&Package{}) {
		if p.patterns == nil {
			continue
		}
		if err := checkPatterns("packages."+p.field, p.patterns); err != nil {
			return err
		}
	}
	return nil
}

func (f fileRule) hasPackages() bool {
	return slices.ContainsFunc(f.Packages.parts(&Package{}), func(p part) bool { return p.patterns != nil })
}

func checkPatterns(field string, patterns []string) error {
	if len(patterns) == 0 {
		return fmt.Errorf("%s: say at least one name or glob", field)
	}
	for _, p := range patterns {
		if p == "" {
			return fmt.Errorf("%s: an empty name matches nothing", field)
		}
		// Part by part: a '/' inside brackets or behind a '\' would make that
		// count of parts untrue which matches relies on.
		for part := range strings.SplitSeq(p, "/") {
			if _, err := path.Match(part, "x"); err != nil {
				return fmt.Errorf("%s: %q is not a glob: close a bracket before the next '/', or escape it with \\", field, p)
			}
		}
	}
	return nil
}

func parseTime(field, s string) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		return t, fmt.Errorf("%s: %q is no time like 2027-01-31T00:00:00Z (RFC 3339)", field, s)
	}
	return t, nil
}

var ratePeriods = map[string]time.Duration{"s": time.Second, "m": time.Minute, "h": time.Hour}

func parseRate(s string) (Rate, error) {
	if s == "" {
		return Rate{}, nil
	}
	count, per, ok := strings.Cut(s, "/")
	n, err := strconv.Atoi(count)
	period := ratePeriods[per]
	if !ok || err != nil || strconv.Itoa(n) != count || n < 1 || n > 1_000_000_000 || period == 0 {
		return Rate{}, fmt.Errorf("rate: %q is not a count per s, m or h, like 100/s or 5000/h", s)
	}
	return Rate{Count: n, Per: period}, nil
}
