//! What can be found by SQL: the probes of rekey.check() over our catalog, PostgreSQL's own, and
//! the settings.
//!
//! Called by src/check.rs, each probe within a subtransaction of its own. A probe is one SELECT of
//! severity, object, finding and remedy, all text. They look at catalogs and statistics only, never
//! at a row of a users' table, show no value and no key, and assign no transaction id.

use crate::error::Result;
use crate::ffi::sql::{Arg, look};

/// How much a finding matters; the worst first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Values are in the clear, do not open, or can be lost.
    Error,
    /// It will become one, or something does not get on.
    Warning,
    /// A fact worth knowing.
    Notice,
}

impl Severity {
    /// As SQL shows it.
    pub fn name(self) -> &'static str {
        match self {
            Severity::Error => "error",
            Severity::Warning => "warning",
            Severity::Notice => "notice",
        }
    }
}

/// One row of rekey.check().
pub struct Finding {
    /// How much it matters.
    pub severity: Severity,
    /// What it is about: the kind, then the name.
    pub object: String,
    /// What was found; no value, no key.
    pub finding: String,
    /// SQL, a setting or a command to paste where there is one, else what to do.
    pub remedy: String,
}

impl Finding {
    /// Puts one together.
    pub fn new(
        severity: Severity,
        object: impl Into<String>,
        finding: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Finding {
        Finding {
            severity,
            object: object.into(),
            finding: finding.into(),
            remedy: remedy.into(),
        }
    }
}

/// Triggers that are not enabled as they were made: a restore of `pg_dump -a --disable-triggers`
/// leaves ALWAYS and REPLICA as ORIGIN. refuse_direct_change is ORIGIN on purpose: sql/guards.sql.
pub const GUARDS: &str = r"
WITH expected (relation, name, mode, use) AS (
    SELECT r, n, 'A', 'sessions do not hear of changes that come by a restore or by replication'
      FROM unnest('{key,key_slot,slot_wrap,key_grant}'::text[]) AS r,
           unnest('{announce_change,announce_truncate}'::text[]) AS n
    UNION ALL
    SELECT r, 'stamp_registration', 'A',
           'registrations that come by a restore or by replication keep foreign numbers'
      FROM unnest('{registered_column,live_column}'::text[]) AS r
    UNION ALL
    SELECT r, 'yield_to_local', CASE r WHEN 'audit_log' THEN 'A' ELSE 'R' END,
           'rows of a publisher stop an apply worker, or take the place of those that are here'
      FROM unnest('{audit_log,key,key_slot,slot_wrap,root_key,key_grant,registered_column,
                   live_column,progress_state,backfill_state,pause,quarantine}'::text[]) AS r
    UNION ALL
    SELECT r, 'refuse_direct_change', 'O', 'the table can be changed past the functions of rekey'
      FROM unnest('{key,key_slot,slot_wrap,root_key,audit_log,registered_column,
                   live_column}'::text[]) AS r),
modes (mode, name) AS (VALUES ('A', 'ALWAYS'), ('R', 'REPLICA'), ('O', 'ORIGIN'))
SELECT CASE WHEN t.tgenabled::text IN ('A', 'O') THEN 'warning' ELSE 'error' END,
       format('triggers of rekey.%s', e.relation),
       format('%s %s: %s', string_agg(e.name, ', ' ORDER BY e.name),
              CASE coalesce(t.tgenabled::text, '') WHEN '' THEN 'is gone'
                   WHEN 'D' THEN 'is disabled'
                   ELSE format('is enabled as %s, not %s', min(is_now.name), min(made.name)) END,
              CASE WHEN e.mode = 'O' AND t.tgenabled = 'A'
                   THEN 'logical replication cannot apply changes' ELSE min(e.use) END),
       CASE WHEN t.tgenabled IS NULL THEN 'restore the database from a dump: it is damaged'
            ELSE format('ALTER TABLE rekey.%s %s', e.relation,
                        string_agg(format('ENABLE%s TRIGGER %s',
                            CASE WHEN e.mode <> 'O' THEN ' ' || made.name ELSE '' END, e.name),
                            ', ' ORDER BY e.name)) END
  FROM expected e
  JOIN modes made ON made.mode = e.mode
  LEFT JOIN pg_class c ON c.relnamespace = 'rekey'::regnamespace AND c.relname = e.relation
  LEFT JOIN pg_trigger t ON t.tgrelid = c.oid AND t.tgname = e.name
  LEFT JOIN modes is_now ON is_now.mode = t.tgenabled::text
 WHERE t.tgenabled::text IS DISTINCT FROM e.mode
 GROUP BY e.relation, e.mode, t.tgenabled
UNION ALL
SELECT CASE WHEN t.evtenabled = 'O' THEN 'warning' ELSE 'error' END,
       'event trigger ' || e.name,
       CASE coalesce(t.evtenabled::text, '') WHEN '' THEN 'is gone'
            WHEN 'D' THEN 'is disabled' ELSE 'is not enabled as ALWAYS' END || ': ' || e.use,
       CASE WHEN t.evtenabled IS NULL THEN 'restore the database from a dump: it is damaged'
            ELSE format('ALTER EVENT TRIGGER %s ENABLE ALWAYS', e.name) END
  FROM (VALUES ('pg_rekey_guard_drop', 'the extension can be dropped with keys in use'),
               ('pg_rekey_follow_renames', 'dumps name renamed columns by their old names'),
               ('pg_rekey_forget_dropped', 'registrations of dropped tables stay behind'))
       AS e (name, use)
  LEFT JOIN pg_event_trigger t ON t.evtname = e.name
 WHERE t.evtenabled::text IS DISTINCT FROM 'A'
UNION ALL
SELECT 'warning', format('trigger %I on %s', t.tgname, t.tgrelid::regclass),
       'is not enabled as ALWAYS: rows are not re-encrypted on touch under replication',
       format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %I', t.tgrelid::regclass, t.tgname)
  FROM pg_trigger t
 WHERE t.tgfoid = 'rekey.touch()'::regprocedure AND t.tgenabled <> 'A'";

/// Settings, of the server, of databases and of roles, by which literals or parameters get into the
/// log or into statistics, or keys may be lost. The library withholds statements from the lines of
/// errors (src/ffi/hooks.rs), not from these.
pub const SETTINGS: &str = r"
WITH given (object, remedy, name, setting) AS (
    SELECT 'setting ' || name, NULL, name, reset_val FROM pg_settings
     WHERE source NOT IN ('database', 'user', 'database user')
    UNION ALL
    SELECT format('setting %s of %s', split_part(c, '=', 1), w.whose),
           format('ALTER %s RESET %s', w.whose, split_part(c, '=', 1)),
           split_part(c, '=', 1), substr(c, strpos(c, '=') + 1)
      FROM pg_db_role_setting s
      LEFT JOIN pg_roles r ON r.oid = s.setrole
      LEFT JOIN pg_database d ON d.oid = s.setdatabase,
           LATERAL (SELECT CASE WHEN s.setrole = '0'::oid AND d.oid IS NOT NULL
                                THEN 'DATABASE ' || quote_ident(d.datname)
                                ELSE 'ROLE ' || coalesce(quote_ident(r.rolname), 'ALL')
                                     || coalesce(' IN DATABASE ' || quote_ident(d.datname), '')
                           END AS whose) AS w,
           unnest(s.setconfig) AS c
     WHERE s.setdatabase = '0'::oid OR d.datname = current_database()),
rules (name, risky, severity, finding, safe) AS (VALUES
    ('log_statement', '^(mod|all)$', 'warning',
     'statements are logged, with values that are sealed as literals', 'none'),
    ('log_statement', '^ddl$', 'notice',
     'CREATE TABLE AS and other DDL is logged, with values in it that are sealed as literals',
     'none'),
    ('log_min_duration_statement', '^ *[+]?[0-9]', 'warning',
     'slow statements are logged, with values that are sealed as literals', '-1'),
    ('log_min_duration_sample', '^ *[+]?[0-9]', 'warning',
     'a sample of slow statements is logged, with values that are sealed as literals', '-1'),
    ('log_transaction_sample_rate', '[1-9]', 'warning',
     'a sample of transactions is logged, with values that are sealed as literals', '0'),
    ('log_parameter_max_length_on_error', '^ *[-+]?0*[1-9]', 'warning',
     'bind parameters are added to the log lines of errors: values that are sealed among them',
     '0'),
    ('debug_print_parse', '^(on|true|yes|1)$', 'warning',
     'parse trees are logged, with values that are sealed as literals', 'off'),
    ('debug_print_rewritten', '^(on|true|yes|1)$', 'warning',
     'rewritten queries are logged, with values that are sealed as literals', 'off'),
    ('debug_print_plan', '^(on|true|yes|1)$', 'warning',
     'plans are logged, with values that are sealed as literals', 'off'),
    ('auto_explain.log_min_duration', '^ *[+]?[0-9]', 'warning',
     'statements and plans are logged, with values that are sealed as literals', '-1'),
    ('pgaudit.log', '(all|read|write|function|misc)', 'warning',
     'statements are logged, with values that are sealed as literals', 'none'),
    ('pg_stat_statements.track_utility', '^(on|true|yes|1)$', 'notice',
     'DO, CREATE TABLE AS and other utility statements are kept in pg_stat_statements, with values '
     'in them that are sealed as literals', 'off'),
    ('rekey.allow_drop', '^(on|true|yes|1)$', 'warning',
     'the extension can be dropped with keys in use, and every value that they seal is lost then',
     'off')),
found AS (
    SELECT r.severity, g.object, g.name, g.setting, r.finding, g.remedy, r.safe
      FROM rules r JOIN given g ON g.name = r.name AND g.setting ~* r.risky
    UNION ALL
    SELECT 'notice', g.object, g.name, g.setting,
           'without the preload the text of a failing statement is logged until its session has '
           'loaded the library', g.remedy, 'panic'
      FROM given g
     WHERE g.name = 'log_min_error_statement' AND g.setting !~* '^(log|fatal|panic)$'
       AND current_setting('shared_preload_libraries') !~ 'pg_rekey')
SELECT severity, object, format('%s is %s: %s', name, quote_literal(setting), finding),
       coalesce(remedy, format('ALTER SYSTEM SET %s = %L; SELECT pg_reload_conf()', name, safe))
  FROM found
UNION ALL
SELECT 'warning', g.object,
       format('%s is %s: bind parameters are logged with the statements: values that are sealed '
              'among them', g.name, quote_literal(g.setting)),
       coalesce(g.remedy, format('ALTER SYSTEM SET %s = 0; SELECT pg_reload_conf()', g.name))
  FROM given g
 WHERE g.name IN ('log_parameter_max_length', 'auto_explain.log_parameter_max_length')
   AND g.setting ~ '^ *[-+]?0*[1-9]'
   AND EXISTS (SELECT FROM found f WHERE f.severity = 'warning'
                  AND CASE g.name WHEN 'log_parameter_max_length'
                      THEN f.name IN ('log_statement', 'log_min_duration_statement',
                                      'log_min_duration_sample', 'log_transaction_sample_rate')
                      ELSE f.name = 'auto_explain.log_min_duration' END)
 ORDER BY 2";

/// Keys that have passed their longest life, the longest overdue first.
pub const AGES: &str = r"
SELECT 'warning', 'key ' || k.key_name,
       format('its active slot is %s old, and its max_age is %s',
              date_trunc('second', clock_timestamp() - s.activated_at), k.max_age),
       format('SELECT %s.rotate_key(%L)', e.extnamespace::regnamespace, k.key_name)
  FROM rekey.key k
  JOIN rekey.key_slot s USING (key_name)
  JOIN pg_extension e ON e.extname = 'pg_rekey'
 WHERE s.state = 'active' AND k.max_age > '0'::interval AND k.shredded_at IS NULL
   AND s.activated_at + k.max_age < clock_timestamp()
 ORDER BY s.activated_at + k.max_age";

/// Superseded slots without a proof: compromised ones, and those past their grace.
pub const UNPROVED: &str = r"
SELECT CASE WHEN s.compromised_at IS NULL THEN 'warning' ELSE 'error' END,
       format('slot %s of key %s', s.slot_id, s.key_name),
       CASE WHEN s.compromised_at IS NULL
            THEN format('it is not proved unused, %s after the end of its grace',
                        date_trunc('second', clock_timestamp() - s.superseded_at - k.grace))
            ELSE 'it is compromised, and not proved unused' END
       || CASE WHEN r.registered THEN '' ELSE ': no column is registered' END,
       CASE WHEN r.registered THEN 'CALL rekey.reencrypt()'
            WHEN k.purpose = 'seal'
            THEN 'SELECT rekey.register_column(table_name, column_name) -- each of envelopes'
            ELSE 'SELECT rekey.register_fingerprint(table_name, column_name, sealed_column, '
                 'key_name) -- each of fingerprints, after its sealed column' END
  FROM rekey.key_slot s
  JOIN rekey.key k USING (key_name)
  JOIN rekey.key_slot a ON a.key_name = s.key_name AND a.state = 'active',
       (SELECT EXISTS (SELECT FROM rekey.registered_column) AS registered) AS r
 WHERE s.state = 'previous' AND k.shredded_at IS NULL
   AND (s.superseded_at + k.grace < clock_timestamp() OR s.compromised_at IS NOT NULL)
 ORDER BY s.compromised_at IS NULL, s.superseded_at + k.grace";

/// Pauses that somebody may have forgotten.
pub const PAUSES: &str = r"
SELECT 'warning',
       CASE WHEN p.table_name::oid = '0'::oid THEN 'all tables'
            ELSE 'table ' || p.table_name::text END,
       format('re-encryption is paused by %s since %s, %s%s', p.paused_by,
              date_trunc('second', p.paused_at),
              CASE WHEN p.paused_until = 'infinity' THEN 'without an end'
                   ELSE 'until ' || date_trunc('second', p.paused_until) END,
              CASE WHEN p.reason = '' THEN '' ELSE ': ' || p.reason END),
       CASE WHEN p.table_name::oid = '0'::oid THEN 'SELECT rekey.resume()'
            ELSE format('SELECT rekey.resume(%L)', p.table_name::text) END
  FROM rekey.pause p
 WHERE p.paused_until > clock_timestamp()
   AND (p.paused_until = 'infinity' OR p.paused_at < clock_timestamp() - '7 days'::interval)
 ORDER BY p.paused_at";

/// Rows under quarantine that nobody has dismissed, by table.
pub const QUARANTINE: &str = r"
SELECT 'error', 'table ' || q.table_name::text,
       format('%s rows could not be re-encrypted (SQLSTATE %s): the slots that they name cannot be '
              'proved unused',
              count(*) + coalesce(max(p.rows_unlisted), 0), string_agg(DISTINCT q.sqlstate, ', ')),
       format('SELECT * FROM rekey.errors WHERE table_name = %L::regclass; '
              '-- mend or dismiss each, then: SELECT rekey.retry_quarantine()',
              q.table_name::text)
  FROM rekey.quarantine q
  LEFT JOIN rekey.progress_state p ON p.table_name::oid = q.table_name::oid
 WHERE q.dismissed_at IS NULL
 GROUP BY q.table_name ORDER BY count(*) DESC";

/// Tables that re-encryption does not get on with: failures, proofs that were given up, standstill.
pub const PROGRESS: &str = r"
SELECT 'warning', 'table ' || p.table_name::text, 're-encryption of it is put off: ' || p.note,
       'CALL rekey.reencrypt(' || quote_literal(p.table_name::text)
       || ') -- as its owner; the server log names the SQLSTATE'
  FROM rekey.progress_state p
 WHERE p.note ~ '^(failed with SQLSTATE|a worker died|code of its owner)'
UNION ALL
SELECT DISTINCT 'warning', 'table ' || coalesce(substring(p.note FROM ' at (.*)$'), '?'),
       'the proof was given up there: its snapshot reached rekey.max_snapshot_age ('
       || current_setting('rekey.max_snapshot_age') || ')',
       'ALTER SYSTEM SET rekey.max_snapshot_age = 0; SELECT pg_reload_conf()'
       ' -- no limit: the snapshot holds back vacuum meanwhile'
  FROM rekey.progress_state p
 WHERE p.note LIKE '%rekey.max_snapshot_age%'
UNION ALL
SELECT 'warning', 'table ' || p.table_name::text,
       format('re-encryption stands still in phase %s since %s%s', p.phase,
              date_trunc('second', p.updated_at),
              CASE WHEN p.note = '' THEN '' ELSE ': ' || p.note END),
       'SELECT * FROM rekey.progress -- end what waits_for names'
  FROM rekey.progress_state p
 WHERE p.phase <> 'done' AND p.updated_at < clock_timestamp() - '1 day'::interval
   AND NOT EXISTS (SELECT FROM rekey.pause z
                    WHERE z.paused_until > clock_timestamp()
                      -- A table whose own pass is complete waits for whichever is paused.
                      AND (p.blocks_left = 0 OR z.table_name::oid IN (p.table_name::oid, '0'::oid)
                           OR z.table_name::oid IN (SELECT a.relid::oid
                                FROM pg_partition_ancestors(p.table_name) AS a)))";

/// Live columns whose trigger does not look at every write, that are filled and that nobody has
/// ended, or that cannot be filled.
pub const LIVE: &str = r"
SELECT 'error', 'table ' || coalesce(t.tgrelid::regclass, l.table_name)::text,
       format('trigger %s %s: writes pass it, and columns %I and %I come to differ', l.trigger_name,
              CASE coalesce(t.tgenabled::text, '') WHEN '' THEN 'is gone'
                   WHEN 'D' THEN 'is disabled' ELSE 'is not enabled as ALWAYS' END,
              l.column_name, l.into_column),
       CASE WHEN t.oid IS NULL THEN 'restore the table from a dump, with its triggers'
            ELSE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %s', t.tgrelid::regclass,
                        l.trigger_name) END
  FROM rekey.live_column l
  LEFT JOIN pg_trigger t
         ON t.tgname = l.trigger_name AND t.tgfoid = 'rekey.live()'::regprocedure
 WHERE t.tgenabled::text IS DISTINCT FROM 'A'
UNION ALL
SELECT 'warning', 'table ' || l.table_name::text,
       format('column %I has been %sed into %I since %s, and is still there', l.column_name,
              l.direction, l.into_column, date_trunc('second', b.done_at)),
       format('SELECT rekey.finish_%s_column(%L, %L)', l.direction, l.table_name::text,
              l.column_name)
  FROM rekey.live_column l
 CROSS JOIN LATERAL (SELECT bool_and(b.phase = 'done') AS done, max(b.updated_at) AS done_at
          FROM rekey.backfill_state b
         WHERE b.table_name::oid = l.table_name::oid OR l.table_name::oid IN
               (SELECT a.relid::oid FROM pg_partition_ancestors(b.table_name) AS a)) AS b
 WHERE b.done AND b.done_at < clock_timestamp() - '7 days'::interval
UNION ALL
SELECT 'warning', 'table ' || b.table_name::text,
       'its live columns are not filled: ' || b.note,
       'CALL rekey.reencrypt(' || quote_literal(b.table_name::text)
       || ') -- as its owner; the server log names the SQLSTATE'
  FROM rekey.backfill_state b
 WHERE b.note ~ '(fails|failed) with SQLSTATE|a worker died|code of its owner'";

/// Keys that everyone may use, grants of roles that are gone, and what was opened to everyone in
/// the schema: a privilege of PUBLIC that the extension has not given.
pub const GRANTS: &str = r"
SELECT 'warning', 'key ' || g.key_name,
       CASE WHEN g.grantee::oid = '0'::oid THEN 'everyone (PUBLIC) holds '
            ELSE format('role %s, which is gone, holds ', g.grantee::oid) END
       || string_agg(g.privilege, ', ' ORDER BY g.privilege),
       format('SELECT rekey.revoke_key(%L, %L, %L)', g.key_name,
              CASE WHEN g.grantee::oid = '0'::oid THEN 'public' ELSE g.grantee::oid::text END,
              array_agg(g.privilege ORDER BY g.privilege))
  FROM rekey.key_grant g
 WHERE g.grantee::oid = '0'::oid
    OR NOT EXISTS (SELECT FROM pg_roles r WHERE r.oid = g.grantee::oid)
 GROUP BY g.key_name, g.grantee::oid
UNION ALL
SELECT 'warning', lower(o.kind) || ' ' || o.object,
       'everyone (PUBLIC) holds ' || string_agg(o.privilege, ', ' ORDER BY o.privilege),
       format('REVOKE %s ON %s %s FROM PUBLIC', string_agg(o.privilege, ', ' ORDER BY o.privilege),
              o.kind, o.object)
  FROM (SELECT 'TABLE' AS kind, c.oid::regclass::text AS object, a.privilege_type AS privilege
          FROM pg_class c, aclexplode(c.relacl) AS a
         WHERE c.relnamespace = 'rekey'::regnamespace AND c.relkind <> 'S'
           AND a.grantee = '0'::oid
           AND NOT EXISTS (SELECT FROM pg_init_privs i, aclexplode(i.initprivs) AS b
                            WHERE i.classoid = 'pg_class'::regclass AND i.objoid = c.oid
                              AND i.objsubid = 0 AND b.grantee = '0'::oid
                              AND b.privilege_type = a.privilege_type)
        UNION ALL
        SELECT 'ROUTINE', p.oid::regprocedure::text, a.privilege_type
          FROM pg_proc p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) AS a
         WHERE p.pronamespace = 'rekey'::regnamespace AND a.grantee = '0'::oid
           AND NOT EXISTS (SELECT FROM pg_init_privs i, aclexplode(i.initprivs) AS b
                            WHERE i.classoid = 'pg_proc'::regclass AND i.objoid = p.oid
                              AND b.grantee = '0'::oid
                              AND b.privilege_type = a.privilege_type)) AS o
 GROUP BY o.kind, o.object";

