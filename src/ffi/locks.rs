//! Who holds what: the barrier's holders, one drainer per table, transactions that may still see
//! old rows.
//!
//! Called by src/worker/. Invariant: nothing here blocks, but for `wait_for_end`, which waits for
//! a commit that is already visible to send its invalidations.

use pgrx::pg_sys;

/// A transaction that held the barrier when it was looked at; prepared ones too.
#[derive(Clone, Copy)]
pub struct Holder(pg_sys::VirtualTransactionId);

impl Holder {
    /// Whether it has ended: committed or rolled back, not merely prepared.
    pub fn ended(self) -> bool {
        // SAFETY: without waiting it only asks (src/backend/storage/lmgr/lock.c). It follows a
        // transaction that was prepared meanwhile.
        unsafe { pg_sys::VirtualXactLock(self.0, false) }
    }

    /// Its virtual transaction as pg_locks prints it.
    pub fn virtual_transaction(self) -> String {
        #[cfg(any(feature = "pg15", feature = "pg16"))]
        let backend = self.0.backendId;
        #[cfg(feature = "pg18")]
        let backend = self.0.procNumber;
        format!("{backend}/{}", self.0.localTransactionId)
    }

    /// The transaction id of one that was prepared when the holders were captured.
    pub fn prepared_xid(self) -> Option<u32> {
        #[cfg(any(feature = "pg15", feature = "pg16"))]
        let prepared = self.0.backendId == -1;
        #[cfg(feature = "pg18")]
        let prepared = self.0.procNumber == -1;
        prepared.then_some(self.0.localTransactionId)
    }
}

/// The transactions that hold a lock on `table` which conflicts with ShareLock: all that seal.
pub fn holders(table: pg_sys::Oid) -> Vec<Holder> {
    let mut holders = Vec::new();
    // SAFETY: a relation tag of this database (SET_LOCKTAG_RELATION in src/include/storage/lock.h).
    // The list ends with an invalid entry: local transaction id 0.
    unsafe {
        let tag = pg_sys::LOCKTAG {
            locktag_field1: pg_sys::MyDatabaseId.to_u32(),
            locktag_field2: table.to_u32(),
            locktag_field3: 0,
            locktag_field4: 0,
            locktag_type: tag_type(pg_sys::LockTagType::LOCKTAG_RELATION),
            locktag_lockmethodid: DEFAULT_LOCKMETHOD,
        };
        #[cfg(feature = "pg15")]
        let list = pg_sys::GetLockConflicts(&tag, pg_sys::ShareLock as i32, std::ptr::null_mut());
        #[cfg(any(feature = "pg16", feature = "pg18"))]
        let list = pg_sys::GetLockConflicts(&tag, pg_sys::ShareLock as i32, std::ptr::null_mut());
        let mut next = list;
        while (*next).localTransactionId != 0 {
            holders.push(Holder(*next));
            next = next.add(1);
        }
    }
    holders
}

/// The transactions of this database with a snapshot that may see rows which were deleted before
/// `xmin`, as CREATE INDEX CONCURRENTLY looks for them (WaitForOlderSnapshots in
/// src/backend/commands/indexcmds.c). Not prepared ones, which see nothing any more, nor VACUUM and
/// autovacuum, nor index builds that run nobody's code: these copy no row.
pub fn older_snapshots(xmin: pg_sys::TransactionId) -> Vec<Holder> {
    // The function's limit is inclusive; xids below 3 are special.
    let before = match xmin.into_inner() {
        0..=3 => u32::MAX,
        xmin => xmin - 1,
    };
    let leave_out = pg_sys::PROC_IS_AUTOVACUUM | pg_sys::PROC_IN_VACUUM | pg_sys::PROC_IN_SAFE_IC;
    let mut count = 0;
    // SAFETY: returns a palloc'd array and its length; under the lock of the array of processes.
    unsafe {
        let list = pg_sys::GetCurrentVirtualXIDs(
            pg_sys::TransactionId::from_inner(before),
            true,
            false,
            i32::try_from(leave_out).unwrap_or(0),
            &mut count,
        );
        (0..usize::try_from(count).unwrap_or(0))
            .map(|at| Holder(*list.add(at)))
            .collect()
    }
}

/// Waits until the transaction that has written a row of rekey.key_slot has ended for everyone:
/// until its invalidations are sent. In CommitTransaction (src/backend/access/transam/xact.c) the
/// row becomes visible first, then the invalidations go out, then the locks are given back. Where
/// `xid` is that of a subtransaction, `session::keep_xid_locked` keeps its lock as long.
pub fn wait_for_end(xid: pg_sys::TransactionId) {
    // SAFETY: waits for the transaction's own lock; one that ended long ago has none.
    unsafe {
        if pg_sys::TransactionIdIsCurrentTransactionId(xid) {
            return;
        }
        pg_sys::XactLockTableWait(
            xid,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            pg_sys::XLTW_Oper::XLTW_None,
        );
    }
}

/// Takes the right to re-encrypt a table until the transaction ends; false when another session
/// has it. A lock on a row of our own catalog's name space: users cannot take it.
pub fn become_drainer(catalog: pg_sys::Oid, table: pg_sys::Oid) -> bool {
    // SAFETY: an object tag (SET_LOCKTAG_OBJECT in src/include/storage/lock.h); does not wait.
    unsafe {
        let tag = pg_sys::LOCKTAG {
            locktag_field1: pg_sys::MyDatabaseId.to_u32(),
            locktag_field2: catalog.to_u32(),
            locktag_field3: table.to_u32(),
            locktag_field4: 0,
            locktag_type: tag_type(pg_sys::LockTagType::LOCKTAG_OBJECT),
            locktag_lockmethodid: DEFAULT_LOCKMETHOD,
        };
        let got = pg_sys::LockAcquire(&tag, pg_sys::ExclusiveLock as i32, false, true);
        got != pg_sys::LockAcquireResult::LOCKACQUIRE_NOT_AVAIL
    }
}

const DEFAULT_LOCKMETHOD: u8 = 1;

fn tag_type(tag: pg_sys::LockTagType::Type) -> u8 {
    u8::try_from(tag).unwrap_or(0)
}

/// A 32-bit transaction id of the present as the 64-bit one that it stands for.
pub fn full_xid(xid: pg_sys::TransactionId) -> u64 {
    // SAFETY: reads shared memory.
    let next = unsafe { pg_sys::ReadNextFullTransactionId() }.value;
    let xid = u64::from(xid.into_inner());
    let candidate = (next & !0xffff_ffff) | xid;
    if candidate > next {
        candidate.saturating_sub(1 << 32)
    } else {
        candidate
    }
}

/// The oldest transaction whose snapshot may still see rows of the table that are deleted by now:
/// running transactions, prepared ones, replication slots, standbys that send feedback.
pub fn oldest_visible(table: &super::table::Table) -> u64 {
    // SAFETY: the relation is open.
    full_xid(unsafe { pg_sys::GetOldestNonRemovableTransactionId(table.relation()) })
}

/// The server's identity, which a restored copy shares, and this database's.
pub fn identity() -> (u64, u32) {
    // SAFETY: reads shared memory and a static.
    unsafe { (pg_sys::GetSystemIdentifier(), pg_sys::MyDatabaseId.to_u32()) }
}
