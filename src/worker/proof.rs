//! The proof that slots are unused: one scan of every registered table under one snapshot.
//!
//! Called by src/worker/drain.rs, and by disable_slot and destroy_slot for the second scan. The
//! tables' files, columns and leaves are recorded first and looked at again with every chunk:
//! TRUNCATE and rewrites are not MVCC-safe, so that a scan across one would prove nothing. Between
//! chunks no lock is held. Invariant: `Clean` means that the snapshot sees no envelope of the
//! slots in any registered column, but for dismissed rows.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use pgrx::pg_sys::{self, Oid};
use rekey_core::envelope::SlotId;

use crate::catalog::read::SlotRow;
use crate::catalog::work;
use crate::error::{Error, Result};
use crate::ffi::sql;
use crate::ffi::table::{self, Snapshot, Table, Tid};
use crate::ffi::{locks, session};
use crate::registry::{self, Leaf};
use crate::stale::{self, BySlot};

/// Blocks between two looks at the record: 4 MiB, so that an ALTER TABLE waits some milliseconds.
const CHUNK: u32 = 512;
/// How long a table that somebody else has locked is waited for.
const LOCKED: Duration = Duration::from_secs(10);
/// Stale rows are remembered up to so many; more are for the next pass.
const REMEMBERED: usize = 100_000;

/// What a scan found.
pub enum Verdict {
    /// Nothing stale: the proof, as JSON.
    Clean(String),
    /// Stale rows, by table.
    Stale(Vec<(Oid, Vec<Tid>)>),
    /// The tables or their registration changed meanwhile: which, how.
    Changed(String),
    /// It could not be finished: why.
    Unfinished(String),
}

/// What was recorded of a table.
struct Record {
    file: Oid,
    blocks: u32,
    rows: i64,
}

/// Scans all leaves for envelopes of `slots`. `pace` is told the milliseconds of each chunk and
/// whether to rest between chunks is its affair; it returns false to give up.
pub fn prove(
    leaves: &[Leaf],
    slots: &[SlotRow],
    max_age: Option<Duration>,
    mut pace: impl FnMut(&str, Duration) -> Result<()>,
) -> Result<Verdict> {
    let wanted: BySlot<()> = slots.iter().map(|slot| (slot.id, ())).collect();
    let begin = Instant::now();
    let snapshot = Snapshot::latest();
    let mut stale: Vec<(Oid, Vec<Tid>)> = Vec::new();
    let mut records = Vec::new();
    for leaf in leaves {
        let mut found = Vec::new();
        match scan_leaf(leaf, &snapshot, &wanted, &mut found, &mut |name, took| {
            pace(name, took)?;
            match max_age {
                Some(limit) if begin.elapsed() > limit => Err(Error::SnapshotTooOld),
                _ => Ok(()),
            }
        }) {
            Ok(Ok(record)) => records.push(record),
            Ok(Err(verdict)) => return Ok(verdict),
            Err(Error::SnapshotTooOld) => {
                let name = table::name(leaf.table)?;
                return Ok(Verdict::Unfinished(format!(
                    "the snapshot reached rekey.max_snapshot_age at {name}"
                )));
            }
            Err(error) => return Err(error),
        }
        if !found.is_empty() {
            stale.push((leaf.table, found));
        }
    }
    if !stale.is_empty() {
        return Ok(Verdict::Stale(stale));
    }
    // Once more at the end: what was swapped behind the scan counts too.
    let (now, _) = registry::leaves()?;
    if !same(&now, leaves) {
        return Ok(Verdict::Changed("the registered columns".to_string()));
    }
    for (leaf, record) in leaves.iter().zip(&records) {
        let file = Table::open_for_scan(leaf.table).map(|table| table.file());
        if file.is_some_and(|file| file != record.file) {
            return Ok(Verdict::Changed(table::name(leaf.table)?));
        }
    }
    let horizon = locks::full_xid(snapshot.xmax());
    drop(snapshot);
    describe(leaves, &records, horizon, begin.elapsed()).map(Verdict::Clean)
}

type Pace<'a> = &'a mut dyn FnMut(&str, Duration) -> Result<()>;

fn scan_leaf(
    leaf: &Leaf,
    snapshot: &Snapshot,
    wanted: &BySlot<()>,
    found: &mut Vec<Tid>,
    pace: Pace<'_>,
) -> Result<std::result::Result<Record, Verdict>> {
    let columns: Vec<i16> = leaf.columns.iter().map(|column| column.attnum).collect();
    let dismissed = work::dismissed(leaf.table)?;
    let name = table::name(leaf.table)?;
    let mut record: Option<Record> = None;
    let mut next = 0;
    loop {
        let begin = Instant::now();
        let table = match open(leaf.table, &name)? {
            Ok(table) => table,
            Err(verdict) => return Ok(Err(verdict)),
        };
        // What the snapshot sees lay in the file when it was taken: later blocks do not matter.
        let record = record.get_or_insert_with(|| Record {
            file: table.file(),
            blocks: table.blocks(),
            rows: 0,
        });
        if table.file() != record.file || !has_columns(&table, leaf) {
            return Ok(Err(Verdict::Changed(name)));
        }
        if next >= record.blocks {
            return Ok(Ok(Record {
                file: record.file,
                blocks: record.blocks,
                rows: record.rows,
            }));
        }
        let end = record.blocks.min(next.saturating_add(CHUNK));
        table.scan(
            snapshot,
            next..end.min(table.blocks()),
            &columns,
            |tid, values| {
                record.rows += 1;
                let names_one = |value: &Option<pg_sys::Datum>| {
                    value.is_some_and(|datum| {
                        stale::header(datum).is_some_and(|h| wanted.contains_key(&h.slot))
                            && (dismissed.is_empty()
                                || stale::head(datum).is_none_or(|h| !dismissed.contains(&h)))
                    })
                };
                if values.iter().any(names_one) && found.len() < REMEMBERED {
                    found.push(tid);
                }
                true
            },
        );
        next = end;
        drop(table);
        pgrx::check_for_interrupts!();
        pace(&name, begin.elapsed())?;
    }
}

