//! Who starts whom.
//!
//! The launcher is started by the postmaster when recovery has ended. It is connected to no
//! database, so that it never stands in the way of DROP DATABASE. It visits each database once at
//! its start and after a change of rekey.databases, else only those that a committed change has
//! posted on the board (ffi::shared) or whose time has come, by starting a worker there, at most
//! rekey.max_workers at once. Otherwise it sleeps on its latch, without a timeout. A worker ends
//! when nothing is left to do; one that fails is started again after a back-off. What a step fails
//! with is logged by SQLSTATE: the text may quote values.

use std::time::Duration;

use pgrx::pg_sys::{self, Oid};
use rekey_core::schedule::{self, Facts};

use super::drain::Drainer;
use super::step::{Step, Worked};
use super::throttle;
use crate::catalog::work;
use crate::ffi::background::{self, Started};
use crate::ffi::{hooks, scan, session, shared, timer};
use crate::{guc, lifecycle, root_key};

/// The launcher's process.
#[unsafe(no_mangle)]
#[pgrx::pg_guard]
pub extern "C-unwind" fn pg_rekey_launcher_main(_arg: pg_sys::Datum) {
    background::connect_to_none();
    shared::launcher_is(session::process());
    let mut running: Vec<(u32, Started)> = Vec::new();
    let mut waiting = Vec::new();
    let mut was_on = true;
    let mut allowed = guc::databases();
    loop {
        pgrx::check_for_interrupts!();
        running.retain(|(database, worker)| {
            let ended = worker.ended();
            if ended {
                take_leave(*database);
            }
            !ended
        });
        let on = guc::worker();
        let were_allowed = std::mem::replace(&mut allowed, guc::databases());
        // The wish of a database that was not on the list is forgotten.
        if on && (!was_on || allowed != were_allowed) {
            shared::want_everything();
        }
        was_on = on;
        let sleep = if on {
            launch(&mut running, &mut waiting, allowed.as_deref())
        } else {
            None
        };
        background::sleep(sleep);
    }
}

/// In microseconds.
const HOUR: i64 = 3_600_000_000;

/// Starts what is wanted and allowed; says when to look again. `waiting` are the databases to visit
/// for which the board had no room: the end of a worker makes some.
fn launch(
    running: &mut Vec<(u32, Started)>,
    waiting: &mut Vec<u32>,
    allowed: Option<&[String]>,
) -> Option<Duration> {
    if shared::everything() {
        let Ok(all) = background::transaction(|| Ok(background::databases())) else {
            shared::want_everything();
            return Some(Duration::from_secs(1));
        };
        *waiting = all
            .into_iter()
            .filter(|(_, name)| allowed.is_none_or(|list| list.contains(name)))
            .map(|(database, _)| database)
            .collect();
    }
    waiting.retain(|database| !shared::want(*database));
    let now = background::now();
    let mut soonest: Option<i64> = None;
    for entry in shared::entries() {
        let due = entry.due != 0 && entry.due <= now;
        let mut later = (entry.due > now).then_some(entry.due);
        if (entry.wanted || due) && !running.iter().any(|(db, _)| *db == entry.database) {
            let barred = shared::is_barred(entry.database);
            // No back-off is longer than an hour: the clock was wrong when it was set.
            let resting = entry.failures > 0 && entry.due > now && entry.due - now <= HOUR;
            if !barred && !resting && running.len() < guc::max_workers() {
                if !may_visit(entry.database, allowed) {
                    shared::forget(entry.database);
                    if !waiting.is_empty() {
                        soonest = Some(now);
                    }
                    continue;
                }
                shared::change(entry.database, |entry| {
                    entry.wanted = false;
                    entry.due = 0;
                    entry.finished = false;
                    entry.sent_away = false;
                    entry.starved = false;
                });
                match Started::start(Oid::from_u32(entry.database)) {
                    Some(worker) => running.push((entry.database, worker)),
                    None => {
                        // All of max_worker_processes are taken: look again in a while.
                        let again = now + 5_000_000;
                        shared::change(entry.database, |entry| {
                            entry.due = again;
                            entry.starved = true;
                        });
                        later = Some(again);
                    }
                }
            }
        }
        soonest = [soonest, later].into_iter().flatten().min();
    }
    soonest.map(|at| Duration::from_micros(u64::try_from(at - now).unwrap_or(0)))
}

/// Whether the database is still there and on the list.
fn may_visit(database: u32, allowed: Option<&[String]>) -> bool {
    let Ok(all) = background::transaction(|| Ok(background::databases())) else {
        return true; // nobody knows: a worker that finds no database ends
    };
    let name = all.into_iter().find(|(oid, _)| *oid == database);
    name.is_some_and(|(_, name)| allowed.is_none_or(|list| list.contains(&name)))
}

/// A worker has ended: well, or to be tried again after a back-off.
fn take_leave(database: u32) {
    shared::change(database, |entry| {
        entry.worker = 0;
        let table = std::mem::take(&mut entry.table);
        if std::mem::take(&mut entry.sent_away) {
            entry.wanted = true;
            return;
        }
        if entry.finished {
            return;
        }
        if table != 0 {
            // The table rests, not the database.
            entry.blame(table);
            entry.wanted = true;
        } else {
            entry.failures += 1;
            let wait = schedule::backoff_ms(entry.failures, u64::from(database));
            entry.wanted = true;
            entry.due = background::now() + i64::try_from(wait * 1000).unwrap_or(i64::MAX);
        }
    });
}

