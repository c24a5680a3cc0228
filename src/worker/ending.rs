//! Whether a drained slot may go: grace, quarantine, horizon, the second scan, unregistered places.
//!
//! Called by src/worker/drain.rs for after_drain, and by disable_slot and destroy_slot. Invariant
//! I8: nothing that is older than the proof's horizon is left when the second scan begins, and the
//! second scan finds every row version out of which a value could still be copied.
//!
//! Why no value is left when it finds none. Its snapshot S keeps in place what is deleted by M, its
//! xmin, or later, for as long as it is registered; and the scan looks at every row version that is
//! not dead to everyone. A version from before the scan that it does not find was deleted before M,
//! so that only snapshots with an xmin before M see it: those of the transactions in `Older`. One
//! that ends before the scan leaves copies that are younger than M, and these are found. One that
//! ends or writes during the scan is an obstacle. One that is still there and has not written held
//! its snapshot all the time: the version was not dead to it, and was found after all. Every other
//! transaction copies out of what S keeps. And copies that one has made under a snapshot that it
//! has given up since were made before the writers were captured, which have ended before the scan.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use rekey_core::envelope::SlotId;
use rekey_core::schedule::Limits;

use super::elsewhere;
use super::proof::{self, Verdict, Versions};
use crate::catalog::read::SlotRow;
use crate::catalog::{self, work};
use crate::error::Result;
use crate::ffi::locks::{self, Holder};
use crate::ffi::table::{self, Snapshot, Table};
use crate::ffi::{session, sql};
use crate::registry::Leaf;
use crate::stale::{self, Standing};
use crate::{failpoint, guc};

/// A drained slot that is to be disabled, or destroyed.
pub struct Candidate {
    /// The slot.
    pub slot: SlotRow,
    /// Whether it is to be destroyed.
    pub destroy: bool,
}

/// Why a slot may not go.
pub struct Obstacle {
    /// In words.
    pub why: String,
    /// Whether it took a scan to find out.
    pub scanned: bool,
    /// Whether registered columns hold values of it again.
    pub found: bool,
}

impl Obstacle {
    fn new(why: String, scanned: bool) -> Obstacle {
        Obstacle {
            why,
            scanned,
            found: false,
        }
    }
}

