//! Live columns in the catalog, and their triggers as objects of users' tables.
//!
//! Called by src/api/live.rs, once the caller is known to own the table, and by the backfill. Each
//! live column has a trigger of its own, which goes with either of its columns; when the trigger
//! goes, so does the row of rekey.live_column. The trigger is made by the catalog's owner, late by
//! its name, so that it sees what other triggers have made of the row, before that of enable_touch;
//! and ALWAYS enabled, so that rows that logical replication applies, and the worker's, come by.

use pgrx::pg_sys::Oid;

use crate::error::Result;
use crate::ffi::sql::{Arg, rows, run, text};
use crate::ffi::table;

/// Triggers of one kind fire in the order of their names; eight random hex digits follow.
pub const PREFIX: &str = "zzz_rekey_live_";

/// A live column that begins.
pub struct NewLive<'a> {
    /// Name of its trigger.
    pub trigger: &'a str,
    /// Table.
    pub table: Oid,
    /// Column that is read, and its number.
    pub column: (&'a str, i16),
    /// Column that is written, and its number.
    pub into: (&'a str, i16),
    /// Whether values are sealed, else opened.
    pub seals: bool,
    /// Key to seal under.
    pub key: &'a str,
    /// Expression that gives the value to seal; empty for the column itself.
    pub source: &'a str,
    /// Who begins it.
    pub by: &'a str,
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Adds a column without a default: no row is rewritten.
pub fn add_column(oid: Oid, column: &str, type_name: &str) -> Result<()> {
    let sql = format!(
        "ALTER TABLE {} ADD COLUMN {} {type_name}",
        table::name(oid)?,
        quoted(column)
    );
    run(&sql, &[]).map(|_| ())
}

/// Writes the row and makes the trigger.
pub fn begin(new: &NewLive<'_>) -> Result<()> {
    run(
        "INSERT INTO rekey.live_column (trigger_name, table_name, column_name, into_column, \
             attnum, into_attnum, stamp, direction, key_name, source, started_by) \
         VALUES ($1, $2::oid::regclass, $3, $4, $5::smallint, $6::smallint, '', $7, $8, $9, $10)",
        &[
            Arg::Text(new.trigger),
            Arg::Oid(new.table),
            Arg::Text(new.column.0),
            Arg::Text(new.into.0),
            Arg::Bigint(i64::from(new.column.1)),
            Arg::Bigint(i64::from(new.into.1)),
            Arg::Text(if new.seals { "encrypt" } else { "decrypt" }),
            Arg::Text(new.key),
            Arg::Text(new.source),
            Arg::Text(new.by),
        ],
    )?;
    let (trigger, name) = (new.trigger, table::name(new.table)?);
    let (column, into) = (quoted(new.column.0), quoted(new.into.0));
    for sql in [
        // IS NOT NULL would be false of a composite value with a NULL in it. The condition ties the trigger to both columns: neither goes, nor changes its type, while
        // it is there.
        format!(
            "CREATE TRIGGER {trigger} BEFORE INSERT OR UPDATE ON {name} FOR EACH ROW \
             WHEN (NEW.{column} IS DISTINCT FROM NULL OR NEW.{into} IS DISTINCT FROM NULL) \
             EXECUTE FUNCTION rekey.live()"
        ),
        format!("ALTER TABLE {name} ENABLE ALWAYS TRIGGER {trigger}"),
        format!(
            "COMMENT ON TRIGGER {trigger} ON {name} IS \
             'Keeps one column of the row up to date with another (rekey.{}_column)'",
            if new.seals { "encrypt" } else { "decrypt" }
        ),
    ] {
        run(&sql, &[])?;
    }
    Ok(())
}

/// A table that inherits from this one or that it inherits from, partitions apart.
pub fn relative(oid: Oid) -> Result<Option<String>> {
    text(
        "SELECT (CASE inhparent WHEN $1 THEN inhrelid ELSE inhparent END)::regclass::text \
           FROM pg_catalog.pg_inherits i JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid \
          WHERE $1 IN (inhparent, inhrelid) AND NOT c.relispartition LIMIT 1",
        &[Arg::Oid(oid)],
    )
}

/// Which of these tables lacks the trigger, or has it otherwise than ALWAYS enabled.
pub fn without_trigger(trigger: &str, tables: &[Oid]) -> Result<Option<Oid>> {
    for oid in tables {
        let sql = "SELECT 'there' FROM pg_catalog.pg_trigger \
                    WHERE tgrelid = $1 AND tgname = $2::text AND tgenabled = 'A' \
                      AND tgfoid = 'rekey.live()'::regprocedure";
        if text(sql, &[Arg::Oid(*oid), Arg::Text(trigger)])?.is_none() {
            return Ok(Some(*oid));
        }
    }
    Ok(None)
}

/// Deletes the row and drops the trigger. Takes AccessExclusiveLock.
pub fn end(trigger: &str, oid: Oid) -> Result<()> {
    let sql = "DELETE FROM rekey.live_column WHERE trigger_name = $1";
    run(sql, &[Arg::Text(trigger)])?;
    let sql = format!("DROP TRIGGER {trigger} ON {}", table::name(oid)?);
    run(&sql, &[])?;
    forget_progress()
}

/// In an event trigger: a trigger that the current command drops takes its live column with it.
pub fn forget_dropped() -> Result<()> {
    let forgotten = run(
        "DELETE FROM rekey.live_column l \
          USING pg_catalog.pg_event_trigger_dropped_objects() d \
          WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.objsubid = 0 \
                AND d.objid = l.table_name::oid \
             OR d.object_type = 'trigger' AND d.address_names[3] = l.trigger_name \
                AND (d.address_names[1], d.address_names[2]) = \
                    (SELECT n.nspname::text, c.relname::text FROM pg_catalog.pg_class c \
                       JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
                      WHERE c.oid = l.table_name::oid)",
        &[],
    )?;
    if forgotten > 0 {
        forget_progress()?;
    }
    Ok(())
}

/// Forgets live columns of a table whose trigger is gone under another name.
pub fn forget_lost(oid: Oid) -> Result<()> {
    let forgotten = run(
        "DELETE FROM rekey.live_column l WHERE l.table_name::oid = $1 \
            AND NOT EXISTS (SELECT FROM pg_catalog.pg_trigger t WHERE t.tgrelid = $1 \
                AND t.tgfoid = 'rekey.live()'::regprocedure AND (t.tgname = l.trigger_name \
                 OR NOT EXISTS (SELECT FROM rekey.live_column o WHERE o.trigger_name = t.tgname)))",
        &[Arg::Oid(oid)],
    )?;
    if forgotten > 0 {
        forget_progress()?;
    }
    Ok(())
}

/// Forgets how far tables without live columns were.
fn forget_progress() -> Result<()> {
    run(
        "DELETE FROM rekey.backfill_state b WHERE NOT EXISTS (SELECT FROM rekey.live_column l \
             WHERE l.table_name::oid = b.table_name::oid OR l.table_name::oid IN \
                (SELECT relid::oid FROM pg_catalog.pg_partition_ancestors(b.table_name)))",
        &[],
    )
    .map(|_| ())
}

/// What a table's last pass has left undone; None when the table is done.
pub fn left_over(oid: Oid) -> Result<Option<i64>> {
    let found = rows(
        "SELECT rows_skipped::text FROM rekey.backfill_state \
          WHERE table_name = $1::oid::regclass AND phase <> 'done'",
        &[Arg::Oid(oid)],
    )?;
    let skipped = found
        .first()
        .and_then(|row| row[0].as_deref()?.parse().ok());
    Ok(skipped)
}

/// Begins one more pass over a table, whose rows count on.
pub fn pass_again(oid: Oid, blocks: u32) -> Result<()> {
    run(
        "UPDATE rekey.backfill_state SET cursor_block = 0, blocks_left = $2, blocks_total = $2, \
             rows_skipped = 0, phase = DEFAULT WHERE table_name = $1::oid::regclass",
        &[Arg::Oid(oid), Arg::Bigint(i64::from(blocks))],
    )
    .map(|_| ())
}
