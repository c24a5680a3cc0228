//! Registered columns and their re-encryption: register_column, register_fingerprint,
//! unregister_column, reencrypt's steps, pause and resume, the quarantine, find_envelopes,
//! explain_rotation, evidence.

use std::cell::RefCell;
use std::time::Duration;

use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys::{FunctionCallInfo, Oid};
use pgrx::prelude::*;
use rekey_core::keyring::Privilege;

use super::grants::require;
use super::keys::{key_name, key_or_default};
use super::{live, touch};
use crate::catalog::write::{self, Audit};
use crate::catalog::{evidence, read, work};
use crate::error::{Error, Result};
use crate::ffi::call::{Call, Reply, reply};
use crate::ffi::expression::Expression;
use crate::ffi::session::{self, ActAs};
use crate::ffi::table::columns_of;
use crate::ffi::trigger::TriggerCall;
use crate::ffi::{background, hooks, relation, scan, shared, table, text};
use crate::registry;
use crate::stale::Holds;
use crate::worker::drain::Drainer;
use crate::worker::step::Step;
use crate::worker::{elsewhere, forecast, refresh};

pub(super) fn object(code: Code, message: String, detail: &str, hint: &str) -> Error {
    Error::Object(code, message, detail.to_string(), hint.to_string())
}

/// Refuses a caller who is not the table's owner.
pub(super) fn own(oid: Oid) -> Result<()> {
    let user = session::current_user();
    if !relation::exists(oid) {
        return Err(object(
            Code::ERRCODE_UNDEFINED_TABLE,
            format!("table with OID {} does not exist", oid.to_u32()),
            "It was dropped meanwhile.",
            "Name the table that you mean.",
        ));
    }
    if relation::is_owned_by(oid, user) {
        return Ok(());
    }
    Err(Error::Privilege(
        format!("must be owner of table {}", table::name(oid)?),
        "What is registered is updated in the owner's name.".to_string(),
        "Ask the table's owner or a superuser.".to_string(),
    ))
}

/// An open relation with its lock; closed when dropped, the lock stays.
struct Locked(pg_sys::Relation);

impl Locked {
    fn lock(oid: Oid) -> Result<Locked> {
        let open = relation::lock(oid);
        open.map(Locked).ok_or_else(|| {
            object(
                Code::ERRCODE_UNDEFINED_TABLE,
                format!("table with OID {} does not exist", oid.to_u32()),
                "It was dropped meanwhile.",
                "Name the table that you mean.",
            )
        })
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            relation::close(self.0);
        }
    }
}

