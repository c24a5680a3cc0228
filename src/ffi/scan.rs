//! Reading our catalog tables under the catalog snapshot.
//!
//! Called by src/catalog/ alone. `systable_beginscan(.., NULL)` takes the catalog snapshot: it
//! is legal in parallel workers, on standbys and under old REPEATABLE READ snapshots, it assigns
//! no transaction id, and it sees the last commit. No privilege is asked and no user code runs.

use pgrx::pg_sys;

use crate::error::Result;

/// BTEqualStrategyNumber, src/include/access/stratnum.h.
const BTREE_EQUAL: u16 = 3;

/// A scan of one table by an index, closed when dropped.
pub struct Scan {
    relation: pg_sys::Relation,
    scan: pg_sys::SysScanDesc,
}

/// One scan key.
pub enum Key<'a> {
    /// A bigint column.
    Bigint(i64),
    /// A text column with collation C, in the server's encoding.
    Text(&'a [u8]),
    /// A column of type name.
    Name(&'a std::ffi::CStr),
}

impl Scan {
    /// Opens the table and index that `find` names and scans for rows whose leading columns equal
    /// `keys`; without an index the whole table. The table's columns `attributes` are those of the
    /// keys, in the index's order.
    ///
    /// Locking the table may bring the news that its index was replaced (REINDEX CONCURRENTLY):
    /// `find` is asked again under the lock.
    pub fn open(
        find: impl Fn() -> Result<(pg_sys::Oid, pg_sys::Oid)>,
        attributes: &[i16],
        keys: &[Key<'_>],
    ) -> Result<Scan> {
        assert!(keys.len() <= 2 && attributes.len() >= keys.len());
        // SAFETY: ScanKeyData is plain C data; each used entry is initialised below.
        let mut entries: [pg_sys::ScanKeyData; 2] = unsafe { std::mem::zeroed() };
        for (i, key) in keys.iter().enumerate() {
            let (procedure, datum) = match key {
                Key::Bigint(value) => (pg_sys::F_INT8EQ, pg_sys::Datum::from(*value)),
                Key::Text(bytes) => (pg_sys::F_TEXTEQ, varlena(bytes)),
                // nameeq compares as strncmp does: a C string will do.
                Key::Name(name) => (pg_sys::F_NAMEEQ, pg_sys::Datum::from(name.as_ptr())),
            };
            // SAFETY: writes the entry it is given. The collation becomes C, as the columns'.
            unsafe {
                pg_sys::ScanKeyInit(
                    &mut entries[i],
                    attributes[i],
                    BTREE_EQUAL,
                    procedure.into(),
                    datum,
                );
                entries[i].sk_collation = pg_sys::Oid::from(950); // C_COLLATION_OID
            }
        }
        let count = i32::try_from(keys.len()).unwrap_or(0);
        // SAFETY: table and index are OIDs of our own catalog (src/catalog/) or of PostgreSQL's
        // (extension_version); systable_beginscan
        // copies the keys.
        unsafe {
            let (relation, index) = loop {
                let (table, _) = find()?;
                let relation = pg_sys::table_open(table, pg_sys::AccessShareLock as i32);
                let (again, index) = find()?;
                if again == table {
                    break (relation, index);
                }
                pg_sys::table_close(relation, pg_sys::AccessShareLock as i32);
            };
            let scan = pg_sys::systable_beginscan(
                relation,
                index,
                index != pg_sys::InvalidOid,
                std::ptr::null_mut(),
                count,
                entries.as_mut_ptr(),
            );
            Ok(Scan { relation, scan })
        }
    }

    /// The next row.
    pub fn next_row(&mut self) -> Option<Row<'_>> {
        // SAFETY: the scan is open until drop.
        let tuple = unsafe { pg_sys::systable_getnext(self.scan) };
        // SAFETY: an open relation has a descriptor.
        let desc = unsafe { (*self.relation).rd_att };
        (!tuple.is_null()).then_some(Row {
            tuple,
            desc,
            scan: std::marker::PhantomData,
        })
    }
}

impl Drop for Scan {
    fn drop(&mut self) {
        // An error that unwinds through here has its resources released by the abort.
        if std::thread::panicking() {
            return;
        }
        // SAFETY: both were opened by `open` and are closed once.
        unsafe {
            pg_sys::systable_endscan(self.scan);
            pg_sys::table_close(self.relation, pg_sys::AccessShareLock as i32);
        }
    }
}

fn varlena(bytes: &[u8]) -> pg_sys::Datum {
    // SAFETY: copies the bytes into a fresh varlena of the current memory context.
    unsafe {
        let len = i32::try_from(bytes.len()).unwrap_or(0);
        pg_sys::Datum::from(pg_sys::cstring_to_text_with_len(bytes.as_ptr().cast(), len))
    }
}

/// A row of a scan, valid until the next one is asked for.
pub struct Row<'a> {
    tuple: pg_sys::HeapTuple,
    desc: pg_sys::TupleDesc,
    scan: std::marker::PhantomData<&'a Scan>,
}