/// Standbys that are behind, and replication slots without one; on a standby its own lag.
pub const STANDBYS: &str = r"
WITH allowed (lag) AS (
    SELECT coalesce(nullif(setting::bigint, 0), 30000) * '1 millisecond'::interval
      FROM pg_settings WHERE name = 'rekey.max_replication_lag')
SELECT 'warning', 'standby ' || coalesce(nullif(r.application_name, ''), r.pid::text),
       format('it replays %s behind: re-encryption rests, and slots stay', r.replay_lag),
       'SELECT * FROM pg_stat_replication'
  FROM pg_stat_replication r, allowed
 WHERE r.replay_lag > allowed.lag
UNION ALL
SELECT 'warning', 'replication slot ' || s.slot_name,
       'no standby is connected to it: it keeps WAL, and slots are neither disabled nor destroyed',
       format('SELECT pg_drop_replication_slot(%L) -- if its standby is gone for good', s.slot_name)
  FROM pg_replication_slots s
 WHERE s.slot_type = 'physical' AND NOT s.active AND NOT s.temporary
UNION ALL
SELECT 'warning', 'this standby',
       format('it replays %s behind: new slots and grants are not known here yet',
              date_trunc('second', clock_timestamp() - pg_last_xact_replay_timestamp())),
       'SELECT * FROM pg_stat_wal_receiver'
  FROM allowed
 WHERE pg_is_in_recovery() AND pg_last_wal_receive_lsn() > pg_last_wal_replay_lsn()
   AND pg_last_xact_replay_timestamp() < clock_timestamp() - allowed.lag";

