-- Values in and out: the verbs as an application uses them.
\set ECHO none
SET client_min_messages = error;
CREATE EXTENSION IF NOT EXISTS pg_rekey;
SELECT NOT rekey.ready() AS fresh \gset
\if :fresh
SELECT rekey.init_root_key() AS root_id \gset
\endif
RESET client_min_messages;
\set ECHO all
SET DateStyle = ISO;
SET IntervalStyle = postgres;
SELECT rekey.create_key('tour.pii') > 0 AS created;
SET rekey.default_key = 'tour.pii';
-- Text, bytea, and any other type.
SELECT decrypt_col(encrypt_col('Ada Lovelace'));
SELECT decrypt_col(encrypt_col('\x00ff'::bytea));
SELECT decrypt_col(encrypt_col(1815.1210));
SELECT decrypt_col_as(encrypt_col(1815.1210), NULL::numeric) + 1 AS sum;
SELECT decrypt_col_as(encrypt_col('{"born": 1815}'::jsonb), NULL::jsonb) ->> 'born' AS born;
SELECT decrypt_col_as(encrypt_col(42), NULL::bigint) AS as_bigint;
SELECT decrypt_col_as(encrypt_col('1815-12-10'::date), NULL::date) AS as_date;
-- NULL stays NULL.
SELECT encrypt_col(NULL) IS NULL AS sealed, decrypt_col(NULL) IS NULL AS opened;
-- What an envelope says of itself.
SELECT octet_length(encrypt_col('')) AS overhead;
SELECT format, suite, kind, context_bound, slot_id = active_slot AS active, d.key_name, state, value_bytes
  FROM rekey.keys, rekey.describe(encrypt_col(7, context => 'c')) d
 WHERE keys.key_name = 'tour.pii';
SELECT rekey.is_envelope(encrypt_col('x')), rekey.is_envelope('\xf901'), rekey.is_envelope('x'), rekey.is_envelope(NULL);
SELECT rekey.slot_id('x') IS NULL AS none, rekey.slot_id(NULL) IS NULL AS null;
-- A context binds an envelope to its cell.
SELECT rekey.context('customer.email', '17');
CREATE TABLE customer (id int PRIMARY KEY, email bytea);
INSERT INTO customer VALUES (17, encrypt_col('ada@example.org', context => rekey.context('customer.email', '17')));
SELECT decrypt_col(email, rekey.context('customer.email', id::text)) FROM customer;
SELECT rekey.can_open(email, rekey.context('customer.email', '17')) AS here,
       rekey.can_open(email, rekey.context('customer.email', '18')) AS elsewhere,
       rekey.can_open(email) AS unbound
  FROM customer;
-- Rotation: old values stay readable, new ones use the new slot.
SELECT rotate_key('tour.pii', reason => 'tour') > 0 AS rotated;
SELECT decrypt_col(email, rekey.context('customer.email', id::text)) FROM customer;
SELECT s.version, s.state, s.reason, count(c.id) AS envelopes
  FROM rekey.slots s LEFT JOIN customer c ON rekey.slot_id(c.email) = s.slot_id
 WHERE s.key_name = 'tour.pii'
 GROUP BY s.slot_id, s.version, s.state, s.reason ORDER BY s.version;
SELECT rekey.rollback_rotation('tour.pii') = rekey.slot_id(email) AS back FROM customer;
SELECT version, state FROM rekey.slots WHERE key_name = 'tour.pii' ORDER BY version;
-- Policy, grants, views.
SELECT rekey.set_policy('tour.pii', grace => '7 days', max_age => '90 days', custodian => 'privacy team');
CREATE ROLE regress_rekey_clerk;
SELECT rekey.grant_key('tour.pii', 'regress_rekey_clerk', '{encrypt,decrypt}');
SELECT grantee, privilege FROM rekey.grants WHERE key_name = 'tour.pii' ORDER BY grantee COLLATE "C", privilege COLLATE "C";
SELECT rekey.has_key_privilege('regress_rekey_clerk', 'tour.pii', 'decrypt') AS decrypt,
       rekey.has_key_privilege('regress_rekey_clerk', 'tour.pii', 'rotate') AS rotate;
SELECT rekey.revoke_key('tour.pii', 'regress_rekey_clerk', '{decrypt}');
SELECT key_name, owner = current_user::regrole AS mine, grace, max_age, next_rotation = active_since + max_age AS due, after_drain, require_context, custodian
  FROM rekey.keys WHERE key_name = 'tour.pii';
SELECT action, from_state, to_state, detail, actor = current_user AS by_me
  FROM rekey.audit WHERE key_name = 'tour.pii' ORDER BY audit_id;
-- The end of a key.
SELECT rekey.shred_key('tour.pii', 'end of the tour');
SELECT version, state FROM rekey.slots WHERE key_name = 'tour.pii' ORDER BY version;
SELECT rekey.drop_key('tour.pii');
SELECT count(*) AS keys FROM rekey.keys WHERE key_name = 'tour.pii';
DROP TABLE customer;
DROP ROLE regress_rekey_clerk;
