package store_test

import (
	"bytes"
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/store"
)

// openSQLite opens a store and closes it with the test.
func openSQLite(t testing.TB, path string) *store.SQLite {
	t.Helper()
	s, err := store.OpenSQLite(context.Background(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("closing: %v", err)
		}
	})
	return s
}

// Nobody but the owner reads any of the three files, whatever the umask.
func TestFileModes(t *testing.T) {
	for _, umask := range []int{0, 0o022, 0o177} {
		t.Run(fmt.Sprintf("umask %03o", umask), func(t *testing.T) {
			dir := t.TempDir()
			defer syscall.Umask(syscall.Umask(umask))
			s := openSQLite(t, dir+"/store.db")
			commit(t, s, store.Change{Audit: entries("x", 1)})
			rows(t, s)
			for _, suffix := range []string{"", "-wal", "-shm"} {
				fi, err := os.Stat(dir + "/store.db" + suffix)
				if err != nil {
					t.Fatal(err)
				}
				if fi.Mode() != 0o600 {
					t.Errorf("%s has mode %v, want 0600", fi.Name(), fi.Mode())
				}
			}
		})
	}
}

// What durability rests on, asked of the very connections that write, also
// after database/sql has thrown one away and made another.
func TestPragmas(t *testing.T) {
	s := openSQLite(t, t.TempDir()+"/store.db")
	write, read := s.Pools()
	check := func(when string) {
		t.Helper()
		for pragma, want := range map[string]string{"journal_mode": "wal", "synchronous": "2", "foreign_keys": "1", "busy_timeout": "5000", "query_only": "0"} {
			var got string
			if err := write.QueryRow("PRAGMA " + pragma).Scan(&got); err != nil || got != want {
				t.Errorf("%s: writing, %s is %q, %v; want %s", when, pragma, got, err, want)
			}
		}
		for pragma, want := range map[string]string{"journal_mode": "wal", "query_only": "1"} {
			var got string
			if err := read.QueryRow("PRAGMA " + pragma).Scan(&got); err != nil || got != want {
				t.Errorf("%s: reading, %s is %q, %v; want %s", when, pragma, got, err, want)
			}
		}
	}
	check("fresh")
	commit(t, s, store.Change{Audit: entries("x", 1)})
	check("after a commit")
	for _, db := range []*sql.DB{write, read} {
		c, err := db.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Raw(func(any) error { return driver.ErrBadConn }); err == nil {
			t.Fatal("the connection was not thrown away")
		}
		c.Close()
	}
	check("after the connections were replaced")
	if first := commit(t, s, store.Change{Audit: entries("y", 1)}); first != 1 {
		t.Errorf("row %d, want 1", first)
	}
	check("and used")
	if n := write.Stats().MaxOpenConnections; n != 1 {
		t.Errorf("%d connections may write, want 1", n)
	}
	if _, err := read.Exec(`DELETE FROM audit`); err == nil {
		t.Error("a reading connection writes")
	}
}

func TestPaths(t *testing.T) {
	for _, name := range []string{
		"a b.db", "a?b.db", "a?mode=memory", "a%20b.db", "a%.db", "a#b.db", "a&b=c.db", "é😀.db", "a'b\".db", ":memory:", "file:x.db", "-a", "a\nb", `a\b`, "a;b", "a+b",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			s, err := store.OpenSQLite(t.Context(), filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			commit(t, s, store.Change{Audit: entries("x", 1)})
			var files []string
			all, err := os.ReadDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range all {
				files = append(files, f.Name())
			}
			if want := fmt.Sprint([]string{name, name + "-shm", name + "-wal"}); fmt.Sprint(files) != want {
				t.Errorf("files %q, want %q and its -shm and -wal", files, name)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if n := len(rows(t, openSQLite(t, filepath.Join(dir, name)))); n != 1 {
				t.Errorf("%d rows when opened again, want 1", n)
			}
		})
	}
	t.Run("relative", func(t *testing.T) {
		t.Chdir(t.TempDir())
		openSQLite(t, "store.db")
		if _, err := os.Stat("store.db"); err != nil {
			t.Error(err)
		}
	})
}

