//! What a rotation of a key would cost now, and what would stand in its way: explain_rotation.
//!
//! Called by src/api/columns.rs. Reads only, takes no transaction id and no lock that anybody waits
//! for; every table is sampled by blocks, and all of them together within a time. Each line says
//! whether its figure was counted or estimated. The arithmetic is in rekey_core::forecast.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use pgrx::pg_sys::Oid;
use rekey_core::envelope::SlotId;
use rekey_core::forecast::{Sample, Writing, count, duration, percent, seconds, size, spread};
use rekey_core::keyring::SlotState;
use serde_json::{Value, json};

use super::elsewhere;
use super::throttle;
use crate::catalog::{self, read, work};
use crate::error::Result;
use crate::ffi::sql::{Arg, look};
use crate::ffi::table::{self, Snapshot, Table};
use crate::ffi::{locks, session, text, types};
use crate::guc;
use crate::registry::{self, Leaf, LeafColumn};
use crate::stale::Holds;

/// Blocks of a table that are read: 8 MB.
const BLOCKS: u32 = 1000;
/// Blocks of a table in which unregistered envelopes are looked for.
const BLOCKS_ELSEWHERE: u32 = 50;
/// Blocks that lie together: a sample of single blocks would read ahead in vain.
const PIECE: u32 = 10;
/// Time for the registered tables, and again for the others.
const TIME: Duration = Duration::from_secs(10);

/// The lines of the answer.
struct Lines(Vec<Value>);

impl Lines {
    fn add(&mut self, item: &str, object: &str, figure: &str, note: &str) {
        self.0
            .push(json!({ "item": item, "object": object, "figure": figure, "note": note }));
    }
}

type Rows = Vec<Vec<Option<String>>>;

fn cell(row: &[Option<String>], at: usize) -> &str {
    row.get(at).and_then(Option::as_deref).unwrap_or_default()
}

/// The answer as a JSON array, for explain_rotation().
pub fn as_json(key: &str) -> Result<String> {
    let mut lines = Lines(Vec::new());
    let slots = read::slots_of(&text::to_server(key.as_bytes())?)?;
    the_key(&mut lines, key, &slots);
    let ours: HashSet<SlotId> = slots
        .iter()
        .filter(|slot| slot.state != SlotState::Pending)
        .map(|slot| slot.id)
        .collect();
    let (leaves, troubles) = registry::leaves()?;
    let mut total = Total::default();
    let until = Instant::now() + TIME;
    for leaf in &leaves {
        one_table(&mut lines, leaf, &ours, until, &mut total)?;
    }
    total.report(&mut lines);
    for trouble in troubles {
        lines.add(
            "trouble",
            &trouble.table,
            "",
            &format!("{}: blocks every proof", trouble.what),
        );
    }
    unregistered(&mut lines, &leaves, &ours)?;
    who_holds_it_up(&mut lines)?;
    the_server(&mut lines)?;
    Ok(Value::Array(lines.0).to_string())
}

fn the_key(lines: &mut Lines, key: &str, slots: &[read::SlotRow]) {
    let count_of = |state| slots.iter().filter(|slot| slot.state == state).count();
    match slots.iter().find(|slot| slot.state == SlotState::Active) {
        Some(active) => lines.add(
            "key",
            key,
            &format!("slot {}", active.id),
            &format!(
                "active, made {}; it becomes previous",
                types::timestamp_text(active.created_at)
            ),
        ),
        None => lines.add("key", key, "no active slot", "a rotation makes one"),
    }
    if let Some(pending) = slots.iter().find(|slot| slot.state == SlotState::Pending) {
        lines.add(
            "key",
            key,
            &format!("slot {}", pending.id),
            "pending: a rotation promotes it",
        );
    }
    let waiting = count_of(SlotState::Previous);
    if waiting > 0 {
        lines.add(
            "key",
            key,
            &format!("{waiting} previous"),
            "slots of earlier rotations that are not drained yet: the same passes serve them",
        );
    }
}

/// What all tables come to.
#[derive(Default)]
struct Total {
    rows: u64,
    wal: u64,
    work: f64,
    tables: u64,
    unread: u64,
}

