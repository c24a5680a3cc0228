//! Callbacks and hooks that PostgreSQL calls: invalidation, transaction end, process exit,
//! fork, logging and drops. Each only sets a flag or asks one question of another module.
//!
//! `init` runs once per library load, in the postmaster under preload: the callbacks are then
//! inherited by every backend. Invariant: an invalidation callback touches atomics only, since
//! it may arrive at any lock or catalog access, also in the middle of a cache fill.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering::Relaxed};

use pgrx::{pg_guard, pg_sys};

static GENERATION: AtomicU64 = AtomicU64::new(1);
static SEALING_EPOCH: AtomicU64 = AtomicU64::new(1);
static WATCHED: [AtomicU32; 4] = [const { AtomicU32::new(0) }; 4];
static RESOLVED: AtomicBool = AtomicBool::new(false);
static RESOLVING: AtomicBool = AtomicBool::new(false);
static WAKE: AtomicBool = AtomicBool::new(false);
static WAKE_NOW: AtomicBool = AtomicBool::new(false);
static NEVER_WAKE: AtomicBool = AtomicBool::new(false);
static NEW_DATABASE: AtomicU32 = AtomicU32::new(0);
static SECRET_STATEMENT: AtomicI64 = AtomicI64::new(0);

/// Counts the changes of our catalog, of roles and of memberships that this process has heard
/// of. Anything read under another generation is read again.
#[inline]
pub fn generation() -> u64 {
    GENERATION.load(Relaxed)
}

/// Counts transaction ends and forks: sealing state of another epoch is never used.
#[inline]
pub fn sealing_epoch() -> u64 {
    SEALING_EPOCH.load(Relaxed)
}

/// Begins a look-up of the catalog tables: until `watch` names them every change counts.
pub fn resolve() {
    RESOLVED.store(true, Relaxed);
    RESOLVING.store(true, Relaxed);
}

/// Names the catalog tables whose changes count.
pub fn watch(tables: [pg_sys::Oid; 4]) {
    for (slot, table) in WATCHED.iter().zip(tables) {
        slot.store(table.to_u32(), Relaxed);
    }
    RESOLVING.store(false, Relaxed);
}

/// Whether the watched tables are still those that `watch` named.
pub fn watching() -> bool {
    RESOLVED.load(Relaxed)
}

/// Marks the client's current statement as one that must not reach the log.
#[inline]
pub fn keep_statement_out_of_log() {
    SECRET_STATEMENT.store(super::session::statement(), Relaxed);
}

/// Has the background worker look at this database once this transaction has committed.
pub fn wake_on_commit() {
    WAKE.store(true, Relaxed);
}

/// The worker looks again by itself: what it commits wakes nobody.
pub fn never_wake() {
    NEVER_WAKE.store(true, Relaxed);
}

/// Registers everything. Called once, from `_PG_init`.
pub fn init() {
    // SAFETY: each function takes a callback of the right type that lives as long as the
    // process. The hooks are chained: the earlier one is kept and called.
    unsafe {
        pg_sys::CacheRegisterRelcacheCallback(Some(relcache_changed), pg_sys::Datum::null());
        for cache in [
            pg_sys::SysCacheIdentifier::AUTHMEMMEMROLE,
            pg_sys::SysCacheIdentifier::AUTHOID,
            // pg_database_owner is a role whose member is in pg_database.
            pg_sys::SysCacheIdentifier::DATABASEOID,
        ] {
            pg_sys::CacheRegisterSyscacheCallback(
                cache as c_int,
                Some(roles_changed),
                pg_sys::Datum::null(),
            );
        }
        pg_sys::RegisterXactCallback(Some(transaction_event), std::ptr::null_mut());
        pg_sys::RegisterResourceReleaseCallback(Some(resources_released), std::ptr::null_mut());
        libc::pthread_atfork(None, None, Some(forked));
        NEXT_EMIT_LOG = pg_sys::emit_log_hook;
        pg_sys::emit_log_hook = Some(emit_log);
        NEXT_UTILITY = pg_sys::ProcessUtility_hook;
        pg_sys::ProcessUtility_hook = Some(process_utility);
        NEXT_OBJECT_ACCESS = pg_sys::object_access_hook;
        pg_sys::object_access_hook = Some(object_access);
    }
}

