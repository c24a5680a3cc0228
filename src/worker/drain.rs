//! What the worker does next: one step per transaction, from a rotation to the drained slot.
//!
//! Called by the background worker and by CALL rekey.reencrypt(). A step passes over a range of
//! blocks, looks at the barrier, scans for the proof, or finds nothing to do. Tables take turns; one
//! that cannot be worked on is left for a while and holds up the proof, not the other tables.
//! Nothing here has to survive a crash: cursors and results are in the catalog.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use pgrx::pg_sys::Oid;
use rekey_core::envelope::SlotId;
use rekey_core::keyring::SlotState;
use rekey_core::schedule::{BatchSize, Limits};

use super::ages::Ages;
use super::backfill::Backfill;
use super::barrier::Barrier;
use super::door::{Unable, enter, refuse_paused};
use super::ending::Quarantine;
use super::pace::{self, Pace};
use super::proof::{self, Verdict};
use super::rewrite::{self, Report, Source};
use super::step::{Step, Worked, first_of};
use super::{throttle, wave};
use crate::catalog::read::{self, SlotRow};
use crate::catalog::work::{self, Book, Done, Pass};
use crate::catalog::write;
use crate::error::Result;
use crate::ffi::table::{self, Table, Tid};
use crate::ffi::{session, shared, sql};
use crate::registry::{self, Leaf};
use crate::{failpoint, lifecycle};

/// A table that is out of turn.
pub(super) struct Rest {
    /// So often in a row it has failed.
    failures: u32,
    /// So often in a row somebody else had it.
    busy: u32,
    pub(super) until: Instant,
    pub(super) why: String,
}

/// The worker's memory between steps.
pub struct Drainer {
    pub(super) only: Option<Oid>,
    pub(super) proves: bool,
    pub(super) backfill: Backfill,
    barrier: Option<Barrier>,
    findings: HashMap<Oid, Vec<Tid>>,
    pub(super) resting: HashMap<Oid, Rest>,
    sizes: HashMap<Oid, BatchSize>,
    touched: HashMap<Oid, std::ops::Range<u32>>,
    proofs_failed: u32,
    prove_again_at: Option<Instant>,
    pub(super) current: Option<Oid>,
    turn: usize,
    pub(super) background: bool,
    entered: HashSet<(Book, Oid)>,
    pub(super) refused: HashMap<SlotId, (u32, Instant)>,
    pub(super) looked_at_drained: bool,
    proofs_too_old: u32,
    over: Option<String>,
    ages: Ages,
    /// Of the present step.
    pub(super) pace: RefCell<Pace>,
}

/// A proof that finds stale rows so many times in a row is left for a while: something copies them.
const PROOFS_IN_A_ROW: u32 = 5;
/// A table at rest for longer than one that is busy, and a barrier that waits so long, keep later
/// rotations out of the wave no more.
const LONG: Duration = Duration::from_secs(1);
const LONG_BUSY: u32 = 10;
const LONG_BARRIER: Duration = Duration::from_secs(60);

impl Drainer {
    /// For one table, or for all; `proves` also makes the proof.
    pub fn new(only: Option<Oid>, proves: bool) -> Drainer {
        sql::keep_statements();
        Drainer {
            only,
            proves,
            backfill: Backfill::default(),
            barrier: None,
            findings: HashMap::new(),
            resting: HashMap::new(),
            sizes: HashMap::new(),
            touched: HashMap::new(),
            proofs_failed: 0,
            prove_again_at: None,
            current: None,
            turn: 0,
            background: false,
            entered: HashSet::new(),
            refused: HashMap::new(),
            looked_at_drained: false,
            proofs_too_old: 0,
            over: None,
            ages: Ages::default(),
            pace: RefCell::new(Pace::of_step(None)),
        }
    }

    /// As the worker does it: at the pace of the settings, and it also rotates keys that have
    /// passed their longest life.
    pub fn in_background(mut self) -> Drainer {
        self.background = true;
        self
    }

