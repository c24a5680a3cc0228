//! Live columns: encrypt_column, decrypt_column, their ends, and the trigger that keeps both
//! columns alike in between.
//!
//! Who acts: what is sealed is sealed as the table's owner, whose privilege encrypt on the key
//! counts: whoever may write the column in the clear needs no privilege on the key, and nobody's
//! write fails because he has none. What is opened by the trigger is opened as whoever writes the
//! row, who needs decrypt: otherwise an envelope put into the column would be opened for anyone.

use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys::{self, FunctionCallInfo, Oid};
use pgrx::prelude::*;
use rekey_core::envelope::SlotId;

use super::columns::{object, own, register, unregister};
use super::touch::as_owner;
use crate::catalog::live::{self, NewLive, PREFIX};
use crate::catalog::write::Audit;
use crate::error::{Error, Result};
use crate::ffi::call::{Call, Reply, reply};
use crate::ffi::session::{self, ActAs};
use crate::ffi::subtransaction::{Caught, subtransaction};
use crate::ffi::table::{self, Snapshot, Table, Tid, columns_of};
use crate::ffi::trigger::TriggerCall;
use crate::ffi::{hooks, relation};
use crate::live::{self as columns, Live, Plan};
use crate::typed::Target;
use crate::{guc, registry};

fn state(message: String, detail: &str, hint: &str) -> Error {
    Error::State(message, detail.to_string(), hint.to_string())
}

#[pg_extern(sql = false)]
fn encrypt_column(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"encrypt_column()");
        // The source may hold a key.
        hooks::keep_statement_out_of_log();
        let key = call.required_text(3, "key_name")?;
        let context = call.required_text(4, "context")?;
        let key = match key.as_str() {
            "" => crate::ffi::text::to_utf8_string(guc::default_key())?,
            _ => key,
        };
        if key.is_empty() {
            return Err(Error::NoDefaultKey);
        }
        let begun = Begun {
            seals: true,
            key,
            source: call.required_text(5, "source")?,
        };
        begun.begin(&call, &context)
    })
}

#[pg_extern(sql = false)]
fn decrypt_column(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"decrypt_column()");
        let begun = Begun {
            seals: false,
            key: String::new(),
            source: String::new(),
        };
        begun.begin(&call, "")
    })
}

#[pg_extern(sql = false)]
fn finish_encrypt_column(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"finish_encrypt_column()");
        finish(&call, true)
    })
}

#[pg_extern(sql = false)]
fn finish_decrypt_column(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"finish_decrypt_column()");
        finish(&call, false)
    })
}

fn function(seals: bool) -> &'static str {
    if seals {
        "encrypt_column"
    } else {
        "decrypt_column"
    }
}

/// What was asked for.
struct Begun {
    seals: bool,
    key: String,
    source: String,
}