/// Checks one leaf, or the root of a partitioned table, and gives the column's number there.
fn check(oid: Oid, column: &str, context: &str, fire_triggers: bool, holds: Holds) -> Result<i16> {
    let name = table::name(oid)?;
    let locked = Locked::lock(oid)?;
    if let Some((what, detail)) = relation::wrong_kind(locked.0) {
        return Err(object(
            Code::ERRCODE_WRONG_OBJECT_TYPE,
            format!("{name} is {what}"),
            detail,
            "Register a column of a permanent heap table, or of a partitioned one.",
        ));
    }
    let Some(attnum) = relation::column_number(oid, column) else {
        return Err(object(
            Code::ERRCODE_UNDEFINED_COLUMN,
            format!("column \"{column}\" of {name} does not exist"),
            "Columns are named as in the table, case-sensitive.",
            "\\d shows the table's columns.",
        ));
    };
    if !relation::is_bytea(oid, attnum) {
        return Err(object(
            Code::ERRCODE_DATATYPE_MISMATCH,
            format!("column \"{column}\" of {name} is not of type bytea"),
            "Envelopes are bytea.",
            "Store what encrypt_col returns in a column of type bytea.",
        ));
    }
    let (leaves, _) = registry::leaves()?;
    let known = leaves.iter().find(|leaf| leaf.table == oid);
    let known = known.map_or(&[][..], |leaf| &leaf.columns);
    // Registered already through a partitioned table above it, or below it.
    if known
        .iter()
        .any(|c| c.attnum == attnum && c.context != context)
    {
        return Err(object(
            Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            format!("column \"{column}\" of {name} is registered with another context"),
            "A partition and the table above it must agree on the context of a column.",
            "Unregister the other one, or pass its context: rekey.columns shows it.",
        ));
    }
    let other = known
        .iter()
        .find(|c| c.attnum == attnum && c.holds() != holds);
    if let Some(other) = other {
        return Err(object(
            Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            format!(
                "column \"{column}\" of {name} is registered for {}",
                other.holds().name()
            ),
            "A partition and the table above it must agree on what a column holds.",
            "Unregister the other one, or register this one as that: rekey.columns shows it.",
        ));
    }
    let mut sealed = vec![attnum];
    sealed.extend(known.iter().map(|column| column.attnum));
    if let Some(why) = registry::column_refusal(oid, attnum)? {
        return Err(object(
            Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            format!("{name} {why}"),
            "Re-encryption gives the same value other bytes.",
            "Keep what must be unique, referenced or routed by in a column of its own.",
        ));
    }
    if let Some((why, which)) = registry::refusal(locked.0, &[attnum], fire_triggers) {
        return Err(object(
            Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            format!("{name} {why}"),
            &format!("It is \"{which}\"."),
            "Re-encryption changes the column's bytes and nothing else; take away what depends on \
             them.",
        ));
    }
    // The contexts of the other columns must not read this one either.
    let contexts = known.iter().map(|column| column.context.as_str());
    let mut contexts: Vec<&str> = contexts.chain([context]).collect();
    contexts.retain(|context| !context.is_empty());
    if !contexts.is_empty() {
        let _owner = ActAs::restricted(relation::owner(locked.0));
        for context in contexts {
            Expression::prepare(locked.0, context, &sealed)?;
        }
    }
    Ok(attnum)
}

/// Registers a column of the current user's table, of envelopes or of fingerprints.
pub(super) fn register(
    action: &str,
    oid: Oid,
    column: &str,
    context: &str,
    fire_triggers: bool,
    fingerprint: Option<&read::FingerprintRow>,
) -> Result<()> {
    write::settle_registrations(oid)?;
    let name = table::name(oid)?;
    let again = || {
        object(
            Code::ERRCODE_DUPLICATE_OBJECT,
            format!("column \"{column}\" of {name} is registered already"),
            "A column is registered once.",
            "To change its context: rekey.unregister_column(table_name, column_name) first.",
        )
    };
    let number = relation::column_number(oid, column);
    let known = read::registered_columns()?;
    if number.is_some()
        && known
            .iter()
            .any(|row| row.table == oid && registry::attnum(row) == number)
    {
        return Err(again());
    }
    let holds = fingerprint.map_or(Holds::Envelopes, |_| Holds::Fingerprints);
    let attnum = check(oid, column, context, fire_triggers, holds)?;
    own(oid)?;
    for leaf in relation::leaves(oid) {
        if leaf != oid {
            if !context.is_empty() || fingerprint.is_some_and(|of| !of.normalise.is_empty()) {
                registry::refuse_other_owner(oid, leaf)?;
            }
            check(leaf, column, context, fire_triggers, holds)?;
        }
    }
    let user = session::role_name(session::current_user());
    let column_as = write::Registration {
        table: oid,
        column,
        context,
        fire_triggers,
        attnum,
        by: &user,
        fingerprint,
    };
    if !write::insert_registration(&column_as)? {
        return Err(again());
    }
    touch::follow(oid)?;
    Audit::act(action, None, &format!("{name}.{column}")).record()?;
    hooks::wake_on_commit();
    Ok(())
}

#[pg_extern(sql = false)]
fn register_column(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"register_column()");
        let oid = call.required_oid(0, "table_name")?;
        let column = call.required_name(1, "column_name")?;
        let context = call.required_text(2, "context")?;
        let fire_triggers = call.required_bool(3, "fire_triggers")?;
        own(oid)?;
        register(
            "register_column",
            oid,
            &column,
            &context,
            fire_triggers,
            None,
        )?;
        Ok(Reply::void())
    })
}

