//! PostgreSQL types and the text form of their values, for typed payloads (kind 2).
//!
//! Called by src/typed.rs. Input and output run under pinned settings, so that a value sealed
//! in one session reads the same in any other; errors of the types' own functions quote the
//! value, and are raised again with their SQLSTATE and a fixed text.

use std::cell::Cell;
use std::ffi::{CStr, CString, c_char, c_int};

use pgrx::pg_sys::panic::CaughtError;
use pgrx::{PgSqlErrorCode, PgTryBuilder, pg_sys};

use super::subtransaction::subtransaction;
use crate::error::{Error, Result};

unsafe extern "C" {
    /// src/backend/utils/adt/varlena.c
    static mut bytea_output: c_int;
}

const USE_ISO_DATES: c_int = 1;
const INTSTYLE_POSTGRES: c_int = 0;
const BYTEA_OUTPUT_HEX: c_int = 1;

/// The settings that change how values print, as they were before they were pinned.
struct Pinned {
    date_style: c_int,
    interval_style: c_int,
    float_digits: c_int,
    bytea: c_int,
    timezone: *mut pg_sys::pg_tz,
}

thread_local! {
    static UTC: Cell<*mut pg_sys::pg_tz> = const { Cell::new(std::ptr::null_mut()) };
}

fn utc() -> *mut pg_sys::pg_tz {
    UTC.with(|utc| {
        if utc.get().is_null() {
            // SAFETY: loads a zone into a table that is never emptied; UTC is built in.
            utc.set(unsafe { pg_sys::pg_tzset(c"UTC".as_ptr()) });
        }
        utc.get()
    })
}

