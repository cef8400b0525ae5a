package openpgp_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/ProtonMail/go-crypto/openpgp/clearsign"
	"github.com/signwarden/signwarden/formats/openpgp"
)

// clearTexts are the texts that cleartext signatures have gone wrong with.
var clearTexts = []struct{ name, text string }{
	{"plain", "Origin: Example\nSuite: stable\n"},
	{"empty", ""},
	{"one newline", "\n"},
	{"newlines", "\n\n\n"},
	{"no final newline", "one\ntwo"},
	{"empty last line", "one\n\n"},
	{"dashes", "-\n--\n- already\n-----BEGIN PGP SIGNATURE-----\n -not\n---x"},
	{"armor inside", "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\nx\n-----END PGP SIGNATURE-----\n"},
	{"from", "From here\nFrom\nfrom there\n From\nFromage\n"},
	{"trailing blanks", "blank \ntab\t\nboth \t \n   \n\t\nend "},
	{"leading blanks", "  a\n\tb\n"},
	{"crlf", "one\r\ntwo\r\n\r\nthree\r\n"},
	{"crlf and blanks", "one \r\ntwo\t\r\n-three \r\n"},
	{"mixed ends", "one\r\ntwo\nthree\r\n"},
	{"final cr", "one\r"},
	{"utf-8", "Grüße, 署名, ключ \u2028 \u0085 \u00a0\n"},
	{"latin-1", "Gr\xfc\xdfe\n"},
	{"form feed", "a\f\nb\v \n"},
	{"nul", "a\x00b\n"},
	{"longest line", strings.Repeat("x", 19993) + "\nnext\n"},
	{"longest dashed line", "-" + strings.Repeat("x", 19992) + "\nnext\n"},
	{"many lines", strings.Repeat(" 0123456789abcdef0123456789abcdef 1234 main/binary-amd64/Packages\n", 5000)},
}

func clearSign(t testing.TB, s subject, text string) []byte {
	t.Helper()
	var out bytes.Buffer
	err := openpgp.ClearSign(&out, strings.NewReader(text), s.key, s.signer, openpgp.SignOptions{})
	if err != nil {
		t.Fatalf("ClearSign: %v", err)
	}
	return out.Bytes()
}

// framed cuts a clear-signed message before the signature and after the Hash header.
func framed(t testing.TB, message []byte) string {
	t.Helper()
	_, rest, ok := strings.Cut(string(message), "\n\n")
	text, _, found := strings.Cut("\n"+rest, "\n-----BEGIN PGP SIGNATURE-----\n")
	if !ok || !found {
		t.Fatalf("not clear-signed:\n%s", message)
	}
	return text
}

func TestClearSignEveryKey(t *testing.T) {
	text := "one \n- two\nthree"
	eachSubject(t, func(t *testing.T, s subject) {
		g := newGPG(t)
		g.must(s.cert, "--import")
		path := file(t, "message.asc", clearSign(t, s, text))
		gpgVerify(t, g, s, s.hash, path)
		sqVerify(t, s, path)
	})
}

// The frame, and the text gpg takes out of it, must be those of a message that gpg signed itself.
func TestClearSignAsGPG(t *testing.T) {
	s := newSubject(t, ed, false)
	g := newGPG(t)
	g.must(s.cert, "--import")
	own := newGPG(t)
	own.must(nil, "--passphrase", "", "--quick-gen-key", "peer@example.org", "ed25519", "sign", "never")
	for _, tt := range clearTexts {
		t.Run(tt.name, func(t *testing.T) {
			message := clearSign(t, s, tt.text)
			path := file(t, "ours.asc", message)
			gpgVerify(t, g, s, s.hash, path)
			sqVerify(t, s, path)
			theirs, _ := own.must([]byte(tt.text), "--clearsign")
			if got, want := framed(t, message), framed(t, []byte(theirs)); got != want {
				t.Errorf("frame: got\n%q\nwant gpg's\n%q", got, want)
			}
			got, _ := g.must(message, "--decrypt")
			want, _ := own.must([]byte(theirs), "--decrypt")
			if got != want {
				t.Errorf("signed text: gpg reads of ours\n%q\nof its own\n%q", got, want)
			}
			checkClear(t, s, tt.text, message)
		})
	}
}

