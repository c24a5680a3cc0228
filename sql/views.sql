-- An operator that a database owner has planted in the target schema must not get into a view.
SET LOCAL search_path TO pg_catalog, pg_temp;

-- What people read: keys, slots, grants, root keys and the audit log, without material.
-- Every view shows the rows of keys on which the reader holds a privilege; members of
-- pg_monitor see all.

CREATE VIEW rekey.keys WITH (security_barrier) AS
SELECT k.key_name,
       (SELECT g.grantee FROM rekey.key_grant g
         WHERE g.key_name = k.key_name AND g.privilege = 'owner'
         ORDER BY g.granted_at LIMIT 1) AS owner,
       a.slot_id AS active_slot,
       ARRAY(SELECT p.slot_id FROM rekey.key_slot p
              WHERE p.key_name = k.key_name AND p.state = 'previous'
              ORDER BY p.superseded_at DESC, p.version DESC) AS previous_slots,
       a.activated_at AS active_since,
       k.grace,
       k.max_age,
       CASE WHEN k.max_age > '0'::interval THEN a.activated_at + k.max_age END AS next_rotation,
       k.after_drain,
       k.require_context,
       k.custodian,
       k.comment,
       k.purpose,
       k.created_at,
       k.shredded_at
  FROM rekey.key k
  LEFT JOIN rekey.key_slot a ON a.key_name = k.key_name AND a.state = 'active'
 WHERE rekey.key_visible(k.key_name);
COMMENT ON VIEW rekey.keys IS 'Keys, their policy and their active slot';

CREATE VIEW rekey.slots WITH (security_barrier) AS
SELECT s.slot_id,
       s.key_name,
       s.version,
       s.state,
       s.created_at,
       s.activated_at,
       s.superseded_at,
       CASE WHEN s.superseded_at IS NOT NULL THEN s.superseded_at + k.grace END AS grace_until,
       s.drained_at,
       s.disabled_at,
       s.destroyed_at,
       s.compromised_at,
       s.reason,
       s.proof
  FROM rekey.key_slot s
  LEFT JOIN rekey.key k ON k.key_name = s.key_name
 WHERE rekey.key_visible(s.key_name);
COMMENT ON VIEW rekey.slots IS 'Versions of keys with their states and dates; destroyed slots stay as tombstones';

CREATE VIEW rekey.grants WITH (security_barrier) AS
SELECT g.key_name,
       CASE WHEN g.grantee::oid = '0'::oid THEN 'public'
            ELSE coalesce(r.rolname::text, g.grantee::text) END AS grantee,
       g.privilege,
       g.granted_at
  FROM rekey.key_grant g
  LEFT JOIN pg_catalog.pg_roles r ON r.oid = g.grantee::oid
 WHERE rekey.key_visible(g.key_name);
COMMENT ON VIEW rekey.grants IS 'Who may do what with which key; grantee public is everyone, a bare number a dropped role';

CREATE VIEW rekey.root_keys WITH (security_barrier) AS
SELECT pg_catalog.encode(r.root_id, 'hex') AS root_id,
       r.state,
       r.created_at,
       r.retired_at,
       rekey.holds_root_key(pg_catalog.encode(r.root_id, 'hex')) AS held_here,
       (SELECT count(*) FROM rekey.slot_wrap w WHERE w.root_id = r.root_id) AS slots
  FROM rekey.root_key r
 WHERE rekey.key_visible(NULL);
COMMENT ON VIEW rekey.root_keys IS 'Root keys by id, whether this server holds them, and the number of slots they wrap (pg_monitor)';

CREATE VIEW rekey.audit WITH (security_barrier) AS
SELECT l.at, l.action, l.key_name, l.slot_id, l.from_state, l.to_state, l.actor,
       l.session_role, l.detail, l.xid, l.audit_id
  FROM rekey.audit_log l
 WHERE rekey.key_visible(l.key_name);
