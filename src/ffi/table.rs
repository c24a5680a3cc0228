//! Users' tables: opened by OID, scanned by block range, updated row by row.
//!
//! Called by src/worker/. Rows are updated as a logical replication worker updates them
//! (src/backend/executor/execReplication.c): the tuple is locked without waiting, then constraints,
//! triggers and indexes run through the executor. No SQL text is built and no operator looked up.
//! Invariant: nothing here waits for a lock on a table or on a row.

use std::ops::Range;

use pgrx::pg_sys;

use crate::error::{Error, Result};

/// Where a row version lies: block and line number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Tid {
    /// Block of the table's main fork.
    pub block: u32,
    /// Line pointer in the block, from 1.
    pub line: u16,
}

impl std::fmt::Display for Tid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "({},{})", self.block, self.line)
    }
}

impl Tid {
    fn of(item: &pg_sys::ItemPointerData) -> Tid {
        Tid {
            block: (u32::from(item.ip_blkid.bi_hi) << 16) | u32::from(item.ip_blkid.bi_lo),
            line: item.ip_posid,
        }
    }

    fn item(self) -> pg_sys::ItemPointerData {
        let [a, b, c, d] = self.block.to_be_bytes();
        pg_sys::ItemPointerData {
            ip_blkid: pg_sys::BlockIdData {
                bi_hi: u16::from_be_bytes([a, b]),
                bi_lo: u16::from_be_bytes([c, d]),
            },
            ip_posid: self.line,
        }
    }

    /// A tid in the text form that PostgreSQL prints: (block,line).
    pub fn parse(text: &str) -> Option<Tid> {
        let (block, line) = text.strip_prefix('(')?.strip_suffix(')')?.split_once(',')?;
        Some(Tid {
            block: block.parse().ok()?,
            line: line.parse().ok()?,
        })
    }
}

/// An open table; the lock goes when it is dropped, or with the transaction when `keep_lock`.
pub struct Table {
    relation: pg_sys::Relation,
    mode: i32,
    keep_lock: bool,
}

impl Table {
    /// Opens a table for rewriting rows, if nobody holds or awaits a stronger lock. The lock goes
    /// when it is dropped, unless `keep_lock`. None: gone, or locked.
    pub fn open_for_update(oid: pg_sys::Oid) -> Option<Table> {
        Self::open(oid, pg_sys::RowExclusiveLock as i32)
    }

    /// The lock stays until the transaction ends.
    pub fn keep_lock(&mut self) {
        self.keep_lock = true;
    }

    /// Opens a table for reading, if nobody holds or awaits a stronger lock. The lock goes when it
    /// is dropped, so that a long scan holds nobody up.
    pub fn open_for_scan(oid: pg_sys::Oid) -> Option<Table> {
        Self::open(oid, pg_sys::AccessShareLock as i32)
    }

    fn open(oid: pg_sys::Oid, mode: i32) -> Option<Table> {
        // SAFETY: locks first and opens behind the lock; both answer for an OID that is gone.
        unsafe {
            if !pg_sys::ConditionalLockRelationOid(oid, mode) {
                return None;
            }
            let relation = pg_sys::try_relation_open(oid, pg_sys::NoLock as i32);
            if relation.is_null() {
                pg_sys::UnlockRelationOid(oid, mode);
                return None;
            }
            Some(Table {
                relation,
                mode,
                keep_lock: false,
            })
        }
    }

    /// The relation cache's entry, for callers in src/ffi and for checks of its description.
    pub fn relation(&self) -> pg_sys::Relation {
        self.relation
    }

    /// The table.
    pub fn oid(&self) -> pg_sys::Oid {
        // SAFETY: open.
        unsafe { (*self.relation).rd_id }
    }

    /// The table's owner.
    pub fn owner(&self) -> pg_sys::Oid {
        // SAFETY: open; rd_rel is set for every relation.
        unsafe { (*(*self.relation).rd_rel).relowner }
    }

    /// The number of the file: another one after TRUNCATE, VACUUM FULL, CLUSTER and a rewrite.
    pub fn file(&self) -> pg_sys::Oid {
        // SAFETY: as above.
        unsafe { (*(*self.relation).rd_rel).relfilenode }
    }

