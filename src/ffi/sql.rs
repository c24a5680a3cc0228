//! SQL that the extension runs as itself: as the owner of its catalog, under a pinned search
//! path, with the catalog's own guard open.
//!
//! Called by src/catalog/ alone. Values travel as parameters, never inside the text. Who runs the
//! same statements for hours keeps them prepared: to parse and plan one takes longer than to run it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use pgrx::datum::DatumWithOid;
use pgrx::pg_sys::PgOid;
use pgrx::spi::{OwnedPreparedStatement, SpiClient, SpiResult, SpiTupleTable};
use pgrx::{Spi, pg_sys};

use super::session::{ActAs, table_owner};
use crate::error::{Error, Result};

static OWN_CODE: AtomicBool = AtomicBool::new(false);

/// Whether the extension itself is changing its catalog now.
pub fn is_own_code() -> bool {
    OWN_CODE.load(Relaxed)
}

struct OwnCode(bool);

impl OwnCode {
    fn begin() -> OwnCode {
        OwnCode(OWN_CODE.swap(true, Relaxed))
    }
}

impl Drop for OwnCode {
    fn drop(&mut self) {
        OWN_CODE.store(self.0, Relaxed);
    }
}

/// A parameter.
pub enum Arg<'a> {
    /// bigint
    Bigint(i64),
    /// text
    Text(&'a str),
    /// bytea
    Bytea(&'a [u8]),
    /// boolean, or NULL
    Bool(Option<bool>),
    /// text, or NULL
    OptionalText(Option<&'a str>),
    /// oid
    Oid(pg_sys::Oid),
    /// an interval datum of the caller's, or NULL
    Interval(Option<pg_sys::Datum>),
    /// a timestamptz datum of the caller's, or NULL
    Timestamp(Option<pg_sys::Datum>),
    /// bigint[]
    Bigints(&'a [i64]),
    /// bytea[]
    Byteas(&'a [&'a [u8]]),
    /// text[]
    Texts(&'a [&'a str]),
}

impl Arg<'_> {
    fn datum(&self) -> Result<DatumWithOid<'static>> {
        let (datum, oid) = match self {
            Arg::Bigint(v) => (Some(pg_sys::Datum::from(*v)), pg_sys::INT8OID),
            Arg::Text(v) => (Some(super::text::text_datum(v)?), pg_sys::TEXTOID),
            Arg::Bytea(v) => (Some(super::text::bytes_datum(v)?), pg_sys::BYTEAOID),
            Arg::Bool(v) => (v.map(pg_sys::Datum::from), pg_sys::BOOLOID),
            Arg::OptionalText(v) => (v.map(super::text::text_datum).transpose()?, pg_sys::TEXTOID),
            Arg::Oid(v) => (Some(pg_sys::Datum::from(*v)), pg_sys::OIDOID),
            Arg::Interval(v) => (*v, pg_sys::INTERVALOID),
            Arg::Timestamp(v) => (*v, pg_sys::TIMESTAMPTZOID),
            Arg::Bigints(v) => {
                let elements = v.iter().map(|i| pg_sys::Datum::from(*i)).collect();
                (Some(array(elements, pg_sys::INT8OID)?), INT8_ARRAY)
            }
            Arg::Byteas(v) => (Some(super::text::bytea_array(v)?), BYTEA_ARRAY),
            Arg::Texts(v) => {
                let elements = v.iter().map(|t| super::text::text_datum(t));
                let elements = elements.collect::<Result<Vec<_>>>()?;
                (Some(array(elements, pg_sys::TEXTOID)?), TEXT_ARRAY)
            }
        };
        Ok(match datum {
            // SAFETY: each datum was made for the type beside it.
            Some(datum) => unsafe { DatumWithOid::new(datum, oid) },
            None => DatumWithOid::null_oid(oid),
        })
    }
}

const INT8_ARRAY: pg_sys::Oid = pg_sys::INT8ARRAYOID;
const BYTEA_ARRAY: pg_sys::Oid = pg_sys::BYTEAARRAYOID;
const TEXT_ARRAY: pg_sys::Oid = pg_sys::TEXTARRAYOID;

/// An array of bigint or text elements in the current memory context.
fn array(mut elements: Vec<pg_sys::Datum>, of: pg_sys::Oid) -> Result<pg_sys::Datum> {
    let count = i32::try_from(elements.len()).map_err(|_| Error::TooLarge {
        bytes: elements.len(),
    })?;
    let (length, by_value, align) = if of == pg_sys::INT8OID {
        (8, true, b'd')
    } else {
        (-1, false, b'i')
    };
    // SAFETY: length, passing and alignment are those of the two types in pg_type; the elements
    // are copied into the array.
    let array = unsafe {
        let align = align as std::ffi::c_char;
        let elements = elements.as_mut_ptr();
        pg_sys::construct_array(elements, count, of, length, by_value, align)
    };
    Ok(pg_sys::Datum::from(array))
}

