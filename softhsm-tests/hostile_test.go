package softhsm_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/signwarden/signwarden/formats/hostiletest"
)

// hostileFormats are the formats that are read before they are signed.
var hostileFormats = []struct {
	name, key, ext string
	seeds          func(t testing.TB) [][]byte
	args           []string // besides sign NAME --key KEY
	format         string   // of the policy
	verify         []string // besides verify NAME --key KEY
	suffix         string   // of what is written; empty: in place
}{
	{"rpm", "ed", ".rpm", rpmSeeds, nil, "rpm", nil, ""},
	{"kmod", "p256", "", kmodSeeds, nil, "kmod", nil, ""},
	{"efi", "p256", ".efi", efiSeeds, nil, "authenticode", nil, ""},
	{"efivar", "p256", ".esl", eslSeeds, []string{"--variable", "db"}, "efi-variable", []string{"--variable", "db"}, ".auth"},
}

func rpmSeeds(t testing.TB) [][]byte {
	var all [][]byte
	for _, f := range append(buildRPMs(t, 1), distributionRPMs(t)...) {
		if b := readFile(t, f); len(b) < 20<<10 {
			all = append(all, b)
		}
	}
	return all
}

// kmodSeeds are a compiled module, plain and in every packing.
func kmodSeeds(t testing.TB) [][]byte {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	writeFile(t, at("m.c"), "static int table[900] = {1, 2}; int init_module(void) { return table[1]; }\n")
	mustEnv(t, os.Environ(), "gcc", "-c", "-g", "-o", at("m.ko"), at("m.c"))
	mustEnv(t, os.Environ(), "xz", "-k", "--check=crc32", "--lzma2=dict=1MiB", at("m.ko"))
	mustEnv(t, os.Environ(), "zstd", "-q", at("m.ko"))
	mustEnv(t, os.Environ(), "gzip", "-k", "-n", at("m.ko"))
	return [][]byte{readFile(t, at("m.ko")), readFile(t, at("m.ko.xz")), readFile(t, at("m.ko.zst")), readFile(t, at("m.ko.gz"))}
}

func efiSeeds(t testing.TB) [][]byte {
	var all [][]byte
	for _, pattern := range []string{"/usr/lib/efitools/*/*.efi", "/usr/share/efitools/efi/*.efi", "/usr/lib/systemd/boot/efi/*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range found {
			if b := readFile(t, f); len(b) < 90<<10 && bytes.HasPrefix(b, []byte("MZ")) {
				all = append(all, b)
			}
		}
	}
	return all
}

func eslSeeds(t testing.TB) [][]byte {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	mustEnv(t, os.Environ(), "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", at("key"), "-out", at("cert"), "-subj", "/CN=x", "-days", "2")
	mustEnv(t, os.Environ(), "cert-to-efi-sig-list", at("cert"), at("cert.esl"))
	mustEnv(t, os.Environ(), "sh", "-c", "hash-to-efi-sig-list $(ls /usr/lib/efitools/*/*.efi /usr/share/efitools/efi/*.efi 2>/dev/null | head -n 3) "+at("hash.esl"))
	return [][]byte{readFile(t, at("cert.esl")), readFile(t, at("hash.esl")), append(readFile(t, at("hash.esl")), readFile(t, at("cert.esl"))...)}
}

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// A directory of damaged files: each is signed and verifies, or is left as it was
// and told of in one line. Only what is signed has reached the gateway, and the
// client stays under 64 MiB.
func TestHostileFiles(t *testing.T) {
	g := newGateway(t)
	g.key(t, "ed", "ed25519")
	cert := g.x509Key(t, "p256", "p256")
	for _, f := range hostileFormats {
		t.Run(f.name, func(t *testing.T) {
			seeds := f.seeds(t)
			if len(seeds) < 2 {
				t.Fatalf("%d seeds", len(seeds))
			}
			h := &hostile{g: g, dir: t.TempDir(), before: map[string][32]byte{}}
			r := rand.New(rand.NewPCG(3, 4))
			for i := range hostileFiles {
				b := seeds[i%len(seeds)]
				if i >= len(seeds) { // the first are as they were
					b = hostiletest.Damage(r, b)
				}
				ext := f.ext
				if f.name == "kmod" {
					ext = []string{".ko", ".ko.xz", ".ko.zst", ".ko.gz"}[i%4]
				}
				h.add(t, fmt.Sprintf("%05d%s", i, ext), b)
			}
			row := g.audit(t, 1)[0].Row
			signed, failed := h.sign(t, append([]string{"sign", f.name, "--key", f.key}, f.args...))
			if len(signed) < len(seeds) || len(failed) < hostileFiles/10 {
				t.Errorf("%d signed, %d failed: the files are not what they should be", len(signed), len(failed))
			}
			h.recorded(t, row, f.format, signed)
			h.untouched(t, failed, len(signed), f.suffix)
			var made []string
			for _, s := range signed {
				made = append(made, s+f.suffix)
			}
			verify := append([]string{"verify", f.name, "--key", f.key}, f.verify...)
			out := g.must(t, "signwarden", append(verify, made...)...)
			if n := strings.Count(out, ": good signature by "); n != len(signed) {
				t.Errorf("%d of %d verify", n, len(signed))
			}
			switch f.name { // what rpm and sbverify take is the same, damaged or not
			case "rpm":
				allOK(t, g.rpmdb(t, "ed"), signed)
			case "efi":
				for _, image := range signed[:100] {
					mustEnv(t, os.Environ(), "sbverify", "--cert", cert, image)
				}
			}
			if f.suffix == "" { // what was never signed does not verify
				h.verify(t, verify, failed)
			}
		})
	}
}

