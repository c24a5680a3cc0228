//! Live columns: what a row's sealed value should be, or the opened one.
//!
//! Called by the trigger (src/api/live.rs), the backfill and finish_encrypt_column, all three of
//! which ask the same `Plan`. A NULL in the column that is read is a NULL in the one that is
//! written. Every plaintext is sealed, whatever it looks like. Invariant: expressions of the table's
//! owner run in `Plan::given` alone; whoever calls it acts as the owner.

use pgrx::pg_sys::{self, Oid};
use rekey_core::envelope::{Envelope, Kind, split_typed};

use crate::catalog::read::{self, LiveRow};
use crate::error::{Error, Result};
use crate::ffi::expression::Expression;
use crate::ffi::relation;
use crate::ffi::table::columns_of;
use crate::ffi::text::{self, Varlena};
use crate::ffi::types::{self, Function};
use crate::registry;
use crate::sealing;
use crate::typed::{Sealable, Target};

/// A live column as one table that stores rows has it.
pub struct Live {
    /// Its row in the catalog.
    pub row: LiveRow,
    /// Number of the column that is read.
    pub column: i16,
    /// Number of the column that is written.
    pub into: i16,
}

/// The live columns of a table and of the partitioned tables above it, under the table's numbers;
/// those with a column that is gone are left out.
pub fn of(table: Oid) -> Result<Vec<Live>> {
    let mut above = relation::ancestors(table);
    above.insert(0, table);
    let mut found = Vec::new();
    for row in read::live_columns()? {
        if !above.contains(&row.table) {
            continue;
        }
        let here = |number: Option<i16>| {
            let name = relation::column_name(row.table, number?)?;
            relation::column_number(table, &name)
        };
        if let (Some(column), Some(into)) = (here(row.read_attnum()), here(row.written_attnum())) {
            found.push(Live { row, column, into });
        }
    }
    found.sort_by(|a, b| a.row.trigger.cmp(&b.row.trigger));
    Ok(found)
}

/// The tables that store rows with live columns.
pub fn leaves() -> Result<Vec<Oid>> {
    let mut leaves: Vec<Oid> = read::live_columns()?
        .iter()
        .flat_map(|row| relation::leaves(row.table))
        .filter(|leaf| relation::kind(*leaf) == b'r')
        .collect();
    leaves.sort_by_key(|leaf| leaf.to_u32());
    leaves.dedup();
    Ok(leaves)
}

/// Everything that the rows of one table have in common; lives in the memory context in which it
/// was made.
pub struct Plan {
    /// Number of the column that is read.
    pub column: i16,
    /// Number of the column that is written.
    pub into: i16,
    /// All columns that the value in `into` depends on.
    pub inputs: Vec<i16>,
    source: Option<Expression>,
    context: Option<Expression>,
    runs_code: bool,
    converts: bool,
    way: Way,
}

enum Way {
    /// Under a key, in the server's encoding.
    Seal(Vec<u8>, Sealable),
    /// Into a value that fits its column.
    Open(Box<Opener>),
}

/// What opened values become.
struct Opener {
    target: Target,
    base: Oid,
    /// For the text form, by which values are compared.
    form: Sealable,
    /// Of a column with a type modifier: its type's functions, and the modifier.
    fit: Option<(Function, Function, i32)>,
}

impl Opener {
    fn of(table: Oid, column: i16) -> Result<Opener> {
        let type_oid = relation::column_type(table, column);
        let base = types::base_type(type_oid);
        let typmod = relation::column_typmod(table, column);
        Ok(Opener {
            target: Target::of(type_oid)?,
            base,
            form: Sealable::of(type_oid)?,
            fit: (typmod != -1).then(|| {
                let (output, input) = (Function::output_of(base), Function::input_of(base));
                (output, input, typmod)
            }),
        })
    }

    /// The value as it was sealed.
    fn open(&self, envelope: pg_sys::Datum, context: &[u8]) -> Result<pg_sys::Datum> {
        let (kind, mut payload) = opened(envelope, context)?;
        self.target.value(kind, payload.data())
    }

    /// The value as its column takes it, which may be rounded or cut.
    fn fitted(&self, value: pg_sys::Datum) -> Result<pg_sys::Datum> {
        match &self.fit {
            Some((output, input, typmod)) => input.input_as(output.output(value)?, *typmod),
            None => Ok(value),
        }
    }

    /// Whether the column holds the value: in its form, with nothing lost.
    fn holds(&self, value: pg_sys::Datum, stored: pg_sys::Datum) -> Result<bool> {
        let alike = |one, other| -> Result<bool> {
            Ok(self.form.payload(one)?.2 == self.form.payload(other)?.2)
        };
        if self.fit.is_none() {
            return alike(value, stored);
        }
        Ok(alike(self.fitted(value)?, stored)?
            && (alike(value, stored)? || types::equal(self.base, value, stored)?))
    }
}

/// What a row gives: the value to be sealed, or the envelope to be opened, and the context.
pub struct Given {
    value: Option<pg_sys::Datum>,
    context: Vec<u8>,
}

