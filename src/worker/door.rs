//! The door to a table's rows: who may go in, and why somebody else may not.
//!
//! Called by src/worker/drain.rs, backfill.rs and afterwards.rs before each batch. Invariant: nothing
//! here waits for a lock on a table.

use crate::cache;
use crate::catalog::{self, work};
use crate::ffi::locks;
use crate::ffi::table::Table;
use crate::registry::{self, Leaf};

/// Why a table cannot be worked on now.
pub enum Unable {
    /// Somebody has paused it.
    Paused(String),
    /// Somebody else is at it: soon again.
    Busy(String),
    /// It cannot be done as the table is now: later.
    Refused(String),
    /// Anything else.
    Error(crate::error::Error),
}

impl From<crate::error::Error> for Unable {
    fn from(error: crate::error::Error) -> Unable {
        Unable::Error(error)
    }
}

/// Refuses a table that somebody has paused.
pub fn refuse_paused(leaf: &Leaf) -> std::result::Result<(), Unable> {
    match work::paused(leaf.table)? {
        Some(why) => Err(Unable::Paused(why)),
        None => Ok(()),
    }
}

/// The one door to a table's rows: one drainer, no wait for a lock, nothing in the table that must
/// not run, the barrier held.
pub fn enter(leaf: &Leaf) -> std::result::Result<Table, Unable> {
    let others = leaf
        .columns
        .iter()
        .try_for_each(|column| column.refuse_other_owner(leaf.table));
    if let Err(error) = others {
        return Err(Unable::Refused(error.explain().0));
    }
    if !locks::become_drainer(catalog::registered_column()?, leaf.table) {
        return Err(Unable::Busy("another session re-encrypts it".to_string()));
    }
    // One that is refused is let go: a scan may follow in this transaction.
    let Some(mut table) = Table::open_for_update(leaf.table) else {
        return Err(Unable::Busy("it is locked".to_string()));
    };
    if !table.is_heap() {
        return Err(Unable::Refused("it is no heap table".to_string()));
    }
    let columns: Vec<i16> = leaf.columns.iter().map(|column| column.attnum).collect();
    // The leaves were read without a lock: a column may have another type by now. Live columns,
    // which come without a name, are of any type.
    let mut registered = leaf.columns.iter().filter(|column| !column.name.is_empty());
    if !registered.all(|column| table.has_bytea(column.attnum)) {
        return Err(Unable::Refused("its columns have changed".to_string()));
    }
    let refusal = registry::refusal(table.relation(), &columns, leaf.fire_triggers);
    if let Some((why, name)) = refusal {
        return Err(Unable::Refused(format!("it {why}: {name}")));
    }
    cache::enter_barrier()?;
    table.keep_lock();
    Ok(table)
}