COMMENT ON VIEW rekey.audit IS 'What was done to keys and slots, by whom and when';

CREATE VIEW rekey.columns WITH (security_barrier) AS
SELECT r.table_name,
       coalesce(a.attname::text, r.column_name) AS column_name,
       r.context,
       r.fire_triggers,
       a.attname IS NULL AS missing,
       r.registered_at,
       r.registered_by,
       coalesce(s.attname::text, nullif(r.sealed_column, '')) AS sealed_column,
       nullif(r.key_name, '') AS key_name,
       nullif(r.sealed_key, '') AS sealed_key,
       nullif(r.normalise, '') AS normalise
  FROM rekey.registered_column r
  LEFT JOIN pg_catalog.pg_attribute a
         ON a.attrelid = r.table_name::oid AND NOT a.attisdropped
        AND a.attnum = rekey.registered_attnum(r.table_name, r.column_name, r.attnum, r.stamp)
  LEFT JOIN pg_catalog.pg_attribute s
         ON s.attrelid = r.table_name::oid AND NOT s.attisdropped
        AND s.attnum = rekey.registered_attnum(r.table_name, r.sealed_column, r.sealed_attnum, r.stamp)
 WHERE rekey.table_visible(r.table_name);
COMMENT ON VIEW rekey.columns IS 'Columns that are re-encrypted, and columns of fingerprints that are made again (for the tables'' owners and pg_monitor)';

CREATE VIEW rekey.progress WITH (security_barrier) AS
SELECT p.table_name,
       CASE WHEN z.table_name IS NOT NULL THEN 'paused'
            WHEN n.since IS NOT NULL THEN 'proof' ELSE p.phase END AS phase,
       x.percent,
       pg_catalog.rpad(pg_catalog.repeat('#', (x.percent / 5)::integer), 20, '.') AS bar,
       p.rows_scanned,
       p.rows_rewritten,
       p.rows_skipped,
       (SELECT count(*) FROM rekey.quarantine q
         WHERE q.table_name = p.rotates AND q.dismissed_at IS NULL)
           + p.rows_unlisted AS rows_quarantined,
       CASE WHEN p.updated_at > p.started_at THEN
           (p.rows_scanned / extract(epoch FROM p.updated_at - p.started_at))::bigint
       END AS rows_per_second,
       CASE WHEN n.blocks_done > 0 THEN
           (pg_catalog.clock_timestamp() - n.since)
               * ((n.blocks - n.blocks_done)::double precision / n.blocks_done)
            WHEN n.since IS NULL AND x.percent > 0 AND x.percent < 100 THEN
           (p.updated_at - p.started_at) * ((100 - x.percent) / x.percent)::double precision
       END AS time_left,
       CASE WHEN z.table_name IS NOT NULL
            THEN 'paused by ' || z.paused_by || CASE WHEN z.reason = '' THEN '' ELSE ': ' || z.reason END
            ELSE p.note END AS waits_for,
       p.started_at,
       p.updated_at,
       pg_catalog.clock_timestamp() - n.since AS snapshot_age
  -- A proof scans for a rotation, never for live columns.
  FROM (SELECT s.*, s.table_name AS rotates FROM rekey.progress_state s
        UNION ALL SELECT s.*, NULL FROM rekey.backfill_state s) AS p
  CROSS JOIN LATERAL rekey.proof_scan(p.rotates) AS n
  CROSS JOIN LATERAL (SELECT CASE
           WHEN n.blocks IS NOT NULL THEN round(100.0 * n.blocks_done / greatest(n.blocks, 1), 1)
           WHEN p.blocks_total = 0 OR p.blocks_left = 0 THEN 100.0
           ELSE round(100.0 * greatest(p.blocks_total - p.blocks_left, 0) / p.blocks_total, 1)
           END AS percent) AS x
  LEFT JOIN LATERAL (SELECT * FROM rekey.pause z
                      WHERE (z.table_name::oid IN (p.table_name::oid, '0'::oid)
                             OR z.table_name::oid IN (SELECT a.relid::oid
                                  FROM pg_catalog.pg_partition_ancestors(p.table_name) AS a))
                        AND z.paused_until > clock_timestamp()
                      ORDER BY z.table_name::oid LIMIT 1) AS z ON true
 WHERE rekey.table_visible(p.table_name);