    /// Whether it is a plain table that is stored by heap: what can be scanned and rewritten.
    pub fn is_heap(&self) -> bool {
        // SAFETY: as above.
        unsafe {
            let form = &*(*self.relation).rd_rel;
            form.relkind == b'r' as std::ffi::c_char && form.relam == pg_sys::Oid::from(2)
        }
    }

    /// Whether its rows are in heap pages: plain tables and materialized views.
    pub fn stores_heap(&self) -> bool {
        // SAFETY: as above.
        unsafe { (*(*self.relation).rd_rel).relam == pg_sys::Oid::from(2) }
    }

    /// The name of a live column.
    pub fn column_name(&self, attnum: i16) -> Option<String> {
        // SAFETY: with missing_ok the function returns NULL for a column that is gone.
        unsafe {
            let name = pg_sys::get_attname((*self.relation).rd_id, attnum, true);
            (!name.is_null()).then(|| super::text::c_string(name))
        }
    }

    /// Whether a column is there, and of type bytea or a domain over it.
    pub fn has_bytea(&self, attnum: i16) -> bool {
        super::relation::is_bytea(self.oid(), attnum)
    }

    /// Blocks of the main fork.
    pub fn blocks(&self) -> u32 {
        // SAFETY: open, with storage.
        unsafe {
            pg_sys::RelationGetNumberOfBlocksInFork(self.relation, pg_sys::ForkNumber::MAIN_FORKNUM)
        }
    }

    /// Looks at every row version of `blocks` that `snapshot` sees, in order. `look` gets the tid
    /// and the datums of `columns` (None for NULL), valid during the call only; it returns false to
    /// end the scan. It must not panic. What it allocates goes with the block.
    ///
    /// A column that is not of type bytea, behind this lock, counts as NULL: any other datum would
    /// be taken for a pointer. Whoever proves something asks `has_bytea` first.
    pub fn scan(
        &self,
        snapshot: &Snapshot,
        blocks: Range<u32>,
        columns: &[i16],
        look: impl FnMut(Tid, &[Option<pg_sys::Datum>]) -> bool,
    ) {
        self.scan_by(snapshot.0, blocks, columns, |c| self.has_bytea(c), look);
    }

    /// As `scan`, but of columns of any type: `look` may only ask which are NULL, unless it knows
    /// the types behind this lock.
    pub fn scan_any(
        &self,
        snapshot: &Snapshot,
        blocks: Range<u32>,
        columns: &[i16],
        look: impl FnMut(Tid, &[Option<pg_sys::Datum>]) -> bool,
    ) {
        self.scan_by(snapshot.0, blocks, columns, |_| true, look);
    }

    /// As `scan`, but looks at every row version that is not dead to everyone: also at those that
    /// only older snapshots see, and at what others have inserted and not committed.
    pub fn scan_versions(
        &self,
        blocks: Range<u32>,
        columns: &[i16],
        look: impl FnMut(Tid, &[Option<pg_sys::Datum>]) -> bool,
    ) {
        // SAFETY: InitNonVacuumableSnapshot of src/include/utils/snapmgr.h: plain data, of which
        // this kind of snapshot uses these two fields. Asking for the horizon brings the
        // approximate ones of this process up to date, so that no value is read whose main row only
        // looks as if somebody saw it, while VACUUM has taken its toasted part away. Within one
        // chunk that may still happen, and then ends in an ERROR.
        let mut every = unsafe {
            pg_sys::GetOldestNonRemovableTransactionId(self.relation);
            pg_sys::SnapshotData {
                snapshot_type: pg_sys::SnapshotType::SNAPSHOT_NON_VACUUMABLE,
                vistest: pg_sys::GlobalVisTestFor(self.relation),
                ..pg_sys::SnapshotData::default()
            }
        };
        self.scan_by(&mut every, blocks, columns, |c| self.has_bytea(c), look);
    }

    /// Whether a snapshot sees the row version at a place.
    pub fn sees(&self, snapshot: &Snapshot, tid: Tid) -> bool {
        let mut item = tid.item();
        // SAFETY: the relation is open and locked, the snapshot registered; the slot is dropped
        // here, after an ERROR by the abort.
        unsafe {
            let slot = pg_sys::table_slot_create(self.relation, std::ptr::null_mut());
            let seen =
                pg_sys::table_tuple_fetch_row_version(self.relation, &mut item, snapshot.0, slot);
            pg_sys::ExecDropSingleTupleTableSlot(slot);
            seen
        }
    }