impl Total {
    fn report(&self, lines: &mut Lines) {
        let (time, brake) = seconds(self.work, self.wal, &throttle::limits());
        let by = match brake {
            Some(brake) => format!("at the pace of {}", brake.words()),
            None => "without pauses".to_string(),
        };
        let unread = match self.unread {
            0 => String::new(),
            unread => format!("; {unread} registered tables were not read"),
        };
        let object = match self.tables {
            1 => "1 table".to_string(),
            tables => format!("{tables} tables"),
        };
        lines.add(
            "rows",
            &object,
            &count(self.rows),
            &format!("that hold values of the key{unread}"),
        );
        lines.add("wal", &object, &size(self.wal), "estimate");
        lines.add(
            "time",
            &object,
            &duration(time),
            &format!("estimate, proof scan included, {by}"),
        );
        if let Some(free) = session::free_disk_mb() {
            let note = match guc::min_free_disk_mb() {
                Some(least) => format!("free; the worker rests below {least} MB"),
                None => "free".to_string(),
            };
            lines.add("disk", "data directory", &size(free << 20), &note);
        }
    }
}

/// Reads a sample of a table: calls `look` with the values of `columns` of each row. None when the
/// table is locked or gone.
fn sample(
    oid: Oid,
    columns: &[i16],
    most: u32,
    mut each: impl FnMut(&[Option<pgrx::pg_sys::Datum>]),
) -> Option<(u64, u64)> {
    let table = Table::open_for_scan(oid)?;
    if !table.stores_heap() {
        return Some((0, 0));
    }
    let blocks = table.blocks();
    let snapshot = Snapshot::latest();
    let mut read = 0;
    for range in spread(blocks, most, PIECE, u64::from(oid.to_u32())) {
        pgrx::check_for_interrupts!();
        read += u64::from(range.end - range.start);
        table.scan(&snapshot, range, columns, |_, values| {
            each(values);
            true
        });
    }
    Some((u64::from(blocks), read))
}

fn one_table(
    lines: &mut Lines,
    leaf: &Leaf,
    ours: &HashSet<SlotId>,
    until: Instant,
    total: &mut Total,
) -> Result<()> {
    let name = table::name(leaf.table)?;
    let columns: Vec<i16> = leaf.columns.iter().map(|column| column.attnum).collect();
    let kinds: Vec<Holds> = leaf.columns.iter().map(LeafColumn::holds).collect();
    if Instant::now() > until {
        total.unread += 1;
        lines.add("rows", &name, "?", "not read: the time is up");
        return Ok(());
    }
    let mut found = Sample::default();
    let read = sample(leaf.table, &columns, BLOCKS, |values| {
        found.rows += 1;
        let mut is_ours = false;
        for (value, kind) in values.iter().zip(&kinds) {
            let Some(datum) = value else { continue };
            if kind.slot(*datum).is_some_and(|slot| ours.contains(&slot)) {
                let bytes = text::varlena_len(*datum) as u64;
                is_ours = true;
                found.bytes += bytes;
                found.out_of_line += if text::is_out_of_line(*datum) {
                    bytes
                } else {
                    0
                };
            }
        }
        found.ours += u64::from(is_ours);
    });
    let Some((blocks, read)) = read else {
        total.unread += 1;
        lines.add("rows", &name, "?", "not read: the table is locked");
        return Ok(());
    };
    (found.blocks, found.read) = (blocks, read);
    if found.ours == 0 && found.is_exact() {
        return Ok(());
    }
    let how = if found.is_exact() {
        format!("exact: all {} blocks were read", count(blocks))
    } else {
        format!(
            "estimate: {} of {} blocks were read",
            count(read),
            count(blocks)
        )
    };
    let rows = found.whole(found.ours);
    lines.add("rows", &name, &count(rows), &how);
    lines.add(
        "bytes",
        &name,
        &size(found.whole(found.bytes)),
        if kinds.contains(&Holds::Fingerprints) {
            "envelopes and fingerprints of the key"
        } else {
            "envelopes of the key"
        },
    );
    let facts = facts_of(leaf, &columns)?;
    let writing = writing(&facts, lines, &name);
    let wal = found.wal(&writing);
    lines.add(
        "wal",
        &name,
        &size(wal),
        if writing.full_pages {
            "estimate; of it up to one page image for each block"
        } else {
            "estimate"
        },
    );
    let (time, _) = seconds(found.work_seconds(), wal, &throttle::limits());
    lines.add(
        "time",
        &name,
        &duration(time),
        "estimate, at the present settings",
    );
    side_effects(lines, leaf, &name)?;
    total.rows += rows;
    total.wal += wal;
    total.work += found.work_seconds();
    total.tables += 1;
    Ok(())
}