COMMENT ON VIEW rekey.progress IS 'How far re-encryption of each table is, and the filling of its live columns, and what they wait for (for the tables'' owners and pg_monitor)';

CREATE VIEW rekey.live_columns WITH (security_barrier) AS
SELECT l.table_name,
       coalesce(a.attname::text, l.column_name) AS column_name,
       coalesce(b.attname::text, l.into_column) AS into_column,
       l.direction,
       nullif(l.key_name, '') AS key_name,
       l.source <> '' AS has_source,
       l.trigger_name,
       l.started_at,
       l.started_by
  FROM rekey.live_column l
  LEFT JOIN pg_catalog.pg_attribute a
         ON a.attrelid = l.table_name::oid AND NOT a.attisdropped
        AND a.attnum = rekey.registered_attnum(l.table_name, l.column_name, l.attnum, l.stamp)
  LEFT JOIN pg_catalog.pg_attribute b
         ON b.attrelid = l.table_name::oid AND NOT b.attisdropped
        AND b.attnum = rekey.registered_attnum(l.table_name, l.into_column, l.into_attnum, l.stamp)
 WHERE rekey.table_visible(l.table_name);
COMMENT ON VIEW rekey.live_columns IS 'Columns that are being encrypted, or decrypted, while they are in use (for the tables'' owners and pg_monitor)';

CREATE VIEW rekey.errors WITH (security_barrier) AS
SELECT q.quarantine_id, q.table_name, q.row_ref, q.slot_id, q.sqlstate, q.tries, q.first_try,
       q.next_try, q.dismissed_at, q.dismissed_by, q.reason
  FROM rekey.quarantine q
 WHERE rekey.table_visible(q.table_name);
COMMENT ON VIEW rekey.errors IS 'Rows that could not be re-encrypted: they stand in the way of the proof until they are mended or dismissed';

-- For exporters: a fixed number of rows but for the worst few keys and tables, whatever the number of
-- keys. A query for one name looks at nothing else. The names are promises: docs/monitoring.md.
CREATE VIEW rekey.metrics AS
SELECT 'pg_rekey_ready'::text AS name,
       '{}'::jsonb AS labels,
       rekey.ready()::integer::double precision AS value,
       '1 if this server holds the active root key'::text AS help
UNION ALL
SELECT 'pg_rekey_root_keys', jsonb_build_object('state', v.state),
       (SELECT count(*) FROM rekey.root_key r WHERE r.state = v.state),
       'Root keys that this database knows, by state'
  FROM (VALUES ('active'), ('previous'), ('compromised'), ('retired')) AS v (state)
UNION ALL
SELECT 'pg_rekey_root_keys_missing', '{}',
       count(*) FILTER (WHERE NOT rekey.holds_root_key(encode(r.root_id, 'hex'))),
       'Root keys that are not retired and that this server does not hold'
  FROM rekey.root_key r WHERE r.state <> 'retired'
UNION ALL
SELECT 'pg_rekey_keys', '{}', count(*), 'Keys that are not shredded'
  FROM rekey.key WHERE shredded_at IS NULL
UNION ALL
SELECT 'pg_rekey_keys_past_max_age', '{}', count(*),
       'Keys whose active slot is older than their max_age'
  FROM rekey.key k JOIN rekey.key_slot s ON s.key_name = k.key_name AND s.state = 'active'
 WHERE k.max_age > '0'::interval AND k.shredded_at IS NULL
   AND s.activated_at + k.max_age < clock_timestamp()
