//! Changes of the catalog: one function per kind of row, an audit row per transition.
//!
//! Called by src/lifecycle.rs and the administration functions. Everything runs in the caller's
//! transaction as the owner of the catalog; a rollback undoes it. Invariant I13: an audit row in
//! the same transaction and one server log line, which begins "pg_rekey audit:", for each
//! transition. The line is written when the act is done; its xid tells whether it committed.

use std::collections::HashSet;

use pgrx::{PgLogLevel, PgSqlErrorCode, pg_sys};
use rekey_core::cipher::RootId;
use rekey_core::envelope::SlotId;
use rekey_core::keyring::{Privilege, SlotState};

use super::read::{self, SlotRow};
use super::roots::{self, Roots};
use crate::error::{Error, Result};
use crate::ffi::sql::{Arg, bigint, rows, run};
use crate::ffi::{hooks, session, text};

/// Who acts: taken before the switch to the catalog's owner.
fn actor() -> String {
    session::role_name(session::current_user())
}

/// One line of the audit log.
pub struct Audit<'a> {
    /// Function that acts.
    pub action: &'a str,
    /// Key concerned.
    pub key: Option<&'a str>,
    /// Slot concerned.
    pub slot: Option<SlotId>,
    /// State before.
    pub from: Option<SlotState>,
    /// State after.
    pub to: Option<SlotState>,
    /// Reason, or what was granted or changed.
    pub detail: &'a str,
}

