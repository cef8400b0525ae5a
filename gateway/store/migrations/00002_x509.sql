-- +goose Up
ALTER TABLE keys ADD COLUMN x509_chain BLOB; -- DER certificates, the key's first; NULL: none

-- +goose Down
ALTER TABLE keys DROP COLUMN x509_chain;