UNION ALL
SELECT 'pg_rekey_key_overdue_seconds', jsonb_build_object('key', w.key_name),
       extract(epoch FROM clock_timestamp() - w.due),
       'How long keys are past their max_age: the five worst'
  FROM (SELECT k.key_name, s.activated_at + k.max_age AS due
          FROM rekey.key k JOIN rekey.key_slot s ON s.key_name = k.key_name AND s.state = 'active'
         WHERE k.max_age > '0'::interval AND k.shredded_at IS NULL
           AND s.activated_at + k.max_age < clock_timestamp()
         ORDER BY s.activated_at + k.max_age LIMIT 5) AS w
UNION ALL
SELECT 'pg_rekey_active_slot_age_seconds', '{}',
       coalesce(extract(epoch FROM clock_timestamp() - min(s.activated_at)), 0),
       'Age of the oldest active slot'
  FROM rekey.key_slot s WHERE s.state = 'active'
UNION ALL
SELECT 'pg_rekey_slots', jsonb_build_object('state', v.state), coalesce(c.slots, 0),
       'Slots by state'
  FROM (VALUES ('pending'), ('active'), ('previous'), ('drained'), ('disabled'), ('destroyed'))
       AS v (state)
  LEFT JOIN (SELECT s.state, count(*) AS slots FROM rekey.key_slot s GROUP BY s.state) AS c
       ON c.state = v.state
UNION ALL
SELECT 'pg_rekey_compromised_slots', '{}', count(*),
       'Compromised slots that are not proved unused'
  FROM rekey.key_slot s
 WHERE s.compromised_at IS NOT NULL AND s.state IN ('active', 'previous')
UNION ALL
SELECT 'pg_rekey_slots_past_grace', '{}', count(*),
       'Previous slots that are not proved unused after the end of their grace'
  FROM rekey.key_slot s JOIN rekey.key k ON k.key_name = s.key_name
 WHERE s.state = 'previous' AND k.shredded_at IS NULL
   AND s.superseded_at + k.grace < clock_timestamp()
UNION ALL
SELECT 'pg_rekey_previous_slot_age_seconds', '{}',
       coalesce(extract(epoch FROM clock_timestamp() - min(s.superseded_at)), 0),
       'Time since the longest superseded slot that is not proved unused was superseded; 0 for none'
  FROM rekey.key_slot s WHERE s.state = 'previous'
UNION ALL
SELECT 'pg_rekey_registered_columns', '{}', count(*), 'Registered columns'
  FROM rekey.registered_column
UNION ALL
SELECT 'pg_rekey_registered_columns_missing', '{}',
       count(*) FILTER (WHERE rekey.registered_attnum(r.table_name, r.column_name, r.attnum,
                                                      r.stamp) IS NULL),
       'Registered columns that are gone: they block every proof'
  FROM rekey.registered_column r
UNION ALL
SELECT 'pg_rekey_tables', jsonb_build_object('phase', v.phase),
       (SELECT count(*) FROM rekey.progress_state p WHERE p.phase = v.phase),
       'Tables by phase of their re-encryption'
  FROM (VALUES ('pass'), ('barrier'), ('proof'), ('done')) AS v (phase)
UNION ALL
SELECT 'pg_rekey_pass_bytes', '{}',
       coalesce(sum(p.blocks_total), 0) * current_setting('block_size')::integer,
       'Size of the tables that the present passes go through'
  FROM rekey.progress_state p
UNION ALL
SELECT 'pg_rekey_pass_left_bytes', '{}',
       coalesce(sum(p.blocks_left), 0) * current_setting('block_size')::integer,
       'What the present passes have still to go through'
  FROM rekey.progress_state p
