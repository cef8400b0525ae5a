package store

import (
	"context"
	"crypto/x509"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/pressly/goose/v3"
	_ "modernc.org/sqlite" // registers the driver "sqlite"

	"github.com/signwarden/signwarden/gateway/keys"
)

//go:embed migrations/*.sql
var migrations embed.FS

// SQLite is a Store in one file: WAL, synchronous=FULL, one connection that
// writes and some that read. One process at a time may have it open.
type SQLite struct {
	write *sql.DB // one connection: transactions are serial
	read  *sql.DB

	// What every signature needs is prepared: to parse a statement costs more than
	// to run it.
	nextRow, insertEntry, insertAnswer *sql.Stmt

	pruned time.Time // when old answers were last thrown away; used in a write transaction only
}

var _ Store = (*SQLite)(nil)

// OpenSQLite opens the database at path, makes it (mode 0600) where it is
// missing, and brings its schema up to date.
func OpenSQLite(ctx context.Context, path string) (*SQLite, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("opening store: %w", err)
	}
	// Made here and not by SQLite, which would take the mode from the umask and
	// give the same mode to its -wal and -shm files.
	f, err := os.OpenFile(abs, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening store: %w", err)
	}
	f.Close()
	s := &SQLite{}
	s.write, err = openDB(abs, "_txlock=immediate")
	if err != nil {
		return nil, fmt.Errorf("opening store %s: %w", abs, err)
	}
	s.write.SetMaxOpenConns(1)
	s.read, err = openDB(abs, "_pragma=query_only(1)")
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening store %s: %w", abs, err), s.write.Close())
	}
	s.read.SetMaxOpenConns(max(2, runtime.NumCPU()))
	err = s.migrate(ctx)
	if err == nil {
		err = s.prepare(ctx)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening store %s: %w", abs, err), s.Close())
	}
	return s, nil
}

func (s *SQLite) prepare(ctx context.Context) (err error) {
	for _, p := range []struct {
		stmt **sql.Stmt
		text string
	}{
		{&s.nextRow, `SELECT coalesce(max(row), -1) + 1 FROM audit`},
		{&s.insertEntry, `INSERT INTO audit (row, entry) VALUES (?, ?)`},
		{&s.insertAnswer, `INSERT INTO answers (row, made, answer) VALUES (?, ?, ?)`},
	} {
		*p.stmt, err = s.write.PrepareContext(ctx, p.text)
		if err != nil {
			return err
		}
	}
	return nil
}

func openDB(path, extra string) (*sql.DB, error) {
	query := strings.Join([]string{
		"_pragma=busy_timeout(5000)", "_pragma=journal_mode(WAL)", "_pragma=synchronous(FULL)",
		"_pragma=foreign_keys(1)", extra,
	}, "&")
	return sql.Open("sqlite", (&url.URL{Scheme: "file", Path: path, RawQuery: query}).String())
}

// ReadSQLite opens the database at path, which another process may have open, for
// reading. It changes nothing: a missing one is fs.ErrNotExist, a schema of another
// version than ours is refused and not brought up to date, and Commit errs.
func ReadSQLite(ctx context.Context, path string) (*SQLite, error) {
	abs, err := filepath.Abs(path)
	if err == nil {
		_, err = os.Stat(abs)
	}
	if err != nil {
		return nil, fmt.Errorf("reading store: %w", err)
	}
	s := &SQLite{}
	if s.read, err = openDB(abs, "_pragma=query_only(1)"); err != nil {
		return nil, fmt.Errorf("reading store %s: %w", abs, err)
	}
	_, has, knows, err := versions(ctx, s.read)
	if err == nil && has < knows {
		err = fmt.Errorf("its schema has version %d and this program's is %d: an older signwardend has made it; start this one, which brings it up to date", has, knows)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("reading store %s: %w", abs, err), s.Close())
	}
	return s, nil
}

// versions are those of the schema that a database has, and that we know; one that is
// newer is refused, since goose passes over versions that it does not know.
func versions(ctx context.Context, db *sql.DB) (p *goose.Provider, has, knows int64, err error) {
	sub, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return nil, 0, 0, err
	}
	p, err = goose.NewProvider(goose.DialectSQLite3, db, sub)
	if err != nil {
		return nil, 0, 0, err
	}
	has, knows, err = p.GetVersions(ctx)
	if err != nil {
		return nil, 0, 0, fmt.Errorf("reading the schema's version: %w", err)
	}
	if has > knows {
		return nil, 0, 0, fmt.Errorf("its schema has version %d and this program knows up to %d: a newer signwardend has written it; run that one", has, knows)
	}
	return p, has, knows, nil
}