/// number of indexes, first index on a registered column, fillfactor, updates, HOT updates,
/// replica identity, full_page_writes.
fn facts_of(leaf: &Leaf, columns: &[i16]) -> Result<Rows> {
    let list: Vec<String> = columns.iter().map(i16::to_string).collect();
    look(
        "SELECT (SELECT count(*) FROM pg_catalog.pg_index WHERE indrelid = c.oid)::text, \
                (SELECT min(i.indexrelid::regclass::text) FROM pg_catalog.pg_index i \
                   JOIN pg_catalog.pg_depend d \
                     ON d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = i.indexrelid \
                    AND d.refclassid = 'pg_catalog.pg_class'::regclass AND d.refobjid = c.oid \
                  WHERE i.indrelid = c.oid AND d.refobjsubid = ANY ($2::text::int[])), \
                coalesce((SELECT o.option_value \
                            FROM pg_catalog.pg_options_to_table(c.reloptions) o \
                           WHERE o.option_name = 'fillfactor'), '100'), \
                pg_catalog.pg_stat_get_tuples_updated(c.oid)::text, \
                pg_catalog.pg_stat_get_tuples_hot_updated(c.oid)::text, \
                c.relreplident::text, pg_catalog.current_setting('full_page_writes') \
           FROM pg_catalog.pg_class c WHERE c.oid = $1",
        &[
            Arg::Oid(leaf.table),
            Arg::Text(&format!("{{{}}}", list.join(","))),
        ],
    )
}

/// How the table's rows will be written; says what share of the updates will be HOT.
fn writing(facts: &Rows, lines: &mut Lines, name: &str) -> Writing {
    /// So many updates say more of a table than its fillfactor.
    const ENOUGH: f64 = 1000.0;
    let empty = Vec::new();
    let row = facts.first().unwrap_or(&empty);
    let number = |at| cell(row, at).parse::<f64>().unwrap_or(0.0);
    let (fill, updates, hot_updates) = (number(2).clamp(10.0, 100.0), number(3), number(4));
    let (hot, note) = match cell(row, 1) {
        "" if updates >= ENOUGH => (
            hot_updates / updates,
            "estimate: that of the table's updates up to now".to_string(),
        ),
        "" => (
            ((100.0 - fill) / fill).min(1.0),
            format!("estimate, by the fillfactor of {fill}: room for new versions in full pages"),
        ),
        index => (0.0, format!("index {index} is on a registered column")),
    };
    lines.add("hot", name, &percent(hot), &note);
    Writing {
        indexes: cell(row, 0).parse().unwrap_or(0),
        hot,
        old_rows: cell(row, 5) == "f",
        full_pages: cell(row, 6) == "on",
    }
}

