//! Filling live columns: rows that the trigger has not come by, in passes with a cursor.
//!
//! Called by src/worker/drain.rs, with whose steps it takes turns. Once the trigger is there every
//! new row version is filled as it is written, so that what is missing only becomes less. A pass
//! that has skipped nothing is the last one; one that has skipped rows, since somebody had them
//! locked or their values cannot be had, is followed by another. Batches, their locks and the
//! owner's code are those of src/worker/rewrite.rs.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::time::{Duration, Instant};

use pgrx::pg_sys::{self, Oid};
use rekey_core::schedule::{self, BatchSize};

use super::door::{Unable, enter, refuse_paused};
use super::drain::{Drainer, covers};
use super::pace::{self, Pace};
use super::rewrite::{self, Bad, Job, Report};
use super::step::{Step, Worked};
use crate::catalog::live;
use crate::catalog::work::{self, Book, Done, Pass};
use crate::error::Result;
use crate::ffi::session::{self, ActAs};
use crate::ffi::shared;
use crate::ffi::subtransaction::Caught;
use crate::ffi::table::{self, Table, columns_of};
use crate::live::{self as columns, Live, Plan};
use crate::registry::{self, Leaf, LeafColumn};

/// What is remembered between steps.
#[derive(Default)]
pub struct Backfill {
    goes_first: bool,
    sizes: HashMap<Oid, BatchSize>,
    touched: HashMap<Oid, Range<u32>>,
    /// Tables whose last pass has skipped rows: how often in a row, until when, why.
    waiting: HashMap<Oid, (u32, Instant, String)>,
    /// Tables that this run has entered.
    entered: HashSet<Oid>,
    /// A row of the running pass that fails, and how.
    failing: HashMap<Oid, String>,
}

impl Drainer {
    /// A step of a rotation or of the backfill: the two take turns while both have work.
    pub(super) fn take_turns(&mut self) -> Result<Step> {
        let mut order: [fn(&mut Drainer) -> Result<Step>; 2] = [Drainer::drain, Drainer::fill];
        self.backfill.goes_first = !self.backfill.goes_first;
        if self.backfill.goes_first {
            order.reverse();
        }
        let first = match order[0](self)? {
            Step::Worked(worked) => return Ok(Step::Worked(worked)),
            other => other,
        };
        let second = order[1](self)?;
        Ok(sooner(first, second))
    }

    /// One batch of a table with live columns.
    fn fill(&mut self) -> Result<Step> {
        let mut soonest: Option<(Instant, String)> = None;
        let mut put_off = |at: Instant, why: &str| {
            if soonest.as_ref().is_none_or(|(known, _)| at < *known) {
                soonest = Some((at, why.to_string()));
            }
        };
        for table in columns::leaves()? {
            if self.only.is_some_and(|only| !covers(only, table)) {
                continue;
            }
            let resting = self.resting.get(&table).map(|rest| (rest.until, &rest.why));
            let waiting = self.backfill.waiting.get(&table);
            let waiting = waiting.map(|(_, until, why)| (*until, why));
            if let Some((until, why)) = resting.max(waiting)
                && until > Instant::now()
            {
                put_off(until, why);
                continue;
            }
            match self.fill_table(table) {
                Ok(Some(worked)) => return Ok(Step::Worked(worked)),
                Ok(None) => {}
                Err(Unable::Error(error)) => return Err(error),
                Err(Unable::Paused(why)) => {
                    put_off(Instant::now() + Duration::from_secs(60), &why);
                }
                Err(Unable::Busy(why)) => put_off(self.rest(table, &why, true)?, &why),
                Err(Unable::Refused(why)) => put_off(self.rest(table, &why, false)?, &why),
            }
        }
        Ok(match soonest {
            Some((at, why)) => Step::until(at, why),
            None => Step::Idle(None),
        })
    }