/// Opened values that PostgreSQL keeps: materialized views over registered columns, and what was
/// made with a function that opens and claims to be IMMUTABLE. A function is told by its text.
pub const COPIES: &str = r"
WITH RECURSIVE verb (oid) AS (
    SELECT p.oid FROM pg_proc p JOIN pg_extension e ON e.extnamespace = p.pronamespace
     WHERE e.extname = 'pg_rekey' AND p.proname IN ('decrypt_col', 'decrypt_col_as')),
opener (oid) AS (
    SELECT oid FROM verb
    UNION
    SELECT p.oid FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang
     WHERE l.lanname NOT IN ('c', 'internal')
       AND (p.prosrc ~* '[[:<:]]decrypt_col(_as)?[[:>:]]'
            OR EXISTS (SELECT FROM pg_depend d JOIN verb v ON v.oid = d.refobjid
                        WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid
                          AND d.refclassid = 'pg_proc'::regclass))),
rule (oid, relation, opens) AS (
    SELECT r.oid, r.ev_class,
           EXISTS (SELECT FROM pg_depend d JOIN opener o ON o.oid = d.refobjid
                    WHERE d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
                      AND d.refclassid = 'pg_proc'::regclass)
      FROM pg_rewrite r JOIN pg_class c ON c.oid = r.ev_class AND c.relkind IN ('v', 'm')),
