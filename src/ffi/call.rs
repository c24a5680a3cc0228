//! Arguments and results of our SQL functions, without a copy where PostgreSQL allows it.
//!
//! Called by every function of src/api/. pgrx's own `&str` arguments panic on text that is not
//! UTF-8 and its `Vec<u8>` results are copied twice; here an argument is a view of the datum
//! and a result is built in place in the caller's memory context.

use pgrx::callconv::{BoxRet, FcInfo};
use pgrx::datum::Datum as PgrxDatum;
use pgrx::pg_sys;
use pgrx::pgrx_sql_entity_graph::metadata::{
    ArgumentError, ReturnsError, ReturnsRef, SqlMappingRef, SqlTranslatable, TypeOrigin,
};

use super::text::detoasted;
use crate::error::{Error, Result};

/// One call of an SQL function: its arguments, its expression, its memory.
#[derive(Clone, Copy)]
pub struct Call(pg_sys::FunctionCallInfo);

impl Call {
    /// Wraps the call that PostgreSQL has just made of one of our functions.
    pub fn new(fcinfo: pg_sys::FunctionCallInfo) -> Call {
        Call(fcinfo)
    }

    /// The datum of argument `i`, or None for NULL and for an argument that was not passed.
    #[inline]
    pub fn datum(&self, i: usize) -> Option<pg_sys::Datum> {
        // SAFETY: fcinfo is the live call frame of this function and holds nargs arguments.
        unsafe {
            let nargs = usize::try_from((*self.0).nargs).unwrap_or(0);
            let arg = (*self.0).args.as_slice(nargs).get(i)?;
            (!arg.isnull).then_some(arg.value)
        }
    }

    /// The bytes of a text or bytea argument, detoasted only when they must be. They live as
    /// long as the call.
    #[inline]
    pub fn bytes(&self, i: usize) -> Option<&[u8]> {
        self.datum(i).map(detoasted)
    }

    /// A text argument that must not be NULL, as UTF-8.
    pub fn required_text(&self, i: usize, name: &'static str) -> Result<String> {
        let bytes = self.bytes(i).ok_or(Error::NullArgument(name))?;
        super::text::to_utf8_string(bytes)
    }

    /// A text argument that may be NULL, as UTF-8.
    pub fn optional_text(&self, i: usize) -> Result<Option<String>> {
        self.bytes(i).map(super::text::to_utf8_string).transpose()
    }

    /// A bigint argument that must not be NULL.
    pub fn required_i64(&self, i: usize, name: &'static str) -> Result<i64> {
        let datum = self.datum(i).ok_or(Error::NullArgument(name))?;
        Ok(i64::from_ne_bytes((datum.value() as u64).to_ne_bytes()))
    }

    /// An integer argument that must not be NULL.
    pub fn required_i32(&self, i: usize, name: &'static str) -> Result<i32> {
        let datum = self.datum(i).ok_or(Error::NullArgument(name))?;
        let bits = u32::try_from(datum.value() & 0xffff_ffff).unwrap_or(0);
        Ok(bits.cast_signed())
    }

    /// An oid or regclass argument that must not be NULL.
    pub fn required_oid(&self, i: usize, name: &'static str) -> Result<pg_sys::Oid> {
        let datum = self.datum(i).ok_or(Error::NullArgument(name))?;
        let oid = u32::try_from(datum.value() & 0xffff_ffff).unwrap_or(0);
        Ok(pg_sys::Oid::from_u32(oid))
    }

    /// A smallint argument that must not be NULL.
    pub fn required_i16(&self, i: usize, name: &'static str) -> Result<i16> {
        let datum = self.datum(i).ok_or(Error::NullArgument(name))?;
        let bits = u16::try_from(datum.value() & 0xffff).unwrap_or(0);
        Ok(bits.cast_signed())
    }

    /// A name argument that must not be NULL, as UTF-8.
    pub fn required_name(&self, i: usize, name: &'static str) -> Result<String> {
        let datum = self.datum(i).ok_or(Error::NullArgument(name))?;
        // SAFETY: the SQL declaration says name: a NUL-terminated string of at most 64 bytes.
        let bytes = unsafe { std::ffi::CStr::from_ptr(datum.cast_mut_ptr()) }.to_bytes();
        super::text::to_utf8_string(bytes)
    }

