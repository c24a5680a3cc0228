//! Rows of the catalog, read under the catalog snapshot.
//!
//! Called by the cache on a miss and by the life cycle. Column numbers are those of
//! sql/catalog.sql: columns are only ever added at the end.

use std::collections::HashSet;

use pgrx::pg_sys;
use rekey_core::cipher::RootId;
use rekey_core::envelope::SlotId;
use rekey_core::keyring::{Privilege, Privileges, SlotState};

use super::tables;
use crate::error::{Error, Result};
use crate::ffi::scan::{Key, Row, Scan};
use crate::ffi::{scan, session, text, types};
use crate::registry;

/// A row of rekey.key.
pub struct KeyRow {
    /// Name in UTF-8.
    pub name: String,
    /// Whether the key seals (purpose seal) or makes fingerprints (lookup).
    pub seals: bool,
    /// Whether sealing needs a context.
    pub require_context: bool,
    /// Whether the key was shredded.
    pub shredded: bool,
}

/// A row of rekey.key_slot.
#[derive(Clone)]
pub struct SlotRow {
    /// Slot id.
    pub id: SlotId,
    /// Key name in UTF-8.
    pub key_name: String,
    /// Number within the key.
    pub version: i32,
    /// State.
    pub state: SlotState,
    /// HMAC that proves the DEK.
    pub check_value: Vec<u8>,
    /// When it was made, as a timestamptz datum.
    pub created_at: i64,
    /// When it was disabled or destroyed, as a timestamptz datum.
    pub closed_at: Option<i64>,
    /// When a rotation took its place, as a timestamptz datum.
    pub superseded_at: Option<i64>,
    /// Whether it was reported compromised.
    pub compromised: bool,
    /// Whether a proof that it is unused stands.
    pub proved: bool,
    /// Whether the row was written in the current transaction.
    pub made_here: bool,
    /// Transaction that wrote this version of the row.
    pub written_by: pg_sys::TransactionId,
}

impl SlotRow {
    /// 55000 for a slot that is disabled or destroyed.
    pub fn refuse_closed(&self) -> Result<()> {
        if self.state.opens() {
            return Ok(());
        }
        let when = self
            .closed_at
            .map_or_else(String::new, types::timestamp_text);
        Err(Error::SlotClosed(self.id, self.state, when))
    }
}

/// A row of rekey.root_key.
pub struct RootRow {
    /// Root id.
    pub id: RootId,
    /// Root check value.
    pub check: Vec<u8>,
    /// active, previous, compromised or retired.
    pub state: String,
    /// When this database adopted it, as a timestamptz datum.
    pub created_at: i64,
    /// When it was retired, as a timestamptz datum.
    pub retired_at: Option<i64>,
}

/// The key of that name, given in the server's encoding.
pub fn key(name: &[u8]) -> Result<Option<KeyRow>> {
    let find = || tables().map(|t| (t.key, t.key_pkey));
    let mut scan = Scan::open(find, &[1], &[Key::Text(name)])?;
    let Some(row) = scan.next_row() else {
        return Ok(None);
    };
    Ok(Some(KeyRow {
        name: text::to_utf8_string(&row.bytes(1))?,
        seals: row.bytes(2) == b"seal",
        require_context: row.bool(6),
        shredded: row.datum(10).is_some(),
    }))
}

/// The active slot of a key.
pub fn active_slot(name: &[u8]) -> Result<Option<SlotId>> {
    let find = || tables().map(|t| (t.key_slot, t.key_slot_active));
    let mut scan = Scan::open(find, &[2], &[Key::Text(name)])?;
    scan.next_row().map(|row| slot_id(&row)).transpose()
}

/// One slot, whatever its state.
pub fn slot(id: SlotId) -> Result<Option<SlotRow>> {
    let find = || tables().map(|t| (t.key_slot, t.key_slot_pkey));
    let mut scan = Scan::open(find, &[1], &[Key::Bigint(id.as_i64())])?;
    scan.next_row().map(|row| slot_row(&row)).transpose()
}

