//! varlena values and encodings: detoasting, results built in place, UTF-8 there and back.
//!
//! Text is UTF-8 inside an envelope whatever the server's encoding is. In a UTF-8 database no
//! byte is converted or copied. Conversion errors quote the bytes that they stumble over, which
//! would be plaintext in a log: they are raised again here with a fixed text.

use std::borrow::Cow;
use std::ffi::{CString, c_int};

use pgrx::pg_sys;
use pgrx::{PgSqlErrorCode, PgTryBuilder};

use crate::error::{Error, Result};

/// Bytes of a 4-byte varlena header.
const VARHDRSZ: usize = 4;
/// Largest varlena, 1 GB - 1 (MaxAllocSize, src/include/utils/memutils.h).
const MAX_ALLOC: usize = 0x3fff_ffff;

/// The bytes of a text or bytea datum; copies only what is compressed or out of line.
#[inline]
pub fn detoasted<'a>(datum: pg_sys::Datum) -> &'a [u8] {
    let pointer: *mut pg_sys::varlena = datum.cast_mut_ptr();
    // SAFETY: the datum is a non-NULL varlena of the caller's; a plain one is viewed as it is,
    // others are detoasted into the current memory context, which outlives the call.
    unsafe {
        let plain = if is_extended(pointer) {
            pg_sys::pg_detoast_datum_packed(pointer)
        } else {
            pointer
        };
        pgrx::varlena::varlena_to_byte_slice(plain)
    }
}

/// At least the first `count` bytes of a varlena (or all, when it is shorter), without reading
/// the rest of a toasted value.
pub fn detoasted_prefix<'a>(datum: pg_sys::Datum, count: i32) -> &'a [u8] {
    let pointer: *mut pg_sys::varlena = datum.cast_mut_ptr();
    // SAFETY: as in `detoasted`; the slice is a fresh varlena in the current memory context.
    unsafe {
        if is_extended(pointer) {
            let slice = pg_sys::pg_detoast_datum_slice(pointer, 0, count);
            pgrx::varlena::varlena_to_byte_slice(slice)
        } else {
            pgrx::varlena::varlena_to_byte_slice(pointer)
        }
    }
}

/// Length of a varlena's data in bytes, detoasted, without detoasting it.
pub fn varlena_len(datum: pg_sys::Datum) -> usize {
    // SAFETY: a non-NULL varlena; the function reads its header or its toast pointer.
    let whole = unsafe { pg_sys::toast_raw_datum_size(datum) };
    (whole as usize).saturating_sub(VARHDRSZ)
}

/// Whether a varlena is stored out of line.
pub fn is_out_of_line(datum: pg_sys::Datum) -> bool {
    // SAFETY: a non-NULL varlena, of which the header is read.
    unsafe { pgrx::varatt_is_1b_e(datum.cast_mut_ptr()) }
}

/// Whether the varlena is compressed or out of line.
///
/// # Safety
/// `pointer` is a valid varlena.
#[inline]
unsafe fn is_extended(pointer: *const pg_sys::varlena) -> bool {
    // SAFETY: promised by the caller.
    unsafe { pgrx::varatt_is_1b_e(pointer.cast_mut()) || pgrx::varatt_is_4b_c(pointer.cast_mut()) }
}

/// A varlena under construction in the current memory context.
pub struct Varlena {
    pointer: *mut pg_sys::varlena,
    len: usize,
}

impl Varlena {
    /// Allocates one of `len` data bytes, not initialised beyond what the caller writes.
    /// A value that PostgreSQL cannot hold is 54000.
    #[inline]
    pub fn allocate(len: usize) -> Result<Varlena> {
        if len > MAX_ALLOC - VARHDRSZ {
            return Err(Error::TooLarge { bytes: len });
        }
        // SAFETY: palloc raises rather than return NULL; the header makes it a plain varlena.
        unsafe {
            let pointer: *mut pg_sys::varlena = pg_sys::palloc(VARHDRSZ + len).cast();
            pgrx::set_varsize_4b(pointer, len_as_int(VARHDRSZ + len));
            Ok(Varlena { pointer, len })
        }
    }