impl Begun {
    fn begin(&self, call: &Call, context: &str) -> Result<Reply> {
        let oid = call.required_oid(0, "table_name")?;
        let column = call.required_name(1, "column_name")?;
        let into = call.required_name(2, "into_column")?;
        own(oid)?;
        // The strongest lock first: nobody is waited for twice, nor in a deadlock.
        let adds = relation::column_number(oid, &into).is_none();
        if let Some(open) = relation::lock_out(oid, adds) {
            let wrong = relation::wrong_kind(open);
            relation::close(open);
            if let Some((what, detail)) = wrong {
                return Err(object(
                    Code::ERRCODE_WRONG_OBJECT_TYPE,
                    format!("{} is {what}", table::name(oid)?),
                    detail,
                    "Name a permanent heap table, or a partitioned one.",
                ));
            }
        }
        own(oid)?;
        let name = table::name(oid)?;
        if let Some(root) = relation::ancestors(oid).last() {
            return Err(state(
                format!("{name} is a partition of {}", table::name(*root)?),
                "Its columns and triggers are those of the partitioned table.",
                "Name the partitioned table: its partitions are in.",
            ));
        }
        refuse_inheritance(oid, &name)?;
        let attnum = self.readable(oid, &name, &column)?;
        refuse_live(oid, &column)?;
        refuse_live(oid, &into)?;
        if column == into {
            return Err(Error::Argument(
                "column_name and into_column are one column".to_string(),
                "Both are kept until the old one is not read any more.".to_string(),
                "Name a new column as into_column.".to_string(),
            ));
        }
        if adds && relation::column_number(oid, &into).is_none() {
            live::add_column(oid, &into, if self.seals { "bytea" } else { "text" })?;
        }
        let Some(into_attnum) = relation::column_number(oid, &into) else {
            return Err(Error::Internal("a new column is not there".to_string()));
        };
        if relation::is_generated(oid, into_attnum) {
            return Err(state(
                format!("column \"{into}\" of {name} is generated"),
                "PostgreSQL computes it.",
                "Name a new column as into_column.",
            ));
        }
        if self.seals {
            self.register(oid, &name, &into, into_attnum, context)?;
        } else {
            Target::of(relation::column_type(oid, into_attnum))?;
        }
        // A row of the catalog first: the plans are those of the trigger and the worker.
        let trigger = format!("{PREFIX}{:08x}", SlotId::random()?.get() & 0xffff_ffff);
        live::begin(&NewLive {
            trigger: &trigger,
            table: oid,
            column: (&column, attnum),
            into: (&into, into_attnum),
            seals: self.seals,
            key: &self.key,
            source: &self.source,
            by: &session::role_name(session::current_user()),
        })?;
        self.try_plans(oid, &trigger)?;
        let key = self.seals.then_some(self.key.as_str());
        Audit::act(
            function(self.seals),
            key,
            &format!("{name}.{column} into {into}"),
        )
        .record()?;
        hooks::wake_on_commit();
        Ok(Reply::void())
    }

    /// The number of the column that is to be read.
    fn readable(&self, oid: Oid, name: &str, column: &str) -> Result<i16> {
        let Some(attnum) = relation::column_number(oid, column) else {
            return Err(object(
                Code::ERRCODE_UNDEFINED_COLUMN,
                format!("column \"{column}\" of {name} does not exist"),
                "Columns are named as in the table, case-sensitive.",
                "\\d shows the table's columns.",
            ));
        };
        if relation::is_generated(oid, attnum) {
            return Err(state(
                format!("column \"{column}\" of {name} is generated"),
                "It is not there yet when a trigger looks.",
                "Name the column that it is computed from, and give the computation as source.",
            ));
        }
        let registered = registry::leaf(oid)?.map_or(Vec::new(), |leaf| leaf.columns);
        let registered = registered.iter().any(|known| known.attnum == attnum);
        match (self.seals, registered) {
            (true, true) => Err(state(
                format!("column \"{column}\" of {name} is registered"),
                "It holds envelopes.",
                "Name a column in the clear; rekey.decrypt_column opens one of envelopes.",
            )),
            (false, false) => Err(state(
                format!("column \"{column}\" of {name} is not registered"),
                "Its registration says with which context its envelopes open.",
                "Register it first: rekey.register_column(table_name, column_name, context).",
            )),
            _ => Ok(attnum),
        }
    }

    /// Registers the column that will hold envelopes, unless it is registered so already.
    fn register(&self, oid: Oid, name: &str, into: &str, attnum: i16, context: &str) -> Result<()> {
        let registered = registry::leaf(oid)?.map_or(Vec::new(), |leaf| leaf.columns);
        match registered.iter().find(|column| column.attnum == attnum) {
            None => register("register_column", oid, into, context, false, None),
            Some(known) if known.context == context => Ok(()),
            Some(_) => Err(state(
                format!("column \"{into}\" of {name} is registered with another context"),
                "rekey.columns shows it.",
                "Pass the same context, or unregister the column first.",
            )),
        }
    }

    /// Plans what the trigger will do, and seals once as the table's owner: what is wrong shows now
    /// and not with the first write.
    fn try_plans(&self, oid: Oid, trigger: &str) -> Result<()> {
        let mut tables = relation::leaves(oid);
        if !tables.contains(&oid) {
            tables.push(oid);
        }
        for table in tables {
            let Some(open) = relation::lock(table) else {
                continue;
            };
            let planned = {
                let _owner = ActAs::restricted(relation::owner(open));
                let lives = columns::of(table)?;
                let live = lives.iter().find(|live| live.row.trigger == trigger);
                live.map(|live| Plan::prepare(open, table, live)?.try_key())
            };
            relation::close(open);
            planned.unwrap_or_else(|| Err(Error::Internal("a live column is lost".to_string())))?;
        }
        Ok(())
    }
}