// checkClear has go-crypto decode the frame and verify what it takes for the signed text.
func checkClear(t testing.TB, s subject, text string, message []byte) {
	t.Helper()
	block, rest := clearsign.Decode(message)
	if block == nil || len(rest) != 0 {
		t.Fatalf("go-crypto cannot decode\n%s", message)
	}
	if got, want := string(block.Plaintext), canonical(text); got != want {
		t.Errorf("go-crypto reads\n%q\nwant\n%q", got, want)
	}
	armored := message[bytes.LastIndex(message, []byte("-----BEGIN PGP SIGNATURE-----")):]
	info, err := openpgp.VerifyDetached(s.parsed(t), bytes.NewReader(block.Bytes), bytes.NewReader(armored))
	if err != nil || info.Type != openpgp.SigText || info.Signer != s.key.Fingerprint {
		t.Errorf("go-crypto verifies: %+v, %v", info, err)
	}
	var got strings.Builder
	info, err = openpgp.VerifyClear(s.parsed(t), bytes.NewReader(message), &got)
	if err != nil || got.String() != canonical(text) || info.Signer != s.key.Fingerprint {
		t.Errorf("VerifyClear: %q, %+v, %v", got.String(), info, err)
	}
}

// canonical is the text without what section 7 of RFC 9580 does not sign, line ends made \n.
func canonical(text string) string {
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	for i, l := range lines {
		lines[i] = strings.TrimRight(strings.TrimSuffix(l, "\r"), " \t")
	}
	return strings.Join(lines, "\n")
}

func TestClearSignRefuses(t *testing.T) {
	s := newSubject(t, ed, true)
	tests := []struct {
		name string
		text io.ReadSeeker
	}{
		{"line too long", strings.NewReader("a\n" + strings.Repeat("x", 19994) + "\n")},
		{"last line too long", strings.NewReader(strings.Repeat("x", 19994))},
		{"return inside a line", strings.NewReader("a\rb\n")},
		{"returns in a row", strings.NewReader("a\r\r\n")},
		{"return before blanks", strings.NewReader("a\r \n")},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var out bytes.Buffer
			signer := &countingSigner{Signer: s.signer}
			err := openpgp.ClearSign(&out, tt.text, s.key, signer, openpgp.SignOptions{})
			if !errors.Is(err, openpgp.ErrMalformed) {
				t.Errorf("got %v, want ErrMalformed", err)
			}
			if out.Len() != 0 || signer.calls != 0 {
				t.Errorf("wrote %d bytes, asked the signer %d times, want none", out.Len(), signer.calls)
			}
		})
	}
}

// changing is a text that is another when it is read again.
type changing struct{ *strings.Reader }

func (c changing) Seek(offset int64, whence int) (int64, error) {
	if whence == io.SeekStart {
		c.Reset("another\n")
	}
	return c.Reader.Seek(offset, whence)
}

func TestClearSignChanged(t *testing.T) {
	s := newSubject(t, ed, true)
	err := openpgp.ClearSign(io.Discard, changing{strings.NewReader("a text\n")}, s.key, s.signer, openpgp.SignOptions{})
	if !errors.Is(err, openpgp.ErrChanged) {
		t.Errorf("got %v, want ErrChanged", err)
	}
	broken := errors.New("disk full")
	err = openpgp.ClearSign(brokenWriter{broken}, strings.NewReader("a text\n"), s.key, s.signer, openpgp.SignOptions{})
	if !errors.Is(err, broken) {
		t.Errorf("got %v, want %v", err, broken)
	}
}

type brokenWriter struct{ err error }

func (w brokenWriter) Write([]byte) (int, error) { return 0, w.err }

// endless is a text of many lines, which takes no memory.
type endless struct{ size, at int64 }

func (e *endless) Read(p []byte) (int, error) {
	const line = "-0123456789abcdef 0123456789abcdef 0123456789abcdef 0123456789\n"
	if e.at == e.size {
		return 0, io.EOF
	}
	n := 0
	for n < len(p) && e.at < e.size {
		p[n] = line[e.at%int64(len(line))]
		n, e.at = n+1, e.at+1
	}
	return n, nil
}

func (e *endless) Seek(offset int64, whence int) (int64, error) {
	if whence == io.SeekStart {
		e.at = offset
	}
	return e.at, nil
}

