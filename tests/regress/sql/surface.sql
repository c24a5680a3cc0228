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
SET IntervalStyle = postgres;
\pset format unaligned
\pset tuples_only on
SELECT format(E'%s(%s) RETURNS %s\n    %s',
              p.oid::regproc, pg_get_function_arguments(p.oid), pg_get_function_result(p.oid),
              obj_description(p.oid, 'pg_proc'))
  FROM pg_proc p JOIN pg_depend d ON d.classid = 'pg_proc'::regclass AND d.objid = p.oid
 WHERE d.deptype = 'e' AND d.refclassid = 'pg_extension'::regclass
   AND d.refobjid = (SELECT oid FROM pg_extension WHERE extname = 'pg_rekey')
 ORDER BY p.oid::regprocedure::text COLLATE "C";
\pset format aligned
\pset tuples_only off
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
 ORDER BY p.oid::regprocedure::text COLLATE "C";
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
 ORDER BY c::regclass::text COLLATE "C";
-- Settings: who may change them.
SELECT name, context, vartype, boot_val FROM pg_settings WHERE name LIKE 'rekey.%' ORDER BY name;