/// The registration stands for the privileges of whoever makes it: the worker asks for none when it
/// opens the values of the sealed column and makes fingerprints of them.
#[pg_extern(sql = false)]
fn register_fingerprint(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"register_fingerprint()");
        let oid = call.required_oid(0, "table_name")?;
        let column = call.required_name(1, "column_name")?;
        let sealed_column = call.required_name(2, "sealed_column")?;
        let key = key_name(&call, 3)?;
        let sealed_key = key_or_default(&call, 4)?;
        let normalise = call.required_text(5, "normalise")?;
        let context = call.required_text(6, "context")?;
        own(oid)?;
        for (key, seals, purpose, privilege) in [
            (&key, false, "lookup", Privilege::Encrypt),
            (&sealed_key, true, "seal", Privilege::Decrypt),
        ] {
            require(key, privilege)?;
            if read::key(&text::to_server(key.as_bytes())?)?.is_some_and(|row| row.seals != seals) {
                return Err(Error::Purpose(key.clone(), purpose));
            }
        }
        let (leaves, _) = registry::leaves()?;
        let name = table::name(oid)?;
        for leaf in relation::leaves(oid) {
            let sealed = relation::column_number(leaf, &sealed_column);
            let known = leaves.iter().find(|known| known.table == leaf);
            let is_sealed = |c: &registry::LeafColumn| {
                c.holds() == Holds::Envelopes && Some(c.attnum) == sealed
            };
            if !known.is_some_and(|known| known.columns.iter().any(is_sealed)) {
                return Err(Error::State(
                    format!("column \"{sealed_column}\" of {name} is not registered"),
                    "Fingerprints are made again from the sealed values beside them, in a column \
                     of which the context is known."
                        .to_string(),
                    "Register it first: rekey.register_column(table_name, column_name, context)."
                        .to_string(),
                ));
            }
        }
        let fingerprint = read::FingerprintRow {
            sealed_attnum: relation::column_number(oid, &sealed_column).unwrap_or(0),
            sealed_column,
            key,
            sealed_key,
            normalise,
        };
        refuse_normaliser(oid, &fingerprint)?;
        let action = "register_fingerprint";
        register(action, oid, &column, &context, false, Some(&fingerprint))?;
        Ok(Reply::void())
    })
}

/// Tries the expression as the worker will: acting as the table's owner.
fn refuse_normaliser(oid: Oid, of: &read::FingerprintRow) -> Result<()> {
    let locked = Locked::lock(oid)?;
    let _owner = ActAs::restricted(relation::owner(locked.0));
    refresh::normaliser(&of.normalise, &of.sealed_key).map(|_| ())
}

#[pg_extern(sql = false)]
fn unregister_column(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"unregister_column()");
        let oid = call.required_oid(0, "table_name")?;
        let column = call.required_name(1, "column_name")?;
        own(oid)?;
        live::refuse_live(oid, &column)?;
        unregister(oid, &column)?;
        Ok(Reply::void())
    })
}

/// Ends the registration of a column of a table that the current user owns.
pub(super) fn unregister(oid: Oid, column: &str) -> Result<()> {
    let name = table::name(oid)?;
    let number = relation::column_number(oid, column).unwrap_or(0);
    if !write::delete_registration(oid, column, number)? {
        return Err(object(
            Code::ERRCODE_UNDEFINED_OBJECT,
            format!("column \"{column}\" of {name} is not registered"),
            "rekey.columns shows what is.",
            "Name a registered column.",
        ));
    }
    touch::follow(oid)?;
    Audit::act("unregister_column", None, &format!("{name}.{column}")).record()?;
    hooks::wake_on_commit();
    Ok(())
}

/// Whether this session applies what another server has changed.
#[pg_extern(sql = false)]
fn is_applying(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |_| Ok(Reply::bool(session::has_origin())))
}

