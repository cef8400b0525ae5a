package main

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/gateway/audit"
	"github.com/signwarden/signwarden/gateway/client"
)

// followInterval is how often audit tail --follow asks for more.
const followInterval = 500 * time.Millisecond

// maxRows is what one call may ask for.
const maxRows = 1000

func (a *app) auditCommand() *cobra.Command {
	c := &cobra.Command{Use: "audit", Short: "Read the audit log"}
	var limit int
	var follow bool
	tail := &cobra.Command{
		Use:   "tail",
		Short: "Print the last entries of the audit log",
		Long: `tail prints the last entries. With -o json each is one line: the row's number and
the entry, as it is stored.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if limit < 1 || limit > maxRows {
				return exit.UsageError("--limit %d is not within 1 to %d", limit, maxRows)
			}
			return a.with(func(c *client.Client) error { return a.tail(cmd, c, limit, follow) })
		},
	}
	tail.Flags().IntVar(&limit, "limit", 20, "so many entries")
	tail.Flags().BoolVarP(&follow, "follow", "f", false, "wait for further entries")
	c.AddCommand(tail)
	return c
}

func (a *app) tail(cmd *cobra.Command, c *client.Client, limit int, follow bool) error {
	from := int64(-1)
	for {
		first, entries, err := c.AuditEntries(cmd.Context(), from, limit)
		if err != nil {
			if follow && cmd.Context().Err() != nil {
				return nil // ended by the user
			}
			return err
		}
		for i, e := range entries {
			if err := a.printEntry(first+int64(i), e); err != nil {
				return err
			}
		}
		if !follow {
			return nil
		}
		from, limit = first+int64(len(entries)), maxRows
		if len(entries) == maxRows {
			continue
		}
		select {
		case <-time.After(followInterval):
		case <-cmd.Context().Done():
			return nil
		}
	}
}

func (a *app) printEntry(row int64, raw []byte) error {
	if a.format != "table" {
		enc := json.NewEncoder(a.out)
		enc.SetEscapeHTML(false) // the entry is to come out as it is stored
		return enc.Encode(struct {
			Row   int64           `json:"row"`
			Entry json.RawMessage `json:"entry"`
		}{row, raw})
	}
	e, err := audit.Parse(raw)
	if err != nil {
		return fmt.Errorf("row %d: %w", row, err)
	}
	_, err = fmt.Fprintf(a.out, "%d %s %s %s %s", row, e.Time.Format("2006-01-02T15:04:05.000Z"), e.Outcome, e.Action, e.Principal)
	for _, f := range []struct{ name, value string }{
		{"key", e.Key}, {"format", e.Format}, {"hash", e.Hash}, {"digest", short(e.Digest)}, {"rule", e.Rule},
		{"reason", e.Reason}, {"file", e.ClaimFile}, {"nevra", e.ClaimNEVRA}, {"namespace", e.Namespace}, {"user", e.User}, {"note", e.ClaimNote}, {"detail", e.Detail},
	} {
		if f.value != "" && err == nil {
			// Quoted: much of it is a client's words, and this is a terminal.
			_, err = fmt.Fprintf(a.out, " %s=%q", f.name, f.value)
		}
	}
	if err == nil {
		_, err = fmt.Fprintln(a.out)
	}
	return err
}

// short cuts a digest for people; JSON has it whole.
func short(digest string) string {
	if len(digest) > 16 {
		return digest[:16] + "…"
	}
	return digest
}