/// All slots that ever bore the key's name, by version.
pub fn slots_of(name: &[u8]) -> Result<Vec<SlotRow>> {
    let find = || tables().map(|t| (t.key_slot, t.key_slot_version));
    let mut scan = Scan::open(find, &[2], &[Key::Text(name)])?;
    let mut slots = Vec::new();
    while let Some(row) = scan.next_row() {
        slots.push(slot_row(&row)?);
    }
    slots.sort_by_key(|slot| slot.version);
    Ok(slots)
}

/// The names of the keys that are not shredded.
pub fn living_keys() -> Result<std::collections::HashSet<String>> {
    let find = || tables().map(|t| (t.key, pg_sys::InvalidOid));
    let mut scan = Scan::open(find, &[], &[])?;
    let mut names = std::collections::HashSet::new();
    while let Some(row) = scan.next_row() {
        if row.datum(10).is_none() {
            names.insert(text::to_utf8_string(&row.bytes(1))?);
        }
    }
    Ok(names)
}

/// The wrapped keys of a slot, by root key.
pub fn wraps(id: SlotId) -> Result<Vec<(RootId, Vec<u8>)>> {
    let find = || tables().map(|t| (t.slot_wrap, t.slot_wrap_pkey));
    let mut scan = Scan::open(find, &[1], &[Key::Bigint(id.as_i64())])?;
    let mut wraps = Vec::new();
    while let Some(row) = scan.next_row() {
        wraps.push((root_id(&row.bytes(2))?, row.bytes(3)));
    }
    Ok(wraps)
}

/// Every slot of the database, by key name and version.
pub fn all_slots() -> Result<Vec<SlotRow>> {
    let find = || tables().map(|t| (t.key_slot, pg_sys::InvalidOid));
    let mut scan = Scan::open(find, &[], &[])?;
    let mut slots = Vec::new();
    while let Some(row) = scan.next_row() {
        slots.push(slot_row(&row)?);
    }
    slots.sort_by(|a, b| (&a.key_name, a.version).cmp(&(&b.key_name, b.version)));
    Ok(slots)
}

/// The slots that have a wrapped key under a root key.
pub fn slots_under(root: RootId) -> Result<HashSet<SlotId>> {
    let find = || tables().map(|t| (t.slot_wrap, pg_sys::InvalidOid));
    let mut scan = Scan::open(find, &[], &[])?;
    let mut slots = HashSet::new();
    while let Some(row) = scan.next_row() {
        if row.bytes(2) == root.as_bytes() {
            slots.insert(slot_id(&row)?);
        }
    }
    Ok(slots)
}

/// What `user` may do with a key, by his own grants, his roles' and everyone's.
pub fn privileges(name: &[u8], user: pg_sys::Oid) -> Result<Privileges> {
    if session::is_superuser(user) {
        return Ok(Privileges::from_iter([Privilege::Owner]));
    }
    let mut held = Privileges::NONE;
    for (grantee, privilege) in grants(name)? {
        if grantee == pg_sys::InvalidOid || session::has_privileges_of(user, grantee) {
            held.insert(privilege);
        }
    }
    Ok(held)
}

fn grants(name: &[u8]) -> Result<Vec<(pg_sys::Oid, Privilege)>> {
    let find = || tables().map(|t| (t.key_grant, t.key_grant_pkey));
    let mut scan = Scan::open(find, &[1], &[Key::Text(name)])?;
    let mut grants = Vec::new();
    while let Some(row) = scan.next_row() {
        let privilege = String::from_utf8_lossy(&row.bytes(3)).into_owned();
        let privilege = Privilege::parse(&privilege)
            .ok_or_else(|| Error::Internal(format!("unknown privilege {privilege} in catalog")))?;
        grants.push((row.oid(2), privilege));
    }
    Ok(grants)
}