    /// The data bytes, to be written whole before `finish`.
    #[inline]
    pub fn data(&mut self) -> &mut [u8] {
        // SAFETY: `allocate` made room for exactly len bytes behind the header. u8 has no
        // invalid values, and every caller overwrites all of them.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.cast::<u8>().add(VARHDRSZ), self.len) }
    }

    /// The finished datum.
    #[inline]
    pub fn finish(self) -> pg_sys::Datum {
        pg_sys::Datum::from(self.pointer)
    }
}

fn len_as_int(len: usize) -> c_int {
    c_int::try_from(len).unwrap_or(c_int::MAX)
}

/// Whether the database's encoding is UTF-8.
#[inline]
pub fn server_is_utf8() -> bool {
    unsafe extern "C" {
        fn GetDatabaseEncoding() -> c_int;
    }
    // SAFETY: returns a field of a static struct (src/backend/utils/mb/mbutils.c); never raises.
    unsafe { GetDatabaseEncoding() == pg_sys::pg_enc::PG_UTF8 as c_int }
}

/// Text of the server's encoding as UTF-8; 22021 when it has none.
#[inline]
pub fn to_utf8(bytes: &[u8]) -> Result<Cow<'_, [u8]>> {
    if server_is_utf8() {
        return Ok(Cow::Borrowed(bytes));
    }
    convert(bytes, Direction::ToUtf8)
}

/// UTF-8 as text of the server's encoding; 22021 when it cannot be represented.
#[inline]
pub fn to_server(bytes: &[u8]) -> Result<Cow<'_, [u8]>> {
    if server_is_utf8() {
        return Ok(Cow::Borrowed(bytes));
    }
    convert(bytes, Direction::ToServer)
}

/// Text of the server's encoding as a String.
pub fn to_utf8_string(bytes: &[u8]) -> Result<String> {
    let utf8 = to_utf8(bytes)?;
    String::from_utf8(utf8.into_owned()).map_err(|_| Error::NotEncodable)
}

/// A C string of the server as a String; what is not UTF-8 is replaced.
///
/// # Safety
/// `s` is NULL or a valid C string.
pub unsafe fn c_string(s: *const std::ffi::c_char) -> String {
    if s.is_null() {
        return String::new();
    }
    // SAFETY: promised by the caller.
    let bytes = unsafe { std::ffi::CStr::from_ptr(s) }.to_bytes();
    to_utf8_string(bytes).unwrap_or_else(|_| String::from_utf8_lossy(bytes).into_owned())
}

/// Text as it may stand in a message: pgrx sends it as it is, so what is not ASCII is escaped
/// where the server's encoding is not UTF-8.
pub fn message(text: String) -> String {
    if server_is_utf8() || text.is_ascii() {
        return text;
    }
    let escape = |c: char| {
        if c.is_ascii() {
            c.to_string()
        } else {
            c.escape_unicode().to_string()
        }
    };
    text.chars().map(escape).collect()
}

/// Text from anywhere, the operating system's too, as text that the server's encoding has.
pub fn representable(text: String) -> String {
    match to_server(text.as_bytes()) {
        Ok(_) => text,
        Err(_) => message(text),
    }
}

/// A name as it is written in SQL.
pub fn quoted_identifier(name: &str) -> String {
    let server = to_server(name.as_bytes()).map(Cow::into_owned);
    let Some(server) = server.ok().and_then(|name| CString::new(name).ok()) else {
        return format!("\"{}\"", name.replace('"', "\"\""));
    };
    // SAFETY: a C string; the result is it or a palloc'd one.
    unsafe { c_string(pg_sys::quote_identifier(server.as_ptr())) }
}

