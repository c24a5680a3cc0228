//! Root keys of this process: where they come from, when they are read again.
//!
//! Called by the cache (unwrap on a miss), by the root-key functions and once by `_PG_init` in
//! the postmaster, so that backends inherit what was loaded. A missing or wrong keyring never
//! stops the server: it is a WARNING at start and F0000 on use. Memory is wiped when the keyring
//! is replaced and when the process ends.

mod file;

use std::cell::RefCell;

use pgrx::PgSqlErrorCode;
use pgrx::{PgLogLevel, ereport};
use rekey_core::cipher::{RootId, RootKey};
use rekey_core::root_keyring::RootKeyring;

use crate::error::{Error, Result};
use crate::ffi::session;
use crate::guc;

pub use file::create_or_read;

struct Loaded {
    ring: RootKeyring,
    configuration_time: i64,
}

thread_local! {
    static LOADED: RefCell<Option<Loaded>> = const { RefCell::new(None) };
}

/// Loads the keyring while the postmaster starts, with a WARNING when that fails.
pub fn init() {
    if !session::in_preload() || guc::root_key_file().is_none() {
        return;
    }
    if let Err(Error::RootKey(detail, hint)) = load() {
        ereport!(
            PgLogLevel::WARNING,
            PgSqlErrorCode::ERRCODE_CONFIG_FILE_ERROR,
            format!("pg_rekey: the root key is not available: {detail}"),
            hint
        );
    }
}

/// Forgets and wipes the keyring. Called when the process ends.
pub fn wipe() {
    let _ = LOADED.try_with(|loaded| loaded.take());
}

/// Reads the keyring again and returns how many keys it holds.
pub fn reload() -> Result<usize> {
    load()
}

/// Runs `use_key` with the first of `candidates` that this server holds. Reads the keyring when
/// it was not read since the last reload of the configuration, and once more when none is known.
/// A keyring that cannot be read hurts nothing that this process holds already.
pub fn with_any<R>(
    candidates: &[RootId],
    use_key: impl FnOnce(RootId, &RootKey) -> R,
) -> Result<R> {
    let refreshed = refresh();
    if held_of(candidates).is_none() {
        refreshed?;
        load()?;
    }
    let id = held_of(candidates).ok_or_else(|| not_held(candidates))?;
    LOADED.with_borrow(
        |loaded| match loaded.as_ref().and_then(|l| l.ring.get(&id)) {
            Some(key) => Ok(use_key(id, key)),
            None => Err(not_held(candidates)),
        },
    )
}

/// Whether this server holds the root key, after the look at the file that a miss is worth.
pub fn holds(id: RootId) -> bool {
    (refresh().is_ok() && held_of(&[id]).is_some()) || (load().is_ok() && held_of(&[id]).is_some())
}

fn held_of(candidates: &[RootId]) -> Option<RootId> {
    LOADED.with_borrow(|loaded| {
        let ring = &loaded.as_ref()?.ring;
        candidates.iter().copied().find(|id| ring.get(id).is_some())
    })
}

fn refresh() -> Result<()> {
    let current = LOADED.with_borrow(|loaded| {
        loaded
            .as_ref()
            .is_some_and(|l| l.configuration_time == session::configuration_time())
    });
    if current { Ok(()) } else { load().map(|_| ()) }
}

fn load() -> Result<usize> {
    let path = guc::root_key_file().ok_or_else(not_configured)?;
    let ring = file::read(&path)?;
    let count = ring.len();
    for id in ring.ids() {
        if let Some(key) = ring.get(&id) {
            session::protect_memory(key.expose());
        }
    }
    let configuration_time = session::configuration_time();
    LOADED.set(Some(Loaded {
        ring,
        configuration_time,
    }));
    Ok(count)
}

/// F0000 when no source of root keys is set.
pub fn not_configured() -> Error {
    Error::RootKey(
        "rekey.root_key_file is not set.".to_string(),
        "Set rekey.root_key_file in postgresql.conf to a path outside the data directory, \
         reload, and run SELECT rekey.init_root_key()."
            .to_string(),
    )
}

fn not_held(candidates: &[RootId]) -> Error {
    let wanted = candidates
        .iter()
        .map(RootId::to_string)
        .collect::<Vec<_>>()
        .join(", ");
    let held = LOADED.with_borrow(|loaded| {
        loaded.as_ref().map_or(String::new(), |l| {
            l.ring
                .ids()
                .map(|id| id.to_string())
                .collect::<Vec<_>>()
                .join(", ")
        })
    });
    Error::RootKey(
        format!("This database needs root key {wanted}; the keyring of this server holds {held}."),
        "Put the right keyring file in place (from another server of the cluster, or from \
         escrow) and reload the configuration."
            .to_string(),
    )
}