/// The live column of a table of which the named column is either half.
fn find(oid: Oid, column: &str) -> Result<Option<Live>> {
    live::forget_lost(oid)?;
    let number = relation::column_number(oid, column);
    let mut lives = columns::of(oid)?;
    lives.retain(|live| Some(live.column) == number || Some(live.into) == number);
    Ok(lives.pop())
}

/// Refuses a column that is half of a live column.
pub(super) fn refuse_live(oid: Oid, column: &str) -> Result<()> {
    let Some(live) = find(oid, column)? else {
        return Ok(());
    };
    let doing = if live.row.seals {
        "being encrypted"
    } else {
        "being decrypted"
    };
    Err(state(
        format!("column \"{column}\" of {} is {doing}", table::name(oid)?),
        "A trigger keeps it and another column alike.",
        &format!(
            "End that first: rekey.finish_{}(table_name, column_name), or drop into_column with \
             CASCADE.",
            function(live.row.seals)
        ),
    ))
}

/// Refuses a table that inherits, or from which others inherit, but for partitions: columns and
/// their drops pass between the two, triggers do not.
fn refuse_inheritance(oid: Oid, name: &str) -> Result<()> {
    let Some(other) = live::relative(oid)? else {
        return Ok(());
    };
    Err(state(
        format!("{name} and {other} are tied by inheritance"),
        "Its columns and their drops pass between the two, the trigger does not.",
        "ALTER TABLE ... NO INHERIT first, or use partitions.",
    ))
}

fn finish(call: &Call, seals: bool) -> Result<Reply> {
    let oid = call.required_oid(0, "table_name")?;
    let column = call.required_name(1, "column_name")?;
    own(oid)?;
    // ShareUpdateExclusiveLock, to the end: readers and writers go on; nobody drops or disables the
    // trigger, truncates or rewrites a table, attaches or detaches one at any level.
    let mut tables: Vec<Oid> = Vec::new();
    loop {
        let mut members = relation::members(oid);
        members.retain(|member| !tables.contains(member));
        if members.is_empty() {
            break;
        }
        for member in members {
            if let Some(open) = relation::lock(member) {
                relation::close(open);
            }
            tables.push(member);
        }
    }
    tables.retain(|table| relation::exists(*table));
    own(oid)?;
    let name = table::name(oid)?;
    refuse_inheritance(oid, &name)?;
    let number = relation::column_number(oid, &column);
    let live = find(oid, &column)?;
    let live = live.filter(|live| live.row.seals == seals && Some(live.column) == number);
    let Some(live) = live else {
        return Err(object(
            Code::ERRCODE_UNDEFINED_OBJECT,
            format!(
                "column \"{column}\" of {name} is not being {}ed",
                if seals { "encrypt" } else { "decrypt" }
            ),
            "rekey.live_columns shows what is.",
            &format!("Begin with rekey.{}(...).", function(seals)),
        ));
    };
    let trigger = live.row.trigger.clone();
    let into = relation::column_name(oid, live.into).unwrap_or_default();
    if let Some(without) = live::without_trigger(&trigger, &tables)? {
        return Err(state(
            format!(
                "trigger {trigger} of {} is not enabled",
                table::name(without)?
            ),
            "Writes may have passed it.",
            &format!(
                "ALTER TABLE {name} ENABLE ALWAYS TRIGGER {trigger}, and try again: what has \
                 passed is found."
            ),
        ));
    }
    let checked = check(oid, &trigger)?;
    checked.refuse(&name, &column, &into)?;
    live::end(&trigger, oid)?;
    if !seals {
        unregister(oid, &column)?;
    }
    let act = format!("finish_{}", function(seals));
    let detail = format!("{name}.{column} into {into}: {} rows agree", checked.rows);
    Audit::act(&act, None, &detail).record()?;
    let next = format!(
        "{} rows of {name} agree; nothing keeps \"{column}\" and \"{into}\" alike any more. When \
         nothing reads the old column: ALTER TABLE {name} DROP COLUMN \"{column}\"",
        checked.rows
    );
    pgrx::notice!("{}", crate::ffi::text::message(next));
    Ok(Reply::void())
}