/// A text as it is written in SQL.
pub fn quoted_literal(text: &str) -> String {
    let quoted = text.replace('\'', "''");
    if quoted.contains('\\') {
        format!("E'{}'", quoted.replace('\\', "\\\\"))
    } else {
        format!("'{quoted}'")
    }
}

/// A text datum from UTF-8, in the current memory context.
pub fn text_datum(value: &str) -> Result<pg_sys::Datum> {
    bytes_datum(&to_server(value.as_bytes())?)
}

/// A bytea (or ready-made text) datum in the current memory context.
pub fn bytes_datum(value: &[u8]) -> Result<pg_sys::Datum> {
    let mut varlena = Varlena::allocate(value.len())?;
    varlena.data().copy_from_slice(value);
    Ok(varlena.finish())
}

/// A bytea[] datum in the current memory context.
pub fn bytea_array(values: &[impl AsRef<[u8]>]) -> Result<pg_sys::Datum> {
    let elements = values.iter().map(|value| bytes_datum(value.as_ref()));
    let mut elements = elements.collect::<Result<Vec<_>>>()?;
    let count = c_int::try_from(elements.len()).map_err(|_| Error::TooLarge {
        bytes: elements.len(),
    })?;
    // SAFETY: length, passing and alignment are those of bytea in pg_type; the elements are copied
    // into the array.
    let array = unsafe {
        let align = b'i' as std::ffi::c_char;
        let elements = elements.as_mut_ptr();
        pg_sys::construct_array(elements, count, pg_sys::BYTEAOID, -1, false, align)
    };
    Ok(pg_sys::Datum::from(array))
}

#[derive(Clone, Copy)]
enum Direction {
    ToUtf8,
    ToServer,
}

fn convert(bytes: &[u8], direction: Direction) -> Result<Cow<'_, [u8]>> {
    // SAFETY: returns a field of a static struct; never raises.
    if unsafe { pg_sys::GetDatabaseEncoding() } == pg_sys::pg_enc::PG_SQL_ASCII as c_int {
        // No conversion exists: bytes that are UTF-8 pass both ways, others do not.
        return match std::str::from_utf8(bytes) {
            Ok(_) => Ok(Cow::Borrowed(bytes)),
            Err(_) => Err(Error::NotEncodable),
        };
    }
    let len = c_int::try_from(bytes.len()).map_err(|_| Error::TooLarge { bytes: bytes.len() })?;
    let utf8 = pg_sys::pg_enc::PG_UTF8 as c_int;
    let converted = PgTryBuilder::new(std::panic::AssertUnwindSafe(|| {
        let from = bytes.as_ptr().cast();
        // SAFETY: `from` is readable for `len` bytes; the result is `from` itself or a palloc'd
        // C string.
        Some(unsafe {
            match direction {
                Direction::ToUtf8 => pg_sys::pg_server_to_any(from, len, utf8),
                Direction::ToServer => pg_sys::pg_any_to_server(from, len, utf8),
            }
        })
    }))
    // Only conversion errors end here, and the conversion functions hold no resource: nothing
    // needs a rollback. Everything else goes on as it was.
    .catch_when(PgSqlErrorCode::ERRCODE_CHARACTER_NOT_IN_REPERTOIRE, |_| {
        None
    })
    .catch_when(PgSqlErrorCode::ERRCODE_UNTRANSLATABLE_CHARACTER, |_| None)
    .execute();
    let converted = converted.ok_or(Error::NotEncodable)?;
    if converted.cast_const().cast() == bytes.as_ptr() {
        return Ok(Cow::Borrowed(bytes));
    }
    // SAFETY: a fresh C string, freed after it was copied.
    unsafe {
        let owned = std::ffi::CStr::from_ptr(converted).to_bytes().to_vec();
        pg_sys::pfree(converted.cast());
        Ok(Cow::Owned(owned))
    }
}