    /// Begins with a table at rest at which workers have died so often.
    pub fn suspect(&mut self, table: Oid, deaths: u32) {
        let wait = rekey_core::schedule::backoff_ms(deaths, table.to_u32().into());
        let until = Instant::now() + Duration::from_millis(wait);
        let rest = Rest {
            failures: deaths,
            busy: 0,
            until,
            why: "a worker died at it".to_string(),
        };
        self.resting.insert(table, rest);
    }

    /// The table that the last step worked on.
    pub fn current(&self) -> Option<Oid> {
        self.current
    }

    /// What fails from here on is the fault of no table, until one is worked on.
    pub fn blame_nobody(&mut self) {
        self.current = None;
    }

    /// Does the next thing, in the caller's transaction, which it then commits.
    pub fn step(&mut self) -> Result<Step> {
        self.current = None;
        self.pace = RefCell::new(Pace::of_step(self.limits()));
        failpoint::reach("step.begun")?;
        self.take_turns()
    }

    /// The next thing of a rotation, or a rotation by age.
    pub(super) fn drain(&mut self) -> Result<Step> {
        // What the backfill has looked at is not to blame for what follows.
        self.current = None;
        shared::working_on(0);
        if self.background
            && let Some(slot) = self.ages.rotate()?
        {
            return Ok(Step::Worked(Worked {
                what: format!("rotated a key by age to slot {slot}"),
                ..Worked::default()
            }));
        }
        let step = self.drain_slots()?;
        Ok(first_of(self.ages.put_off(), step))
    }

    /// The next thing of the rotations that are committed.
    fn drain_slots(&mut self) -> Result<Step> {
        let (leaves, troubles) = registry::leaves()?;
        let mut slots = wave::targets()?;
        // Where nothing at all is registered nobody has said where values are, and a proof would
        // be an empty phrase. A registered table that has no partition holds nothing.
        let silent = leaves.is_empty() && read::registered_columns()?.is_empty();
        if slots.is_empty() || silent {
            return self.afterwards(&leaves, &troubles);
        }
        let all = slots.len();
        slots.truncate(wave::under_way(&slots, self.over.as_deref())?);
        let later = slots.len() < all;
        let wave = wave::name(&slots);
        self.pace.borrow_mut().rest();
        let mut soonest: Option<(Instant, String)> = None;
        let mut stuck = false;
        // Tables take turns: one that is large or slow does not keep the others waiting.
        self.turn = self.turn.wrapping_add(1);
        let first = self.turn % leaves.len().max(1);
        for leaf in leaves[first..].iter().chain(&leaves[..first]) {
            if self.only.is_some_and(|only| !covers(only, leaf.table)) {
                continue;
            }
            if let Some(rest) = self.resting.get(&leaf.table)
                && rest.until > Instant::now()
            {
                stuck |= rest.until > Instant::now() + LONG || rest.busy > LONG_BUSY;
                if soonest.as_ref().is_none_or(|(at, _)| rest.until < *at) {
                    soonest = Some((rest.until, rest.why.clone()));
                }
                continue;
            }
            match self.visit(leaf, &wave) {
                Ok(Some(worked)) => return Ok(Step::Worked(worked)),
                Ok(None) => self.pace.borrow_mut().rest(),
                Err(Unable::Error(error)) => return Err(error),
                Err(Unable::Paused(why)) => {
                    // resume() wakes the worker; by hand nobody waits for it.
                    let at = Instant::now() + Duration::from_secs(60);
                    stuck = true;
                    if soonest.is_none() {
                        soonest = Some((at, why));
                    }
                }
                Err(Unable::Busy(why)) => {
                    let at = self.rest(leaf.table, &why, true)?;
                    stuck |= self.resting[&leaf.table].busy > LONG_BUSY;
                    soonest = Some((at, why));
                }
                Err(Unable::Refused(why)) => {
                    let at = self.rest(leaf.table, &why, false)?;
                    stuck = true;
                    soonest = Some((at, why));
                }
            }
        }
        let ends_here = soonest.is_none() && (!self.proves || self.only.is_some());
        if later && (stuck || ends_here) {
            return Ok(self.let_join(&wave));
        }
        if let Some((at, why)) = soonest {
            return Ok(Step::until(at, why));
        }
        self.current = None;
        if !self.proves {
            return Ok(Step::Idle(None));
        }
        self.prove(&leaves, &troubles, &slots, &wave, later)
    }