impl Plan {
    /// Looks up and plans what `live` needs in an open table. Runs code of its owner, as planning
    /// does.
    pub fn prepare(relation: pg_sys::Relation, table: Oid, live: &Live) -> Result<Plan> {
        registry::refuse_other_owner(live.row.table, table)?;
        let registered = registry::leaf(table)?.map_or(Vec::new(), |leaf| leaf.columns);
        let envelopes = if live.row.seals {
            live.into
        } else {
            live.column
        };
        let known = registered.iter().find(|column| column.attnum == envelopes);
        let context = known.map_or("", |column| column.context.as_str());
        let mut sealed: Vec<i16> = registered.iter().map(|column| column.attnum).collect();
        if !sealed.contains(&envelopes) {
            sealed.push(envelopes);
        }
        let context = match context {
            "" => None,
            text => Some(Expression::prepare(relation, text, &sealed)?),
        };
        let type_oid = relation::column_type(table, live.column);
        let source = match live.row.source.as_str() {
            "" if live.row.seals && types::is_string(type_oid) && type_oid != pg_sys::TEXTOID => {
                let name = relation::column_name(table, live.column).unwrap_or_default();
                let quoted = format!("\"{}\"", name.replace('"', "\"\""));
                Some(Expression::source(relation, &quoted, &sealed)?)
            }
            "" => None,
            text => Some(Expression::source(relation, text, &sealed)?),
        };
        let mut inputs = vec![live.column];
        for expression in source.iter().chain(&context) {
            inputs.extend(&expression.reads);
        }
        inputs.sort_unstable();
        inputs.dedup();
        let (way, converts) = if live.row.seals {
            let given = source.as_ref().map_or(type_oid, |source| source.type_oid);
            let key = text::to_server(live.row.key.as_bytes())?.into_owned();
            let sealable = Sealable::of(given)?;
            let of_users = !types::is_built_in(types::base_type(given));
            (Way::Seal(key, sealable), of_users)
        } else {
            let opener = Opener::of(table, live.into)?;
            let converts = !opener.target.is_text();
            (Way::Open(Box::new(opener)), converts)
        };
        Ok(Plan {
            column: live.column,
            into: live.into,
            inputs,
            runs_code: !live.row.source.is_empty() || context.is_some(),
            source,
            context,
            converts,
            way,
        })
    }

    /// Whether values are sealed, else opened.
    pub fn seals(&self) -> bool {
        matches!(self.way, Way::Seal(..))
    }

    /// Whether `given` runs code of the table's owner.
    pub fn runs_code(&self) -> bool {
        self.runs_code
    }

    /// Whether `make` and `agrees` run functions of types, which raise what they do not like: who
    /// goes on behind that has them in a subtransaction.
    pub fn converts(&self) -> bool {
        self.converts
    }

    /// Seals nothing once, as the current user: whether the key is there and he may.
    pub fn try_key(&self) -> Result<()> {
        if let Way::Seal(key, _) = &self.way {
            let context: &[u8] = if self.context.is_some() { b"x" } else { b"" };
            sealing::seal(key, context, Kind::Text, &[], &[])?;
        }
        Ok(())
    }

    /// What a row gives; None where the column is NULL. Valid until the next row is asked.
    pub fn given(&self, row: *mut pg_sys::TupleTableSlot) -> Result<Option<Given>> {
        let Some(plain) = columns_of(row, &[self.column])[0] else {
            return Ok(None);
        };
        let context = match &self.context {
            // A binding is never dropped in silence.
            Some(context) => context
                .evaluate(row)?
                .ok_or(Error::NullArgument("context"))?,
            None => Vec::new(),
        };
        let value = match &self.source {
            Some(source) => source.datum(row)?,
            None => Some(plain),
        };
        Ok(Some(Given { value, context }))
    }

    /// The value for the column that is written, by the current user's privileges.
    pub fn make(&self, given: &Given) -> Result<Option<pg_sys::Datum>> {
        let Some(value) = given.value else {
            return Ok(None);
        };
        match &self.way {
            Way::Seal(key, sealable) => {
                let (kind, prefix, body) = sealable.payload(value)?;
                sealing::seal(key, &given.context, kind, prefix, &body).map(Some)
            }
            Way::Open(opener) => {
                let value = opener.open(value, &given.context)?;
                opener.fitted(value).map(Some)
            }
        }
    }

    /// Whether what stands in the column that is written is what the row gives. Envelopes are
    /// opened by the current user's privileges. Values agree when they have one text form; a text
    /// and a bytea never do.
    pub fn agrees(&self, given: Option<&Given>, stored: Option<pg_sys::Datum>) -> Result<bool> {
        let value = given.and_then(|given| Some((given.value?, given.context.as_slice())));
        let ((value, context), stored) = match (value, stored) {
            (None, None) => return Ok(true),
            (Some(value), Some(stored)) => (value, stored),
            _ => return Ok(false),
        };
        match &self.way {
            Way::Seal(_, sealable) => {
                let (kind, mut payload) = opened(stored, context)?;
                let (expected, _, body) = sealable.payload(value)?;
                let form = match kind {
                    Kind::Typed => split_typed(payload.data())?.1,
                    Kind::Text | Kind::Bytea => payload.data(),
                };
                Ok(kind == expected && form == &*body)
            }
            Way::Open(opener) => opener.holds(opener.open(value, context)?, stored),
        }
    }
}

/// Kind and payload of an envelope that is bound to its column's context, as its readers will open
/// it, whatever the envelope says of its own.
fn opened(envelope: pg_sys::Datum, context: &[u8]) -> Result<(Kind, Varlena)> {
    let envelope = Envelope::parse(text::detoasted(envelope))?;
    let payload = sealing::open(&envelope, context)?;
    Ok((envelope.header.kind, payload))
}

/// Whether an error is that of one row's value, and not of the key, its privileges or the server.
pub fn is_of_the_row(error: &Error) -> bool {
    matches!(
        error,
        Error::Envelope(_)
            | Error::Authentication(_)
            | Error::ContextMissing(_)
            | Error::ContextUnexpected(..)
            | Error::NullArgument(_)
            | Error::UnknownSlot(_)
            | Error::SlotClosed(..)
            | Error::NoCast(..)
            | Error::UnknownType(_)
            | Error::NotEncodable
            | Error::TooLarge { .. }
    )
}
