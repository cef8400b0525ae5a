package gpgagent

import (
	"context"
	"crypto/sha1"
	"os"
	"strconv"
	"strings"

	"github.com/signwarden/signwarden/agentproto/assuan"
)

// command does one command of a session.
type command func(s *session, ctx context.Context, c *assuan.Conn, args []byte) error

// commandTable is every command that clients are known to send; what is not in it
// is an unknown IPC command, as it is in the real agent.
var commandTable = map[string]command{
	"RESET":  (*session).reset,
	"OPTION": ok, // values are ignored, putenv above all; an ERR is noise in the client, or fatal to it
	"NOP":    ok,
	"END":    ok,
	"CANCEL": ok,
	"HELP":   ok,
	"BYE":    bye,

	"GETINFO":         (*session).getInfo,
	"GETEVENTCOUNTER": status("EVENTCOUNTER", "0", "0", "0"),

	"HAVEKEY": (*session).haveKey,
	"KEYINFO": (*session).keyInfo,
	"READKEY": (*session).readKey,

	"SIGKEY":     (*session).setKey,
	"SETKEY":     (*session).setKey,
	"SETKEYDESC": (*session).setKeyDesc,
	"SETHASH":    (*session).setHash,
	"PKSIGN":     (*session).sign,

	"ISTRUSTED": (*session).isTrusted,
	"SCD":       scd,

	// Clients of a shared host send these at will; they must not take the agent down.
	"RELOADAGENT":      ok,
	"UPDATESTARTUPTTY": ok,
	"KILLAGENT":        forbidden, // gpgconf --kill exits 0 all the same

	// These need or change secrets. Each is refused before it can ask for data;
	// KEYWRAP_KEY comes first in an export, so gpg says there that it is forbidden.
	"PKDECRYPT":         forbidden,
	"KEYWRAP_KEY":       forbidden,
	"EXPORT_KEY":        forbidden,
	"IMPORT_KEY":        forbidden,
	"DELETE_KEY":        forbidden,
	"GENKEY":            forbidden,
	"PASSWD":            forbidden,
	"KEYTOCARD":         forbidden,
	"KEYTOTPM":          forbidden,
	"KEYATTR":           forbidden,
	"LEARN":             forbidden,
	"PRESET_PASSPHRASE": forbidden,
	"GET_PASSPHRASE":    forbidden,
	"CLEAR_PASSPHRASE":  forbidden,
	"GET_CONFIRMATION":  forbidden,
	"GETVAL":            forbidden,
	"PUTVAL":            forbidden,
	"GET_SECRET":        forbidden,
	"PUT_SECRET":        forbidden,
	"LISTTRUSTED":       forbidden,
	"MARKTRUSTED":       forbidden,
}

func ok(*session, context.Context, *assuan.Conn, []byte) error { return nil }

func forbidden(*session, context.Context, *assuan.Conn, []byte) error { return errForbidden }

func bye(_ *session, _ context.Context, c *assuan.Conn, _ []byte) error {
	c.SetOK("closing connection")
	c.Hangup()
	return nil
}

// status makes a command that answers one S line.
func status(keyword string, args ...string) command {
	return func(_ *session, _ context.Context, c *assuan.Conn, _ []byte) error {
		return c.Status(keyword, args...)
	}
}

// scd says that there is no card: gpg asks for one when it picks a default key.
func scd(_ *session, _ context.Context, _ *assuan.Conn, args []byte) error {
	if strings.EqualFold(strings.Join(strings.Fields(string(args)), " "), "GETINFO version") {
		return errNoSCDaemon
	}
	return errNoDevice
}

// info answers one GETINFO.
type info func(s *session, c *assuan.Conn) error

// infoTable has what clients ask for. restricted is False: a client that hears True
// takes it that keys cannot be listed, and they can.
var infoTable = map[string]info{
	"version":     func(s *session, c *assuan.Conn) error { return c.Data([]byte(s.srv.cfg.Version)) },
	"pid":         func(_ *session, c *assuan.Conn) error { return c.Data(strconv.AppendInt(nil, int64(os.Getpid()), 10)) },
	"socket_name": func(_ *session, c *assuan.Conn) error { return c.Data([]byte(c.LocalPath())) },
	// The iterations for a passphrase of the client's own: we have no opinion, so
	// it is the most that OpenPGP can express (RFC 4880 section 3.7.1.3).
	"s2k_count": func(_ *session, c *assuan.Conn) error { return c.Data([]byte("65011712")) },

	"restricted":      isFalse,
	"std_env_names":   isFalse,
	"std_session_env": isFalse,
	"std_startup_env": isFalse,
	"jent_active":     isFalse,
	"ephemeral":       isFalse,
	"cmd_has_option":  isFalse, // of GET_PASSPHRASE and EXPORT_KEY, which are forbidden
}

func isFalse(*session, *assuan.Conn) error { return errFalse }

func (s *session) getInfo(_ context.Context, c *assuan.Conn, args []byte) error {
	what, _, _ := strings.Cut(string(args), " ")
	answer, known := infoTable[what]
	if !known {
		return parameterError("unknown value for WHAT")
	}
	return answer(s, c)
}

// isTrusted is asked by gpgsm of the root of a certificate that it signs with. Where
// that is the certificate of a key of the peer's, self-signed, it stands for the key
// and no more. A root that issues others' certificates must be configured.
func (s *session) isTrusted(ctx context.Context, c *assuan.Conn, args []byte) error {
	fpr, valid := parseFingerprint(string(args))
	if !valid {
		return parameterError("invalid fingerprint")
	}
	trusted := s.srv.roots[fpr]
	certified, ok := s.keys.(Certified)
	if !trusted && ok {
		certs, err := certified.Certificates(ctx)
		if err != nil {
			return err
		}
		for name, der := range certs {
			grip := keygrip(sha1.Sum(der)) // of one form with a fingerprint
			trusted = trusted || s.srv.cfg.Lease.Shows(name) && grip.String() == fpr
		}
	}
	if !trusted {
		return errNotTrusted
	}
	return c.Status("TRUSTLISTFLAG", "relax")
}

// parseFingerprint takes a SHA-1 fingerprint in hex, with or without colons, and gives it in
// upper case without.
func parseFingerprint(text string) (string, bool) {
	grip, err := parseKeygrip(strings.ReplaceAll(text, ":", ""))
	return grip.String(), err == nil // a fingerprint and a keygrip have one form
}

// splitOptions takes the leading options off args: "--data --list -- g" is
// [--data --list] and [g].
func splitOptions(args []byte) (options, rest []string) {
	rest = strings.Fields(string(args))
	for len(rest) > 0 && strings.HasPrefix(rest[0], "--") {
		option := rest[0]
		rest = rest[1:]
		if option == "--" {
			break
		}
		options = append(options, option)
	}
	return options, rest
}