    /// A boolean argument that must not be NULL.
    pub fn required_bool(&self, i: usize, name: &'static str) -> Result<bool> {
        Ok(self.datum(i).ok_or(Error::NullArgument(name))?.value() & 0xff != 0)
    }

    /// A boolean argument that may be NULL.
    pub fn optional_bool(&self, i: usize) -> Option<bool> {
        self.datum(i).map(|d| d.value() & 0xff != 0)
    }

    /// A text[] argument that must not be NULL; an element that is NULL comes as None.
    pub fn required_texts(&self, i: usize, name: &'static str) -> Result<Vec<Option<String>>> {
        let datum = self.datum(i).ok_or(Error::NullArgument(name))?;
        let mut elements: *mut pg_sys::Datum = std::ptr::null_mut();
        let mut nulls: *mut bool = std::ptr::null_mut();
        let mut count = 0;
        // SAFETY: the SQL declaration says text[]: the datum is an array of varlena elements
        // (typlen -1, by reference, int alignment). deconstruct_array allocates both outputs.
        let (elements, nulls) = unsafe {
            let array = pg_sys::pg_detoast_datum(datum.cast_mut_ptr());
            pg_sys::deconstruct_array(
                array.cast(),
                pg_sys::TEXTOID,
                -1,
                false,
                b'i' as std::ffi::c_char,
                &mut elements,
                &mut nulls,
                &mut count,
            );
            let count = usize::try_from(count).unwrap_or(0);
            if count == 0 {
                return Ok(Vec::new());
            }
            (
                std::slice::from_raw_parts(elements, count),
                std::slice::from_raw_parts(nulls, count),
            )
        };
        elements
            .iter()
            .zip(nulls)
            .map(|(&element, &null)| {
                if null {
                    return Ok(None);
                }
                super::text::to_utf8_string(detoasted(element)).map(Some)
            })
            .collect()
    }

    /// The node that names the circumstances of the call: trigger data, for a trigger.
    pub fn context(&self) -> *mut pg_sys::Node {
        // SAFETY: fcinfo is the live call frame.
        unsafe { (*self.0).context }
    }

    /// The declared type of argument `i` at this call site.
    pub fn arg_type(&self, i: i32) -> pg_sys::Oid {
        // SAFETY: flinfo is set for every fmgr call; the function checks for a missing expr.
        unsafe { pg_sys::get_fn_expr_argtype((*self.0).flinfo, i) }
    }

    /// What an earlier call at this call site has remembered, if anything.
    pub fn remembered<T: 'static>(&self) -> Option<&T> {
        // SAFETY: fn_extra is only ever set by `remember`, and each SQL function of ours
        // remembers one type.
        unsafe { (*(*self.0).flinfo).fn_extra.cast::<T>().as_ref() }
    }

    /// Remembers `value` for later calls at this call site (one query).
    pub fn remember<T: 'static>(&self, value: T) -> &T {
        // SAFETY: fn_mcxt lives as long as flinfo; leak_and_drop_on_delete drops the value when
        // that context goes, which is when fn_extra goes too.
        unsafe {
            let flinfo = (*self.0).flinfo;
            let kept =
                pgrx::PgMemoryContexts::For((*flinfo).fn_mcxt).leak_and_drop_on_delete(value);
            (*flinfo).fn_extra = kept.cast();
            &*kept
        }
    }

    /// Runs `body` with allocations that live as long as the call site (one query).
    pub fn for_the_query<R>(&self, body: impl FnOnce() -> R) -> R {
        // SAFETY: flinfo is set for every fmgr call, and fn_mcxt outlives it.
        Memory(unsafe { (*(*self.0).flinfo).fn_mcxt }).within(body)
    }

    /// Builds the record that the function's OUT arguments declare.
    pub fn record(&self, columns: &mut [Option<pg_sys::Datum>]) -> Reply {
        let mut values: Vec<pg_sys::Datum> = Vec::with_capacity(columns.len());
        let mut nulls: Vec<bool> = Vec::with_capacity(columns.len());
        for column in columns.iter() {
            values.push(column.unwrap_or(pg_sys::Datum::null()));
            nulls.push(column.is_none());
        }
        // SAFETY: the tuple descriptor is that of our own OUT arguments, whose number and types
        // the caller matches; values and nulls live until the tuple is formed.
        unsafe {
            let mut desc: pg_sys::TupleDesc = std::ptr::null_mut();
            pg_sys::get_call_result_type(self.0, std::ptr::null_mut(), &mut desc);
            let desc = pg_sys::BlessTupleDesc(desc);
            assert_eq!(usize::try_from((*desc).natts).unwrap_or(0), values.len());
            let tuple = pg_sys::heap_form_tuple(desc, values.as_mut_ptr(), nulls.as_mut_ptr());
            Reply::datum(pg_sys::HeapTupleHeaderGetDatum((*tuple).t_data))
        }
    }
}

