//! Views of opened columns: create_view, and the trigger that seals what is written through one.
//!
//! A view shows the registered columns of a table opened and everything else as it is. The trigger
//! does to the table what was asked of the view, as whoever asked: privileges on the table and on
//! the keys, row security and the table's own triggers are those of a statement of his own. It
//! reads from the view's query what the view shows, and seals for what the view opens.
//! Invariant: a value that does not change is not sealed again, and a change that somebody else has
//! made meanwhile is never overwritten in silence.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys::{self, Datum, FunctionCallInfo, Oid};
use pgrx::prelude::*;

use super::columns::own;
use super::seal::key_or_default;
use crate::catalog::views::{self, Column, Sealed};
use crate::catalog::{read, write::Audit};
use crate::error::{Error, Result};
use crate::ffi::call::{Call, Reply, reply};
use crate::ffi::expression::Expression;
use crate::ffi::statement::{FirstRow, Statement};
use crate::ffi::table::columns_of;
use crate::ffi::trigger::TriggerCall;
use crate::ffi::types::{self, Cast, Function};
use crate::ffi::view::{self, Beneath, KeyColumn};
use crate::ffi::{hooks, relation, session, table, text};
use crate::registry;
use crate::sealing;
use crate::typed::Sealable;

#[pg_extern(sql = false)]
fn create_view(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"create_view()");
        let oid = call.required_oid(0, "table_name")?;
        let view = call.required_text(1, "view_name")?;
        let key = call.required_text(2, "key_name")?;
        let wanted = wishes(&call, 3)?;
        own(oid)?;
        let table = table::name(oid)?;
        let leaf = registry::leaf(oid)?.ok_or_else(|| {
            Error::State(
                format!("no column of {table} is registered"),
                "A view opens the registered columns, with their registered contexts.".to_string(),
                "Register them first: rekey.register_column(table_name, column_name, context)."
                    .to_string(),
            )
        })?;
        refuse_children(oid)?;
        if Beneath::open(oid).key().is_empty() {
            return Err(Error::State(
                format!("{table} has no primary key"),
                "What is written through the view finds its row by the primary key.".to_string(),
                format!("ALTER TABLE {table} ADD PRIMARY KEY (...)."),
            ));
        }
        let name = views::name(&view, oid)?.ok_or_else(|| {
            Error::Argument(
                format!("\"{view}\" is not the name of a view"),
                "A name has a schema at most before it.".to_string(),
                "Without a schema the view goes into the schema of the table.".to_string(),
            )
        })?;
        if name.taken && !name.ours {
            return Err(Error::Object(
                Code::ERRCODE_DUPLICATE_TABLE,
                format!("relation {} already exists", name.qualified),
                "It is no view of rekey.create_view.".to_string(),
                "Choose another name, or drop it first.".to_string(),
            ));
        }
        if let Some(unknown) = wanted
            .keys()
            .find(|name| leaf.columns.iter().all(|c| c.name != **name))
        {
            return Err(Error::Object(
                Code::ERRCODE_UNDEFINED_COLUMN,
                format!("column \"{unknown}\" of {table} is not registered"),
                "The argument columns says how registered columns are opened.".to_string(),
                "rekey.columns shows what is registered.".to_string(),
            ));
        }
        let mut columns = Vec::new();
        for attnum in relation::columns(oid) {
            let Some(name) = relation::column_name(oid, attnum) else {
                continue;
            };
            let registered = leaf.columns.iter().find(|column| column.attnum == attnum);
            let wish = wanted.get(&name);
            let sealed = registered.map(|registered| Sealed {
                type_name: wish.and_then(|wish| wish.type_name.clone()),
                context: registered.context.clone(),
                key: wish
                    .and_then(|wish| wish.key.clone())
                    .unwrap_or_else(|| key.clone()),
            });
            if let Some(sealed) = &sealed
                && !sealed.key.is_empty()
                && read::key(&text::to_server(sealed.key.as_bytes())?)?.is_none()
            {
                return Err(Error::unknown_key(sealed.key.clone()));
            }
            columns.push(Column { name, sealed });
        }
        views::create(&name.qualified, oid, &columns)?;
        Audit::act(
            "create_view",
            None,
            &format!("{} on {table}", name.qualified),
        )
        .record()?;
        Ok(Reply::void())
    })
}