derived (relation, opens) AS (
    SELECT r.relation, r.opens
      FROM rekey.registered_column c
      JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass
       AND d.refclassid = 'pg_class'::regclass AND d.refobjid = c.table_name::oid
       AND d.refobjsubid = rekey.registered_attnum(c.table_name, c.column_name, c.attnum, c.stamp)
      JOIN rule r ON r.oid = d.objid
    UNION
    SELECT r.relation, v.opens OR r.opens
      FROM derived v
      JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass
       AND d.refclassid = 'pg_class'::regclass AND d.refobjid = v.relation
      JOIN rule r ON r.oid = d.objid AND r.relation <> v.relation)
SELECT CASE WHEN bool_or(v.opens) THEN 'error' ELSE 'warning' END,
       'materialized view ' || c.oid::regclass::text,
       CASE WHEN bool_or(v.opens)
            THEN 'it stores opened values of a registered column in the clear'
            ELSE 'it keeps a copy of a registered column, which is not re-encrypted' END,
       CASE WHEN bool_or(v.opens) THEN 'DROP MATERIALIZED VIEW ' || c.oid::regclass::text
            ELSE format('REFRESH MATERIALIZED VIEW %s -- after each drain', c.oid::regclass) END
  FROM derived v JOIN pg_class c ON c.oid = v.relation AND c.relkind = 'm'
 GROUP BY c.oid
