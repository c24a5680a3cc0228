//! The proof that slots are unused: one scan of every registered table under one snapshot.
//!
//! Called by src/worker/drain.rs, and by src/worker/ending.rs for the second scan. The
//! tables' files, columns and leaves are recorded first and looked at again with every chunk:
//! TRUNCATE and rewrites are not MVCC-safe, so that a scan across one would prove nothing. Between
//! chunks no lock is held. Invariant: `Clean` means that the snapshot sees no envelope or
//! fingerprint of the slots, or of none of ours, in any registered column, but for dismissed
//! envelopes.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use pgrx::pg_sys::Oid;
use rekey_core::envelope::SlotId;
use rekey_core::schedule;
use serde_json::{Value, json};

use super::rewrite;
use crate::catalog::read::SlotRow;
use crate::catalog::work;
use crate::error::{Error, Result};
use crate::ffi::sql;
use crate::ffi::table::{self, Snapshot, Table, Tid};
use crate::ffi::{background, locks, session, shared};
use crate::registry::{self, Leaf, LeafColumn};
use crate::stale::{self, BySlot, Holds, Standing};
use crate::{failpoint, guc};

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
    /// Stale rows, by table, and the slots that they name. Of the other slots it is a clean scan.
    Stale(Vec<(Oid, Vec<Tid>)>, HashSet<SlotId>),
    /// The tables or their registration changed meanwhile: which, how.
    Changed(String),
    /// It could not be finished: why.
    Unfinished(String),
    /// Its snapshot became older than rekey.max_snapshot_age at this table.
    TooOld(String),
}

/// What was recorded of a table.
#[derive(Clone, Copy)]
struct Record {
    file: Oid,
    blocks: u32,
    rows: i64,
}

/// Scans all leaves for envelopes of `slots`, for as long as rekey.max_snapshot_age allows; with a
/// ratio it works that share of the time.
pub fn prove(leaves: &[Leaf], slots: &[SlotRow], ratio: Option<f64>) -> Result<Verdict> {
    let mut scan = Scan {
        wanted: slots.iter().map(|slot| (slot.id, ())).collect(),
        named: HashSet::new(),
        snapshot: Snapshot::latest(),
        begin: Instant::now(),
        since: background::now(),
        max_age: guc::max_snapshot_age(),
        pace: Pace {
            ratio,
            worked_since: Instant::now(),
            told_at: Instant::now(),
        },
    };
    failpoint::reach("proof.begun")?;
    let mut stale: Vec<(Oid, Vec<Tid>)> = Vec::new();
    let mut records = Vec::new();
    for leaf in leaves {
        let mut found = Vec::new();
        match scan.leaf(leaf, &mut found)? {
            Ok(record) => records.push(record),
            Err(verdict) => return Ok(verdict),
        }
        if !found.is_empty() {
            stale.push((leaf.table, found));
        }
    }
    failpoint::reach("proof.scanned")?;
    // Once more at the end: what was swapped behind the scan counts too.
    let (now, _) = registry::leaves()?;
    if !same(&now, leaves) {
        return Ok(Verdict::Changed("the registered columns".to_string()));
    }
    for (leaf, record) in leaves.iter().zip(&records) {
        let name = table::name(leaf.table)?;
        match open(leaf.table, &name)? {
            Ok(table) if table.file() == record.file => {}
            Ok(_) => return Ok(Verdict::Changed(name)),
            Err(verdict) => return Ok(verdict),
        }
    }
    if !stale.is_empty() {
        return Ok(Verdict::Stale(stale, std::mem::take(&mut scan.named)));
    }
    let horizon = locks::full_xid(scan.snapshot.xmax());
    let took = scan.begin.elapsed();
    drop(scan);
    describe(leaves, &records, horizon, took).map(Verdict::Clean)
}

/// What is looked for, in what was committed when.
struct Scan {
    wanted: BySlot<()>,
    named: HashSet<SlotId>,
    snapshot: Snapshot,
    begin: Instant,
    since: i64,
    max_age: Option<Duration>,
    pace: Pace,
}

impl Drop for Scan {
    fn drop(&mut self) {
        shared::scanning(shared::Scan::default());
    }
}

/// Rests between chunks, and words for whoever waits.
struct Pace {
    ratio: Option<f64>,
    worked_since: Instant,
    told_at: Instant,
}

impl Pace {
    /// After a chunk: rests when enough has been worked for a rest to be worth it.
    fn rest(&mut self) {
        const WORTH_MS: u64 = 20;
        let worked = self.worked_since.elapsed().as_millis();
        let worked = u64::try_from(worked).unwrap_or(u64::MAX);
        if let Some(ratio) = self.ratio
            && worked >= WORTH_MS
        {
            let until = Instant::now() + Duration::from_millis(schedule::rest_ms(worked, ratio));
            while let Some(left) = until.checked_duration_since(Instant::now()) {
                let left = i64::try_from(left.as_millis()).unwrap_or(i64::MAX);
                session::sleep_ms(left.saturating_add(1));
            }
            self.worked_since = Instant::now();
        }
    }