    /// The wave comes to no end for now: later rotations join it.
    fn let_join(&mut self, wave: &str) -> Step {
        self.over = Some(wave.to_string());
        Step::Worked(Worked {
            what: "later rotations join".to_string(),
            ..Worked::default()
        })
    }

    /// Takes a table out of turn for a while after an error; the worker calls it when a step's
    /// transaction has failed.
    pub fn rest(&mut self, table: Oid, why: &str, busy: bool) -> Result<Instant> {
        let before = self.resting.get(&table);
        let (mut failures, mut times) = before.map_or((0, 0), |rest| (rest.failures, rest.busy));
        let wait = if busy {
            times += 1;
            u64::from(times.min(10)) * 100
        } else {
            // What somebody else's locks have cost before is not its fault.
            (failures, times) = (failures + 1, 0);
            rekey_core::schedule::backoff_ms(failures, table.to_u32().into())
        };
        let until = Instant::now() + Duration::from_millis(wait);
        let rest = Rest {
            failures,
            busy: times,
            until,
            why: why.to_string(),
        };
        self.resting.insert(table, rest);
        work::put_off(table, why)?;
        Ok(until)
    }

    /// Before the worker enters a table for the first time it says so, in a transaction of its own
    /// that is to be committed now: true. If it dies there, and the server with it, the next worker
    /// lets the table rest, longer each time, so that one table does not keep the server restarting.
    pub(super) fn announce(&mut self, book: Book, table: Oid) -> std::result::Result<bool, Unable> {
        if !self.background || !self.entered.insert((book, table)) {
            return Ok(false);
        }
        let deaths = work::begin_attempt(book, table)?;
        if deaths == 0 {
            return Ok(true);
        }
        self.suspect(table, deaths - 1);
        Err(Unable::Refused("a worker died at it".to_string()))
    }

    /// In the background a table that waits for vacuum is left alone: it rests, the others go on.
    pub(super) fn refuse_bloated(&self, table: Oid) -> std::result::Result<(), Unable> {
        if !self.background {
            return Ok(());
        }
        match throttle::obstacle(table)? {
            Some(why) => Err(Unable::Busy(why.to_string())),
            None => Ok(()),
        }
    }