/// Rows of whose places an error tells.
const EXAMPLES: usize = 5;

/// What a look at every row has found.
#[derive(Default)]
struct Checked {
    rows: i64,
    missing: i64,
    different: i64,
    unreadable: i64,
    examples: Vec<String>,
}

/// Compares every row, as the table's owner and by his privileges on the keys.
///
/// One snapshot serves, and writers are not held up: the trigger was there before it, for every
/// writer (making it waited for all of them), and is there until its drop, which waits for all of
/// them again; the caller's lock keeps it from being disabled. So a row version that the snapshot
/// does not see was written past the trigger, which has made the two columns agree, unless the
/// statement wrote into_column and not the other: that is what applications do from now on.
fn check(oid: Oid, trigger: &str) -> Result<Checked> {
    let snapshot = Snapshot::latest();
    let mut checked = Checked::default();
    for leaf in relation::leaves(oid) {
        let lives = columns::of(leaf)?;
        let live = lives.iter().find(|live| live.row.trigger == trigger);
        let table = Table::open_for_scan(leaf).filter(Table::is_heap);
        let (Some(live), Some(table)) = (live, table) else {
            return Err(state(
                format!("{} cannot be read", table::name(leaf)?),
                "Somebody has it locked, its columns are not those of the table above it, or it is \
                 no heap table: of another server's rows nothing is known.",
                "Try again, or detach it.",
            ));
        };
        let _owner = ActAs::restricted(table.owner());
        let plan = Plan::prepare(table.relation(), leaf, live)?;
        table.visit(&snapshot, 0..table.blocks(), |tid, row| {
            checked.look(&plan, leaf, tid, row)
        })?;
    }
    Ok(checked)
}

impl Checked {
    fn look(
        &mut self,
        plan: &Plan,
        leaf: Oid,
        tid: Tid,
        row: *mut pg_sys::TupleTableSlot,
    ) -> Result<()> {
        self.rows += 1;
        if self.rows % 1024 == 0 {
            pgrx::check_for_interrupts!();
        }
        let stored = columns_of(row, &[plan.into])[0];
        let look = || {
            let given = plan.given(row)?;
            plan.agrees(given.as_ref(), stored)
        };
        let outcome = if plan.runs_code() || plan.converts() {
            match subtransaction(look) {
                Ok(outcome) => outcome,
                Err(caught) if caught.is_grave() => return Err(Error::Owner(caught.0)),
                Err(_) => Err(Error::Owner(Code::ERRCODE_DATA_EXCEPTION)),
            }
        } else {
            look()
        };
        let count = match outcome {
            Ok(true) => return Ok(()),
            Ok(false) if stored.is_none() => &mut self.missing,
            Ok(false) => &mut self.different,
            Err(Error::Owner(_)) if stored.is_none() => &mut self.missing,
            Err(Error::Owner(_)) => &mut self.unreadable,
            Err(error) if columns::is_of_the_row(&error) => &mut self.unreadable,
            Err(error) => return Err(error),
        };
        *count += 1;
        if self.examples.len() < EXAMPLES {
            self.examples
                .push(format!("{tid} of {}", table::name(leaf)?));
        }
        Ok(())
    }

    fn refuse(&self, name: &str, column: &str, into: &str) -> Result<()> {
        let bad = self.missing + self.different + self.unreadable;
        if bad == 0 {
            return Ok(());
        }
        Err(state(
            format!("{bad} of {} rows of {name} do not agree", self.rows),
            &format!(
                "Missing in \"{into}\": {}; different: {}; cannot be read: {}. By ctid, for \
                 example: {}.",
                self.missing,
                self.different,
                self.unreadable,
                self.examples.join(", ")
            ),
            &format!(
                "What is missing is filled by the worker or by CALL rekey.reencrypt({}); \
                 rekey.progress shows what it waits for. UPDATE ... SET \"{into}\" = NULL has the \
                 trigger write it again from \"{column}\", which counts until then.",
                quoted_literal(name)
            ),
        ))
    }
}

fn quoted_literal(name: &str) -> String {
    format!("'{}'", name.replace('\'', "''"))
}

