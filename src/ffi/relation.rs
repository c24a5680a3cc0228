//! What the system catalogs say of a relation: its columns, leaves, and what stands in the way of
//! updating rows in its owner's place.
//!
//! Called by src/registry.rs and the registration. Syscache look-ups and the relation cache only.

use std::ffi::{CString, c_char};

use pgrx::pg_sys::ffi::pg_guard_ffi_boundary;
use pgrx::pg_sys::{self, Oid};

/// tableoid, the system column with the lowest number (src/include/access/sysattr.h).
const TABLE_OID_ATTRIBUTE: i16 = -6;
/// The first OID of users' objects (src/include/access/transam.h).
const FIRST_NORMAL_OBJECT: u32 = 16384;

// Functions that pgrx does not bind. They may raise: called through pg_guard_ffi_boundary only.
unsafe extern "C-unwind" {
    // src/include/catalog/pg_inherits.h
    fn find_all_inheritors(
        parent: Oid,
        lockmode: pg_sys::LOCKMODE,
        numparents: *mut *mut pg_sys::List,
    ) -> *mut pg_sys::List;
    // src/include/catalog/partition.h
    fn get_partition_ancestors(relation: Oid) -> *mut pg_sys::List;
}

/// Whether there is such a relation.
pub fn exists(relation: Oid) -> bool {
    kind(relation) != 0
}

/// pg_class.relkind; 0 when there is no such relation.
pub fn kind(relation: Oid) -> u8 {
    // SAFETY: a syscache look-up that answers '\0' for a missing relation.
    unsafe { pg_sys::get_rel_relkind(relation) }.to_ne_bytes()[0]
}

/// A row of pg_attribute, read while it is in the cache; None when there is none.
fn attribute<R>(
    relation: Oid,
    attnum: i16,
    read: impl FnOnce(&pg_sys::HeapTupleHeaderData, &pg_sys::FormData_pg_attribute) -> R,
) -> Option<R> {
    // SAFETY: the cached tuple keeps the header of the stored one; GETSTRUCT is the fixed part of
    // its row. Both are released once `read`, which must not raise, is done.
    unsafe {
        let cache = pg_sys::SysCacheIdentifier::ATTNUM as i32;
        let (relation, attnum) = (pg_sys::Datum::from(relation), pg_sys::Datum::from(attnum));
        let tuple = pg_sys::SearchSysCache2(cache, relation, attnum);
        if tuple.is_null() {
            return None;
        }
        let row = pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_attribute>();
        let result = read(&*(*tuple).t_data, &*row);
        pg_sys::ReleaseSysCache(tuple);
        Some(result)
    }
}

/// The name of a live column.
pub fn column_name(relation: Oid, attnum: i16) -> Option<String> {
    let name = attribute(relation, attnum, |_, row| {
        (!row.attisdropped).then_some(row.attname)
    });
    // SAFETY: a copy of a name, which has a NUL.
    name.flatten()
        .map(|name| unsafe { super::text::c_string(name.data.as_ptr()) })
}

/// The number of the live user column of that name.
pub fn column_number(relation: Oid, name: &str) -> Option<i16> {
    let server = super::text::to_server(name.as_bytes()).ok()?.into_owned();
    let name = CString::new(server).ok()?;
    // SAFETY: a syscache look-up that answers 0 for a missing column.
    let number = unsafe { pg_sys::get_attnum(relation, name.as_ptr()) };
    (number > 0).then_some(number)
}

/// The numbers of the live user columns, in order.
pub fn columns(relation: Oid) -> Vec<i16> {
    let mut columns = Vec::new();
    let mut attnum = 1;
    while let Some(dropped) = attribute(relation, attnum, |_, row| row.attisdropped) {
        if !dropped {
            columns.push(attnum);
        }
        attnum += 1;
    }
    columns
}

/// The transaction that made a table, as it stands in the catalog; None when there is no table.
///
/// pg_attribute's row of the system column tableoid is written by CREATE TABLE. Nothing rewrites it
/// but a GRANT on that very column, and freezing keeps its xmin.
pub fn born(table: Oid) -> Option<u32> {
    // SAFETY: t_heap is the variant of every stored tuple.
    attribute(table, TABLE_OID_ATTRIBUTE, |header, _| unsafe {
        header.t_choice.t_heap.t_xmin.into_inner()
    })
}

/// The number by which this server knows itself; its standbys and backups share it.
pub fn system_identifier() -> u64 {
    // SAFETY: reads what is set at start.
    unsafe { pg_sys::GetSystemIdentifier() }
}

