//! Changing rows of one table, in the caller's transaction: re-encrypting stale ones.
//!
//! Called by src/worker/drain.rs; src/worker/backfill.rs runs a `Job` of its own. Rows are found by
//! the headers of their envelopes, locked without waiting, changed in memory and updated as the
//! table's owner. What fails in the owner's code is undone, halved until one row is left, and
//! reported by its SQLSTATE. Invariants:
//! I5, only the very version that was read is updated; I14, a bad row holds up no other; I15, no
//! lock is waited for and the owner's code runs against a clock.

use std::cell::RefCell;
use std::collections::HashSet;
use std::ops::Range;
use std::time::Instant;

use pgrx::{PgSqlErrorCode as Code, pg_sys};
use rekey_core::envelope::SlotId;

use super::pace::Pace;
use super::refresh::Refresher;
use crate::catalog::work::{self, Failure};
use crate::error::{Error, Result};
use crate::ffi::expression::Expression;
use crate::ffi::session::ActAs;
use crate::ffi::subtransaction::{Caught, subtransaction};
use crate::ffi::table::{Snapshot, Table, Tid, Updated, Updater, columns_of};
use crate::ffi::text;
use crate::ffi::timer::Limit;
use crate::registry::{Leaf, LeafColumn};
use crate::stale::{self, Head, Holds, Slots, Standing};
use crate::{cache, failpoint};

/// Longest time that the owner's code may take for one try, in milliseconds; once it was too long,
/// for one row.
const TRY_MS: i32 = 5_000;
const ROW_MS: i32 = 1_000;
/// Longest time that a batch goes on halving, in milliseconds: the rest waits for the next one.
const HALVING_MS: u128 = 15_000;

/// Where to look for stale rows.
pub enum Source<'a> {
    /// In these blocks, up to so many rows or the end of their block.
    Blocks(Range<u32>, usize),
    /// At these places.
    Places(&'a [Tid]),
}

/// What a batch did.
#[derive(Default)]
pub struct Report {
    /// The block at which it has stopped since there were rows enough before it.
    pub stopped_at: Option<u32>,
    /// Rows looked at.
    pub scanned: i64,
    /// Rows among them that are to be changed.
    pub found: usize,
    /// Rows changed.
    pub rewritten: i64,
    /// Rows that somebody else had locked: to be tried again.
    pub locked: Vec<Tid>,
    /// Rows that somebody else has changed meanwhile: the proof finds their new versions.
    pub moved: i64,
    /// Rows that do not open or do not update.
    pub failed: Vec<Failure>,
    /// The owner's code took too long.
    pub slow: bool,
}

/// Re-encrypts the stale rows of `source`. The caller holds the barrier and the table's lock.
pub fn rewrite(
    leaf: &Leaf,
    table: &Table,
    source: &Source<'_>,
    pace: &RefCell<Pace>,
) -> Result<Report> {
    let mut report = Report::default();
    let columns: Vec<i16> = leaf.columns.iter().map(|column| column.attnum).collect();
    let kinds: Vec<Holds> = leaf.columns.iter().map(LeafColumn::holds).collect();
    let dismissed = work::heads(leaf.table, true)?;
    let places = match source {
        Source::Places(places) => places.to_vec(),
        Source::Blocks(blocks, most) => find(
            table,
            blocks.clone(),
            *most,
            &columns,
            &kinds,
            &dismissed,
            &mut report,
        )?,
    };
    report.found = places.len();
    if places.is_empty() {
        return Ok(report);
    }
    pace.borrow_mut().rest();
    let _owner = ActAs::updating(table.owner(), leaf.fire_triggers);
    let contexts = leaf
        .columns
        .iter()
        .map(|column| match column.context.as_str() {
            "" => Ok(None),
            text => Expression::prepare(table.relation(), text, &columns).map(Some),
        })
        .collect::<Result<Vec<_>>>()?;
    let refreshers = leaf.columns.iter().map(|c| Refresher::prepare(leaf, c));
    let refreshers = refreshers.collect::<Result<Vec<_>>>()?;
    let stale = Stale {
        leaf,
        table,
        columns: &columns,
        kinds,
        contexts,
        refreshers,
        dismissed,
    };
    let job = Job {
        table,
        columns: &columns,
        change: &|row, bad| stale.change(row, bad),
        heads: &|place| stale.heads_at(place),
        pace,
    };
    job.run(&places, &mut report)?;
    Ok(report)
}

