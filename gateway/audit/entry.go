// Package audit records every decision. [Log.Append] returns only when the
// entry is durable, and the gateway releases nothing before it has returned.
//
// The package knows no policy and no wire: an [Entry] is words about what
// happened, in one canonical form, and the log is whatever sink stores them.
package audit

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
	"unicode/utf8"
)

// Outcome is how a request ended.
type Outcome string

// The outcomes. Signed: a signature was made, verified and may have been
// released. Denied: a rule, a state or a bound turned it away before the token.
// Failed: it was allowed and did not succeed. Done: an administrative act took
// effect.
const (
	Signed Outcome = "signed"
	Denied Outcome = "denied"
	Failed Outcome = "failed"
	Done   Outcome = "done"
)

// Entry is one record. Empty fields are left out of its canonical form.
type Entry struct {
	Time      time.Time // when it was decided, UTC
	Action    string    // sign, key.create, key.state, policy.apply, ...
	Outcome   Outcome
	Principal string // who asked
	Via       string // how that was proved
	FrontEnd  string // what took the request: grpc, gpg-agent, ...
	Request   string // idempotency id

	Key            string
	KeyFingerprint string // SHA-256 of the SubjectPublicKeyInfo, hexadecimal
	Format         string
	Hash           string
	Digest         string // hexadecimal
	Scheme         string
	Rule           string // the rule that allowed it
	Reason         string // why it was denied, or failed
	Signature      string // SHA-256 of the signature, hexadecimal

	// What the gateway itself read of what was signed, and decided on.
	NEVRA, Vendor string // of an RPM package
	Namespace     string // of an SSH signature
	User          string // whom a login by SSH is for

	// What the client said; recorded, never decided on.
	ClaimFile, ClaimSHA256, ClaimNEVRA, ClaimNote string

	// What an administrative act changed, in words.
	Detail string
}

// member is one member of the canonical object.
type member struct {
	name  string
	value *string
}

// members lists the fields in canonical order: names sorted by code point,
// which for these ASCII names is RFC 8785's order.
func (e *Entry) members(at *string) []member {
	return []member{
		{"action", &e.Action},
		{"claim_file", &e.ClaimFile},
		{"claim_nevra", &e.ClaimNEVRA},
		{"claim_note", &e.ClaimNote},
		{"claim_sha256", &e.ClaimSHA256},
		{"detail", &e.Detail},
		{"digest", &e.Digest},
		{"format", &e.Format},
		{"front_end", &e.FrontEnd},
		{"hash", &e.Hash},
		{"key", &e.Key},
		{"key_fingerprint", &e.KeyFingerprint},
		{"namespace", &e.Namespace},
		{"nevra", &e.NEVRA},
		{"outcome", (*string)(&e.Outcome)},
		{"principal", &e.Principal},
		{"reason", &e.Reason},
		{"request", &e.Request},
		{"rule", &e.Rule},
		{"scheme", &e.Scheme},
		{"signature", &e.Signature},
		{"time", at},
		{"user", &e.User},
		{"vendor", &e.Vendor},
		{"via", &e.Via},
	}
}

// Canonical returns the one encoding of e: JSON by RFC 8785, every value a
// string, absent where empty. Bytes that are not UTF-8 become U+FFFD.
func (e Entry) Canonical() []byte {
	at := e.Time.UTC().Format(time.RFC3339Nano)
	out := make([]byte, 0, 1024)
	out = append(out, '{')
	for _, m := range e.members(&at) {
		if *m.value == "" {
			continue
		}
		if len(out) > 1 {
			out = append(out, ',')
		}
		out = appendString(out, m.name)
		out = append(out, ':')
		out = appendString(out, *m.value)
	}
	return append(out, '}')
}

// appendString escapes as RFC 8785 section 3.2.2.2 says: the two-character
// escapes where JSON has them, \u00xx for other control characters, and nothing else.
func appendString(out []byte, s string) []byte {
	const hexDigits = "0123456789abcdef"
	out = append(out, '"')
	for _, r := range s { // an invalid byte ranges as U+FFFD
		switch {
		case r == '"' || r == '\\':
			out = append(out, '\\', byte(r))
		case r >= 0x20:
			out = utf8.AppendRune(out, r)
		case r == '\b':
			out = append(out, `\b`...)
		case r == '\t':
			out = append(out, `\t`...)
		case r == '\n':
			out = append(out, `\n`...)
		case r == '\f':
			out = append(out, `\f`...)
		case r == '\r':
			out = append(out, `\r`...)
		default:
			out = append(out, `\u00`...)
			out = append(out, hexDigits[r>>4], hexDigits[r&15])
		}
	}
	return append(out, '"')
}

// Parse reads a canonical entry and refuses every other encoding of it.
func Parse(b []byte) (Entry, error) {
	dec := json.NewDecoder(bytes.NewReader(b))
	var values map[string]string
	if err := dec.Decode(&values); err != nil {
		return Entry{}, fmt.Errorf("audit entry: %w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return Entry{}, errors.New("audit entry: data follows the object")
	}
	var e Entry
	var at string
	for _, m := range e.members(&at) {
		*m.value = values[m.name]
	}
	t, err := time.Parse(time.RFC3339Nano, at)
	if err != nil {
		return Entry{}, fmt.Errorf("audit entry: time %q: %w", at, err)
	}
	e.Time = t
	if !bytes.Equal(e.Canonical(), b) {
		return Entry{}, errors.New("audit entry: not in canonical form")
	}
	return e, nil
}
