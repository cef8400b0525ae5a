package audit_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/signwarden/signwarden/gateway/audit"
)

var at = time.Date(2027, 1, 31, 23, 59, 58, 120_000_000, time.UTC)

// jcs encodes an object of strings by RFC 8785, for comparison: from the tables
// of its section 3.2.2.2 and the ordering of 3.2.3, by UTF-16 code units.
func jcs(t testing.TB, b []byte) []byte {
	t.Helper()
	var m map[string]string
	if err := json.Unmarshal(b, &m); err != nil {
		t.Fatalf("%q is not a JSON object of strings: %v", b, err)
	}
	names := slices.SortedFunc(maps.Keys(m), func(a, b string) int {
		return slices.Compare(utf16.Encode([]rune(a)), utf16.Encode([]rune(b)))
	})
	var out []string
	for _, n := range names {
		out = append(out, jcsString(n)+":"+jcsString(m[n]))
	}
	return []byte("{" + strings.Join(out, ",") + "}")
}

func jcsString(s string) string {
	short := map[rune]string{'\b': `\b`, '\t': `\t`, '\n': `\n`, '\f': `\f`, '\r': `\r`, '"': `\"`, '\\': `\\`}
	var b strings.Builder
	for _, r := range s {
		if e, ok := short[r]; ok {
			b.WriteString(e)
		} else if r < 0x20 {
			fmt.Fprintf(&b, `\u%04x`, r)
		} else {
			b.WriteRune(r)
		}
	}
	return `"` + b.String() + `"`
}

func TestCanonical(t *testing.T) {
	tests := []struct{ name, text, want string }{
		{"plain", "a", `"a"`},
		{"quote and backslash", `a"\b/`, `"a\"\\b/"`},
		{"short escapes", "\b\t\n\f\r", `"\b\t\n\f\r"`},
		{"other controls", "\x00\x01\x0b\x1f", `"\u0000\u0001\u000b\u001f"`},
		{"DEL stays", "\x7f", "\"\x7f\""},
		{"line separators stay", "\u2028\u2029", "\"\u2028\u2029\""},
		{"HTML stays", "<&>", `"<&>"`},
		{"non-BMP stays", "😀\U0010ffff", "\"😀\U0010ffff\""},
		{"a byte order mark stays", "\ufeffa", "\"\ufeffa\""},
		{"invalid UTF-8", "a\xffb\xc3", `"a�b�"`},
		{"a surrogate in UTF-8", "\xed\xa0\x80", `"���"`},
		{"not normalised", "e\u0301", "\"e\u0301\""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := audit.Entry{Time: at, Reason: tt.text}.Canonical()
			want := `{"reason":` + tt.want + `,"time":"2027-01-31T23:59:58.12Z"}`
			if string(got) != want {
				t.Errorf("got  %q\nwant %q", got, want)
			}
			if diff := cmp.Diff(string(jcs(t, got)), string(got)); diff != "" {
				t.Errorf("RFC 8785 says otherwise (-RFC +got):\n%s", diff)
			}
		})
	}
}

// The whole form of one entry, written out: the published log depends on it.
func TestCanonicalIsPinned(t *testing.T) {
	e := audit.Entry{
		Time: at.In(time.FixedZone("x", -3600)), Action: "sign", Outcome: audit.Signed, Principal: "spiffe://td/ci", Via: "mtls:ab",
		FrontEnd: "grpc", Request: "1", Key: "rel", KeyFingerprint: "cd", Format: "rpm", Hash: "sha256", Digest: "ef",
		Scheme: "rsa-pss", Rule: "r", Reason: "why", Signature: "01",
		ClaimFile: "a.rpm", ClaimSHA256: "23", ClaimNEVRA: "a-1-1.x86_64", ClaimNote: "n", Detail: "d",
	}
	const want = `{"action":"sign","claim_file":"a.rpm","claim_nevra":"a-1-1.x86_64","claim_note":"n","claim_sha256":"23",` +
		`"detail":"d","digest":"ef","format":"rpm","front_end":"grpc","hash":"sha256","key":"rel","key_fingerprint":"cd",` +
		`"outcome":"signed","principal":"spiffe://td/ci","reason":"why","request":"1","rule":"r","scheme":"rsa-pss",` +
		`"signature":"01","time":"2027-01-31T23:59:58.12Z","via":"mtls:ab"}`
	if diff := cmp.Diff(want, string(e.Canonical())); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(`{"time":"0001-01-01T00:00:00Z"}`, string(audit.Entry{}.Canonical())); diff != "" {
		t.Errorf("the zero entry (-want +got):\n%s", diff)
	}
}