UNION ALL
SELECT 'warning', 'function ' || p.oid::regprocedure::text,
       'it opens values and claims to be IMMUTABLE: indexes and plans may keep what it returns, '
       'and for whom it is opened is not asked again',
       format('ALTER FUNCTION %s STABLE', p.oid::regprocedure)
  FROM opener o JOIN pg_proc p ON p.oid = o.oid
 WHERE p.provolatile = 'i'
UNION ALL
SELECT DISTINCT 'error', 'index ' || c.oid::regclass::text,
       'it stores opened values in the clear', 'DROP INDEX ' || c.oid::regclass::text
  FROM opener o
  JOIN pg_depend d ON d.refclassid = 'pg_proc'::regclass AND d.refobjid = o.oid
   AND d.classid = 'pg_class'::regclass
  JOIN pg_class c ON c.oid = d.objid AND c.relkind IN ('i', 'I')
UNION ALL
SELECT DISTINCT 'error', format('column %s.%I', a.attrelid::regclass, a.attname),
       'it is generated, and stores opened values in the clear',
       format('ALTER TABLE %s DROP COLUMN %I', a.attrelid::regclass, a.attname)
  FROM opener o
  JOIN pg_depend d ON d.refclassid = 'pg_proc'::regclass AND d.refobjid = o.oid
   AND d.classid = 'pg_attrdef'::regclass
  JOIN pg_attrdef f ON f.oid = d.objid
  JOIN pg_attribute a ON a.attrelid = f.adrelid AND a.attnum = f.adnum AND a.attgenerated = 's'
