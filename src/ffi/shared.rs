//! The board on which sessions, launcher and workers leave word for each other: which databases
//! have work, who works there, who must keep out.
//!
//! In shared memory, hence under shared_preload_libraries only; without it every call does nothing.
//! No key material is ever here. Invariant: a wish that was posted is either taken by a worker that
//! looks at the database afterwards, or still there.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use pgrx::lwlock::PgLwLock;
use pgrx::prelude::*;
use pgrx::shmem::PGRXSharedMemory;
use pgrx::{pg_shmem_init, pg_sys};

/// Databases that the board has room for. Those of which there is nothing to remember make room for
/// others. Few in a debug build, so that a test can fill it.
const ROOM: usize = if cfg!(debug_assertions) { 16 } else { 1024 };

/// What is known of one database.
#[derive(Clone, Copy, Default)]
pub struct Entry {
    /// Database; 0 is a free place.
    pub database: u32,
    /// Somebody wants it looked at.
    pub wanted: bool,
    /// Process that works there; 0 for none.
    pub worker: i32,
    /// The last visit ended as it should.
    pub finished: bool,
    /// Its worker was told to make room for a session: that it ends is no failure.
    pub sent_away: bool,
    /// When it is due again, a TimestampTz; 0 for never.
    pub due: i64,
    /// Visits in a row that failed.
    pub failures: u32,
    /// No process was free for its worker at the last try.
    pub starved: bool,
    /// Table that the worker works on; 0 for none.
    pub table: u32,
    /// Tables at which workers have died, with how often.
    pub suspects: [(u32, u32); SUSPECTS],
    /// The scan of a proof that is under way.
    pub scan: Scan,
}

/// How far the scan of a proof is.
#[derive(Clone, Copy, Default)]
pub struct Scan {
    /// When its snapshot was taken, a TimestampTz; 0 for no scan.
    pub since: i64,
    /// Table.
    pub table: u32,
    /// Blocks of it that were looked at.
    pub done: u32,
    /// Blocks of it.
    pub blocks: u32,
}

/// Tables of one database that are remembered as suspects.
const SUSPECTS: usize = 8;

impl Entry {
    /// Nothing is to be remembered of the database.
    fn is_idle(&self) -> bool {
        let quiet = self.due == 0 && self.failures == 0;
        self.finished && quiet && !self.wanted && self.worker == 0
    }

    /// The worker is gone in the middle of a table: it rests longer each time.
    pub fn blame(&mut self, table: u32) {
        let at = self.suspects.iter().position(|(known, _)| *known == table);
        match at.or_else(|| self.suspects.iter().position(|(known, _)| *known == 0)) {
            Some(at) => self.suspects[at] = (table, self.suspects[at].1 + 1),
            None => self.suspects[0] = (table, 1),
        }
    }
}

/// Bars that stand at the same time; a further one is not heeded.
const BARS: usize = 64;

/// The board.
#[derive(Clone, Copy)]
pub struct Board {
    launcher: i32,
    everything: bool,
    /// Databases that sessions need for themselves, each with its session; 0 is a free place.
    bars: [(u32, i32); BARS],
    entries: [Entry; ROOM],
}

impl Default for Board {
    fn default() -> Self {
        Board {
            launcher: 0,
            everything: false,
            bars: [(0, 0); BARS],
            entries: [Entry::default(); ROOM],
        }
    }
}

// SAFETY: plain data without pointers.
unsafe impl PGRXSharedMemory for Board {}

// SAFETY: the name is used once.
static BOARD: PgLwLock<Board> = unsafe { PgLwLock::new(c"pg_rekey board") };
static THERE: AtomicBool = AtomicBool::new(false);

/// Asks for the memory. Called once, while the libraries are preloaded.
pub fn init() {
    pg_shmem_init!(BOARD);
    THERE.store(true, Relaxed);
}

fn with<R>(body: impl FnOnce(&mut Board) -> R) -> Option<R> {
    THERE.load(Relaxed).then(|| body(&mut BOARD.exclusive()))
}

impl Board {
    fn entry(&mut self, database: u32) -> Option<&mut Entry> {
        let entries = &mut self.entries;
        let at = entries
            .iter()
            .position(|e| e.database == database)
            .or_else(|| entries.iter().position(|e| e.database == 0))
            .or_else(|| entries.iter().position(Entry::is_idle))?;
        if self.entries[at].database != database {
            self.entries[at] = Entry {
                database,
                ..Entry::default()
            };
        }
        Some(&mut self.entries[at])
    }
}

/// Has a database looked at soon. Never fails, never waits long: called after a commit.
pub fn wake(database: pg_sys::Oid) {
    let told = with(|board| {
        let launcher = board.launcher;
        let worker = board.entry(database.to_u32()).map(|entry| {
            entry.wanted = true;
            entry.worker
        });
        // No room: the launcher knows the databases by itself.
        board.everything |= worker.is_none();
        (launcher, worker.unwrap_or(0))
    });
    if let Some((launcher, worker)) = told {
        rouse(launcher);
        rouse(worker);
    }
}

/// Sets the latch of a process, if it is still there.
fn rouse(process: i32) {
    if process <= 0 {
        return;
    }
    // SAFETY: a lookup under its own lock; a PGPROC is never unmapped, and a latch set for a
    // process that has just ended wakes its successor once for nothing.
    unsafe {
        let proc_ = pg_sys::BackendPidGetProc(process);
        if !proc_.is_null() {
            pg_sys::SetLatch(&mut (*proc_).procLatch);
        }
    }
}

/// Whether a process is connected to the server.
pub fn is_alive(process: i32) -> bool {
    // SAFETY: a lookup under its own lock.
    process > 0 && unsafe { !pg_sys::BackendPidGetProc(process).is_null() }
}