impl Pinned {
    /// Pins DateStyle ISO, IntervalStyle postgres, extra_float_digits 1, bytea_output hex and
    /// TimeZone UTC; None when they are so already.
    fn pin() -> Option<Pinned> {
        let utc = utc();
        // SAFETY: plain C variables of this single-threaded backend, set back in drop.
        unsafe {
            let before = Pinned {
                date_style: pg_sys::DateStyle,
                interval_style: pg_sys::IntervalStyle,
                float_digits: pg_sys::extra_float_digits,
                bytea: bytea_output,
                timezone: pg_sys::session_timezone,
            };
            if before.date_style == USE_ISO_DATES
                && before.interval_style == INTSTYLE_POSTGRES
                && before.float_digits == 1
                && before.bytea == BYTEA_OUTPUT_HEX
                && before.timezone == utc
            {
                return None;
            }
            pg_sys::DateStyle = USE_ISO_DATES;
            pg_sys::IntervalStyle = INTSTYLE_POSTGRES;
            pg_sys::extra_float_digits = 1;
            bytea_output = BYTEA_OUTPUT_HEX;
            pg_sys::session_timezone = utc;
            Some(before)
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // A variable that users' code has set meanwhile, through the settings' own machinery, is
        // left to that machinery.
        let utc = utc();
        // SAFETY: see `pin`.
        unsafe {
            if pg_sys::DateStyle == USE_ISO_DATES {
                pg_sys::DateStyle = self.date_style;
            }
            if pg_sys::IntervalStyle == INTSTYLE_POSTGRES {
                pg_sys::IntervalStyle = self.interval_style;
            }
            if pg_sys::extra_float_digits == 1 {
                pg_sys::extra_float_digits = self.float_digits;
            }
            if bytea_output == BYTEA_OUTPUT_HEX {
                bytea_output = self.bytea;
            }
            if pg_sys::session_timezone == utc {
                pg_sys::session_timezone = self.timezone;
            }
        }
    }
}

thread_local! {
    /// SQLSTATE of the latest report within `guarded`, in PostgreSQL's own coding.
    static SQLSTATE: Cell<c_int> = const { Cell::new(0) };
}

/// Hears every report that users' code makes, since pgrx keeps PostgreSQL's own SQLSTATEs only.
struct Listening(Box<pg_sys::ErrorContextCallback>);

impl Listening {
    fn begin() -> Listening {
        #[pgrx::pg_guard]
        unsafe extern "C-unwind" fn hear(_arg: *mut std::ffi::c_void) {
            // SAFETY: called by errfinish only, while a report is being made.
            let code = unsafe { pg_sys::geterrcode() };
            // Classes 00 and 01 are notices and warnings. Six bits a character, the first lowest.
            if !matches!(code & 0xfff, 0 | 0x40) {
                SQLSTATE.set(code);
            }
        }
        // SAFETY: the callback is boxed: its address stays until drop takes it off the stack.
        unsafe {
            let mut callback = Box::new(pg_sys::ErrorContextCallback {
                previous: pg_sys::error_context_stack,
                callback: Some(hear),
                arg: std::ptr::null_mut(),
            });
            pg_sys::error_context_stack = &mut *callback;
            Listening(callback)
        }
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        // SAFETY: callbacks nest; everything pushed above this one is gone by now.
        unsafe { pg_sys::error_context_stack = self.0.previous }
    }
}

/// Runs users' code (type, cast and domain functions) and replaces what it says by a fixed text.
///
/// An ERROR is raised again and never becomes an Err: it has left behind what only an abort puts
/// back, the user of a SECURITY DEFINER function among it. Who wants to go on runs the whole in
/// `subtransaction`.
fn guarded<R>(what: &'static str, body: impl FnOnce() -> R) -> Result<R> {
    let body = std::cell::RefCell::new(Some(body));
    SQLSTATE.set(0);
    PgTryBuilder::new(std::panic::AssertUnwindSafe(|| {
        let body = body.borrow_mut().take();
        let _listening = Listening::begin();
        body.map(|body| Ok(body()))
            .unwrap_or(Err(Error::Internal(what.to_string())))
    }))
    .catch_others(|cause| {
        let CaughtError::PostgresError(report) = &cause else {
            cause.rethrow()
        };
        // No text of the original goes on, whatever its SQLSTATE: anyone may raise any.
        let code = match report.sql_error_code() {
            PgSqlErrorCode::ERRCODE_INTERNAL_ERROR if SQLSTATE.get() != 0 => SQLSTATE.get(),
            known => known as c_int,
        };
        Error::Foreign { code, what }.raise()
    })
    .execute()
}

/// A function of a type, looked up once per query.
pub struct Function {
    info: Cell<pg_sys::FmgrInfo>,
    io_param: pg_sys::Oid,
}

impl Function {
    fn of(function: pg_sys::Oid, io_param: pg_sys::Oid) -> Function {
        // SAFETY: FmgrInfo is plain C data; fmgr_info_cxt fills it. What the function keeps lives
        // in the current memory context: `Memory::within` chooses it.
        unsafe {
            let mut info: pg_sys::FmgrInfo = std::mem::zeroed();
            pg_sys::fmgr_info_cxt(function, &mut info, pg_sys::CurrentMemoryContext);
            Function {
                info: Cell::new(info),
                io_param,
            }
        }
    }

    /// The output function of `type_oid`, in the current memory context.
    pub fn output_of(type_oid: pg_sys::Oid) -> Function {
        let mut function = pg_sys::InvalidOid;
        let mut varlena = false;
        // SAFETY: writes both; raises for a type without output.
        unsafe { pg_sys::getTypeOutputInfo(type_oid, &mut function, &mut varlena) };
        Function::of(function, pg_sys::InvalidOid)
    }

    /// The input function of `type_oid`, in the current memory context.
    pub fn input_of(type_oid: pg_sys::Oid) -> Function {
        let mut function = pg_sys::InvalidOid;
        let mut io_param = pg_sys::InvalidOid;
        // SAFETY: writes both; raises for a type without input.
        unsafe { pg_sys::getTypeInputInfo(type_oid, &mut function, &mut io_param) };
        Function::of(function, io_param)
    }