impl<'a> Audit<'a> {
    /// An act that moves no slot.
    pub fn act(action: &'a str, key: Option<&'a str>, detail: &'a str) -> Audit<'a> {
        Audit {
            action,
            key,
            slot: None,
            from: None,
            to: None,
            detail,
        }
    }

    /// Writes the audit row and the log line.
    pub fn record(&self) -> Result<()> {
        Audit::record_all(std::slice::from_ref(self))
    }

    /// Writes an audit row and a log line for each of several acts. No crash undoes what the log and
    /// the caller have been told: a root key may be deleted elsewhere once it is retired here.
    pub fn record_all(acts: &[Audit<'a>]) -> Result<()> {
        session::commit_durably();
        let actor = actor();
        let texts = |of: fn(&Audit<'a>) -> &'a str| acts.iter().map(of).collect::<Vec<_>>();
        let slot = |act: &Audit<'_>| act.slot.map_or(0, SlotId::as_i64);
        let xid = bigint(
            "WITH written AS (INSERT INTO rekey.audit_log \
                 (action, key_name, slot_id, from_state, to_state, actor, detail) \
             SELECT a.action, nullif(a.key_name, ''), nullif(a.slot_id, 0), \
                    nullif(a.from_state, ''), nullif(a.to_state, ''), $7, a.detail \
               FROM unnest($1, $2, $3, $4, $5, $6) \
                    AS a (action, key_name, slot_id, from_state, to_state, detail) \
             RETURNING xid) \
             SELECT max(xid::text::bigint) FROM written",
            &[
                Arg::Texts(&texts(|act| act.action)),
                Arg::Texts(&texts(|act| act.key.unwrap_or_default())),
                Arg::Bigints(&acts.iter().map(slot).collect::<Vec<_>>()),
                Arg::Texts(&texts(|act| act.from.map_or("", SlotState::name))),
                Arg::Texts(&texts(|act| act.to.map_or("", SlotState::name))),
                Arg::Texts(&texts(|act| act.detail)),
                Arg::Text(&actor),
            ],
        )?;
        if acts.len() > 1 {
            // Each line would repeat the statement, which may hold the names of all the keys.
            hooks::keep_statement_out_of_log();
        }
        for act in acts {
            act.log(&actor, xid.unwrap_or(0));
        }
        Ok(())
    }

    fn log(&self, actor: &str, xid: i64) {
        let quoted = |name: &str| {
            let plain = name.replace('"', "\"\"");
            let escape = |c: char| {
                if c.is_control() {
                    c.escape_unicode().to_string()
                } else {
                    c.to_string()
                }
            };
            plain.chars().map(escape).collect::<String>()
        };
        let mut line = format!("pg_rekey audit: action={}", self.action);
        if let Some(key) = self.key {
            line += &format!(" key=\"{}\"", quoted(key));
        }
        if let Some(slot) = self.slot {
            line += &format!(" slot={slot}");
        }
        if let Some(from) = self.from {
            line += &format!(" from={from}");
        }
        if let Some(to) = self.to {
            line += &format!(" to={to}");
        }
        line += &format!(" actor=\"{}\" xid={xid}", quoted(actor));
        pgrx::ereport!(
            PgLogLevel::LOG,
            PgSqlErrorCode::ERRCODE_SUCCESSFUL_COMPLETION,
            text::message(line)
        );
    }
}

/// Locks the row of a key against every other change of its slots, grants and policy; false when
/// there is none. The row gets a new version: a transaction whose snapshot is older than another's
/// change then ends in 40001, instead of missing rows that it cannot see.
pub fn lock_key(name: &str) -> Result<bool> {
    let sql = "UPDATE rekey.key SET comment = comment WHERE key_name = $1 RETURNING 1::bigint";
    Ok(bigint(sql, &[Arg::Text(name)])?.is_some())
}

/// The same for many keys; returns those that are there and not shredded. In the order of their
/// names, so that two sessions do not wait for each other.
pub fn lock_keys(names: &[&str]) -> Result<HashSet<String>> {
    lock_each(names, "")
}

/// The same without those that another session holds: waits for nobody.
pub fn lock_free_keys(names: &[&str]) -> Result<HashSet<String>> {
    lock_each(names, "SKIP LOCKED")
}

fn lock_each(names: &[&str], how: &str) -> Result<HashSet<String>> {
    let locked = rows(
        &format!(
            "WITH locked AS MATERIALIZED (SELECT key_name FROM rekey.key \
                  WHERE key_name = ANY ($1) AND shredded_at IS NULL ORDER BY key_name \
                    FOR UPDATE {how}) \
             UPDATE rekey.key k SET comment = k.comment FROM locked l \
              WHERE k.key_name = l.key_name RETURNING k.key_name"
        ),
        &[Arg::Texts(names)],
    )?;
    let name = |row: Vec<Option<String>>| row.into_iter().next().flatten();
    Ok(locked.into_iter().filter_map(name).collect())
}

/// A new key's policy.
pub struct NewKey<'a> {
    /// Name.
    pub name: &'a str,
    /// seal or lookup.
    pub purpose: &'a str,
    /// Grace, an interval datum.
    pub grace: pg_sys::Datum,
    /// Longest life of an active slot, an interval datum.
    pub max_age: pg_sys::Datum,
    /// Free text.
    pub comment: &'a str,
}

/// Inserts a key, without the grants that a key of its name may have left behind; false when the
/// name is taken.
pub fn insert_key(key: &NewKey<'_>) -> Result<bool> {
    let inserted = bigint(
        "INSERT INTO rekey.key (key_name, purpose, grace, max_age, comment) \
         VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING RETURNING 1::bigint",
        &[
            Arg::Text(key.name),
            Arg::Text(key.purpose),
            Arg::Interval(Some(key.grace)),
            Arg::Interval(Some(key.max_age)),
            Arg::Text(key.comment),
        ],
    )?;
    if inserted.is_some() {
        let sql = "DELETE FROM rekey.key_grant WHERE key_name = $1";
        run(sql, &[Arg::Text(key.name)])?;
    }
    Ok(inserted.is_some())
}

/// Changes of a key's policy; None leaves a setting as it is.
pub struct Policy<'a> {
    /// Grace, an interval datum.
    pub grace: Option<pg_sys::Datum>,
    /// Longest life of an active slot, an interval datum.
    pub max_age: Option<pg_sys::Datum>,
    /// keep, disable or destroy.
    pub after_drain: Option<&'a str>,
    /// Whether sealing needs a context.
    pub require_context: Option<bool>,
    /// Who answers for the key.
    pub custodian: Option<&'a str>,
}

/// Changes the policy of a key.
pub fn update_policy(name: &str, policy: &Policy<'_>) -> Result<()> {
    run(
        "UPDATE rekey.key SET grace = coalesce($2, grace), max_age = coalesce($3, max_age), \
             after_drain = coalesce($4, after_drain), \
             require_context = coalesce($5, require_context), \
             custodian = coalesce($6, custodian) \
         WHERE key_name = $1",
        &[
            Arg::Text(name),
            Arg::Interval(policy.grace),
            Arg::Interval(policy.max_age),
            Arg::OptionalText(policy.after_drain),
            Arg::Bool(policy.require_context),
            Arg::OptionalText(policy.custodian),
        ],
    )
    .map(|_| ())
}

/// An interval datum as a span of time that is added to timestamps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Span {
    /// It can be.
    Fits,
    /// Less than none.
    Negative,
    /// More than a thousand years, as a whole or in months or days: those are added one after the
    /// other, and the sum of both may be small where the first one leads out of all timestamps.
    TooLong,
}