// A field that somebody adds and forgets in the canonical form would be lost
// without a word; this finds it.
func TestEveryFieldRoundTrips(t *testing.T) {
	full := audit.Entry{Time: at}
	v := reflect.ValueOf(&full).Elem()
	for i := range v.NumField() {
		name := v.Type().Field(i).Name
		switch f := v.Field(i); {
		case f.Type() == reflect.TypeFor[time.Time]():
		case f.Kind() == reflect.String:
			f.SetString("the value of " + name)

			alone := audit.Entry{Time: at}
			reflect.ValueOf(&alone).Elem().Field(i).SetString("x\n😀")
			got, err := audit.Parse(alone.Canonical())
			if diff := cmp.Diff(alone, got); err != nil || diff != "" {
				t.Errorf("%s alone: %v (-want +got):\n%s", name, err, diff)
			}
		default:
			t.Fatalf("the field %s has the type %v: extend this test", name, f.Type())
		}
	}
	b := full.Canonical()
	got, err := audit.Parse(b)
	if diff := cmp.Diff(full, got); err != nil || diff != "" {
		t.Errorf("all fields: %v (-want +got):\n%s", err, diff)
	}
	if !bytes.Equal(jcs(t, b), b) {
		t.Errorf("not RFC 8785: %s", b)
	}
	var m map[string]string
	if err := json.Unmarshal(b, &m); err != nil || len(m) != v.NumField() {
		t.Errorf("%d members for %d fields: %v", len(m), v.NumField(), err)
	}
}

func TestRandomEntriesRoundTrip(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		e := audit.Entry{Time: time.Unix(rapid.Int64Range(-62135596800, 253402300799).Draw(rt, "s"), rapid.Int64Range(0, 999_999_999).Draw(rt, "ns")).UTC()}
		v := reflect.ValueOf(&e).Elem()
		for i := range v.NumField() {
			if v.Field(i).Kind() == reflect.String {
				v.Field(i).SetString(string(rapid.SliceOf(rapid.Byte()).Draw(rt, "bytes")) + rapid.String().Draw(rt, "text"))
			}
		}
		b := e.Canonical()
		if !utf8.Valid(b) || !bytes.Equal(jcs(t, b), b) {
			rt.Fatalf("not RFC 8785: %q", b)
		}
		got, err := audit.Parse(b)
		if err != nil || !bytes.Equal(got.Canonical(), b) || !got.Time.Equal(e.Time) {
			rt.Fatalf("Parse = %+v, %v", got, err)
		}
		for i := range v.NumField() {
			if v.Field(i).Kind() == reflect.String {
				want := string([]rune(v.Field(i).String())) // invalid bytes become U+FFFD, one each
				if got := reflect.ValueOf(got).Field(i).String(); got != want {
					rt.Fatalf("%s = %q, want %q", v.Type().Field(i).Name, got, want)
				}
			}
		}
	})
}