UNION ALL
SELECT 'pg_rekey_table_left_bytes', jsonb_build_object('table', w.table_name),
       w.blocks_left * current_setting('block_size')::integer,
       'What the pass of a table has still to go through: the five largest'
  FROM (SELECT p.table_name::text, p.blocks_left FROM rekey.progress_state p
         WHERE p.blocks_left > 0 ORDER BY p.blocks_left DESC LIMIT 5) AS w
UNION ALL
SELECT 'pg_rekey_pass_rows', jsonb_build_object('result', v.result),
       (SELECT coalesce(sum(CASE v.result WHEN 'scanned' THEN p.rows_scanned
                            WHEN 'rewritten' THEN p.rows_rewritten ELSE p.rows_skipped END), 0)
          FROM rekey.progress_state p),
       'Rows that the present passes have scanned, re-encrypted and skipped; from 0 with each pass'
  FROM (VALUES ('scanned'), ('rewritten'), ('skipped')) AS v (result)
UNION ALL
SELECT 'pg_rekey_progress_age_seconds', '{}',
       coalesce(extract(epoch FROM clock_timestamp() - min(p.updated_at)), 0),
       'Time since the last batch of the table that stands still longest; 0 when all are done or paused'
  FROM rekey.progress_state p
 WHERE p.phase <> 'done'
   AND NOT EXISTS (SELECT FROM rekey.pause z
                    WHERE (z.table_name::oid IN (p.table_name::oid, '0'::oid)
                           OR z.table_name::oid IN (SELECT a.relid::oid
                                FROM pg_catalog.pg_partition_ancestors(p.table_name) AS a))
                      AND z.paused_until > clock_timestamp())
UNION ALL
SELECT 'pg_rekey_live_columns', '{}', count(*),
       'Columns that are being encrypted, or decrypted, while they are in use'
  FROM rekey.live_column
UNION ALL
SELECT 'pg_rekey_backfill_tables', jsonb_build_object('phase', v.phase),
       (SELECT count(*) FROM rekey.backfill_state b WHERE b.phase = v.phase),
       'Tables with live columns: backfill while these are filled, done afterwards'
  FROM (VALUES ('backfill'), ('done')) AS v (phase)
UNION ALL
SELECT 'pg_rekey_backfill_left_bytes', '{}',
       coalesce(sum(b.blocks_left), 0) * current_setting('block_size')::integer,
       'What the present passes have still to go through to fill live columns'
  FROM rekey.backfill_state b
UNION ALL
SELECT 'pg_rekey_proof_snapshot_age_seconds', '{}',
       coalesce(extract(epoch FROM clock_timestamp() - min(n.since)), 0),
       'Age of the snapshot of a proof that is under way: it holds back vacuum; 0 for none'
  FROM rekey.progress_state p CROSS JOIN LATERAL rekey.proof_scan(p.table_name) AS n
UNION ALL
SELECT 'pg_rekey_barrier_age_seconds', '{}',
       coalesce(extract(epoch FROM clock_timestamp() - min(h.since)), 0),
       'Age of the oldest transaction that has sealed and not ended, prepared ones too'
  FROM (SELECT a.xact_start AS since
          FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
         WHERE l.locktype = 'relation' AND l.relation = 'rekey.barrier'::regclass
           AND a.datname = current_database()
        UNION ALL
        SELECT x.prepared
          FROM pg_catalog.pg_locks l
          JOIN pg_catalog.pg_locks t ON t.virtualtransaction = l.virtualtransaction
           AND t.locktype = 'transactionid'
          JOIN pg_catalog.pg_prepared_xacts x ON x.transaction = t.transactionid
         WHERE l.locktype = 'relation' AND l.relation = 'rekey.barrier'::regclass
           AND l.pid IS NULL AND x.database = current_database()) AS h
UNION ALL
SELECT 'pg_rekey_quarantined_rows', '{}',
       count(*) + (SELECT coalesce(sum(p.rows_unlisted), 0) FROM rekey.progress_state p),
       'Rows that could not be re-encrypted: the slots that they name cannot be proved unused'
  FROM rekey.quarantine WHERE dismissed_at IS NULL
