//! Envelopes and fingerprints in places that nobody has registered: other bytea columns,
//! materialized views, defaults.
//!
//! Called by find_envelopes() and before a slot is destroyed. Every table is read once, headers
//! only, in chunks between which no lock is held, as in src/worker/proof.rs; a table that is locked
//! or changes meanwhile is said to be so and counts as a place. Arrays, composites, other
//! types and what clients keep are not looked into. check() has samples of a few blocks instead,
//! of registered columns too; they assign no transaction id and wait for no lock.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use pgrx::pg_sys::{self, Oid};
use rekey_core::envelope::{CIPHERTEXT_AT, SlotId};
use rekey_core::schedule::Limits;
use serde_json::{Value, json};

use super::pace::Pace;
use super::proof::{self, CHUNK, Verdict, Voice};
use crate::error::Result;
use crate::failpoint;
use crate::ffi::sql;
use crate::ffi::table::{self, Snapshot, Table};
use crate::registry::{self, Leaf};
use crate::stale::{self, BySlot, Holds, Standing};

/// Envelopes of one slot in one place.
pub struct Place {
    /// Table, as people write it.
    pub table: String,
    /// Column, or what else.
    pub column: String,
    /// Slot that they name.
    pub slot: Option<SlotId>,
    /// How many.
    pub envelopes: i64,
}

/// Every bytea column of the database that is stored.
pub(super) const COLUMNS: &str = "\
    SELECT c.oid::text, a.attnum::text, a.attname::text \
      FROM pg_catalog.pg_class c \
      JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
      JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid \
      JOIN pg_catalog.pg_type t ON t.oid = a.atttypid \
     WHERE c.relkind IN ('r', 'm') AND c.relpersistence <> 't' AND a.attnum > 0 \
       AND NOT a.attisdropped AND 'bytea'::regtype IN (t.oid, t.typbasetype) \
       AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'rekey') \
     ORDER BY c.oid, a.attnum";

/// Constants in defaults that are long enough for an envelope, or as long as a fingerprint.
const DEFAULTS: &str = "\
    SELECT d.adrelid::text, a.attname::text, \
           (pg_catalog.regexp_matches(pg_catalog.pg_get_expr(d.adbin, d.adrelid), \
                '\\\\x(f9[0-9a-f]{98,}|[0-7][0-9a-f]{79})(?![0-9a-f])', 'g'))[1] \
      FROM pg_catalog.pg_attrdef d \
      JOIN pg_catalog.pg_attribute a ON a.attrelid = d.adrelid AND a.attnum = d.adnum";

/// A bytea column of a table that stores rows.
struct Column {
    table: Oid,
    attnum: i16,
    name: String,
}

/// The columns that a query gives which are not among the registered ones.
fn unregistered(found: Vec<Vec<Option<String>>>, leaves: &[Leaf]) -> Vec<Column> {
    let registered: HashSet<(Oid, i16)> = leaves
        .iter()
        .flat_map(|leaf| leaf.columns.iter().map(|c| (leaf.table, c.attnum)))
        .collect();
    let column = |row: Vec<Option<String>>| {
        Some(Column {
            table: Oid::from_u32(number(row.first()?)?),
            attnum: i16::try_from(number(row.get(1)?)?).ok()?,
            name: row.get(2)?.clone()?,
        })
    };
    let all = found.into_iter().filter_map(column);
    all.filter(|column| !registered.contains(&(column.table, column.attnum)))
        .collect()
}

fn number(cell: &Option<String>) -> Option<u32> {
    cell.as_deref().and_then(|cell| cell.parse().ok())
}

/// The slot that an envelope or a fingerprint names.
pub(super) fn named(datum: pg_sys::Datum) -> Option<SlotId> {
    Holds::Envelopes.found(datum).map(|(_, slot)| slot)
}

/// A table that stores rows, with its columns that are not registered.
pub struct Source {
    table: Oid,
    name: String,
    columns: Vec<Column>,
    /// The file that it was in before the snapshot was taken; None: it was locked.
    file: Option<Oid>,
}

