//! The catalog: the only place that knows our tables.
//!
//! `read` scans them under the catalog snapshot (any backend, no privilege asked, no
//! transaction id); `write` changes them as the extension's owner, with an audit row for each
//! transition; `roots` does so with root keys; `guard` holds the triggers' decisions; `check` looks
//! for mistakes. Called by the cache, the life cycle and the functions of src/api/. Table OIDs are
//! looked up once and again after any change; so is the catalog's version, which must be one that
//! this library knows.

pub mod check;
pub mod evidence;
pub mod guard;
pub mod live;
pub mod read;
pub mod roots;
pub mod touch;
pub mod views;
pub mod work;
pub mod write;

use std::cell::Cell;
use std::ffi::CStr;

use pgrx::pg_sys::Oid;

use crate::error::{Error, Result};
use crate::ffi::{hooks, scan, session};

/// OIDs of the tables and indexes that we scan.
#[derive(Clone, Copy)]
pub struct Tables {
    key: Oid,
    key_pkey: Oid,
    key_slot: Oid,
    key_slot_pkey: Oid,
    key_slot_version: Oid,
    key_slot_active: Oid,
    slot_wrap: Oid,
    slot_wrap_pkey: Oid,
    root_key: Oid,
    key_grant: Oid,
    key_grant_pkey: Oid,
    barrier: Oid,
    registered_column: Oid,
    live_column: Oid,
}

thread_local! {
    static TABLES: Cell<Option<Tables>> = const { Cell::new(None) };
}

/// The tables of this database's catalog.
pub fn tables() -> Result<Tables> {
    if hooks::watching()
        && let Some(tables) = TABLES.get()
    {
        return Ok(tables);
    }
    // What was known must not outlive a look-up that fails.
    TABLES.set(None);
    hooks::resolve();
    // The script that makes or updates the catalog is at home in it. The version comes first: an
    // older catalog may lack a table.
    let settled = !session::in_extension_script();
    if settled {
        check_version()?;
    }
    let find = |name: &CStr| scan::relation(name).ok_or(Error::NoCatalog);
    let tables = Tables {
        key: find(c"key")?,
        key_pkey: find(c"key_pkey")?,
        key_slot: find(c"key_slot")?,
        key_slot_pkey: find(c"key_slot_pkey")?,
        key_slot_version: find(c"key_slot_version")?,
        key_slot_active: find(c"key_slot_active")?,
        slot_wrap: find(c"slot_wrap")?,
        slot_wrap_pkey: find(c"slot_wrap_pkey")?,
        root_key: find(c"root_key")?,
        key_grant: find(c"key_grant")?,
        key_grant_pkey: find(c"key_grant_pkey")?,
        barrier: find(c"barrier")?,
        registered_column: find(c"registered_column")?,
        live_column: find(c"live_column")?,
    };
    if settled {
        TABLES.set(Some(tables));
    }
    hooks::watch([
        tables.key,
        tables.key_slot,
        tables.slot_wrap,
        tables.key_grant,
    ]);
    Ok(tables)
}

/// The table of registered columns, whose OID also names the drainers' locks.
pub fn registered_column() -> Result<Oid> {
    Ok(tables()?.registered_column)
}

/// Refuses a catalog that another library was made for. Those of one major.minor understand each
/// other: within it scripts only add what an older library does not miss (CONTRIBUTING.md).
fn check_version() -> Result<()> {
    let library = env!("CARGO_PKG_VERSION");
    let catalog = scan::extension_version()?.ok_or(Error::NoCatalog)?;
    let order = major_minor(&catalog).cmp(&major_minor(library));
    if order.is_eq() {
        return Ok(());
    }
    Err(Error::Version {
        library,
        catalog,
        catalog_is_newer: order.is_gt(),
    })
}

/// (1, 20) of 1.20.3. What is not a number counts as 0.
fn major_minor(version: &str) -> (u32, u32) {
    let mut parts = version.split('.').map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}

/// The empty table on which sealing transactions hold their lock.
pub fn barrier() -> Result<Oid> {
    Ok(tables()?.barrier)
}