/// What else sees the updates of a table, and what holds it up.
fn side_effects(lines: &mut Lines, leaf: &Leaf, name: &str) -> Result<()> {
    let triggers = look(
        "SELECT tgname::text FROM pg_catalog.pg_trigger \
          WHERE tgrelid = $1 AND NOT tgisinternal AND tgtype & 16 <> 0 \
            AND (tgenabled = 'A' OR tgenabled = CASE WHEN $2 THEN 'O' ELSE 'R' END) \
          ORDER BY tgname",
        &[Arg::Oid(leaf.table), Arg::Bool(Some(leaf.fire_triggers))],
    )?;
    for row in triggers {
        lines.add(
            "trigger",
            name,
            cell(&row, 0),
            "fires for each row that is re-encrypted",
        );
    }
    let publications = look(
        "SELECT DISTINCT p.pubname::text, (CASE c.relreplident WHEN 'f' THEN 'full' \
                WHEN 'i' THEN 'index' WHEN 'd' THEN CASE WHEN EXISTS (SELECT \
                    FROM pg_catalog.pg_index \
                    WHERE indrelid = c.oid AND indisprimary) THEN 'key' ELSE 'none' END \
                ELSE 'none' END), u.pubupdate::text \
           FROM pg_catalog.pg_class c \
           JOIN LATERAL (SELECT c.oid AS relid UNION ALL \
                SELECT a.relid::oid FROM pg_catalog.pg_partition_ancestors(c.oid) a) AS t ON true \
           JOIN pg_catalog.pg_class r ON r.oid = t.relid \
           JOIN pg_catalog.pg_namespace n ON n.oid = r.relnamespace \
           JOIN pg_catalog.pg_publication_tables p \
             ON p.schemaname = n.nspname AND p.tablename = r.relname \
           JOIN pg_catalog.pg_publication u ON u.pubname = p.pubname \
          WHERE c.oid = $1 ORDER BY 1",
        &[Arg::Oid(leaf.table)],
    )?;
    for row in publications.iter().filter(|row| cell(row, 2) == "true") {
        lines.add(
            "publication",
            name,
            cell(row, 0),
            match cell(row, 1) {
                "full" => "subscribers get each row; REPLICA IDENTITY FULL logs the old one too",
                "none" => "NO REPLICA IDENTITY: every UPDATE of the table fails",
                _ => "subscribers get each row that is re-encrypted",
            },
        );
    }
    let quarantined = look(
        "SELECT count(*)::text FROM rekey.quarantine \
          WHERE table_name = $1::oid::regclass AND dismissed_at IS NULL HAVING count(*) > 0",
        &[Arg::Oid(leaf.table)],
    )?;
    for row in quarantined {
        lines.add(
            "quarantine",
            name,
            cell(&row, 0),
            "rows that block the proof: rekey.errors",
        );
    }
    let paused = look(
        "SELECT 'paused by ' || paused_by || CASE WHEN reason = '' THEN '' ELSE ': ' || reason END \
           FROM rekey.pause \
          WHERE (table_name::oid IN ($1, '0'::oid) OR table_name::oid IN \
                 (SELECT relid::oid FROM pg_catalog.pg_partition_ancestors($1::oid::regclass))) \
            AND paused_until > clock_timestamp() ORDER BY table_name::oid LIMIT 1",
        &[Arg::Oid(leaf.table)],
    )?;
    for row in paused {
        lines.add("pause", name, "", cell(&row, 0));
    }
    Ok(())
}

/// Envelopes and fingerprints of the key in columns that nobody has registered: no pass re-encrypts them and no
/// proof looks at them.
fn unregistered(lines: &mut Lines, leaves: &[Leaf], ours: &HashSet<SlotId>) -> Result<()> {
    let until = Instant::now() + TIME;
    let registered: HashSet<(Oid, i16)> = leaves
        .iter()
        .flat_map(|leaf| leaf.columns.iter().map(|c| (leaf.table, c.attnum)))
        .collect();
    let (mut looked_at, mut left, mut whole) = (0, 0, true);
    for row in look(elsewhere::COLUMNS, &[])? {
        let oid = cell(&row, 0)
            .parse()
            .map_or(pgrx::pg_sys::InvalidOid, Oid::from_u32);
        let attnum: i16 = cell(&row, 1).parse().unwrap_or(0);
        if registered.contains(&(oid, attnum)) {
            continue;
        }
        if Instant::now() > until {
            left += 1;
            continue;
        }
        let mut found = Sample::default();
        let read = sample(oid, &[attnum], BLOCKS_ELSEWHERE, |values| {
            let slot = values[0].and_then(elsewhere::named);
            found.ours += u64::from(slot.is_some_and(|slot| ours.contains(&slot)));
        });
        let Some(read) = read else {
            left += 1;
            continue;
        };
        (found.blocks, found.read) = read;
        looked_at += 1;
        whole &= found.is_exact();
        if found.ours > 0 {
            let how = if found.is_exact() {
                "exact"
            } else {
                "estimate from a sample"
            };
            let place = format!("{}.{}", table::name(oid)?, cell(&row, 2));
            let note = format!("{how}; values of the key that no pass re-encrypts");
            lines.add(
                "unregistered",
                &place,
                &count(found.whole(found.ours)),
                &note,
            );
        }
    }
    let how = if whole { "read whole" } else { "read in part" };
    let left = match left {
        0 => String::new(),
        left => format!(", {left} not read"),
    };
    lines.add(
        "unregistered",
        &format!("{looked_at} bytea columns"),
        "",
        &format!("{how}{left}; rekey.find_envelopes() reads everything"),
    );
    Ok(())
}