/// Every place outside these registered columns that holds envelopes of slots of this database.
/// With `max_age` a table at which the snapshot gets older is not read.
pub fn all(
    leaves: &[Leaf],
    limits: Option<Limits>,
    max_age: Option<Duration>,
) -> Result<Vec<Place>> {
    let sources = sources(leaves)?;
    read(
        &sources,
        &Snapshot::latest(),
        Instant::now(),
        limits,
        max_age,
    )
}

/// What the sources hold that were recorded before the snapshot was taken, at `begin`: one snapshot
/// sees them all.
pub fn read(
    sources: &[Source],
    snapshot: &Snapshot,
    begin: Instant,
    limits: Option<Limits>,
    max_age: Option<Duration>,
) -> Result<Vec<Place>> {
    let mut reading = Reading {
        snapshot,
        begin,
        max_age,
        pace: Pace::of_scan(limits),
        voice: Voice::new(),
    };
    let mut places = Vec::new();
    for source in sources {
        match reading.read(source)? {
            Ok(found) => places.extend(found),
            Err(why) => places.extend(source.columns.iter().map(|column| Place {
                table: source.name.clone(),
                column: format!("{} ({why}, not read)", column.name),
                slot: None,
                envelopes: 0,
            })),
        }
    }
    for place in in_defaults()? {
        places.push(Place {
            column: format!("{} (default)", place.column),
            ..place
        });
    }
    Ok(places)
}

/// The tables with unregistered columns, and their files; without those that are gone or no heaps.
/// To be recorded before the snapshot is taken, as in the proof: else it would miss what was
/// rewritten between.
pub fn sources(leaves: &[Leaf]) -> Result<Vec<Source>> {
    let mut sources: Vec<Source> = Vec::new();
    for column in unregistered(sql::rows(COLUMNS, &[])?, leaves) {
        if let Some(last) = sources.last_mut()
            && last.table == column.table
        {
            last.columns.push(column);
            continue;
        }
        let table = Table::open_for_scan(column.table);
        let name = table::name(column.table)?;
        let is_gone = table.is_none() && name == column.table.to_u32().to_string();
        if is_gone || table.as_ref().is_some_and(|table| !table.stores_heap()) {
            continue;
        }
        sources.push(Source {
            table: column.table,
            name,
            columns: vec![column],
            file: table.map(|table| table.file()),
        });
    }
    Ok(sources)
}

/// The scan of one source after the other.
struct Reading<'a> {
    snapshot: &'a Snapshot,
    begin: Instant,
    max_age: Option<Duration>,
    pace: Pace,
    voice: Voice,
}

impl Reading<'_> {
    /// What a table holds, or why it was not read.
    fn read(&mut self, source: &Source) -> Result<std::result::Result<Vec<Place>, &'static str>> {
        let Some(file) = source.file else {
            return Ok(Err("locked"));
        };
        let slots = stale::slots()?;
        let attnums: Vec<i16> = source.columns.iter().map(|column| column.attnum).collect();
        let mut counts: Vec<BySlot<i64>> = attnums.iter().map(|_| BySlot::default()).collect();
        let mut blocks = None;
        let mut next = 0;
        loop {
            let table = match proof::open(source.table, &source.name)? {
                Ok(table) => table,
                Err(Verdict::Changed(_)) => return Ok(Ok(Vec::new())), // dropped
                Err(_) => return Ok(Err("locked")),
            };
            // What is not of type bytea any more must not come before the scan.
            if table.file() != file || !attnums.iter().all(|attnum| table.has_bytea(*attnum)) {
                return Ok(Err("changed meanwhile"));
            }
            let blocks = *blocks.get_or_insert_with(|| table.blocks());
            if next >= blocks {
                break;
            }
            let age = self.begin.elapsed();
            if self.max_age.is_some_and(|limit| age > limit) {
                return Ok(Err("rekey.max_snapshot_age reached"));
            }
            let end = blocks.min(next.saturating_add(CHUNK));
            let range = next..end.min(table.blocks());
            table.scan(self.snapshot, range, &attnums, |_, values| {
                for (value, counts) in values.iter().zip(&mut counts) {
                    if let Some(slot) = value.and_then(named)
                        && slots.standing(slot) != Standing::Unknown
                    {
                        *counts.entry(slot).or_insert(0) += 1;
                    }
                }
                true
            });
            next = end;
            drop(table);
            pgrx::check_for_interrupts!();
            failpoint::reach("elsewhere.chunk")?;
            let what = "places that are not registered";
            self.voice.tell(what, &source.name, next, blocks);
            self.pace.rest();
        }
        let columns = source.columns.iter().zip(counts);
        Ok(Ok(columns
            .flat_map(|(column, counts)| {
                counts.into_iter().map(move |(slot, envelopes)| Place {
                    table: source.name.clone(),
                    column: column.name.clone(),
                    slot: Some(slot),
                    envelopes,
                })
            })
            .collect()))
    }
}