/// Runs one statement as the catalog's owner and returns the number of rows it processed.
pub fn run(sql: &str, args: &[Arg<'_>]) -> Result<usize> {
    execute(sql, args, |table| Ok(table.len()))
}

/// Runs one statement as the catalog's owner and returns its first bigint, if there is a row.
pub fn bigint(sql: &str, args: &[Arg<'_>]) -> Result<Option<i64>> {
    execute(sql, args, |table| {
        if table.is_empty() {
            Ok(None)
        } else {
            table.first().get_one::<i64>()
        }
    })
}

/// Runs one statement as the catalog's owner and returns its first text, NULL and no row as None.
pub fn text(sql: &str, args: &[Arg<'_>]) -> Result<Option<String>> {
    execute(sql, args, |table| {
        if table.is_empty() {
            return Ok(None);
        }
        let datum = table.first().get_datum_by_ordinal(1)?;
        Ok(datum.map(|d| String::from_utf8_lossy(super::text::detoasted(d)).into_owned()))
    })
}

/// Runs one statement as the catalog's owner and returns its rows; every column must be text.
pub fn rows(sql: &str, args: &[Arg<'_>]) -> Result<Vec<Vec<Option<String>>>> {
    execute(sql, args, cells)
}

/// Runs one query as the catalog's owner and returns its rows, as `rows` does, but assigns no
/// transaction id: on standbys too. It sees what the calling statement sees.
pub fn look(sql: &str, args: &[Arg<'_>]) -> Result<Vec<Vec<Option<String>>>> {
    as_owner(sql, args, |sql, args| {
        Spi::connect(|client| match kept(client, sql, args)? {
            Some(statement) => cells(client.select(&*statement, None, args)?),
            None => cells(client.select(sql, None, args)?),
        })
    })
}

/// Runs one statement as `role`, under the pinned search path: what it makes is his.
pub fn run_as(role: pg_sys::Oid, sql: &str) -> Result<()> {
    let sql = c_sql(sql)?;
    let _act_as = ActAs::owner(role);
    Spi::connect_mut(|client| client.update(sql.as_c_str(), None, &[]).map(|_| ()))
        .map_err(|e| Error::Internal(e.to_string()))
}

// Only names and quoted literals of DDL are ever in the text of a statement, never values.
fn c_sql(sql: &str) -> Result<CString> {
    CString::new(super::text::to_server(sql.as_bytes())?.into_owned())
        .map_err(|_| Error::NotEncodable)
}

fn cells(table: SpiTupleTable<'_>) -> SpiResult<Vec<Vec<Option<String>>>> {
    let columns = table.columns()?;
    let mut rows = Vec::new();
    for row in table {
        let mut cells = Vec::with_capacity(columns);
        for column in 1..=columns {
            let datum = row
                .get_datum_by_ordinal(column)?
                .value::<pgrx::AnyElement>()?;
            cells.push(datum.map(|d| {
                let bytes = super::text::detoasted(d.datum());
                super::text::to_utf8_string(bytes)
                    .unwrap_or_else(|_| String::from_utf8_lossy(bytes).into_owned())
            }));
        }
        rows.push(cells);
    }
    Ok(rows)
}

fn execute<R>(
    sql: &str,
    args: &[Arg<'_>],
    read: impl FnOnce(SpiTupleTable<'_>) -> SpiResult<R>,
) -> Result<R> {
    as_owner(sql, args, |sql, args| {
        Spi::connect_mut(|client| match kept(client, sql, args)? {
            Some(statement) => read(client.update(&*statement, None, args)?),
            None => read(client.update(sql, None, args)?),
        })
    })
}

/// More than all statements of the drainers. What is beyond is prepared each time.
const MOST_KEPT: usize = 200;

type Statements = HashMap<(CString, Vec<pg_sys::Oid>), Rc<OwnedPreparedStatement>>;

thread_local! {
    static KEPT: RefCell<Option<Statements>> = const { RefCell::new(None) };
}

/// From now on this process keeps its statements prepared. PostgreSQL plans one again when a table of
/// it has changed, and parses it again when that is gone and there is another.
pub fn keep_statements() {
    KEPT.with_borrow_mut(|kept| {
        kept.get_or_insert_default();
    });
}

/// The statement, prepared, in a process that keeps them.
fn kept(
    client: &SpiClient<'_>,
    sql: &CStr,
    args: &[DatumWithOid<'static>],
) -> SpiResult<Option<Rc<OwnedPreparedStatement>>> {
    if KEPT.with_borrow(Option::is_none) {
        return Ok(None);
    }
    // DDL names what it makes: the same text does not come again.
    const COMES_AGAIN: [&[u8]; 5] = [b"SELECT", b"INSERT", b"UPDATE", b"DELETE", b"WITH"];
    let text = sql.to_bytes().trim_ascii_start();
    if !COMES_AGAIN.iter().any(|verb| text.starts_with(verb)) {
        return Ok(None);
    }
    let types = args.iter().map(DatumWithOid::oid).collect::<Vec<_>>();
    let key = (sql.to_owned(), types);
    let (known, room) = KEPT.with_borrow(|kept| match kept {
        Some(kept) => (kept.get(&key).cloned(), kept.len() < MOST_KEPT),
        None => (None, false),
    });
    if known.is_some() || !room {
        return Ok(known);
    }
    let types = key
        .1
        .iter()
        .map(|oid| PgOid::from(*oid))
        .collect::<Vec<_>>();
    let statement = Rc::new(client.prepare(sql, &types)?.keep());
    KEPT.with_borrow_mut(|kept| {
        if let Some(kept) = kept {
            kept.insert(key, statement.clone());
        }
    });
    Ok(Some(statement))
}

fn as_owner<R>(
    sql: &str,
    args: &[Arg<'_>],
    body: impl FnOnce(&CStr, &[DatumWithOid<'static>]) -> SpiResult<R>,
) -> Result<R> {
    let args = args.iter().map(Arg::datum).collect::<Result<Vec<_>>>()?;
    let sql = c_sql(sql)?;
    let keys = super::scan::relation(c"key_slot").ok_or(Error::NoCatalog)?;
    let _own_code = OwnCode::begin();
    let settings = if KEPT.with_borrow(Option::is_some) {
        // What is kept is planned once: its tables are small, or asked by their keys.
        &[(c"plan_cache_mode", c"force_generic_plan")][..]
    } else {
        &[]
    };
    let _act_as = ActAs::owner_with(table_owner(keys), settings);
    body(&sql, &args).map_err(|e| Error::Internal(e.to_string()))
}
