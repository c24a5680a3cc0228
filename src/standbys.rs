//! Waiting until every standby has replayed what this server has committed.
//!
//! Called by promote_key(wait_for_standbys => true): a slot that is sealed under before a standby
//! knows it would be a read error there. A standby that is disconnected counts as long as a
//! physical replication slot stands for it. Cancel and timeouts of the session end the wait.

use std::time::{Duration, Instant};

use pgrx::pg_sys;

use crate::error::{Error, Result};
use crate::ffi::session;
use crate::ffi::sql::{Arg, bigint, run, text};

/// How often the standbys are looked at.
const POLL_MS: i64 = 100;

/// Those that have not replayed up to $1, by name. Consumers of logical decoding are no standbys. An
/// owner of the extension who may not see the columns of the view sees NULLs: nobody has replayed.
const LAGGARDS: &str = "\
    SELECT string_agg(name, ', ' ORDER BY name) FROM ( \
        SELECT CASE WHEN state IS NULL \
                    THEN 'pid ' || pid || ' (not shown to ' || current_user \
                         || ', who owns the extension and lacks pg_monitor)' \
                    ELSE coalesce(nullif(application_name, ''), 'pid ' || pid) END AS name \
          FROM pg_catalog.pg_stat_replication AS r \
         WHERE state IS DISTINCT FROM 'backup' \
           AND (replay_lsn IS NULL OR replay_lsn - '0/0'::pg_lsn < $1) \
           AND NOT EXISTS (SELECT FROM pg_catalog.pg_replication_slots s \
                WHERE s.active_pid = r.pid AND s.slot_type = 'logical') \
        UNION \
        SELECT 'slot ' || slot_name FROM pg_catalog.pg_replication_slots \
         WHERE slot_type = 'physical' AND NOT active \
           AND (restart_lsn IS NULL OR restart_lsn - '0/0'::pg_lsn < $1)) AS laggards";

/// Waits for `timeout` (an interval datum) at most; 55000 names those that are behind.
pub fn wait_for_replay(timeout: pg_sys::Datum) -> Result<()> {
    // This transaction has written: it has locked the key, after the commit of prepare_key.
    let here = Arg::Bigint(session::flush_wal().cast_signed());
    let limit_ms = bigint(
        "SELECT (extract(epoch FROM $1) * 1000)::bigint",
        &[Arg::Interval(Some(timeout))],
    )?;
    let limit = Duration::from_millis(limit_ms.unwrap_or(0).unsigned_abs());
    let begin = Instant::now();
    loop {
        // The view is a snapshot for the transaction otherwise: a standby that connects meanwhile
        // would not be seen.
        run("SELECT pg_catalog.pg_stat_clear_snapshot()", &[])?;
        let Some(laggards) = text(LAGGARDS, std::slice::from_ref(&here))? else {
            return Ok(());
        };
        if begin.elapsed() >= limit {
            return Err(Error::State(
                "not every standby has replayed the pending slot".to_string(),
                format!("Behind are: {laggards}."),
                "Look at pg_stat_replication and pg_replication_slots, wait or raise \
                 wait_timeout, drop the slots of standbys that are gone; a client that only receives \
                 WAL never replays it: then promote without the wait."
                    .to_string(),
            ));
        }
        session::sleep_ms(POLL_MS);
    }
}