/// Judges an interval datum.
pub fn span(interval: pg_sys::Datum) -> Result<Span> {
    let sql = "SELECT (CASE WHEN $1 < '0'::interval THEN 1 \
                  WHEN $1 > '1000 years'::interval OR abs(extract(year FROM $1)) > 1000 \
                    OR abs(extract(day FROM $1)) > 365250 THEN 2 ELSE 0 END)::bigint";
    Ok(match bigint(sql, &[Arg::Interval(Some(interval))])? {
        Some(0) => Span::Fits,
        Some(1) => Span::Negative,
        _ => Span::TooLong,
    })
}

/// Marks a key as shredded.
pub fn mark_shredded(name: &str) -> Result<()> {
    let sql = "UPDATE rekey.key SET shredded_at = clock_timestamp() WHERE key_name = $1";
    run(sql, &[Arg::Text(name)]).map(|_| ())
}

/// Deletes a key and its grants. Its slots stay as tombstones.
pub fn delete_key(name: &str) -> Result<()> {
    run(
        "DELETE FROM rekey.key_grant WHERE key_name = $1",
        &[Arg::Text(name)],
    )?;
    run(
        "DELETE FROM rekey.key WHERE key_name = $1",
        &[Arg::Text(name)],
    )
    .map(|_| ())
}

/// Inserts keys with the policy of another one, owned by `owner` and with the other's grants but
/// for its owners; returns the names of those that are new. In the order of their names, so that two
/// sessions that create the same ones do not wait for each other.
pub fn insert_keys_like(names: &[&str], like: &str, owner: pg_sys::Oid) -> Result<Vec<String>> {
    let inserted = rows(
        "INSERT INTO rekey.key \
             (key_name, purpose, grace, max_age, after_drain, require_context, custodian) \
         SELECT n.name, k.purpose, k.grace, k.max_age, k.after_drain, k.require_context, \
                k.custodian \
           FROM rekey.key k, unnest($1) AS n (name) WHERE k.key_name = $2 \
          ORDER BY n.name COLLATE \"C\" ON CONFLICT DO NOTHING RETURNING key_name",
        &[Arg::Texts(names), Arg::Text(like)],
    )?;
    let created: Vec<String> = inserted
        .into_iter()
        .filter_map(|row| row.into_iter().next().flatten())
        .collect();
    let new: Vec<&str> = created.iter().map(String::as_str).collect();
    run(
        "DELETE FROM rekey.key_grant WHERE key_name = ANY ($1)",
        &[Arg::Texts(&new)],
    )?;
    run(
        "INSERT INTO rekey.key_grant (key_name, grantee, privilege) \
         SELECT n.name, g.grantee, g.privilege \
           FROM (SELECT grantee, privilege FROM rekey.key_grant \
                  WHERE key_name = $2 AND privilege <> 'owner' \
                    AND (grantee::oid = '0'::oid \
                         OR EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.oid = grantee)) \
                 UNION ALL SELECT $3::oid::regrole, 'owner') AS g, \
                unnest($1) AS n (name)",
        &[Arg::Texts(&new), Arg::Text(like), Arg::Oid(owner)],
    )?;
    Ok(created)
}

/// A slot to be inserted.
pub struct NewSlotRow<'a> {
    /// Slot id.
    pub id: SlotId,
    /// Its key.
    pub key: &'a str,
    /// HMAC that proves the DEK.
    pub check_value: &'a [u8],
    /// Its wrapped keys.
    pub wraps: &'a [(RootId, [u8; 73])],
}