/// Trigger before a registration is stored, by register_column or by a restore.
#[pg_extern(sql = false)]
fn stamp_registration(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        let trigger = TriggerCall::of(&call)
            .filter(|trigger| trigger.is_before_store() && scan::belongs_to_us(trigger.table()))
            .ok_or_else(|| Error::Internal("called outside its trigger".to_string()))?;
        let datum = |attribute| columns_of(trigger.new_row(), &[attribute]).pop().flatten();
        let mut sealed = None;
        let (table, numbers, of) = if trigger.table_name() == "live_column" {
            // The worker goes on with it where it was restored.
            hooks::wake_on_commit();
            let row = read::live_row(datum)?;
            let (at, into, of) = read::LIVE_STAMP;
            let numbers = [(at, row.read_attnum()), (into, row.written_attnum())];
            (row.table, numbers.to_vec(), of)
        } else {
            let row = read::registered_row(datum)?;
            let (at, of, sealed_at) = read::STAMP;
            sealed = registry::sealed_attnum(&row).map(|number| (sealed_at, number));
            (row.table, vec![(at, registry::attnum(&row))], of)
        };
        let Some(stamp) = registry::stamp(table) else {
            return Ok(trigger.store_with(&[]));
        };
        let mut changes = Vec::new();
        for (at, number) in numbers {
            let Some(number) = number else {
                return Ok(trigger.store_with(&[]));
            };
            changes.push((at, Some(pg_sys::Datum::from(number))));
        }
        if let Some((at, number)) = sealed {
            changes.push((at, Some(pg_sys::Datum::from(number))));
        }
        changes.push((of, Some(text::text_datum(&stamp)?)));
        Ok(trigger.store_with(&changes))
    })
}

/// Event trigger on ddl_command_end: a dump names a column as it is called now.
#[pg_extern(sql = false)]
fn follow_renames(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |_| {
        write::settle_altered_tables()?;
        Ok(Reply::void())
    })
}

/// For the view columns.
#[pg_extern(sql = false)]
fn registered_attnum(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        let oid = call.required_oid(0, "table_name")?;
        let column = call.required_text(1, "column_name")?;
        let attnum = call.required_i16(2, "attnum")?;
        let stamp = call.required_text(3, "stamp")?;
        let place = registry::place(oid, &column, attnum, &stamp);
        Ok(place.map_or_else(Reply::null, |attnum| {
            Reply::datum(pg_sys::Datum::from(attnum))
        }))
    })
}

#[pg_extern(sql = false)]
fn table_stamp(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        let oid = call.required_oid(0, "table_name")?;
        registry::stamp(oid).map_or_else(|| Ok(Reply::null()), |stamp| Reply::text(&stamp))
    })
}

/// Event trigger on sql_drop: a later table must not inherit the registration of a dropped one by
/// its OID.
#[pg_extern(sql = false)]
fn forget_dropped(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |_| {
        write::forget_dropped_tables()?;
        Ok(Reply::void())
    })
}

thread_local! {
    static FOREGROUND: RefCell<Option<Drainer>> = const { RefCell::new(None) };
}

/// The drainer of a CALL while it is at work; kept for the next step whatever becomes of this one.
struct Kept(Option<Drainer>);

impl Kept {
    fn take(first: bool) -> Kept {
        let mut drainer = FOREGROUND.take().filter(|_| !first);
        if let Some(drainer) = &mut drainer {
            drainer.blame_nobody();
        }
        Kept(drainer)
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        FOREGROUND.replace(self.0.take());
    }
}

/// Waits longer than this are not waited out by CALL reencrypt(): it says why and ends.
const PATIENCE: Duration = Duration::from_secs(5);

