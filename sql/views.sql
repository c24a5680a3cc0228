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
       k.purpose,
       k.custodian,
       k.comment,
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
       CASE WHEN g.grantee = 0 THEN 'public'
            ELSE coalesce(r.rolname::text, g.grantee::text) END AS grantee,
       g.privilege,
       g.granted_at
  FROM rekey.key_grant g
  LEFT JOIN pg_catalog.pg_roles r ON r.oid = g.grantee
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

GRANT SELECT ON rekey.keys, rekey.slots, rekey.grants, rekey.root_keys, rekey.audit TO PUBLIC;
