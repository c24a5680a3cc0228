-- What the extension adds to a database: its functions, views and tables, as psql shows them.
\set ECHO none
SET client_min_messages = error;
CREATE EXTENSION IF NOT EXISTS pg_rekey;
SELECT NOT rekey.ready() AS fresh \gset
\if :fresh
SELECT rekey.init_root_key() AS root_id \gset
\endif
RESET client_min_messages;
\set ECHO all
\df encrypt_col
\df decrypt_col
\df decrypt_col_as
\df rotate_key
\df rekey.*
\d rekey.keys
\d rekey.slots
\d rekey.grants
\d rekey.root_keys
\d rekey.audit
-- Who may execute what: everyone but for these.
SELECT p.oid::regprocedure AS not_for_public
  FROM pg_proc p
 WHERE pronamespace = 'rekey'::regnamespace
   AND NOT EXISTS (SELECT FROM aclexplode(coalesce(proacl, acldefault('f', proowner))) a
                    WHERE a.grantee = 0 AND a.privilege_type = 'EXECUTE')
 ORDER BY 1;
-- Tables and sequences are closed to everyone, views are open.
SELECT relname, relkind,
       has_table_privilege('pg_database_owner', c.oid, 'SELECT') AS readable,
       has_table_privilege('pg_database_owner', c.oid, 'INSERT, UPDATE, DELETE, TRUNCATE') AS writable
  FROM pg_class c
 WHERE relnamespace = 'rekey'::regnamespace AND relkind IN ('r', 'v')
 ORDER BY relkind, relname COLLATE "C";
-- What a dump carries.
SELECT c::regclass AS dumped, condition
  FROM pg_extension, unnest(extconfig, extcondition) AS u (c, condition)
 WHERE extname = 'pg_rekey'
 ORDER BY 1;
-- Settings: who may change them.
SELECT name, context, vartype, boot_val FROM pg_settings WHERE name LIKE 'rekey.%' ORDER BY name;