/// All root keys that this database knows.
pub fn root_keys() -> Result<Vec<RootRow>> {
    let find = || tables().map(|t| (t.root_key, pg_sys::InvalidOid));
    let mut scan = Scan::open(find, &[], &[])?;
    let mut roots = Vec::new();
    while let Some(row) = scan.next_row() {
        roots.push(RootRow {
            id: root_id(&row.bytes(1))?,
            check: row.bytes(2),
            state: String::from_utf8_lossy(&row.bytes(3)).into_owned(),
            created_at: row.i64(4),
            retired_at: row.datum(5).map(|_| row.i64(5)),
        });
    }
    Ok(roots)
}

/// A row of rekey.registered_column.
pub struct RegisteredRow {
    /// Table.
    pub table: pg_sys::Oid,
    /// Name of the column when it was registered.
    pub column: String,
    /// Expression of the context; empty for none.
    pub context: String,
    /// Whether the table's triggers fire.
    pub fire_triggers: bool,
    /// Number of the column in the stamped table.
    pub attnum: i16,
    /// Table for which the numbers count: see src/registry.rs.
    pub stamp: String,
    /// What makes a column of fingerprints of it; None for one of envelopes.
    pub fingerprint: Option<FingerprintRow>,
}

/// The part of a row of rekey.registered_column that is about fingerprints.
pub struct FingerprintRow {
    /// Name of the sealed column beside it when it was registered.
    pub sealed_column: String,
    /// Its number in the stamped table.
    pub sealed_attnum: i16,
    /// Lookup key.
    pub key: String,
    /// Key of the sealed values.
    pub sealed_key: String,
    /// Expression over the value; empty for the value as it is.
    pub normalise: String,
}

/// The columns of rekey.registered_column that depend on the table's numbers: attnum, stamp and
/// sealed_attnum.
pub const STAMP: (i16, i16, i16) = (5, 6, 10);

/// All registered columns.
pub fn registered_columns() -> Result<Vec<RegisteredRow>> {
    let find = || tables().map(|t| (t.registered_column, pg_sys::InvalidOid));
    let mut scan = Scan::open(find, &[], &[])?;
    let mut columns = Vec::new();
    while let Some(row) = scan.next_row() {
        columns.push(registered_row(|attribute| row.datum(attribute))?);
    }
    Ok(columns)
}

/// A row of rekey.registered_column, given the datum of each of its columns.
pub fn registered_row(datum: impl Fn(i16) -> Option<pg_sys::Datum>) -> Result<RegisteredRow> {
    let words = |attribute| words(datum(attribute));
    let sealed_column = words(9)?;
    let fingerprint = if sealed_column.is_empty() {
        None
    } else {
        Some(FingerprintRow {
            sealed_column,
            sealed_attnum: small(datum(STAMP.2)),
            key: words(11)?,
            sealed_key: words(12)?,
            normalise: words(13)?,
        })
    };
    Ok(RegisteredRow {
        table: oid(datum(1)),
        column: words(2)?,
        context: words(3)?,
        fire_triggers: datum(4).is_some_and(|d| d.value() & 0xff != 0),
        attnum: small(datum(STAMP.0)),
        stamp: words(STAMP.1)?,
        fingerprint,
    })
}

/// A row of rekey.live_column.
pub struct LiveRow {
    /// Name of its trigger.
    pub trigger: String,
    /// Table.
    pub table: pg_sys::Oid,
    /// Whether its values are sealed, else opened.
    pub seals: bool,
    /// Key to seal under.
    pub key: String,
    /// Expression that gives the value to seal; empty for the column itself.
    pub source: String,
    column: (String, i16),
    into: (String, i16),
    stamp: String,
}

impl LiveRow {
    /// The present number, in the row's own table, of the column that is read; None when it is
    /// gone.
    pub fn read_attnum(&self) -> Option<i16> {
        registry::place(self.table, &self.column.0, self.column.1, &self.stamp)
    }

    /// The same of the column that is written.
    pub fn written_attnum(&self) -> Option<i16> {
        registry::place(self.table, &self.into.0, self.into.1, &self.stamp)
    }
}

/// The columns of rekey.live_column that depend on the table's numbers: attnum, into_attnum, stamp.
pub const LIVE_STAMP: (i16, i16, i16) = (5, 6, 7);