/// A view cannot tell the rows of a table from those of its children: their keys may be the same.
fn refuse_children(oid: Oid) -> Result<()> {
    if !relation::has_children(oid) {
        return Ok(());
    }
    let table = table::name(oid)?;
    Err(Error::State(
        format!("other tables inherit from {table}"),
        "Its primary key does not tell its rows from theirs.".to_string(),
        "Use a partitioned table, or end the inheritance: ALTER TABLE ... NO INHERIT.".to_string(),
    ))
}

/// How the caller wants a column opened and sealed.
#[derive(Default)]
struct Wish {
    type_name: Option<String>,
    key: Option<String>,
}

/// The argument `columns`: {"salary": {"type": "numeric", "key": "pay"}}.
fn wishes(call: &Call, i: usize) -> Result<HashMap<String, Wish>> {
    let refused = |detail: String| {
        Error::Argument(
            "the argument columns is not understood".to_string(),
            detail,
            "Give a JSON object: {\"salary\": {\"type\": \"numeric\", \"key\": \"pay\"}}."
                .to_string(),
        )
    };
    let datum = call.datum(i).ok_or(Error::NullArgument("columns"))?;
    let given: serde_json::Value = serde_json::from_slice(&types::jsonb_text(datum)?)
        .map_err(|_| refused("It is no JSON.".to_string()))?;
    let given = given
        .as_object()
        .ok_or_else(|| refused("It is no object.".to_string()))?;
    let mut wishes = HashMap::new();
    for (column, settings) in given {
        let settings = settings
            .as_object()
            .ok_or_else(|| refused(format!("What \"{column}\" has is no object.")))?;
        let mut wish = Wish::default();
        for (name, value) in settings {
            let value = value
                .as_str()
                .ok_or_else(|| refused(format!("\"{name}\" of \"{column}\" is no string.")))?;
            match name.as_str() {
                "type" => wish.type_name = qualified_type(value)?,
                "key" => wish.key = Some(value.to_string()),
                _ => return Err(refused(format!("\"{name}\" is neither type nor key."))),
            }
        }
        wishes.insert(column.clone(), wish);
    }
    Ok(wishes)
}

/// The qualified name of a type that the caller names under his own search path; None for text.
fn qualified_type(name: &str) -> Result<Option<String>> {
    let unknown = || {
        Error::Object(
            Code::ERRCODE_UNDEFINED_OBJECT,
            format!("type \"{name}\" does not exist"),
            "It is looked up in the search path.".to_string(),
            "Name a type, without a length: \"numeric\", \"app.mood\".".to_string(),
        )
    };
    let server = text::to_server(name.as_bytes())?.into_owned();
    let server = std::ffi::CString::new(server).map_err(|_| unknown())?;
    let datum = Function::input_of(pg_sys::REGTYPEOID)
        .input(&server)
        .map_err(|_| unknown())?;
    let oid = Oid::from_u32(u32::try_from(datum.value() & 0xffff_ffff).unwrap_or(0));
    if oid == pg_sys::InvalidOid {
        return Err(unknown());
    }
    if let Some(reason) = types::refusal(oid) {
        return Err(Error::RefusedType(types::display_name(oid), reason));
    }
    Ok((oid != pg_sys::TEXTOID).then(|| types::qualified_name(oid)))
}

/// A column of the view, as the trigger needs it.
struct Shown {
    /// Number in the table.
    attnum: i16,
    /// Present name in the table, quoted.
    name: String,
    /// Type that the view shows.
    type_oid: Oid,
    kind: Kind,
}

enum Kind {
    Plain,
    /// PostgreSQL computes it.
    Generated,
    /// NULL is replaced by the next value of its sequence.
    Identity(Option<Expression>),
    Sealed {
        context: Option<Expression>,
        key: String,
        sealable: Sealable,
    },
}

