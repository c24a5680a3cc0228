//! The proof that slots are unused: one scan of every registered table under one snapshot.
//!
//! Called by src/worker/drain.rs, and by src/worker/ending.rs for the second scan. The tables'
//! files are recorded first, then the snapshot is taken, and files and columns are looked at again
//! with every chunk: TRUNCATE and rewrites are not MVCC-safe, so that a scan across one would prove
//! nothing. Between chunks no lock is held. Invariant: `Clean` means that the snapshot sees no
//! envelope or fingerprint of the slots, or of none of ours, in any registered column, but for
//! dismissed envelopes.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use pgrx::pg_sys::Oid;
use rekey_core::envelope::SlotId;
use rekey_core::schedule::Limits;
use serde_json::{Value, json};

use super::pace::Pace;
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
pub(super) const CHUNK: u32 = 512;
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

/// Which row versions a scan looks at.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Versions {
    /// Those that its snapshot sees.
    Seen,
    /// Also those that are deleted and not dead to everyone, and what is not committed.
    All,
}

/// What was read of a table.
#[derive(Clone, Copy)]
struct Record {
    blocks: u32,
    rows: i64,
}

/// A proof that has begun: the files of the tables, and then what was committed.
pub struct Begun<'a> {
    leaves: &'a [Leaf],
    files: Vec<Oid>,
    snapshot: Snapshot,
    at: Instant,
    since: i64,
}

/// Records the tables' files and takes the snapshot. In this order: a rewrite gives rows that were
/// there before it to its own transaction. In a file that is older than the snapshot, the snapshot
/// sees them; one that comes later is told by its number.
pub fn begin(leaves: &[Leaf]) -> Result<std::result::Result<Begun<'_>, Verdict>> {
    let mut files = Vec::new();
    for leaf in leaves {
        let name = table::name(leaf.table)?;
        match open(leaf.table, &name)? {
            Ok(table) if has_columns(&table, leaf) => files.push(table.file()),
            Ok(_) => return Ok(Err(Verdict::Changed(name))),
            Err(verdict) => return Ok(Err(verdict)),
        }
    }
    let begun = Begun {
        leaves,
        files,
        snapshot: Snapshot::latest(),
        at: Instant::now(),
        since: background::now(),
    };
    failpoint::reach("proof.begun")?;
    Ok(Ok(begun))
}

/// Scans all leaves for values of `slots` that are committed now.
pub fn prove(leaves: &[Leaf], slots: &[SlotRow], limits: Option<Limits>) -> Result<Verdict> {
    match begin(leaves)? {
        Ok(begun) => Ok(begun.scan(slots, limits, Versions::Seen)?.0),
        Err(verdict) => Ok(verdict),
    }
}

impl Begun<'_> {
    /// The snapshot: registered for as long as this lives.
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// When it was taken.
    pub fn at(&self) -> Instant {
        self.at
    }

    /// Scans all leaves for values of `slots`, for as long as rekey.max_snapshot_age allows, and
    /// within `limits`. Also says which slots are named only by row versions that the snapshot does
    /// not see: of these slots the verdict says nothing.
    pub fn scan(
        &self,
        slots: &[SlotRow],
        limits: Option<Limits>,
        versions: Versions,
    ) -> Result<(Verdict, HashSet<SlotId>)> {
        let mut scan = Scan {
            begun: self,
            wanted: slots.iter().map(|slot| (slot.id, ())).collect(),
            versions,
            named: HashSet::new(),
            unseen: HashSet::new(),
            max_age: guc::max_snapshot_age(),
            pace: Pace::of_scan(limits),
            voice: Voice::new(),
        };
        let verdict = scan.run()?;
        let mut unseen = std::mem::take(&mut scan.unseen);
        unseen.retain(|slot| !scan.named.contains(slot));
        Ok((verdict, unseen))
    }
}

/// What is looked for, in what was committed when.
struct Scan<'a> {
    begun: &'a Begun<'a>,
    wanted: BySlot<()>,
    versions: Versions,
    named: HashSet<SlotId>,
    unseen: HashSet<SlotId>,
    max_age: Option<Duration>,
    pace: Pace,
    voice: Voice,
}

impl Drop for Scan<'_> {
    fn drop(&mut self) {
        shared::scanning(shared::Scan::default());
    }
}

/// What a session that waits for a scan hears of it.
pub(super) struct Voice {
    spoke_at: Instant,
}

impl Voice {
    /// Silent at first.
    pub(super) fn new() -> Voice {
        Voice {
            spoke_at: Instant::now(),
        }
    }

    /// After a chunk: a notice every few seconds.
    pub(super) fn tell(&mut self, what: &str, name: &str, done: u32, blocks: u32) {
        if self.spoke_at.elapsed() >= Duration::from_secs(5) {
            let percent = 100 * u64::from(done) / u64::from(blocks.max(1));
            pgrx::notice!("{what}: {name}: {percent} %");
            self.spoke_at = Instant::now();
        }
    }
}

