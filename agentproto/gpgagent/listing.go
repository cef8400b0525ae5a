package gpgagent

import (
	"context"
	"crypto"
	"slices"
	"strconv"
	"strings"

	"github.com/signwarden/signwarden/agentproto/assuan"
)

// shownKey is a key that the peer may see.
type shownKey struct {
	name string
	pub  crypto.PublicKey
}

// shown is every key that the peer may see now. Where two names have one key the
// first name stands for both, so that it is always the same.
func (s *session) shown(ctx context.Context) (map[keygrip]shownKey, error) {
	pubs, err := s.keys.PublicKeys(ctx)
	if err != nil {
		return nil, err
	}
	keys := make(map[keygrip]shownKey, len(pubs))
	s.srv.grips.each(pubs, func(name string, grip keygrip) {
		if !s.srv.cfg.Lease.Shows(name) {
			return
		}
		other, taken := keys[grip]
		if !taken || name < other.name {
			keys[grip] = shownKey{name, pubs[name]}
		}
	})
	return keys, nil
}

// sortedGrips is the order of every listing.
func sortedGrips(keys map[keygrip]shownKey) []keygrip {
	grips := make([]keygrip, 0, len(keys))
	for grip := range keys {
		grips = append(grips, grip)
	}
	slices.SortFunc(grips, func(a, b keygrip) int { return slices.Compare(a[:], b[:]) })
	return grips
}

// haveKey answers OK if any of the keygrips is shown, or lists all of them. A list
// that ends in OK is final to gpg 2.4: it asks for no other key then.
func (s *session) haveKey(ctx context.Context, c *assuan.Conn, args []byte) error {
	options, rest := splitOptions(args)
	withInfo := false
	for _, option := range options {
		limit, isList := cutPrefix(option, "--list")
		if isList {
			return s.listGrips(ctx, c, limit)
		}
		withInfo = withInfo || option == "--info"
	}
	if len(rest) == 0 {
		return parameterError("invalid length of keygrip")
	}
	grips := make([]keygrip, 0, len(rest))
	for _, text := range rest {
		grip, err := parseKeygrip(text)
		if err != nil {
			return err
		}
		grips = append(grips, grip)
	}
	keys, err := s.shown(ctx)
	if err != nil {
		return err
	}
	have := func(grip keygrip) bool { _, ok := keys[grip]; return ok }
	if !slices.ContainsFunc(grips, have) {
		return errNoSecretKey
	}
	if withInfo {
		return c.Status("KEYFILEINFO", "clear")
	}
	return nil
}

// listGrips sends the keygrips as one stream of 20 bytes each. limit is "" or "=N".
func (s *session) listGrips(ctx context.Context, c *assuan.Conn, limit string) error {
	n, err := strconv.ParseUint(strings.TrimPrefix(limit, "="), 10, 31)
	if limit != "" && (err != nil || limit[0] != '=') {
		return parameterError("invalid limit")
	}
	keys, err := s.shown(ctx)
	if err != nil {
		return err
	}
	grips := sortedGrips(keys)
	truncated := n > 0 && uint64(len(grips)) > n // no number, and 0, are no limit
	if truncated {
		grips = grips[:n]
	}
	stream := make([]byte, 0, len(grips)*len(keygrip{}))
	for _, grip := range grips {
		stream = append(stream, grip[:]...)
	}
	err = c.Data(stream)
	if err == nil && truncated {
		err = errTruncated
	}
	return err
}

// keyInfoFields says of a key: on disk and not on a card (D), without a passphrase (C).
// Anything else makes clients think of a card or ask for a passphrase.
const keyInfoFields = " D - - - C - - -"

// keyInfo describes one key, or all of them. sq lists them all the time.
func (s *session) keyInfo(ctx context.Context, c *assuan.Conn, args []byte) error {
	options, rest := splitOptions(args)
	var list, data, none bool
	for _, option := range options {
		switch name, _, _ := strings.Cut(option, "="); name {
		case "--list":
			list = true
		case "--ssh-list": // the keys of sshcontrol, and there is no such file
			list, none = true, true
		case "--data":
			data = true
		case "--need-attr": // our keys have no attributes
			none = true
		}
	}
	var want keygrip
	if !list {
		if len(rest) != 1 {
			return parameterError("invalid length of keygrip")
		}
		grip, err := parseKeygrip(rest[0])
		if err != nil {
			return err
		}
		want = grip
	}
	keys, err := s.shown(ctx)
	if err != nil {
		return err
	}
	if none {
		keys = nil
	}
	grips := sortedGrips(keys)
	if !list {
		_, ok := keys[want]
		if !ok {
			return errNotFound
		}
		grips = []keygrip{want}
	}
	return writeKeyInfo(c, grips, data)
}

func writeKeyInfo(c *assuan.Conn, grips []keygrip, data bool) error {
	var lines []byte
	for _, grip := range grips {
		if data {
			lines = append(lines, grip.String()+keyInfoFields+"\n"...)
			continue
		}
		err := c.Status("KEYINFO", grip.String()+keyInfoFields)
		if err != nil {
			return err
		}
	}
	return c.Data(lines)
}

// readKey sends a public key. gpgsm makes certificates with it.
func (s *session) readKey(ctx context.Context, c *assuan.Conn, args []byte) error {
	options, rest := splitOptions(args)
	noData := false
	for _, option := range options {
		if option != "--no-data" { // --card, --format=ssh
			return errNotSupported
		}
		noData = true
	}
	if len(rest) != 1 {
		return parameterError("invalid length of keygrip")
	}
	grip, err := parseKeygrip(rest[0])
	if err != nil {
		return err
	}
	keys, err := s.shown(ctx)
	if err != nil {
		return err
	}
	key, ok := keys[grip]
	if !ok {
		return errNoFile
	}
	if noData {
		return nil
	}
	expr, err := publicKeyExpr(key.pub)
	if err != nil {
		return err
	}
	return c.Data(expr.Bytes())
}

// cutPrefix is strings.CutPrefix without regard to case, as options are compared.
func cutPrefix(s, prefix string) (string, bool) {
	if len(s) < len(prefix) || !strings.EqualFold(s[:len(prefix)], prefix) {
		return "", false
	}
	return s[len(prefix):], true
}