/// How values of a type are sealed: as encrypt_col does, to which varchar and its like are text.
fn sealable(type_oid: Oid) -> Result<Sealable> {
    let is_text = types::is_string(type_oid)
        && matches!(
            types::cast_between(types::base_type(type_oid), pg_sys::TEXTOID),
            Ok(Some(Cast::Relabel))
        );
    Sealable::of(if is_text { pg_sys::TEXTOID } else { type_oid })
}

impl Shown {
    fn is_sealed(&self) -> bool {
        matches!(self.kind, Kind::Sealed { .. })
    }

    fn context(&self) -> Option<&Expression> {
        match &self.kind {
            Kind::Sealed { context, .. } => context.as_ref(),
            _ => None,
        }
    }

    /// The envelope of a value, for the current user; a column that is not sealed takes the value.
    fn stored(&self, value: Option<Datum>, context: Option<Datum>) -> Result<Option<Datum>> {
        let (Kind::Sealed { key, sealable, .. }, Some(value)) = (&self.kind, value) else {
            return Ok(value);
        };
        let key = text::to_server(key.as_bytes())?;
        let key = key_or_default(&key)?;
        let context = text::detoasted(context.ok_or(Error::NullArgument("context"))?);
        let (kind, prefix, body) = sealable.payload(value)?;
        sealing::seal(key, &text::to_utf8(context)?, kind, prefix, &body).map(Some)
    }

    /// The type of what is stored.
    fn stored_type(&self) -> Oid {
        if self.is_sealed() {
            pg_sys::BYTEAOID
        } else {
            self.type_oid
        }
    }
}

/// What a statement does: its kind, and the columns that take part.
#[derive(PartialEq, Eq, Hash, Clone)]
struct Shape {
    kind: u8,
    columns: Vec<usize>,
    /// Sealed columns that must be empty still.
    empty: Vec<usize>,
    overriding: bool,
}

/// What the trigger does with the rows of one statement.
struct Plan {
    table: String,
    columns: Vec<Shown>,
    key: Vec<(usize, KeyColumn)>,
    row: view::Row,
    statements: RefCell<HashMap<Shape, Rc<Statement>>>,
}

type Row = Vec<Option<Datum>>;
type Parameters = Vec<(Oid, Option<Datum>)>;

/// Puts a parameter into a statement and gives its place.
fn parameter(parameters: &mut Parameters, type_oid: Oid, value: Option<Datum>) -> String {
    parameters.push((type_oid, value));
    format!("${}", parameters.len())
}

impl Plan {
    /// Everything lives as long as the statement.
    fn of(trigger: &TriggerCall) -> Result<Plan> {
        let unusable = || {
            Error::State(
                format!(
                    "view {} is not one of rekey.create_view",
                    trigger.table_name()
                ),
                "The trigger reads the view's query, and does not understand this one.".to_string(),
                "Make the view with rekey.create_view(table_name, view_name).".to_string(),
            )
        };
        let (oid, shown) = view::columns(trigger.relation())?.ok_or_else(unusable)?;
        refuse_children(oid)?;
        let beneath = Beneath::open(oid);
        let mut keys = trigger.arguments()?.into_iter();
        let mut columns = Vec::new();
        for shown in shown {
            let attnum = shown.attnum;
            let kind = match shown.sealed {
                Some(sealed) => Kind::Sealed {
                    context: sealed.context,
                    key: keys.next().unwrap_or_default(),
                    sealable: sealable(shown.type_oid)?,
                },
                None if relation::is_generated(oid, attnum) => Kind::Generated,
                None if relation::identity(oid, attnum) != 0 => {
                    Kind::Identity(beneath.next_value(attnum)?)
                }
                None => Kind::Plain,
            };
            let name = relation::column_name(oid, attnum).ok_or_else(unusable)?;
            columns.push(Shown {
                attnum,
                name: format!("\"{}\"", name.replace('"', "\"\"")),
                type_oid: shown.type_oid,
                kind,
            });
        }
        let key = beneath
            .key()
            .into_iter()
            .map(|key| {
                columns
                    .iter()
                    .position(|c| c.attnum == key.attnum && !c.is_sealed())
                    .map(|at| (at, key))
            })
            .collect::<Option<Vec<_>>>()
            .filter(|key| !key.is_empty() && columns.iter().any(Shown::is_sealed))
            .ok_or_else(unusable)?;
        Ok(Plan {
            table: table::name(oid)?,
            columns,
            key,
            row: beneath.row(),
            statements: RefCell::new(HashMap::new()),
        })
    }