/// Inserts slots of different keys with their wrapped keys. The version of each goes on from the
/// highest that its key's name had.
pub fn insert_slots(slots: &[NewSlotRow<'_>], state: SlotState, reason: &str) -> Result<()> {
    run(
        "INSERT INTO rekey.key_slot \
             (slot_id, key_name, version, state, check_value, activated_at, reason) \
         SELECT n.slot_id, n.key_name, \
                (SELECT coalesce(max(s.version), 0) + 1 FROM rekey.key_slot s \
                  WHERE s.key_name = n.key_name), \
                $4, n.check_value, CASE WHEN $4 = 'active' THEN clock_timestamp() END, $5 \
           FROM unnest($1, $2, $3) AS n (slot_id, key_name, check_value)",
        &[
            Arg::Bigints(&slots.iter().map(|s| s.id.as_i64()).collect::<Vec<_>>()),
            Arg::Texts(&slots.iter().map(|s| s.key).collect::<Vec<_>>()),
            Arg::Byteas(&slots.iter().map(|s| s.check_value).collect::<Vec<_>>()),
            Arg::Text(state.name()),
            Arg::Text(reason),
        ],
    )?;
    let (mut ids, mut roots, mut wrapped) = (Vec::new(), Vec::new(), Vec::new());
    for slot in slots {
        for (root, wrap) in slot.wraps {
            ids.push(slot.id.as_i64());
            roots.push(&root.as_bytes()[..]);
            wrapped.push(&wrap[..]);
        }
    }
    run(
        "INSERT INTO rekey.slot_wrap (slot_id, root_id, wrapped_key) \
         SELECT * FROM unnest($1, $2, $3)",
        &[
            Arg::Bigints(&ids),
            Arg::Byteas(&roots),
            Arg::Byteas(&wrapped),
        ],
    )
    .map(|_| ())
}

/// Inserts a key that comes from another database, with the policy of new keys otherwise; false
/// when the name is taken.
pub fn import_key_row(name: &str, seals: bool, require_context: bool) -> Result<bool> {
    let inserted = bigint(
        "INSERT INTO rekey.key (key_name, purpose, require_context) VALUES ($1, $2, $3) \
         ON CONFLICT DO NOTHING RETURNING 1::bigint",
        &[
            Arg::Text(name),
            Arg::Text(if seals { "seal" } else { "lookup" }),
            Arg::Bool(Some(require_context)),
        ],
    )?;
    if inserted.is_some() {
        let sql = "DELETE FROM rekey.key_grant WHERE key_name = $1";
        run(sql, &[Arg::Text(name)])?;
    }
    Ok(inserted.is_some())
}

/// A slot that comes from another database.
pub struct ImportedSlot<'a> {
    /// Slot id.
    pub id: SlotId,
    /// State here.
    pub state: SlotState,
    /// HMAC that proves the DEK.
    pub check_value: &'a [u8],
    /// Whether it was reported compromised there.
    pub compromised: bool,
    /// Its wrapped keys, none for a tombstone.
    pub wraps: Vec<(RootId, [u8; 73])>,
}

/// Inserts an imported slot. Its version is the next one of the key's name.
pub fn insert_imported_slot(slot: &ImportedSlot<'_>, key: &str) -> Result<()> {
    let row = NewSlotRow {
        id: slot.id,
        key,
        check_value: slot.check_value,
        wraps: &slot.wraps,
    };
    insert_slots(&[row], slot.state, "imported")?;
    run(
        "UPDATE rekey.key_slot SET \
             superseded_at = CASE WHEN state IN ('previous', 'disabled') THEN created_at END, \
             disabled_at = CASE WHEN state = 'disabled' THEN created_at END, \
             destroyed_at = CASE WHEN state = 'destroyed' THEN created_at END, \
             compromised_at = CASE WHEN $2 THEN created_at END \
         WHERE slot_id = $1",
        &[
            Arg::Bigint(slot.id.as_i64()),
            Arg::Bool(Some(slot.compromised)),
        ],
    )
    .map(|_| ())
}

/// Inserts one wrapped key of a slot.
pub fn insert_wrap(id: SlotId, root: RootId, wrapped: &[u8]) -> Result<()> {
    run(
        "INSERT INTO rekey.slot_wrap (slot_id, root_id, wrapped_key) VALUES ($1, $2, $3)",
        &[
            Arg::Bigint(id.as_i64()),
            Arg::Bytea(root.as_bytes()),
            Arg::Bytea(wrapped),
        ],
    )
    .map(|_| ())
}