/// Opens a table for the scan; waits a while for one that somebody has locked.
fn open(oid: Oid, name: &str) -> Result<std::result::Result<Table, Verdict>> {
    let begin = Instant::now();
    loop {
        if let Some(table) = Table::open_for_scan(oid) {
            return Ok(Ok(table));
        }
        if table::name(oid)? == oid.to_u32().to_string() {
            return Ok(Err(Verdict::Changed(name.to_string())));
        }
        if begin.elapsed() > LOCKED {
            return Ok(Err(Verdict::Unfinished(format!("{name} is locked"))));
        }
        session::sleep_ms(20);
    }
}

fn has_columns(table: &Table, leaf: &Leaf) -> bool {
    leaf.columns
        .iter()
        .all(|column| table.column_name(column.attnum).as_deref() == Some(&column.name))
}

fn same(now: &[Leaf], then: &[Leaf]) -> bool {
    let shape = |leaf: &Leaf| {
        let columns = leaf.columns.iter().map(|c| (c.attnum, c.name.clone()));
        (leaf.table, columns.collect::<Vec<_>>())
    };
    let shapes = |leaves: &[Leaf]| leaves.iter().map(shape).collect::<HashSet<_>>();
    shapes(now) == shapes(then)
}

fn describe(leaves: &[Leaf], records: &[Record], horizon: u64, took: Duration) -> Result<String> {
    let (system, database) = locks::identity();
    let mut tables = Vec::new();
    for (leaf, record) in leaves.iter().zip(records) {
        let columns: Vec<String> = leaf.columns.iter().map(|c| json(&c.name)).collect();
        tables.push(format!(
            "{{\"table\":{},\"columns\":[{}],\"rows\":{},\"blocks\":{}}}",
            json(&table::name(leaf.table)?),
            columns.join(","),
            record.rows,
            record.blocks
        ));
    }
    let lsn = sql::text("SELECT pg_catalog.pg_current_wal_insert_lsn()::text", &[])?;
    let at = sql::text("SELECT to_json(clock_timestamp())::text", &[])?;
    Ok(format!(
        "{{\"at\":{},\"lsn\":\"{}\",\"horizon\":\"{horizon}\",\"system_identifier\":\"{system}\",\
         \"database\":\"{database}\",\"seconds\":{:.3},\"tables\":[{}],\"exceptions\":{}}}",
        at.unwrap_or_else(|| "null".to_string()),
        lsn.unwrap_or_default(),
        took.as_secs_f64(),
        tables.join(","),
        work::exceptions()?
    ))
}

/// A text as JSON.
pub fn json(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => quoted.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// Whether everything that could have copied a stale value past the proof is gone: 55000 says what
/// is not, else None for "yes".
pub fn horizon_passed(slot: SlotId, leaves: &[Leaf]) -> Result<Option<String>> {
    let Some(proof) = work::proof(slot)? else {
        return Ok(Some("it has no proof".to_string()));
    };
    if proof.identity != locks::identity() {
        return Ok(Some(
            "its proof was made on another server or database, before a restore".to_string(),
        ));
    }
    for leaf in leaves {
        let Some(table) = Table::open_for_scan(leaf.table) else {
            return Ok(Some(format!("{} is locked", table::name(leaf.table)?)));
        };
        if locks::oldest_visible(&table) < proof.horizon {
            drop(table);
            return old_transactions(proof.horizon).map(Some);
        }
    }
    standbys_behind(&proof.lsn)
}

/// Names what still has a snapshot older than the horizon.
fn old_transactions(horizon: u64) -> Result<String> {
    let old = "age(x) >= age($1::text::xid)";
    let named = sql::text(
        &format!(
            "SELECT string_agg(who, ', ') FROM ( \
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

/// Standbys that send no feedback: they must have replayed the proof, some time ago.
fn standbys_behind(lsn: &str) -> Result<Option<String>> {
    let delay = crate::guc::standby_query_delay_ms();
    let behind = sql::text(
        "SELECT string_agg(application_name, ', ') FROM pg_catalog.pg_stat_replication r \
          WHERE backend_xmin IS NULL AND state <> 'backup' \
            AND NOT EXISTS (SELECT FROM pg_catalog.pg_replication_slots s \
                 WHERE s.active_pid = r.pid AND (s.xmin IS NOT NULL OR s.slot_type = 'logical')) \
            AND (replay_lsn IS NULL OR replay_lsn < $1::text::pg_lsn)",
        &[sql::Arg::Text(lsn)],
    )?;
    if let Some(names) = behind {
        return Ok(Some(format!(
            "standbys have not replayed the proof: {names}"
        )));
    }
    let silent = sql::bigint(
        "SELECT count(*) FROM pg_catalog.pg_stat_replication r \
          WHERE backend_xmin IS NULL AND state <> 'backup' \
            AND NOT EXISTS (SELECT FROM pg_catalog.pg_replication_slots s \
                 WHERE s.active_pid = r.pid AND (s.xmin IS NOT NULL OR s.slot_type = 'logical'))",
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