UNION ALL
SELECT DISTINCT 'error', format('statistics %I.%I', s.stxnamespace::regnamespace, s.stxname),
       'it keeps a sample of opened values in the clear',
       format('DROP STATISTICS %I.%I', s.stxnamespace::regnamespace, s.stxname)
  FROM opener o
  JOIN pg_depend d ON d.refclassid = 'pg_proc'::regclass AND d.refobjid = o.oid
   AND d.classid = 'pg_statistic_ext'::regclass
  JOIN pg_statistic_ext s ON s.oid = d.objid";

/// Registered columns whose values can be moved from row to row, and owners who cannot evaluate the
/// context in whose name rows are re-encrypted.
pub const CONTEXTS: &str = r"
SELECT 'notice', format('column %s.%I', c.table_name, c.column_name),
       'it is registered without a context: an envelope that is moved to another row opens there',
       format('SELECT rekey.unregister_column(%L, %L); SELECT rekey.register_column(%L, %L, '
              '%L) -- once its values are sealed with that context',
              c.table_name::text, c.column_name, c.table_name::text, c.column_name,
              format('rekey.context(%L, id::text)', r.relname || '.' || c.column_name))
  FROM rekey.registered_column c JOIN pg_class r ON r.oid = c.table_name::oid
 WHERE c.context = '' AND c.sealed_column = ''