/// Rows of `blocks` with an envelope that is to be re-encrypted, or that cannot be.
fn find(
    table: &Table,
    blocks: Range<u32>,
    most: usize,
    columns: &[i16],
    kinds: &[Holds],
    dismissed: &HashSet<Head>,
    report: &mut Report,
) -> Result<Vec<Tid>> {
    let slots = stale::slots()?;
    let is_one = |values: &[Option<pg_sys::Datum>]| {
        values.iter().zip(kinds).any(|(datum, kind)| {
            datum.is_some_and(|datum| concerned(&slots, dismissed, *kind, datum).is_some())
        })
    };
    Ok(gather(table, blocks, most, columns, report, is_one))
}

/// Rows of `blocks` of which `is_one` says that they are to be changed, up to so many or the end of
/// their block.
pub fn gather(
    table: &Table,
    blocks: Range<u32>,
    most: usize,
    columns: &[i16],
    report: &mut Report,
    is_one: impl Fn(&[Option<pg_sys::Datum>]) -> bool,
) -> Vec<Tid> {
    let mut places: Vec<Tid> = Vec::new();
    // Live columns are of any type; those of registered columns were looked at with the lock.
    table.scan_any(&Snapshot::latest(), blocks, columns, |tid, values| {
        // Whole blocks: one whose rows stay stale would be begun again and again.
        if places.len() >= most && places.last().is_some_and(|last| last.block < tid.block) {
            report.stopped_at = Some(tid.block);
            return false;
        }
        report.scanned += 1;
        if is_one(values) {
            places.push(tid);
        }
        true
    });
    report.found = places.len();
    places
}

/// What an error of the owner's code means for the batch.
enum Verdict {
    /// The row is at fault: halve, and set it aside.
    Row,
    /// Somebody else was in the way: another time.
    Retry,
    /// The server is at fault, or the session is cancelled: end the batch.
    Fatal,
}

impl Verdict {
    fn of(caught: Caught) -> Verdict {
        let state = caught.sqlstate();
        match &state[..2] {
            "40" => Verdict::Retry,
            "55" if state == "55P03" => Verdict::Retry,
            // 57014 stands for the clock here: a cancel by the user went on from `attempt`.
            "57" if state == "57014" => Verdict::Row,
            // An SQLSTATE of the owner's own making arrives as XX000.
            "53" | "57" | "58" | "F0" | "25" => Verdict::Fatal,
            _ => Verdict::Row,
        }
    }
}

#[derive(Default)]
struct Attempt {
    rewritten: i64,
    locked: Vec<Tid>,
    moved: i64,
    failed: Vec<Failure>,
}

impl Attempt {
    fn join(self, report: &mut Report) {
        report.rewritten += self.rewritten;
        report.locked.extend(self.locked);
        report.moved += self.moved;
        report.failed.extend(self.failed);
    }
}

/// Rows of one table that are to be changed, by whoever acts as its owner.
pub struct Job<'a> {
    /// The table.
    pub table: &'a Table,
    /// The columns that may change.
    pub columns: &'a [i16],
    /// The new values of a row.
    pub change: Change<'a>,
    /// The envelopes of one row that a failure of the row as a whole concerns.
    pub heads: &'a dyn Fn(Tid) -> Result<Vec<Head>>,
    /// Its rests between rows.
    pub pace: &'a RefCell<Pace>,
}

/// The new values of a row, in the memory context that lasts until it is stored. What is wrong with
/// the row is told in `Bad`; an error ends the batch.
pub type Change<'a> =
    &'a dyn Fn(*mut pg_sys::TupleTableSlot, &mut Bad) -> Result<Vec<(i16, pg_sys::Datum)>>;

