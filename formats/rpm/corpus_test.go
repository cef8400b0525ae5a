//go:build corpus

package rpm_test

import (
	"bytes"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/signwarden/signwarden/formats/rpm"
)

// sources are source packages of rpmbuild with every compressor.
func sources(t *testing.T) map[string][]byte {
	t.Helper()
	all := map[string][]byte{}
	for _, c := range compressors {
		dir := t.TempDir()
		path := filepath.Join(dir, "demo.spec")
		err := os.WriteFile(path, []byte(spec), 0o600)
		if err != nil {
			t.Fatal(err)
		}
		out, err := rpmbuild(dir, path, "-bs", "--define", "_source_payload "+c)
		found, gerr := filepath.Glob(filepath.Join(dir, "SRPMS/*.rpm"))
		if err != nil || gerr != nil || len(found) != 1 {
			t.Fatalf("rpmbuild: %v\n%s", err, out)
		}
		all["source "+c] = read(t, found[0])
	}
	return all
}

// All packages of the corpus, and source packages with every compressor: rpmkeys verifies the packages signed by the keys
// that it knows of, gpg and sq each signature of every key over the bytes that it covers.
func TestCorpus(t *testing.T) {
	subjects := []subject{rsa4096(), ed(), p256()}
	env := gpgHome(t)
	certs := map[string]string{}
	for _, s := range subjects {
		var armored bytes.Buffer
		err := s.cert.Armor(&armored)
		if err != nil {
			t.Fatal(err)
		}
		certs[s.name] = file(t, "cert.asc", armored.Bytes())
		out, err := run(t, env, "gpg", "--batch", "--import", certs[s.name])
		if err != nil {
			t.Fatalf("gpg: %v\n%s", err, out)
		}
	}
	db := rpmDB(t, rsa4096(), ed())
	all := corpus(t)
	maps.Copy(all, sources(t))
	byRPM, byGPG, bySQ, srpms := 0, 0, 0, 0
	for _, name := range slices.Sorted(maps.Keys(all)) {
		t.Run(name, func(t *testing.T) {
			if open(t, all[name]).Header.Source {
				srpms++
			}
			for _, s := range subjects {
				for _, o := range []rpm.Options{{}, {OpenPGP: true}} {
					b := sign(t, all[name], s, o)
					p := open(t, b)
					if s.name != "p256" { // rpm 4.18 reads no ECDSA
						rpmkeysOK(t, db, b)
						byRPM++
					}
					sigs, err := p.Signatures()
					if err != nil || len(sigs) == 0 {
						t.Fatalf("%d signatures, %v", len(sigs), err)
					}
					for _, sig := range sigs {
						message := p.Header.Bytes()
						if sig.Payload {
							_, message = sigTags(t, b)
						}
						packet, content := file(t, "sig", sig.Packet), file(t, "message", message)
						out, err := run(t, env, "gpg", "--batch", "--verify", packet, content)
						if err != nil || !strings.Contains(out, "Good signature") {
							t.Errorf("gpg on tag %d: %v\n%s", sig.Tag, err, out)
						} else {
							byGPG++
						}
						out, err = run(t, nil, "sq", "verify", "--signer-cert", certs[s.name], "--detached", packet, content)
						if err != nil || !strings.Contains(out, "1 good signature") {
							t.Errorf("sq on tag %d: %v\n%s", sig.Tag, err, out)
						} else {
							bySQ++
						}
					}
				}
			}
		})
	}
	t.Logf("%d packages, of which %d are source packages, by %d keys: %d verified by rpmkeys -K; %d signatures by gpg, %d by sq",
		len(all), srpms, len(subjects), byRPM, byGPG, bySQ)
}