/// A memory context, for what must live as long as something made in it.
#[derive(Clone, Copy)]
pub struct Memory(pg_sys::MemoryContext);

impl Memory {
    /// The current one.
    pub fn current() -> Memory {
        // SAFETY: set in every process that runs SQL.
        Memory(unsafe { pg_sys::CurrentMemoryContext })
    }

    /// Runs `body` with allocations that live as long as this context.
    pub fn within<R>(self, body: impl FnOnce() -> R) -> R {
        // SAFETY: whoever holds a Memory lives in it; the guard switches back, also while
        // unwinding.
        unsafe {
            let _back = Back(pg_sys::CurrentMemoryContext);
            pg_sys::CurrentMemoryContext = self.0;
            body()
        }
    }
}

struct Back(pg_sys::MemoryContext);

impl Drop for Back {
    fn drop(&mut self) {
        // SAFETY: the context that was current when the guard was made.
        unsafe { pg_sys::CurrentMemoryContext = self.0 }
    }
}

/// The result of an SQL function.
pub struct Reply(Option<pg_sys::Datum>);

impl Reply {
    /// SQL NULL.
    pub fn null() -> Reply {
        Reply(None)
    }
    /// A datum of the declared result type.
    pub fn datum(datum: pg_sys::Datum) -> Reply {
        Reply(Some(datum))
    }
    /// A bigint.
    pub fn i64(value: i64) -> Reply {
        Reply(Some(pg_sys::Datum::from(value)))
    }
    /// An integer.
    pub fn i32(value: i32) -> Reply {
        Reply(Some(pg_sys::Datum::from(value)))
    }
    /// A boolean.
    pub fn bool(value: bool) -> Reply {
        Reply(Some(pg_sys::Datum::from(value)))
    }
    /// A text, converted from UTF-8.
    pub fn text(value: &str) -> Result<Reply> {
        super::text::text_datum(value).map(Reply::datum)
    }
    /// Void.
    pub fn void() -> Reply {
        Reply(Some(pg_sys::Datum::null()))
    }
}

// SAFETY: the datum was made for the declared result type by the function that returns it.
unsafe impl BoxRet for Reply {
    unsafe fn box_into<'fcx>(self, fcinfo: &mut FcInfo<'fcx>) -> PgrxDatum<'fcx> {
        match self.0 {
            // SAFETY: see the impl.
            Some(datum) => unsafe { fcinfo.return_raw_datum(datum) },
            None => fcinfo.return_null(),
        }
    }
}

// SAFETY: no SQL is generated from Rust signatures (`sql = false` everywhere): the mapping is
// never used.
unsafe impl SqlTranslatable for Reply {
    const TYPE_IDENT: &'static str = pgrx::pgrx_resolved_type!(Reply);
    const TYPE_ORIGIN: TypeOrigin = TypeOrigin::External;
    const ARGUMENT_SQL: std::result::Result<SqlMappingRef, ArgumentError> =
        Ok(SqlMappingRef::literal("internal"));
    const RETURN_SQL: std::result::Result<ReturnsRef, ReturnsError> =
        Ok(ReturnsRef::One(SqlMappingRef::literal("internal")));
}

/// Runs the body of an SQL function and turns its error into an ERROR with SQLSTATE, DETAIL
/// and HINT.
#[inline]
pub fn reply(fcinfo: pg_sys::FunctionCallInfo, body: impl FnOnce(Call) -> Result<Reply>) -> Reply {
    match body(Call::new(fcinfo)) {
        Ok(reply) => reply,
        Err(error) => error.raise(),
    }
}
