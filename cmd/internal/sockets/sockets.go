// Package sockets makes agent sockets of what a configuration says of them, for
// both programs.
package sockets

import (
	"fmt"
	"os"
	"time"

	"github.com/signwarden/signwarden/agentproto/gpgagent"
	"github.com/signwarden/signwarden/agentproto/lease"
	"github.com/signwarden/signwarden/agentproto/p11token"
	"github.com/signwarden/signwarden/gateway/config"
)

// Tokens are the tokens of a PKCS#11 socket.
func Tokens(s config.Socket) ([]p11token.Group, error) {
	var groups []p11token.Group
	for _, t := range s.P11Tokens {
		groups = append(groups, p11token.Group{Label: t.Label, Keys: t.Keys})
	}
	if err := p11token.CheckGroups(groups); err != nil {
		return nil, fmt.Errorf("p11_tokens: %w", err)
	}
	return groups, nil
}

// Bounds are what a socket that comes up now may sign, and the fingerprints of the
// X.509 roots that it says are trusted.
func Bounds(s config.Socket) (*lease.Lease, []string, error) {
	c := lease.Config{Keys: s.Keys, Signatures: s.Signatures}
	if s.Lifetime > 0 {
		c.Expires = time.Now().Add(time.Duration(s.Lifetime))
	}
	l, err := lease.New(c)
	if err != nil {
		return nil, nil, err
	}
	var roots []string
	for _, file := range s.TrustedRoots {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, nil, fmt.Errorf("trusted root: %w", err)
		}
		found, err := gpgagent.Fingerprints(text)
		if err != nil {
			return nil, nil, fmt.Errorf("trusted root %s: %w", file, err)
		}
		roots = append(roots, found...)
	}
	return l, roots, nil
}
