-- +goose Up
-- Pairs that are being made in the token and are not registered yet. What is here
-- when the gateway starts was cut off, and is destroyed.
CREATE TABLE pending_pairs (
    token_id BLOB PRIMARY KEY, -- CKA_ID
    key_name TEXT NOT NULL
) STRICT;

-- +goose Down
DROP TABLE pending_pairs;
