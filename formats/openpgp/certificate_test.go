package openpgp_test

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/signwarden/signwarden/formats/openpgp"
)

// colons returns the fields of the first line of a gpg --with-colons listing that begins with tag.
func colons(t *testing.T, listing, tag string) []string {
	t.Helper()
	for line := range strings.Lines(listing) {
		f := strings.Split(strings.TrimSpace(line), ":")
		if f[0] == tag {
			return f
		}
	}
	t.Fatalf("no %q line in\n%s", tag, listing)
	return nil
}

func TestCertificateGPG(t *testing.T) {
	eachSubject(t, func(t *testing.T, s subject) {
		g := newGPG(t)
		g.must(s.cert, "--import")
		list, _ := g.must(nil, "--list-keys", "--with-colons", "--fingerprint", "--fingerprint")
		t.Log(list)
		packets, _ := g.must(s.cert, "--list-packets", "--verbose")
		t.Log(packets)
		// Field 12 of --with-colons are the capabilities; lower case are the key's own.
		pub, caps := colons(t, list, "pub"), "c"
		if s.single {
			caps = "sc"
		}
		if got := strings.TrimRight(pub[11], "SCE"); got != caps {
			t.Errorf("capabilities of the primary key: got %q, want %q", got, caps)
		}
		if pub[5] != fmt.Sprint(created.Unix()) || pub[6] != "" {
			t.Errorf("created, expires: got %q, %q", pub[5], pub[6])
		}
		if pub[3] != fmt.Sprint(s.algo) {
			t.Errorf("algorithm: got %s, want %d", pub[3], s.algo)
		}
		if got, want := colons(t, list, "fpr")[9], s.parsed(t).Fingerprint().String(); got != want {
			t.Errorf("fingerprint: gpg has %s, we %s", got, want)
		}
		if !s.single {
			sub := colons(t, list, "sub")
			if sub[11] != "s" {
				t.Errorf("capabilities of the subkey: got %q, want s", sub[11])
			}
			if !strings.Contains(list, s.key.Fingerprint.String()) {
				t.Errorf("subkey %s not in\n%s", s.key.Fingerprint, list)
			}
		}
		check, _ := g.must(nil, "--check-sigs", "--with-colons")
		if strings.Contains(check, "sig:-") || strings.Contains(check, "sig:%") || !strings.Contains(check, "sig:!") {
			t.Errorf("gpg --check-sigs:\n%s", check)
		}
		noCriticalNoSHA1(t, packets)
	})
}

// noCriticalNoSHA1 reads a gpg --list-packets listing.
func noCriticalNoSHA1(t *testing.T, packets string) {
	t.Helper()
	if strings.Contains(packets, "critical") {
		t.Errorf("a critical subpacket in\n%s", packets)
	}
	for _, m := range regexp.MustCompile(`digest algo (\d+)`).FindAllStringSubmatch(packets, -1) {
		if m[1] != "8" && m[1] != "9" && m[1] != "10" {
			t.Errorf("digest algo %s in\n%s", m[1], packets)
		}
	}
	if !strings.Contains(packets, "hashed subpkt 33") || !strings.Contains(packets, "\tsubpkt 16") {
		t.Errorf("an issuer subpacket is missing in\n%s", packets)
	}
}

func TestCertificateSequoia(t *testing.T) {
	eachSubject(t, func(t *testing.T, s subject) {
		path := file(t, "cert.pgp", s.cert)
		out, errOut, err := run(t, nil, nil, "sq", "inspect", "--certifications", path)
		if err != nil {
			t.Fatalf("sq inspect: %v\n%s%s", err, out, errOut)
		}
		t.Log(out)
		if strings.Contains(out, "nvalid") || strings.Contains(errOut, "nvalid") {
			t.Errorf("sq inspect finds something invalid:\n%s%s", out, errOut)
		}
		for _, fpr := range []string{s.parsed(t).Fingerprint().String(), s.key.Fingerprint.String()} {
			if !strings.Contains(out, fpr) {
				t.Errorf("no %s in\n%s", fpr, out)
			}
		}
		flags := []string{"certification, signing"}
		if !s.single {
			flags = []string{"Key flags: certification\n", "Key flags: signing\n"}
		}
		for _, f := range flags {
			if !strings.Contains(out, f) {
				t.Errorf("no %q in\n%s", f, out)
			}
		}
		dump, errOut, err := run(t, nil, nil, "sq", "packet", "dump", path)
		if err != nil {
			t.Fatalf("sq packet dump: %v\n%s", err, errOut)
		}
		if strings.Contains(dump, "critical") || strings.Contains(dump, "SHA1") {
			t.Errorf("sq packet dump:\n%s", dump)
		}
	})
}

// rpm 4.18 with libgcrypt knows RSA and Ed25519 only. What it makes of ECDSA is asserted, so that a newer rpm is noticed.
func TestCertificateRPM(t *testing.T) {
	eachSubject(t, func(t *testing.T, s subject) {
		_, out, err := rpmImport(t, s)
		if s.algo == 19 {
			if err == nil || !strings.Contains(out, "import failed") {
				t.Errorf("rpmkeys --import of ECDSA: %v\n%s", err, out)
			}
			return
		}
		if err != nil {
			t.Fatalf("rpmkeys --import: %v\n%s", err, out)
		}
	})
}

func TestCertificateExpiry(t *testing.T) {
	expires := time.Date(2100, 1, 2, 3, 4, 5, 0, time.UTC)
	s := makeSubject(t, ed, false, openpgp.CertificateSpec{UserID: userID, Created: created, Expires: expires})
	if !s.key.Expires.Equal(expires) {
		t.Errorf("Expires: got %v, want %v", s.key.Expires, expires)
	}
	g := newGPG(t)
	g.must(s.cert, "--import")
	list, _ := g.must(nil, "--list-keys", "--with-colons")
	for _, tag := range []string{"pub", "sub"} {
		if got, want := colons(t, list, tag)[6], fmt.Sprint(expires.Unix()); got != want {
			t.Errorf("%s expires: got %s, want %s", tag, got, want)
		}
	}
	// A certificate made anew from the same keys, later, replaces the expiry in a keyring that has the old one.
	later := expires.AddDate(1, 0, 0)
	renewed := makeSubject(t, ed, false, openpgp.CertificateSpec{
		UserID: userID, Created: created, Expires: later, Signed: created.AddDate(1, 0, 0),
	})
	g.must(renewed.cert, "--import")
	list, _ = g.must(nil, "--list-keys", "--with-colons")
	for _, tag := range []string{"pub", "sub"} {
		if got, want := colons(t, list, tag)[6], fmt.Sprint(later.Unix()); got != want {
			t.Errorf("%s renewed, expires: got %s, want %s", tag, got, want)
		}
	}
}
