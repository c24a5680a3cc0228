//! What the server's state says to the worker's pace: lag, archiving, slots, dead rows, disk.
//!
//! Called by the worker between batches, at most once a second, and before each batch about its table.
//! Judged by the pure rekey_core::schedule.

use std::time::{Duration, Instant};

use pgrx::pg_sys::Oid;
use rekey_core::schedule::{self, Brake, Facts, Limits};

use crate::error::Result;
use crate::ffi::session;
use crate::ffi::sql::{Arg, bigint};
use crate::guc;

/// The last reading.
#[derive(Default)]
pub struct Gauge {
    read_at: Option<Instant>,
    last: Facts,
}

impl Gauge {
    /// Fills in what the server's state is, not older than a second.
    pub fn read(&mut self, facts: &mut Facts) -> Result<()> {
        let fresh = Duration::from_secs(1);
        if self.read_at.is_none_or(|at| at.elapsed() >= fresh) {
            self.last = read()?;
            self.read_at = Some(Instant::now());
        }
        *facts = Facts {
            took: facts.took,
            rested: facts.rested,
            wal_bytes: facts.wal_bytes,
            ..self.last
        };
        Ok(())
    }
}

/// The settings.
pub fn limits() -> Limits {
    Limits {
        work_ratio: guc::work_ratio(),
        wal_rate: guc::max_wal_rate_kb().map(|kb| kb * 1024),
        lag_ms: guc::max_replication_lag_ms(),
        dead_ratio: guc::max_dead_ratio(),
        free_disk_mb: guc::min_free_disk_mb(),
    }
}

/// Why a table is to be left alone before its next batch: it waits for vacuum, perhaps for as long as
/// an old snapshot lasts. That holds up no other table.
pub fn obstacle(table: Oid) -> Result<Option<&'static str>> {
    let facts = Facts {
        dead_ratio: dead_ratio(table)?,
        ..Facts::default()
    };
    let brake = schedule::rest(&facts, &limits()).map(|(_, brake)| brake);
    Ok(brake.map(Brake::words))
}

/// The share of dead rows of a table. Few of them are nothing to wait for, nor is a vacuum that does
/// not come. A crash empties the statistics, but not what the last vacuum has put into pg_class.
fn dead_ratio(table: Oid) -> Result<f64> {
    let dead = bigint(
        "SELECT (1000000 * d.dead::numeric / greatest(1, \
                    greatest(d.live::numeric, c.reltuples::numeric) + d.dead))::bigint \
           FROM (SELECT pg_catalog.pg_stat_get_dead_tuples($1) AS dead, \
                        pg_catalog.pg_stat_get_live_tuples($1) AS live) AS d, \
                pg_catalog.pg_class c \
          WHERE c.oid = $1 AND d.dead > 100000 \
            AND pg_catalog.current_setting('autovacuum') = 'on' \
            AND NOT coalesce(c.reloptions::text LIKE '%autovacuum_enabled=false%', false)",
        &[Arg::Oid(table)],
    )?;
    let parts = u32::try_from(dead.unwrap_or(0).clamp(0, 1_000_000)).unwrap_or(0);
    Ok(f64::from(parts) / 1e6)
}

fn read() -> Result<Facts> {
    let standbys = guc::lag_standbys().map(|names| {
        let quoted = names.iter().map(|n| format!("\"{}\"", n.replace('"', "")));
        format!("{{{}}}", quoted.collect::<Vec<_>>().join(","))
    });
    let lag_ms = bigint(
        "SELECT coalesce(max(extract(epoch FROM coalesce(replay_lag, '0'::interval)) * 1000), \
             0)::bigint \
           FROM pg_catalog.pg_stat_replication \
          WHERE $1::text IS NULL OR application_name = ANY ($1::text[])",
        &[Arg::OptionalText(standbys.as_deref())],
    )?;
    // The failures of an archive that was given up since are history.
    let archiver = bigint(
        "SELECT count(*) FROM pg_catalog.pg_stat_archiver \
          WHERE last_failed_time > coalesce(last_archived_time, '-infinity') \
            AND pg_catalog.current_setting('archive_mode') <> 'off'",
        &[],
    )?;
    let losing = bigint(
        "SELECT count(*) FROM pg_catalog.pg_replication_slots WHERE wal_status = 'unreserved'",
        &[],
    )?;
    Ok(Facts {
        lag_ms: u64::try_from(lag_ms.unwrap_or(0)).unwrap_or(0),
        free_disk_mb: session::free_disk_mb(),
        archiver_fails: archiver.unwrap_or(0) > 0,
        slot_loses_wal: losing.unwrap_or(0) > 0,
        ..Facts::default()
    })
}