/// Whether PostgreSQL computes a column.
pub fn is_generated(relation: Oid, attnum: i16) -> bool {
    attribute(relation, attnum, |_, row| row.attgenerated != 0).unwrap_or(false)
}

/// The type of a column.
pub fn column_type(relation: Oid, attnum: i16) -> Oid {
    // SAFETY: a syscache look-up that answers 0 for a missing column.
    unsafe { pg_sys::get_atttype(relation, attnum) }
}

/// The type modifier of a column, or that of its domain: a length, a scale; -1 for none.
pub fn column_typmod(relation: Oid, attnum: i16) -> i32 {
    let mut typmod = attribute(relation, attnum, |_, row| row.atttypmod).unwrap_or(-1);
    // SAFETY: syscache look-ups; writes the number of a domain that has one.
    unsafe { pg_sys::getBaseTypeAndTypmod(column_type(relation, attnum), &mut typmod) };
    typmod
}

/// Whether two slots of one table hold the same bytes in each of these columns.
pub fn same_columns(
    relation: Oid,
    one: *mut pg_sys::TupleTableSlot,
    other: *mut pg_sys::TupleTableSlot,
    columns: &[i16],
) -> bool {
    let values = |slot| super::table::columns_of(slot, columns);
    let pairs = values(one).into_iter().zip(values(other));
    let types = columns.iter().map(|column| column_type(relation, *column));
    types
        .zip(pairs)
        .all(|(type_oid, (one, other))| super::types::same(type_oid, one, other))
}

/// pg_attribute.attidentity: a for ALWAYS, d for BY DEFAULT, 0 for no identity column.
pub fn identity(relation: Oid, attnum: i16) -> u8 {
    attribute(relation, attnum, |_, row| row.attidentity.to_ne_bytes()[0]).unwrap_or(0)
}

/// Whether a column is bytea, or a domain over it.
pub fn is_bytea(relation: Oid, attnum: i16) -> bool {
    // SAFETY: syscache look-ups; 0 has no base type but itself.
    unsafe {
        let type_oid = pg_sys::get_atttype(relation, attnum);
        type_oid != pg_sys::InvalidOid && pg_sys::getBaseType(type_oid) == pg_sys::BYTEAOID
    }
}

/// A table and all that is below it, partitioned tables included.
pub fn members(relation: Oid) -> Vec<Oid> {
    // SAFETY: reads pg_inherits; the list holds OIDs and lives in the current context.
    unsafe {
        let list = pg_guard_ffi_boundary(|| {
            find_all_inheritors(relation, pg_sys::NoLock as i32, std::ptr::null_mut())
        });
        pgrx::PgList::<Oid>::from_pg(list).iter_oid().collect()
    }
}

/// The tables that store the rows: the table itself, or the leaves of a partitioned one, of which
/// some may be foreign tables.
pub fn leaves(relation: Oid) -> Vec<Oid> {
    match kind(relation) {
        b'r' => vec![relation],
        // What is gone meanwhile holds nothing; a partitioned one is there by its leaves. A foreign
        // one stays in the list: its envelopes must not be passed over in silence.
        b'p' => members(relation)
            .into_iter()
            .filter(|oid| !matches!(kind(*oid), 0 | b'p'))
            .collect(),
        _ => Vec::new(),
    }
}

/// Whether other tables inherit from a table that is not partitioned.
pub fn has_children(relation: Oid) -> bool {
    // SAFETY: reads pg_inherits; the list lives in the current context.
    kind(relation) == b'r'
        && unsafe {
            let list = pg_guard_ffi_boundary(|| {
                find_all_inheritors(relation, pg_sys::NoLock as i32, std::ptr::null_mut())
            });
            pgrx::PgList::<Oid>::from_pg(list).len() > 1
        }
}

/// The partitioned tables that a table is a partition of, the nearest first.
pub fn ancestors(relation: Oid) -> Vec<Oid> {
    // SAFETY: a syscache look-up; get_partition_ancestors raises for what is no partition.
    unsafe {
        if !exists(relation) || !pg_sys::get_rel_relispartition(relation) {
            return Vec::new();
        }
        let list = pg_guard_ffi_boundary(|| get_partition_ancestors(relation));
        pgrx::PgList::<Oid>::from_pg(list).iter_oid().collect()
    }
}

/// Whether `user` may act as the table's owner.
pub fn is_owned_by(relation: Oid, user: Oid) -> bool {
    // SAFETY: syscache look-ups.
    unsafe {
        #[cfg(feature = "pg15")]
        return pg_sys::pg_class_ownercheck(relation, user);
        #[cfg(any(feature = "pg16", feature = "pg18"))]
        return pg_sys::object_ownercheck(Oid::from(1259), relation, user);
    }
}

