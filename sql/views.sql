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
