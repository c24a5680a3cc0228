//! The keyring file: who may read it, how it is read, how the first one is made and a key added.
//!
//! Accepted as PostgreSQL accepts `ssl_key_file`: links are followed (Kubernetes secrets are
//! links) and the opened descriptor is checked, so that nothing can be swapped in between. The
//! extension adds keys to a keyring and never takes one out.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rekey_core::cipher::{RootId, RootKey};
use rekey_core::root_keyring::RootKeyring;
use zeroize::Zeroizing;

use super::Next;
use crate::error::{Error, Result};
use crate::ffi::session;

/// A keyring larger than this is not one.
const MAX_BYTES: u64 = 1 << 20;
/// How often a lock that another session holds on the file is tried. It is held for two fsyncs.
const LOCK_POLL_MS: i64 = 20;

/// Reads and checks the keyring.
pub fn read(path: &Path) -> Result<RootKeyring> {
    let shown = path.display();
    let refuse = |detail: String, hint: &str| Error::RootKey(detail, hint.to_string());
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open(path)
        .map_err(|e| {
            refuse(
                format!("The keyring file \"{shown}\" could not be opened: {e}."),
                "On a standby or a restored server copy it from the primary or from escrow; on a \
                 new one SELECT rekey.init_root_key() creates it.",
            )
        })?;
    let about = file.metadata().map_err(|e| {
        refuse(
            format!("The keyring file \"{shown}\" cannot be read: {e}."),
            "",
        )
    })?;
    if !about.is_file() {
        return Err(refuse(
            format!("\"{shown}\" is not a regular file."),
            "Set rekey.root_key_file to the keyring file itself.",
        ));
    }
    let server_user = session::server_user();
    let mode = about.mode() & 0o777;
    let acceptable = (about.uid() == server_user && mode & 0o077 == 0)
        || (about.uid() == 0 && mode & 0o137 == 0);
    if !acceptable {
        return Err(refuse(
            format!(
                "The keyring file \"{shown}\" has mode {mode:04o} and belongs to user {}.",
                about.uid()
            ),
            "It must be 0600 or less and belong to the server's user, or 0640 or less and belong \
             to root. Consider the keys in it as read by whoever could.",
        ));
    }
    if about.len() > MAX_BYTES {
        return Err(refuse(
            format!("The keyring file \"{shown}\" has {} bytes.", about.len()),
            "A keyring is a small JSON file. Was another file named by mistake?",
        ));
    }
    let capacity = usize::try_from(about.len()).unwrap_or(0) + 1;
    let mut bytes = Zeroizing::new(Vec::with_capacity(capacity));
    file.take(MAX_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| {
            refuse(
                format!("The keyring file \"{shown}\" cannot be read: {e}."),
                "",
            )
        })?;
    RootKeyring::parse(&bytes).map_err(|cause| {
        refuse(
            format!(
                "The keyring file \"{shown}\" is not valid: {}",
                cause.detail()
            ),
            "Restore the file from another server of the cluster or from escrow.",
        )
    })
}

/// Makes a keyring with a fresh key where there is no file and one may be made. Refuses a place
/// that belongs to the cluster.
pub fn create_unless_there(path: &Path, may_create: bool) -> Result<()> {
    refuse_inside_the_cluster(path)?;
    if may_create && !path.exists() {
        create(path)?;
    }
    Ok(())
}

/// The root key that takes the place of `active`, a fresh one if `fresh`: see [`super::next`].
///
/// The file is exchanged whole, under a lock on it that every rotation of every database takes. It
/// is durable before this returns, that is before anything is wrapped under the new key.
pub fn next(path: &Path, active: RootId, known: &[RootId], fresh: bool) -> Result<Next> {
    refuse_inside_the_cluster(path)?;
    // A rename in the place of a link would leave the file that it leads to as it was.
    let path = &path.canonicalize().map_err(|e| read_only(path, &e))?;
    let locked = lock(path)?;
    let mut ring = read(path)?;
    let ids: Vec<RootId> = ring.ids().collect();
    let behind = ids.iter().rev().take_while(|id| **id != active).count();
    if behind == ids.len() {
        return Err(Error::RootKey(
            format!(
                "The keyring file \"{}\" does not hold the active root key {active}.",
                path.display()
            ),
            "Put the right keyring file in place and reload the configuration.".to_string(),
        ));
    }
    let takes_up = |id: &&RootId| !fresh && behind > 0 && !known.contains(id);
    if let Some(last) = ids.last().filter(takes_up) {
        return Ok(Next {
            id: *last,
            there_since: ring.created_at(last).map(str::to_owned),
        });
    }
    let made = RootKey::generate()?;
    let id = made.id();
    ring.push(made, now_rfc3339())
        .map_err(|cause| Error::Internal(cause.detail()))?;
    let json = ring.to_json();
    if u64::try_from(json.len()).unwrap_or(u64::MAX) > MAX_BYTES {
        return Err(Error::RootKey(
            format!(
                "The keyring file \"{}\" would have {} bytes; at most {MAX_BYTES} are read.",
                path.display(),
                json.len()
            ),
            "Take keys out of it that no database and no backup needs.".to_string(),
        ));
    }
    replace(path, &locked, json.as_bytes()).map_err(|e| read_only(path, &e))?;
    Ok(Next {
        id,
        there_since: None,
    })
}