// hostile is a directory of damaged files.
type hostile struct {
	g      *gateway
	dir    string
	before map[string][32]byte // of each file by its path
}

func (h *hostile) add(t testing.TB, name string, b []byte) string {
	t.Helper()
	path := filepath.Join(h.dir, name)
	if err := os.WriteFile(path, b, 0o640); err != nil {
		t.Fatal(err)
	}
	h.before[path] = sha256.Sum256(b)
	return path
}

// run runs the client, whose memory is bounded, and returns what it prints.
func (h *hostile) run(t testing.TB, args []string) result {
	t.Helper()
	r, kib := h.g.measured(t, args...)
	t.Logf("%q: %d KiB of memory", args[:2], kib)
	if kib<<10 >= hostiletest.Ceiling {
		t.Errorf("the client took %d KiB, want under %d", kib, hostiletest.Ceiling>>10)
	}
	return r
}

// sign runs the client over the directory, and returns which files it signed and
// which it did not.
func (h *hostile) sign(t testing.TB, args []string) (signed, failed []string) {
	t.Helper()
	r := h.run(t, append(args, "-o", "jsonl", "-r", h.dir))
	if r.code != 6 {
		t.Errorf("exit code %d, want 6", r.code)
	}
	seen := map[string]bool{}
	for line := range strings.Lines(r.stdout) {
		var o struct{ File, Status, Error string }
		if err := json.Unmarshal([]byte(line), &o); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if _, ok := h.before[o.File]; !ok || seen[o.File] {
			t.Errorf("%s is told of again, or is none of the files", o.File)
		}
		seen[o.File] = true
		switch {
		case o.Status == "signed" && o.Error == "":
			signed = append(signed, o.File)
		case o.Status == "failed" && o.Error != "":
			failed = append(failed, o.File)
		default:
			t.Errorf("%q", line)
		}
	}
	if len(seen) != len(h.before) {
		t.Errorf("%d of %d files are told of", len(seen), len(h.before))
	}
	h.oneLineEach(t, r.stderr, failed)
	return signed, failed
}

// verify runs the client over files of which none verifies.
func (h *hostile) verify(t testing.TB, args, files []string) {
	t.Helper()
	r := h.run(t, append(args, files...))
	if r.code != 3 || strings.Contains(r.stdout, "good signature") {
		t.Errorf("exit code %d, want 3:\n%.2000s", r.code, r.stdout)
	}
	h.oneLineEach(t, r.stderr, files)
}

// oneLineEach asserts that a person is told of each file in one line, and of
// nothing else but what to do and the sum.
func (h *hostile) oneLineEach(t testing.TB, stderr string, files []string) {
	t.Helper()
	told := map[string]int{}
	for line := range strings.Lines(stderr) {
		line = strings.TrimSuffix(line, "\n")
		path, what, ok := strings.Cut(strings.TrimPrefix(line, "signwarden: "), ": ")
		_, ours := h.before[path]
		switch {
		case strings.HasPrefix(line, "signwarden: ") && ok && ours && what != "":
			told[path]++
		case strings.HasPrefix(line, "hint: "), strings.HasSuffix(line, " files were not signed"):
		default:
			t.Errorf("a line of its own: %.300q", line)
		}
		if len(line) > 700 || strings.IndexFunc(line, func(r rune) bool { return !strconv.IsPrint(r) }) >= 0 {
			t.Errorf("not a clear line: %.700q", line)
		}
	}
	for _, f := range files {
		if told[f] != 1 {
			t.Errorf("%s is told of in %d lines", f, told[f])
		}
	}
	if len(told) != len(files) {
		t.Errorf("%d files are told of, want %d", len(told), len(files))
	}
}

