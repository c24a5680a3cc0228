//! Views of opened columns, as objects beside users' tables.
//!
//! Called by src/api/views.rs, once the caller is known to own the table. The view is made in the
//! caller's name under a pinned search path: the context means in it what it meant at registration.
//! Names are quoted and qualified; register_column has parsed the context as one expression.

use pgrx::pg_sys::Oid;

use crate::error::Result;
use crate::ffi::sql::{Arg, rows, run_as};
use crate::ffi::{session, table};

/// A column of a view to be made.
pub struct Column {
    /// Its name, in the table and in the view.
    pub name: String,
    /// How a sealed column is opened.
    pub sealed: Option<Sealed>,
}

/// How a sealed column is opened and sealed.
pub struct Sealed {
    /// Type to open it as, qualified; None for text.
    pub type_name: Option<String>,
    /// Expression of the context; empty for none.
    pub context: String,
    /// Key to seal new values under; empty for rekey.default_key.
    pub key: String,
}

/// The name of a view, taken apart.
pub struct Name {
    /// Schema and name, quoted; without a schema of its own the table's.
    pub qualified: String,
    /// Whether a relation of that name exists.
    pub taken: bool,
    /// Whether create_view made it.
    pub ours: bool,
}

/// A name in double quotes, whatever is in it.
fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A string in single quotes, whatever is in it and whatever standard_conforming_strings says.
fn literal(string: &str) -> String {
    format!("E'{}'", string.replace('\\', "\\\\").replace('\'', "''"))
}

/// Takes the name of a view apart, as PostgreSQL does; None when it has more than two parts.
pub fn name(view: &str, of: Oid) -> Result<Option<Name>> {
    let found = rows(
        "SELECT n.name, (r.oid IS NOT NULL)::text, \
                EXISTS (SELECT FROM pg_catalog.pg_trigger t WHERE t.tgrelid = r.oid \
                    AND t.tgfoid = 'rekey.write_view()'::regprocedure)::text \
           FROM (SELECT quote_ident(CASE cardinality(p) WHEN 1 THEN s.nspname ELSE p[1] END) \
                     || '.' || quote_ident(p[cardinality(p)]) AS name \
                   FROM parse_ident($1) AS p, pg_catalog.pg_class c \
                   JOIN pg_catalog.pg_namespace s ON s.oid = c.relnamespace \
                  WHERE c.oid = $2 AND cardinality(p) <= 2) AS n \
           LEFT JOIN pg_catalog.pg_class r ON r.oid = to_regclass(n.name)",
        &[Arg::Text(view), Arg::Oid(of)],
    )?;
    let truth = |cell: &Option<String>| cell.as_deref() == Some("true");
    Ok(found.first().map(|row| Name {
        qualified: row[0].clone().unwrap_or_default(),
        taken: truth(&row[1]),
        ours: truth(&row[2]),
    }))
}

/// Makes the view with its trigger, or makes it anew.
pub fn create(view: &str, of: Oid, columns: &[Column]) -> Result<()> {
    let beneath = table::name(of)?;
    let mut shown = Vec::new();
    let mut keys = Vec::new();
    for column in columns {
        let name = quoted(&column.name);
        let Some(sealed) = &column.sealed else {
            shown.push(name);
            continue;
        };
        keys.push(literal(&sealed.key));
        // The line ends a comment that the context may end in.
        let context = match sealed.context.as_str() {
            "" => String::new(),
            context => format!(", (({context}\n)::pg_catalog.text)"),
        };
        let of = sealed.type_name.as_deref().unwrap_or("pg_catalog.text");
        // Not the verb: in its schema somebody may have a function that takes these better.
        shown.push(format!(
            "rekey.decrypt_col_as({name}, NULL::{of}{context}) AS {name}"
        ));
    }
    let me = session::current_user();
    let (shown, keys) = (shown.join(", "), keys.join(", "));
    run_as(
        me,
        &format!(
            "CREATE OR REPLACE VIEW {view} WITH (security_invoker = true) AS \
             SELECT {shown} FROM {beneath}"
        ),
    )?;
    for (name, default) in defaults(of)? {
        if columns.iter().any(|c| c.name == name && c.sealed.is_none()) {
            let name = quoted(&name);
            let sql = match default {
                Some(default) => format!("SET DEFAULT {default}"),
                None => "DROP DEFAULT".to_string(),
            };
            run_as(me, &format!("ALTER VIEW {view} ALTER COLUMN {name} {sql}"))?;
        }
    }
    run_as(
        me,
        &format!(
            "CREATE OR REPLACE TRIGGER rekey_write INSTEAD OF INSERT OR UPDATE OR DELETE \
             ON {view} FOR EACH ROW EXECUTE FUNCTION rekey.write_view({keys})"
        ),
    )?;
    let comment = literal(&format!(
        "{beneath} with its sealed columns opened (rekey.create_view)"
    ));
    run_as(me, &format!("COMMENT ON VIEW {view} IS {comment}"))
}

/// The columns of a table, each with its default unless PostgreSQL computes it.
fn defaults(of: Oid) -> Result<Vec<(String, Option<String>)>> {
    let found = rows(
        "SELECT a.attname::text, pg_catalog.pg_get_expr(d.adbin, d.adrelid) \
           FROM pg_catalog.pg_attribute a \
           LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum \
          WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped \
            AND a.attgenerated = '' AND a.attidentity = ''",
        &[Arg::Oid(of)],
    )?;
    let column = |row: Vec<Option<String>>| {
        let mut cells = row.into_iter();
        (
            cells.next().flatten().unwrap_or_default(),
            cells.next().flatten(),
        )
    };
    Ok(found.into_iter().map(column).collect())
}
