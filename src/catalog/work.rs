//! The worker's own records: how far each table's passes are, which rows failed, what is due.
//!
//! Called by src/worker/. A cursor moves in the transaction of its batch: a crash takes back both
//! or neither.

use std::collections::HashSet;

use pgrx::pg_sys::{Datum, Oid};
use rekey_core::envelope::{CIPHERTEXT_AT, SlotId};

use crate::error::{Error, Result};
use crate::ffi::session;
use crate::ffi::sql::{Arg, bigint, look, rows, run, text};
use crate::ffi::table::Tid;
use crate::stale::{self, Head};

/// A pass over one table.
pub struct Pass {
    /// File of the table for which the cursor counts.
    pub file: Oid,
    /// Rotations that it serves.
    pub wave: String,
    /// Next block.
    pub cursor: u32,
    /// Blocks still to visit, going round the end of the table.
    pub left: u32,
}

/// Where passes are recorded: those of rotations, and those that fill live columns.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub enum Book {
    /// rekey.progress_state
    Rotation,
    /// rekey.backfill_state
    Backfill,
}

impl Book {
    fn table(self) -> &'static str {
        match self {
            Book::Rotation => "rekey.progress_state",
            Book::Backfill => "rekey.backfill_state",
        }
    }
}

fn number(cell: &Option<String>) -> i64 {
    cell.as_deref().and_then(|c| c.parse().ok()).unwrap_or(0)
}

fn block(cell: &Option<String>) -> u32 {
    u32::try_from(number(cell)).unwrap_or(0)
}

/// The pass over a table, if one was begun.
pub fn pass(book: Book, table: Oid) -> Result<Option<Pass>> {
    let found = rows(
        &format!(
            "SELECT file_node::text, wave, cursor_block::text, blocks_left::text \
               FROM {} WHERE table_name = $1::oid::regclass",
            book.table()
        ),
        &[Arg::Oid(table)],
    )?;
    Ok(found.first().map(|row| Pass {
        file: Oid::from_u32(block(&row[0])),
        wave: row[1].clone().unwrap_or_default(),
        cursor: block(&row[2]),
        left: block(&row[3]),
    }))
}

/// Begins a pass over all blocks of a table, at `cursor`.
pub fn begin_pass(book: Book, table: Oid, pass: &Pass) -> Result<()> {
    run(
        &format!(
            "INSERT INTO {} AS p \
                 (table_name, file_node, wave, cursor_block, blocks_left, blocks_total) \
             VALUES ($1::oid::regclass, $2, $3, $4, $5, $5) \
             ON CONFLICT (table_name) DO UPDATE SET file_node = $2, wave = $3, cursor_block = $4, \
                 blocks_left = $5, blocks_total = $5, rows_scanned = 0, rows_rewritten = 0, \
                 rows_skipped = 0, rows_unlisted = 0, phase = DEFAULT, note = '', \
                 started_at = clock_timestamp(), updated_at = clock_timestamp()",
            book.table()
        ),
        &[
            Arg::Oid(table),
            Arg::Oid(pass.file),
            Arg::Text(&pass.wave),
            Arg::Bigint(i64::from(pass.cursor)),
            Arg::Bigint(i64::from(pass.left)),
        ],
    )
    .map(|_| ())
}

/// What one batch did.
#[derive(Default)]
pub struct Done {
    /// Rows looked at.
    pub scanned: i64,
    /// Rows re-encrypted.
    pub rewritten: i64,
    /// Rows that somebody else had.
    pub skipped: i64,
    /// Rows that failed and that the quarantine has no room for.
    pub unlisted: i64,
}

/// A worker is about to enter a table; returns how many have done so since the last batch before it.
pub fn begin_attempt(book: Book, table: Oid) -> Result<u32> {
    let before = bigint(
        &format!(
            "INSERT INTO {} AS p \
                 (table_name, file_node, wave, blocks_left, blocks_total, attempts) \
             VALUES ($1::oid::regclass, '0'::oid, '', 0, 0, 1) \
             ON CONFLICT (table_name) DO UPDATE SET attempts = p.attempts + 1, phase = DEFAULT \
             RETURNING attempts::bigint - 1",
            book.table()
        ),
        &[Arg::Oid(table)],
    )?;
    Ok(u32::try_from(before.unwrap_or(0)).unwrap_or(0))
}

