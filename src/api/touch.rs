//! Re-encryption on touch: enable_touch, disable_touch, the trigger itself, is_stale, is_closed.
//!
//! The trigger acts for whoever updates the row: no privilege on the key is asked, since nothing
//! but the slot of an envelope changes: same key, kind, payload and context. What does not open is
//! left as it is: the trigger never fails an UPDATE because of a value, and the worker reports it.

use std::collections::BTreeSet;

use pgrx::pg_sys::{self, FunctionCallInfo, Oid};
use pgrx::prelude::*;
use rekey_core::envelope::SlotId;

use super::columns::own;
use crate::cache;
use crate::catalog::touch::{self, NAME};
use crate::catalog::write::Audit;
use crate::error::{Error, Result};
use crate::ffi::call::{Call, Reply, reply};
use crate::ffi::expression::Expression;
use crate::ffi::session::{self, ActAs};
use crate::ffi::subtransaction::{Caught, subtransaction};
use crate::ffi::table::{self, columns_of};
use crate::ffi::trigger::TriggerCall;
use crate::ffi::{relation, text};
use crate::registry;
use crate::stale::{self, Holds, Judgement, header};

#[pg_extern(sql = false)]
fn is_stale(fcinfo: FunctionCallInfo) -> Reply {
    let named = |datum| header(datum).map(|header| header.slot);
    reply(fcinfo, |call| {
        judged(&call, named, |judgement| judgement.stale)
    })
}

#[pg_extern(sql = false)]
fn is_closed(fcinfo: FunctionCallInfo) -> Reply {
    let named = |datum| Holds::Envelopes.found(datum).map(|(_, slot)| slot);
    reply(fcinfo, |call| {
        judged(&call, named, |judgement| judgement.closed)
    })
}

#[inline]
fn judged(
    call: &Call,
    named: fn(pg_sys::Datum) -> Option<SlotId>,
    verdict: fn(Judgement) -> bool,
) -> Result<Reply> {
    let Some(datum) = call.datum(0) else {
        return Ok(Reply::null());
    };
    let Some(slot) = named(datum) else {
        return Ok(Reply::bool(false));
    };
    stale::judge(slot).map(|judgement| Reply::bool(verdict(judgement)))
}

/// The trigger as it stands, which the caller may change. Locked, so that two callers do not
/// meet, nor a caller and a change of the table's columns.
fn claimed(oid: Oid) -> Result<Option<touch::Installed>> {
    own(oid)?;
    if let Some(open) = relation::lock(oid) {
        relation::close(open);
    }
    own(oid)?;
    let installed = touch::installed(oid)?;
    let name = table::name(oid)?;
    match installed {
        Some(trigger) if !trigger.ours => Err(Error::State(
            format!("{name} has another trigger named {NAME}"),
            "The name makes it the last of its kind, and is taken.".to_string(),
            "Rename that trigger: ALTER TRIGGER ... RENAME TO ....".to_string(),
        )),
        Some(trigger) if trigger.inherited => Err(Error::State(
            format!("{name} is touched through a partitioned table above it"),
            "Its trigger is that of the partitioned table.".to_string(),
            "Enable or disable touch on the partitioned table.".to_string(),
        )),
        other => Ok(other),
    }
}

#[pg_extern(sql = false)]
fn enable_touch(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"enable_touch()");
        let oid = call.required_oid(0, "table_name")?;
        let refuse_closed = call.required_bool(1, "refuse_closed")?;
        claimed(oid)?;
        let name = table::name(oid)?;
        let Some(leaf) = registry::leaf(oid)? else {
            return Err(Error::State(
                format!("no column of {name} is registered"),
                "Only registered columns are re-encrypted, with their registered contexts."
                    .to_string(),
                "Register them first: rekey.register_column(table_name, column_name, context)."
                    .to_string(),
            ));
        };
        for partition in relation::leaves(oid)
            .into_iter()
            .filter(|leaf| *leaf != oid)
        {
            if touch::installed(partition)?.is_some_and(|trigger| !trigger.inherited) {
                return Err(Error::State(
                    format!(
                        "partition {} has a touch of its own",
                        table::name(partition)?
                    ),
                    "A partition takes the trigger of the table above it.".to_string(),
                    "Disable it first: rekey.disable_touch(table_name).".to_string(),
                ));
            }
        }
        install(oid, leaf, refuse_closed)?;
        let how = if refuse_closed { ", refuse_closed" } else { "" };
        Audit::act("enable_touch", None, &format!("{name}{how}")).record()?;
        Ok(Reply::void())
    })
}