UNION ALL
SELECT 'pg_rekey_dismissed_rows', '{}', count(*),
       'Rows under quarantine that somebody has decided to do without'
  FROM rekey.quarantine WHERE dismissed_at IS NOT NULL
UNION ALL
SELECT 'pg_rekey_pauses', '{}', count(*), 'Pauses of re-encryption that are in force'
  FROM rekey.pause WHERE paused_until > clock_timestamp()
UNION ALL
SELECT 'pg_rekey_standby', '{}', pg_is_in_recovery()::integer,
       '1 if this server is a standby, which runs no worker'
UNION ALL
SELECT 'pg_rekey_worker_enabled', '{}',
       (coalesce(current_setting('rekey.worker', true)::boolean, false)
        AND current_setting('shared_preload_libraries') ~ 'pg_rekey')::integer,
       '1 if rekey.worker is on and the library is preloaded'
UNION ALL
SELECT 'pg_rekey_launcher_up', '{}', count(*), '1 if the launcher of the workers is running'
  FROM pg_catalog.pg_stat_activity WHERE backend_type = 'pg_rekey launcher'
UNION ALL
SELECT 'pg_rekey_workers', '{}', count(*), 'Workers that are running in this database'
  FROM pg_catalog.pg_stat_activity
 WHERE backend_type = 'pg_rekey worker' AND datname = current_database()
UNION ALL
SELECT 'pg_rekey_audit_entries_total', '{}',
       CASE WHEN q.is_called THEN q.last_value ELSE 0 END,
       'Entries of the audit log, those of rolled-back transactions too'
  FROM rekey.audit_id q;
COMMENT ON VIEW rekey.metrics IS 'What monitoring systems read, in the names of Prometheus (pg_monitor)';
COMMENT ON COLUMN rekey.metrics.name IS 'Name with its unit; one that ends in _total is a counter, all others are gauges';
COMMENT ON COLUMN rekey.metrics.labels IS 'Labels and their values';
COMMENT ON COLUMN rekey.metrics.value IS 'Value now';
COMMENT ON COLUMN rekey.metrics.help IS 'What it is';

COMMENT ON COLUMN rekey.keys.key_name IS 'Name of the key';
COMMENT ON COLUMN rekey.keys.owner IS 'Role that owns it: may do everything with it';
COMMENT ON COLUMN rekey.keys.active_slot IS 'Slot that new values are sealed under; NULL when there is none';
COMMENT ON COLUMN rekey.keys.previous_slots IS 'Superseded slots that values still open with, the latest first';
COMMENT ON COLUMN rekey.keys.active_since IS 'When the active slot became active';
COMMENT ON COLUMN rekey.keys.grace IS 'How long a superseded slot stays, at least';
COMMENT ON COLUMN rekey.keys.max_age IS 'Longest life of an active slot; 0 is never by age';
COMMENT ON COLUMN rekey.keys.next_rotation IS 'When max_age asks for a rotation';
COMMENT ON COLUMN rekey.keys.after_drain IS 'What happens to a slot that is proved unused: keep, disable or destroy';
COMMENT ON COLUMN rekey.keys.require_context IS 'Whether sealing needs a context';
COMMENT ON COLUMN rekey.keys.custodian IS 'Who answers for the key';
COMMENT ON COLUMN rekey.keys.comment IS 'Free text';
COMMENT ON COLUMN rekey.keys.purpose IS 'seal: encrypts values; lookup: makes fingerprints';
COMMENT ON COLUMN rekey.keys.created_at IS 'When the key was created';
COMMENT ON COLUMN rekey.keys.shredded_at IS 'When all its slots were shredded';