    /// A cast function.
    pub fn cast(function: pg_sys::Oid) -> Function {
        Function::of(function, pg_sys::InvalidOid)
    }

    /// The text form of a value, in the server's encoding.
    pub fn output(&self, value: pg_sys::Datum) -> Result<&'static CStr> {
        guarded("its type's output function failed", || {
            let _pinned = Pinned::pin();
            // SAFETY: value is of the type whose output function this is; the result is a fresh
            // C string of the current memory context.
            unsafe { CStr::from_ptr(pg_sys::OutputFunctionCall(self.info.as_ptr(), value)) }
        })
    }

    /// The value of a text form in the server's encoding; an Err when the type refuses it, for who
    /// says that in words of his own. In a subtransaction, hence not for every row.
    pub fn input(&self, text: &CStr) -> Result<pg_sys::Datum> {
        match subtransaction(|| self.input_as(text, -1)) {
            Ok(value) => value,
            Err(caught) => {
                let refused = Error::Foreign {
                    code: caught.0 as c_int,
                    what: "its type's input function refused it",
                };
                if caught.is_grave() {
                    refused.raise()
                }
                Err(refused)
            }
        }
    }

    /// The value of a text form, for a column with a type modifier: a length, a scale; -1 for none.
    pub fn input_as(&self, text: &CStr, typmod: i32) -> Result<pg_sys::Datum> {
        guarded("its type's input function refused it", || {
            let _pinned = Pinned::pin();
            // SAFETY: a C string that the function does not keep.
            unsafe {
                let text = text.as_ptr().cast_mut();
                pg_sys::InputFunctionCall(self.info.as_ptr(), text, self.io_param, typmod)
            }
        })
    }

    /// Applies a cast function of one to three arguments: value, typmod -1, not explicit.
    pub fn apply(&self, value: pg_sys::Datum) -> Result<pg_sys::Datum> {
        guarded("its type's cast function refused it", || {
            // SAFETY: cast functions take the source type first, then int4 and bool.
            unsafe {
                let info = self.info.as_ptr();
                let no_collation = pg_sys::InvalidOid;
                let typmod = pg_sys::Datum::from(-1i32);
                let explicit = pg_sys::Datum::from(false);
                match (*info).fn_nargs {
                    1 => pg_sys::FunctionCall1Coll(info, no_collation, value),
                    2 => pg_sys::FunctionCall2Coll(info, no_collation, value, typmod),
                    _ => pg_sys::FunctionCall3Coll(info, no_collation, value, typmod, explicit),
                }
            }
        })
    }
}

/// Checks a value against a domain; 23514 or 23502 with a fixed text when it does not fit.
pub fn check_domain(value: pg_sys::Datum, domain: pg_sys::Oid) -> Result<()> {
    guarded("its domain's constraint refused it", || {
        // SAFETY: value is of the domain's base type; without a cache slot the function looks
        // the constraints up each time.
        unsafe {
            let context = pg_sys::CurrentMemoryContext;
            pg_sys::domain_check(value, false, domain, std::ptr::null_mut(), context);
        }
    })
}

/// The base type of a domain, or the type itself.
pub fn base_type(type_oid: pg_sys::Oid) -> pg_sys::Oid {
    // SAFETY: a syscache look-up.
    unsafe { pg_sys::getBaseType(type_oid) }
}

/// Whether a type came with the server: none of its functions is users' code.
pub fn is_built_in(type_oid: pg_sys::Oid) -> bool {
    // src/include/access/transam.h
    type_oid.to_u32() < pg_sys::FirstNormalObjectId
}

/// Whether values of a type are strings: text, varchar, char(n), name, citext, domains over them.
pub fn is_string(type_oid: pg_sys::Oid) -> bool {
    // SAFETY: a syscache look-up.
    let category = unsafe { pg_sys::TypeCategory(type_oid) };
    category.to_ne_bytes()[0] == pg_sys::TYPCATEGORY_STRING
}