    /// One guard for the whole scan, since a guard per row would cost more than the row: nothing
    /// that needs dropping lives inside it.
    fn scan_by(
        &self,
        snapshot: pg_sys::Snapshot,
        blocks: Range<u32>,
        columns: &[i16],
        is_read: impl Fn(i16) -> bool,
        mut look: impl FnMut(Tid, &[Option<pg_sys::Datum>]) -> bool,
    ) {
        if blocks.is_empty() {
            return;
        }
        let read: Vec<bool> = columns.iter().map(|column| is_read(*column)).collect();
        let there = columns.iter().zip(&read).filter(|(_, read)| **read);
        let highest = there.map(|(column, _)| *column).max().unwrap_or(0);
        // As many as there are: one that is left out would be proved to hold nothing.
        let mut values: Vec<Option<pg_sys::Datum>> = vec![None; columns.len()];
        let (mut low, mut high) = ends(&blocks);
        // SAFETY: the relation is open and locked, the snapshot registered, or one that needs not
        // be. The slot is dropped and the scan ended here; after an ERROR the abort releases both,
        // and the rows' context with the current one. The table's own functions are called
        // directly, under one guard. The columns that are read exist: `highest` is one of them.
        unsafe {
            let slot = pg_sys::table_slot_create(self.relation, std::ptr::null_mut());
            let scan =
                pg_sys::table_beginscan_tidrange(self.relation, snapshot, &mut low, &mut high);
            let next = (*(*self.relation).rd_tableam)
                .scan_getnextslot_tidrange
                .unwrap_unchecked();
            let previous = pg_sys::CurrentMemoryContext;
            let rows = rows_context(previous);
            let mut block = blocks.start;
            pg_sys::ffi::pg_guard_ffi_boundary(|| {
                while next(scan, pg_sys::ScanDirection::ForwardScanDirection, slot) {
                    if (*slot).tts_nvalid < highest {
                        slot_getsomeattrs_int(slot, i32::from(highest));
                    }
                    for ((value, column), read) in values.iter_mut().zip(columns).zip(&read) {
                        let at = usize::from(column.unsigned_abs()).wrapping_sub(1);
                        let null = !*read || *(*slot).tts_isnull.add(at);
                        *value = (!null).then(|| *(*slot).tts_values.add(at));
                    }
                    let tid = Tid::of(&(*slot).tts_tid);
                    // Each value that is toasted costs an allocation: a table may have millions.
                    if tid.block != block {
                        pg_sys::MemoryContextReset(rows);
                        block = tid.block;
                    }
                    pg_sys::CurrentMemoryContext = rows;
                    let go_on = look(tid, &values);
                    pg_sys::CurrentMemoryContext = previous;
                    if !go_on {
                        break;
                    }
                }
            });
            pg_sys::MemoryContextDelete(rows);
            pg_sys::table_endscan(scan);
            pg_sys::ExecDropSingleTupleTableSlot(slot);
        }
    }

    /// Looks at every row version of `blocks` that `snapshot` sees, in order, by code that may
    /// raise: `look` gets the tid and the slot, and allocates in a context that is emptied after
    /// each row. Slower than `scan`: a guard per row.
    pub fn visit(
        &self,
        snapshot: &Snapshot,
        blocks: Range<u32>,
        mut look: impl FnMut(Tid, *mut pg_sys::TupleTableSlot) -> Result<()>,
    ) -> Result<()> {
        if blocks.is_empty() {
            return Ok(());
        }
        let (mut low, mut high) = ends(&blocks);
        // SAFETY: as in `scan`; slot and scan are ended here whatever `look` answers, and by the
        // abort when it raises. The rows' context is a child of the current one.
        unsafe {
            let slot = pg_sys::table_slot_create(self.relation, std::ptr::null_mut());
            let scan =
                pg_sys::table_beginscan_tidrange(self.relation, snapshot.0, &mut low, &mut high);
            let next = (*(*self.relation).rd_tableam)
                .scan_getnextslot_tidrange
                .unwrap_unchecked();
            let previous = pg_sys::CurrentMemoryContext;
            let rows = rows_context(previous);
            let forward = pg_sys::ScanDirection::ForwardScanDirection;
            let mut outcome = Ok(());
            while outcome.is_ok()
                && pg_sys::ffi::pg_guard_ffi_boundary(|| next(scan, forward, slot))
            {
                pg_sys::CurrentMemoryContext = rows;
                outcome = look(Tid::of(&(*slot).tts_tid), slot);
                pg_sys::CurrentMemoryContext = previous;
                pg_sys::MemoryContextReset(rows);
            }
            pg_sys::MemoryContextDelete(rows);
            pg_sys::table_endscan(scan);
            pg_sys::ExecDropSingleTupleTableSlot(slot);
            outcome
        }
    }

