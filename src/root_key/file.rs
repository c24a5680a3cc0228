//! The keyring file: who may read it, how it is read, how the first one is made.
//!
//! Accepted as PostgreSQL accepts `ssl_key_file`: links are followed (Kubernetes secrets are
//! links) and the opened descriptor is checked, so that nothing can be swapped in between. The
//! extension never deletes or rewrites key material that is in a keyring.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rekey_core::cipher::{RootId, RootKey};
use rekey_core::root_keyring::RootKeyring;
use zeroize::Zeroizing;

use crate::error::{Error, Result};
use crate::ffi::session;

/// A keyring larger than this is not one.
const MAX_BYTES: u64 = 1 << 20;

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

/// Reads the keyring, or makes one with a fresh key where there is no file. Returns the id of
/// the key to adopt: `wanted`, or the only one.
pub fn create_or_read(path: &Path, wanted: Option<RootId>) -> Result<RootId> {
    refuse_inside_the_cluster(path)?;
    if !path.exists() && wanted.is_none() {
        create(path)?;
    }
    let ring = read(path)?;
    let ids: Vec<RootId> = ring.ids().collect();
    match (wanted, ids.as_slice()) {
        (Some(id), _) if ids.contains(&id) => Ok(id),
        (Some(id), _) => Err(Error::RootKey(
            format!(
                "The keyring file \"{}\" does not hold root key {id}.",
                path.display()
            ),
            "Give the id of a key that it holds.".to_string(),
        )),
        (None, [only]) => Ok(*only),
        (None, _) => Err(Error::Argument(
            format!("the keyring holds {} root keys", ids.len()),
            format!(
                "They are {}.",
                ids.iter()
                    .map(RootId::to_string)
                    .collect::<Vec<_>>()
                    .join(", ")
            ),
            "Say which one this database adopts: SELECT rekey.init_root_key(root_id).".to_string(),
        )),
    }
}

/// A base backup must not carry the root key beside the data that it protects.
fn refuse_inside_the_cluster(path: &Path) -> Result<()> {
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
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let draft = folder.join(format!(".{name}.{}.new", std::process::id()));
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_CLOEXEC)
            .open(&draft)?;
        file.write_all(json.as_bytes())?;
        file.sync_all()?;
        // A link fails where a rename would replace: two sessions cannot both make the first.
        std::fs::hard_link(&draft, path)?;
        File::open(folder)?.sync_all()
    })();
    let _ = std::fs::remove_file(&draft);
    match written {
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && path.exists() => Ok(()),
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