func (s *SQLite) migrate(ctx context.Context) error {
	p, _, _, err := versions(ctx, s.write)
	if err != nil {
		return err
	}
	if _, err := p.Up(ctx); err != nil {
		return fmt.Errorf("bringing the schema up to date: %w", err)
	}
	return nil
}

// Close closes every connection.
func (s *SQLite) Close() error {
	if s.write == nil {
		return s.read.Close()
	}
	return errors.Join(s.read.Close(), s.write.Close())
}

// Load implements Store.
func (s *SQLite) Load(ctx context.Context) (State, error) {
	tx, err := s.read.BeginTx(ctx, &sql.TxOptions{ReadOnly: true})
	if err != nil {
		return State{}, fmt.Errorf("reading the store: %w", err)
	}
	defer tx.Rollback() // read-only: nothing to lose
	var st State
	st.Keys, err = loadKeys(ctx, tx)
	if err != nil {
		return State{}, fmt.Errorf("reading keys: %w", err)
	}
	st.Pending, err = loadPending(ctx, tx)
	if err != nil {
		return State{}, fmt.Errorf("reading pending pairs: %w", err)
	}
	err = tx.QueryRowContext(ctx, `SELECT source FROM policy ORDER BY version DESC LIMIT 1`).Scan(&st.Policy)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return State{}, fmt.Errorf("reading the policy: %w", err)
	}
	return st, nil
}