/// The stamps of a slot whose place another one has taken.
const SUPERSEDED: &str = "superseded_at = clock_timestamp(), drained_at = NULL, proof = NULL";

/// Moves a slot to another state, stamps it, and records the transition.
///
/// The row changes only if its state is still the one that the caller saw. `lock_key` makes any
/// other impossible (an older snapshot ends there in 40001), unless a restore runs beside us.
pub fn transition(slot: &SlotRow, to: SlotState, action: &str, reason: &str) -> Result<()> {
    if !slot.state.may_become(to) {
        return Err(Error::State(
            format!("slot {} is {} and cannot become {to}", slot.id, slot.state),
            format!(
                "It is version {} of key \"{}\".",
                slot.version, slot.key_name
            ),
            "rekey.slots shows the states of the key's slots.".to_string(),
        ));
    }
    let stamps = match to {
        SlotState::Active => {
            "activated_at = clock_timestamp(), superseded_at = NULL, drained_at = NULL, \
             disabled_at = NULL, proof = NULL"
        }
        SlotState::Previous if slot.state == SlotState::Active => SUPERSEDED,
        SlotState::Previous if slot.state == SlotState::Destroyed => {
            "superseded_at = coalesce(superseded_at, clock_timestamp()), disabled_at = NULL, \
             drained_at = NULL, destroyed_at = NULL, proof = NULL"
        }
        SlotState::Previous => "disabled_at = NULL, drained_at = NULL, proof = NULL",
        SlotState::Drained => "disabled_at = NULL, drained_at = clock_timestamp()",
        SlotState::Disabled => "disabled_at = clock_timestamp()",
        SlotState::Destroyed => "destroyed_at = clock_timestamp()",
        SlotState::Pending => "reason = reason",
    };
    let changed = run(
        &format!(
            "UPDATE rekey.key_slot SET state = $3, {stamps}, \
                 reason = CASE WHEN $4 = '' THEN reason ELSE $4 END \
             WHERE slot_id = $1 AND state = $2"
        ),
        &[
            Arg::Bigint(slot.id.as_i64()),
            Arg::Text(slot.state.name()),
            Arg::Text(to.name()),
            Arg::Text(reason),
        ],
    )?;
    if changed != 1 {
        return Err(Error::State(
            format!("slot {} has changed meanwhile", slot.id),
            format!("It was {} when the action began.", slot.state),
            "Look at rekey.slots and try again.".to_string(),
        ));
    }
    if to == SlotState::Destroyed {
        // A rotation of the root key beside us would give the slot one more wrapped key.
        roots::lock(Roots::Use)?;
        let sql = "DELETE FROM rekey.slot_wrap WHERE slot_id = $1";
        run(sql, &[Arg::Bigint(slot.id.as_i64())])?;
        // One that was made after this transaction's snapshot is not deleted.
        if !read::wraps(slot.id)?.is_empty() {
            return Err(Error::Snapshot);
        }
    }
    Audit {
        action,
        key: Some(&slot.key_name),
        slot: Some(slot.id),
        from: Some(slot.state),
        to: Some(to),
        detail: reason,
    }
    .record()
}

/// Makes active slots, whose keys are locked, previous, and records it.
pub fn supersede(slots: &[SlotRow], action: &str) -> Result<()> {
    let ids: Vec<i64> = slots.iter().map(|slot| slot.id.as_i64()).collect();
    let sql = format!(
        "UPDATE rekey.key_slot SET state = 'previous', {SUPERSEDED} \
          WHERE slot_id = ANY ($1) AND state = 'active'"
    );
    if run(&sql, &[Arg::Bigints(&ids)])? != slots.len() {
        return Err(Error::State(
            "slots have changed meanwhile".to_string(),
            format!("{} slots were active when the action began.", slots.len()),
            "Look at rekey.slots and try again.".to_string(),
        ));
    }
    let acts: Vec<Audit<'_>> = slots
        .iter()
        .map(|slot| Audit {
            action,
            key: Some(&slot.key_name),
            slot: Some(slot.id),
            from: Some(SlotState::Active),
            to: Some(SlotState::Previous),
            detail: "",
        })
        .collect();
    Audit::record_all(&acts)
}