COMMENT ON COLUMN rekey.slots.slot_id IS 'Id in the header of every envelope';
COMMENT ON COLUMN rekey.slots.key_name IS 'Key of the slot';
COMMENT ON COLUMN rekey.slots.version IS 'Number within the key';
COMMENT ON COLUMN rekey.slots.state IS 'pending, active, previous, drained, disabled or destroyed';
COMMENT ON COLUMN rekey.slots.created_at IS 'When it was made';
COMMENT ON COLUMN rekey.slots.activated_at IS 'When it last became active';
COMMENT ON COLUMN rekey.slots.superseded_at IS 'When a rotation took its place';
COMMENT ON COLUMN rekey.slots.grace_until IS 'Until when it stays at least: superseded_at plus the grace that the key has now';
COMMENT ON COLUMN rekey.slots.drained_at IS 'When it was proved unused';
COMMENT ON COLUMN rekey.slots.disabled_at IS 'When it was disabled';
COMMENT ON COLUMN rekey.slots.destroyed_at IS 'When its wrapped keys were deleted';
COMMENT ON COLUMN rekey.slots.compromised_at IS 'When it was reported compromised';
COMMENT ON COLUMN rekey.slots.reason IS 'Why it was made, or why it ended';
COMMENT ON COLUMN rekey.slots.proof IS 'Evidence that it is unused';

COMMENT ON COLUMN rekey.grants.key_name IS 'Key';
COMMENT ON COLUMN rekey.grants.grantee IS 'Role; public is everyone, a bare number a role that was dropped';
COMMENT ON COLUMN rekey.grants.privilege IS 'owner, manage, rotate, encrypt or decrypt';
COMMENT ON COLUMN rekey.grants.granted_at IS 'When it was granted';

COMMENT ON COLUMN rekey.root_keys.root_id IS 'Id of the root key';
COMMENT ON COLUMN rekey.root_keys.state IS 'active, previous, compromised or retired';
COMMENT ON COLUMN rekey.root_keys.created_at IS 'When this database adopted it';
COMMENT ON COLUMN rekey.root_keys.retired_at IS 'When its wraps were deleted here';
COMMENT ON COLUMN rekey.root_keys.held_here IS 'Whether the keyring of this server holds it';
COMMENT ON COLUMN rekey.root_keys.slots IS 'Number of slots that it wraps';

COMMENT ON COLUMN rekey.audit.at IS 'When';
COMMENT ON COLUMN rekey.audit.action IS 'Function that acted';
COMMENT ON COLUMN rekey.audit.key_name IS 'Key concerned';
COMMENT ON COLUMN rekey.audit.slot_id IS 'Slot concerned';
COMMENT ON COLUMN rekey.audit.from_state IS 'State before';
COMMENT ON COLUMN rekey.audit.to_state IS 'State after';
COMMENT ON COLUMN rekey.audit.actor IS 'Role whose privilege was used';
COMMENT ON COLUMN rekey.audit.session_role IS 'Role that logged in';
COMMENT ON COLUMN rekey.audit.detail IS 'Reason, or what was granted or changed';
COMMENT ON COLUMN rekey.audit.xid IS 'Transaction';
COMMENT ON COLUMN rekey.audit.audit_id IS 'Number of the row';

COMMENT ON COLUMN rekey.columns.table_name IS 'Table';
COMMENT ON COLUMN rekey.columns.column_name IS 'Present name of the column';
COMMENT ON COLUMN rekey.columns.context IS 'Expression that gives the bound context; empty for none';
COMMENT ON COLUMN rekey.columns.fire_triggers IS 'Whether the table''s triggers fire when a row is re-encrypted';
COMMENT ON COLUMN rekey.columns.missing IS 'Whether the column is gone: no slot can be proved unused then';
COMMENT ON COLUMN rekey.columns.registered_at IS 'When it was registered';
COMMENT ON COLUMN rekey.columns.registered_by IS 'Who registered it';
COMMENT ON COLUMN rekey.columns.sealed_column IS 'For a column of fingerprints, the sealed column beside it';
COMMENT ON COLUMN rekey.columns.key_name IS 'Lookup key of the fingerprints';
COMMENT ON COLUMN rekey.columns.sealed_key IS 'Key of the sealed values';
COMMENT ON COLUMN rekey.columns.normalise IS 'Expression over the value, $1, that is fingerprinted; NULL for the value as it is';