/// Locks a relation against DDL that would change what the registration relies on, waiting for it.
/// ShareUpdateExclusiveLock: conflicts with ALTER TABLE and with itself, not with readers and
/// writers. Held to the end of the transaction. None when it is gone.
pub fn lock(relation: Oid) -> Option<pg_sys::Relation> {
    lock_as(relation, pg_sys::ShareUpdateExclusiveLock)
}

/// Locks a relation against everybody who writes to it, so that it can be given a trigger; with
/// `and_readers` against everybody, so that it can be given a column. Otherwise like `lock`.
pub fn lock_out(relation: Oid, and_readers: bool) -> Option<pg_sys::Relation> {
    if and_readers {
        lock_as(relation, pg_sys::AccessExclusiveLock)
    } else {
        lock_as(relation, pg_sys::ShareRowExclusiveLock)
    }
}

fn lock_as(relation: Oid, mode: u32) -> Option<pg_sys::Relation> {
    let mode = i32::try_from(mode).ok()?;
    // SAFETY: try_relation_open answers NULL for a missing one; the caller closes it.
    let open = unsafe { pg_sys::try_relation_open(relation, mode) };
    (!open.is_null()).then_some(open)
}

/// The owner of an open relation.
pub fn owner(relation: pg_sys::Relation) -> Oid {
    // SAFETY: open by `lock`.
    unsafe { (*(*relation).rd_rel).relowner }
}

/// The owner of a relation; None when it is gone.
pub fn owner_of(relation: Oid) -> Option<Oid> {
    // SAFETY: GETSTRUCT is the fixed part of the cached row, which is read before its release.
    unsafe {
        let cache = pg_sys::SysCacheIdentifier::RELOID as i32;
        let tuple = pg_sys::SearchSysCache1(cache, pg_sys::Datum::from(relation));
        if tuple.is_null() {
            return None;
        }
        let owner = (*pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_class>()).relowner;
        pg_sys::ReleaseSysCache(tuple);
        Some(owner)
    }
}

/// Closes a relation and keeps its lock.
pub fn close(relation: pg_sys::Relation) {
    // SAFETY: opened by `lock`.
    unsafe { pg_sys::relation_close(relation, pg_sys::NoLock as i32) }
}

/// Why a relation is no table that the worker could serve: reason and detail.
pub fn wrong_kind(relation: pg_sys::Relation) -> Option<(&'static str, &'static str)> {
    // SAFETY: open; rd_rel is set.
    let form = unsafe { &*(*relation).rd_rel };
    let found = match form.relkind.to_ne_bytes()[0] {
        b'r' | b'p' => None,
        b'v' => Some((
            "a view",
            "It stores no rows; register the table beneath it.",
        )),
        b'm' => Some((
            "a materialized view",
            "Its rows are copies; refresh it after the tables beneath it are drained.",
        )),
        b'f' => Some((
            "a foreign table",
            "Its rows are on another server; register the table there.",
        )),
        _ => Some(("no table", "Only tables hold columns to re-encrypt.")),
    };
    if found.is_some() {
        return found;
    }
    if form.relpersistence.to_ne_bytes()[0] == b't' {
        return Some((
            "a temporary table",
            "No other session, hence no worker, can read it.",
        ));
    }
    // SAFETY: syscache look-ups.
    let system = unsafe {
        pg_sys::IsCatalogRelation(relation)
            || pg_sys::IsToastRelation(relation)
            || super::scan::belongs_to_us(unsafe_id(relation))
            || namespace(form.relnamespace).is_some_and(|n| n == "information_schema")
    };
    if system {
        return Some((
            "a system table",
            "It belongs to PostgreSQL or to this extension.",
        ));
    }
    if form.relkind.to_ne_bytes()[0] == b'r' && form.relam != Oid::from(2) {
        return Some((
            "a table with another access method than heap",
            "Rows are found and updated by block, which is what heap tables have.",
        ));
    }
    None
}

fn unsafe_id(relation: pg_sys::Relation) -> Oid {
    // SAFETY: open.
    unsafe { (*relation).rd_id }
}

fn namespace(oid: Oid) -> Option<String> {
    // SAFETY: answers NULL for a missing one.
    unsafe {
        let name = pg_sys::get_namespace_name(oid);
        (!name.is_null()).then(|| super::text::c_string(name))
    }
}