/// Whether each of these may go now; None for yes, else why not. Makes the second scan, one for
/// all: transactions older than the first one may have copied what they saw. Others are waited for
/// up to `patience`, twice or three times.
pub fn may_go(
    candidates: &[Candidate],
    leaves: &[Leaf],
    limits: Option<Limits>,
    patience: Duration,
) -> Result<Vec<Option<Obstacle>>> {
    let mut answers = Vec::new();
    for candidate in candidates {
        let why = before_the_scan(candidate.slot.id, leaves)?;
        answers.push(why.map(|why| Obstacle::new(why, false)));
    }
    let free = |answers: &[Option<Obstacle>]| -> Vec<SlotRow> {
        let pairs = candidates.iter().zip(answers);
        let free = pairs.filter(|(_, answer)| answer.is_none());
        free.map(|(candidate, _)| candidate.slot.clone()).collect()
    };
    let refuse = |answers: &mut [Option<Obstacle>], why: String, scanned: bool| {
        for answer in answers.iter_mut() {
            let why = why.clone();
            answer.get_or_insert_with(|| Obstacle::new(why, scanned));
        }
    };
    if free(&answers).is_empty() {
        return Ok(answers);
    }
    if let Some(who) = writers_ended(patience)? {
        let why = format!("older transactions have written and not ended: {who}");
        refuse(&mut answers, why, false);
        return Ok(answers);
    }
    // Under the same snapshot: else a value that moves in between would be seen at neither place.
    let destroys = candidates.iter().any(|candidate| candidate.destroy);
    let unregistered = match destroys {
        true => elsewhere::sources(leaves)?,
        false => Vec::new(),
    };
    let begun = match proof::begin(leaves)? {
        Ok(begun) => begun,
        Err(verdict) => {
            let (why, scanned) = unproved(verdict);
            refuse(&mut answers, why, scanned);
            return Ok(answers);
        }
    };
    Older::wait_for(begun.snapshot(), patience);
    // Again: those who are left may have written since, and S does not see it.
    if let Some(who) = writers_ended(patience)? {
        let why = format!("older transactions have written and not ended: {who}");
        refuse(&mut answers, why, false);
        return Ok(answers);
    }
    // Not before: one that has ended meanwhile may have handed its snapshot on.
    let older = Older::now(begun.snapshot())?;
    let (verdict, unseen) = begun.scan(&free(&answers), limits, Versions::All)?;
    match verdict {
        Verdict::Clean(_) => {}
        Verdict::Stale(found, named) => {
            let mut places = Vec::new();
            for (oid, found) in found {
                places.push(format!("{} ({} rows)", table::name(oid)?, found.len()));
            }
            // One that names no slot of ours may have been altered: it may be of any.
            let slots = stale::slots()?;
            let strange = |slot: &SlotId| slots.standing(*slot) == Standing::Unknown;
            if named.iter().any(strange) {
                let places = places.join(", ");
                let why = format!("values name a slot that there is not, in {places}");
                refuse(&mut answers, why, true);
            }
            let why = format!("values are sealed under it again in {}", places.join(", "));
            for (candidate, answer) in candidates.iter().zip(&mut answers) {
                if named.contains(&candidate.slot.id) {
                    let why = why.clone();
                    answer.get_or_insert_with(|| Obstacle {
                        found: true,
                        ..Obstacle::new(why, true)
                    });
                }
            }
        }
        verdict => {
            let (why, scanned) = unproved(verdict);
            refuse(&mut answers, why, scanned);
        }
    }
    for (candidate, answer) in candidates.iter().zip(&mut answers) {
        if unseen.contains(&candidate.slot.id) {
            let what = "older transactions may see values of it in deleted rows, or write some";
            let who = match older.names.as_str() {
                "" => String::new(),
                names => format!(": {names}"),
            };
            answer.get_or_insert_with(|| Obstacle::new(format!("{what}{who}"), true));
        }
    }
    if let Some(who) = older.have_moved()? {
        let why = format!("older transactions have ended or written during the scan: {who}");
        refuse(&mut answers, why, true);
    }
    failpoint::reach("end.scanned")?;
    let open = |(candidate, answer): (&Candidate, &Option<Obstacle>)| {
        candidate.destroy && answer.is_none()
    };
    if candidates.iter().zip(&answers).any(open) {
        // Registered is what was scanned: a column that has come since is looked into here.
        let max_age = guc::max_snapshot_age();
        let elsewhere =
            elsewhere::read(&unregistered, begun.snapshot(), begun.at(), limits, max_age)?;
        for (candidate, answer) in candidates.iter().zip(&mut answers) {
            if candidate.destroy && answer.is_none() {
                let places = elsewhere::of_slot(&elsewhere, candidate.slot.id);
                let words = |places| format!("unregistered columns hold values of it: {places}");
                *answer = places.map(|places| Obstacle::new(words(places), true));
            }
        }
    }
    Ok(answers)
}

/// Why there is no verdict, and whether it took a scan.
fn unproved(verdict: Verdict) -> (String, bool) {
    match verdict {
        Verdict::Changed(table) => (format!("{table} changed meanwhile"), false),
        Verdict::Unfinished(why) | Verdict::TooOld(why) => (why, true),
        Verdict::Clean(_) | Verdict::Stale(..) => ("the scan has a verdict".to_string(), true),
    }
}

/// The transactions whose snapshots may see row versions that another snapshot does not keep.
struct Older {
    holders: Vec<Holder>,
    names: String,
}

impl Older {
    /// Waits a while: many of them end in the next moment.
    fn wait_for(snapshot: &Snapshot, patience: Duration) {
        let begin = Instant::now();
        while begin.elapsed() <= patience && !locks::older_snapshots(snapshot.xmin()).is_empty() {
            session::sleep_ms(20);
        }
    }

    /// Those that there are.
    fn now(snapshot: &Snapshot) -> Result<Older> {
        let mut older = Older {
            holders: locks::older_snapshots(snapshot.xmin()),
            names: String::new(),
        };
        if !older.holders.is_empty() {
            older.names = work::name_holders(&older.transactions(), &[])?;
        }
        Ok(older)
    }

    fn transactions(&self) -> Vec<String> {
        let holders = self.holders.iter();
        holders.map(|h| h.virtual_transaction()).collect()
    }