/// Whether two values of a type are the same, byte by byte: an equality of the type's own could
/// take 'a' for 'A'.
pub fn same(
    type_oid: pg_sys::Oid,
    one: Option<pg_sys::Datum>,
    other: Option<pg_sys::Datum>,
) -> bool {
    // src/include/utils/datum.h, which pgrx does not bind. It detoasts, and may raise.
    unsafe extern "C-unwind" {
        fn datum_image_eq(
            a: pg_sys::Datum,
            b: pg_sys::Datum,
            by_value: bool,
            len: std::ffi::c_int,
        ) -> bool;
    }
    let (one, other) = match (one, other) {
        (Some(one), Some(other)) => (one, other),
        (one, other) => return one.is_none() && other.is_none(),
    };
    let mut len = 0;
    let mut by_value = false;
    // SAFETY: both datums are of the type.
    unsafe {
        pg_sys::get_typlenbyval(type_oid, &mut len, &mut by_value);
        pg_sys::ffi::pg_guard_ffi_boundary(|| datum_image_eq(one, other, by_value, len.into()))
    }
}

/// Whether two values are equal as their type says: 1.5 and 1.50 are. A type without an equality
/// has no equal values.
pub fn equal(type_oid: pg_sys::Oid, one: pg_sys::Datum, other: pg_sys::Datum) -> Result<bool> {
    guarded("its type's equality failed", || {
        // SAFETY: the cache's entry is never freed; the function takes two values of the type.
        unsafe {
            let flags = pg_sys::TYPECACHE_EQ_OPR_FINFO as c_int;
            let entry = pg_sys::lookup_type_cache(type_oid, flags);
            if (*entry).eq_opr_finfo.fn_oid == pg_sys::InvalidOid {
                return false;
            }
            let collation = pg_sys::get_typcollation(type_oid);
            let function = &raw mut (*entry).eq_opr_finfo;
            pg_sys::FunctionCall2Coll(function, collation, one, other).value() != 0
        }
    })
}

/// A type's name for people.
pub fn display_name(type_oid: pg_sys::Oid) -> String {
    // SAFETY: returns a fresh C string.
    unsafe { super::text::c_string(pg_sys::format_type_be(type_oid)) }
}

/// A type's name with its schema, quoted as needed.
pub fn qualified_name(type_oid: pg_sys::Oid) -> String {
    // SAFETY: returns a fresh C string.
    unsafe { super::text::c_string(pg_sys::format_type_be_qualified(type_oid)) }
}

/// A type's sealed name: typname in pg_catalog, else schema and name, each quoted as needed.
pub fn sealed_name(type_oid: pg_sys::Oid) -> String {
    // SAFETY: the tuple is released after its name was copied; GETSTRUCT is its pg_type row.
    unsafe {
        let cache = pg_sys::SysCacheIdentifier::TYPEOID as c_int;
        let tuple = pg_sys::SearchSysCache1(cache, pg_sys::Datum::from(type_oid));
        if tuple.is_null() {
            return type_oid.to_u32().to_string();
        }
        let row = pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_type>();
        let namespace = (*row).typnamespace;
        let name = (*row).typname;
        pg_sys::ReleaseSysCache(tuple);
        let name: *const c_char = name.data.as_ptr();
        if namespace == PG_CATALOG {
            return super::text::c_string(name);
        }
        let schema = pg_sys::quote_identifier(pg_sys::get_namespace_name(namespace));
        let schema = super::text::c_string(schema);
        format!(
            "{schema}.{}",
            super::text::c_string(pg_sys::quote_identifier(name))
        )
    }
}

const PG_CATALOG: pg_sys::Oid = pg_sys::Oid::from_u32(pg_sys::PG_CATALOG_NAMESPACE);

