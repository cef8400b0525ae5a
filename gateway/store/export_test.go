package store

import "database/sql"

// Pools are the connections of s, for tests that ask SQLite what it does.
func (s *SQLite) Pools() (write, read *sql.DB) { return s.write, s.read }