#[pg_extern(sql = false)]
fn reencrypt_step(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"reencrypt()");
        let table = call.datum(0).map(|_| call.required_oid(0, "table_name"));
        let table = table.transpose()?;
        let first = call.required_bool(1, "first")?;
        let mut kept = Kept::take(first);
        let user = session::current_user();
        let (leaves, _) = registry::leaves()?;
        let registered = read::registered_columns()?;
        let named = registered.iter().map(|row| row.table);
        let owns_all = named
            .filter(|table| relation::exists(*table))
            .chain(leaves.iter().map(|leaf| leaf.table))
            .all(|table| relation::is_owned_by(table, user));
        match table {
            Some(oid) => own(oid)?,
            None if owns_all => {}
            None => {
                return Err(Error::Privilege(
                    "must be owner of every registered table".to_string(),
                    "Without a table all of them are re-encrypted.".to_string(),
                    "Name a table of yours: CALL rekey.reencrypt('table').".to_string(),
                ));
            }
        }
        // With nothing registered only after_drain is left to do.
        let proves = owns_all && (!registered.is_empty() || session::is_superuser(user));
        let drainer = kept.0.get_or_insert_with(|| Drainer::new(table, proves));
        let step = drainer.step()?;
        let (message, rewritten, finished) = match step {
            Step::Worked(worked) => (worked.what, worked.rewritten, false),
            Step::Wait(wait, why) if wait > PATIENCE || wait.is_zero() => (why, 0, true),
            Step::Wait(wait, why) => {
                let ms = wait.as_millis().clamp(1, 500);
                session::sleep_ms(i64::try_from(ms).unwrap_or(500));
                (why, 0, false)
            }
            Step::Idle(_) => (String::new(), 0, true),
        };
        Ok(call.record(&mut [
            Some(text::text_datum(&message)?),
            Some(pg_sys::Datum::from(rewritten)),
            Some(pg_sys::Datum::from(finished)),
        ]))
    })
}

/// A step of CALL reencrypt() has failed: has the table rest at which it did, so that the others go
/// on. False when no table is to blame.
#[pg_extern(sql = false)]
fn reencrypt_put_off(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"reencrypt()");
        let state = call.required_text(0, "sqlstate")?;
        // The server is at fault, or this extension: no table.
        let grave = ["53", "57", "58", "F0", "XX"]
            .iter()
            .any(|class| state.starts_with(class));
        let mut kept = Kept(FOREGROUND.take());
        let failed = kept
            .0
            .as_mut()
            .and_then(|drainer| Some((drainer.current()?, drainer)));
        let Some((table, drainer)) = failed.filter(|_| !grave) else {
            return Ok(Reply::bool(false));
        };
        drainer.rest(table, &format!("failed with SQLSTATE {state}"), false)?;
        drainer.blame_nobody();
        Ok(Reply::bool(true))
    })
}

/// The table of a pause, or 0 for all.
fn paused_table(call: &Call) -> Result<Oid> {
    match call.datum(0) {
        None => Ok(pg_sys::InvalidOid),
        Some(_) => call.required_oid(0, "table_name"),
    }
}

#[pg_extern(sql = false)]
fn pause(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"pause()");
        let table = paused_table(&call)?;
        let reason = call.required_text(2, "reason")?;
        let by = session::role_name(session::current_user());
        work::pause(table, call.datum(1), &reason, &by)?;
        Audit::act("pause", None, &described(table, &reason)?).record()?;
        Ok(Reply::void())
    })
}

#[pg_extern(sql = false)]
fn resume(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"resume()");
        let table = paused_table(&call)?;
        if !work::resume(table)? {
            return Err(Error::State(
                "nothing is paused there".to_string(),
                "resume() ends what pause() began for the same table, or for all.".to_string(),
                "rekey.progress shows what is paused.".to_string(),
            ));
        }
        work::put_off(table, "")?;
        Audit::act("resume", None, &described(table, "")?).record()?;
        hooks::wake_on_commit();
        Ok(Reply::void())
    })
}

fn described(oid: Oid, reason: &str) -> Result<String> {
    let what = if oid == pg_sys::InvalidOid {
        "all tables".to_string()
    } else {
        table::name(oid)?
    };
    Ok(match reason {
        "" => what,
        reason => format!("{what}: {reason}"),
    })
}