/// The type of a sealed name, or None when it is gone.
pub fn type_of_sealed_name(name: &str) -> Option<pg_sys::Oid> {
    let (schema, name) = match split_qualified(name) {
        Some((schema, name)) => {
            let schema = c_server(&schema)?;
            // SAFETY: a syscache look-up that may miss.
            (
                unsafe { pg_sys::get_namespace_oid(schema.as_ptr(), true) },
                name,
            )
        }
        None => (PG_CATALOG, name.to_string()),
    };
    let name = c_server(&name)?;
    // SAFETY: a syscache look-up by name and namespace; attribute 1 of pg_type is its oid.
    let oid = unsafe {
        pg_sys::GetSysCacheOid(
            pg_sys::SysCacheIdentifier::TYPENAMENSP as c_int,
            1,
            pg_sys::Datum::from(name.as_ptr()),
            pg_sys::Datum::from(schema),
            pg_sys::Datum::null(),
            pg_sys::Datum::null(),
        )
    };
    (oid != pg_sys::InvalidOid).then_some(oid)
}

fn c_server(text: &str) -> Option<CString> {
    CString::new(super::text::to_server(text.as_bytes()).ok()?.into_owned()).ok()
}

/// Splits `schema.name`, either part possibly in double quotes; None without a schema.
fn split_qualified(name: &str) -> Option<(String, String)> {
    let mut parts = vec![String::new()];
    let mut quoted = false;
    let mut chars = name.chars().peekable();
    while let Some(c) = chars.next() {
        let last = parts.len() - 1;
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => {
                chars.next();
                parts[last].push('"');
            }
            '"' => quoted = !quoted,
            '.' if !quoted => parts.push(String::new()),
            c => parts[last].push(c),
        }
    }
    let [schema, name]: [String; 2] = parts.try_into().ok()?;
    Some((schema, name))
}

/// How a value of one type becomes one of another.
pub enum Cast {
    /// The bytes are the same.
    Relabel,
    /// By a function.
    By(Function),
    /// Through its text form.
    ThroughText,
}

/// The binary-coercible, implicit or assignment cast from `source`, which a sealed value names, to
/// `target`, if any.
///
/// 42501 when the cast's function is not the caller's to run, or code of somebody else would run
/// as the caller: whoever may seal, chooses the type.
pub fn cast_between(source: pg_sys::Oid, target: pg_sys::Oid) -> Result<Option<Cast>> {
    use pg_sys::CoercionPathType as path;
    let mut function = pg_sys::InvalidOid;
    // SAFETY: catalog look-ups; writes the function's OID.
    let found = unsafe {
        let context = pg_sys::CoercionContext::COERCION_ASSIGNMENT;
        pg_sys::find_coercion_pathway(target, source, context, &mut function)
    };
    Ok(match found {
        path::COERCION_PATH_RELABELTYPE => {
            refuse_code_of_others(source, None)?;
            Some(Cast::Relabel)
        }
        path::COERCION_PATH_FUNC => {
            refuse_code_of_others(source, Some(function))?;
            may_execute(function)?;
            Some(Cast::By(Function::cast(function)))
        }
        path::COERCION_PATH_COERCEVIAIO => Some(Cast::ThroughText),
        _ => None,
    })
}

/// Refuses to read a value as `source`, and to cast it by `function`, unless both came with the
/// server or belong to a superuser or the current user. A domain is never sealed as such: who finds
/// one under a sealed name finds another type than was sealed.
fn refuse_code_of_others(source: pg_sys::Oid, function: Option<pg_sys::Oid>) -> Result<()> {
    let trusted = |owner: Option<pg_sys::Oid>| {
        owner.is_some_and(|owner| {
            owner == super::session::current_user() || super::session::is_superuser(owner)
        })
    };
    let reads = is_built_in(source) || base_type(source) == source && trusted(type_owner(source));
    if reads && function.is_none_or(|function| trusted(function_owner(function))) {
        return Ok(());
    }
    Err(Error::Privilege(
        "permission denied to convert the sealed value".to_string(),
        format!(
            "The type {} or its cast is neither PostgreSQL's own, nor a superuser's, nor yours: \
             its code would run with your privileges.",
            display_name(source)
        ),
        "Open it as its own type, or with decrypt_col as text, and cast explicitly.".to_string(),
    ))
}