impl Job<'_> {
    /// Changes the rows at `places`, in halves where the owner's code fails.
    pub fn run(&self, places: &[Tid], report: &mut Report) -> Result<()> {
        let begin = Instant::now();
        let mut parts: Vec<&[Tid]> = vec![places];
        let mut limit_ms = TRY_MS;
        while let Some(part) = parts.pop() {
            if begin.elapsed().as_millis() > HALVING_MS {
                report.slow = true;
                report.locked.extend_from_slice(part);
                continue;
            }
            match self.attempt(part, limit_ms)? {
                Ok(attempt) => attempt.join(report),
                Err(caught) => match Verdict::of(caught) {
                    Verdict::Retry => report.locked.extend_from_slice(part),
                    Verdict::Fatal => return Err(Error::Owner(caught.0)),
                    Verdict::Row if part.len() == 1 => report.failed.push(Failure {
                        tid: part[0],
                        slot: None,
                        sqlstate: caught.sqlstate(),
                        heads: (self.heads)(part[0])?,
                    }),
                    Verdict::Row if caught.0 == Code::ERRCODE_QUERY_CANCELED => {
                        limit_ms = ROW_MS;
                        parts.extend(part.chunks(1).rev());
                    }
                    Verdict::Row => {
                        let (left, right) = part.split_at(part.len() / 2);
                        parts.extend([right, left]);
                    }
                },
            }
        }
        Ok(())
    }

    /// Changes all of `places` in one subtransaction. The inner error is the owner's.
    fn attempt(
        &self,
        places: &[Tid],
        limit_ms: i32,
    ) -> Result<std::result::Result<Attempt, Caught>> {
        let limit = Limit::start(limit_ms);
        let outcome = subtransaction(|| {
            let mut attempt = Attempt::default();
            let mut updater = Updater::begin(self.table, self.columns);
            for (at, &tid) in places.iter().enumerate() {
                if at > 0 {
                    self.pace.borrow_mut().rest();
                }
                let mut bad = Bad::default();
                let updated = updater.update(tid, |row| (self.change)(row, &mut bad))?;
                let mut place = tid;
                match updated {
                    Updated::Done(new) => {
                        attempt.rewritten += 1;
                        place = new;
                    }
                    Updated::Locked => attempt.locked.push(tid),
                    Updated::Moved => attempt.moved += 1,
                    Updated::Unchanged => {}
                    Updated::Suppressed => bad.suppressed(),
                }
                attempt.failed.extend(bad.failure(place));
            }
            updater.finish();
            failpoint::reach("rows.updated")?;
            Ok(attempt)
        });
        let passed = limit.passed();
        drop(limit);
        match outcome {
            Ok(attempt) => attempt.map(Ok),
            Err(Caught(Code::ERRCODE_QUERY_CANCELED)) if !passed => Err(Error::Cancelled),
            Err(caught) => Ok(Err(caught)),
        }
    }
}

/// What is stale in the rows of one table.
struct Stale<'a> {
    leaf: &'a Leaf,
    table: &'a Table,
    columns: &'a [i16],
    kinds: Vec<Holds>,
    contexts: Vec<Option<Expression>>,
    refreshers: Vec<Option<Refresher>>,
    dismissed: HashSet<Head>,
}

