//! Waiting until every standby has replayed what this server has committed.
//!
//! Called by promote_key(wait_for_standbys => true): a slot that is sealed under before a standby
//! knows it would be a read error there. A standby that is disconnected counts as long as a
//! physical replication slot stands for it. Cancel and timeouts of the session end the wait.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use pgrx::pg_sys;

use crate::error::{Error, Result};
use crate::ffi::session;
use crate::ffi::sql::{Arg, bigint, rows, run};

/// How often the standbys are looked at.
const POLL_MS: i64 = 100;

/// Each standby: its name, what tells it from others, and whether it has not replayed up to $1; and
/// each replication slot that stands for one which is away and has not. Consumers of logical
/// decoding are no standbys. An owner of the extension who may not see the columns of the view sees
/// NULLs: nobody has replayed.
const STANDBYS: &str = "\
    SELECT CASE WHEN state IS NULL \
                THEN 'pid ' || pid || ' (not shown to ' || current_user \
                     || ', who owns the extension and lacks pg_monitor)' \
                ELSE coalesce(nullif(application_name, ''), 'pid ' || pid) END, \
           coalesce(application_name, pid::text) || ' ' || coalesce(client_addr::text, ''), \
           (replay_lsn IS NULL OR replay_lsn - '0/0'::pg_lsn < $1)::text \
      FROM pg_catalog.pg_stat_replication AS r \
     WHERE state IS DISTINCT FROM 'backup' \
       AND NOT EXISTS (SELECT FROM pg_catalog.pg_replication_slots s \
            WHERE s.active_pid = r.pid AND s.slot_type = 'logical') \
    UNION \
    SELECT 'slot ' || slot_name, NULL, 'true' FROM pg_catalog.pg_replication_slots \
     WHERE slot_type = 'physical' AND NOT active \
       AND (restart_lsn IS NULL OR restart_lsn - '0/0'::pg_lsn < $1)";

/// Those that have not replayed up to a position, by name. One that was seen behind counts until it
/// is seen again: it may serve reads while it is not connected.
#[derive(Default)]
struct Laggards {
    awaited: BTreeMap<String, String>,
}

impl Laggards {
    fn look(&mut self, up_to: &Arg<'_>) -> Result<BTreeSet<String>> {
        let mut names = BTreeSet::new();
        let mut away = std::mem::take(&mut self.awaited);
        for row in rows(STANDBYS, std::slice::from_ref(up_to))? {
            let mut cells = row.into_iter();
            let mut next = || cells.next().flatten();
            let (name, who, behind) = (next().unwrap_or_default(), next(), next());
            let behind = behind.as_deref() == Some("true");
            if let Some(who) = who {
                away.remove(&who);
                if behind {
                    self.awaited.insert(who, name.clone());
                }
            }
            if behind {
                names.insert(name);
            }
        }
        names.extend(away.values().map(|name| format!("{name} (disconnected)")));
        self.awaited.append(&mut away);
        Ok(names)
    }
}

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
    let mut laggards = Laggards::default();
    loop {
        // The view is a snapshot for the transaction otherwise: a standby that connects meanwhile
        // would not be seen.
        run("SELECT pg_catalog.pg_stat_clear_snapshot()", &[])?;
        let names = laggards.look(&here)?;
        if names.is_empty() {
            return Ok(());
        }
        if begin.elapsed() >= limit {
            let names = names.into_iter().collect::<Vec<_>>().join(", ");
            return Err(Error::State(
                "not every standby has replayed the pending slot".to_string(),
                format!("Behind are: {names}."),
                "Look at pg_stat_replication and pg_replication_slots, wait or raise \
                 wait_timeout, drop the slots of standbys that are gone; a client that only receives \
                 WAL never replays it: then promote without the wait."
                    .to_string(),
            ));
        }
        session::sleep_ms(POLL_MS);
    }
}
