//! What stands between the catalog and those who would change or drop it.
//!
//! Called by the triggers on the catalog tables (src/api/triggers.rs) and by the object access
//! hook, which PostgreSQL runs before it drops any relation and after it altered any extension,
//! whatever command asked for it.

use pgrx::pg_sys;

use super::read;
use crate::error::{Error, Result};
use crate::ffi::{hooks, scan};
use crate::guc;

/// Before a relation is dropped: refuses when it holds keys that can still open something.
/// A superuser who means it sets rekey.allow_drop. Anyone may name a table of his own
/// rekey.key_slot in a database without the extension: only members of the extension count.
pub fn before_drop(relation: pg_sys::Oid) {
    if !scan::belongs_to_us(relation) || !read::holds_keys(relation) || guc::allow_drop() {
        return;
    }
    match read::living_slots() {
        Ok((0, _)) => {}
        Ok((slots, keys)) => Error::InUse(slots, keys).raise(),
        Err(error) => error.raise(),
    }
}

/// After ALTER EXTENSION: every session looks at the catalog's version again (super::tables). An
/// update script need not touch a table that sessions watch.
pub fn after_alter_extension(extension: pg_sys::Oid) {
    if scan::is_our_extension(extension)
        && let Some(key) = scan::relation(c"key")
    {
        hooks::announce(key);
    }
}

/// Before rows of a catalog table change: only the extension's own code may.
pub fn before_change(table: &str) -> Result<()> {
    if crate::ffi::sql::is_own_code() {
        return Ok(());
    }
    Err(Error::DirectChange(table.to_string()))
}