/// Why these columns of an open table cannot be updated in its owner's place, if so: reason and
/// name. Reads the relation cache only.
pub fn refusal(
    relation: pg_sys::Relation,
    columns: &[i16],
    fire_triggers: bool,
) -> Option<(&'static str, String)> {
    trigger_refusal(relation, fire_triggers)
        .or_else(|| rule_refusal(relation, fire_triggers))
        .or_else(|| key_refusal(relation, columns))
}

/// A foreign key over a column, on either side, would be broken in silence: as a replica its
/// triggers do not fire. The side that is referred to has a unique index on the column.
pub fn key_refusal(relation: pg_sys::Relation, columns: &[i16]) -> Option<(&'static str, String)> {
    let name = |column: i16| {
        // SAFETY: the relation is open.
        let table = unsafe { (*relation).rd_id };
        column_name(table, column).unwrap_or_default()
    };
    let shifted = |column: i16| i32::from(column) - pg_sys::FirstLowInvalidHeapAttributeNumber;
    // SAFETY: the relation is open; the list is the cache's own and holds ForeignKeyCacheInfo, the
    // set is a copy.
    unsafe {
        let kind = pg_sys::IndexAttrBitmapKind::INDEX_ATTR_BITMAP_KEY;
        let keyed = pg_sys::RelationGetIndexAttrBitmap(relation, kind);
        let found = columns
            .iter()
            .find(|column| pg_sys::bms_is_member(shifted(**column), keyed));
        pg_sys::bms_free(keyed);
        if let Some(column) = found {
            return Some(("has a unique index on a column of envelopes", name(*column)));
        }
        let keys = pg_sys::RelationGetFKeyList(relation);
        let keys = pgrx::PgList::<pg_sys::ForeignKeyCacheInfo>::from_pg(keys);
        for key in keys.iter_ptr() {
            let count = usize::try_from((*key).nkeys).unwrap_or(0);
            let of_key = (*key).conkey;
            if let Some(column) = of_key.iter().take(count).find(|c| columns.contains(c)) {
                return Some(("has a foreign key on a column of envelopes", name(*column)));
            }
        }
        None
    }
}

fn fires(enabled: c_char, fire_triggers: bool) -> bool {
    match enabled.to_ne_bytes()[0] {
        b'A' => true,
        b'R' => !fire_triggers,
        b'O' => fire_triggers,
        _ => false,
    }
}

/// A trigger that is put off to the end of the transaction runs when nobody acts as the table's
/// owner any more: before PostgreSQL 18 as the worker, a superuser. One that is only DEFERRABLE is
/// no better, since the code of any other trigger may SET CONSTRAINTS. The triggers of foreign keys
/// and unique constraints are PostgreSQL's own and change to the owner by themselves.
fn trigger_refusal(
    relation: pg_sys::Relation,
    fire_triggers: bool,
) -> Option<(&'static str, String)> {
    // SAFETY: the trigger descriptor, if there is one, lives while the relation is open.
    unsafe {
        let desc = (*relation).trigdesc;
        if desc.is_null() {
            return None;
        }
        let count = usize::try_from((*desc).numtriggers).unwrap_or(0);
        let triggers = std::slice::from_raw_parts((*desc).triggers, count);
        let deferred = triggers.iter().find(|trigger| {
            let built_in = trigger.tgisinternal && trigger.tgfoid.to_u32() < FIRST_NORMAL_OBJECT;
            trigger.tgdeferrable
                && !built_in
                && fires(trigger.tgenabled, fire_triggers)
                && u32::from(trigger.tgtype.unsigned_abs()) & pg_sys::TRIGGER_TYPE_UPDATE != 0
        });
        deferred.map(|trigger| {
            (
                "has a trigger that is DEFERRABLE or INITIALLY DEFERRED",
                super::text::c_string(trigger.tgname),
            )
        })
    }
}

fn rule_refusal(relation: pg_sys::Relation, fire_triggers: bool) -> Option<(&'static str, String)> {
    // SAFETY: as above for the rules.
    unsafe {
        let rules = (*relation).rd_rules;
        if rules.is_null() {
            return None;
        }
        let count = usize::try_from((*rules).numLocks).unwrap_or(0);
        let rules = std::slice::from_raw_parts((*rules).rules, count);
        let update = pg_sys::CmdType::CMD_UPDATE;
        for &rule in rules {
            if (*rule).event == update && fires((*rule).enabled, fire_triggers) {
                let which = format!("rule {}", (*rule).ruleId.to_u32());
                return Some(("has a rule on UPDATE that would fire", which));
            }
        }
        None
    }
}
