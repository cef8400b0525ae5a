//go:build corpus

package pe_test

import (
	"bytes"
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/signwarden/signwarden/formats/cms"
	"github.com/signwarden/signwarden/formats/hostiletest"
	"github.com/signwarden/signwarden/formats/pe"
)

// images are EFI images of the distribution, which softhsm-tests/corpus.sh has unpacked in $SIGNWARDEN_CORPUS; or those of
// the system.
func images(t testing.TB) []string {
	t.Helper()
	root := os.Getenv("SIGNWARDEN_CORPUS")
	if root == "" {
		root = "/"
	}
	var all []string
	for _, pattern := range []string{
		"usr/lib/shim/*.efi*", // the .signed ones are by Microsoft and Debian
		"usr/lib/systemd/boot/efi/*.efi*",
		"usr/lib/grub/x86_64-efi/monolithic/*.efi",
		"usr/lib/grub/x86_64-efi-signed/*.signed",
		"usr/lib/efitools/x86_64-linux-gnu/*.efi",
		"boot/vmlinuz-*-cloud-amd64",
	} {
		found, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil || len(found) == 0 {
			t.Fatalf("required corpus: no %s under %s: make corpus", pattern, root)
		}
		all = append(all, found...)
	}
	return all
}

// All images: the digest is pesign's, sbverify and osslsigncode verify what we sign, signatures that were there stay good,
// sbsign's goes beside ours in either order, and sbattach detaches ours.
func TestCorpus(t *testing.T) {
	signers := []subject{newSubject(t, "rsa"), newSubject(t, "p256")}
	theirs := newSubject(t, "other")
	counts := struct{ images, signed, digests, sbverify, osslsigncode, beside, detached int }{}
	for _, path := range images(t) {
		t.Run(filepath.Base(path), func(t *testing.T) {
			image := read(t, path)
			checkDigest(t, image)
			counts.images++
			counts.digests++
			old := len(parse(t, image).Signatures())
			if old > 0 {
				counts.signed++
			}
			checkOwn(t, image)
			for _, s := range signers {
				signed := sign(t, s, image, pe.Options{})
				checkDigest(t, signed)
				checkPeers(t, s, signed, old == 0)
				all, err := parse(t, signed).Verify([]*x509.Certificate{s.cert})
				if err != nil || len(all) != old+1 || all[old].Err != nil {
					t.Errorf("Verify: %v", err)
				}
				if out := run(t, "sbverify", "--list", file(t, "signed.efi", signed)); strings.Count(out, "image signature issuers") != old+1 {
					t.Errorf("sbverify lists not %d signatures:\n%s", old+1, out)
				}
				checkOwn(t, signed)
				alone := sign(t, s, image, pe.Options{Replace: true})
				checkPeers(t, s, alone, true)
				path := file(t, "alone.efi", alone)
				run(t, "sbattach", "--detach", path+".sig", "--remove", path)
				if sig := read(t, path+".sig"); !bytes.HasPrefix(sig, parse(t, alone).Signatures()[0]) {
					t.Error("sbattach detached something else")
				}
				counts.digests++
				counts.sbverify += 2
				counts.osslsigncode++
				counts.detached++
			}
			ours := signers[0]
			for _, both := range [][]byte{
				sign(t, ours, sbsign(t, theirs, image), pe.Options{}),
				sbsign(t, theirs, sign(t, ours, image, pe.Options{})),
			} {
				checkPeers(t, ours, both, false)
				checkPeers(t, theirs, both, false)
				counts.beside++
			}
		})
	}
	if counts.signed == 0 || counts.signed == counts.images {
		t.Errorf("%d of %d images were signed", counts.signed, counts.images)
	}
	t.Logf("%d images, of which %d were signed; %d digests the same as pesign's; %d signatures verified by sbverify, %d by osslsigncode; "+
		"%d beside sbsign's; %d detached by sbattach", counts.images, counts.signed, counts.digests, counts.sbverify, counts.osslsigncode,
		counts.beside, counts.detached)
}

// checkOwn asserts that the signatures that an image has are good by the certificates that they bring along.
func checkOwn(t *testing.T, image []byte) {
	t.Helper()
	for _, der := range parse(t, image).Signatures() {
		p, err := cms.Parse(der)
		if err != nil {
			t.Fatal(err)
		}
		_, err = parse(t, image).Verify(p.Certificates)
		if err != nil {
			t.Errorf("a signature that was there: %v", err)
		}
	}
}

// sbsign signs with sbsign.
func sbsign(t testing.TB, s subject, image []byte) []byte {
	t.Helper()
	path := file(t, "image.efi", image)
	run(t, "sbsign", "--key", s.keyFile, "--cert", s.certFile, "--output", path+".signed", path)
	return read(t, path+".signed")
}

// Damaged images of the distribution.
func TestCorpusMutations(t *testing.T) {
	hostiletest.Run(t, func(t *testing.T) hostiletest.Files {
		s := newSubject(t, "p256")
		var seeds [][]byte
		for _, path := range images(t) {
			if b := read(t, path); len(b) < 150<<10 {
				seeds = append(seeds, b)
			}
		}
		if len(seeds) < 10 {
			t.Fatalf("%d seeds", len(seeds))
		}
		n := 0
		return hostiletest.Files{Seeds: seeds, Mutate: damage, Try: func(t testing.TB, _, b []byte) error {
			n++
			return check(t, s, b, n%50 == 0)
		}}
	})
}
