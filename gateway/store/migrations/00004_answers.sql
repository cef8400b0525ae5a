-- +goose Up
-- What was answered to requests with an idempotency id, for a few minutes: beside
-- the audit row that records it, and as durable.
CREATE TABLE answers (
    row    INTEGER PRIMARY KEY, -- of audit
    made   INTEGER NOT NULL,    -- Unix seconds
    answer BLOB NOT NULL
) STRICT;

-- +goose Down
DROP TABLE answers;