/// Envelopes and fingerprints that are defaults of columns.
pub fn in_defaults() -> Result<Vec<Place>> {
    let slots = stale::slots()?;
    let mut places = Vec::new();
    for row in sql::look(DEFAULTS, &[])? {
        let oid = number(&row[0]).map_or(pg_sys::InvalidOid, Oid::from_u32);
        let slot = row[2].as_deref().and_then(slot_of_hex);
        if let Some(slot) = slot
            && slots.standing(slot) != Standing::Unknown
        {
            places.push(Place {
                table: table::name(oid)?,
                column: row[1].clone().unwrap_or_default(),
                slot: Some(slot),
                envelopes: 1,
            });
        }
    }
    Ok(places)
}

/// Blocks of one table, and tables, that a sample looks at: 16 MB of reads at most, which takes a
/// second where nothing is cached. A health check runs every minute.
pub const SAMPLE_BLOCKS: u32 = 8;
/// See [`SAMPLE_BLOCKS`].
pub const SAMPLE_TABLES: usize = 256;

/// What a sample of one column's values holds, by their headers.
pub struct Sampled {
    /// Table.
    pub table: Oid,
    /// Column, not quoted.
    pub column: String,
    /// Context that it is registered with.
    pub context: String,
    /// Whether it is registered for fingerprints.
    pub fingerprints: bool,
    /// Values that are not NULL.
    pub values: i64,
    /// Of these: what is no envelope, or no fingerprint.
    pub plain: i64,
    /// Of these: what is of the other kind than the column, under a slot of this database.
    pub misplaced: i64,
    /// Envelopes of slots that are not in this database.
    pub unknown: i64,
    /// Envelopes of slots that are disabled or destroyed.
    pub closed: i64,
    /// Envelopes that are bound to a context.
    pub bound: i64,
    /// The slot of one that opens.
    pub slot: Option<SlotId>,
}

/// Samples the registered columns; also how many columns were left out.
pub fn sample_registered() -> Result<(Vec<Sampled>, usize)> {
    let (leaves, _) = registry::leaves()?;
    let columns = leaves.into_iter().flat_map(|leaf| {
        let table = leaf.table;
        leaf.columns.into_iter().map(move |column| {
            let (kind, context) = (column.holds(), column.context);
            let column = Column {
                table,
                attnum: column.attnum,
                name: column.name,
            };
            (column, context, Some(kind))
        })
    });
    sample(columns.collect())
}

/// Samples the bytea columns that are not registered; also how many columns were left out.
pub fn sample_unregistered() -> Result<(Vec<Sampled>, usize)> {
    let largest_first = format!(
        "SELECT f.* FROM ({COLUMNS}) AS f (oid, attnum, attname) \
           JOIN pg_catalog.pg_class c ON c.oid = f.oid::oid \
          ORDER BY c.relpages DESC, c.oid, f.attnum::integer"
    );
    let (leaves, _) = registry::leaves()?;
    let columns = unregistered(sql::look(&largest_first, &[])?, &leaves).into_iter();
    sample(
        columns
            .map(|column| (column, String::new(), None))
            .collect(),
    )
}

