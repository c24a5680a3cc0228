-- A sealed column and its fingerprint, both registered: after a rotation the worker brings both
-- up to date. Registration is transactional, as all of a migration.
ALTER TABLE customer
    ADD COLUMN email    bytea, -- an envelope
    ADD COLUMN email_fp bytea; -- the fingerprint of its value in lower case
CREATE INDEX ON customer (email_fp);

SELECT rekey.register_column('customer', 'email', $$rekey.context('customer.email', id::text)$$);
SELECT rekey.register_fingerprint('customer', 'email_fp', 'email', key_name => 'email_lookup',
                                  sealed_key => 'pii', normalise => 'lower($1)');