impl Row<'_> {
    /// The datum of column `attribute` (from 1); None for NULL.
    pub fn datum(&self, attribute: i16) -> Option<pg_sys::Datum> {
        // A catalog that is older than the library has fewer columns.
        // SAFETY: an open relation's descriptor.
        if i32::from(attribute) > unsafe { (*self.desc).natts } {
            return None;
        }
        let mut null = false;
        // SAFETY: tuple and descriptor belong together while the scan is on this row.
        let datum =
            unsafe { pg_sys::heap_getattr(self.tuple, i32::from(attribute), self.desc, &mut null) };
        (!null).then_some(datum)
    }

    /// The transaction that has written this version of the row.
    pub fn writer(&self) -> pg_sys::TransactionId {
        // SAFETY: the tuple is in memory while the scan is on this row; t_heap is the variant of
        // every stored tuple. As HeapTupleHeaderGetXmin does it: the number that a frozen row
        // keeps may have come round since.
        unsafe {
            let header = &*(*self.tuple).t_data;
            let frozen = u16::try_from(pg_sys::HEAP_XMIN_FROZEN).unwrap_or(0);
            if header.t_infomask & frozen == frozen {
                return pg_sys::TransactionId::FROZEN;
            }
            header.t_choice.t_heap.t_xmin
        }
    }

    /// Whether the current transaction has written this version of the row.
    pub fn written_here(&self) -> bool {
        // SAFETY: asks the transaction manager.
        unsafe { pg_sys::TransactionIdIsCurrentTransactionId(self.writer()) }
    }

    /// A text or bytea column's bytes, copied. NULL is empty.
    pub fn bytes(&self, attribute: i16) -> Vec<u8> {
        self.datum(attribute)
            .map(|d| super::text::detoasted(d).to_vec())
            .unwrap_or_default()
    }

    /// A bigint column. NULL is 0.
    pub fn i64(&self, attribute: i16) -> i64 {
        let bits = self.datum(attribute).map_or(0, |d| d.value() as u64);
        i64::from_ne_bytes(bits.to_ne_bytes())
    }

    /// An oid column. NULL is 0.
    pub fn oid(&self, attribute: i16) -> pg_sys::Oid {
        let value = self.datum(attribute).map_or(0, |d| d.value());
        pg_sys::Oid::from(u32::try_from(value & 0xffff_ffff).unwrap_or(0))
    }

    /// A boolean column. NULL is false.
    pub fn bool(&self, attribute: i16) -> bool {
        self.datum(attribute).is_some_and(|d| d.value() & 0xff != 0)
    }
}

/// OID of a relation in schema rekey, or None.
pub fn relation(name: &std::ffi::CStr) -> Option<pg_sys::Oid> {
    // SAFETY: both arguments are C strings; syscache lookups only.
    unsafe {
        let schema = pg_sys::get_namespace_oid(c"rekey".as_ptr(), true);
        if schema == pg_sys::InvalidOid {
            return None;
        }
        let oid = pg_sys::get_relname_relid(name.as_ptr(), schema);
        (oid != pg_sys::InvalidOid).then_some(oid)
    }
}

/// pg_extension, ExtensionRelationId of src/include/catalog/pg_extension.h.
pub const PG_EXTENSION: u32 = 3079;

/// The version of the extension pg_rekey in this database: that of its catalog. Written by CREATE
/// EXTENSION and ALTER EXTENSION UPDATE.
pub fn extension_version() -> Result<Option<String>> {
    const EXTENSION_NAME_INDEX: u32 = 3081;
    const EXTNAME: i16 = 2;
    const EXTVERSION: i16 = 6;
    let find = || Ok((PG_EXTENSION.into(), EXTENSION_NAME_INDEX.into()));
    let mut scan = Scan::open(find, &[EXTNAME], &[Key::Name(c"pg_rekey")])?;
    let version = scan.next_row().map(|row| row.bytes(EXTVERSION));
    Ok(version.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
}

/// Whether `extension` is pg_rekey.
pub fn is_our_extension(extension: pg_sys::Oid) -> bool {
    // SAFETY: a catalog look-up that may miss.
    let ours = unsafe { pg_sys::get_extension_oid(c"pg_rekey".as_ptr(), true) };
    extension == ours && ours != pg_sys::InvalidOid
}

/// The name of a function, if it is one of this extension.
pub fn verb(function: pg_sys::Oid) -> Option<String> {
    // SAFETY: catalog look-ups that answer for what is not there.
    unsafe {
        let ours = pg_sys::get_extension_oid(c"pg_rekey".as_ptr(), true);
        let functions = pg_sys::Oid::from(1255); // ProcedureRelationId
        let name = pg_sys::get_func_name(function);
        (ours != pg_sys::InvalidOid
            && !name.is_null()
            && pg_sys::getExtensionOfObject(functions, function) == ours)
            .then(|| super::text::c_string(name))
    }
}

/// Whether a relation is a member of the extension pg_rekey of this database.
pub fn belongs_to_us(relation: pg_sys::Oid) -> bool {
    // SAFETY: catalog look-ups; the dependency is still there when the drop hook asks.
    unsafe {
        let ours = pg_sys::get_extension_oid(c"pg_rekey".as_ptr(), true);
        let relations = pg_sys::Oid::from(1259); // RelationRelationId
        ours != pg_sys::InvalidOid && pg_sys::getExtensionOfObject(relations, relation) == ours
    }
}