    /// Every few seconds a session that waits for the proof hears of it.
    fn tell(&mut self, name: &str, done: u32, blocks: u32) {
        if self.told_at.elapsed() >= Duration::from_secs(5) {
            let percent = 100 * u64::from(done) / u64::from(blocks.max(1));
            pgrx::notice!("proof: {name}: {percent} %");
            self.told_at = Instant::now();
        }
    }
}

impl Scan {
    /// Looks through one table.
    fn leaf(
        &mut self,
        leaf: &Leaf,
        found: &mut Vec<Tid>,
    ) -> Result<std::result::Result<Record, Verdict>> {
        let columns: Vec<i16> = leaf.columns.iter().map(|column| column.attnum).collect();
        let kinds: Vec<Holds> = leaf.columns.iter().map(LeafColumn::holds).collect();
        let dismissed = work::heads(leaf.table, true)?;
        let slots = stale::slots()?;
        let name = table::name(leaf.table)?;
        let mut record: Option<Record> = None;
        let mut next = 0;
        loop {
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
                return Ok(Ok(*record));
            }
            let end = record.blocks.min(next.saturating_add(CHUNK));
            table.scan(
                &self.snapshot,
                next..end.min(table.blocks()),
                &columns,
                |tid, values| {
                    record.rows += 1;
                    let mut stale = false;
                    for (value, kind) in values.iter().zip(&kinds) {
                        let Some(datum) = *value else { continue };
                        // Of the other kind it is no less in need of its slot.
                        let found = kind.found(datum);
                        // One that names no slot of ours may have been altered: it may be any.
                        let counts = |(is, slot): &(Holds, SlotId)| {
                            self.wanted.contains_key(slot)
                                || *is == *kind && slots.standing(*slot) == Standing::Unknown
                        };
                        let Some((is, slot)) = found.filter(counts) else {
                            continue;
                        };
                        let excused = rewrite::excused(&dismissed, is, datum);
                        if !excused {
                            stale = true;
                            self.named.insert(slot);
                        }
                    }
                    if stale && found.len() < REMEMBERED {
                        found.push(tid);
                    }
                    true
                },
            );
            next = end;
            drop(table);
            pgrx::check_for_interrupts!();
            shared::scanning(shared::Scan {
                since: self.since,
                table: leaf.table.to_u32(),
                done: next,
                blocks: record.blocks,
            });
            failpoint::reach("proof.chunk")?;
            if self
                .max_age
                .is_some_and(|limit| self.begin.elapsed() > limit)
            {
                let why = format!("the snapshot reached rekey.max_snapshot_age at {name}");
                return Ok(Err(Verdict::TooOld(why)));
            }
            self.pace.tell(&name, next, record.blocks);
            self.pace.rest();
        }
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
        let columns = leaf.columns.iter();
        let columns = columns.map(|c| (c.attnum, c.name.clone(), c.holds()));
        (leaf.table, columns.collect::<Vec<_>>())
    };
    let shapes = |leaves: &[Leaf]| leaves.iter().map(shape).collect::<HashSet<_>>();
    shapes(now) == shapes(then)
}

fn describe(leaves: &[Leaf], records: &[Record], horizon: u64, took: Duration) -> Result<String> {
    let (system, database) = locks::identity();
    let mut tables = Vec::new();
    for (leaf, record) in leaves.iter().zip(records) {
        let columns: Vec<&str> = leaf.columns.iter().map(|c| c.name.as_str()).collect();
        tables.push(json!({
            "table": table::name(leaf.table)?,
            "columns": columns,
            "rows": record.rows,
            "blocks": record.blocks,
        }));
    }
    let here = sql::rows(
        "SELECT pg_catalog.pg_current_wal_insert_lsn()::text, to_jsonb(clock_timestamp()) #>> '{}'",
        &[],
    )?;
    let exceptions = serde_json::from_str::<Value>(&work::exceptions()?);
    // Numbers of 64 bits as text: readers of JSON round them.
    let proof = json!({
        "at": here[0][1],
        "lsn": here[0][0],
        "horizon": horizon.to_string(),
        "system_identifier": system.to_string(),
        "database": database.to_string(),
        "seconds": took.as_secs_f64(),
        "tables": tables,
        "exceptions": exceptions.map_err(|e| Error::Internal(e.to_string()))?,
    });
    Ok(proof.to_string())
}