/// Samples columns of a kind, or of either.
fn sample(columns: Vec<(Column, String, Option<Holds>)>) -> Result<(Vec<Sampled>, usize)> {
    let slots = stale::slots()?;
    let snapshot = Snapshot::latest();
    let (mut sampled, mut left) = (Vec::new(), 0);
    let mut tables = HashSet::new();
    for (column, context, kind) in columns {
        tables.insert(column.table);
        let table = (tables.len() <= SAMPLE_TABLES)
            .then(|| Table::open_for_scan(column.table))
            .flatten();
        let Some(table) = table else {
            left += 1;
            continue;
        };
        if !table.stores_heap() {
            continue;
        }
        let mut seen = Sampled {
            table: column.table,
            column: column.name,
            context,
            fingerprints: kind == Some(Holds::Fingerprints),
            values: 0,
            plain: 0,
            misplaced: 0,
            unknown: 0,
            closed: 0,
            bound: 0,
            slot: None,
        };
        for block in spread(table.blocks(), SAMPLE_BLOCKS) {
            table.scan(
                &snapshot,
                block..block + 1,
                &[column.attnum],
                |_, values| {
                    if let Some(datum) = values[0] {
                        let slot = kind.map_or_else(|| named(datum), |kind| kind.slot(datum));
                        let other = |slot| slots.standing(slot) != Standing::Unknown;
                        if slot.is_none() && named(datum).is_some_and(other) {
                            seen.values += 1;
                            seen.misplaced += 1;
                            return true;
                        }
                        let header = stale::header(datum).filter(|_| !seen.fingerprints);
                        seen.count(slot, header.is_some_and(|h| h.context_bound), &slots);
                    }
                    true
                },
            );
        }
        sampled.push(seen);
        pgrx::check_for_interrupts!();
    }
    Ok((sampled, left))
}

impl Sampled {
    fn count(&mut self, slot: Option<SlotId>, bound: bool, slots: &stale::Slots) {
        self.values += 1;
        let Some(slot) = slot else {
            self.plain += 1;
            return;
        };
        self.bound += i64::from(bound);
        match slots.standing(slot) {
            Standing::Unknown => self.unknown += 1,
            Standing::Closed => self.closed += 1,
            Standing::Current | Standing::Stale => self.slot = Some(slot),
        }
    }
}

/// So many blocks of a table at most, evenly spread, the first and the last among them.
fn spread(blocks: u32, count: u32) -> impl Iterator<Item = u32> {
    let count = count.min(blocks);
    let last = u64::from(blocks.saturating_sub(1));
    (0..count).map(move |i| {
        let at = last * u64::from(i) / u64::from(count.saturating_sub(1).max(1));
        u32::try_from(at).unwrap_or(0)
    })
}

/// The slot that an envelope or a fingerprint of at least so many digits names.
fn slot_of_hex(hex: &str) -> Option<SlotId> {
    let byte = |at: usize| u8::from_str_radix(hex.get(at * 2..at * 2 + 2)?, 16).ok();
    let bytes: Vec<u8> = (0..CIPHERTEXT_AT).map_while(byte).collect();
    stale::slot_of(&bytes.try_into().ok()?)
}

/// Those of the places that hold envelopes of a slot, or could not be read; None: none.
pub fn of_slot(places: &[Place], slot: SlotId) -> Option<String> {
    let places: Vec<String> = places
        .iter()
        .filter(|place| place.slot.is_none_or(|found| found == slot))
        .map(|place| format!("{}.{} ({})", place.table, place.column, place.envelopes))
        .collect();
    (!places.is_empty()).then(|| places.join(", "))
}

/// All places as a JSON array, for find_envelopes().
pub fn as_json() -> Result<String> {
    let place = |place: Place| {
        json!({
            "table_name": place.table,
            "column_name": place.column,
            "slot_id": place.slot.map(SlotId::as_i64),
            "envelopes": place.envelopes,
        })
    };
    // Its statement holds a snapshot of its own as long: an age is no matter here.
    let (leaves, _) = registry::leaves()?;
    let places = all(&leaves, None, None)?;
    let places: Vec<Value> = places.into_iter().map(place).collect();
    Ok(Value::Array(places).to_string())
}