impl Scan<'_> {
    fn run(&mut self) -> Result<Verdict> {
        let begun = self.begun;
        let mut stale: Vec<(Oid, Vec<Tid>)> = Vec::new();
        let mut records = Vec::new();
        for (leaf, file) in begun.leaves.iter().zip(&begun.files) {
            let mut found = Vec::new();
            match self.leaf(leaf, *file, &mut found)? {
                Ok(record) => records.push(record),
                Err(verdict) => return Ok(verdict),
            }
            if !found.is_empty() {
                stale.push((leaf.table, found));
            }
        }
        failpoint::reach("proof.scanned")?;
        // Once more at the end: what was swapped behind the scan counts too.
        let (now, troubles) = registry::leaves()?;
        if !troubles.is_empty() || !same(&now, begun.leaves) {
            return Ok(Verdict::Changed("the registered columns".to_string()));
        }
        for (leaf, file) in begun.leaves.iter().zip(&begun.files) {
            let name = table::name(leaf.table)?;
            match open(leaf.table, &name)? {
                Ok(table) if table.file() == *file => {}
                Ok(_) => return Ok(Verdict::Changed(name)),
                Err(verdict) => return Ok(verdict),
            }
        }
        if !stale.is_empty() {
            return Ok(Verdict::Stale(stale, self.named.clone()));
        }
        let horizon = locks::full_xid(begun.snapshot.xmax());
        describe(begun.leaves, &records, horizon, begun.at.elapsed()).map(Verdict::Clean)
    }

    /// Looks through one table, which must still be in this file.
    fn leaf(
        &mut self,
        leaf: &Leaf,
        file: Oid,
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
            if table.file() != file || !has_columns(&table, leaf) {
                return Ok(Err(Verdict::Changed(name)));
            }
            // What the snapshot sees, and what was written before the scan has come here, lies in
            // these blocks: later ones do not matter.
            let record = record.get_or_insert_with(|| Record {
                blocks: table.blocks(),
                rows: 0,
            });
            if next >= record.blocks {
                return Ok(Ok(*record));
            }
            let end = record.blocks.min(next.saturating_add(CHUNK));
            let blocks = next..end.min(table.blocks());
            let mut hits: Vec<(Tid, SlotId)> = Vec::new();
            let look = |tid, values: &[Option<_>]| {
                record.rows += 1;
                for (value, kind) in values.iter().zip(&kinds) {
                    let Some(datum) = *value else { continue };
                    // Of the other kind it is no less in need of its slot.
                    let found = kind.found(datum);
                    // One that names no slot of ours may have been altered: it may be any.
                    let counts = |(is, slot): &(Holds, SlotId)| {
                        self.wanted.contains_key(slot)
                            || *is == *kind && slots.standing(*slot) == Standing::Unknown
                    };
                    if let Some((is, slot)) = found.filter(counts)
                        && !rewrite::excused(&dismissed, is, datum)
                    {
                        hits.push((tid, slot));
                    }
                }
                true
            };
            match self.versions {
                Versions::Seen => table.scan(&self.begun.snapshot, blocks, &columns, look),
                Versions::All => table.scan_versions(blocks, &columns, look),
            }
            for (tid, slot) in hits {
                if self.versions == Versions::All && !table.sees(&self.begun.snapshot, tid) {
                    self.unseen.insert(slot);
                    continue;
                }
                self.named.insert(slot);
                if found.last() != Some(&tid) && found.len() < REMEMBERED {
                    found.push(tid);
                }
            }
            next = end;
            drop(table);
            pgrx::check_for_interrupts!();
            shared::scanning(shared::Scan {
                since: self.begun.since,
                table: leaf.table.to_u32(),
                done: next,
                blocks: record.blocks,
            });
            failpoint::reach("proof.chunk")?;
            let age = self.begun.at.elapsed();
            if self.max_age.is_some_and(|limit| age > limit) {
                let why = format!("the snapshot reached rekey.max_snapshot_age at {name}");
                return Ok(Err(Verdict::TooOld(why)));
            }
            self.voice.tell("proof", &name, next, record.blocks);
            self.pace.rest();
        }
    }
}

/// Opens a table for the scan; waits a while for one that somebody has locked.
pub(super) fn open(oid: Oid, name: &str) -> Result<std::result::Result<Table, Verdict>> {
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

/// Whether the registered columns are still what they were when the leaves were read. Their types
/// may have changed since: no datum of another one may come before the scan.
fn has_columns(table: &Table, leaf: &Leaf) -> bool {
    leaf.columns.iter().all(|column| {
        table.has_bytea(column.attnum)
            && table.column_name(column.attnum).as_deref() == Some(&column.name)
    })
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
