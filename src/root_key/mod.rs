//! Root keys of this process: where they come from, when they are read again.
//!
//! Called by the cache (unwrap on a miss), by the root-key functions and once by `_PG_init` in
//! the postmaster, so that backends inherit what was loaded. A missing or wrong keyring never
//! stops the server: it is a WARNING at start and an error on use. Memory is wiped when the keyring
//! is replaced and when the process ends.
//!
//! A file is read again after a reload of the configuration and for an unknown root id. A command
//! runs at start under preload, for an unknown root id, and for reload_root_keys(); never because
//! of a reload, and not twice within some seconds for what it did not give.

mod command;
mod file;

use std::cell::RefCell;
use std::ffi::OsString;
use std::path::PathBuf;

use pgrx::PgSqlErrorCode;
use pgrx::{PgLogLevel, ereport};
use rekey_core::cipher::{RootId, RootKey};
use rekey_core::root_keyring::RootKeyring;

use crate::error::{Error, Result};
use crate::ffi::session;
use crate::guc;

/// Where the root keys of this server come from.
pub enum Source {
    /// rekey.root_key_file
    File(PathBuf),
    /// rekey.root_key_command
    Command(OsString),
}

/// The configured source. Two of them are refused: which one has the right key nobody could tell.
pub fn source() -> Result<Source> {
    match (guc::root_key_file(), guc::root_key_command()) {
        (Some(path), None) => Ok(Source::File(path)),
        (None, Some(command)) => Ok(Source::Command(command)),
        (None, None) => Err(not_configured()),
        (Some(_), Some(_)) => Err(Error::RootKey(
            "Both rekey.root_key_file and rekey.root_key_command are set.".to_string(),
            "Set one of them to '' and reload the configuration.".to_string(),
        )),
    }
}

struct Loaded {
    ring: RootKeyring,
    configuration_time: i64,
}

thread_local! {
    static LOADED: RefCell<Option<Loaded>> = const { RefCell::new(None) };
    /// The root keys that the postmaster has loaded: what a new process begins with.
    static INHERITED: RefCell<Vec<RootId>> = const { RefCell::new(Vec::new()) };
}

/// Loads the keyring while the postmaster starts, with a WARNING when that fails.
pub fn init() {
    let unset = guc::root_key_file().is_none() && guc::root_key_command().is_none();
    if !session::in_preload() || unset {
        return;
    }
    match load() {
        Ok(_) => INHERITED.set(held()),
        Err(error) => warn(&error, ""),
    }
    // Backends make their own experience.
    command::forget_misses();
}

/// Tells the log that the root key is not there, and why; `place` is empty or ` in database "x"`.
pub fn warn(error: &Error, place: &str) {
    if let Error::RootKey(detail, hint) | Error::Provider(detail, hint) = error {
        ereport!(
            PgLogLevel::WARNING,
            PgSqlErrorCode::ERRCODE_CONFIG_FILE_ERROR,
            format!("pg_rekey: the root key is not available{place}: {detail}"),
            hint.clone()
        );
    }
}

/// Forgets and wipes the keyring. Called when the process ends.
pub fn wipe() {
    let _ = LOADED.try_with(|loaded| loaded.take());
}

/// Reads the keyring again, whatever its source, and returns how many keys it holds.
pub fn reload() -> Result<usize> {
    command::forget_misses();
    load()
}

/// Runs `use_key` with the first of `candidates` that this server holds. Looks again for the
/// keyring when none is known. A source that cannot be read hurts nothing that this process holds
/// already.
pub fn with_any<R>(
    candidates: &[RootId],
    use_key: impl FnOnce(RootId, &RootKey) -> R,
) -> Result<R> {
    let refreshed = refresh();
    if held_of(candidates).is_none() {
        refreshed?;
        ask_for(candidates)?;
    }
    let id = held_of(candidates).ok_or_else(|| not_held(candidates))?;
    LOADED.with_borrow(
        |loaded| match loaded.as_ref().and_then(|l| l.ring.get(&id)) {
            Some(key) => Ok(use_key(id, key)),
            None => Err(not_held(candidates)),
        },
    )
}

/// Whether this server holds the root key, after the look at the file that a miss is worth. A
/// command is asked only by a process that holds nothing yet: this is for views, which may be
/// looked at every second, and for root keys that are not needed.
pub fn holds(id: RootId) -> bool {
    match source() {
        Ok(Source::File(_)) => {
            (refresh().is_ok() && held_of(&[id]).is_some())
                || (load().is_ok() && held_of(&[id]).is_some())
        }
        Ok(Source::Command(_)) if LOADED.with_borrow(Option::is_none) => {
            ask_for(&[id]).is_ok() && held_of(&[id]).is_some()
        }
        Ok(Source::Command(_)) => held_of(&[id]).is_some(),
        Err(_) => false,
    }
}

/// Looks whether the keyring file is one that is accepted, where it may lie, and returns what
/// `in_file` does.
pub fn inspect() -> Result<Option<Vec<RootId>>> {
    if let Source::File(path) = source()? {
        file::refuse_inside_the_cluster(&path)?;
    }
    in_file()
}