    /// Names them if one has ended, or has an id: has written. Out of the lock table. A transaction
    /// that is prepared is not its session's any more.
    fn have_moved(&self) -> Result<Option<String>> {
        let moved = sql::bigint(
            "SELECT count(*) FROM unnest($1::text[]) AS older \
              WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_locks \
                     WHERE locktype = 'virtualxid' AND virtualxid = older \
                       AND virtualtransaction = older AND granted) \
                 OR EXISTS (SELECT FROM pg_catalog.pg_locks \
                     WHERE locktype = 'transactionid' AND virtualtransaction = older \
                       AND mode = 'ExclusiveLock' AND granted)",
            &[sql::Arg::Text(&format!(
                "{{{}}}",
                self.transactions().join(",")
            ))],
        )?;
        Ok(moved.filter(|count| *count > 0).map(|_| self.names.clone()))
    }
}

/// What stands in the way of a slot before anything is scanned.
fn before_the_scan(slot: SlotId, leaves: &[Leaf]) -> Result<Option<String>> {
    if let Some(until) = work::grace_left(slot)? {
        return Ok(Some(format!("its grace lasts until {until}")));
    }
    for leaf in leaves {
        if Quarantine::of(std::slice::from_ref(leaf))?.holds(slot) {
            let (name, count) = (table::name(leaf.table)?, work::quarantined(leaf.table)?);
            return Ok(Some(format!("{name} has {count} rows under quarantine")));
        }
    }
    if let Some(why) = early_pruning() {
        return Ok(Some(why));
    }
    horizon_passed(slot, leaves)
}

/// Before PostgreSQL 17 a setting has rows pruned that snapshots still see: a scan of all row
/// versions would miss them without a word.
fn early_pruning() -> Option<String> {
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    if session::prunes_early() {
        return Some(
            "old_snapshot_threshold is set: rows may be pruned before the scan finds them"
                .to_string(),
        );
    }
    None
}

/// The slots that rows under quarantine name, which nobody has dismissed.
pub struct Quarantine {
    slots: HashSet<SlotId>,
    unknown: bool,
}

impl Quarantine {
    /// That of these tables.
    pub fn of(leaves: &[Leaf]) -> Result<Quarantine> {
        let known = stale::slots()?;
        let mut slots = HashSet::new();
        for leaf in leaves {
            for head in work::heads(leaf.table, false)? {
                slots.extend(stale::slot_of(&head));
            }
        }
        let mut unknown = slots
            .iter()
            .any(|slot| known.standing(*slot) == Standing::Unknown);
        for leaf in leaves {
            unknown = unknown || work::has_unlisted(leaf.table)?;
        }
        Ok(Quarantine { slots, unknown })
    }

    /// Whether a row stands in the way of a slot's proof: one that names it, one that names no slot
    /// of this database, whose header may have been altered, or one that the list has no room for.
    pub fn holds(&self, slot: SlotId) -> bool {
        self.unknown || self.slots.contains(&slot)
    }
}

/// Whether everything that could have copied a stale value past the proof is gone: 55000 says what
/// is not, else None for "yes".
fn horizon_passed(slot: SlotId, leaves: &[Leaf]) -> Result<Option<String>> {
    let Some(proof) = work::proof(slot)? else {
        return Ok(Some("it has no proof".to_string()));
    };
    if proof.identity != locks::identity() {
        return Ok(Some(
            "its proof was made on another server or database, before a restore; a drained slot is \
             proved again, a disabled one after enable_slot"
                .to_string(),
        ));
    }
    // Our own table stands for those that were registered when the proof was made.
    let tables = leaves.iter().map(|leaf| leaf.table);
    for oid in tables.chain([catalog::registered_column()?]) {
        let Some(table) = Table::open_for_scan(oid) else {
            return Ok(Some(format!("{} is locked", table::name(oid)?)));
        };
        if locks::oldest_visible(&table) < proof.horizon {
            drop(table);
            return old_transactions(proof.horizon).map(Some);
        }
    }
    standbys_behind(&proof.lsn)
}

/// Waits a while for every transaction of this database that has written something by now; names
/// those that have not ended. A statement that began before the proof may have copied stale values
/// and ended: its transaction has no old snapshot any more, and the scan does not see what it has
/// not committed. Whoever writes later reads what the scan reads.
fn writers_ended(patience: Duration) -> Result<Option<String>> {
    let begin = Instant::now();
    let writers = work::writers()?;
    loop {
        let left = work::name_writers(&writers)?;
        if left.is_none() || begin.elapsed() > patience {
            return Ok(left);
        }
        session::sleep_ms(20);
    }
}