/// Runs `wipe` when this process ends. To be called in the process itself, not before fork.
pub fn at_exit(wipe: fn()) {
    #[pg_guard]
    unsafe extern "C-unwind" fn call(_code: c_int, arg: pg_sys::Datum) {
        // SAFETY: the datum is the fn pointer stored below.
        let wipe: fn() = unsafe { std::mem::transmute(arg.value()) };
        wipe();
    }
    // SAFETY: a callback of the right type; a fn pointer fits a Datum.
    unsafe { pg_sys::on_proc_exit(Some(call), pg_sys::Datum::from(wipe as usize)) }
}

/// Has every session read the catalog again once this transaction commits, through the
/// relation cache's invalidation of `table`.
pub fn announce(table: pg_sys::Oid) {
    // SAFETY: a table of ours that a trigger has open.
    unsafe { pg_sys::CacheInvalidateRelcacheByRelid(table) }
}

#[pg_guard]
unsafe extern "C-unwind" fn relcache_changed(_arg: pg_sys::Datum, relation: pg_sys::Oid) {
    let relation = relation.to_u32();
    if relation == 0
        || RESOLVING.load(Relaxed)
        || WATCHED.iter().any(|w| w.load(Relaxed) == relation)
    {
        // The table itself may be gone (DROP and CREATE EXTENSION): look its OID up again.
        RESOLVED.store(false, Relaxed);
        GENERATION.fetch_add(1, Relaxed);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn roles_changed(_arg: pg_sys::Datum, _cache: c_int, _hash: u32) {
    GENERATION.fetch_add(1, Relaxed);
}

#[pg_guard]
unsafe extern "C-unwind" fn transaction_event(event: pg_sys::XactEvent::Type, _arg: *mut c_void) {
    use pg_sys::XactEvent::{
        XACT_EVENT_ABORT, XACT_EVENT_COMMIT, XACT_EVENT_PARALLEL_ABORT, XACT_EVENT_PARALLEL_COMMIT,
        XACT_EVENT_PREPARE,
    };
    if matches!(
        event,
        XACT_EVENT_COMMIT
            | XACT_EVENT_ABORT
            | XACT_EVENT_PREPARE
            | XACT_EVENT_PARALLEL_COMMIT
            | XACT_EVENT_PARALLEL_ABORT
    ) {
        SEALING_EPOCH.fetch_add(1, Relaxed);
        // Never before the commit; PREPARE only makes a promise.
        let wake = WAKE.swap(false, Relaxed);
        let wake = event == XACT_EVENT_COMMIT && wake && !NEVER_WAKE.load(Relaxed);
        WAKE_NOW.store(wake, Relaxed);
        // A copy may have been made in the middle of a rotation. Nothing is kept of it anywhere.
        let made = NEW_DATABASE.swap(0, Relaxed);
        if event == XACT_EVENT_COMMIT && made != 0 {
            super::shared::wake(pg_sys::Oid::from_u32(made));
        }
    }
}

/// The transaction event comes before the commit's invalidations are sent. A worker that is roused
/// by it may look at what it has kept, see nothing to do, and end: nobody would wake it again. The
/// locks are released after them.
#[pg_guard]
unsafe extern "C-unwind" fn resources_released(
    phase: pg_sys::ResourceReleasePhase::Type,
    _is_commit: bool,
    _is_top_level: bool,
    _arg: *mut c_void,
) {
    let last = phase == pg_sys::ResourceReleasePhase::RESOURCE_RELEASE_AFTER_LOCKS;
    if last && WAKE_NOW.swap(false, Relaxed) {
        // SAFETY: a static that is set at connection.
        super::shared::wake(unsafe { pg_sys::MyDatabaseId });
    }
}

extern "C" fn forked() {
    SEALING_EPOCH.fetch_add(1, Relaxed);
}

static mut NEXT_EMIT_LOG: pg_sys::emit_log_hook_type = None;

/// Takes the statement and its context out of the server log when the statement seals or opens:
/// its literals are values. The client still sees its own error whole.
#[pg_guard]
unsafe extern "C-unwind" fn emit_log(edata: *mut pg_sys::ErrorData) {
    // SAFETY: PostgreSQL passes a live ErrorData; debug_query_string is NULL or a C string that
    // outlives the statement. A process without a transaction system has no statement: the
    // getter returns a static all the same.
    unsafe {
        let statement = pg_sys::debug_query_string;
        let ran =
            !statement.is_null() && SECRET_STATEMENT.load(Relaxed) == super::session::statement();
        if ran || names_a_verb(statement) || names_a_verb((*edata).internalquery) {
            (*edata).hide_stmt = true;
            (*edata).hide_ctx = true;
            // The log prints an inner query whatever hide_stmt says. Without it a position in it
            // must not be sent either: drivers reject the one without the other.
            (*edata).internalquery = std::ptr::null_mut();
            (*edata).internalpos = 0;
        }
        // Two messages quote other processes' statements: a deadlock's detail for the log, and the
        // detail of the postmaster on a backend that crashed. PostgreSQL frees what stands there.
        if names_a_verb((*edata).detail_log) {
            (*edata).detail_log = withheld(edata);
        }
        if !pg_sys::IsUnderPostmaster && names_a_verb((*edata).detail) {
            (*edata).detail = withheld(edata);
        }
        #[allow(static_mut_refs, reason = "written once, before any backend runs")]
        if let Some(next) = NEXT_EMIT_LOG {
            next(edata);
        }
    }
}

/// # Safety
/// `edata` is live.
unsafe fn withheld(edata: *mut pg_sys::ErrorData) -> *mut std::ffi::c_char {
    let text = c"(withheld: it quotes a statement that seals or opens values)";
    // SAFETY: promised by the caller; the copy lives as long as the report.
    unsafe { pg_sys::MemoryContextStrdup((*edata).assoc_context, text.as_ptr()) }
}

/// The functions that are given values, or give them.
const VERBS: [&[u8]; 5] = [
    b"encrypt_col",
    b"decrypt_col",
    b"fingerprint_col",
    b"fingerprints",
    b"verify_fingerprint",
];
/// Those that are given a transport key. Their names are words that others use too: calls count.
const CARRIERS: [&[u8]; 2] = [b"export_key", b"import_key"];

/// Whether the text contains the name of one of those functions, in any case.
///
/// # Safety
/// `text` is NULL or a valid C string.
unsafe fn names_a_verb(text: *const std::ffi::c_char) -> bool {
    if text.is_null() {
        return false;
    }
    // SAFETY: promised by the caller.
    let text = unsafe { std::ffi::CStr::from_ptr(text) }.to_bytes();
    let named = |name: &&[u8]| {
        let mut places = text.windows(name.len());
        places.any(|w| w.eq_ignore_ascii_case(name))
    };
    let called = |name: &&[u8]| {
        let places = text.windows(name.len()).enumerate();
        let mut found = places.filter(|(_, w)| w.eq_ignore_ascii_case(name));
        found.any(|(at, _)| {
            let behind = &text[at + name.len()..];
            let behind = behind.strip_prefix(b"\"").unwrap_or(behind);
            behind.trim_ascii_start().starts_with(b"(")
        })
    };
    VERBS.iter().any(named) || CARRIERS.iter().any(called)
}

static mut NEXT_OBJECT_ACCESS: pg_sys::object_access_hook_type = None;

#[pg_guard]
unsafe extern "C-unwind" fn object_access(
    access: pg_sys::ObjectAccessType::Type,
    class: pg_sys::Oid,
    object: pg_sys::Oid,
    column: c_int,
    arg: *mut c_void,
) {
    // SAFETY: chains the call unchanged.
    unsafe {
        #[allow(static_mut_refs, reason = "written once, before any backend runs")]
        if let Some(next) = NEXT_OBJECT_ACCESS {
            next(access, class, object, column, arg);
        }
    }
    if access == pg_sys::ObjectAccessType::OAT_DROP
        && class == pg_sys::Oid::from(1259) // RelationRelationId
        && column == 0
    {
        crate::catalog::guard::before_drop(object);
    }
    if access == pg_sys::ObjectAccessType::OAT_POST_ALTER
        && class == pg_sys::Oid::from(super::scan::PG_EXTENSION)
    {
        crate::catalog::guard::after_alter_extension(object);
    }
}

static mut NEXT_UTILITY: pg_sys::ProcessUtility_hook_type = None;

/// Keeps our workers out of the way of commands that need a database for themselves, which
/// PostgreSQL before 19 cannot do, and wakes them after COMMIT PREPARED, which runs no commit
/// callback, and for a new database. An apply worker with two_phase commits what it has prepared
/// without coming here: a rotation that arrives so waits for the next one who wakes the worker.
#[allow(clippy::too_many_arguments, reason = "PostgreSQL's hook")]
#[pg_guard]
unsafe extern "C-unwind" fn process_utility(
    statement: *mut pg_sys::PlannedStmt,
    query: *const std::ffi::c_char,
    read_only: bool,
    context: pg_sys::ProcessUtilityContext::Type,
    params: pg_sys::ParamListInfo,
    environment: *mut pg_sys::QueryEnvironment,
    dest: *mut pg_sys::DestReceiver,
    completion: *mut pg_sys::QueryCompletion,
) {
    // SAFETY: PostgreSQL passes a live statement; the call is chained unchanged. Behind it nothing of
    // the statement is read but of CREATE DATABASE: CALL of a procedure that rolls back has let go
    // of it by then (AtAbort_Portals in src/backend/utils/mmgr/portalmem.c).
    unsafe {
        let node = (*statement).utilityStmt;
        let creates = (*node).type_ == pg_sys::NodeTag::T_CreatedbStmt;
        let commits_prepared = (*node).type_ == pg_sys::NodeTag::T_TransactionStmt
            && (*node.cast::<pg_sys::TransactionStmt>()).kind
                == pg_sys::TransactionStmtKind::TRANS_STMT_COMMIT_PREPARED;
        let _bar = database_of(node).map(super::shared::Bar::put);
        #[allow(static_mut_refs, reason = "written once, before any backend runs")]
        match NEXT_UTILITY {
            Some(next) => next(
                statement,
                query,
                read_only,
                context,
                params,
                environment,
                dest,
                completion,
            ),
            None => pg_sys::standard_ProcessUtility(
                statement,
                query,
                read_only,
                context,
                params,
                environment,
                dest,
                completion,
            ),
        }
        if creates {
            // Its row has to be visible here for the look-up.
            pg_sys::CommandCounterIncrement();
            let name = (*node.cast::<pg_sys::CreatedbStmt>()).dbname;
            let made = pg_sys::get_database_oid(name, true);
            NEW_DATABASE.store(made.to_u32(), Relaxed);
        }
        if commits_prepared {
            super::shared::wake(pg_sys::MyDatabaseId);
        }
    }
}

/// The database that a command needs for itself, when PostgreSQL will let the user have it done: a
/// role that may not must not end another's worker. The rights are those of
/// src/backend/commands/dbcommands.c, which asks again.
///
/// # Safety
/// `node` is a live utility statement.
unsafe fn database_of(node: *mut pg_sys::Node) -> Option<pg_sys::Oid> {
    // SAFETY: each cast follows the node's tag.
    let (name, makes, copies): (*const std::ffi::c_char, _, _) = unsafe {
        match (*node).type_ {
            pg_sys::NodeTag::T_DropdbStmt => {
                ((*node.cast::<pg_sys::DropdbStmt>()).dbname, false, false)
            }
            pg_sys::NodeTag::T_RenameStmt => {
                let rename = node.cast::<pg_sys::RenameStmt>();
                if (*rename).renameType != pg_sys::ObjectType::OBJECT_DATABASE {
                    return None;
                }
                ((*rename).subname, true, false)
            }
            pg_sys::NodeTag::T_AlterDatabaseStmt => {
                let alter = node.cast::<pg_sys::AlterDatabaseStmt>();
                ((*alter).dbname, false, false)
            }
            pg_sys::NodeTag::T_CreatedbStmt => {
                let options = (*node.cast::<pg_sys::CreatedbStmt>()).options;
                let options = pgrx::PgList::<pg_sys::DefElem>::from_pg(options);
                let template = options
                    .iter_ptr()
                    .find(|option| {
                        std::ffi::CStr::from_ptr((**option).defname) == c"template"
                            && !(**option).arg.is_null()
                    })
                    .map(|option| pg_sys::defGetString(option).cast_const());
                (template.unwrap_or(c"template1".as_ptr()), true, true)
            }
            _ => return None,
        }
    };
    // SAFETY: a C string; look-ups in a transaction that may miss. The tuple is read while held.
    unsafe {
        let database = pg_sys::get_database_oid(name, true);
        if database == pg_sys::MyDatabaseId || makes && !pg_sys::have_createdb_privilege() {
            return None;
        }
        let cache = pg_sys::SysCacheIdentifier::DATABASEOID as c_int;
        let tuple = pg_sys::SearchSysCache1(cache, pg_sys::Datum::from(database));
        if tuple.is_null() {
            return None;
        }
        let row: *const pg_sys::FormData_pg_database = pg_sys::GETSTRUCT(tuple).cast();
        let user = super::session::current_user();
        let may = copies && (*row).datistemplate
            || super::session::has_privileges_of(user, (*row).datdba);
        pg_sys::ReleaseSysCache(tuple);
        may.then_some(database)
    }
}