/// A worker's process.
#[unsafe(no_mangle)]
#[pgrx::pg_guard]
pub extern "C-unwind" fn pg_rekey_worker_main(arg: pg_sys::Datum) {
    let database = Oid::from_u32(u32::try_from(arg.value() & 0xffff_ffff).unwrap_or(0));
    shared::change(database.to_u32(), |entry| {
        entry.worker = session::process();
    });
    background::connect_to(database);
    hooks::never_wake();
    timer::expendable();
    visit();
    background::report("");
}

/// Failures of a step in a row after which the process ends, to begin afresh after a back-off.
const FAILURES: u32 = 5;

/// Works until nothing is left. What is due later stands on the board then.
fn visit() {
    let database = background::database();
    let there = || {
        let there = background::transaction(|| {
            let table = scan::relation(c"registered_column");
            Ok(table.is_some_and(scan::belongs_to_us))
        });
        there.unwrap_or(false)
    };
    while !there() {
        // Wanted again meanwhile: by the commit of CREATE EXTENSION, perhaps.
        if shared::finish(database, None) {
            return;
        }
    }
    // At the start of the server every database is visited: a keyring that is well-formed but not
    // this database's is named in the log then, not only on use.
    let _ = background::transaction(|| {
        if let Err(error) = lifecycle::try_active_root_key() {
            let name = session::database_name();
            root_key::warn(&error, &format!(" in database \"{name}\""));
        }
        Ok(())
    });
    let mut drainer = Drainer::new(None, true).in_background();
    for entry in shared::entries() {
        let suspects = entry.suspects.iter().filter(|(table, _)| *table != 0);
        for (table, deaths) in suspects.filter(|_| entry.database == database) {
            drainer.suspect(Oid::from_u32(*table), *deaths);
        }
    }
    let mut throttle = throttle::Gauge::default();
    let mut failures = 0;
    loop {
        // Not only when it sleeps: without rests it never does.
        background::read_settings();
        if !guc::worker() {
            break;
        }
        let wal = background::wal_written();
        let begin = std::time::Instant::now();
        let step = background::transaction(|| drainer.step());
        shared::working_on(0);
        let took = begin.elapsed();
        match step {
            Ok(Step::Worked(worked)) => {
                failures = 0;
                background::report(&worked.what);
                let facts = Facts {
                    took,
                    // The scan of a proof has rested already, but not for what it wrote.
                    rested: worked.table.map_or(took, |_| worked.rested),
                    wal_bytes: background::wal_written() - wal,
                    ..Facts::default()
                };
                rest(&worked, facts, &mut throttle);
            }
            Ok(Step::Wait(time, why)) => {
                failures = 0;
                background::report(&why);
                // A wish that came during a scan has roused that one's rests, not this sleep.
                if !shared::is_wanted(database) {
                    background::sleep(Some(time.max(Duration::from_millis(50))));
                }
                shared::take_wish(database);
            }
            Ok(Step::Idle(due)) => {
                let due = due.map(|s| background::now() + s.clamp(5, 86_400 * 365) * 1_000_000);
                if shared::finish(database, due) {
                    return;
                }
            }
            Err(failure) => {
                failures += 1;
                pgrx::log!(
                    "pg_rekey worker: a step failed with SQLSTATE {}",
                    failure.sqlstate
                );
                let table = drainer.current();
                let rested = table.map(|table| {
                    let why = format!("failed with SQLSTATE {}", failure.sqlstate);
                    background::transaction(|| drainer.rest(table, &why, false).map(|_| ()))
                });
                if rested.is_none() || failures >= FAILURES {
                    return;
                }
            }
        }
    }
    // Switched off: not a failure, and no wish counts.
    while !shared::finish(database, None) {}
}

/// A rest of so long is worth a note.
const LONG_REST: Duration = Duration::from_secs(1);

/// Rests after a batch: once for the work just done, and for as long as an alarm lasts.
fn rest(worked: &Worked, mut facts: Facts, throttle: &mut throttle::Gauge) {
    loop {
        let read = background::transaction(|| throttle.read(&mut facts));
        let Some((time, brake)) = read
            .ok()
            .and_then(|()| schedule::rest(&facts, &throttle::limits()))
        else {
            return;
        };
        if time >= LONG_REST {
            background::report(&format!("{}; rests: {}", worked.what, brake.words()));
            let table = worked.table.unwrap_or(pg_sys::InvalidOid);
            // For people only: that it could not be written stops nothing, and nobody waits for it.
            let _ = background::transaction(|| {
                session::commit_lazily();
                work::put_off(table, brake.words())
            });
        }
        background::sleep(Some(time));
        if !brake.is_alarm() || !guc::worker() {
            return;
        }
        facts.took = Duration::ZERO;
        facts.rested = Duration::ZERO;
        facts.wal_bytes = 0;
    }
}