/// Stamps a slot as compromised, which voids its proof, and records it.
pub fn stamp_compromised(slot: &SlotRow, action: &str, reason: &str) -> Result<()> {
    run(
        "UPDATE rekey.key_slot SET compromised_at = clock_timestamp(), proof = NULL, reason = $2 \
         WHERE slot_id = $1",
        &[Arg::Bigint(slot.id.as_i64()), Arg::Text(reason)],
    )?;
    Audit {
        action,
        key: Some(&slot.key_name),
        slot: Some(slot.id),
        from: Some(slot.state),
        to: Some(slot.state),
        detail: reason,
    }
    .record()
}

/// Grants a privilege; role 0 is everyone. Granting twice is fine.
pub fn insert_grant(key: &str, role: pg_sys::Oid, privilege: Privilege) -> Result<()> {
    run(
        "INSERT INTO rekey.key_grant (key_name, grantee, privilege) \
         VALUES ($1, $2::oid::regrole, $3) ON CONFLICT DO NOTHING",
        &[Arg::Text(key), Arg::Oid(role), Arg::Text(privilege.name())],
    )
    .map(|_| ())
}

/// Takes a privilege back; taking what is not there is fine.
pub fn delete_grant(key: &str, role: pg_sys::Oid, privilege: Privilege) -> Result<()> {
    run(
        "DELETE FROM rekey.key_grant \
         WHERE key_name = $1 AND grantee = $2::oid::regrole AND privilege = $3",
        &[Arg::Text(key), Arg::Oid(role), Arg::Text(privilege.name())],
    )
    .map(|_| ())
}

/// A column to be registered.
pub struct Registration<'a> {
    /// Table.
    pub table: pg_sys::Oid,
    /// Column.
    pub column: &'a str,
    /// Expression of the context; empty for none.
    pub context: &'a str,
    /// Whether the table's triggers fire.
    pub fire_triggers: bool,
    /// Number of the column in the table.
    pub attnum: i16,
    /// Who registers it.
    pub by: &'a str,
    /// What makes it a column of fingerprints.
    pub fingerprint: Option<&'a read::FingerprintRow>,
}

/// Registers a column; false when it is registered already. The stamp comes from a trigger.
pub fn insert_registration(new: &Registration<'_>) -> Result<bool> {
    let part = |read: fn(&read::FingerprintRow) -> &str| new.fingerprint.map_or("", read);
    let inserted = bigint(
        "INSERT INTO rekey.registered_column \
             (table_name, column_name, context, fire_triggers, attnum, stamp, registered_by, \
              sealed_column, sealed_attnum, key_name, sealed_key, normalise) \
         SELECT $1::oid::regclass, $2, $3, $4, $5::smallint, '', $6, $7, $8::smallint, $9, $10, $11 \
          WHERE NOT EXISTS (SELECT FROM rekey.registered_column r \
              WHERE r.table_name = $1::oid::regclass AND $5 = rekey.registered_attnum( \
                  r.table_name, r.column_name, r.attnum, r.stamp)) \
         ON CONFLICT DO NOTHING RETURNING 1::bigint",
        &[
            Arg::Oid(new.table),
            Arg::Text(new.column),
            Arg::Text(new.context),
            Arg::Bool(Some(new.fire_triggers)),
            Arg::Bigint(i64::from(new.attnum)),
            Arg::Text(new.by),
            Arg::Text(part(|of| &of.sealed_column)),
            Arg::Bigint(new.fingerprint.map_or(0, |of| i64::from(of.sealed_attnum))),
            Arg::Text(part(|of| &of.key)),
            Arg::Text(part(|of| &of.sealed_key)),
            Arg::Text(part(|of| &of.normalise)),
        ],
    )?;
    Ok(inserted.is_some())
}

/// Ends the registration of the column with this number, or of one that is gone by its last name.
pub fn delete_registration(table: pg_sys::Oid, column: &str, attnum: i16) -> Result<bool> {
    let deleted = run(
        "DELETE FROM rekey.registered_column r WHERE r.table_name = $1::oid::regclass \
            AND coalesce(rekey.registered_attnum( \
                    r.table_name, r.column_name, r.attnum, r.stamp) = $3, r.column_name = $2)",
        &[
            Arg::Oid(table),
            Arg::Text(column),
            Arg::Bigint(i64::from(attnum)),
        ],
    )?;
    Ok(deleted > 0)
}