/// All live columns.
pub fn live_columns() -> Result<Vec<LiveRow>> {
    let find = || tables().map(|t| (t.live_column, pg_sys::InvalidOid));
    let mut scan = Scan::open(find, &[], &[])?;
    let mut columns = Vec::new();
    while let Some(row) = scan.next_row() {
        columns.push(live_row(|attribute| row.datum(attribute))?);
    }
    Ok(columns)
}

/// A row of rekey.live_column, given the datum of each of its columns.
pub fn live_row(datum: impl Fn(i16) -> Option<pg_sys::Datum>) -> Result<LiveRow> {
    let words = |attribute| words(datum(attribute));
    let (at, into, of) = LIVE_STAMP;
    Ok(LiveRow {
        trigger: words(1)?,
        table: oid(datum(2)),
        seals: words(8)? == "encrypt",
        key: words(9)?,
        source: words(10)?,
        column: (words(3)?, small(datum(at))),
        into: (words(4)?, small(datum(into))),
        stamp: words(of)?,
    })
}

fn words(datum: Option<pg_sys::Datum>) -> Result<String> {
    match datum {
        Some(datum) => text::to_utf8_string(text::detoasted(datum)),
        None => Ok(String::new()),
    }
}

fn oid(datum: Option<pg_sys::Datum>) -> pg_sys::Oid {
    let number = datum.map_or(0, |datum| datum.value() & 0xffff_ffff);
    pg_sys::Oid::from(u32::try_from(number).unwrap_or(0))
}

fn small(datum: Option<pg_sys::Datum>) -> i16 {
    let number = datum.map_or(0, |datum| datum.value() & 0x7fff);
    i16::try_from(number).unwrap_or(0)
}

/// How many slots of how many keys are not destroyed. Needs no index: it also answers in the
/// middle of a DROP.
pub fn living_slots() -> Result<(i64, i64)> {
    let find = || {
        let key_slot = scan::relation(c"key_slot").filter(|table| scan::belongs_to_us(*table));
        Ok((key_slot.ok_or(Error::NoCatalog)?, pg_sys::InvalidOid))
    };
    let mut scan = Scan::open(find, &[], &[])?;
    let mut slots = 0;
    let mut keys = HashSet::new();
    while let Some(row) = scan.next_row() {
        if row.bytes(4) != SlotState::Destroyed.name().as_bytes() {
            slots += 1;
            keys.insert(row.bytes(2));
        }
    }
    Ok((slots, i64::try_from(keys.len()).unwrap_or(i64::MAX)))
}

/// Whether the relation is a table whose loss would lose keys.
pub fn holds_keys(relation: pg_sys::Oid) -> bool {
    [c"key_slot", c"slot_wrap"]
        .into_iter()
        .any(|name| scan::relation(name) == Some(relation))
}

fn slot_id(row: &Row<'_>) -> Result<SlotId> {
    SlotId::from_i64(row.i64(1))
        .ok_or_else(|| Error::Internal("slot id out of range in catalog".to_string()))
}

fn root_id(bytes: &[u8]) -> Result<RootId> {
    RootId::from_slice(bytes)
        .ok_or_else(|| Error::Internal("root id of wrong length in catalog".to_string()))
}

fn slot_row(row: &Row<'_>) -> Result<SlotRow> {
    let state = String::from_utf8_lossy(&row.bytes(4)).into_owned();
    let timestamp = |attribute| row.datum(attribute).map(|_| row.i64(attribute));
    Ok(SlotRow {
        id: slot_id(row)?,
        key_name: text::to_utf8_string(&row.bytes(2))?,
        version: i32::try_from(row.i64(3) & 0x7fff_ffff).unwrap_or(0),
        state: SlotState::parse(&state)
            .ok_or_else(|| Error::Internal(format!("unknown slot state {state} in catalog")))?,
        check_value: row.bytes(5),
        created_at: row.i64(6),
        closed_at: timestamp(11).or_else(|| timestamp(10)),
        superseded_at: timestamp(8),
        compromised: row.datum(12).is_some(),
        proved: row.datum(14).is_some(),
        made_here: row.written_here(),
        written_by: row.writer(),
    })
}
