-- A table with a sealed column and its fingerprint, both registered: after a rotation the worker
-- brings both up to date.
CREATE TABLE customer (
    id       uuid PRIMARY KEY,
    name     text NOT NULL,
    email    bytea NOT NULL, -- an envelope
    email_fp bytea NOT NULL  -- the fingerprint of its value in lower case
);
CREATE INDEX ON customer (email_fp);

SELECT rekey.register_column('customer', 'email', $$rekey.context('customer.email', id::text)$$);
SELECT rekey.register_fingerprint('customer', 'email_fp', 'email', key_name => 'email_lookup',
                                  sealed_key => 'pii', normalise => 'lower($1)');
