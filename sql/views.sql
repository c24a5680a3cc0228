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
       r.registered_by
  FROM rekey.registered_column r
  LEFT JOIN pg_catalog.pg_attribute a
         ON a.attrelid = r.table_name::oid AND NOT a.attisdropped
        AND a.attnum = rekey.registered_attnum(r.table_name, r.column_name, r.attnum, r.stamp)
 WHERE rekey.table_visible(r.table_name);
COMMENT ON VIEW rekey.columns IS 'Columns that are re-encrypted (for the tables'' owners and pg_monitor)';

CREATE VIEW rekey.progress WITH (security_barrier) AS
SELECT p.table_name,
       CASE WHEN z.table_name IS NOT NULL THEN 'paused' ELSE p.phase END AS phase,
       x.percent,
       pg_catalog.rpad(pg_catalog.repeat('#', (x.percent / 5)::integer), 20, '.') AS bar,
       p.rows_scanned,
       p.rows_rewritten,
       p.rows_skipped,
       (SELECT count(*) FROM rekey.quarantine q
         WHERE q.table_name = p.table_name AND q.dismissed_at IS NULL) AS rows_quarantined,
       CASE WHEN p.updated_at > p.started_at THEN
           (p.rows_scanned / extract(epoch FROM p.updated_at - p.started_at))::bigint
       END AS rows_per_second,
       CASE WHEN x.percent > 0 AND x.percent < 100 THEN
           (p.updated_at - p.started_at) * ((100 - x.percent) / x.percent)::double precision
       END AS time_left,
       CASE WHEN z.table_name IS NOT NULL
            THEN 'paused by ' || z.paused_by || CASE WHEN z.reason = '' THEN '' ELSE ': ' || z.reason END
            ELSE p.note END AS waits_for,
       p.started_at,
       p.updated_at
  FROM (TABLE rekey.progress_state UNION ALL TABLE rekey.backfill_state) AS p
  CROSS JOIN LATERAL (SELECT CASE WHEN p.blocks_total = 0 OR p.blocks_left = 0 THEN 100.0
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

COMMENT ON COLUMN rekey.progress.table_name IS 'Table, a leaf where it is partitioned';
COMMENT ON COLUMN rekey.progress.phase IS 'pass, barrier, proof, done or paused; backfill while live columns are filled, done afterwards';
COMMENT ON COLUMN rekey.progress.percent IS 'Share of the table''s blocks that the pass has visited';
COMMENT ON COLUMN rekey.progress.bar IS 'The same as a bar';
COMMENT ON COLUMN rekey.progress.rows_scanned IS 'Rows looked at';
COMMENT ON COLUMN rekey.progress.rows_rewritten IS 'Rows re-encrypted';
COMMENT ON COLUMN rekey.progress.rows_skipped IS 'Rows that somebody else had locked, looked at again later';
COMMENT ON COLUMN rekey.progress.rows_quarantined IS 'Rows under quarantine, see rekey.errors';
COMMENT ON COLUMN rekey.progress.rows_per_second IS 'Rows looked at per second since the pass began, rests included';
COMMENT ON COLUMN rekey.progress.time_left IS 'Time that the rest of the pass takes at this speed';
COMMENT ON COLUMN rekey.progress.waits_for IS 'What it waits for: a session by pid, a prepared transaction by its gid, a lock, a pause';
COMMENT ON COLUMN rekey.progress.started_at IS 'When the pass began';
COMMENT ON COLUMN rekey.progress.updated_at IS 'When the last batch was committed';

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