func loadPending(ctx context.Context, tx *sql.Tx) ([]Pending, error) {
	rows, err := tx.QueryContext(ctx, `SELECT key_name, token_id FROM pending_pairs ORDER BY key_name, token_id`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var all []Pending
	for rows.Next() {
		var p Pending
		if err := rows.Scan(&p.KeyName, &p.ID); err != nil {
			return nil, err
		}
		all = append(all, p)
	}
	return all, rows.Err()
}

func loadKeys(ctx context.Context, tx *sql.Tx) ([]keys.Key, error) {
	rows, err := tx.QueryContext(ctx, `SELECT name, algorithm, state, token, token_id, public_key, created,
		openpgp, openpgp_user_id, openpgp_layout, openpgp_expires, primary_id, primary_public, x509_chain FROM keys ORDER BY name`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var all []keys.Key
	for rows.Next() {
		var k keys.Key
		var created int64
		var pgp keys.OpenPGP
		var userID, layout sql.NullString
		var expires sql.NullInt64
		var chain []byte
		err := rows.Scan(&k.Name, &k.Algorithm, &k.State, &k.Token, &k.ID, &k.Public, &created,
			&pgp.Certificate, &userID, &layout, &expires, &pgp.PrimaryID, &pgp.PrimaryPublic, &chain)
		if err != nil {
			return nil, err
		}
		k.X509, err = splitChain(chain)
		if err != nil {
			return nil, fmt.Errorf("certificates of key %q: %w", k.Name, err)
		}
		k.Created = time.Unix(created, 0).UTC()
		if userID.Valid {
			pgp.UserID, pgp.Layout = userID.String, keys.Layout(layout.String)
			if expires.Valid {
				pgp.Expires = time.Unix(expires.Int64, 0).UTC()
			}
			k.OpenPGP = &pgp
		}
		all = append(all, k)
	}
	return all, rows.Err()
}

// splitChain takes concatenated DER certificates apart.
func splitChain(b []byte) ([][]byte, error) {
	certs, err := x509.ParseCertificates(b)
	if err != nil || len(certs) == 0 {
		return nil, err
	}
	chain := make([][]byte, len(certs))
	for i, c := range certs {
		chain[i] = c.Raw
	}
	return chain, nil
}

// Commit implements Store.
func (s *SQLite) Commit(ctx context.Context, c Change) (int64, error) {
	if err := ctx.Err(); err != nil {
		return 0, fmt.Errorf("writing to the store: %w", err)
	}
	if s.write == nil {
		return 0, errors.New("writing to the store: it is open for reading")
	}
	// Nothing here waits longer than busy_timeout, and for a context that can end
	// the driver starts a goroutine for each statement.
	ctx = context.WithoutCancel(ctx)
	tx, err := s.write.BeginTx(ctx, nil)
	if err != nil {
		return 0, fmt.Errorf("writing to the store: %w", err)
	}
	defer tx.Rollback() // after Commit it is a no-op; before, the first error is the one to tell
	if c.CreateKey != nil {
		if err := insertKey(ctx, tx, *c.CreateKey); err != nil {
			return 0, err
		}
	}
	if err := updatePending(ctx, tx, c); err != nil {
		return 0, fmt.Errorf("storing pending pairs: %w", err)
	}
	if c.SetState != nil {
		err := updateOne(ctx, tx, `UPDATE keys SET state = ? WHERE name = ?`, c.SetState.State, c.SetState.Name)
		if err != nil {
			return 0, fmt.Errorf("storing the state of key %q: %w", c.SetState.Name, err)
		}
	}
	if c.SetX509 != nil {
		err := updateOne(ctx, tx, `UPDATE keys SET x509_chain = ? WHERE name = ?`, slices.Concat(c.SetX509.Chain...), c.SetX509.Name)
		if err != nil {
			return 0, fmt.Errorf("storing the certificates of key %q: %w", c.SetX509.Name, err)
		}
	}
	for _, o := range c.SetOpenPGP {
		err := updateOne(ctx, tx, `UPDATE keys SET openpgp = ?, openpgp_expires = ?, state = CASE WHEN ? THEN ? ELSE state END
			WHERE name = ? AND openpgp IS NOT NULL`,
			o.Certificate, sql.NullInt64{Int64: o.Expires.Unix(), Valid: !o.Expires.IsZero()}, o.Disable, keys.Disabled, o.Name)
		if err != nil {
			return 0, fmt.Errorf("storing the OpenPGP certificate of key %q: %w", o.Name, err)
		}
	}
	if c.Policy != nil {
		if _, err := tx.ExecContext(ctx, `INSERT INTO policy (source) VALUES (?)`, c.Policy); err != nil {
			return 0, fmt.Errorf("storing the policy: %w", err)
		}
	}
	first, err := s.insertAudit(ctx, tx, c.Audit)
	if err != nil {
		return 0, fmt.Errorf("storing audit entries: %w", err)
	}
	if c.Answers != nil {
		if err := s.insertAnswers(ctx, tx, first, c.Answers); err != nil {
			return 0, fmt.Errorf("storing answers: %w", err)
		}
	}
	if err := tx.Commit(); err != nil {
		return 0, fmt.Errorf("committing to the store: %w", err)
	}
	return first, nil
}

func updatePending(ctx context.Context, tx *sql.Tx, c Change) error {
	for _, p := range c.Begin {
		if _, err := tx.ExecContext(ctx, `INSERT INTO pending_pairs (token_id, key_name) VALUES (?, ?)`, p.ID, p.KeyName); err != nil {
			return err
		}
	}
	for _, id := range c.Forget {
		if _, err := tx.ExecContext(ctx, `DELETE FROM pending_pairs WHERE token_id = ?`, id); err != nil {
			return err
		}
	}
	return nil
}

// updateOne errs where there is no such key: its audit entry would record what
// did not happen.
func updateOne(ctx context.Context, tx *sql.Tx, update string, args ...any) error {
	res, err := tx.ExecContext(ctx, update, args...)
	if err != nil {
		return err
	}
	n, err := res.RowsAffected()
	if err == nil && n != 1 {
		err = errors.New("it is not stored")
	}
	return err
}

func insertKey(ctx context.Context, tx *sql.Tx, k keys.Key) error {
	var taken int
	if err := tx.QueryRowContext(ctx, `SELECT count(*) FROM keys WHERE name = ?`, k.Name).Scan(&taken); err != nil {
		return fmt.Errorf("looking for key %q: %w", k.Name, err)
	}
	if taken > 0 {
		return fmt.Errorf("key %q: %w", k.Name, ErrExists)
	}
	pgp := k.OpenPGP
	var userID, layout sql.NullString
	var expires sql.NullInt64
	if pgp == nil {
		pgp = &keys.OpenPGP{}
	} else {
		userID = sql.NullString{String: pgp.UserID, Valid: true}
		layout = sql.NullString{String: string(pgp.Layout), Valid: true}
		expires = sql.NullInt64{Int64: pgp.Expires.Unix(), Valid: !pgp.Expires.IsZero()}
	}
	_, err := tx.ExecContext(ctx, `INSERT INTO keys (name, algorithm, state, token, token_id, public_key, created,
		openpgp, openpgp_user_id, openpgp_layout, openpgp_expires, primary_id, primary_public)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		k.Name, k.Algorithm, k.State, k.Token, k.ID, k.Public, k.Created.Unix(),
		pgp.Certificate, userID, layout, expires, pgp.PrimaryID, pgp.PrimaryPublic)
	if err != nil {
		return fmt.Errorf("storing key %q: %w", k.Name, err)
	}
	return nil
}

// insertAudit numbers the entries after the last row that is really there,
// read in the same transaction: a commit that failed, or seemed to, leaves no gap.
func (s *SQLite) insertAudit(ctx context.Context, tx *sql.Tx, entries [][]byte) (int64, error) {
	if len(entries) == 0 {
		return 0, nil
	}
	var first int64
	if err := tx.StmtContext(ctx, s.nextRow).QueryRowContext(ctx).Scan(&first); err != nil {
		return 0, err
	}
	insert := tx.StmtContext(ctx, s.insertEntry)
	for i, e := range entries {
		if _, err := insert.ExecContext(ctx, first+int64(i), e); err != nil {
			return 0, err
		}
	}
	return first, nil
}

// insertAnswers stores answers beside the rows from first on, and now and then
// throws old ones away.
func (s *SQLite) insertAnswers(ctx context.Context, tx *sql.Tx, first int64, answers [][]byte) error {
	now := time.Now()
	insert := tx.StmtContext(ctx, s.insertAnswer)
	for i, a := range answers {
		if a == nil {
			continue
		}
		if _, err := insert.ExecContext(ctx, first+int64(i), now.Unix(), a); err != nil {
			return err
		}
	}
	if now.Sub(s.pruned) < KeepAnswers/5 {
		return nil
	}
	s.pruned = now
	// By row, which is the order of time: no index is needed.
	_, err := tx.ExecContext(ctx, `DELETE FROM answers WHERE row < coalesce((SELECT row FROM answers WHERE made >= ? ORDER BY row LIMIT 1), ?)`,
		now.Add(-KeepAnswers).Unix(), first)
	return err
}

// Answers implements Store.
func (s *SQLite) Answers(ctx context.Context) ([]Answer, error) {
	rows, err := s.read.QueryContext(ctx, `SELECT row, entry, answer FROM answers JOIN audit USING (row) ORDER BY row`)
	if err != nil {
		return nil, fmt.Errorf("reading answers: %w", err)
	}
	defer rows.Close()
	var out []Answer
	for rows.Next() {
		var a Answer
		if err := rows.Scan(&a.Row, &a.Entry, &a.Answer); err != nil {
			return nil, fmt.Errorf("reading answers: %w", err)
		}
		out = append(out, a)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("reading answers: %w", err)
	}
	return out, nil
}

// Audit implements Store.
func (s *SQLite) Audit(ctx context.Context, from int64, limit int) (int64, [][]byte, error) {
	limit = max(0, limit) // to SQLite a negative one is none
	if from < 0 {
		err := s.read.QueryRowContext(ctx, `SELECT coalesce(max(row), -1) + 1 FROM audit`).Scan(&from)
		if err != nil {
			return 0, nil, fmt.Errorf("reading the audit log: %w", err)
		}
		from = max(0, from-int64(limit))
	}
	rows, err := s.read.QueryContext(ctx, `SELECT row, entry FROM audit WHERE row >= ? ORDER BY row LIMIT ?`, from, limit)
	if err != nil {
		return 0, nil, fmt.Errorf("reading the audit log: %w", err)
	}
	defer rows.Close()
	var entries [][]byte
	for rows.Next() {
		var row int64
		var e []byte
		if err := rows.Scan(&row, &e); err != nil {
			return 0, nil, fmt.Errorf("reading the audit log: %w", err)
		}
		if want := from + int64(len(entries)); row != want {
			return 0, nil, fmt.Errorf("the audit log lacks row %d: the next is %d; somebody has changed the database", want, row)
		}
		entries = append(entries, e)
	}
	if err := rows.Err(); err != nil {
		return 0, nil, fmt.Errorf("reading the audit log: %w", err)
	}
	return from, entries, nil
}