    fn row_of(&self, slot: *mut pg_sys::TupleTableSlot) -> Row {
        let count = i16::try_from(self.columns.len()).unwrap_or(i16::MAX);
        columns_of(slot, &(1..=count).collect::<Vec<_>>())
    }

    fn plain(&self) -> impl Iterator<Item = (usize, &Shown)> {
        self.columns
            .iter()
            .enumerate()
            .filter(|(_, c)| !c.is_sealed())
    }

    /// The contexts of the sealed columns for a row of the view, as text datums.
    fn contexts(&self, row: &Row) -> Result<Row> {
        let slot = self
            .row
            .fill(self.plain().map(|(at, column)| (column.attnum, row[at])));
        let of = |column: &Shown| match column.context() {
            None => text::text_datum("").map(Some),
            // NULL is refused by the verbs.
            Some(expression) => match expression.evaluate(slot)? {
                Some(context) => text::bytes_datum(&text::to_server(&context)?).map(Some),
                None => Ok(None),
            },
        };
        self.columns.iter().map(of).collect()
    }

    fn run(
        &self,
        shape: Shape,
        sql: impl FnOnce() -> String,
        parameters: &Parameters,
    ) -> Result<Option<FirstRow>> {
        let known = self.statements.borrow().get(&shape).cloned();
        let statement = match known {
            Some(statement) => statement,
            None => {
                let types: Vec<Oid> = parameters.iter().map(|(of, _)| *of).collect();
                let fresh = Rc::new(Statement::prepare(&sql(), &types)?);
                self.statements.borrow_mut().insert(shape, fresh.clone());
                fresh
            }
        };
        statement.execute(
            &parameters
                .iter()
                .map(|(_, value)| *value)
                .collect::<Vec<_>>(),
        )
    }

    /// What the table gives back of a row that was written: its columns that are not sealed.
    fn returning(&self) -> String {
        let names: Vec<&str> = self
            .plain()
            .map(|(_, column)| column.name.as_str())
            .collect();
        format!("RETURNING {}", names.join(", "))
    }

    /// The row of the view, with what the table has made of it. Its contexts must be those that its
    /// values were sealed for: a trigger of the table could have changed what they are made of.
    fn written(
        &self,
        trigger: &TriggerCall,
        mut row: Row,
        sealed_for: &Row,
        sealed: &[usize],
        first: FirstRow,
    ) -> Result<Reply> {
        let mut changes = Vec::new();
        for ((at, _), value) in self.plain().zip(first) {
            row[at] = value;
            changes.push((i16::try_from(at + 1).unwrap_or(i16::MAX), value));
        }
        if !sealed.is_empty() {
            let now = self.contexts(&row)?;
            if let Some(at) = sealed
                .iter()
                .find(|at| !types::same(pg_sys::TEXTOID, now[**at], sealed_for[**at]))
            {
                return Err(Error::State(
                    format!(
                        "the context of column {} has changed while it was sealed",
                        self.columns[*at].name
                    ),
                    format!(
                        "A trigger of {} changes what the context is made of.",
                        self.table
                    ),
                    "Write such rows to the table itself, or have the trigger leave these columns \
                     alone."
                        .to_string(),
                ));
            }
        }
        Ok(trigger.store_with(&changes))
    }