fn may_execute(function: pg_sys::Oid) -> Result<()> {
    let user = super::session::current_user();
    // SAFETY: a catalog look-up.
    #[cfg(feature = "pg15")]
    let verdict = unsafe { pg_sys::pg_proc_aclcheck(function, user, pg_sys::ACL_EXECUTE) };
    // SAFETY: a catalog look-up in pg_proc (1255).
    #[cfg(not(feature = "pg15"))]
    let verdict = unsafe {
        let class = pg_sys::Oid::from(1255);
        pg_sys::object_aclcheck(class, function, user, pg_sys::ACL_EXECUTE.into())
    };
    if verdict == pg_sys::AclResult::ACLCHECK_OK {
        return Ok(());
    }
    Err(Error::Privilege(
        "permission denied for the function of a cast".to_string(),
        "decrypt_col_as runs a cast only for those who may run its function.".to_string(),
        "Open the value as its own type, or have EXECUTE on the function granted.".to_string(),
    ))
}

/// Why a type cannot be sealed or opened to; None when it can.
pub fn refusal(type_oid: pg_sys::Oid) -> Option<&'static str> {
    refusal_within(type_oid, &mut Vec::new())
}

fn refusal_within(type_oid: pg_sys::Oid, seen: &mut Vec<pg_sys::Oid>) -> Option<&'static str> {
    // money, oid and the reg types: their text form depends on the locale or on this catalog.
    const NAMES_LOCAL_OBJECTS: [u32; 12] = [
        26, 24, 2202, 2203, 2204, 2205, 2206, 4096, 4089, 3734, 3769, 4191,
    ];
    if seen.contains(&type_oid) {
        return None;
    }
    seen.push(type_oid);
    match type_oid.to_u32() {
        790 => return Some("the text form of money depends on the locale"),
        oid if NAMES_LOCAL_OBJECTS.contains(&oid) => {
            return Some("object identifiers mean something in one database only");
        }
        _ => {}
    }
    // SAFETY: syscache look-ups that return 0 for what a type is not.
    unsafe {
        match u8::try_from(pg_sys::get_typtype(type_oid)).unwrap_or(0) {
            b'p' => return Some("a pseudo-type has no text form that can be read back"),
            b'd' => return refusal_within(base_type(type_oid), seen),
            b'r' => return refusal_within(pg_sys::get_range_subtype(type_oid), seen),
            b'm' => return refusal_within(pg_sys::get_multirange_range(type_oid), seen),
            b'c' => return composite_refusal(type_oid, seen),
            _ => {}
        }
        let element = pg_sys::get_element_type(type_oid);
        if element != pg_sys::InvalidOid {
            refusal_within(element, seen)
        } else {
            None
        }
    }
}

fn composite_refusal(type_oid: pg_sys::Oid, seen: &mut Vec<pg_sys::Oid>) -> Option<&'static str> {
    // SAFETY: the descriptor is a copy in our memory; attrs holds natts entries.
    let columns: Vec<pg_sys::Oid> = unsafe {
        let desc = pg_sys::lookup_rowtype_tupdesc_copy(type_oid, -1);
        pgrx::PgTupleDesc::from_pg_copy(desc)
            .iter()
            .filter(|column| !column.is_dropped())
            .map(|column| column.atttypid)
            .collect()
    };
    columns
        .into_iter()
        .find_map(|column| refusal_within(column, seen))
}