    /// Prunes what an earlier, committed batch has left in `blocks` and tells the free space map,
    /// so that the next batch's rows go there and the table does not grow. Any reader prunes in
    /// passing; the map is otherwise told by VACUUM alone.
    pub fn reclaim(&self, blocks: Range<u32>) {
        let blocks = blocks.start..blocks.end.min(self.blocks());
        // SAFETY: the relation is open with a lock that VACUUM FULL and TRUNCATE conflict with, and
        // the blocks exist. heap_page_prune_opt wants a pin and no lock; the free space is read
        // under a share lock, as lazy vacuum does.
        unsafe {
            for block in blocks.clone() {
                let buffer = pg_sys::ReadBufferExtended(
                    self.relation,
                    pg_sys::ForkNumber::MAIN_FORKNUM,
                    block,
                    pg_sys::ReadBufferMode::RBM_NORMAL,
                    std::ptr::null_mut(),
                );
                pg_sys::heap_page_prune_opt(self.relation, buffer);
                pg_sys::LockBuffer(buffer, pg_sys::BUFFER_LOCK_SHARE as i32);
                let free = pg_sys::PageGetHeapFreeSpace(pg_sys::BufferGetPage(buffer));
                pg_sys::LockBuffer(buffer, pg_sys::BUFFER_LOCK_UNLOCK as i32);
                pg_sys::ReleaseBuffer(buffer);
                pg_sys::RecordPageWithFreeSpace(self.relation, block, free);
            }
            pg_sys::FreeSpaceMapVacuumRange(self.relation, blocks.start, blocks.end);
        }
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return; // the abort closes it
        }
        let mode = if self.keep_lock { 0 } else { self.mode };
        // SAFETY: opened by `open`, closed once.
        unsafe { pg_sys::relation_close(self.relation, mode) }
    }
}

/// The first and the last place of a range of blocks, which is not empty.
fn ends(blocks: &Range<u32>) -> (pg_sys::ItemPointerData, pg_sys::ItemPointerData) {
    let place = |block, line| Tid { block, line }.item();
    (place(blocks.start, 1), place(blocks.end - 1, u16::MAX - 1))
}

/// A memory context for what lasts as long as a row is looked at.
///
/// # Safety
/// `parent` is a live context.
unsafe fn rows_context(parent: pg_sys::MemoryContext) -> pg_sys::MemoryContext {
    // SAFETY: promised by the caller; the name is static.
    unsafe {
        pg_sys::AllocSetContextCreateExtended(
            parent,
            c"pg_rekey rows".as_ptr(),
            pg_sys::ALLOCSET_DEFAULT_MINSIZE as usize,
            pg_sys::ALLOCSET_DEFAULT_INITSIZE as usize,
            pg_sys::ALLOCSET_DEFAULT_MAXSIZE as usize,
        )
    }
}

unsafe extern "C-unwind" {
    fn slot_getsomeattrs_int(slot: *mut pg_sys::TupleTableSlot, attnum: std::ffi::c_int);
}

/// A registered snapshot.
pub struct Snapshot(pg_sys::Snapshot);

impl Snapshot {
    /// What is committed now.
    pub fn latest() -> Snapshot {
        // SAFETY: in a transaction; registered, so that it outlives command boundaries.
        unsafe { Snapshot(pg_sys::RegisterSnapshot(pg_sys::GetLatestSnapshot())) }
    }

    /// The oldest transaction that had not ended when the snapshot was taken. What was deleted by it
    /// or a later one stays in its place for as long as the snapshot is registered.
    pub fn xmin(&self) -> pg_sys::TransactionId {
        // SAFETY: registered.
        unsafe { (*self.0).xmin }
    }