    /// One batch of a table; None when its pass is complete.
    fn visit(&mut self, leaf: &Leaf, wave: &str) -> std::result::Result<Option<Worked>, Unable> {
        self.current = Some(leaf.table);
        shared::working_on(leaf.table.to_u32());
        refuse_paused(leaf)?;
        let known = work::pass(Book::Rotation, leaf.table)?
            .filter(|pass| pass.wave == wave && pass.left == 0);
        let due = work::due(leaf.table)?;
        let found = self.findings.contains_key(&leaf.table);
        if known.is_some() && due.is_empty() && !found {
            // Nobody but a rewrite changes the file, and the proof looks at that.
            let file = Table::open_for_scan(leaf.table).map(|table| table.file());
            if file == known.map(|pass| pass.file) {
                return Ok(None);
            }
        }
        if self.announce(Book::Rotation, leaf.table)? {
            return Ok(Some(Worked {
                what: format!("{}: begins", table::name(leaf.table)?),
                table: Some(leaf.table),
                rested: self.pace.borrow().rested(),
                ..Worked::default()
            }));
        }
        self.refuse_bloated(leaf.table)?;
        self.pace.borrow_mut().rest();
        let begin = Instant::now();
        let table = enter(leaf)?;
        self.pace.borrow_mut().locked();
        let pass = self.pass(&table, wave)?;
        let name = table::name(leaf.table)?;
        self.pace.borrow_mut().rest();
        let size = self.sizes.entry(leaf.table).or_default();
        let mut report;
        let mut seen = 0;
        let (mut cursor, mut left) = (pass.cursor, pass.left);
        if !due.is_empty() {
            report = retry_rows(leaf, &table, &due, &self.pace)?;
        } else if left > 0 {
            if let Some(earlier) = self.touched.remove(&leaf.table) {
                table.reclaim(earlier);
            }
            let blocks = table.blocks();
            if cursor >= blocks {
                cursor = 0;
            }
            let count = size.blocks().min(left).min(blocks - cursor.min(blocks));
            let source = Source::Blocks(cursor..cursor + count, size.rows() as usize);
            self.pace.borrow_mut().rest();
            report = rewrite::rewrite(leaf, &table, &source, &self.pace)?;
            let next = report.stopped_at.unwrap_or(cursor + count);
            if report.rewritten > 0 {
                self.touched.insert(leaf.table, cursor..next);
            }
            seen = next - cursor;
            cursor = next;
            left = if count == 0 { 0 } else { left - seen };
        } else {
            let places = self.findings.remove(&leaf.table).unwrap_or_default();
            let count = places.len().min(size.rows() as usize);
            let (now, later) = places.split_at(count);
            report = rewrite::rewrite(leaf, &table, &Source::Places(now), &self.pace)?;
            if !later.is_empty() {
                self.findings.insert(leaf.table, later.to_vec());
            }
        }
        self.pace.borrow_mut().rest();
        let mut unlisted = 0;
        for failure in &report.failed {
            unlisted += i64::from(!work::quarantine(leaf.table, failure)?);
        }
        let done = Done {
            unlisted,
            scanned: report.scanned,
            rewritten: report.rewritten,
            skipped: report.moved + i64::try_from(report.locked.len()).unwrap_or(0),
        };
        failpoint::reach("batch.rewritten")?;
        work::advance(Book::Rotation, leaf.table, cursor, left, &done)?;
        failpoint::reach("batch.advanced")?;
        if self.background {
            session::commit_lazily();
        }
        let took = begin.elapsed();
        size.learn(
            seen,
            u32::try_from(report.found).unwrap_or(u32::MAX),
            u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
            pace::aim_ms(self.background),
        );
        if report.slow {
            self.rest(leaf.table, "code of its owner takes too long", false)?;
        } else {
            self.resting.remove(&leaf.table);
        }
        // Those of the quarantine have their next try there.
        if !report.locked.is_empty() && due.is_empty() {
            let later = self.findings.entry(leaf.table).or_default();
            later.append(&mut report.locked);
            if left == 0 {
                self.rest(leaf.table, "rows of it are locked", true)?;
            }
        }
        let total = f64::from(table.blocks().max(1));
        Ok(Some(Worked {
            what: format!(
                "{name}: {:.0} %",
                100.0 * (1.0 - f64::from(left) / total).max(0.0)
            ),
            table: Some(leaf.table),
            rewritten: report.rewritten,
            rested: self.pace.borrow().rested(),
        }))
    }

    /// The pass over a table for this wave. One that was under way goes on from its cursor, once
    /// round, when another rotation joins; a new file begins at its first block.
    fn pass(&mut self, table: &Table, wave: &str) -> Result<Pass> {
        let known = work::pass(Book::Rotation, table.oid())?;
        match known {
            Some(pass) if pass.file == table.file() && pass.wave == wave => Ok(pass),
            other => {
                let same_file = other.as_ref().is_some_and(|pass| pass.file == table.file());
                if other.is_some() && !same_file {
                    work::forget_places(table.oid())?;
                    self.findings.remove(&table.oid());
                }
                self.touched.remove(&table.oid());
                let cursor = other.filter(|_| same_file).map_or(0, |pass| pass.cursor);
                let pass = Pass {
                    file: table.file(),
                    wave: wave.to_string(),
                    cursor,
                    left: table.blocks(),
                };
                work::begin_pass(Book::Rotation, table.oid(), &pass)?;
                failpoint::reach("pass.begun")?;
                Ok(pass)
            }
        }
    }