/// Moves the cursor behind a batch.
pub fn advance(book: Book, table: Oid, cursor: u32, left: u32, done: &Done) -> Result<()> {
    run(
        &format!(
            "UPDATE {} SET cursor_block = $2, blocks_left = $3, \
                 rows_scanned = rows_scanned + $4, rows_rewritten = rows_rewritten + $5, \
                 rows_skipped = rows_skipped + $6, rows_unlisted = rows_unlisted + $7, \
                 attempts = 0, phase = DEFAULT, note = '', updated_at = clock_timestamp() \
             WHERE table_name = $1::oid::regclass",
            book.table()
        ),
        &[
            Arg::Oid(table),
            Arg::Bigint(i64::from(cursor)),
            Arg::Bigint(i64::from(left)),
            Arg::Bigint(done.scanned),
            Arg::Bigint(done.rewritten),
            Arg::Bigint(done.skipped),
            Arg::Bigint(done.unlisted),
        ],
    )
    .map(|_| ())
}

/// Says in which phase the tables are, and what they wait for; writes only what changes. Table 0
/// is all of them.
pub fn note(table: Oid, phase: &str, note: &str) -> Result<()> {
    note_in(Book::Rotation, table, phase, note)
}

/// The same of either kind of passes.
pub fn note_in(book: Book, table: Oid, phase: &str, note: &str) -> Result<()> {
    run(
        &format!(
            "UPDATE {} SET phase = coalesce(nullif($2, ''), phase), note = $3 \
             WHERE (table_name = $1::oid::regclass OR $1 = '0'::oid) \
               AND (phase <> coalesce(nullif($2, ''), phase) OR note <> $3)",
            book.table()
        ),
        &[Arg::Oid(table), Arg::Text(phase), Arg::Text(note)],
    )
    .map(|_| ())
}

/// Says what work on a table waits for, whatever kind of pass it is; table 0 is all of them.
pub fn put_off(table: Oid, why: &str) -> Result<()> {
    note_in(Book::Rotation, table, "", why)?;
    note_in(Book::Backfill, table, "", why)
}

/// The waves that the passes of the tables name.
pub fn waves() -> Result<HashSet<String>> {
    let found = rows("SELECT DISTINCT wave FROM rekey.progress_state", &[])?;
    Ok(found
        .into_iter()
        .filter_map(|mut row| row[0].take())
        .collect())
}

/// The passes that served `from` serve `to` as well: slots of it are left, others are drained.
pub fn rename_wave(from: &str, to: &str) -> Result<()> {
    let sql = "UPDATE rekey.progress_state SET wave = $2 WHERE wave = $1";
    run(sql, &[Arg::Text(from), Arg::Text(to)]).map(|_| ())
}

/// Forgets tables that are gone or not registered any more.
pub fn forget_others(tables: &[Oid]) -> Result<()> {
    let list = tables.iter().map(|oid| oid.to_u32().to_string());
    let list = format!("{{{}}}", list.collect::<Vec<_>>().join(","));
    for table in ["progress_state", "quarantine"] {
        let sql = format!("DELETE FROM rekey.{table} WHERE table_name::oid <> ALL ($1::oid[])");
        run(&sql, &[Arg::Text(&list)])?;
    }
    Ok(())
}

/// Whether a table, or everything, is paused now; why.
pub fn paused(table: Oid) -> Result<Option<String>> {
    text(
        "SELECT 'paused by ' || paused_by || CASE WHEN reason = '' THEN '' ELSE ': ' || reason END \
           FROM rekey.pause \
          WHERE (table_name::oid IN ($1, '0'::oid) OR table_name::oid IN \
                 (SELECT relid::oid FROM pg_catalog.pg_partition_ancestors($1::oid::regclass))) \
            AND paused_until > clock_timestamp() ORDER BY table_name::oid LIMIT 1",
        &[Arg::Oid(table)],
    )
}

/// Pauses a table, or with 0 all, until a timestamptz datum or for good.
pub fn pause(table: Oid, until: Option<Datum>, reason: &str, by: &str) -> Result<()> {
    run(
        "INSERT INTO rekey.pause (table_name, paused_until, reason, paused_by) \
         VALUES ($1::oid::regclass, coalesce($2, 'infinity'), $3, $4) \
         ON CONFLICT (table_name) DO UPDATE SET paused_until = excluded.paused_until, \
             reason = excluded.reason, paused_by = excluded.paused_by, \
             paused_at = clock_timestamp()",
        &[
            Arg::Oid(table),
            Arg::Timestamp(until),
            Arg::Text(reason),
            Arg::Text(by),
        ],
    )
    .map(|_| ())
}