impl Stale<'_> {
    /// The envelopes of one row that are to be re-encrypted.
    fn heads_at(&self, place: Tid) -> Result<Vec<Head>> {
        let slots = stale::slots()?;
        let snapshot = Snapshot::latest();
        let mut heads = Vec::new();
        let block = place.block..place.block + 1;
        self.table
            .scan(&snapshot, block, self.columns, |tid, values| {
                if tid == place {
                    for (value, kind) in values.iter().zip(&self.kinds) {
                        let head = |datum| {
                            let (is, _) = concerned(&slots, &self.dismissed, *kind, datum)?;
                            is.head(datum)
                        };
                        heads.extend(value.and_then(head));
                    }
                }
                tid <= place
            });
        Ok(heads)
    }

    /// The new envelopes of a row. What does not open is told in `bad`; an error ends the batch:
    /// without a root key no row is at fault.
    fn change(
        &self,
        row: *mut pg_sys::TupleTableSlot,
        bad: &mut Bad,
    ) -> Result<Vec<(i16, pg_sys::Datum)>> {
        let slots = stale::slots()?;
        let mut changes = Vec::new();
        let values = columns_of(row, self.columns);
        for at in 0..values.len() {
            let Some(datum) = values[at] else { continue };
            let kind = self.kinds[at];
            let Some((is, slot)) = concerned(&slots, &self.dismissed, kind, datum) else {
                continue;
            };
            let context = |at: usize| match &self.contexts[at] {
                Some(expression) => expression.evaluate(row).map(Option::unwrap_or_default),
                None => Ok(Vec::new()),
            };
            let fresh = match &self.refreshers[at] {
                Some(_) if is != kind => Err(Error::Fingerprint),
                Some(refresher) => refresher.renew(datum, &values, context, &context(at)?),
                None if stale::header(datum).is_some_and(|header| header.context_bound) => {
                    cache::reencrypt(text::detoasted(datum), &context(at)?)
                }
                None => cache::reencrypt(text::detoasted(datum), b""),
            };
            match fresh {
                Ok(Some(fresh)) => {
                    changes.push((self.leaf.columns[at].attnum, fresh));
                    bad.changing.extend(is.head(datum));
                }
                Ok(None) => {}
                Err(error @ (Error::RootKey(..) | Error::Random | Error::NoCatalog)) => {
                    return Err(error);
                }
                Err(error) => {
                    bad.add(slot, Caught(error.code()).sqlstate(), is.head(datum));
                }
            }
        }
        Ok(changes)
    }
}

/// The kind and the slot of what is to be re-encrypted or made again, or cannot be; None for
/// everything else, and for what somebody has decided to do without. What is of the other kind than
/// its column goes to quarantine, if its slot is one of ours: any 40 bytes look like a fingerprint.
fn concerned(
    slots: &Slots,
    dismissed: &HashSet<Head>,
    kind: Holds,
    datum: pg_sys::Datum,
) -> Option<(Holds, SlotId)> {
    let (is, slot) = kind.found(datum)?;
    match slots.standing(slot) {
        Standing::Current => return None,
        Standing::Unknown if is != kind => return None,
        Standing::Stale | Standing::Closed | Standing::Unknown => {}
    }
    (!excused(dismissed, is, datum)).then_some((is, slot))
}

/// Whether somebody has decided to do without an envelope. Never of a fingerprint: each row with
/// the same value has the same one, so that one dismissal would excuse them all, and a search would
/// miss them once the slot is gone.
pub fn excused(dismissed: &HashSet<Head>, is: Holds, datum: pg_sys::Datum) -> bool {
    is == Holds::Envelopes
        && !dismissed.is_empty()
        && is.head(datum).is_some_and(|head| dismissed.contains(&head))
}

/// What is wrong with one row: one entry, whatever the number of its columns.
#[derive(Default)]
pub struct Bad {
    first: Option<(Option<SlotId>, String)>,
    heads: Vec<Head>,
    changing: Vec<Head>,
}

impl Bad {
    fn add(&mut self, slot: SlotId, sqlstate: String, head: Option<Head>) {
        self.first.get_or_insert((Some(slot), sqlstate));
        self.heads.extend(head);
    }

    /// A value of the row cannot be had.
    pub fn value(&mut self, sqlstate: String) {
        self.first.get_or_insert((None, sqlstate));
    }

    /// A trigger has refused the row silently: triggered_action_exception.
    fn suppressed(&mut self) {
        self.first.get_or_insert((None, "09000".to_string()));
        self.heads.append(&mut self.changing);
    }

    fn failure(self, tid: Tid) -> Option<Failure> {
        let heads = self.heads;
        self.first.map(|(slot, sqlstate)| Failure {
            tid,
            slot,
            sqlstate,
            heads,
        })
    }
}