/// Names what still has a snapshot older than the horizon.
fn old_transactions(horizon: u64) -> Result<String> {
    let old = "age(x) >= age($1::text::xid)";
    let named = sql::text(
        &format!(
            "SELECT string_agg(DISTINCT who, ', ') FROM ( \
               SELECT 'pid ' || pid AS who, x FROM pg_catalog.pg_stat_activity, \
                      LATERAL (VALUES (backend_xid), (backend_xmin)) AS v(x) \
                WHERE x IS NOT NULL AND pid <> pg_catalog.pg_backend_pid() \
               UNION ALL SELECT 'prepared transaction ' || quote_literal(gid), transaction \
                 FROM pg_catalog.pg_prepared_xacts \
               UNION ALL SELECT 'replication slot ' || slot_name, xmin \
                 FROM pg_catalog.pg_replication_slots WHERE xmin IS NOT NULL \
               UNION ALL SELECT 'standby ' || application_name, backend_xmin \
                 FROM pg_catalog.pg_stat_replication WHERE backend_xmin IS NOT NULL \
             ) AS holders WHERE {old}"
        ),
        &[sql::Arg::Text(&(horizon & 0xffff_ffff).to_string())],
    )?;
    Ok(match named {
        Some(names) => format!("older transactions still run: {names}"),
        None => "a transaction that is older than its proof still runs".to_string(),
    })
}

/// The standbys that send no feedback: nobody here knows of their snapshots. To an owner of the
/// extension who may not see the view's columns they are NULL: then nobody sends any.
const SILENT: &str = "FROM pg_catalog.pg_stat_replication r \
          WHERE backend_xmin IS NULL AND state IS DISTINCT FROM 'backup' \
            AND NOT EXISTS (SELECT FROM pg_catalog.pg_replication_slots s \
                 WHERE s.active_pid = r.pid AND (s.xmin IS NOT NULL OR s.slot_type = 'logical'))";

/// Standbys that send no feedback: they must have replayed the proof, some time ago.
fn standbys_behind(lsn: &str) -> Result<Option<String>> {
    let delay = guc::standby_query_delay_ms();
    let behind = sql::text(
        &format!(
            "SELECT string_agg(CASE WHEN state IS NULL \
                        THEN 'pid ' || pid || ' (not shown to ' || current_user \
                             || ', who owns the extension and lacks pg_monitor)' \
                        ELSE coalesce(nullif(application_name, ''), 'pid ' || pid) END, ', ') {SILENT} \
                AND (replay_lsn IS NULL OR replay_lsn < $1::text::pg_lsn)"
        ),
        &[sql::Arg::Text(lsn)],
    )?;
    if let Some(names) = behind {
        return Ok(Some(format!(
            "standbys have not replayed the proof: {names}"
        )));
    }
    // One that is disconnected may still run queries, and sends its feedback to its slot.
    let silent = sql::bigint(
        &format!(
            "SELECT (SELECT count(*) {SILENT}) \
                  + (SELECT count(*) FROM pg_catalog.pg_replication_slots \
                      WHERE slot_type = 'physical' AND NOT active AND restart_lsn IS NOT NULL \
                        AND xmin IS NULL)"
        ),
        &[],
    )?;
    let gone = sql::text(
        "SELECT string_agg(slot_name, ', ') FROM pg_catalog.pg_replication_slots \
          WHERE slot_type = 'physical' AND NOT active AND restart_lsn < $1::text::pg_lsn",
        &[sql::Arg::Text(lsn)],
    )?;
    if let Some(names) = gone {
        return Ok(Some(format!(
            "disconnected standbys: replication slots {names}"
        )));
    }
    match (silent, delay) {
        (Some(0) | None, _) => Ok(None),
        (_, None) => Ok(Some(
            "standbys without hot_standby_feedback are connected, and rekey.standby_query_delay is -1"
                .to_string(),
        )),
        (_, Some(delay)) => {
            let delay = sql::Arg::Bigint(i64::try_from(delay).unwrap_or(i64::MAX));
            sql::text(
                "SELECT 'standbys without hot_standby_feedback may still run older queries' \
                   FROM rekey.key_slot s WHERE s.proof->>'lsn' = $2 \
                    AND s.drained_at + $1 * interval '1 millisecond' \
                        + coalesce((SELECT max(replay_lag) FROM pg_catalog.pg_stat_replication), \
                                   '0'::interval) > clock_timestamp() LIMIT 1",
                &[delay, sql::Arg::Text(lsn)],
            )
        }
    }
}