    fn insert(&self, trigger: &TriggerCall) -> Result<Reply> {
        let mut row = self.row_of(trigger.new_row());
        let mut overriding = false;
        let empty = self.row.fill([]);
        for (at, column) in self.columns.iter().enumerate() {
            if let (Kind::Identity(Some(next)), None) = (&column.kind, row[at]) {
                row[at] = next.datum(empty)?;
                overriding = true;
            }
        }
        let contexts = self.contexts(&row)?;
        // A column that is left out takes the default of the table; one that PostgreSQL computes
        // must be left out. Whoever gives it a value hears that from PostgreSQL.
        let taken: Vec<usize> = (0..self.columns.len())
            .filter(|at| row[*at].is_some() || !self.left_out_when_null(*at))
            .collect();
        let sealed: Vec<usize> = taken
            .iter()
            .copied()
            .filter(|at| self.columns[*at].is_sealed())
            .collect();
        let mut parameters = Parameters::new();
        let mut values = Vec::new();
        for at in &taken {
            let column = &self.columns[*at];
            let value = column.stored(row[*at], contexts[*at])?;
            values.push(parameter(&mut parameters, column.stored_type(), value));
        }
        let sql = || {
            let names: Vec<&str> = taken
                .iter()
                .map(|at| self.columns[*at].name.as_str())
                .collect();
            let (names, values) = (names.join(", "), values.join(", "));
            let overriding = if overriding {
                " OVERRIDING SYSTEM VALUE"
            } else {
                ""
            };
            let returning = self.returning();
            let table = &self.table;
            if taken.is_empty() {
                return format!("INSERT INTO {table} DEFAULT VALUES {returning}");
            }
            format!("INSERT INTO {table} ({names}){overriding} VALUES ({values}) {returning}")
        };
        let shape = Shape {
            kind: b'i',
            columns: taken.clone(),
            empty: Vec::new(),
            overriding,
        };
        match self.run(shape, sql, &parameters)? {
            None => Ok(trigger.leave_out()),
            Some(first) => self.written(trigger, row, &contexts, &sealed, first),
        }
    }

    fn left_out_when_null(&self, at: usize) -> bool {
        !matches!(self.columns[at].kind, Kind::Plain)
    }

    /// The condition that finds the row, by its primary key as it was.
    fn condition(&self, old: &Row, parameters: &mut Parameters) -> String {
        let parts: Vec<String> = self
            .key
            .iter()
            .map(|(at, key)| {
                let column = &self.columns[*at];
                let value = parameter(parameters, column.type_oid, old[*at]);
                let (cast, operator) = (&key.cast, &key.operator);
                format!("{}{cast} OPERATOR({operator}) {value}{cast}", column.name)
            })
            .collect();
        parts.join(" AND ")
    }

