package openpgp_test

import (
	"bytes"
	"crypto"
	"crypto/elliptic"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/signwarden/signwarden/formats/openpgp"
)

// amend is the Amendment of a subject's certificate so many days after its keys were made.
func (s subject) amend(t testing.TB, days int) openpgp.Amendment {
	t.Helper()
	return openpgp.Amendment{Certificate: s.parsed(t), Primary: s.keyKind.primary(), At: created.AddDate(0, 0, days)}
}

func (s subject) subkeys() []crypto.Signer {
	if s.single {
		return nil
	}
	return []crypto.Signer{s.signer}
}

// eachAmended runs a test for one kind of key of each algorithm, in both layouts.
func eachAmended(t *testing.T, f func(t *testing.T, s subject)) {
	for _, k := range []keyKind{rsa2048, p384, ed} {
		for _, single := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s single %t", k.name, single), func(t *testing.T) { f(t, newSubject(t, k, single)) })
		}
	}
}

// lint has every peer read an amended certificate, and a signature that was made before it.
func lint(t *testing.T, s subject, g gpg) {
	t.Helper()
	g.must(s.cert, "--import")
	packets, _ := g.must(s.cert, "--list-packets", "--verbose")
	noCriticalNoSHA1(t, packets)
	check, _ := g.must(nil, "--check-sigs", "--with-colons")
	if strings.Contains(check, "sig:-") || strings.Contains(check, "sig:%") || !strings.Contains(check, "sig:!") {
		t.Errorf("gpg --check-sigs:\n%s", check)
	}
	out, errOut, err := run(t, nil, nil, "sq", "inspect", "--certifications", file(t, "cert.pgp", s.cert))
	if err != nil || strings.Contains(out+errOut, "nvalid") {
		t.Errorf("sq inspect: %v\n%s%s", err, out, errOut)
	}
	if s.algo != 19 { // rpm 4.18 knows no ECDSA
		if _, out, err := rpmImport(t, s); err != nil {
			t.Errorf("rpmkeys --import: %v\n%s", err, out)
		}
	}
}

// A certificate that is renewed, gets user IDs and a new subkey, one after the other; old signatures stay good, new ones are.
func TestAmend(t *testing.T) {
	eachAmended(t, func(t *testing.T, s subject) {
		g := newGPG(t)
		g.must(s.cert, "--import")
		message := file(t, "message", []byte("a message"))
		early := file(t, "early.sig", detach(t, s, []byte("a message"), openpgp.SignOptions{Time: created.Add(time.Hour)}))
		verify := func(sig string) {
			t.Helper()
			g.must(nil, "--verify", sig, message)
			sqVerify(t, s, "--detached", sig, message)
		}
		step := func(cert []byte, err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
			s.cert = cert
			lint(t, s, g)
			verify(early)
		}
		expires := time.Date(2100, 1, 2, 3, 4, 5, 0, time.UTC)
		step(s.amend(t, 10).Renew(expires, s.subkeys()...))
		list, _ := g.must(nil, "--list-keys", "--with-colons")
		tags := []string{"pub", "sub"}
		if s.single {
			tags = tags[:1]
		}
		for _, tag := range tags {
			if got := colons(t, list, tag)[6]; got != fmt.Sprint(expires.Unix()) {
				t.Errorf("%s expires %s, want %d", tag, got, expires.Unix())
			}
		}
		step(s.amend(t, 20).AddUserID("Another <another@example.org>"))
		list, _ = g.must(nil, "--list-keys", "--with-colons")
		if strings.Count(list, "uid:") != 2 || colons(t, list, "uid")[9] != userID || colons(t, list, "pub")[6] != fmt.Sprint(expires.Unix()) {
			t.Errorf("after a new user ID:\n%s", list)
		}
		step(s.amend(t, 30).AddSubkey(extra.primary(), expires.AddDate(1, 0, 0)))
		list, _ = g.must(nil, "--list-keys", "--with-colons")
		if n := strings.Count(list, "sub:"); n != 1+len(s.subkeys()) {
			t.Errorf("%d subkeys after one was added:\n%s", n, list)
		}
		key, err := s.parsed(t).SigningKeyAt(extra.primary().Public(), created.AddDate(0, 0, 31))
		if err != nil {
			t.Fatal(err)
		}
		if !key.Created.Equal(created.AddDate(0, 0, 30)) || !key.Expires.Equal(expires) { // no longer than the primary
			t.Errorf("the new subkey is of %v to %v", key.Created, key.Expires)
		}
		added := subject{keyKind: extra, cert: s.cert, key: key, signer: extra.primary()}
		late := file(t, "late.sig", detach(t, added, []byte("a message"), openpgp.SignOptions{Time: created.AddDate(0, 0, 31)}))
		verify(late)
		// The old subkey comes to its end, the new one does not.
		if !s.single {
			end := time.Date(2090, 1, 1, 0, 0, 0, 0, time.UTC)
			step(s.amend(t, 40).ExpireSubkey(s.signer, end))
			if _, err := s.parsed(t).SigningKeyAt(s.signer.Public(), end.Add(-1)); err != nil {
				t.Errorf("within its time: %v", err)
			}
			if _, err := s.parsed(t).SigningKeyAt(s.signer.Public(), end); !errors.Is(err, openpgp.ErrKeyUnusable) {
				t.Errorf("past its time: %v, want ErrKeyUnusable", err)
			}
		}
		verify(late)
		// Everything is renewed to never, the user IDs and both subkeys.
		step(s.amend(t, 60).Renew(time.Time{}, append(s.subkeys(), extra.primary())...))
		list, _ = g.must(nil, "--list-keys", "--with-colons")
		for line := range strings.Lines(list) {
			if f := strings.Split(line, ":"); (f[0] == "pub" || f[0] == "sub") && f[6] != "" {
				t.Errorf("expires still: %s", line)
			}
		}
		if colons(t, list, "uid")[9] != userID {
			t.Errorf("another user ID is the first now:\n%s", list)
		}
		verify(late)
	})
}

