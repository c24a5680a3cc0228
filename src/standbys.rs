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

/// Those that have not replayed up to $1, by name.
const LAGGARDS: &str = "\
    SELECT string_agg(name, ', ' ORDER BY name) FROM ( \
        SELECT coalesce(nullif(application_name, ''), 'pid ' || pid) AS name \
          FROM pg_catalog.pg_stat_replication \
         WHERE state <> 'backup' AND (replay_lsn IS NULL OR replay_lsn - '0/0'::pg_lsn < $1) \
        UNION \
        SELECT 'slot ' || slot_name FROM pg_catalog.pg_replication_slots \
         WHERE slot_type = 'physical' AND NOT active \
           AND (restart_lsn IS NULL OR restart_lsn - '0/0'::pg_lsn < $1)) AS laggards";

/// Waits for `timeout` (an interval datum) at most; 55000 names those that are behind.
pub fn wait_for_replay(timeout: pg_sys::Datum) -> Result<()> {
    // What is flushed, not what is inserted: the last record may be this transaction's own, which
    // nobody flushes while it waits. The commit of prepare_key is flushed, whatever
    // synchronous_commit says (Audit::record_all).
    let here = bigint(
        "SELECT (pg_catalog.pg_current_wal_flush_lsn() - '0/0'::pg_lsn)::bigint",
        &[],
    )?;
    let here = Arg::Bigint(here.unwrap_or(0));
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