/// Whether there is a board: whether the library was preloaded.
pub fn is_there() -> bool {
    THERE.load(Relaxed)
}

/// Whether the launcher is running.
pub fn has_launcher() -> bool {
    with(|board| board.launcher).is_some_and(is_alive)
}

/// The launcher takes its place. Workers of an earlier launcher end by themselves.
pub fn launcher_is(process: i32) {
    with(|board| {
        board.launcher = process;
        board.everything = true;
    });
}

/// Whether every database is to be visited; answers true once.
pub fn everything() -> bool {
    with(|board| std::mem::take(&mut board.everything)).unwrap_or(false)
}

/// Has every database visited.
pub fn want_everything() {
    with(|board| board.everything = true);
}

/// The launcher wants a database visited. False when the board has no room for it yet.
pub fn want(database: u32) -> bool {
    let entry = with(|board| board.entry(database).map(|entry| entry.wanted = true));
    entry.flatten().is_some()
}

/// All databases on the board.
pub fn entries() -> Vec<Entry> {
    with(|board| {
        let known = board.entries.iter().filter(|entry| entry.database != 0);
        known.copied().collect()
    })
    .unwrap_or_default()
}

/// Changes the entry of a database.
pub fn change(database: u32, change: impl FnOnce(&mut Entry)) {
    with(|board| board.entry(database).map(change));
}

/// Takes a database that is gone off the board.
pub fn forget(database: u32) {
    with(|board| {
        for entry in &mut board.entries {
            if entry.database == database {
                *entry = Entry::default();
            }
        }
    });
}

/// The worker of a database is done, unless somebody has wanted it again meanwhile: then it takes
/// the wish, and goes on.
pub fn finish(database: u32, due: Option<i64>) -> bool {
    with(|board| match board.entry(database) {
        Some(entry) => {
            if std::mem::take(&mut entry.wanted) {
                return false;
            }
            entry.due = due.unwrap_or(0);
            entry.finished = true;
            entry.failures = 0;
            entry.suspects = Default::default();
            true
        }
        None => true,
    })
    .unwrap_or(true)
}

/// Whether something has happened in a database since the wish for it was last taken.
pub fn is_wanted(database: u32) -> bool {
    let all = entries();
    all.iter().any(|e| e.database == database && e.wanted)
}

/// Takes the wish for a database.
pub fn take_wish(database: u32) {
    change(database, |entry| entry.wanted = false);
}

/// The worker of this process's database says which table it works on; 0 for none. In a session it
/// does nothing: only a worker is ever missed.
pub fn working_on(table: u32) {
    of_this_worker(|entry| entry.table = table);
}

/// The worker says how far its scan is.
pub fn scanning(scan: Scan) {
    of_this_worker(|entry| entry.scan = scan);
}

/// The scan that is under way in a database.
pub fn scan_in(database: u32) -> Option<Scan> {
    let entry = entries()
        .into_iter()
        .find(|entry| entry.database == database);
    entry.map(|entry| entry.scan).filter(|scan| scan.since != 0)
}

fn of_this_worker(change: impl Fn(&mut Entry)) {
    let process = super::session::process();
    with(|board| {
        let entries = &mut board.entries;
        entries
            .iter_mut()
            .filter(|entry| entry.worker == process)
            .for_each(change);
    });
}

/// Whether a session keeps workers out of a database.
pub fn is_barred(database: u32) -> bool {
    let bars = with(|board| board.bars).unwrap_or([(0, 0); BARS]);
    let mut here = bars.iter().filter(|(barred, _)| *barred == database);
    here.any(|(_, session)| is_alive(*session))
}

/// Keeps workers out of a database for as long as it lives, or until the process ends: a FATAL
/// error drops nothing.
pub struct Bar(u32);

impl Bar {
    /// Bars the database, ends its worker and waits until it is gone.
    pub fn put(database: pg_sys::Oid) -> Bar {
        lift_at_exit();
        let number = database.to_u32();
        let mine = (number, super::session::process());
        with(|board| {
            let free = board.bars.iter_mut().find(|(barred, _)| *barred == 0);
            free.map(|bar| *bar = mine)
        });
        let bar = Bar(number);
        loop {
            let worker = entries()
                .into_iter()
                .find(|entry| entry.database == number)
                .map_or(0, |entry| entry.worker);
            if !is_alive(worker) {
                return bar;
            }
            change(number, |entry| entry.sent_away = entry.worker == worker);
            // SAFETY: a process of this server, which BackendPidGetProc has just found.
            unsafe { libc::kill(worker, libc::SIGTERM) };
            super::session::sleep_ms(20);
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        lift(self.0);
    }
}

/// Takes a bar of this process off a database, and has it looked at.
fn lift(database: u32) {
    let mine = (database, super::session::process());
    with(|board| {
        let bar = board.bars.iter_mut().find(|bar| **bar == mine);
        bar.map(|bar| *bar = (0, 0))
    });
    wake(pg_sys::Oid::from_u32(database));
}

/// Has the bars that this process still holds lifted when it ends.
fn lift_at_exit() {
    #[pg_guard]
    unsafe extern "C-unwind" fn call(_code: std::ffi::c_int, _arg: pg_sys::Datum) {
        let process = super::session::process();
        for (database, _) in with(|board| board.bars)
            .into_iter()
            .flatten()
            .filter(|(database, session)| *database != 0 && *session == process)
        {
            lift(database);
        }
    }
    static TOLD: AtomicBool = AtomicBool::new(false);
    if !TOLD.swap(true, Relaxed) {
        // SAFETY: a callback of the right type; it runs while shared memory is still there.
        unsafe { pg_sys::before_shmem_exit(Some(call), pg_sys::Datum::null()) }
    }
}
