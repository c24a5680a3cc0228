//! The trigger that re-encrypts on touch, as an object of a users' table.
//!
//! Called by src/api/touch.rs, once the caller is known to own the table. The trigger is made by
//! the catalog's owner, last by name, so that it sees what the others have made of the row, and
//! ALWAYS enabled, so that rows that logical replication applies are touched too.

use std::collections::BTreeSet;

use pgrx::pg_sys::Oid;

use crate::error::Result;
use crate::ffi::sql::{Arg, rows, run};
use crate::ffi::table;
use crate::ffi::text::quoted_identifier;

/// Triggers of one kind fire in the order of their names.
pub const NAME: &str = "zzz_rekey_touch";

/// A trigger of that name.
pub struct Installed {
    /// It calls rekey.touch().
    pub ours: bool,
    /// It comes from a partitioned table above.
    pub inherited: bool,
    /// It refuses to store what is closed.
    pub refuse_closed: bool,
}

/// The table's trigger, if it has one.
pub fn installed(oid: Oid) -> Result<Option<Installed>> {
    let found = rows(
        "SELECT (tgfoid = 'rekey.touch()'::regprocedure)::text, (tgparentid <> '0'::oid)::text, \
                (tgtype & 4 <> 0)::text \
           FROM pg_catalog.pg_trigger WHERE tgrelid = $1 AND tgname = $2::text",
        &[Arg::Oid(oid), Arg::Text(NAME)],
    )?;
    let truth = |cell: &Option<String>| cell.as_deref() == Some("true");
    Ok(found.first().map(|row| Installed {
        ours: truth(&row[0]),
        inherited: truth(&row[1]),
        refuse_closed: truth(&row[2]),
    }))
}

/// Makes the trigger, or makes it anew, for these columns of envelopes and, where it refuses what
/// is closed, of fingerprints. Takes ShareRowExclusiveLock.
pub fn install(
    oid: Oid,
    columns: &BTreeSet<String>,
    fingerprints: &BTreeSet<String>,
    refuse_closed: bool,
) -> Result<()> {
    let name = table::name(oid)?;
    let events = if refuse_closed {
        "INSERT OR UPDATE"
    } else {
        "UPDATE"
    };
    // Asked in the condition, a row that is not concerned costs no call of the trigger.
    let ask = |question: &str, column: &String| {
        format!("rekey.{question}(NEW.{})", quoted_identifier(column))
    };
    let mut questions: Vec<String> = columns.iter().map(|c| ask("is_stale", c)).collect();
    if refuse_closed {
        questions.extend(columns.union(fingerprints).map(|c| ask("is_closed", c)));
    }
    let condition = questions.join(" OR ");
    for sql in [
        format!(
            "CREATE OR REPLACE TRIGGER {NAME} BEFORE {events} ON {name} FOR EACH ROW \
             WHEN ({condition}) EXECUTE FUNCTION rekey.touch()"
        ),
        format!("ALTER TABLE {name} ENABLE ALWAYS TRIGGER {NAME}"),
        format!(
            "COMMENT ON TRIGGER {NAME} ON {name} IS \
             'Re-encrypts stale envelopes of a row that is updated anyway (rekey.enable_touch)'"
        ),
    ] {
        run(&sql, &[])?;
    }
    Ok(())
}

/// Drops the trigger. Takes AccessExclusiveLock.
pub fn remove(oid: Oid) -> Result<()> {
    let sql = format!("DROP TRIGGER {NAME} ON {}", table::name(oid)?);
    run(&sql, &[]).map(|_| ())
}