// recorded asserts that what was signed, and nothing else, has reached the gateway
// since a row: once, or twice for a package that says nothing of its payload.
func (h *hostile) recorded(t testing.TB, after int64, format string, signed []string) {
	t.Helper()
	c := h.g.client(t, "admin")
	rows := map[string]int{}
	for from := after + 1; ; {
		_, entries, err := c.AuditEntries(t.Context(), from, 1000)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			var row struct {
				Outcome, Format string
				File            string `json:"claim_file"`
			}
			if err := json.Unmarshal(e, &row); err != nil || row.Outcome != "signed" || row.Format != format {
				t.Errorf("recorded: %s (%v)", e, err)
			}
			rows[row.File]++
		}
		if len(entries) == 0 {
			break
		}
		from += int64(len(entries))
	}
	for _, f := range signed {
		if n := rows[filepath.Base(f)]; n != 1 && (n != 2 || format != "rpm") {
			t.Errorf("%s was asked for %d times", f, n)
		}
	}
	if len(rows) != len(signed) {
		t.Errorf("%d files were asked for, of which %d were signed", len(rows), len(signed))
	}
}

// untouched asserts that the files are as they were, and that nothing lies beside
// them but so many files with the suffix.
func (h *hostile) untouched(t testing.TB, files []string, more int, suffix string) {
	t.Helper()
	for _, f := range files {
		if sha256.Sum256(readFile(t, f)) != h.before[f] {
			t.Errorf("%s was changed", f)
		}
	}
	entries, err := os.ReadDir(h.dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		path := filepath.Join(h.dir, e.Name())
		if _, ok := h.before[path]; ok {
			continue
		}
		_, ok := h.before[strings.TrimSuffix(path, suffix)]
		if !ok {
			t.Errorf("%s was left behind", path)
		}
		more--
	}
	if suffix != "" && more != 0 {
		t.Errorf("%d files with %s are missing", more, suffix)
	}
}

// Damaged detached signatures: each is told of in one line, none verifies another
// content, and the gateway is asked for nothing but the key. Over the content that
// was signed some are good: not all that is in a message is signed.
func TestHostileSignatures(t *testing.T) {
	g := newGateway(t)
	g.key(t, "ed", "ed25519")
	g.x509Key(t, "p256", "p256")
	dir := t.TempDir()
	content := filepath.Join(dir, "content")
	writeFile(t, content, strings.Repeat("content", 1000))
	rootHash := filepath.Join(dir, "hash")
	writeFile(t, rootHash, strings.Repeat("0a", 32)+"\n")
	for _, f := range []struct{ name, key, file, suffix string }{
		{"openpgp", "ed", content, ".sig"},
		{"cms", "p256", content, ".p7s"},
		{"fsverity", "p256", content, ".fsv-sig"},
		{"dmverity", "p256", rootHash, ".p7s"},
	} {
		t.Run(f.name, func(t *testing.T) {
			good := filepath.Join(t.TempDir(), "good")
			g.must(t, "signwarden", "sign", f.name, "--key", f.key, "--output", good, f.file)
			h := &hostile{g: g, dir: t.TempDir(), before: map[string][32]byte{}}
			r := rand.New(rand.NewPCG(5, 6))
			sig, b := readFile(t, good), readFile(t, f.file)
			other := bytes.Clone(b)
			other[0] = '1'
			var same, others []string
			for i := range 500 {
				damaged := hostiletest.Damage(r, sig)
				same = append(same, h.add(t, fmt.Sprintf("%05d", i), b))
				others = append(others, h.add(t, fmt.Sprintf("%05d-other", i), other))
				for _, path := range []string{same[i], others[i]} {
					if err := os.WriteFile(path+f.suffix, damaged, 0o640); err != nil {
						t.Fatal(err)
					}
				}
			}
			rows := len(g.audit(t, 1000))
			verify := []string{"verify", f.name, "--key", f.key}
			h.verify(t, verify, others)
			out := h.run(t, append(verify, same...))
			told := map[string]bool{}
			for line := range strings.Lines(out.stdout) {
				path, _, ok := strings.Cut(line, ": good signature by ")
				if !ok || told[path] {
					t.Errorf("on standard output: %q", line)
				}
				told[path] = true
			}
			bad := slices.DeleteFunc(slices.Clone(same), func(path string) bool { return told[path] })
			h.oneLineEach(t, out.stderr, bad)
			if out.code != 3 || len(bad) < len(same)/2 {
				t.Errorf("exit code %d, %d of %d are bad", out.code, len(bad), len(same))
			}
			if now := len(g.audit(t, 1000)); now != rows {
				t.Errorf("%d rows for nothing", now-rows)
			}
		})
	}
}