// A revoked certificate is good for nothing, and cannot be amended.
func TestRevoke(t *testing.T) {
	eachAmended(t, func(t *testing.T, s subject) {
		g := newGPG(t)
		g.must(s.cert, "--import")
		early := file(t, "early.sig", detach(t, s, []byte("a message"), openpgp.SignOptions{Time: created.Add(time.Hour)}))
		var err error
		s.cert, err = s.amend(t, 10).Revoke(openpgp.Compromised, "the host was broken into")
		if err != nil {
			t.Fatal(err)
		}
		g.must(s.cert, "--import")
		list, _ := g.must(nil, "--list-keys", "--with-colons")
		if got := colons(t, list, "pub")[1]; got != "r" {
			t.Errorf("gpg's validity of the key is %q, want r:\n%s", got, list)
		}
		packets, _ := g.must(s.cert, "--list-packets", "--verbose")
		noCriticalNoSHA1(t, packets)
		if !strings.Contains(packets, "revocation reason 0x02 (the host was broken into)") {
			t.Errorf("no reason in\n%s", packets)
		}
		status, _, _ := g.run(nil, "--status-fd", "1", "--verify", early, file(t, "message", []byte("a message")))
		if !strings.Contains(status, "REVKEYSIG") {
			t.Errorf("gpg --verify: %s", status)
		}
		out, _, err := run(t, nil, nil, "sq", "inspect", file(t, "cert.pgp", s.cert))
		if err != nil || !strings.Contains(out, "Revoked") {
			t.Errorf("sq inspect: %v\n%s", err, out)
		}
		for _, at := range []time.Time{created.Add(time.Hour), created.AddDate(0, 0, 11)} {
			if _, err := s.parsed(t).SigningKeyAt(s.signer.Public(), at); !errors.Is(err, openpgp.ErrKeyUnusable) {
				t.Errorf("SigningKeyAt %v: %v, want ErrKeyUnusable", at, err)
			}
		}
		if _, err := s.amend(t, 20).AddUserID("x"); !errors.Is(err, openpgp.ErrKeyUnusable) {
			t.Errorf("amended after that: %v, want ErrKeyUnusable", err)
		}
	})
}

func TestAmendErrors(t *testing.T) {
	s := newSubject(t, ed, false)
	counting := &countingSigner{Signer: s.keyKind.primary()}
	a := s.amend(t, 1)
	a.Primary = counting
	early, other := a, a
	early.At = created
	other.Primary = extra.primary()
	later := a.At.AddDate(1, 0, 0)
	for name, f := range map[string]struct {
		do   func() ([]byte, error)
		want error
	}{
		"no later than the last":   {func() ([]byte, error) { return early.Renew(later) }, openpgp.ErrMalformed},
		"a fraction of a second":   {func() ([]byte, error) { b := a; b.At = b.At.Add(1); return b.Renew(later) }, openpgp.ErrMalformed},
		"another primary key":      {func() ([]byte, error) { return other.Renew(later) }, openpgp.ErrKeyNotFound},
		"expires at once":          {func() ([]byte, error) { return a.Renew(a.At) }, openpgp.ErrMalformed},
		"expires after 2106":       {func() ([]byte, error) { return a.Renew(a.At.AddDate(100, 0, 0)) }, openpgp.ErrMalformed},
		"a subkey that is none":    {func() ([]byte, error) { return a.ExpireSubkey(extra.primary(), later) }, openpgp.ErrKeyNotFound},
		"the user ID twice":        {func() ([]byte, error) { return a.AddUserID(userID) }, openpgp.ErrMalformed},
		"a user ID of blanks":      {func() ([]byte, error) { return a.AddUserID(" ") }, openpgp.ErrMalformed},
		"the subkey twice":         {func() ([]byte, error) { return a.AddSubkey(s.signer, later) }, openpgp.ErrMalformed},
		"the primary as a subkey":  {func() ([]byte, error) { return a.AddSubkey(s.keyKind.primary(), later) }, openpgp.ErrMalformed},
		"a reason that is none":    {func() ([]byte, error) { return a.Revoke(4, "") }, openpgp.ErrMalformed},
		"a reason with a new line": {func() ([]byte, error) { return a.Revoke(openpgp.Retired, "a\nb") }, openpgp.ErrMalformed},
		"a long reason":            {func() ([]byte, error) { return a.Revoke(openpgp.Retired, strings.Repeat("x", 256)) }, openpgp.ErrMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := f.do()
			if got != nil || !errors.Is(err, f.want) {
				t.Errorf("got %d bytes, %v; want %v", len(got), err, f.want)
			}
			if len(counting.raw) != 0 {
				t.Errorf("the primary key was asked for %d signatures", len(counting.raw))
			}
		})
	}
	if !bytes.Equal(s.parsed(t).Bytes(), s.cert) {
		t.Error("the certificate was changed")
	}
}

// extra is a key that no subject has.
var extra = kind("p256", 19, crypto.SHA256, ecKey(elliptic.P256()))