#[pg_extern(sql = false)]
fn retry_quarantine(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |_| {
        session::refuse_read_only(c"retry_quarantine()");
        let count = work::retry_all(session::current_user())?;
        hooks::wake_on_commit();
        Ok(Reply::i64(count))
    })
}

#[pg_extern(sql = false)]
fn dismiss_quarantine(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"dismiss_quarantine()");
        let id = call.required_i64(0, "quarantine_id")?;
        let reason = call.required_text(1, "reason")?;
        if reason.trim().is_empty() {
            return Err(Error::Argument(
                "a dismissal needs a reason".to_string(),
                "The proof lists the row as an exception, with the reason.".to_string(),
                "Say why the row's value is not needed.".to_string(),
            ));
        }
        let Some(oid) = work::quarantined_table(id)? else {
            return Err(object(
                Code::ERRCODE_UNDEFINED_OBJECT,
                format!("quarantine entry {id} does not exist"),
                "It may have been resolved meanwhile.",
                "rekey.errors shows the entries.",
            ));
        };
        own(oid)?;
        if work::quarantines_fingerprint(id)? {
            return Err(Error::State(
                format!("quarantine entry {id} is about a fingerprint"),
                "Another row with the same value has the same fingerprint: a dismissal would excuse \
                 it too, and a search would miss it once the slot is gone."
                    .to_string(),
                "Store the fingerprint of the row's value, or NULL, then \
                 SELECT rekey.retry_quarantine(). A value beside it that does not open can be \
                 dismissed after that."
                    .to_string(),
            ));
        }
        let by = session::role_name(session::current_user());
        work::dismiss(id, &by, &reason)?;
        Audit::act(
            "dismiss_quarantine",
            None,
            &format!("{id} in {}: {reason}", table::name(oid)?),
        )
        .record()?;
        hooks::wake_on_commit();
        Ok(Reply::void())
    })
}

#[pg_extern(sql = false)]
fn envelope_places(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |_| Reply::text(&elsewhere::as_json()?))
}

/// For explain_rotation().
#[pg_extern(sql = false)]
fn rotation_forecast(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        let key = super::keys::key_or_default(&call, 0)?;
        if read::key(&text::to_server(key.as_bytes())?)?.is_none() {
            return Err(Error::unknown_key(key));
        }
        Reply::text(&forecast::as_json(&key)?)
    })
}

/// Whether the current user may see a table's re-encryption: its owner, and pg_monitor.
fn is_visible(table: Oid) -> bool {
    let user = session::current_user();
    super::grants::monitors(user) || relation::exists(table) && relation::is_owned_by(table, user)
}

/// For views: whether the current user may see a table's re-encryption.
#[pg_extern(sql = false)]
fn table_visible(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        let oid = call.required_oid(0, "table_name")?;
        Ok(Reply::bool(is_visible(oid)))
    })
}

/// For rekey.progress: the scan of a proof that the worker of this database makes.
#[pg_extern(sql = false)]
fn proof_scan(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        let oid = call.required_oid(0, "table_name")?;
        let scan = shared::scan_in(background::database()).filter(|_| is_visible(oid));
        let here = scan.filter(|scan| scan.table == oid.to_u32());
        let blocks = |count: u32| pg_sys::Datum::from(i64::from(count));
        Ok(call.record(&mut [
            scan.map(|scan| pg_sys::Datum::from(scan.since)),
            here.map(|scan| blocks(scan.done)),
            here.map(|scan| blocks(scan.blocks)),
        ]))
    })
}

#[pg_extern(sql = false)]
fn evidence(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        let key = call.required_text(0, "key_name")?;
        if !key.is_empty() && !evidence::knows(&key)? {
            return Err(Error::unknown_key(key));
        }
        let document = evidence::document(&key, call.datum(1))?;
        crate::ffi::types::jsonb_datum(&document).map(Reply::datum)
    })
}
