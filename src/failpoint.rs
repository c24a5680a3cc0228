//! Places at which a test makes the server stop, fail or die: the boundaries between the steps of
//! rotation, re-encryption and the end of a slot.
//!
//! Debug builds only: in a release build `reach` does nothing. Armed by the file rekey.failpoint in
//! the data directory, "NAME ACTION"; whoever reaches NAME takes the file away first, so that each
//! arming acts once, also when it ends in a crash. Actions: `kill` (-9 of the own process), `error`
//! (an ERROR), `wait` (for the advisory lock GATE, to the end of the transaction).

use crate::error::Result;

/// The advisory lock of `wait`: "rekey" in ASCII.
#[cfg(debug_assertions)]
const GATE: i64 = 0x72_656b_6579;

/// Does what a test has asked for here.
#[cfg(debug_assertions)]
pub fn reach(name: &str) -> Result<()> {
    use crate::error::Error;
    use crate::ffi::{session, sql};

    // A server's process works in its data directory.
    const FILE: &str = "rekey.failpoint";
    let Ok(armed) = std::fs::read_to_string(FILE) else {
        return Ok(());
    };
    let Some((_, action)) = armed
        .trim()
        .split_once(' ')
        .filter(|(armed, _)| *armed == name)
    else {
        return Ok(());
    };
    let taken = format!("{FILE}.{}", session::process());
    if std::fs::rename(FILE, &taken).is_err() {
        return Ok(()); // another process was faster
    }
    let _ = std::fs::remove_file(taken);
    match action {
        "kill" => session::kill_this_process(),
        "wait" => sql::text(
            "SELECT pg_catalog.pg_advisory_xact_lock_shared($1)::text \
               FROM pg_catalog.set_config('lock_timeout', '0', true)",
            &[sql::Arg::Bigint(GATE)],
        )
        .map(|_| ()),
        _ => Err(Error::Internal(format!("failpoint {name}"))),
    }
}

/// Nothing.
#[cfg(not(debug_assertions))]
#[allow(
    clippy::unnecessary_wraps,
    reason = "one signature for both kinds of build"
)]
#[inline]
pub fn reach(_name: &str) -> Result<()> {
    Ok(())
}
