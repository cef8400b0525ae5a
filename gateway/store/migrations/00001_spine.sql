-- +goose Up
CREATE TABLE keys (
    name            TEXT PRIMARY KEY,
    algorithm       TEXT NOT NULL,
    state           TEXT NOT NULL,
    token           TEXT NOT NULL,
    token_id        BLOB NOT NULL,
    public_key      BLOB NOT NULL,
    created         INTEGER NOT NULL, -- Unix seconds
    openpgp         BLOB,             -- transferable public key; NULL: none
    openpgp_user_id TEXT,
    openpgp_layout  TEXT,
    openpgp_expires INTEGER,          -- Unix seconds; NULL: never
    primary_id      BLOB,
    primary_public  BLOB,
    UNIQUE (token, token_id)
) STRICT;

-- The policy in force is the last row; earlier ones stay for the record.
CREATE TABLE policy (
    version INTEGER PRIMARY KEY,
    source  BLOB NOT NULL
) STRICT;

CREATE TABLE audit (
    row   INTEGER PRIMARY KEY, -- from 0, without gaps
    entry BLOB NOT NULL        -- canonical JSON
) STRICT;

-- +goose Down
DROP TABLE audit;
DROP TABLE policy;
DROP TABLE keys;
