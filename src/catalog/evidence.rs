//! What an auditor asks of a key, as one JSON document (PCI DSS 3.6 and 3.7: inventory,
//! cryptoperiods, custodians, replacement, destruction).
//!
//! Called by rekey.evidence(). Reads the catalog only: no table of users', no key
//! material. Assigns no transaction id: an auditor may ask a standby.

use crate::error::Result;
use crate::ffi::sql::{Arg, look};
use pgrx::pg_sys::Datum;

/// Whether the document has something to say of a key: one that was dropped lives on in its slots.
pub fn knows(key: &str) -> Result<bool> {
    let found = look(
        "SELECT key_name FROM rekey.key WHERE key_name = $1 \
         UNION ALL SELECT key_name FROM rekey.key_slot WHERE key_name = $1 LIMIT 1",
        &[Arg::Text(key)],
    )?;
    Ok(!found.is_empty())
}

/// The document for one key, or with an empty name for all, dropped ones included; acts since a
/// timestamptz datum. Acts on no key in particular are in it whichever key is asked for.
pub fn document(key: &str, since: Option<Datum>) -> Result<String> {
    let found = look(
        "SELECT jsonb_build_object( \
           'made_at', clock_timestamp(), \
           'database', current_database(), \
           'since', $2, \
           'root_keys', (SELECT coalesce(jsonb_agg(jsonb_build_object( \
               'root_id', encode(r.root_id, 'hex'), 'state', r.state, \
               'created_at', r.created_at, 'retired_at', r.retired_at) ORDER BY r.created_at), \
               '[]') FROM rekey.root_key r), \
           'registered_columns', (SELECT coalesce(jsonb_agg(jsonb_build_object( \
               'table', c.table_name::text, 'column', c.column_name, \
               'context', c.context, 'since', c.registered_at) \
               ORDER BY c.table_name::text, c.column_name), '[]') \
               FROM rekey.registered_column c), \
           'acts', (SELECT coalesce(jsonb_agg(jsonb_build_object( \
               'at', l.at, 'action', l.action, 'actor', l.actor, \
               'session_role', l.session_role, 'detail', l.detail) ORDER BY l.audit_id), '[]') \
               FROM rekey.audit_log l WHERE l.key_name IS NULL \
                AND l.at >= coalesce($2, '-infinity')), \
           'keys', (SELECT coalesce(jsonb_agg(jsonb_build_object( \
               'key_name', n.key_name, 'purpose', k.purpose, 'custodian', k.custodian, \
               'created_at', k.created_at, 'shredded_at', k.shredded_at, \
               'dropped_at', CASE WHEN k.key_name IS NULL THEN (SELECT max(l.at) \
                   FROM rekey.audit_log l \
                  WHERE l.key_name = n.key_name AND l.action = 'drop_key') END, \
               'max_age', k.max_age::text, 'grace', k.grace::text, \
               'after_drain', k.after_drain, \
               'cryptoperiod_kept', CASE WHEN k.key_name IS NOT NULL THEN \
                   k.max_age = '0'::interval OR NOT EXISTS ( \
                       SELECT FROM rekey.key_slot s WHERE s.key_name = k.key_name \
                          AND s.activated_at IS NOT NULL \
                          AND coalesce(s.superseded_at, s.destroyed_at, clock_timestamp()) \
                              > s.activated_at + k.max_age) END, \
               'grants', (SELECT coalesce(jsonb_agg(jsonb_build_object( \
                   'grantee', CASE WHEN g.grantee::oid = '0'::oid THEN 'public' \
                       ELSE pg_get_userbyid(g.grantee) END, \
                   'privilege', g.privilege, 'since', g.granted_at) \
                   ORDER BY g.granted_at), '[]') \
                   FROM rekey.key_grant g WHERE g.key_name = n.key_name), \
               'slots', (SELECT coalesce(jsonb_agg(jsonb_build_object( \
                   'slot_id', s.slot_id, 'version', s.version, 'state', s.state, \
                   'created_at', s.created_at, 'activated_at', s.activated_at, \
                   'superseded_at', s.superseded_at, 'drained_at', s.drained_at, \
                   'disabled_at', s.disabled_at, 'destroyed_at', s.destroyed_at, \
                   'compromised_at', s.compromised_at, 'reason', s.reason, 'proof', s.proof, \
                   'root_ids', (SELECT coalesce(jsonb_agg(encode(w.root_id, 'hex')), '[]') \
                       FROM rekey.slot_wrap w WHERE w.slot_id = s.slot_id)) \
                   ORDER BY s.version), '[]') \
                   FROM rekey.key_slot s WHERE s.key_name = n.key_name), \
               'acts', (SELECT coalesce(jsonb_agg(jsonb_build_object( \
                   'at', l.at, 'action', l.action, 'slot_id', l.slot_id, \
                   'from', l.from_state, 'to', l.to_state, 'actor', l.actor, \
                   'session_role', l.session_role, 'detail', l.detail) ORDER BY l.audit_id), \
                   '[]') FROM rekey.audit_log l WHERE l.key_name = n.key_name \
                    AND l.at >= coalesce($2, '-infinity'))) \
               ORDER BY n.key_name), '[]') \
               FROM (SELECT k.key_name FROM rekey.key k \
                     UNION SELECT s.key_name FROM rekey.key_slot s) AS n \
               LEFT JOIN rekey.key k USING (key_name) \
              WHERE $1 = '' OR n.key_name = $1))::text",
        &[Arg::Text(key), Arg::Timestamp(since)],
    )?;
    let document = found.into_iter().next().and_then(|mut row| row[0].take());
    Ok(document.unwrap_or_else(|| "{}".to_string()))
}