/// Ends a pause; false when there is none.
pub fn resume(table: Oid) -> Result<bool> {
    let sql = "DELETE FROM rekey.pause WHERE table_name = $1::oid::regclass";
    Ok(run(sql, &[Arg::Oid(table)])? > 0)
}

/// Has the rows under quarantine in `user`'s tables tried again at once.
pub fn retry_all(user: Oid) -> Result<i64> {
    bigint(
        "WITH tried AS (UPDATE rekey.quarantine q SET next_try = clock_timestamp() \
           FROM pg_catalog.pg_class c \
          WHERE c.oid = q.table_name::oid AND q.dismissed_at IS NULL \
            AND pg_catalog.pg_has_role($1, c.relowner, 'USAGE') RETURNING 1) \
         SELECT count(*) FROM tried",
        &[Arg::Oid(user)],
    )
    .map(|count| count.unwrap_or(0))
}

/// The table of an entry that nobody has dismissed.
pub fn quarantined_table(id: i64) -> Result<Option<Oid>> {
    let sql = "SELECT table_name::oid::bigint FROM rekey.quarantine \
                WHERE quarantine_id = $1 AND dismissed_at IS NULL";
    let oid = bigint(sql, &[Arg::Bigint(id)])?;
    Ok(oid
        .and_then(|oid| u32::try_from(oid).ok())
        .map(Oid::from_u32))
}

/// Whether an entry is about a fingerprint, perhaps among others.
pub fn quarantines_fingerprint(id: i64) -> Result<bool> {
    Ok(heads_where("quarantine_id = $1", &[Arg::Bigint(id)])?
        .iter()
        .any(stale::is_of_fingerprint))
}

/// Decides to do without the value of a row.
pub fn dismiss(id: i64, by: &str, reason: &str) -> Result<()> {
    run(
        "UPDATE rekey.quarantine SET dismissed_at = clock_timestamp(), dismissed_by = $2, \
             reason = $3, next_try = NULL WHERE quarantine_id = $1",
        &[Arg::Bigint(id), Arg::Text(by), Arg::Text(reason)],
    )
    .map(|_| ())
}

/// A row that could not be re-encrypted.
pub struct Failure {
    /// Where it lies.
    pub tid: Tid,
    /// Slot that its envelope names.
    pub slot: Option<SlotId>,
    /// Why.
    pub sqlstate: String,
    /// The heads of its envelopes that are concerned.
    pub heads: Vec<Head>,
}

/// At most so many rows of one table are listed; those beyond are counted, and block the proof all
/// the same.
const LISTED: i64 = 1000;

/// Lists a failed row, or counts one more try of it; false when there is no room for it. The row is
/// known by the heads of its envelopes, which no other value has: a dismissal never excuses another
/// row that has come to lie in its place, and follows its own wherever it moves.
pub fn quarantine(table: Oid, failure: &Failure) -> Result<bool> {
    if failure.heads.is_empty() {
        return Ok(true); // the row has changed meanwhile
    }
    run(
        "INSERT INTO rekey.quarantine AS q \
             (table_name, row_ref, slot_id, sqlstate, next_try, heads) \
         SELECT $1::oid::regclass, $2::text::tid, NULLIF($3, 0), $4, \
                clock_timestamp() + interval '1 minute', $6 \
          WHERE (SELECT count(*) FROM rekey.quarantine c \
                  WHERE c.table_name = $1::oid::regclass) < $5 \
             OR EXISTS (SELECT FROM rekey.quarantine c \
                  WHERE c.table_name = $1::oid::regclass AND c.heads = $6) \
         ON CONFLICT (table_name, heads) DO UPDATE \
            SET row_ref = $2::text::tid, sqlstate = $4, slot_id = NULLIF($3, 0), \
                tries = q.tries + 1, \
                next_try = CASE WHEN q.dismissed_at IS NULL THEN clock_timestamp() \
                    + least(interval '1 minute' * power(2, least(q.tries, 11)), \
                               interval '1 day') END",
        &[
            Arg::Oid(table),
            Arg::Text(&failure.tid.to_string()),
            Arg::Bigint(failure.slot.map_or(0, SlotId::as_i64)),
            Arg::Text(&failure.sqlstate),
            Arg::Bigint(LISTED),
            Arg::Bytea(&failure.heads.concat()),
        ],
    )
    .map(|listed| listed > 0)
}