UNION ALL
SELECT 'error', format('column %s.%I', c.table_name, c.column_name),
       format('the table''s owner %s cannot evaluate its context: he lacks %s',
              pg_get_userbyid(r.relowner), lacking.privilege),
       format('GRANT %s TO %I', lacking.privilege, pg_get_userbyid(r.relowner))
  FROM rekey.registered_column c JOIN pg_class r ON r.oid = c.table_name::oid,
       LATERAL (SELECT 'USAGE ON SCHEMA rekey' AS privilege
                 WHERE NOT has_schema_privilege(r.relowner, 'rekey', 'USAGE')
                UNION ALL
                SELECT 'EXECUTE ON FUNCTION rekey.context(text[])'
                 WHERE NOT has_function_privilege(r.relowner, 'rekey.context(text[])', 'EXECUTE'))
       AS lacking
 WHERE c.context ~* '[[:<:]]rekey[[:>:]]'";

/// Runs one of them, for `limit` rows at most.
pub fn probe(sql: &str, limit: usize) -> Result<Vec<Finding>> {
    let limited = format!("SELECT * FROM ({sql}) AS found LIMIT {limit}");
    let finding = |row: Vec<Option<String>>| {
        let mut cells = row.into_iter().map(Option::unwrap_or_default);
        let mut next = || cells.next().unwrap_or_default();
        let severity = match next().as_str() {
            "error" => Severity::Error,
            "notice" => Severity::Notice,
            _ => Severity::Warning,
        };
        Finding::new(severity, next(), next(), next())
    };
    Ok(look(&limited, &[])?.into_iter().map(finding).collect())
}

fn number(cell: Option<&Option<String>>) -> i64 {
    cell.and_then(Option::as_deref)
        .and_then(|cell| cell.parse().ok())
        .unwrap_or(0)
}