/// Writes down the present name and stamp of the registered columns of a table, where they are
/// other than written. A name that stands beside another column's row, one that is gone, is left.
pub fn settle_registrations(table: pg_sys::Oid) -> Result<()> {
    run(
        "UPDATE rekey.registered_column r \
            SET column_name = a.attname::text, attnum = a.attnum, \
                stamp = rekey.table_stamp(r.table_name), \
                sealed_column = coalesce(s.attname::text, f.sealed_column), \
                sealed_attnum = coalesce(s.attnum, f.sealed_attnum) \
           FROM rekey.registered_column f \
           JOIN pg_catalog.pg_attribute a \
             ON a.attrelid = $1 AND NOT a.attisdropped AND a.attnum = rekey.registered_attnum( \
                    f.table_name, f.column_name, f.attnum, f.stamp) \
           LEFT JOIN pg_catalog.pg_attribute s \
             ON s.attrelid = $1 AND NOT s.attisdropped AND s.attnum = rekey.registered_attnum( \
                    f.table_name, f.sealed_column, f.sealed_attnum, f.stamp) \
          WHERE r.table_name = $1::oid::regclass \
            AND f.table_name = r.table_name AND f.column_name = r.column_name \
            AND (r.column_name <> a.attname::text OR r.sealed_column <> s.attname::text \
                 OR r.stamp <> rekey.table_stamp(r.table_name)) \
            AND NOT EXISTS (SELECT FROM rekey.registered_column o \
                  WHERE o.table_name = r.table_name AND o.column_name = a.attname::text \
                    AND o.column_name <> r.column_name)",
        &[Arg::Oid(table)],
    )
    .map(|_| ())
}

/// The same for the live columns of a table.
fn settle_live_columns(table: pg_sys::Oid) -> Result<()> {
    run(
        "UPDATE rekey.live_column l \
            SET column_name = a.attname::text, attnum = a.attnum, \
                into_column = b.attname::text, into_attnum = b.attnum, \
                stamp = rekey.table_stamp(l.table_name) \
           FROM pg_catalog.pg_attribute a, pg_catalog.pg_attribute b \
          WHERE l.table_name = $1::oid::regclass AND a.attrelid = $1 AND b.attrelid = $1 \
            AND a.attnum = rekey.registered_attnum(l.table_name, l.column_name, l.attnum, l.stamp) \
            AND b.attnum = rekey.registered_attnum( \
                    l.table_name, l.into_column, l.into_attnum, l.stamp) \
            AND (l.column_name <> a.attname::text OR l.into_column <> b.attname::text \
                 OR l.stamp <> rekey.table_stamp(l.table_name))",
        &[Arg::Oid(table)],
    )
    .map(|_| ())
}

/// `settle_registrations` for the tables that the current command has altered, in an event trigger.
pub fn settle_altered_tables() -> Result<()> {
    let altered = rows(
        "SELECT DISTINCT c.objid::text FROM pg_catalog.pg_event_trigger_ddl_commands() c \
           JOIN rekey.registered_column r ON r.table_name::oid = c.objid \
          WHERE c.classid = 'pg_catalog.pg_class'::regclass",
        &[],
    )?;
    for row in altered {
        let oid = row[0].as_deref().and_then(|oid| oid.parse().ok());
        let oid = oid.map_or(pg_sys::InvalidOid, pg_sys::Oid::from_u32);
        settle_registrations(oid)?;
        settle_live_columns(oid)?;
    }
    Ok(())
}

/// Forgets the tables that the current command drops.
pub fn forget_dropped_tables() -> Result<()> {
    super::live::forget_dropped()?;
    for table in [
        "registered_column",
        "progress_state",
        "quarantine",
        "pause",
        "backfill_state",
    ] {
        let sql = format!(
            "DELETE FROM rekey.{table} WHERE table_name::oid IN (SELECT objid \
               FROM pg_catalog.pg_event_trigger_dropped_objects() \
              WHERE classid = 'pg_catalog.pg_class'::regclass AND objsubid = 0)"
        );
        run(&sql, &[])?;
    }
    Ok(())
}