#[pg_extern(sql = false)]
fn disable_touch(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"disable_touch()");
        let oid = call.required_oid(0, "table_name")?;
        let installed = claimed(oid)?;
        let name = table::name(oid)?;
        if installed.is_none() {
            return Err(Error::State(
                format!("{name} is not touched"),
                "It has no trigger of enable_touch.".to_string(),
                "Nothing is left to do.".to_string(),
            ));
        }
        touch::remove(oid)?;
        Audit::act("disable_touch", None, &name).record()?;
        Ok(Reply::void())
    })
}

/// One condition serves a partitioned table and its partitions: it also asks for what is
/// registered for some of them alone. The trigger itself goes by the partition's own columns.
fn install(oid: Oid, leaf: registry::Leaf, refuse_closed: bool) -> Result<()> {
    let (mut envelopes, mut fingerprints) = (BTreeSet::new(), BTreeSet::new());
    let mut add = |leaf: registry::Leaf| -> Result<()> {
        // Under the names of now, which a partition shares with the table above it.
        let name = |number| relation::column_name(leaf.table, number);
        envelopes.extend(leaf.columns.iter().filter_map(|c| name(c.attnum)));
        let columns = registry::fingerprint_columns(leaf.table)?.into_iter();
        fingerprints.extend(columns.filter_map(name));
        Ok(())
    };
    add(leaf)?;
    for partition in relation::leaves(oid) {
        registry::leaf(partition)?.map_or(Ok(()), &mut add)?;
    }
    touch::install(oid, &envelopes, &fingerprints, refuse_closed)
}

/// After a change of a table's registered columns: its trigger, if it has one, asks for those.
/// A trigger that comes from a table above is that table's, and follows for its owner only.
pub(super) fn follow(oid: Oid) -> Result<()> {
    let Some(trigger) = touch::installed(oid)?.filter(|trigger| trigger.ours) else {
        return Ok(());
    };
    if !trigger.inherited {
        return match registry::leaf(oid)? {
            Some(leaf) => install(oid, leaf, trigger.refuse_closed),
            None => touch::remove(oid),
        };
    }
    for above in relation::ancestors(oid) {
        let own = touch::installed(above)?.is_some_and(|t| t.ours && !t.inherited);
        if own
            && relation::is_owned_by(above, session::current_user())
            && let Some(leaf) = registry::leaf(above)?
        {
            return install(above, leaf, trigger.refuse_closed);
        }
    }
    Ok(())
}

/// What the trigger does with the rows of one statement.
struct Plan {
    columns: Vec<i16>,
    fingerprints: Vec<i16>,
    contexts: Vec<Context>,
}

/// The context of a registered column.
enum Context {
    /// None is registered.
    Unbound,
    /// The value of an expression.
    Of(Expression),
    /// Of an expression that does not work any more: what is bound to a context is left.
    Unusable,
}

/// Runs code of the table's owner as its owner; the inner error is its own. Whoever updates the row
/// has nothing to do with that; but a cancel, or a server in need, is his affair.
pub(super) fn as_owner<R>(
    trigger: &TriggerCall,
    body: impl FnOnce() -> R,
) -> Result<std::result::Result<R, Caught>> {
    let outcome = subtransaction(|| {
        let _act_as = ActAs::restricted(trigger.table_owner());
        body()
    });
    match outcome {
        Err(caught) if caught.is_grave() || caught.sqlstate().starts_with("XX") => {
            Err(Error::Owner(caught.0))
        }
        outcome => Ok(outcome),
    }
}

impl Plan {
    /// Everything lives as long as the statement.
    fn of(trigger: &TriggerCall) -> Result<Plan> {
        let mut plan = Plan {
            columns: Vec::new(),
            fingerprints: Vec::new(),
            contexts: Vec::new(),
        };
        if trigger.serves_inserts() {
            plan.fingerprints = registry::fingerprint_columns(trigger.table())?;
        }
        let Some(leaf) = registry::leaf(trigger.table())? else {
            return Ok(plan);
        };
        let columns: Vec<i16> = leaf.columns.iter().map(|column| column.attnum).collect();
        if relation::key_refusal(trigger.relation(), &columns).is_some() {
            return Ok(plan);
        }
        plan.columns = columns;
        for column in &leaf.columns {
            plan.contexts.push(match column.context.as_str() {
                "" => Context::Unbound,
                _ if column.refuse_other_owner(trigger.table()).is_err() => Context::Unusable,
                text => as_owner(trigger, || {
                    Expression::prepare(trigger.relation(), text, &plan.columns)
                })?
                .ok()
                .and_then(Result::ok)
                .map_or(Context::Unusable, Context::Of),
            });
        }
        Ok(plan)
    }
}