/// Opens the file for writing, which tells whether it may change at all, and locks it. The lock
/// counts only if the file is still the one at `path`: another rotation may have exchanged it.
fn lock(path: &Path) -> Result<File> {
    loop {
        let file = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open(path)
            .map_err(|e| read_only(path, &e))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                session::sleep_ms(LOCK_POLL_MS);
                continue;
            }
            Err(TryLockError::Error(e)) => return Err(read_only(path, &e)),
        }
        let (there, ours) = (std::fs::metadata(path), file.metadata());
        if let (Ok(there), Ok(ours)) = (there, ours)
            && (there.dev(), there.ino()) == (ours.dev(), ours.ino())
        {
            return Ok(file);
        }
    }
}

/// Puts a keyring in the place of the one that is locked, with its owner and mode.
fn replace(path: &Path, locked: &File, json: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let about = locked.metadata()?;
    remove_drafts(path);
    let draft = draft_of(path);
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_CLOEXEC)
            .open(&draft)?;
        std::os::unix::fs::fchown(&file, Some(about.uid()), Some(about.gid()))?;
        file.set_permissions(std::fs::Permissions::from_mode(about.mode() & 0o777))?;
        file.write_all(json)?;
        file.sync_all()?;
        failpoint("keyring.drafted")?;
        std::fs::rename(&draft, path)?;
        failpoint("keyring.renamed")?;
        File::open(folder)?.sync_all()
    })();
    if written.is_err() {
        let _ = std::fs::remove_file(&draft);
    }
    written
}

fn failpoint(name: &str) -> std::io::Result<()> {
    crate::failpoint::reach(name).map_err(|_| std::io::Error::other("failpoint"))
}

/// Removes what sessions that were killed have left behind: it holds keys. To be called under the
/// lock, when no draft that a rotation will need can be in the making; one of a first keyring is
/// not needed any more.
fn remove_drafts(path: &Path) {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let begin = format!(".{name}.");
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let file_name = entry.file_name();
        let number = file_name
            .to_str()
            .and_then(|file| file.strip_prefix(&begin)?.strip_suffix(".new"));
        if number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit())) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

fn draft_of(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}.new", std::process::id()))
}

fn read_only(path: &Path, cause: &std::io::Error) -> Error {
    Error::RootKey(
        format!(
            "The keyring file \"{}\" cannot be changed by the server: {cause}.",
            path.display()
        ),
        "Add a root key to it by other means, then SELECT rekey.rotate_root_key(root_id); or make \
         the file and its folder writable by the server's user."
            .to_string(),
    )
}

/// A base backup must not carry the root key beside the data that it protects.
pub fn refuse_inside_the_cluster(path: &Path) -> Result<()> {
    let bad = |detail: String| {
        Error::RootKey(
            detail,
            "Set rekey.root_key_file to an absolute path outside the data directory and every \
             tablespace: base backups would carry the key with the data."
                .to_string(),
        )
    };
    if !path.is_absolute() {
        return Err(bad(format!(
            "\"{}\" is not an absolute path.",
            path.display()
        )));
    }
    let folder = path.parent().unwrap_or(Path::new("/"));
    let folder = folder.canonicalize().map_err(|e| {
        Error::RootKey(
            format!("The folder \"{}\" is not there: {e}.", folder.display()),
            "Create it, owned by the server's user with mode 0700.".to_string(),
        )
    })?;
    let target = path
        .canonicalize()
        .unwrap_or_else(|_| folder.join(path.file_name().unwrap_or_default()));
    let data = session::data_directory();
    let mut forbidden: Vec<PathBuf> = vec![data.clone(), data.join("pg_wal")];
    if let Ok(links) = std::fs::read_dir(data.join("pg_tblspc")) {
        forbidden.extend(links.flatten().map(|link| link.path()));
    }
    for place in forbidden.iter().filter_map(|p| p.canonicalize().ok()) {
        if folder.starts_with(&place) || target.starts_with(&place) {
            return Err(bad(format!(
                "\"{}\" lies within \"{}\", which belongs to the cluster.",
                path.display(),
                place.display()
            )));
        }
    }
    Ok(())
}

/// Makes the first keyring: durable before anything is wrapped under its key, and never in the
/// place of another.
fn create(path: &Path) -> Result<()> {
    let mut ring = RootKeyring::new();
    ring.push(RootKey::generate()?, now_rfc3339())
        .map_err(|cause| Error::Internal(cause.detail()))?;
    let json = ring.to_json();
    let folder = path.parent().unwrap_or(Path::new("/"));
    let draft = draft_of(path);
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_CLOEXEC)
            .open(&draft)?;
        file.write_all(json.as_bytes())?;
        file.sync_all()?;
        failpoint("first.drafted")?;
        // A link fails where a rename would replace: two sessions cannot both make the first.
        std::fs::hard_link(&draft, path)?;
        failpoint("first.linked")?;
        File::open(folder)?.sync_all()
    })();
    let _ = std::fs::remove_file(&draft);
    if written.is_ok()
        && let Ok(_locked) = lock(path)
    {
        remove_drafts(path);
    }
    // There already: another session was faster, and may have taken our draft for a dead one's.
    let lost = [ErrorKind::AlreadyExists, ErrorKind::NotFound];
    match written {
        Err(e) if lost.contains(&e.kind()) && path.exists() => Ok(()),
        Err(e) => Err(Error::RootKey(
            format!(
                "The keyring file \"{}\" could not be written: {e}.",
                path.display()
            ),
            "The folder must be writable by the server's user.".to_string(),
        )),
        Ok(()) => Ok(()),
    }
}

fn now_rfc3339() -> String {
    let seconds = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Civil date of a day count: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms".
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}