    /// One batch; None when the table is done.
    fn fill_table(&mut self, oid: Oid) -> std::result::Result<Option<Worked>, Unable> {
        self.current = Some(oid);
        shared::working_on(oid.to_u32());
        let lives = columns::of(oid)?;
        let wave = wave(&lives);
        let known = work::pass(Book::Backfill, oid)?.filter(|pass| pass.wave == wave);
        let done = known.is_some() && live::left_over(oid)?.is_none();
        // Whoever names the table looks again, once: rows may have come by while the trigger was
        // disabled.
        let again = done && self.only.is_some() && !self.backfill.entered.contains(&oid);
        if done && !again {
            return Ok(None);
        }
        let leaf = as_leaf(oid, &lives);
        refuse_paused(&leaf)?;
        let name = table::name(oid)?;
        if self.announce(Book::Backfill, oid)? {
            return Ok(Some(worked(format!("{name}: begins"))));
        }
        self.refuse_bloated(oid)?;
        for live in &lives {
            if let Err(error) = registry::refuse_other_owner(live.row.table, oid) {
                return Err(Unable::Refused(error.explain().0));
            }
        }
        let begin = Instant::now();
        let table = enter(&leaf)?;
        self.pace.borrow_mut().locked();
        self.backfill.entered.insert(oid);
        if again {
            live::pass_again(oid, table.blocks())?;
            return Ok(Some(worked(format!("{name}: begins again"))));
        }
        let file = table.file();
        let pass = match known.filter(|pass| pass.file == file) {
            Some(pass) => pass,
            None => {
                let pass = Pass {
                    file,
                    wave,
                    cursor: 0,
                    left: table.blocks(),
                };
                work::begin_pass(Book::Backfill, oid, &pass)?;
                // A step of its own: if the first batch fails there is a place to say why.
                return Ok(Some(worked(format!("{name}: begins"))));
            }
        };
        if pass.left == 0 {
            let what = self.end_of_pass(oid, &table)?;
            return Ok(Some(worked(format!("{name}: {what}"))));
        }
        if let Some(earlier) = self.backfill.touched.remove(&oid) {
            table.reclaim(earlier);
        }
        let size = self.backfill.sizes.entry(oid).or_default();
        let blocks = pass.cursor
            ..table
                .blocks()
                .min(pass.cursor.saturating_add(size.blocks().min(pass.left)));
        let most = size.rows() as usize;
        self.pace.borrow_mut().rest();
        let report = fill_blocks(&table, &lives, blocks.clone(), most, &self.pace)?;
        self.pace.borrow_mut().rest();
        let skipped = report.moved + count(report.locked.len()) + count(report.failed.len());
        let next = report.stopped_at.unwrap_or(blocks.end).max(pass.cursor);
        let seen = next - pass.cursor;
        let left = if seen == 0 { 0 } else { pass.left - seen };
        let done = Done {
            unlisted: 0,
            scanned: report.scanned,
            rewritten: report.rewritten,
            skipped,
        };
        work::advance(Book::Backfill, oid, next, left, &done)?;
        if self.background {
            session::commit_lazily();
        }
        size.learn(
            seen,
            u32::try_from(report.found).unwrap_or(u32::MAX),
            u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX),
            pace::aim_ms(self.background),
        );
        if report.rewritten > 0 {
            self.backfill.touched.insert(oid, pass.cursor..next);
        }
        if let Some(failure) = report.failed.first() {
            let why = format!(
                "row {} fails with SQLSTATE {}",
                failure.tid, failure.sqlstate
            );
            self.backfill.failing.insert(oid, why);
        }
        if report.slow {
            self.rest(oid, "code of its owner takes too long", false)?;
        } else {
            self.resting.remove(&oid);
        }
        let total = f64::from(table.blocks().max(1));
        Ok(Some(Worked {
            what: format!(
                "{name}: {:.0} % filled",
                100.0 * (1.0 - f64::from(left) / total).max(0.0)
            ),
            table: Some(oid),
            rewritten: report.rewritten,
            rested: self.pace.borrow().rested(),
        }))
    }

    /// Ends the backfill of a table, or puts it off to another pass.
    fn end_of_pass(&mut self, oid: Oid, table: &Table) -> Result<String> {
        let skipped = live::left_over(oid)?.unwrap_or(0);
        let before = self.backfill.waiting.remove(&oid);
        let failing = self.backfill.failing.remove(&oid);
        if skipped == 0 {
            work::note_in(Book::Backfill, oid, "done", "")?;
            return Ok("filled".to_string());
        }
        live::pass_again(oid, table.blocks())?;
        let tries = before.map_or(0, |(tries, ..)| tries);
        let (wait, why) = match failing {
            None => (
                100 * u64::from(tries.min(9)),
                "somebody had them locked".to_string(),
            ),
            Some(why) => (schedule::backoff_ms(tries + 1, oid.to_u32().into()), why),
        };
        let why = format!("{skipped} rows are still to be filled: {why}");
        work::note_in(Book::Backfill, oid, "", &why)?;
        let until = Instant::now() + Duration::from_millis(wait);
        let entry = (tries + 1, until, why.clone());
        self.backfill.waiting.insert(oid, entry);
        Ok(why)
    }
}