#[pg_extern(sql = false)]
fn touch(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        let trigger = TriggerCall::of(&call)
            .filter(TriggerCall::is_before_store)
            .ok_or_else(|| {
                Error::State(
                    "rekey.touch() is no ordinary function".to_string(),
                    "It runs before a row is inserted or updated.".to_string(),
                    "Use rekey.enable_touch(table_name).".to_string(),
                )
            })?;
        let plan = match call.remembered::<Plan>() {
            Some(plan) => plan,
            None => call.remember(call.for_the_query(|| Plan::of(&trigger))?),
        };
        let mut changes = Vec::new();
        let stored = columns_of(trigger.new_row(), &plan.columns);
        for (at, value) in stored.into_iter().enumerate() {
            let Some(datum) = value else { continue };
            let Some(header) = header(datum) else {
                continue;
            };
            let judgement = stale::judge(header.slot)?;
            if judgement.closed && trigger.serves_inserts() {
                refuse_unless_unchanged(&trigger, plan.columns[at], datum)?;
            }
            if !judgement.stale {
                continue;
            }
            let context = match &plan.contexts[at] {
                _ if !header.context_bound => Vec::new(),
                Context::Of(expression) => match unchanged_context(&trigger, expression)? {
                    Some(context) => context,
                    None => continue,
                },
                Context::Unbound | Context::Unusable => continue,
            };
            // An Err is a value that does not open, or a root key that is not there: not the
            // affair of whoever updates the row.
            if let Ok(Some(fresh)) = cache::reencrypt(text::detoasted(datum), &context) {
                changes.push((plan.columns[at], Some(fresh)));
            }
        }
        let stored = columns_of(trigger.new_row(), &plan.fingerprints);
        for (column, value) in plan.fingerprints.iter().zip(stored) {
            if let Some(datum) = value
                && let Some((_, slot)) = Holds::Fingerprints.found(datum)
                && stale::judge(slot)?.closed
            {
                refuse_unless_unchanged(&trigger, *column, datum)?;
            }
        }
        Ok(trigger.store_with(&changes))
    })
}

/// The context of the row, unless the statement changes it, or it is NULL or cannot be had: the
/// envelope is then bound to what the row was, and is left to whoever has changed that.
fn unchanged_context(trigger: &TriggerCall, expression: &Expression) -> Result<Option<Vec<u8>>> {
    let contexts = as_owner(trigger, || -> Result<_> {
        let context = expression.evaluate(trigger.new_row())?;
        let old = trigger.old_row().map(|row| expression.evaluate(row));
        Ok((old.transpose()?, context))
    })?;
    Ok(match contexts {
        Ok(Ok((Some(old), new))) if old != new => None,
        Ok(Ok((_, new))) => new,
        Ok(Err(_)) | Err(_) => None,
    })
}

/// An UPDATE that leaves the column alone may keep what is closed where it is.
fn refuse_unless_unchanged(
    trigger: &TriggerCall,
    column: i16,
    stored: pg_sys::Datum,
) -> Result<()> {
    if let Some(old) = trigger.old_row()
        && let [Some(before)] = columns_of(old, &[column])[..]
        && text::detoasted(before) == text::detoasted(stored)
    {
        return Ok(());
    }
    let name = relation::column_name(trigger.table(), column).unwrap_or_default();
    let Some((is, slot)) = Holds::Envelopes.found(stored) else {
        return Ok(());
    };
    let (what, again) = match is {
        Holds::Envelopes => ("an envelope", "Seal the value again with encrypt_col."),
        Holds::Fingerprints => ("a fingerprint", "Make it again with fingerprint_col."),
    };
    Err(Error::State(
        format!("{what} of slot {slot} is not stored any more"),
        format!(
            "Column \"{name}\" of {} refuses {} of slots that are drained, disabled or destroyed.",
            table::name(trigger.table())?,
            is.name()
        ),
        format!(
            "{again} rekey.disable_touch(table_name), or \
         rekey.enable_touch(table_name) without refuse_closed, lifts the refusal."
        ),
    ))
}