/// A proof has found rows that are tried again now: when the quarantine has been emptied, they are
/// those that it had no room for.
pub fn count_unlisted_again(table: Oid) -> Result<()> {
    run(
        "UPDATE rekey.progress_state p SET rows_unlisted = 0 \
          WHERE table_name = $1::oid::regclass AND rows_unlisted > 0 \
            AND NOT EXISTS (SELECT FROM rekey.quarantine q \
                 WHERE q.table_name = p.table_name AND q.dismissed_at IS NULL)",
        &[Arg::Oid(table)],
    )
    .map(|_| ())
}

/// Places of a table of which an entry's next try has come, each once.
pub fn due(table: Oid) -> Result<Vec<Tid>> {
    let found = rows(
        "SELECT row_ref::text FROM rekey.quarantine \
          WHERE table_name = $1::oid::regclass AND dismissed_at IS NULL \
            AND next_try <= clock_timestamp() GROUP BY row_ref ORDER BY min(next_try) LIMIT 1000",
        &[Arg::Oid(table)],
    )?;
    Ok(tids(&found))
}

fn tids(found: &[Vec<Option<String>>]) -> Vec<Tid> {
    let tid = |row: &Vec<Option<String>>| row[0].as_deref().and_then(Tid::parse);
    found.iter().filter_map(tid).collect()
}

/// Of the entries of a place those stay that are about just these envelopes: of the others the row
/// is well again, or gone.
pub fn resolve(table: Oid, tid: Tid, failing: &[Head]) -> Result<()> {
    run(
        "DELETE FROM rekey.quarantine WHERE table_name = $1::oid::regclass \
            AND row_ref = $2::text::tid AND dismissed_at IS NULL AND heads <> $3",
        &[
            Arg::Oid(table),
            Arg::Text(&tid.to_string()),
            Arg::Bytea(&failing.concat()),
        ],
    )
    .map(|_| ())
}

/// Somebody has the row locked: it is tried again in a minute.
pub fn try_later(table: Oid, tid: Tid) -> Result<()> {
    run(
        "UPDATE rekey.quarantine SET next_try = clock_timestamp() + interval '1 minute' \
          WHERE table_name = $1::oid::regclass AND row_ref = $2::text::tid \
            AND dismissed_at IS NULL",
        &[Arg::Oid(table), Arg::Text(&tid.to_string())],
    )
    .map(|_| ())
}

/// The table has a new file: the places of its rows say nothing any more. What was dismissed stays.
pub fn forget_places(table: Oid) -> Result<()> {
    let sql = "DELETE FROM rekey.quarantine \
                WHERE table_name = $1::oid::regclass AND dismissed_at IS NULL";
    run(sql, &[Arg::Oid(table)]).map(|_| ())
}

/// The envelopes of a table that are under quarantine, or that somebody has decided to do without.
pub fn heads(table: Oid, dismissed: bool) -> Result<HashSet<Head>> {
    let of = "table_name = $1::oid::regclass AND (dismissed_at IS NOT NULL) = $2";
    heads_where(of, &[Arg::Oid(table), Arg::Bool(Some(dismissed))])
}

