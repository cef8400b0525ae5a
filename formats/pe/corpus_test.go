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
	"github.com/signwarden/signwarden/formats/pe"
)

// images are EFI images of the distribution. The kernel may be unpacked elsewhere, with dpkg -x, than in the system.
func images(t *testing.T) []string {
	t.Helper()
	root := os.Getenv("SIGNWARDEN_CORPUS")
	var all []string
	for pattern, where := range map[string]string{
		"/usr/lib/shim/*.efi*":                                 "shim-unsigned, shim-signed, shim-helpers-amd64-signed",
		"/usr/lib/systemd/boot/efi/*.efi*":                     "systemd-boot-efi",
		"/usr/lib/grub/x86_64-efi/monolithic/*.efi":            "grub-efi-amd64-bin",
		"/usr/lib/efitools/x86_64-linux-gnu/*.efi":             "efitools",
		filepath.Join("/", root, "boot/vmlinuz-*-cloud-amd64"): "linux-image-cloud-amd64; or unpacked in $SIGNWARDEN_CORPUS",
	} {
		found, err := filepath.Glob(pattern)
		if err != nil || len(found) == 0 {
			t.Fatalf("required corpus: no %s (Debian: %s)", pattern, where)
		}
		all = append(all, found...)
	}
	return all
}

func TestCorpus(t *testing.T) {
	signers := []subject{newSubject(t, "rsa"), newSubject(t, "p256")}
	already := 0
	for _, path := range images(t) {
		t.Run(filepath.Base(path), func(t *testing.T) {
			image := read(t, path)
			checkDigest(t, image)
			old := len(parse(t, image).Signatures())
			if old > 0 {
				already++
			}
			for _, der := range parse(t, image).Signatures() { // whoever signed it, it is good by what it brings along
				p, err := cms.Parse(der)
				if err != nil {
					t.Fatal(err)
				}
				_, err = parse(t, image).Verify(p.Certificates)
				if err != nil {
					t.Errorf("its own signature: %v", err)
				}
			}
			for _, s := range signers {
				signed := sign(t, s, image, pe.Options{})
				checkPeers(t, s, signed, old == 0)
				all, err := parse(t, signed).Verify([]*x509.Certificate{s.cert})
				if err != nil || len(all) != old+1 || all[old].Err != nil {
					t.Errorf("Verify: %v", err)
				}
				if out := run(t, "sbverify", "--list", file(t, "signed.efi", signed)); strings.Count(out, "image signature issuers") != old+1 {
					t.Errorf("sbverify lists not %d signatures:\n%s", old+1, out)
				}
				alone := sign(t, s, image, pe.Options{Replace: true})
				checkPeers(t, s, alone, true)
				path := file(t, "alone.efi", alone)
				run(t, "sbattach", "--detach", path+".sig", "--remove", path)
				if sig := read(t, path+".sig"); !bytes.HasPrefix(sig, parse(t, alone).Signatures()[0]) {
					t.Error("sbattach detached something else")
				}
			}
		})
	}
	if already == 0 {
		t.Error("none of the images was signed")
	}
}