COMMENT ON COLUMN rekey.progress.table_name IS 'Table, a leaf where it is partitioned';
COMMENT ON COLUMN rekey.progress.phase IS 'pass, barrier, proof, done or paused; backfill while live columns are filled, done afterwards';
COMMENT ON COLUMN rekey.progress.percent IS 'Share of the table''s blocks that the pass has visited; during a proof, of the table it is at, what it has scanned';
COMMENT ON COLUMN rekey.progress.bar IS 'The same as a bar';
COMMENT ON COLUMN rekey.progress.rows_scanned IS 'Rows looked at';
COMMENT ON COLUMN rekey.progress.rows_rewritten IS 'Rows re-encrypted';
COMMENT ON COLUMN rekey.progress.rows_skipped IS 'Rows that somebody else had locked, looked at again later';
COMMENT ON COLUMN rekey.progress.rows_quarantined IS 'Rows under quarantine; rekey.errors lists 1,000 of them';
COMMENT ON COLUMN rekey.progress.rows_per_second IS 'Rows looked at per second since the pass began, rests included';
COMMENT ON COLUMN rekey.progress.time_left IS 'Time that the rest of the pass takes at this speed';
COMMENT ON COLUMN rekey.progress.waits_for IS 'What it waits for: a session by pid, a prepared transaction by its gid, a lock, a pause';
COMMENT ON COLUMN rekey.progress.started_at IS 'When the pass began';
COMMENT ON COLUMN rekey.progress.updated_at IS 'When the last batch was committed';
COMMENT ON COLUMN rekey.progress.snapshot_age IS 'During a proof: the age of its snapshot, which holds back vacuum';

COMMENT ON COLUMN rekey.live_columns.table_name IS 'Table';
COMMENT ON COLUMN rekey.live_columns.column_name IS 'Column that is read';
COMMENT ON COLUMN rekey.live_columns.into_column IS 'Column that is written';
COMMENT ON COLUMN rekey.live_columns.direction IS 'encrypt or decrypt';
COMMENT ON COLUMN rekey.live_columns.key_name IS 'Key that values are sealed under';
COMMENT ON COLUMN rekey.live_columns.has_source IS 'Whether an expression gives the values, instead of the column itself';
COMMENT ON COLUMN rekey.live_columns.trigger_name IS 'Trigger that keeps the two columns alike';
COMMENT ON COLUMN rekey.live_columns.started_at IS 'When it began';
COMMENT ON COLUMN rekey.live_columns.started_by IS 'Who began it';

COMMENT ON COLUMN rekey.errors.quarantine_id IS 'Number of the entry, for dismiss_quarantine';
COMMENT ON COLUMN rekey.errors.table_name IS 'Table';
COMMENT ON COLUMN rekey.errors.row_ref IS 'ctid of the row';
COMMENT ON COLUMN rekey.errors.slot_id IS 'Slot that its envelope names';
COMMENT ON COLUMN rekey.errors.sqlstate IS 'Why the last try failed';
COMMENT ON COLUMN rekey.errors.tries IS 'Number of tries';
COMMENT ON COLUMN rekey.errors.first_try IS 'When it first failed';
COMMENT ON COLUMN rekey.errors.next_try IS 'When it is tried again';
COMMENT ON COLUMN rekey.errors.dismissed_at IS 'When somebody decided to do without its value';
COMMENT ON COLUMN rekey.errors.dismissed_by IS 'Who decided';
COMMENT ON COLUMN rekey.errors.reason IS 'Why';