fn heads_where(condition: &str, arguments: &[Arg<'_>]) -> Result<HashSet<Head>> {
    let sql = format!(
        "SELECT encode(substr(heads, 1 + 34 * i, 34), 'hex') FROM rekey.quarantine, \
                generate_series(0, octet_length(heads) / 34 - 1) AS i WHERE {condition}"
    );
    let found = rows(&sql, arguments)?;
    let head = |row: &Vec<Option<String>>| {
        let hex = row[0].as_deref()?;
        let byte = |at: usize| u8::from_str_radix(hex.get(at * 2..at * 2 + 2)?, 16).ok();
        let bytes: Vec<u8> = (0..CIPHERTEXT_AT).map_while(byte).collect();
        Head::try_from(bytes).ok()
    };
    Ok(found.iter().filter_map(head).collect())
}

/// Whether a table has rows under quarantine that nobody has dismissed.
pub fn quarantined(table: Oid) -> Result<i64> {
    let sql = "SELECT count(*) FROM rekey.quarantine \
                WHERE table_name = $1::oid::regclass AND dismissed_at IS NULL";
    Ok(bigint(sql, &[Arg::Oid(table)])?.unwrap_or(0))
}

/// Whether more rows of a table are under quarantine than are listed.
pub fn has_unlisted(table: Oid) -> Result<bool> {
    let sql = "SELECT count(*) FROM rekey.progress_state p \
                WHERE table_name = $1::oid::regclass AND rows_unlisted > 0 \
                  AND EXISTS (SELECT FROM rekey.quarantine q \
                       WHERE q.table_name = p.table_name AND q.dismissed_at IS NULL)";
    Ok(bigint(sql, &[Arg::Oid(table)])?.unwrap_or(0) > 0)
}

/// The dismissed rows as the proof lists them.
pub fn exceptions() -> Result<String> {
    let found = text(
        "SELECT coalesce(jsonb_agg(jsonb_build_object('id', quarantine_id, \
             'table', table_name::text, 'slot_id', slot_id, 'by', dismissed_by, \
             'at', dismissed_at, 'reason', reason) ORDER BY quarantine_id), '[]')::text \
           FROM rekey.quarantine WHERE dismissed_at IS NOT NULL",
        &[],
    )?;
    Ok(found.unwrap_or_else(|| "[]".to_string()))
}

/// Keeps a proof beside its slot, which is drained in the same transaction.
pub fn keep_proof(slot: SlotId, proof: &str) -> Result<()> {
    let sql = "UPDATE rekey.key_slot SET proof = $2::text::jsonb WHERE slot_id = $1";
    match run(sql, &[Arg::Bigint(slot.as_i64()), Arg::Text(proof)])? {
        1 => Ok(()),
        _ => Err(Error::Internal("a proved slot is gone".to_string())),
    }
}

/// A proof as the catalog has it.
pub struct Proof {
    /// System identifier and database of the server that made it.
    pub identity: (u64, u32),
    /// Every transaction that could still copy a stale value is older than this one.
    pub horizon: u64,
    /// WAL position behind the proof.
    pub lsn: String,
}

/// The proof of a slot, if it has one.
pub fn proof(slot: SlotId) -> Result<Option<Proof>> {
    let found = rows(
        "SELECT proof->>'system_identifier', proof->>'database', proof->>'horizon', proof->>'lsn' \
           FROM rekey.key_slot WHERE slot_id = $1 AND proof IS NOT NULL",
        &[Arg::Bigint(slot.as_i64())],
    )?;
    let parse = |cell: &Option<String>| cell.as_deref().and_then(|c| c.parse().ok());
    Ok(found.first().map(|row| Proof {
        identity: (
            parse(&row[0]).unwrap_or(0),
            u32::try_from(parse(&row[1]).unwrap_or(0)).unwrap_or(0),
        ),
        horizon: parse(&row[2]).unwrap_or(u64::MAX),
        lsn: row[3].clone().unwrap_or_default(),
    }))
}

/// Drained slots whose proof another server or database has made.
pub fn proved_elsewhere((system, database): (u64, u32)) -> Result<Vec<i64>> {
    let found = rows(
        "SELECT slot_id::text FROM rekey.key_slot \
          WHERE state = 'drained' AND (proof->>'system_identifier', proof->>'database') \
                IS DISTINCT FROM ($1, $2) ORDER BY slot_id",
        &[
            Arg::Text(&system.to_string()),
            Arg::Text(&database.to_string()),
        ],
    )?;
    let id = |row: &Vec<Option<String>>| row[0].as_deref().and_then(|id| id.parse().ok());
    Ok(found.iter().filter_map(id).collect())
}

/// When a superseded slot's grace ends, in words; None when it is past.
pub fn grace_left(slot: SlotId) -> Result<Option<String>> {
    text(
        "SELECT (s.superseded_at + k.grace)::text FROM rekey.key_slot s \
           JOIN rekey.key k USING (key_name) \
          WHERE s.slot_id = $1 AND s.superseded_at + k.grace > clock_timestamp()",
        &[Arg::Bigint(slot.as_i64())],
    )
}

/// Drained slots whose key says what follows, their grace past: slot and disable or destroy.
pub fn after_drain() -> Result<Vec<(i64, String)>> {
    let found = rows(
        "SELECT s.slot_id::text, k.after_drain FROM rekey.key_slot s \
           JOIN rekey.key k USING (key_name) \
          WHERE s.state = 'drained' AND k.after_drain <> 'keep' \
            AND s.superseded_at + k.grace <= clock_timestamp() ORDER BY s.superseded_at",
        &[],
    )?;
    let action = |row: &Vec<Option<String>>| row[1].clone().unwrap_or_default();
    Ok(found
        .iter()
        .map(|row| (number(&row[0]), action(row)))
        .collect())
}

/// The keys that have passed their longest life, less up to 5 % that differ from slot to slot, so
/// that keys of one age do not rotate at once, without those of `others`; and how many rotations by
/// age the last hour saw.
pub fn rotations_due(others: &[&str]) -> Result<(Vec<String>, i64)> {
    let found = rows(
        "SELECT k.key_name FROM rekey.key k JOIN rekey.key_slot s USING (key_name) \
          WHERE s.state = 'active' AND k.max_age > '0'::interval AND k.shredded_at IS NULL \
            AND k.key_name <> ALL ($1) \
            AND s.activated_at + k.max_age * (1 - 0.05 * (s.slot_id % 1000) / 1000.0) \
                <= clock_timestamp() \
          ORDER BY s.activated_at LIMIT 100",
        &[Arg::Texts(others)],
    )?;
    let recent = bigint(
        "SELECT count(*) FROM rekey.audit_log WHERE action = 'rotate_key' \
            AND detail LIKE 'max_age%' AND at > clock_timestamp() - interval '1 hour'",
        &[],
    )?;
    let name = |row: Vec<Option<String>>| row.into_iter().next().flatten();
    Ok((
        found.into_iter().filter_map(name).collect(),
        recent.unwrap_or(0),
    ))
}

/// The keys like `pattern` whose active slot was activated before a timestamptz datum and that `user`
/// may rotate, the oldest first and at most `most` of them, each with that slot; and how many there
/// are in all.
pub fn keys_older(
    than: Datum,
    most: i64,
    pattern: &str,
    user: Oid,
) -> Result<(Vec<(String, i64)>, i64)> {
    let role = (!session::is_superuser(user)).then(|| session::role_name(user));
    let found = rows(
        "SELECT k.key_name, s.slot_id::text, (count(*) OVER ())::text \
           FROM rekey.key k JOIN rekey.key_slot s USING (key_name) \
          WHERE s.state = 'active' AND k.shredded_at IS NULL AND s.activated_at < $1 \
            AND k.key_name LIKE $3 AND (k.purpose = 'seal' OR $3 <> '%') \
            AND ($4 IS NULL OR rekey.has_key_privilege($4, k.key_name, 'rotate')) \
          ORDER BY s.activated_at, k.key_name LIMIT $2",
        &[
            Arg::Timestamp(Some(than)),
            Arg::Bigint(most),
            Arg::Text(pattern),
            Arg::OptionalText(role.as_deref()),
        ],
    )?;
    let in_all = found.first().map_or(0, |row| number(&row[2]));
    let key = |row: &Vec<Option<String>>| (row[0].clone().unwrap_or_default(), number(&row[1]));
    Ok((found.iter().map(key).collect(), in_all))
}

/// When something next comes due in this database, in seconds from now: a rotation by age, the
/// end of a grace, a retry, the end of a pause. None: never. What is due but cannot be done now is
/// left out, or comes when it can be: a rotation when fewer than `most` were in an hour, a row under
/// quarantine with the end of its table's pause.
pub fn next_due(most: i64) -> Result<Option<i64>> {
    bigint(
        "SELECT ceil(greatest(extract(epoch FROM min(due) - clock_timestamp()), 0))::bigint FROM ( \
            SELECT greatest(s.activated_at + k.max_age * (1 - 0.05 * (s.slot_id % 1000) / 1000.0), \
                    (SELECT at + interval '1 hour' FROM rekey.audit_log \
                      WHERE action = 'rotate_key' AND detail LIKE 'max_age%' \
                        AND at > clock_timestamp() - interval '1 hour' \
                      ORDER BY at DESC OFFSET greatest($1, 1) - 1 LIMIT 1)) AS due \
              FROM rekey.key k JOIN rekey.key_slot s USING (key_name) \
             WHERE s.state = 'active' AND k.max_age > '0'::interval AND k.shredded_at IS NULL \
               AND $1 > 0 \
            UNION ALL \
            SELECT s.superseded_at + k.grace FROM rekey.key k JOIN rekey.key_slot s USING (key_name) \
             WHERE s.state = 'drained' AND k.after_drain <> 'keep' \
            UNION ALL \
            SELECT next_try FROM rekey.quarantine q WHERE dismissed_at IS NULL AND NOT EXISTS ( \
                SELECT FROM rekey.pause p WHERE p.paused_until > clock_timestamp() \
                   AND (p.table_name::oid IN (q.table_name::oid, '0'::oid) OR p.table_name::oid IN \
                        (SELECT relid::oid FROM pg_catalog.pg_partition_ancestors(q.table_name)))) \
            UNION ALL \
            SELECT paused_until FROM rekey.pause \
             WHERE paused_until > clock_timestamp() AND paused_until < 'infinity') AS dues \
          HAVING min(due) IS NOT NULL",
        &[Arg::Bigint(most)],
    )
}

/// The transactions of this database, but for this one, that have an id. Out of the lock table: a
/// session's view of the activity may be an earlier one.
const WRITERS: &str = "\
    SELECT l.transactionid::text AS xid, coalesce('pid ' || l.pid, \
               'prepared transaction ' || quote_literal(p.gid)) AS who \
      FROM pg_catalog.pg_locks l \
      LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid \
      LEFT JOIN pg_catalog.pg_prepared_xacts p \
             ON p.transaction = l.transactionid AND l.pid IS NULL \
     WHERE l.locktype = 'transactionid' AND l.mode = 'ExclusiveLock' AND l.granted \
       AND l.pid IS DISTINCT FROM pg_catalog.pg_backend_pid() \
       AND (l.pid IS NULL OR a.datname IS NULL OR a.datname = current_database()) \
       AND (l.pid IS NOT NULL OR p.database = current_database())";

/// Every transaction of this database that has written something by now.
pub fn writers() -> Result<Vec<String>> {
    run("SELECT pg_catalog.pg_stat_clear_snapshot()", &[])?;
    let found = rows(&format!("SELECT xid FROM ({WRITERS}) AS w"), &[])?;
    Ok(found
        .into_iter()
        .filter_map(|mut row| row[0].take())
        .collect())
}

/// Those of them that have not ended, as people name them; None: none.
pub fn name_writers(writers: &[String]) -> Result<Option<String>> {
    text(
        &format!(
            "SELECT string_agg(DISTINCT who, ', ') FROM ({WRITERS}) AS w \
              WHERE xid = ANY ($1::text[])"
        ),
        &[Arg::Text(&format!("{{{}}}", writers.join(",")))],
    )
}

/// The sessions and prepared transactions behind virtual transactions, as people name them.
pub fn name_holders(virtual_transactions: &[String], prepared: &[u32]) -> Result<String> {
    let list = |items: Vec<String>| format!("{{{}}}", items.join(","));
    let named = look(
        "SELECT string_agg(DISTINCT who, ', ') FROM ( \
            SELECT 'pid ' || pid AS who FROM pg_catalog.pg_locks \
             WHERE locktype = 'virtualxid' AND virtualxid = ANY ($1::text[]) AND granted \
            UNION ALL \
            SELECT 'prepared transaction ' || quote_literal(gid) \
              FROM pg_catalog.pg_prepared_xacts \
             WHERE transaction::text = ANY ($2::text[]) \
                OR database = current_database() AND EXISTS (SELECT FROM pg_catalog.pg_locks l \
                   JOIN pg_catalog.pg_locks b ON b.virtualtransaction = l.virtualtransaction \
                  WHERE l.locktype = 'transactionid' AND l.transactionid = transaction \
                    AND b.relation = 'rekey.barrier'::regclass AND b.pid IS NULL)) AS holders",
        &[
            Arg::Text(&list(virtual_transactions.to_vec())),
            Arg::Text(&list(prepared.iter().map(u32::to_string).collect())),
        ],
    )?;
    let named = named
        .into_iter()
        .next()
        .and_then(|row| row.into_iter().next().flatten());
    Ok(named.unwrap_or_else(|| "a transaction that is about to end".to_string()))
}