    /// Barrier and proof, once every pass is complete.
    fn prove(
        &mut self,
        leaves: &[Leaf],
        troubles: &[registry::Trouble],
        slots: &[SlotRow],
        wave: &str,
        later: bool,
    ) -> Result<Step> {
        let all = Oid::INVALID;
        if later && !troubles.is_empty() {
            return Ok(self.let_join(wave));
        }
        if let Some(trouble) = troubles.first() {
            let why = format!("{}: {}", trouble.table, trouble.what);
            work::note(all, "", &why)?;
            return self.afterwards(leaves, troubles);
        }
        if let Some(at) = self.prove_again_at
            && at > Instant::now()
        {
            if later {
                return Ok(self.let_join(wave));
            }
            let why = "the last proofs had to be given up; the next one comes".to_string();
            return Ok(Step::until(at, why));
        }
        if !self
            .barrier
            .as_ref()
            .is_some_and(|barrier| barrier.serves(wave))
        {
            self.barrier = Some(Barrier::capture(wave, slots)?);
            failpoint::reach("barrier.captured")?;
        }
        if let Some(barrier) = &mut self.barrier
            && let Some(who) = barrier.waits_for()?
        {
            if later && barrier.captured_at.elapsed() > LONG_BARRIER {
                return Ok(self.let_join(wave));
            }
            let why = format!("waits for {who}");
            work::note(all, "barrier", &why)?;
            return Ok(Step::Wait(Duration::from_millis(200), why));
        }
        failpoint::reach("barrier.passed")?;
        let quarantine = Quarantine::of(leaves)?;
        let free: Vec<SlotRow> = slots
            .iter()
            .filter(|slot| !quarantine.holds(slot.id))
            .cloned()
            .collect();
        if free.is_empty() && later {
            return Ok(self.let_join(wave));
        }
        if free.is_empty() {
            let mut rows = 0;
            for leaf in leaves {
                rows += work::quarantined(leaf.table)?;
            }
            let why = format!("{rows} rows are under quarantine");
            work::note(all, "proof", &why)?;
            return self.afterwards(leaves, troubles);
        }
        let limits = self.limits().filter(|_| self.proofs_too_old == 0);
        let verdict = proof::prove(leaves, &free, limits)?;
        let what = match verdict {
            Verdict::Clean(proof) => {
                let (drained, held) = drain(&free, &proof)?;
                work::note(all, "done", "")?;
                if held > 0 {
                    self.prove_again_at = Some(Instant::now() + Duration::from_secs(10));
                }
                self.proofs_failed = 0;
                self.proofs_too_old = 0;
                self.keep_passes(slots, wave)?;
                format!("proved: {drained} of {} slots are drained", slots.len())
            }
            Verdict::Stale(found, _) => {
                self.proofs_failed += 1;
                if self.proofs_failed >= PROOFS_IN_A_ROW {
                    self.proofs_failed = 0;
                    self.prove_again_at = Some(Instant::now() + Duration::from_secs(30));
                }
                let count: usize = found.iter().map(|(_, places)| places.len()).sum();
                for (table, _) in &found {
                    work::count_unlisted_again(*table)?;
                }
                self.findings = found.into_iter().collect();
                if let Some(only) = self.only {
                    self.findings.retain(|table, _| covers(only, *table));
                    if self.findings.is_empty() {
                        let why = format!("{count} stale rows remain in other tables");
                        return Ok(Step::Wait(Duration::ZERO, why));
                    }
                }
                format!("the proof found {count} stale rows")
            }
            Verdict::Changed(table) => {
                self.proofs_failed += 1;
                if self.proofs_failed >= PROOFS_IN_A_ROW {
                    self.proofs_failed = 0;
                    self.prove_again_at = Some(Instant::now() + Duration::from_secs(30));
                }
                format!("{table} changed during the proof")
            }
            Verdict::Unfinished(why) => {
                self.prove_again_at = Some(Instant::now() + Duration::from_secs(10));
                work::note(all, "proof", &why)?;
                format!("no proof: {why}")
            }
            Verdict::TooOld(why) => {
                // Once more without rests; then whoever looks at the progress has to decide.
                self.proofs_too_old += 1;
                if self.proofs_too_old > 1 {
                    self.prove_again_at = Some(Instant::now() + Duration::from_secs(600));
                }
                work::note(all, "proof", &why)?;
                if later {
                    return Ok(self.let_join(wave));
                }
                format!("no proof: {why}")
            }
        };
        Ok(Step::Worked(Worked {
            what,
            ..Worked::default()
        }))
    }

