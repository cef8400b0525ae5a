package gpgagent_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/signwarden/signwarden/agentproto/assuan"
	"github.com/signwarden/signwarden/agentproto/gpgagent"
	"github.com/signwarden/signwarden/agentproto/sexp"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

const unknownGrip = "0123456789ABCDEF0123456789ABCDEF01234567"

// talk sends a command and renders all of its reply, D lines decoded.
func talk(t *testing.T, c *assuan.Client, command string) string {
	t.Helper()
	r, err := c.Transact(command)
	var out []string
	for _, s := range r.Status {
		out = append(out, "S "+s)
	}
	if len(r.Data) > 0 {
		out = append(out, "D "+string(r.Data))
	}
	e, isErr := errors.AsType[*assuan.Error](err)
	switch {
	case isErr:
		out = append(out, fmt.Sprintf("ERR %d %s", e.Code, e.Text))
	case err != nil:
		t.Fatalf("%s: %v", command, err)
	case r.Text != "":
		out = append(out, "OK "+r.Text)
	default:
		out = append(out, "OK")
	}
	return strings.Join(out, " | ")
}

func TestCommands(t *testing.T) {
	const (
		forbidden = "ERR 67109115 Forbidden <GPG Agent>"
		unknown   = "ERR 67109139 Unknown IPC command <GPG Agent>"
		noKey     = "ERR 67108881 No secret key <GPG Agent>"
		noDevice  = "ERR 100696144 No such device <SCD>"
		isFalse   = "ERR 67109120 False <GPG Agent>"
		badLength = "ERR 67109144 IPC parameter error <GPG Agent> - invalid length of keygrip"
		badHex    = "ERR 67109144 IPC parameter error <GPG Agent> - invalid hexstring"
		badHash   = "ERR 67109144 IPC parameter error <GPG Agent> - unsupported length of hash"
		badAlgo   = "ERR 67108948 Unsupported algorithm <GPG Agent>"
		noSupport = "ERR 67108924 Not supported <GPG Agent>"
	)
	all := newSigners()
	keys := &softKeys{signers: map[string]crypto.Signer{"ed": all["ed"], "rsa": all["rsa"]}}
	ed, rsa := gripOf(t, all["ed"].Public()), gripOf(t, all["rsa"].Public())
	sorted := []string{ed, rsa}
	slices.Sort(sorted)
	info := func(grip string) string { return "KEYINFO " + grip + " D - - - C - - -" }
	raw := func(grips ...string) string {
		var b []byte
		fmt.Sscanf(strings.Join(grips, ""), "%X", &b)
		return string(b)
	}
	hex32 := strings.Repeat("aB", 32)
	root := strings.Repeat("AB:CD:EF:01:", 5)

	tests := []struct {
		command string
		want    string
	}{
		{"RESET", "OK"},
		{"reset", "OK"},
		{"OPTION ttyname=/dev/pts/0", "OK"},
		{"OPTION pinentry-mode=loopback", "OK"},
		{"OPTION pretend-request-origin=remote", "OK"},
		{"OPTION no such=option", "OK"},
		{"OPTION", "OK"},

		{"GETINFO version", "D 2.5.99 | OK"},
		{"GETINFO pid", fmt.Sprintf("D %d | OK", os.Getpid())},
		{"GETINFO socket_name", "D pipe | OK"},
		{"GETINFO s2k_count", "D 65011712 | OK"},
		{"GETINFO restricted", isFalse},
		{"GETINFO std_env_names", isFalse},
		{"GETINFO jent_active", isFalse},
		{"GETINFO ephemeral", isFalse},
		{"GETINFO cmd_has_option GET_PASSPHRASE repeat", isFalse},
		{"GETINFO bogus", "ERR 67109144 IPC parameter error <GPG Agent> - unknown value for WHAT"},
		{"GETINFO", "ERR 67109144 IPC parameter error <GPG Agent> - unknown value for WHAT"},
		{"GETEVENTCOUNTER", "S EVENTCOUNTER 0 0 0 | OK"},

		{"HAVEKEY " + ed, "OK"},
		{"HAVEKEY " + strings.ToLower(ed), "OK"},
		{"HAVEKEY " + unknownGrip + " " + rsa, "OK"},
		{"HAVEKEY " + unknownGrip, noKey},
		{"HAVEKEY", badLength},
		{"HAVEKEY xx", badHex},
		{"HAVEKEY abcd", badLength},
		{"HAVEKEY " + ed + "0", badLength},
		{"HAVEKEY --list", "D " + raw(sorted...) + " | OK"},
		{"HAVEKEY --list=0", "D " + raw(sorted...) + " | OK"},
		{"HAVEKEY --list=1000", "D " + raw(sorted...) + " | OK"},
		{"HAVEKEY --list=2", "D " + raw(sorted...) + " | OK"},
		{"HAVEKEY --list=1", "D " + raw(sorted[0]) + " | ERR 67108938 Result truncated <GPG Agent>"},
		{"HAVEKEY --list=x", "ERR 67109144 IPC parameter error <GPG Agent> - invalid limit"},
		{"HAVEKEY --list=-1", "ERR 67109144 IPC parameter error <GPG Agent> - invalid limit"},
		{"HAVEKEY --info " + ed, "S KEYFILEINFO clear | OK"},
		{"HAVEKEY --info " + unknownGrip, noKey},

		{"KEYINFO " + ed, "S " + info(ed) + " | OK"},
		{"KEYINFO --data " + ed, "D " + ed + " D - - - C - - -\n | OK"},
		{"KEYINFO " + unknownGrip, "ERR 67108891 Not found <GPG Agent>"},
		{"KEYINFO", badLength},
		{"KEYINFO --list", "S " + info(sorted[0]) + " | S " + info(sorted[1]) + " | OK"},
		{"KEYINFO --list --with-ssh --ssh-fpr=sha256", "S " + info(sorted[0]) + " | S " + info(sorted[1]) + " | OK"},
		{"KEYINFO --data --list", "D " + sorted[0] + " D - - - C - - -\n" + sorted[1] + " D - - - C - - -\n | OK"},
		{"KEYINFO --ssh-list", "OK"},
		{"KEYINFO --list --need-attr=Use-for-p11", "OK"},

		{"READKEY --no-data -- " + ed, "OK"},
		{"READKEY " + unknownGrip, "ERR 67141713 No such file or directory <GPG Agent>"},
		{"READKEY --format=ssh " + ed, noSupport},
		{"READKEY", badLength},

		{"SIGKEY " + ed, "OK"},
		{"SETKEY " + unknownGrip, "OK"},
		{"SETKEY --another " + ed, noSupport},
		{"SIGKEY", badLength},
		{"SIGKEY 00", badLength},
		{"SETKEYDESC Please+enter", "OK"},
		{"SETKEYDESC", "OK"},

		{"SETHASH 8 " + hex32, "OK"},
		{"SETHASH --hash=sha256 " + hex32, "OK"},
		{"SETHASH 9 " + hex32, badHash},
		{"SETHASH 8 00", badHash},
		{"SETHASH 8", badHex},
		{"SETHASH 8 zz", badHex},
		{"SETHASH 8 " + hex32 + " 00", badHex},
		{"SETHASH 1 " + hex32[:32], badAlgo},
		{"SETHASH 2 " + hex32[:40], badAlgo},
		{"SETHASH 3 " + hex32[:40], badAlgo},
		{"SETHASH 11 " + hex32[:56], badAlgo},
		{"SETHASH --hash=sha1 " + hex32[:40], badAlgo},
		{"SETHASH --hash=none " + hex32, badAlgo},
		{"SETHASH 99 00", badAlgo},
		{"SETHASH", badAlgo},
		{"SETHASH --inquire", noSupport},
		{"SETHASH --pss 8 " + hex32, noSupport},

		{"PKDECRYPT", forbidden},
		{"PKDECRYPT --kem=PGP", forbidden},
		{"SCD SERIALNO", noDevice},
		{"SCD GETINFO version", "ERR 67108983 No SmartCard daemon <GPG Agent>"},
		{"SCD", noDevice},
		{"ISTRUSTED " + strings.ReplaceAll(root, ":", ""), "S TRUSTLISTFLAG relax | OK"},
		{"ISTRUSTED " + unknownGrip, "ERR 67108962 Not trusted <GPG Agent>"},
		{"ISTRUSTED nonsense", "ERR 67109144 IPC parameter error <GPG Agent> - invalid fingerprint"},

		{"KEYWRAP_KEY --export", forbidden},
		{"EXPORT_KEY --openpgp " + ed, forbidden},
		{"IMPORT_KEY", forbidden},
		{"DELETE_KEY --force " + ed, forbidden},
		{"GENKEY", forbidden},
		{"PASSWD " + ed, forbidden},
		{"KEYTOCARD " + ed, forbidden},
		{"KEYTOTPM " + ed, forbidden},
		{"KEYATTR " + ed, forbidden},
		{"LEARN", forbidden},
		{"PRESET_PASSPHRASE x -1", forbidden},
		{"GET_PASSPHRASE x", forbidden},
		{"CLEAR_PASSPHRASE x", forbidden},
		{"GET_CONFIRMATION x", forbidden},
		{"GETVAL x", forbidden},
		{"PUTVAL x y", forbidden},
		{"GET_SECRET x", forbidden},
		{"PUT_SECRET x", forbidden},
		{"LISTTRUSTED", forbidden},
		{"MARKTRUSTED x P y", forbidden},
		{"KILLAGENT", forbidden},
		{"RELOADAGENT", "OK"},
		{"UPDATESTARTUPTTY", "OK"},

		{"NOP", "OK"},
		{"END", "OK"},
		{"CANCEL", "OK"},
		{"HELP", "OK"},
		{"AUTH", unknown},
		{"GET_TOFU_INFO", unknown},
		{"FOO bar", unknown},
		{"D data", unknown},
		{" NOP", "ERR 67109140 IPC syntax error <GPG Agent> - leading white-space"},
		{"BYE", "OK closing connection"},
	}
	c := connect(t, gpgagent.Config{Keys: keysFor(keys), TrustedRoots: []string{strings.TrimSuffix(root, ":")}})
	for _, tt := range tests {
		t.Run(tt.command, func(t *testing.T) {
			got := talk(t, c, tt.command)
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
	if calls := keys.takeCalls(); len(calls) != 0 {
		t.Errorf("commands other than PKSIGN reached the keys: %+v", calls)
	}
	_, err := c.Transact("NOP")
	if err == nil {
		t.Error("the connection is open after BYE")
	}
}

func TestReadKey(t *testing.T) {
	for name, s := range newSigners() {
		t.Run(name, func(t *testing.T) {
			c := connect(t, gpgagent.Config{Keys: keysFor(&softKeys{signers: newSigners()})})
			r, err := c.Transact("READKEY " + gripOf(t, s.Public()))
			if err != nil {
				t.Fatal(err)
			}
			e, err := sexp.Parse(r.Data)
			if err != nil {
				t.Fatal(err)
			}
			prefix := map[string]string{
				"rsa":  "(10:public-key(3:rsa(1:n257:\x00",
				"p256": "(10:public-key(3:ecc(5:curve10:NIST P-256)(1:q65:\x04",
				"p384": "(10:public-key(3:ecc(5:curve10:NIST P-384)(1:q97:\x04",
				"p521": "(10:public-key(3:ecc(5:curve10:NIST P-521)(1:q133:\x04",
				"ed":   "(10:public-key(3:ecc(5:curve7:Ed25519)(5:flags5:eddsa)(1:q33:@",
			}[name]
			if !strings.HasPrefix(string(e.Bytes()), prefix) {
				t.Errorf("got %q, want it to begin with %q", e.Bytes(), prefix)
			}
		})
	}
}

// TestSignState asserts which commands a PKSIGN depends on, and what reaches the key.
func TestSignState(t *testing.T) {
	digest := sha256.Sum256([]byte("x"))
	all := newSigners()
	ed := gripOf(t, all["ed"].Public())
	sethash := fmt.Sprintf("SETHASH 8 %X", digest)
	call := func(note string) signCall { return signCall{"ed", crypto.SHA256, digest[:], note} }
	tests := []struct {
		name     string
		commands []string
		want     string // the kind of the last reply
		calls    []signCall
	}{
		{"usual order", []string{"SIGKEY " + ed, "SETKEYDESC a+b%0Ac", sethash, "PKSIGN"}, "D", []signCall{call("a b c")}},
		{"another order", []string{sethash, "SETKEY " + ed, "PKSIGN -- nonce"}, "D", []signCall{call("")}},
		{"again", []string{"SIGKEY " + ed, sethash, "PKSIGN", "PKSIGN"}, "D", []signCall{call(""), call("")}},
		{"no key", []string{sethash, "PKSIGN"}, "ERR 67108881", nil},
		{"unknown key", []string{"SIGKEY " + unknownGrip, sethash, "PKSIGN"}, "ERR 67108881", nil},
		{"no hash", []string{"SIGKEY " + ed, "PKSIGN"}, "ERR 67109144", nil},
		{"hash refused after a good one", []string{"SIGKEY " + ed, sethash, "SETHASH 2 00", "PKSIGN"}, "ERR 67109144", nil},
		{"reset", []string{"SIGKEY " + ed, "SETKEYDESC a", sethash, "RESET", "PKSIGN"}, "ERR 67108881", nil},
		{"reset forgets the hash", []string{sethash, "RESET", "SIGKEY " + ed, "PKSIGN"}, "ERR 67109144", nil},
		{"reset forgets the note", []string{"SETKEYDESC a", "RESET", "SIGKEY " + ed, sethash, "PKSIGN"}, "D", []signCall{call("")}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			keys := &softKeys{signers: all}
			c := connect(t, gpgagent.Config{Keys: keysFor(keys)})
			var got string
			for _, command := range tt.commands {
				got = talk(t, c, command)
			}
			if !strings.HasPrefix(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
			if diff := cmp.Diff(tt.calls, keys.takeCalls()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestEveryKindHasAReply finds a sentinel that the table lacks, and asserts that the rest of an error's text stays here.
func TestEveryKindHasAReply(t *testing.T) {
	all := newSigners()
	keys := &softKeys{signers: all}
	c := connect(t, gpgagent.Config{Keys: keysFor(keys)})
	talk(t, c, "SIGKEY "+gripOf(t, all["ed"].Public()))
	talk(t, c, "SETHASH 8 "+strings.Repeat("00", 32))
	seen := make(map[string]error)
	for _, kind := range append(sigerr.Kinds(), errors.New("of no kind")) {
		keys.setSign(func(context.Context) error { return fmt.Errorf("rule secret: %w", kind) })
		got := talk(t, c, "PKSIGN")
		general := strings.HasPrefix(got, "ERR 67108865 ")
		if general != (sigerr.Kind(kind) == nil) || seen[got] != nil || strings.Contains(got, "secret:") {
			t.Errorf("%v: got %q, as for %v", kind, got, seen[got])
		}
		seen[got] = kind
	}
	keys.list = fmt.Errorf("snapshot: %w", sigerr.Unavailable)
	for _, command := range []string{"HAVEKEY " + unknownGrip, "HAVEKEY --list", "KEYINFO --list", "READKEY " + unknownGrip, "PKSIGN"} {
		got := talk(t, c, command)
		if got != "ERR 67109040 Not operational <GPG Agent>" {
			t.Errorf("%s: got %q", command, got)
		}
	}
}

// TestTokenReturnsNonsense asserts that a signature of the wrong length never leaves.
func TestTokenReturnsNonsense(t *testing.T) {
	mangles := map[string]func([]byte) []byte{
		"nothing": func([]byte) []byte { return nil },
		"short":   func(b []byte) []byte { return b[1:] },
		"long":    func(b []byte) []byte { return append(b, 0) },
	}
	all := newSigners()
	for _, key := range slices.Sorted(maps.Keys(all)) {
		for name, mangle := range mangles {
			t.Run(key+"/"+name, func(t *testing.T) {
				keys := &softKeys{signers: all, mangle: mangle}
				c := connect(t, gpgagent.Config{Keys: keysFor(keys)})
				talk(t, c, "SIGKEY "+gripOf(t, all[key].Public()))
				talk(t, c, "SETHASH 10 "+strings.Repeat("00", 64))
				got := talk(t, c, "PKSIGN")
				if got != "ERR 67108993 Hardware problem <GPG Agent>" {
					t.Errorf("got %q", got)
				}
			})
		}
	}
}

func TestSigValForms(t *testing.T) {
	all := newSigners()
	zeros := func(b []byte) []byte { clear(b[:2]); clear(b[len(b)/2 : len(b)/2+1]); return b }
	tests := []struct{ key, want string }{
		{"rsa", "(7:sig-val(3:rsa(1:s256:\x00\x00"},
		{"ed", "(7:sig-val(5:eddsa(1:r32:\x00\x00"},
		{"p256", "(7:sig-val(5:ecdsa(1:r30:"},
		{"p521", "(7:sig-val(5:ecdsa(1:r64:"},
	}
	for _, tt := range tests {
		t.Run(tt.key, func(t *testing.T) {
			c := connect(t, gpgagent.Config{Keys: keysFor(&softKeys{signers: all, mangle: func(b []byte) []byte {
				b = zeros(b)
				if b[2] == 0 {
					b[2] = 1
				}
				return b
			}})})
			talk(t, c, "SIGKEY "+gripOf(t, all[tt.key].Public()))
			talk(t, c, "SETHASH 10 "+strings.Repeat("00", 64))
			r, err := c.Transact("PKSIGN")
			if err != nil || !strings.HasPrefix(string(r.Data), tt.want) {
				t.Errorf("got %q, %v", r.Data, err)
			}
			_, err = sexp.Parse(r.Data)
			if err != nil {
				t.Error(err)
			}
		})
	}
}

// TestKeysWithoutKeygrip are not shown, and a key under two names is shown once.
func TestKeysWithoutKeygrip(t *testing.T) {
	all := newSigners()
	p224, err := ecdsa.GenerateKey(elliptic.P224(), nil)
	if err != nil {
		t.Fatal(err)
	}
	keys := &softKeys{signers: map[string]crypto.Signer{"b": all["ed"], "a": all["ed"], "odd": p224}}
	c := connect(t, gpgagent.Config{Keys: keysFor(keys)})
	grip := gripOf(t, all["ed"].Public())
	if got, want := talk(t, c, "KEYINFO --list"), "S KEYINFO "+grip+" D - - - C - - - | OK"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	talk(t, c, "SIGKEY "+grip)
	talk(t, c, "SETHASH 8 "+strings.Repeat("00", 32))
	talk(t, c, "PKSIGN")
	if calls := keys.takeCalls(); len(calls) != 1 || calls[0].Key != "a" {
		t.Errorf("calls are %+v", calls)
	}
	// A name that gets another key must not keep the old keygrip.
	keys.signers = map[string]crypto.Signer{"a": all["rsa"]}
	if got := talk(t, c, "HAVEKEY "+grip); !strings.HasPrefix(got, "ERR 67108881") {
		t.Errorf("got %q", got)
	}
	if got := talk(t, c, "HAVEKEY "+gripOf(t, all["rsa"].Public())); got != "OK" {
		t.Errorf("got %q", got)
	}
}

func TestNotes(t *testing.T) {
	tests := []struct{ name, desc, want string }{
		{"gpg's", "Please+enter:%0A%22ed+<ed@x>%22%0A", `Please enter: "ed <ed@x>"`},
		{"controls", "a%00%1B[31mb%7F%C2%85c", "a[31mb c"},
		{"bidirectional", "a%E2%80%AEb", "ab"},
		{"not UTF-8", "a%FFb", "a\uFFFDb"},
		{"bad escapes", "%zz%4", "%zz%4"},
		{"cut between characters", "x" + strings.Repeat("é", 300), "x" + strings.Repeat("é", 255)},
		{"capped", strings.Repeat("x", 900), strings.Repeat("x", 512)},
	}
	all := newSigners()
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			keys := &softKeys{signers: all}
			c := connect(t, gpgagent.Config{Keys: keysFor(keys)})
			talk(t, c, "SETKEYDESC "+tt.desc)
			talk(t, c, "SIGKEY "+gripOf(t, all["ed"].Public()))
			talk(t, c, "SETHASH 8 "+strings.Repeat("00", 32))
			talk(t, c, "PKSIGN")
			calls := keys.takeCalls()
			if len(calls) != 1 || calls[0].Note != tt.want {
				t.Errorf("got %+v, want %q", calls, tt.want)
			}
		})
	}
}

func TestNewRefuses(t *testing.T) {
	keys := keysFor(&softKeys{})
	tests := []struct {
		name string
		cfg  gpgagent.Config
	}{
		{"no keys", gpgagent.Config{}},
		{"version", gpgagent.Config{Keys: keys, Version: "new"}},
		{"short version", gpgagent.Config{Keys: keys, Version: "2.5"}},
		{"root", gpgagent.Config{Keys: keys, TrustedRoots: []string{"abc"}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := gpgagent.New(tt.cfg)
			if err == nil {
				t.Error("accepted")
			}
		})
	}
}