// A text of 64 MiB is signed, and verified, without memory for it.
func TestClearConstantMemory(t *testing.T) {
	s := newSubject(t, ed, true)
	const size = 64 << 20
	f, err := os.Create(filepath.Join(t.TempDir(), "message.asc"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	err = openpgp.ClearSign(f, &endless{size: size}, s.key, s.signer, openpgp.SignOptions{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Seek(0, io.SeekStart)
	if err != nil {
		t.Fatal(err)
	}
	_, err = openpgp.VerifyClear(s.parsed(t), f, nil)
	if err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 8<<20 {
		t.Errorf("%d KiB allocated", n>>10)
	}
	g := newGPG(t)
	g.must(s.cert, "--import")
	gpgVerify(t, g, s, s.hash, f.Name())
}

// A change of what is signed is found; a change of trailing blanks is none.
func TestClearSignTamper(t *testing.T) {
	s := newSubject(t, p256, false)
	g := newGPG(t)
	g.must(s.cert, "--import")
	message := clearSign(t, s, "amount: 100\n-dash\n")
	tests := []struct {
		name     string
		old, new string
		good     bool
	}{
		{"digit", "100", "900", false},
		{"line added", "100\n", "100\n\n", false},
		{"line joined", "100\n- -dash", "100-dash", false},
		{"escaped for nothing", "amount", "- amount", true},
		{"escape gone", "- -dash", "- dash", false},
		{"blanks added", "100\n", "100 \t\n", true},
		{"crlf", "100\n", "100\r\n", true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			changed := bytes.Replace(message, []byte(tt.old), []byte(tt.new), 1)
			_, _, err := g.run(nil, "--verify", file(t, "m.asc", changed))
			if (err == nil) != tt.good {
				t.Errorf("gpg --verify: %v, want good %t", err, tt.good)
			}
			_, err = openpgp.VerifyClear(s.parsed(t), bytes.NewReader(changed), nil)
			if (err == nil) != tt.good || err != nil && !errors.Is(err, openpgp.ErrBadSignature) {
				t.Errorf("VerifyClear: %v, want good %t", err, tt.good)
			}
		})
	}
}

// What stands beside the signed text is not signed: VerifyClear must not let it pass as part of the file.
func TestVerifyClearStrict(t *testing.T) {
	s := newSubject(t, ed, true)
	message := clearSign(t, s, "signed\n")
	for name, changed := range map[string][]byte{
		"text before":  append([]byte("unsigned\n"), message...),
		"text after":   append(bytes.Clone(message), "unsigned\n"...),
		"second":       append(bytes.Clone(message), message...),
		"no signature": []byte("signed\n"),
		"long line":    bytes.Replace(message, []byte("signed"), bytes.Repeat([]byte("x"), 40000), 1),
		"long armor":   bytes.Replace(message, []byte("\n-----END"), append(bytes.Repeat([]byte("A"), 70000), "\n-----END"...), 1),
		"headers only": message[:bytes.Index(message, []byte("\n\n"))],
		"empty":        nil,
		"cut":          message[:len(message)-30],
		"unescaped":    bytes.Replace(message, []byte("signed"), []byte("-signed"), 1),
		"other value":  bytes.Replace(message, []byte("Hash: "), []byte("Hash: pay now, "), 1),
		"other header": bytes.Replace(message, []byte("Hash: "), []byte("Comment: x\nHash: "), 1),
	} {
		_, err := openpgp.VerifyClear(s.parsed(t), bytes.NewReader(changed), nil)
		if !errors.Is(err, openpgp.ErrMalformed) {
			t.Errorf("%s: got %v, want ErrMalformed", name, err)
		}
	}
	var text strings.Builder
	_, err := openpgp.VerifyClear(s.parsed(t), bytes.NewReader(append(message, "\r\n\n"...)), &text)
	if err != nil || text.String() != "signed" {
		t.Errorf("newlines after: got %q, %v", text.String(), err)
	}
}

// The peer's own output is read too.
func TestVerifyClearPeers(t *testing.T) {
	for _, path := range captures(t, "*-clear.asc", 4) {
		t.Run(filepath.Base(path), func(t *testing.T) {
			c, err := openpgp.ParseCertificate(read(t, strings.TrimSuffix(path, "-clear.asc")+".asc"))
			if err != nil {
				t.Fatal(err)
			}
			var text strings.Builder
			_, err = openpgp.VerifyClear(c, bytes.NewReader(read(t, path)), &text)
			if err != nil || text.String() != canonical(gpgSigned) {
				t.Errorf("got %q, %v", text.String(), err)
			}
		})
	}
}