    /// What its pace keeps to, in the background.
    pub(super) fn limits(&self) -> Option<Limits> {
        self.background.then(throttle::limits)
    }

    /// What is left of a wave when some of its slots are drained needs no other pass and no other
    /// barrier.
    fn keep_passes(&mut self, slots: &[SlotRow], wave_before: &str) -> Result<()> {
        let left = wave::targets()?;
        let is_of_it = |slot: &SlotRow| {
            slots
                .iter()
                .any(|s| (s.id, s.superseded_at) == (slot.id, slot.superseded_at))
        };
        if !left.is_empty() && left.iter().all(is_of_it) {
            let wave = wave::name(&left);
            work::rename_wave(wave_before, &wave)?;
            if let Some(barrier) = &mut self.barrier {
                barrier.goes_on_for(&wave);
            }
        }
        Ok(())
    }
}

/// Entries whose row is well again, or gone, leave the quarantine. So do those of other envelopes
/// than the ones that fail in their place now: what is due must not stay so. A row that somebody
/// has locked has not been tried: it may yet be the one that the entry is about.
pub(super) fn retry_rows(
    leaf: &Leaf,
    table: &Table,
    due: &[Tid],
    pace: &RefCell<Pace>,
) -> Result<Report> {
    let report = rewrite::rewrite(leaf, table, &Source::Places(due), pace)?;
    for tid in due {
        if report.locked.contains(tid) {
            work::try_later(leaf.table, *tid)?;
            continue;
        }
        let failure = report.failed.iter().find(|failure| failure.tid == *tid);
        let heads = failure.map_or(&[][..], |failure| &failure.heads);
        work::resolve(leaf.table, *tid, heads)?;
    }
    Ok(report)
}

/// Whether the leaf belongs to the table that was asked for.
pub(super) fn covers(only: Oid, leaf: Oid) -> bool {
    only == leaf || crate::ffi::relation::leaves(only).contains(&leaf)
}

/// Marks the proved slots as drained: those that are what they were when the proof began, and whose
/// key no other session holds. Returns how many, and how many are left since a key is held.
fn drain(slots: &[SlotRow], proof: &str) -> Result<(usize, usize)> {
    let free = lock_free(slots)?;
    let (mut drained, mut held) = (0, 0);
    for slot in slots {
        if !free.contains(&slot.key_name) {
            held += 1;
            continue;
        }
        let now = lifecycle::slot(slot.id.as_i64())?;
        if now.state != SlotState::Previous || now.superseded_at != slot.superseded_at {
            continue;
        }
        work::keep_proof(slot.id, proof)?;
        write::transition(&now, SlotState::Drained, "drain", "")?;
        failpoint::reach("slot.drained")?;
        drained += 1;
    }
    Ok((drained, held))
}

/// Locks the keys of the slots that nobody else holds.
pub(super) fn lock_free(slots: &[SlotRow]) -> Result<HashSet<String>> {
    let names: Vec<&str> = slots.iter().map(|slot| slot.key_name.as_str()).collect();
    write::lock_free_keys(&names)
}