/// Transactions that a rotation would have to wait for if it came now.
fn who_holds_it_up(lines: &mut Lines) -> Result<()> {
    let holders = locks::holders(catalog::barrier()?);
    if !holders.is_empty() {
        let sessions: Vec<String> = holders
            .iter()
            .filter(|holder| holder.prepared_xid().is_none())
            .map(|holder| holder.virtual_transaction())
            .collect();
        let prepared: Vec<u32> = holders.iter().filter_map(|h| h.prepared_xid()).collect();
        let who = work::name_holders(&sessions, &prepared)?;
        lines.add(
            "barrier",
            &who,
            &holders.len().to_string(),
            "transactions that have sealed: the proof waits for their end",
        );
    }
    let old = look(
        "SELECT 'pid ' || pid, extract(epoch FROM clock_timestamp() - xact_start)::text, \
                xact_start::text \
           FROM pg_catalog.pg_stat_activity \
          WHERE xact_start < clock_timestamp() - interval '1 minute' \
            AND (backend_xid IS NOT NULL OR backend_xmin IS NOT NULL) \
            AND pid <> pg_catalog.pg_backend_pid() AND backend_type <> 'walsender' \
         UNION ALL \
         SELECT 'prepared ' || quote_literal(gid), \
                extract(epoch FROM clock_timestamp() - prepared)::text, prepared::text \
           FROM pg_catalog.pg_prepared_xacts ORDER BY 3 LIMIT 5",
        &[],
    )?;
    for row in old {
        let age = cell(&row, 1).parse().unwrap_or(0.0);
        lines.add(
            "old transaction",
            cell(&row, 0),
            &duration(age),
            "until it ends, no slot is disabled or destroyed",
        );
    }
    Ok(())
}

/// The worker, the standbys and what keeps WAL.
fn the_server(lines: &mut Lines) -> Result<()> {
    let preloaded = look(
        "SELECT 'yes' \
          WHERE pg_catalog.current_setting('shared_preload_libraries') LIKE '%pg_rekey%'",
        &[],
    )?;
    if preloaded.is_empty() || !guc::worker() {
        lines.add(
            "worker",
            "",
            "off",
            "nothing is re-encrypted until somebody runs CALL rekey.reencrypt(), without pauses",
        );
    }
    let standbys = look(
        "SELECT application_name, \
                coalesce(extract(epoch FROM replay_lag), 0)::text \
           FROM pg_catalog.pg_stat_replication ORDER BY 1",
        &[],
    )?;
    for row in standbys {
        let lag = cell(&row, 1).parse().unwrap_or(0.0);
        lines.add(
            "standby",
            cell(&row, 0),
            &duration(lag),
            "lag now; it replays the WAL above",
        );
    }
    let slots = look(
        "SELECT slot_name::text, active::text, wal_status, \
                pg_catalog.pg_wal_lsn_diff(CASE WHEN pg_catalog.pg_is_in_recovery() \
                    THEN pg_catalog.pg_last_wal_replay_lsn() \
                    ELSE pg_catalog.pg_current_wal_lsn() END, restart_lsn)::bigint::text \
           FROM pg_catalog.pg_replication_slots ORDER BY 1",
        &[],
    )?;
    for row in slots {
        let kept = cell(&row, 3).parse().unwrap_or(0);
        lines.add(
            "replication slot",
            cell(&row, 0),
            &size(kept),
            match (cell(&row, 1), cell(&row, 2)) {
                (_, "unreserved" | "lost") => "LOSES WAL: the worker rests until that has ended",
                ("true", _) => "of WAL kept now",
                _ => "of WAL kept now; nobody reads it: it will keep the WAL above too",
            },
        );
    }
    let archiver = look(
        "SELECT last_failed_wal FROM pg_catalog.pg_stat_archiver \
          WHERE last_failed_time > coalesce(last_archived_time, '-infinity')",
        &[],
    )?;
    for row in archiver {
        lines.add(
            "archiving",
            cell(&row, 0),
            "FAILS",
            "the worker rests until that has ended",
        );
    }
    Ok(())
}