    /// The first transaction id that the snapshot does not see: every transaction that could still
    /// copy what the snapshot has not seen is older.
    pub fn xmax(&self) -> pg_sys::TransactionId {
        // SAFETY: registered.
        unsafe { (*self.0).xmax }
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: registered by `latest`, unregistered once.
            unsafe { pg_sys::UnregisterSnapshot(self.0) }
        }
    }
}

/// What became of one row.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Updated {
    /// It has a new version, at this place.
    Done(Tid),
    /// Somebody else has it locked.
    Locked,
    /// Somebody else has changed or deleted it meanwhile: this version is history.
    Moved,
    /// Nothing was to change in it.
    Unchanged,
    /// A trigger of the table's has refused the change silently.
    Suppressed,
}

/// The executor's state for updating rows of one table. To be made, used and finished within one
/// subtransaction: its buffer pins belong to that.
pub struct Updater<'a> {
    table: &'a Table,
    estate: *mut pg_sys::EState,
    result: *mut pg_sys::ResultRelInfo,
    epq: *mut pg_sys::EPQState,
    old: *mut pg_sys::TupleTableSlot,
    new: *mut pg_sys::TupleTableSlot,
    snapshot: Snapshot,
    blocks: u32,
    tuples: pg_sys::MemoryContext,
}