#[pg_extern(sql = false)]
fn live(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        let trigger = TriggerCall::of(&call)
            .filter(TriggerCall::is_before_store)
            .ok_or_else(|| {
                state(
                    "rekey.live() is no ordinary function".to_string(),
                    "It runs before a row is inserted or updated.",
                    "Use rekey.encrypt_column(table_name, column_name, into_column).",
                )
            })?;
        let plan = match call.remembered::<Plan>() {
            Some(plan) => plan,
            None => call.remember(call.for_the_query(|| plan_of(&trigger))?),
        };
        let new = trigger.new_row();
        let halves = |row| {
            let values = columns_of(row, &[plan.column, plan.into]);
            (values[0], values[1])
        };
        let (plain, stored) = halves(new);
        let same = |columns: &[i16]| {
            let old = trigger.old_row();
            old.is_some_and(|old| relation::same_columns(trigger.table(), old, new, columns))
        };
        let changed = !same(&plan.inputs);
        let value = match (plain, stored) {
            // Emptied by a statement that says nothing of the other column.
            (None, Some(_)) if changed && same(&[plan.into]) => None,
            (None, _) => return Ok(trigger.store_with(&[])),
            (Some(_), None) if !changed => match fresh(&trigger, plan, true) {
                Ok(Ok(value)) => value,
                Err(Error::Owner(code)) | Ok(Err(Caught(code))) if Caught(code).is_grave() => {
                    return Err(Error::Owner(code));
                }
                // What fails now has failed before, and is not the affair of whoever updates the
                // row: the worker reports it.
                Ok(Err(_)) | Err(_) => return Ok(trigger.store_with(&[])),
            },
            // Written by a statement that leaves the other one alone: its application's affair.
            (Some(_), Some(_)) if !changed => return Ok(trigger.store_with(&[])),
            (Some(_), _) => match fresh(&trigger, plan, false)? {
                Ok(value) => value,
                Err(caught) => return Err(not_to_be_had(&trigger, plan, caught)?),
            },
        };
        Ok(trigger.store_with(&[(plan.into, value)]))
    })
}

fn plan_of(trigger: &TriggerCall) -> Result<Plan> {
    let (table, name) = (trigger.table(), trigger.name());
    let lives = columns::of(table)?;
    let Some(live) = lives.iter().find(|live| live.row.trigger == name) else {
        return Err(state(
            format!(
                "trigger {name} of {} belongs to no live column",
                table::name(table)?
            ),
            "It was renamed or made by hand, or rekey.live_column was not restored with the table.",
            "Drop the trigger, and begin again with rekey.encrypt_column or rekey.decrypt_column.",
        ));
    };
    let _owner = ActAs::restricted(trigger.table_owner());
    Plan::prepare(trigger.relation(), table, live)
}

/// The value for the row as it is to be stored; the inner error is that of the owner's code, or,
/// where the statement `goes_on` without a value, of the types'.
fn fresh(
    trigger: &TriggerCall,
    plan: &Plan,
    goes_on: bool,
) -> Result<std::result::Result<Option<pg_sys::Datum>, Caught>> {
    hooks::keep_statement_out_of_log();
    let given = if plan.runs_code() {
        match as_owner(trigger, || plan.given(trigger.new_row()))? {
            Ok(given) => given?,
            Err(caught) => return Ok(Err(caught)),
        }
    } else {
        plan.given(trigger.new_row())?
    };
    let Some(given) = given else {
        return Ok(Ok(None));
    };
    let make = || {
        let _owner = plan
            .seals()
            .then(|| ActAs::restricted(trigger.table_owner()));
        plan.make(&given)
    };
    if goes_on && plan.converts() {
        subtransaction(make).map_or_else(|caught| Ok(Err(caught)), |made| made.map(Ok))
    } else {
        make().map(Ok)
    }
}

fn not_to_be_had(trigger: &TriggerCall, plan: &Plan, caught: Caught) -> Result<Error> {
    let name = |column| relation::column_name(trigger.table(), column).unwrap_or_default();
    let code = caught.sqlstate();
    Ok(Error::Argument(
        format!(
            "the value for column \"{}\" of {} cannot be had",
            name(plan.into),
            table::name(trigger.table())?
        ),
        format!(
            "The source or the context of the live column \"{}\" fails with SQLSTATE {code}; its \
             text may quote values and is withheld.",
            name(plan.column)
        ),
        "Store a value that it takes.".to_string(),
    ))
}