/// The ids of the root keys that the keyring file has now, which the next start will read: this
/// process may still hold those of an earlier one. None for a command, which is not run for it.
pub fn in_file() -> Result<Option<Vec<RootId>>> {
    match source()? {
        Source::File(path) => Ok(Some(file::read(&path)?.ids().collect())),
        Source::Command(_) => Ok(None),
    }
}

/// The ids of the root keys that this process holds, in the keyring's order.
pub fn held() -> Vec<RootId> {
    LOADED.with_borrow(|loaded| {
        loaded
            .as_ref()
            .map_or(Vec::new(), |l| l.ring.ids().collect())
    })
}

/// The ids of the root keys that a new process need not ask the command for; None when they come
/// from a file, which is read at no cost.
pub fn inherited() -> Option<Vec<RootId>> {
    let is_command = matches!(source(), Ok(Source::Command(_)));
    is_command.then(|| INHERITED.with_borrow(Vec::clone))
}

fn held_of(candidates: &[RootId]) -> Option<RootId> {
    LOADED.with_borrow(|loaded| {
        let ring = &loaded.as_ref()?.ring;
        candidates.iter().copied().find(|id| ring.get(id).is_some())
    })
}

/// Reads a file again that was not read since the last reload of the configuration.
fn refresh() -> Result<()> {
    let current = LOADED.with_borrow(|loaded| {
        loaded
            .as_ref()
            .is_some_and(|l| l.configuration_time == session::configuration_time())
    });
    match source()? {
        Source::File(_) if !current => load().map(|_| ()),
        Source::File(_) | Source::Command(_) => Ok(()),
    }
}

/// Looks for root keys that are not held.
fn ask_for(candidates: &[RootId]) -> Result<()> {
    let is_command = matches!(source()?, Source::Command(_));
    if is_command && let Some(error) = command::asked_lately(candidates) {
        return Err(error);
    }
    load()?;
    if is_command && held_of(candidates).is_none() {
        command::remember_missing(candidates);
    }
    Ok(())
}

fn load() -> Result<usize> {
    let ring = match source()? {
        Source::File(path) => file::read(&path)?,
        Source::Command(text) => command::run(&text)?,
    };
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

/// The root key that a database without one adopts: `wanted`, or the only one. A keyring file that
/// is not there is made.
pub fn adopt(wanted: Option<RootId>) -> Result<RootId> {
    if let Source::File(path) = source()? {
        file::create_unless_there(&path, wanted.is_none())?;
    }
    load()?;
    let ids = held();
    match (wanted, ids.as_slice()) {
        (Some(id), _) if ids.contains(&id) => Ok(id),
        (Some(id), _) => Err(Error::RootKey(
            format!("The keyring of this server does not hold root key {id}."),
            "Give the id of a key that it holds.".to_string(),
        )),
        (None, [only]) => Ok(*only),
        (None, _) => Err(Error::Argument(
            format!("the keyring holds {} root keys", ids.len()),
            format!("They are {}.", list(&ids)),
            "Say which one this database adopts: SELECT rekey.init_root_key(root_id).".to_string(),
        )),
    }
}

/// A root key that takes the place of the active one.
pub struct Next {
    /// Its id.
    pub id: RootId,
    /// When it was made, if the keyring file held it already.
    pub there_since: Option<String>,
}

/// The root key that takes the place of `active` when the caller names none: the last one of the
/// keyring file if it stands behind `active` and is not in `known`, else, or if `fresh`, a fresh
/// one, which is added to the file. Several databases share one file: so a rotation in the second
/// adopts the key that the first has added, and one that is repeated after a crash the key that it
/// had added itself. Nobody here can tell such a key from one that has leaked with the file, or
/// that is the other server's of which this one is a clone: hence `fresh`.
pub fn next(active: RootId, known: &[RootId], fresh: bool) -> Result<Next> {
    match source()? {
        Source::File(path) => file::next(&path, active, known, fresh),
        Source::Command(_) => Err(Error::Argument(
            "rotate_root_key needs a root_id here".to_string(),
            "The root keys come from rekey.root_key_command, which only reads.".to_string(),
            "Add a root key at the provider, then SELECT rekey.rotate_root_key(root_id)."
                .to_string(),
        )),
    }
}

/// F0000 when no source of root keys is set.
pub fn not_configured() -> Error {
    Error::RootKey(
        "Neither rekey.root_key_file nor rekey.root_key_command is set.".to_string(),
        "Set rekey.root_key_file in postgresql.conf to a path outside the data directory, \
         reload, and run SELECT rekey.init_root_key()."
            .to_string(),
    )
}

fn list(ids: &[RootId]) -> String {
    ids.iter()
        .map(RootId::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}

fn not_held(candidates: &[RootId]) -> Error {
    Error::RootKey(
        format!(
            "This database needs root key {}; the keyring of this server holds {}.",
            list(candidates),
            list(&held())
        ),
        "Put the right keyring in place (from another server of the cluster, or from escrow) and \
         reload the configuration; after a change at the provider of rekey.root_key_command SELECT \
         rekey.reload_root_keys()."
            .to_string(),
    )
}