    fn update(&self, trigger: &TriggerCall, old: &Row) -> Result<Reply> {
        let new = self.row_of(trigger.new_row());
        let (before, after) = (self.contexts(old)?, self.contexts(&new)?);
        // A value that keeps its bytes but changes its context is sealed for the new one.
        let changed: Vec<usize> = (0..self.columns.len())
            .filter(|at| {
                let column = &self.columns[*at];
                !types::same(column.type_oid, old[*at], new[*at])
                    || column.is_sealed()
                        && new[*at].is_some()
                        && !types::same(pg_sys::TEXTOID, before[*at], after[*at])
            })
            .collect();
        let sealed: Vec<usize> = changed
            .iter()
            .copied()
            .filter(|at| self.columns[*at].is_sealed())
            .collect();
        // One that somebody seals meanwhile would be left behind, bound to the old context.
        let empty: Vec<usize> = (0..self.columns.len())
            .filter(|at| {
                self.columns[*at].is_sealed()
                    && old[*at].is_none()
                    && new[*at].is_none()
                    && !types::same(pg_sys::TEXTOID, before[*at], after[*at])
            })
            .collect();
        let mut parameters = Parameters::new();
        let mut settings = Vec::new();
        let mut guards = Vec::new();
        for at in &changed {
            let column = &self.columns[*at];
            let name = &column.name;
            let value = column.stored(new[*at], after[*at])?;
            let value = parameter(&mut parameters, column.stored_type(), value);
            let was = parameter(&mut parameters, column.type_oid, old[*at]);
            settings.push(format!("{name} = {value}"));
            let now = if column.is_sealed() {
                let context_was = parameter(&mut parameters, pg_sys::TEXTOID, before[*at]);
                format!("rekey.decrypt_col_as({name}, {was}, {context_was})")
            } else {
                name.clone()
            };
            guards.push((now, was));
        }
        for at in &empty {
            let name = &self.columns[*at].name;
            guards.push((format!("{name} IS NULL"), "true".to_string()));
        }
        if changed.is_empty() {
            // The table's triggers fire, as they do when a row is updated to what it is. A sealed
            // column always may be set, unlike an identity; its envelope stays.
            let kept = self.columns.iter().find(|column| column.is_sealed());
            let kept = kept.map_or("", |column| column.name.as_str());
            settings.push(format!("{kept} = {kept}"));
        }
        let found = self.condition(old, &mut parameters);
        let sql = || {
            let (now, was): (Vec<String>, Vec<String>) = guards.into_iter().unzip();
            let (now, was) = (now.join(", "), was.join(", "));
            let (table, returning) = (&self.table, self.returning());
            let settings = settings.join(", ");
            format!(
                "UPDATE {table} SET {settings} WHERE {found} \
                 AND pg_catalog.record_image_eq(ROW({now}), ROW({was})) {returning}"
            )
        };
        let shape = Shape {
            kind: b'u',
            columns: changed.clone(),
            empty,
            overriding: false,
        };
        match self.run(shape, sql, &parameters)? {
            Some(first) => self.written(trigger, new, &after, &sealed, first),
            None if changed.is_empty() || !self.is_there(old)? => Ok(trigger.leave_out()),
            None => Err(Error::Object(
                Code::ERRCODE_T_R_SERIALIZATION_FAILURE,
                "could not update the row due to a concurrent update".to_string(),
                format!(
                    "Another transaction has changed the same columns of {} meanwhile, or a \
                     trigger of the table keeps the row as it is.",
                    self.table
                ),
                "Run the transaction again, or lock the row first: SELECT ... FOR UPDATE."
                    .to_string(),
            )),
        }
    }

    /// Whether the row is there at all.
    fn is_there(&self, old: &Row) -> Result<bool> {
        let mut parameters = Parameters::new();
        let found = self.condition(old, &mut parameters);
        let shape = Shape {
            kind: b's',
            columns: Vec::new(),
            empty: Vec::new(),
            overriding: false,
        };
        let sql = || format!("SELECT 1 FROM {} WHERE {found}", self.table);
        Ok(self.run(shape, sql, &parameters)?.is_some())
    }

    fn delete(&self, trigger: &TriggerCall, old: &Row) -> Result<Reply> {
        let mut parameters = Parameters::new();
        let found = self.condition(old, &mut parameters);
        let shape = Shape {
            kind: b'd',
            columns: Vec::new(),
            empty: Vec::new(),
            overriding: false,
        };
        let sql = || format!("DELETE FROM {} WHERE {found}", self.table);
        match self.run(shape, sql, &parameters)? {
            Some(_) => Ok(trigger.proceed()),
            None => Ok(trigger.leave_out()),
        }
    }
}

#[pg_extern(sql = false)]
fn write_view(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        hooks::keep_statement_out_of_log();
        let trigger = TriggerCall::of(&call)
            .filter(TriggerCall::is_instead)
            .ok_or_else(|| {
                Error::State(
                    "rekey.write_view() is no ordinary function".to_string(),
                    "It runs instead of a change of a view's row.".to_string(),
                    "Use rekey.create_view(table_name, view_name).".to_string(),
                )
            })?;
        let plan = match call.remembered::<Plan>() {
            Some(plan) => plan,
            None => call.remember(call.for_the_query(|| Plan::of(&trigger))?),
        };
        match trigger.old_row() {
            None => plan.insert(&trigger),
            Some(slot) => {
                let old = plan.row_of(slot);
                if trigger.is_delete() {
                    plan.delete(&trigger, &old)
                } else {
                    plan.update(&trigger, &old)
                }
            }
        }
    })
}