/// What root keys wrap.
pub struct Wraps {
    /// Slots with a wrapped key under one root key, and how many of them none of the root keys that
    /// are held opens: by root id in hex.
    pub of_root: Vec<(String, i64, i64)>,
    /// Slots with wrapped keys under other root keys only.
    pub elsewhere: i64,
    /// Slots with wrapped keys under root keys only that are retired here, or not known.
    pub retired: i64,
    /// Slots that are not destroyed and have no wrapped key at all.
    pub unwrapped: i64,
}

/// Counts what is wrapped under which root key, given the root keys that this server holds.
pub fn wraps(held: &[&[u8]]) -> Result<Wraps> {
    let of_root = look(
        "SELECT encode(r.root_id, 'hex'), count(*)::text, \
                (CASE WHEN r.root_id = ANY ($1) THEN 0 ELSE \
                    (SELECT count(*) FROM rekey.slot_wrap w WHERE w.root_id = r.root_id \
                        AND NOT EXISTS (SELECT FROM rekey.slot_wrap h \
                             WHERE h.slot_id = w.slot_id AND h.root_id = ANY ($1))) END)::text \
           FROM rekey.slot_wrap r GROUP BY r.root_id",
        &[Arg::Byteas(held)],
    )?;
    let elsewhere = look(
        "SELECT count(DISTINCT w.slot_id)::text FROM rekey.slot_wrap w \
          WHERE NOT EXISTS (SELECT FROM rekey.slot_wrap h \
                 WHERE h.slot_id = w.slot_id AND h.root_id = ANY ($1))",
        &[Arg::Byteas(held)],
    )?;
    let retired = look(
        "SELECT count(DISTINCT w.slot_id)::text FROM rekey.slot_wrap w \
          WHERE NOT EXISTS (SELECT FROM rekey.slot_wrap h JOIN rekey.root_key r USING (root_id) \
                 WHERE h.slot_id = w.slot_id AND r.state <> 'retired')",
        &[],
    )?;
    let unwrapped = look(
        "SELECT count(*)::text FROM rekey.key_slot s WHERE s.state <> 'destroyed' \
            AND NOT EXISTS (SELECT FROM rekey.slot_wrap w WHERE w.slot_id = s.slot_id)",
        &[],
    )?;
    let root = |row: &Vec<Option<String>>| {
        let id = row.first().cloned().flatten().unwrap_or_default();
        (id, number(row.get(1)), number(row.get(2)))
    };
    Ok(Wraps {
        of_root: of_root.iter().map(root).collect(),
        elsewhere: number(elsewhere.first().and_then(|row| row.first())),
        retired: number(retired.first().and_then(|row| row.first())),
        unwrapped: number(unwrapped.first().and_then(|row| row.first())),
    })
}

/// How many slots await re-encryption, and how many rows under quarantine hold up their proof.
pub fn awaiting() -> Result<(i64, i64)> {
    let found = look(
        "SELECT (SELECT count(*) FROM rekey.key_slot s \
                   JOIN rekey.key_slot a ON a.key_name = s.key_name AND a.state = 'active' \
                   JOIN rekey.key k ON k.key_name = s.key_name \
                  WHERE s.state = 'previous' AND k.shredded_at IS NULL)::text, \
                (SELECT count(*) FROM rekey.quarantine WHERE dismissed_at IS NULL)::text",
        &[],
    )?;
    let row = found.first();
    let cell = |at: usize| number(row.and_then(|row| row.get(at)));
    Ok((cell(0), cell(1)))
}

/// A value of this session's settings as a list that ALTER SYSTEM takes, with `also` at its end.
pub fn list_setting(name: &str, also: &str) -> Result<String> {
    let found = look(
        "SELECT string_agg(quote_literal(btrim(item, ' \"')), ', ') \
           FROM regexp_split_to_table(concat_ws(',', nullif(current_setting($1), ''), $2), ',') \
                AS item",
        &[Arg::Text(name), Arg::Text(also)],
    )?;
    Ok(found
        .into_iter()
        .flatten()
        .flatten()
        .next()
        .unwrap_or_default())
}

/// The schema of the verbs, quoted.
pub fn schema_of_verbs() -> Result<String> {
    let sql =
        "SELECT extnamespace::regnamespace::text FROM pg_extension WHERE extname = 'pg_rekey'";
    let found = look(sql, &[])?.into_iter().flatten().flatten().next();
    Ok(found.unwrap_or_default())
}