impl<'a> Updater<'a> {
    /// Prepares to update `columns` of the table.
    pub fn begin(table: &'a Table, columns: &[i16]) -> Updater<'a> {
        let snapshot = Snapshot::latest();
        // SAFETY: the calls of create_edata_for_relation and ExecInitRangeTable in
        // src/backend/replication/logical/worker.c; all lives in the executor's context, which
        // `finish` frees, or in the subtransaction that the caller aborts.
        unsafe {
            let relation = table.relation;
            let estate = pg_sys::CreateExecutorState();
            let previous = pg_sys::CurrentMemoryContext;
            pg_sys::CurrentMemoryContext = (*estate).es_query_cxt;
            range_table(estate, relation, columns);
            (*estate).es_output_cid = pg_sys::GetCurrentCommandId(true);
            (*estate).es_snapshot = snapshot.0;
            let result: *mut pg_sys::ResultRelInfo =
                pg_sys::palloc0(std::mem::size_of::<pg_sys::ResultRelInfo>()).cast();
            (*result).type_ = pg_sys::NodeTag::T_ResultRelInfo;
            pg_sys::InitResultRelInfo(result, relation, 1, std::ptr::null_mut(), 0);
            look_up_triggers(result);
            pg_sys::ExecOpenIndices(result, false);
            let epq: *mut pg_sys::EPQState =
                pg_sys::palloc0(std::mem::size_of::<pg_sys::EPQState>()).cast();
            #[cfg(feature = "pg15")]
            pg_sys::EvalPlanQualInit(epq, estate, std::ptr::null_mut(), std::ptr::null_mut(), -1);
            #[cfg(any(feature = "pg16", feature = "pg18"))]
            pg_sys::EvalPlanQualInit(
                epq,
                estate,
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                -1,
                std::ptr::null_mut(),
            );
            let old = pg_sys::table_slot_create(relation, &mut (*estate).es_tupleTable);
            let new = pg_sys::table_slot_create(relation, &mut (*estate).es_tupleTable);
            pg_sys::AfterTriggerBeginQuery();
            let tuples = rows_context((*estate).es_query_cxt);
            pg_sys::CurrentMemoryContext = previous;
            pg_sys::PushActiveSnapshot(snapshot.0);
            Updater {
                table,
                estate,
                result,
                epq,
                old,
                new,
                snapshot,
                blocks: table.blocks(),
                tuples,
            }
        }
    }

    /// Locks the row version and gives it to `change`, which puts new datums in the place of those
    /// of the columns that change; then updates it.
    ///
    /// `change` gets the row's slot, for expressions over it, and runs in a memory context that
    /// lasts until the row is done.
    pub fn update<E>(
        &mut self,
        tid: Tid,
        change: impl FnOnce(
            *mut pg_sys::TupleTableSlot,
        ) -> std::result::Result<Vec<(i16, pg_sys::Datum)>, E>,
    ) -> std::result::Result<Updated, E> {
        // VACUUM has cut off the end of the file, and the row with it: a read there is an error.
        if tid.block >= self.blocks {
            return Ok(Updated::Moved);
        }
        let mut item = tid.item();
        // SAFETY: slots, snapshot and result relation belong to the open table. TM_FailureData is
        // plain data. Without TUPLE_LOCK_FLAG_FIND_LAST_VERSION only the very version is locked.
        // The tuples' context is current while values are made and executor code runs, as in
        // apply_handle_update; it is reset after each row.
        unsafe {
            // The place may be older than the snapshot, and its row gone since: heap_lock_tuple
            // takes whatever lies there for a tuple. What the snapshot sees stays where it is for as
            // long as the snapshot is registered.
            let relation = self.table.relation;
            let seen = pg_sys::table_tuple_fetch_row_version(
                relation,
                &mut item,
                self.snapshot.0,
                self.old,
            );
            if !seen {
                return Ok(Updated::Moved);
            }
            pg_sys::ExecClearTuple(self.old);
            let mut failure: pg_sys::TM_FailureData = std::mem::zeroed();
            let locked = pg_sys::table_tuple_lock(
                self.table.relation,
                &mut item,
                self.snapshot.0,
                self.old,
                pg_sys::GetCurrentCommandId(true),
                pg_sys::LockTupleMode::LockTupleNoKeyExclusive,
                pg_sys::LockWaitPolicy::LockWaitSkip,
                0,
                &mut failure,
            );
            match locked {
                pg_sys::TM_Result::TM_Ok => {}
                pg_sys::TM_Result::TM_WouldBlock => return Ok(Updated::Locked),
                _ => return Ok(Updated::Moved),
            }
            let previous = pg_sys::CurrentMemoryContext;
            pg_sys::CurrentMemoryContext = self.tuples;
            let outcome = change(self.old).map(|changes| {
                if changes.is_empty() {
                    Updated::Unchanged
                } else {
                    self.store(&changes)
                }
            });
            pg_sys::CurrentMemoryContext = previous;
            pg_sys::ExecClearTuple(self.new);
            pg_sys::ExecClearTuple(self.old);
            if let Some(per_tuple) = (*self.estate).es_per_tuple_exprcontext.as_ref() {
                pg_sys::MemoryContextReset(per_tuple.ecxt_per_tuple_memory);
            }
            pg_sys::MemoryContextReset(self.tuples);
            outcome
        }
    }

    /// # Safety
    /// `old` holds the locked tuple.
    unsafe fn store(&mut self, changes: &[(i16, pg_sys::Datum)]) -> Updated {
        // SAFETY: promised by the caller; the new slot takes the old row's datums, which the old
        // slot keeps alive, and the changed ones.
        unsafe {
            pg_sys::slot_getallattrs(self.old);
            pg_sys::ExecClearTuple(self.new);
            let count = usize::try_from((*(*self.old).tts_tupleDescriptor).natts).unwrap_or(0);
            for at in 0..count {
                *(*self.new).tts_values.add(at) = *(*self.old).tts_values.add(at);
                *(*self.new).tts_isnull.add(at) = *(*self.old).tts_isnull.add(at);
            }
            for (column, datum) in changes {
                let at = usize::from(column.unsigned_abs()) - 1;
                *(*self.new).tts_values.add(at) = *datum;
                *(*self.new).tts_isnull.add(at) = false;
            }
            pg_sys::ExecStoreVirtualTuple(self.new);
            (*self.new).tts_tid.ip_posid = 0;
            pg_sys::ExecSimpleRelationUpdate(
                self.result,
                self.estate,
                self.epq,
                self.old,
                self.new,
            );
            if (*self.new).tts_tid.ip_posid == 0 {
                Updated::Suppressed
            } else {
                Updated::Done(Tid::of(&(*self.new).tts_tid))
            }
        }
    }

    /// Fires what AFTER triggers have queued and frees everything.
    pub fn finish(self) {
        // SAFETY: the counterpart of `begin`, in the order of finish_edata.
        unsafe {
            pg_sys::AfterTriggerEndQuery(self.estate);
            pg_sys::PopActiveSnapshot();
            pg_sys::EvalPlanQualEnd(self.epq);
            pg_sys::ExecCloseIndices(self.result);
            pg_sys::ExecResetTupleTable((*self.estate).es_tupleTable, false);
            pg_sys::ExecCloseRangeTableRelations(self.estate);
            pg_sys::FreeExecutorState(self.estate);
        }
    }
}

/// Looks up the functions of the table's triggers, as ExecCallTriggerFunc would with the first row:
/// then what they keep for the query would live in the context of that row.
///
/// # Safety
/// The result relation is initialised, and the executor's context is current.
unsafe fn look_up_triggers(result: *mut pg_sys::ResultRelInfo) {
    // SAFETY: promised by the caller. The descriptor is a copy, and InitResultRelInfo has made room
    // for one FmgrInfo per trigger.
    unsafe {
        let Some(triggers) = (*result).ri_TrigDesc.as_ref() else {
            return;
        };
        for at in 0..usize::try_from(triggers.numtriggers).unwrap_or(0) {
            let function = (*triggers.triggers.add(at)).tgfoid;
            let info = (*result).ri_TrigFunctions.add(at);
            pg_sys::fmgr_info_cxt(function, info, pg_sys::CurrentMemoryContext);
        }
    }
}

/// A range table of the one relation, which says which columns change: triggers and generated
/// columns ask.
///
/// # Safety
/// The executor's context is current.
unsafe fn range_table(estate: *mut pg_sys::EState, relation: pg_sys::Relation, columns: &[i16]) {
    // SAFETY: nodes are zeroed and tagged as makeNode does.
    unsafe {
        let entry: *mut pg_sys::RangeTblEntry =
            pg_sys::palloc0(std::mem::size_of::<pg_sys::RangeTblEntry>()).cast();
        (*entry).type_ = pg_sys::NodeTag::T_RangeTblEntry;
        (*entry).rtekind = pg_sys::RTEKind::RTE_RELATION;
        (*entry).relid = (*relation).rd_id;
        (*entry).relkind = (*(*relation).rd_rel).relkind;
        (*entry).rellockmode = pg_sys::AccessShareLock as i32;
        let mut updated = std::ptr::null_mut();
        for column in columns {
            let member = i32::from(*column) - pg_sys::FirstLowInvalidHeapAttributeNumber;
            updated = pg_sys::bms_add_member(updated, member);
        }
        let entries = pg_sys::lappend(std::ptr::null_mut(), entry.cast());
        #[cfg(feature = "pg15")]
        {
            (*entry).updatedCols = updated;
            pg_sys::ExecInitRangeTable(estate, entries);
        }
        #[cfg(any(feature = "pg16", feature = "pg18"))]
        {
            let mut infos = std::ptr::null_mut();
            let info = pg_sys::addRTEPermissionInfo(&mut infos, entry);
            (*info).updatedCols = updated;
            #[cfg(feature = "pg16")]
            pg_sys::ExecInitRangeTable(estate, entries, infos);
            #[cfg(feature = "pg18")]
            pg_sys::ExecInitRangeTable(estate, entries, infos, pg_sys::bms_make_singleton(1));
        }
    }
}

/// The datums of some columns of a slot's row; None for NULL.
pub fn columns_of(
    slot: *mut pg_sys::TupleTableSlot,
    columns: &[i16],
) -> Vec<Option<pg_sys::Datum>> {
    // SAFETY: the slot holds a row (it came from `Updater::update`), with all attributes of its
    // descriptor after slot_getallattrs.
    unsafe {
        pg_sys::slot_getallattrs(slot);
        let value = |column: &i16| {
            let at = usize::from(column.unsigned_abs()) - 1;
            (!*(*slot).tts_isnull.add(at)).then(|| *(*slot).tts_values.add(at))
        };
        columns.iter().map(value).collect()
    }
}

/// The name of a table with its schema, quoted; its number when it is gone.
pub fn name(oid: pg_sys::Oid) -> Result<String> {
    // SAFETY: syscache look-ups; the results are C strings or NULL.
    unsafe {
        let name = pg_sys::get_rel_name(oid);
        if name.is_null() {
            return Ok(oid.to_u32().to_string());
        }
        let schema = pg_sys::get_namespace_name(pg_sys::get_rel_namespace(oid));
        if schema.is_null() {
            return Err(Error::Internal(format!("table {oid} has no schema")));
        }
        Ok(super::text::c_string(pg_sys::quote_qualified_identifier(
            schema, name,
        )))
    }
}
