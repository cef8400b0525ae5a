package main

import (
	"bytes"
	"crypto/sha1"
	"encoding/pem"
	"fmt"
	"maps"
	"os/exec"
	"slices"
	"strings"

	"github.com/signwarden/signwarden/formats/openpgp"
	"github.com/signwarden/signwarden/gateway/client"
)

// The values of ownertrust, as gpg --export-ownertrust has them.
const (
	ultimate   = "6"
	noOwnTrust = "2" // gpg takes a value back in no other way
)

// importOpenPGP imports the certificates of keys that we may sign with, trusted: they
// come from the gateway, over its authenticated connection.
func (s *setup) importOpenPGP(all []client.Key) error {
	there, err := s.fingerprints("gpg")
	if err != nil {
		return err
	}
	trusted, err := s.ownertrust()
	if err != nil {
		return err
	}
	var certs, trust bytes.Buffer
	var told []string
	for _, k := range all {
		if !k.MaySign || k.OpenPGP == nil {
			continue
		}
		cert, err := openpgp.ParseCertificate(k.OpenPGP.Certificate)
		if err != nil {
			return fmt.Errorf("certificate of %q: %w", k.Name, err)
		}
		fpr := fmt.Sprint(cert.Fingerprint())
		s.noteTrust(fpr, there, trusted)
		certs.Write(k.OpenPGP.Certificate)
		fmt.Fprintf(&trust, "%s:%s:\n", fpr, ultimate)
		told = append(told, fmt.Sprintf("%s: certificate %s, trusted: %s", k.Name, fpr, k.OpenPGP.UserID))
	}
	if len(told) == 0 {
		s.say("you may sign with no key that has an OpenPGP certificate")
		return nil
	}
	if err := s.note(); err != nil {
		return err
	}
	if err := s.home.run(&certs, "gpg", "--batch", "--quiet", "--import"); err != nil {
		return err
	}
	if err := s.home.run(&trust, "gpg", "--batch", "--quiet", "--import-ownertrust"); err != nil {
		return err
	}
	for _, line := range told {
		s.say("%s", line)
	}
	return nil
}

// noteTrust adds a certificate to what is to be taken back: its removal where it was
// not there, and else its ownertrust as it was.
func (s *setup) noteTrust(fpr string, there map[string]bool, trusted map[string]string) {
	_, noted := s.done.Trust[fpr]
	if noted || slices.Contains(s.done.OpenPGP, fpr) {
		return
	}
	if !there[fpr] {
		s.done.OpenPGP = append(s.done.OpenPGP, fpr)
		return
	}
	if trusted[fpr] == ultimate {
		return
	}
	if s.done.Trust == nil {
		s.done.Trust = map[string]string{}
	}
	s.done.Trust[fpr] = trusted[fpr]
	if trusted[fpr] == "" {
		s.done.Trust[fpr] = noOwnTrust
	}
}

func (s *setup) removeOpenPGP() error {
	there, err := s.fingerprints("gpg")
	if err != nil {
		return err
	}
	for _, fpr := range s.done.OpenPGP {
		if !there[fpr] {
			continue
		}
		if err := s.home.run(nil, "gpg", "--batch", "--yes", "--quiet", "--delete-keys", fpr); err != nil {
			return err
		}
		s.say("removed certificate %s", fpr)
	}
	var trust bytes.Buffer
	for _, fpr := range slices.Sorted(maps.Keys(s.done.Trust)) {
		fmt.Fprintf(&trust, "%s:%s:\n", fpr, s.done.Trust[fpr])
		s.say("certificate %s: its ownertrust is again what it was", fpr)
	}
	if trust.Len() == 0 {
		return nil
	}
	return s.home.run(&trust, "gpg", "--batch", "--quiet", "--import-ownertrust")
}

// importX509 imports chains of keys that we may sign with, where there is a gpgsm.
func (s *setup) importX509(all []client.Key) error {
	if _, err := exec.LookPath("gpgsm"); err != nil {
		return nil
	}
	all = slices.DeleteFunc(slices.Clone(all), func(k client.Key) bool { return !k.MaySign || len(k.X509) == 0 })
	if len(all) == 0 {
		return nil
	}
	there, err := s.fingerprints("gpgsm")
	if err != nil {
		return err
	}
	var told []string
	for _, k := range all {
		for _, c := range k.X509 {
			fpr := x509Fingerprint(c.Raw)
			if !there[fpr] && !slices.Contains(s.done.X509, fpr) {
				s.done.X509 = append(s.done.X509, fpr)
			}
		}
		line := fmt.Sprintf("%s: X.509 certificate %s of %s", k.Name, x509Fingerprint(k.X509[0].Raw), k.X509[0].Subject)
		if needsRoot(k) {
			line += "; gpgsm signs with it only if the agent has its root: --trusted-root FILE"
		}
		told = append(told, line)
	}
	if err := s.note(); err != nil {
		return err
	}
	if err := s.home.importX509(all); err != nil {
		return err
	}
	for _, line := range told {
		s.say("%s", line)
	}
	return nil
}

func (s *setup) removeX509() error {
	if len(s.done.X509) == 0 {
		return nil
	}
	there, err := s.fingerprints("gpgsm")
	if err != nil {
		return err
	}
	for _, fpr := range s.done.X509 {
		if !there[fpr] {
			continue
		}
		if err := s.home.run(nil, "gpgsm", "--batch", "--yes", "--quiet", "--delete-keys", fpr); err != nil {
			return err
		}
		s.say("removed X.509 certificate %s", fpr)
	}
	return nil
}

// importX509 gives gpgsm the chains of keys.
func (h *gnupgHome) importX509(all []client.Key) error {
	var chains bytes.Buffer
	for _, k := range all {
		for _, c := range k.X509 {
			if err := pem.Encode(&chains, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}); err != nil {
				return err
			}
		}
	}
	return h.run(&chains, "gpgsm", "--batch", "--quiet", "--import")
}

// fingerprints are those of the certificates that gpg or gpgsm has.
func (s *setup) fingerprints(tool string) (map[string]bool, error) {
	cmd := exec.Command(tool, "--batch", "--with-colons", "--list-keys")
	cmd.Env = s.home.env
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("listing the certificates of %s: %w", tool, err)
	}
	fprs := map[string]bool{}
	for line := range strings.Lines(string(out)) {
		fields := strings.Split(line, ":")
		if fields[0] == "fpr" && len(fields) > 9 {
			fprs[fields[9]] = true
		}
	}
	return fprs, nil
}

// ownertrust is gpg's, by fingerprint.
func (s *setup) ownertrust() (map[string]string, error) {
	cmd := exec.Command("gpg", "--batch", "--export-ownertrust")
	cmd.Env = s.home.env
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("reading ownertrust: %w", err)
	}
	trust := map[string]string{}
	for line := range strings.Lines(string(out)) {
		fpr, value, ok := strings.Cut(strings.TrimSpace(line), ":")
		if ok && !strings.HasPrefix(fpr, "#") {
			trust[fpr] = strings.TrimSuffix(value, ":")
		}
	}
	return trust, nil
}

// x509Fingerprint is what gpgsm names a certificate by.
func x509Fingerprint(der []byte) string { return fmt.Sprintf("%X", sha1.Sum(der)) }

// needsRoot reports whether a key's certificate was issued by a CA, so that gpgsm wants its
// root.
func needsRoot(k client.Key) bool {
	last := k.X509[len(k.X509)-1]
	return len(k.X509) > 1 || !bytes.Equal(last.RawSubject, last.RawIssuer)
}