func TestOpenAgain(t *testing.T) {
	path := t.TempDir() + "/store.db"
	k := plainKey("a")
	for i := range 4 {
		s, err := store.OpenSQLite(t.Context(), path)
		if err != nil {
			t.Fatal(err)
		}
		c := store.Change{Audit: entries(fmt.Sprint(i), 3)}
		if i == 0 {
			c.CreateKey, c.Policy = &k, []byte("p")
		}
		if first := commit(t, s, c); first != int64(3*i) {
			t.Errorf("opened %d times: row %d", i+1, first)
		}
		wantState(t, s, "p", k)
		var versions int
		write, _ := s.Pools()
		if err := write.QueryRow(`SELECT count(*) FROM goose_db_version WHERE version_id > 0`).Scan(&versions); err != nil || versions < 1 {
			t.Errorf("%d versions, %v", versions, err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// A database of a later release may hold what this one would misread.
func TestNewerSchema(t *testing.T) {
	path := t.TempDir() + "/store.db"
	s, err := store.OpenSQLite(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	commit(t, s, store.Change{Audit: entries("x", 1)})
	write, _ := s.Pools()
	if _, err := write.Exec(`INSERT INTO goose_db_version (version_id, is_applied) VALUES (99, 1)`); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s, err = store.OpenSQLite(t.Context(), path)
	if err == nil {
		s.Close()
		t.Fatal("a store of a later schema opens")
	}
	for _, want := range []string{path, "version 99", "newer"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not say %q: %v", want, err)
		}
	}
}

// Beside the process that has it open, a database is read as it is.
func TestReadSQLite(t *testing.T) {
	path := t.TempDir() + "/store.db"
	if _, err := store.ReadSQLite(t.Context(), path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing one: %v", err)
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("it was made")
	}
	s, err := store.OpenSQLite(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	k := plainKey("a")
	commit(t, s, store.Change{CreateKey: &k, Policy: []byte("p"), Audit: entries("x", 3)})
	r, err := store.ReadSQLite(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	wantState(t, r, "p", k)
	if _, err := r.Commit(t.Context(), store.Change{Audit: entries("y", 1)}); err == nil {
		t.Error("it writes")
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if first := commit(t, s, store.Change{Audit: entries("z", 1)}); first != 3 {
		t.Errorf("the next row is %d", first)
	}
	write, _ := s.Pools()
	for _, c := range []struct{ name, change string }{
		{"older", `DELETE FROM goose_db_version WHERE version_id = (SELECT max(version_id) FROM goose_db_version)`},
		{"newer", `INSERT INTO goose_db_version (version_id, is_applied) VALUES (99, 1)`},
	} {
		if _, err := write.Exec(c.change); err != nil {
			t.Fatal(err)
		}
		var was, is int
		count := func(n *int) error { return write.QueryRow(`SELECT count(*) FROM goose_db_version`).Scan(n) }
		if err := count(&was); err != nil {
			t.Fatal(err)
		}
		if r, err := store.ReadSQLite(t.Context(), path); err == nil || !strings.Contains(err.Error(), c.name) {
			t.Errorf("%s: %v, %v", c.name, r, err)
		}
		if err := count(&is); err != nil || is != was {
			t.Errorf("%s: the schema was changed: %v", c.name, err)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	valid := t.TempDir() + "/valid.db"
	s, err := store.OpenSQLite(t.Context(), valid)
	if err != nil {
		t.Fatal(err)
	}
	commit(t, s, store.Change{Audit: entries(strings.Repeat("x", 1000), 500)})
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	db, err := os.ReadFile(valid)
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name string
		make func(path string) error
		want string
	}{
		{"no database", func(p string) error { return os.WriteFile(p, bytes.Repeat([]byte("garbage!"), 1000), 0o600) }, "not a database"},
		{"text", func(p string) error { return os.WriteFile(p, []byte("rules: []\n"), 0o600) }, "not a database"},
		{"first page overwritten", func(p string) error {
			return os.WriteFile(p, append(bytes.Repeat([]byte{0xa5}, 4096), db[4096:]...), 0o600)
		}, "not a database"},
		{"schema overwritten", func(p string) error {
			return os.WriteFile(p, append(append(append([]byte{}, db[:100]...), bytes.Repeat([]byte{0xa5}, 3996)...), db[4096:]...), 0o600)
		}, "malformed"},
		{"cut short", func(p string) error { return os.WriteFile(p, db[:len(db)/2], 0o600) }, "malformed"},
		{"a folder", func(p string) error { return os.Mkdir(p, 0o700) }, "is a directory"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := t.TempDir() + "/store.db"
			if err := tt.make(path); err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			s, err := store.OpenSQLite(t.Context(), path)
			if err == nil {
				s.Close()
				t.Fatal("it opens")
			}
			for _, want := range []string{path, tt.want} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the error does not say %q: %v", want, err)
				}
			}
			if d := time.Since(start); d > 2*time.Second {
				t.Errorf("took %v", d)
			}
		})
	}
	t.Run("no such folder", func(t *testing.T) {
		path := t.TempDir() + "/none/store.db"
		if _, err := store.OpenSQLite(t.Context(), path); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("error %v, want one that names the path", err)
		}
	})
}

func TestClosed(t *testing.T) {
	s, err := store.OpenSQLite(t.Context(), t.TempDir()+"/store.db")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Commit(t.Context(), store.Change{SetState: &store.SetState{Name: "a", State: keys.Disabled}}); err == nil {
		t.Error("a closed store commits")
	}
	if _, err := s.Load(t.Context()); err == nil {
		t.Error("a closed store loads")
	}
	if _, _, err := s.Audit(t.Context(), 0, 1); err == nil {
		t.Error("a closed store reads its log")
	}
	if err := s.Close(); err != nil {
		t.Errorf("closing again: %v", err)
	}
}

// Answers are thrown away when they are old enough, and not before.
func TestAnswersArePruned(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store.db")
	fill := func(s *store.SQLite, name string) {
		t.Helper()
		commit(t, s, store.Change{Audit: entries(name, 2), Answers: [][]byte{[]byte(name + " 0"), []byte(name + " 1")}})
	}
	s := openSQLite(t, path)
	fill(s, "old")
	fill(s, "young")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	_, err = db.Exec(`UPDATE answers SET made = made - CASE WHEN row < 2 THEN ? ELSE ? END`,
		int64((store.KeepAnswers + time.Minute).Seconds()), int64((store.KeepAnswers - time.Minute/6).Seconds()))
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	s = openSQLite(t, path)
	fill(s, "new")
	kept := func() (rows []int64) {
		all, err := s.Answers(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range all {
			rows = append(rows, a.Row)
		}
		return rows
	}
	if got := kept(); !slices.Equal(got, []int64{2, 3, 4, 5}) {
		t.Errorf("rows %v have answers, want 2 to 5", got)
	}
	if _, all, err := s.Audit(t.Context(), 0, 10); err != nil || len(all) != 6 {
		t.Errorf("the log has %d rows, %v; want all 6", len(all), err)
	}
}