func TestParseRefuses(t *testing.T) {
	const good = `{"action":"sign","key":"a","time":"2027-01-31T23:59:58.12Z"}`
	if _, err := audit.Parse([]byte(good)); err != nil {
		t.Fatal(err)
	}
	tests := []struct{ name, in string }{
		{"nothing", ``},
		{"null", `null`},
		{"a string", `"a"`},
		{"an array", `[]`},
		{"no time", `{"action":"sign"}`},
		{"an empty object", `{}`},
		{"space inside", strings.Replace(good, ":", ": ", 1)},
		{"space before", " " + good},
		{"newline behind", good + "\n"},
		{"data behind", good + "x"},
		{"an object behind", good + good},
		{"a brace behind", good + "}"},
		{"a null byte behind", good + "\x00"},
		{"a byte order mark before", "\ufeff" + good},
		{"reordered", `{"key":"a","action":"sign","time":"2027-01-31T23:59:58.12Z"}`},
		{"unknown member", `{"action":"sign","kez":"a","time":"2027-01-31T23:59:58.12Z"}`},
		{"member of another case", `{"Action":"sign","time":"2027-01-31T23:59:58.12Z"}`},
		{"member twice", `{"action":"sign","action":"sign","time":"2027-01-31T23:59:58.12Z"}`},
		{"empty member", `{"action":"","time":"2027-01-31T23:59:58.12Z"}`},
		{"empty unknown member", `{"action":"sign","b":"","time":"2027-01-31T23:59:58.12Z"}`},
		{"null member", `{"action":null,"time":"2027-01-31T23:59:58.12Z"}`},
		{"number", `{"action":1,"time":"2027-01-31T23:59:58.12Z"}`},
		{"object for a member", `{"action":{},"time":"2027-01-31T23:59:58.12Z"}`},
		{"needless escape", strings.Replace(good, "sign", `s\u0069gn`, 1)},
		{"escaped solidus", strings.Replace(good, "sign", `s\/`, 1)},
		{"long form of a short escape", strings.Replace(good, "sign", `\u000a`, 1)},
		{"upper case escape", strings.Replace(good, "sign", `\u001F`, 1)},
		{"raw control character", strings.Replace(good, "sign", "\x01", 1)},
		{"invalid UTF-8", strings.Replace(good, "sign", "\xff", 1)},
		{"half a surrogate pair", strings.Replace(good, "sign", `\ud83d`, 1)},
		{"an escaped pair", strings.Replace(good, "sign", `\ud83d\ude00`, 1)},
		{"an escaped name", strings.Replace(good, "action", `\u0061ction`, 1)},
		{"time of another zone", strings.Replace(good, "12Z", "12+00:00", 1)},
		{"time with an offset", strings.Replace(good, "12Z", "12+01:00", 1)},
		{"time with zeros behind", strings.Replace(good, "12Z", "120Z", 1)},
		{"time with a comma", strings.Replace(good, ".12Z", ",12Z", 1)},
		{"time with picoseconds", strings.Replace(good, "12Z", "1234567891Z", 1)},
		{"time in lower case", strings.Replace(good, "12Z", "12z", 1)},
		{"no such day", strings.Replace(good, "01-31", "02-31", 1)},
		{"leap second", strings.Replace(good, "59:58", "59:60", 1)},
		{"cut short", good[:len(good)-1]},
		{"deep", strings.Repeat(`{"a":`, 100_000)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			e, err := audit.Parse([]byte(tt.in))
			if err == nil || e != (audit.Entry{}) {
				t.Errorf("Parse = %+v, %v; want an error and nothing else", e, err)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"action":"sign","key":"a","time":"2027-01-31T23:59:58.12Z"}`))
	f.Add([]byte(`{"time":"0001-01-01T00:00:00Z"}`))
	f.Add(audit.Entry{Time: at, Reason: "\"\\\b\x00\x7f\u2028😀\xff", Outcome: audit.Denied}.Canonical())
	f.Add([]byte(`{"action":"\ud800","time":"2027-01-31T23:59:58Z"} `))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := audit.Parse(b)
		if err != nil {
			if e != (audit.Entry{}) {
				t.Fatalf("an error, and %+v", e)
			}
			return
		}
		if got := e.Canonical(); !bytes.Equal(got, b) {
			t.Fatalf("parse then canonical:\n%q\nof\n%q", got, b)
		}
		if got := jcs(t, b); !bytes.Equal(got, b) {
			t.Fatalf("RFC 8785 says\n%q\nof\n%q", got, b)
		}
	})
}

func BenchmarkCanonical(b *testing.B) {
	e := audit.Entry{Time: at, Action: "sign", Outcome: audit.Signed, Principal: "spiffe://td/ci/build", Via: "mtls:" + strings.Repeat("ab", 32),
		FrontEnd: "grpc", Key: "rel", KeyFingerprint: strings.Repeat("ab", 32), Format: "rpm", Hash: "sha256", Digest: strings.Repeat("ab", 32),
		Scheme: "rsa-pkcs1v15", Rule: "r", Signature: strings.Repeat("ab", 32), ClaimFile: "some/path/a-1-1.x86_64.rpm"}
	b.ReportAllocs()
	for b.Loop() {
		e.Canonical()
	}
}