/// Gives the ERROR that this process is about to raise an SQLSTATE that only users' code knows:
/// pgrx raises PostgreSQL's own ones only. A context callback sets it at the last moment.
pub fn override_sqlstate(code: c_int) {
    unsafe extern "C-unwind" {
        /// src/backend/utils/error/elog.c
        fn errcode(sqlerrcode: c_int) -> c_int;
    }
    #[pgrx::pg_guard]
    unsafe extern "C-unwind" fn set(_arg: *mut std::ffi::c_void) {
        // SAFETY: called by errfinish only, while the report is being made.
        unsafe { errcode(SQLSTATE.get()) };
    }
    static mut CALLBACK: pg_sys::ErrorContextCallback = pg_sys::ErrorContextCallback {
        previous: std::ptr::null_mut(),
        callback: Some(set),
        arg: std::ptr::null_mut(),
    };
    SQLSTATE.set(code);
    // SAFETY: the callback is a static, so it outlives the jump; whoever catches the ERROR puts
    // the stack of callbacks back to his own.
    unsafe {
        let callback = &raw mut CALLBACK;
        (*callback).previous = pg_sys::error_context_stack;
        pg_sys::error_context_stack = callback;
    }
}

/// The text form of a timestamptz, in the session's settings.
pub fn timestamp_text(at: i64) -> String {
    // SAFETY: timestamptz_out takes a timestamptz and returns a fresh C string.
    unsafe {
        let function = pg_sys::Oid::from(pg_sys::F_TIMESTAMPTZ_OUT);
        super::text::c_string(pg_sys::OidOutputFunctionCall(
            function,
            pg_sys::Datum::from(at),
        ))
    }
}

/// The text of a jsonb value, in UTF-8.
pub fn jsonb_text(value: pg_sys::Datum) -> Result<Vec<u8>> {
    let text = Function::output_of(pg_sys::JSONBOID).output(value)?;
    Ok(super::text::to_utf8(text.to_bytes())?.into_owned())
}

/// A jsonb value of a text in UTF-8, in the current memory context.
pub fn jsonb_datum(text: &str) -> Result<pg_sys::Datum> {
    let server = super::text::to_server(text.as_bytes())?.into_owned();
    let server = CString::new(server).map_err(|_| Error::NotEncodable)?;
    Function::input_of(pg_sys::JSONBOID).input_as(&server, -1)
}

/// The owner of a function; None when there is no such function.
pub fn function_owner(function: pg_sys::Oid) -> Option<pg_sys::Oid> {
    let cache = pg_sys::SysCacheIdentifier::PROCOID as c_int;
    // SAFETY: a row of that cache is a pg_proc.
    unsafe {
        cached(cache, function, |row: &pg_sys::FormData_pg_proc| {
            row.proowner
        })
    }
}

/// The owner of a type; None when there is no such type.
fn type_owner(type_oid: pg_sys::Oid) -> Option<pg_sys::Oid> {
    let cache = pg_sys::SysCacheIdentifier::TYPEOID as c_int;
    // SAFETY: a row of that cache is a pg_type.
    unsafe {
        cached(cache, type_oid, |row: &pg_sys::FormData_pg_type| {
            row.typowner
        })
    }
}

/// Reads the row of an object in the cache by OID.
///
/// # Safety
/// `T` is the fixed part of the cache's rows; `read` does not raise.
unsafe fn cached<T, R>(cache: c_int, oid: pg_sys::Oid, read: impl FnOnce(&T) -> R) -> Option<R> {
    // SAFETY: GETSTRUCT is the fixed part of the cached row, which is read before its release.
    unsafe {
        let tuple = pg_sys::SearchSysCache1(cache, pg_sys::Datum::from(oid));
        if tuple.is_null() {
            return None;
        }
        let result = read(&*pg_sys::GETSTRUCT(tuple).cast::<T>());
        pg_sys::ReleaseSysCache(tuple);
        Some(result)
    }
}