fn worked(what: String) -> Worked {
    Worked {
        what,
        ..Worked::default()
    }
}

fn count(len: usize) -> i64 {
    i64::try_from(len).unwrap_or(i64::MAX)
}

/// Of two steps that have done nothing, the one that comes sooner. A wait of no time ends a
/// foreground run: the other one's comes first.
fn sooner(one: Step, other: Step) -> Step {
    let rank = |step: &Step| match step {
        Step::Worked(_) => Duration::ZERO,
        Step::Wait(time, _) if time.is_zero() => Duration::MAX,
        Step::Wait(time, _) => *time,
        Step::Idle(Some(seconds)) => Duration::from_secs(seconds.unsigned_abs()),
        Step::Idle(None) => Duration::MAX,
    };
    let waits = |step: &Step| matches!(step, Step::Wait(..));
    // A wait keeps the worker, an idle step lets it go: what is due then stands on the board.
    match (waits(&one), waits(&other)) {
        (true, false) => one,
        (false, true) => other,
        _ if rank(&other) < rank(&one) => other,
        _ => one,
    }
}

/// Names the live columns that a pass serves.
fn wave(lives: &[Live]) -> String {
    let names: Vec<&str> = lives.iter().map(|live| live.row.trigger.as_str()).collect();
    names.join(" ")
}

/// What is to be written, as the door to a table's rows wants it.
fn as_leaf(table: Oid, lives: &[Live]) -> Leaf {
    let column = |live: &Live| LeafColumn {
        attnum: live.into,
        name: String::new(),
        context: String::new(),
        registered: live.row.table,
        fingerprint: None,
    };
    Leaf {
        table,
        columns: lives.iter().map(column).collect(),
        fire_triggers: false,
    }
}

/// Fills the rows of some blocks, as the table's owner and by his privileges on the keys.
fn fill_blocks(
    table: &Table,
    lives: &[Live],
    blocks: Range<u32>,
    most: usize,
    pace: &RefCell<Pace>,
) -> Result<Report> {
    let mut report = Report::default();
    let pairs: Vec<i16> = lives
        .iter()
        .flat_map(|live| [live.column, live.into])
        .collect();
    let places = rewrite::gather(table, blocks, most, &pairs, &mut report, |values| {
        let mut pairs = values.chunks(2);
        pairs.any(|pair| pair[0].is_some() && pair[1].is_none())
    });
    if places.is_empty() {
        return Ok(report);
    }
    let _owner = ActAs::updating(table.owner(), false);
    let plans = lives
        .iter()
        .map(|live| Plan::prepare(table.relation(), table.oid(), live))
        .collect::<Result<Vec<_>>>()?;
    let written: Vec<i16> = plans.iter().map(|plan| plan.into).collect();
    let job = Job {
        table,
        columns: &written,
        change: &|row, bad| missing_values(&plans, row, bad),
        heads: &|_| Ok(Vec::new()),
        pace,
    };
    job.run(&places, &mut report)?;
    Ok(report)
}

/// The values that a row lacks.
fn missing_values(
    plans: &[Plan],
    row: *mut pg_sys::TupleTableSlot,
    bad: &mut Bad,
) -> Result<Vec<(i16, pg_sys::Datum)>> {
    let mut changes = Vec::new();
    for plan in plans {
        if columns_of(row, &[plan.into])[0].is_some() {
            continue;
        }
        let given = plan.given(row);
        let made = given.and_then(|given| given.map_or(Ok(None), |given| plan.make(&given)));
        match made {
            Ok(Some(value)) => changes.push((plan.into, value)),
            Ok(None) => {}
            Err(error) if columns::is_of_the_row(&error) => {
                bad.value(Caught(error.code()).sqlstate());
            }
            Err(error) => return Err(error),
        }
    }
    Ok(changes)
}
