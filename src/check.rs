//! rekey.check(): the table of its probes, and those that SQL cannot make: root keys, the worker,
//! registrations, samples of rows.
//!
//! Called by src/api/check.rs. Each probe runs in a subtransaction of its own: one that fails is a
//! finding itself and hides no other. Nothing is written, no transaction id is assigned, no code of
//! users' runs, no lock is waited for: it works on standbys. What is read of users' tables is
//! bounded, and headers only: src/worker/elsewhere.rs.

use rekey_core::cipher::RootId;

use crate::catalog::check::{self, Finding, Severity};
use crate::catalog::read;
use crate::error::{Error, Result};
use crate::ffi::subtransaction::{Caught, subtransaction};
use crate::ffi::table::{self, Table};
use crate::ffi::text::{quoted_identifier, quoted_literal};
use crate::ffi::{background, relation, session, shared};
use crate::registry;
use crate::root_key;
use crate::stale::Holds;
use crate::worker::elsewhere::{self, Sampled};
use crate::{catalog, guc};

/// How a probe looks.
enum Probe {
    /// One query of src/catalog/check.rs.
    Sql(&'static str),
    /// Code.
    Code(fn() -> Result<Vec<Finding>>),
}

/// All probes, with what they look at.
const PROBES: [(&str, Probe); 17] = [
    ("root keys", Probe::Code(root_keys)),
    ("the preload", Probe::Code(preload)),
    ("triggers", Probe::Sql(check::GUARDS)),
    ("settings", Probe::Sql(check::SETTINGS)),
    ("stored copies", Probe::Sql(check::COPIES)),
    ("registered columns", Probe::Code(registrations)),
    ("contexts", Probe::Sql(check::CONTEXTS)),
    ("registered values", Probe::Code(registered_values)),
    ("unregistered values", Probe::Code(unregistered_values)),
    ("quarantine", Probe::Sql(check::QUARANTINE)),
    ("ages of keys", Probe::Sql(check::AGES)),
    ("superseded slots", Probe::Sql(check::UNPROVED)),
    ("progress", Probe::Sql(check::PROGRESS)),
    ("pauses", Probe::Sql(check::PAUSES)),
    ("live columns", Probe::Sql(check::LIVE)),
    ("the worker", Probe::Code(worker)),
    ("grants", Probe::Sql(check::GRANTS)),
];

/// Standbys come last: what they lack is seldom the cause.
const LAST: (&str, Probe) = ("standbys", Probe::Sql(check::STANDBYS));

/// Rows that one probe gives: a hundred thousand keys may all have the same fault.
const ROWS: usize = 50;

/// What is wrong here, the worst first.
pub fn findings() -> Result<Vec<Finding>> {
    // A catalog that this library does not know has one fault, and not one for each probe.
    if let Err(error) = catalog::tables() {
        return Ok(vec![failed("catalog", error)]);
    }
    let mut findings = Vec::new();
    for (name, probe) in PROBES.iter().chain([&LAST]) {
        let found = subtransaction(|| match probe {
            Probe::Sql(sql) => check::probe(sql, ROWS + 1),
            Probe::Code(look) => look(),
        });
        match found {
            Ok(Ok(found)) => findings.extend(capped(name, found)),
            Ok(Err(error)) => findings.push(failed(name, error)),
            Err(caught) => findings.push(raised(name, caught)?),
        }
    }
    findings.sort_by_key(|finding| finding.severity);
    Ok(findings)
}

fn capped(name: &str, mut found: Vec<Finding>) -> Vec<Finding> {
    if let Some(worst) = found.iter().skip(ROWS).map(|f| f.severity).min() {
        found.truncate(ROWS);
        let finding = format!("there are more findings of this kind than the {ROWS} shown");
        let remedy = "mend these, then SELECT * FROM rekey.check() again";
        found.push(Finding::new(worst, name, finding, remedy));
    }
    found
}

fn failed(name: &str, error: Error) -> Finding {
    let (facts, hint) = error.explain();
    Finding::new(
        Severity::Error,
        name,
        format!("could not be looked at: {facts}"),
        hint,
    )
}

/// A cancel ends the check; the text of other errors of PostgreSQL's may quote values.
fn raised(name: &str, Caught(code): Caught) -> Result<Finding> {
    if code == pgrx::PgSqlErrorCode::ERRCODE_QUERY_CANCELED {
        return Err(Error::Object(
            code,
            "the check was cancelled".to_string(),
            format!("It was looking at {name}."),
            "Try again with a longer statement_timeout.".to_string(),
        ));
    }
    Ok(Finding::new(
        Severity::Warning,
        name,
        format!(
            "could not be looked at: SQLSTATE {}",
            Caught(code).sqlstate()
        ),
        "the server log has the error; SELECT * FROM rekey.check() again",
    ))
}

/// The keyring, and each root key: whether this server holds it, and what needs it.
fn root_keys() -> Result<Vec<Finding>> {
    let roots = read::root_keys()?;
    let mut found = Vec::new();
    if roots.is_empty() {
        // The keyring file need not be there yet: init_root_key() makes it.
        if let Err(error) = root_key::source() {
            let (facts, hint) = error.explain();
            found.push(Finding::new(
                Severity::Warning,
                "root key source",
                facts,
                hint,
            ));
        }
        found.push(Finding::new(
            Severity::Warning,
            "root keys",
            "this database has adopted none: no key can be created",
            "SELECT rekey.init_root_key()",
        ));
        return Ok(found);
    }
    let in_file = root_key::inspect().unwrap_or_else(|error| {
        let (facts, hint) = error.explain();
        found.push(Finding::new(
            Severity::Error,
            "root key source",
            facts,
            hint,
        ));
        None
    });
    let held: Vec<RootId> = roots
        .iter()
        .filter(|root| root_key::holds(root.id))
        .map(|root| root.id)
        .collect();
    // Held out of an earlier keyring file, the next start does not have it.
    let lasts = |id| in_file.as_ref().is_none_or(|ids| ids.contains(id));
    let ids: Vec<&[u8]> = held
        .iter()
        .filter(|id| lasts(id))
        .map(|id| &id.as_bytes()[..])
        .collect();
    let wraps = check::wraps(&ids)?;
    for root in roots.iter().filter(|root| root.state != "retired") {
        let id = root.id.to_string();
        let (slots, only) = wraps
            .of_root
            .iter()
            .find(|(of, ..)| *of == id)
            .map_or((0, 0), |(_, slots, only)| (*slots, *only));
        let here = match (held.contains(&root.id), lasts(&root.id)) {
            (false, _) => Held::No,
            (true, false) => Held::UntilRead,
            (true, true) => Held::Yes,
        };
        found.push(root_key_finding(root, here, slots, only));
    }
    for id in root_key::held() {
        if roots.iter().all(|root| root.id != id) {
            found.push(Finding::new(
                Severity::Notice,
                format!("root key {id}"),
                "this server holds it, and this database does not know it",
                "nothing, if another database or an old backup needs it",
            ));
        }
    }
    found.extend(asked_for_again()?);
    if wraps.retired > 0 {
        found.push(Finding::new(
            Severity::Warning,
            "slots",
            format!(
                "{} slots are wrapped under retired root keys only: nothing opens them once these \
                 are taken out of the keyring",
                wraps.retired
            ),
            "SELECT rekey.rotate_root_key() -- wraps them under another root key as well",
        ));
    }
    if wraps.unwrapped > 0 {
        found.push(Finding::new(
            Severity::Error,
            "slots",
            format!(
                "{} slots have no wrapped key: they open nothing",
                wraps.unwrapped
            ),
            "restore rekey.slot_wrap from a dump, or SELECT rekey.import_key(exported)",
        ));
    }
    Ok(found)
}

/// Slots that a new process cannot open by what the postmaster has loaded. A parallel worker is such
/// a process: a query of a session that holds every root key fails with the provider then.
fn asked_for_again() -> Result<Option<Finding>> {
    let Some(inherited) = root_key::inherited() else {
        return Ok(None);
    };
    let ids: Vec<&[u8]> = inherited.iter().map(|id| &id.as_bytes()[..]).collect();
    let slots: i64 = check::wraps(&ids)?.elsewhere;
    if slots == 0 {
        return Ok(None);
    }
    let remedy = if shared::is_there() {
        "restart the server when it suits: it asks the command at its start"
    } else {
        "add pg_rekey to shared_preload_libraries and restart the server"
    };
    Ok(Some(Finding::new(
        Severity::Warning,
        "setting rekey.root_key_command",
        format!(
            "each new session, and each worker of a parallel query, asks it for {slots} slots that \
             none of the root keys opens which the server has loaded at its start"
        ),
        remedy,
    )))
}

/// Whether this server holds a root key.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Held {
    No,
    /// Until the keyring file, which does not have it, is read again.
    UntilRead,
    Yes,
}

fn root_key_finding(root: &read::RootRow, held: Held, slots: i64, only: i64) -> Finding {
    let object = format!("root key {}", root.id);
    let state = &root.state;
    let copy = "copy the keyring from another server or from escrow, then SELECT pg_reload_conf(); \
                with a command SELECT rekey.reload_root_keys()";
    if held != Held::Yes && (state == "active" || only > 0) {
        let finding = match held {
            Held::No => format!(
                "{state}, and this server does not hold it: {only} of the {slots} slots that it \
                 wraps do not open here"
            ),
            _ => format!(
                "{state}, and the keyring file does not have it any more: {only} of the {slots} \
                 slots that it wraps do not open once the file is read again, at the next start \
                 at the latest"
            ),
        };
        return Finding::new(Severity::Error, object, finding, copy);
    }
    if held != Held::No {
        let check = root_key::with_any(&[root.id], |_, key| key.check());
        if !check.is_ok_and(|check| check[..] == root.check[..]) {
            return Finding::new(
                Severity::Error,
                object,
                "its check value in the catalog is another one",
                "restore the row of rekey.root_key from a dump",
            );
        }
    }
    let held = held == Held::Yes;
    let here = if held { "held here" } else { "not held here" };
    let finding = format!("{state}, {here}; it wraps {slots} slots");
    match state.as_str() {
        "compromised" => Finding::new(
            Severity::Warning,
            object,
            finding,
            format!(
                "SELECT rekey.retire_root_key('{}') -- once its slots are drained",
                root.id
            ),
        ),
        "previous" if held => Finding::new(
            Severity::Notice,
            object,
            finding,
            format!(
                "SELECT rekey.retire_root_key('{}') -- once every server holds the active one",
                root.id
            ),
        ),
        _ => Finding::new(Severity::Notice, object, finding, "keep a copy in escrow"),
    }
}

fn preload() -> Result<Vec<Finding>> {
    if shared::is_there() {
        return Ok(Vec::new());
    }
    let list = check::list_setting("shared_preload_libraries", "pg_rekey")?;
    Ok(vec![Finding::new(
        Severity::Warning,
        "setting shared_preload_libraries",
        "pg_rekey is not preloaded: nothing is re-encrypted in the background, no key is rotated \
         by max_age, and a session's first statements may be logged with their values",
        format!("ALTER SYSTEM SET shared_preload_libraries = {list} -- then restart the server"),
    )])
}

/// What the worker needs, when there is work.
fn worker() -> Result<Vec<Finding>> {
    if session::in_recovery() || !shared::is_there() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    let warn =
        |finding: String, remedy: &str| Finding::new(Severity::Warning, "worker", finding, remedy);
    if !shared::has_launcher() {
        found.push(warn(
            "its launcher is not running: nothing is re-encrypted in the background".to_string(),
            "raise max_worker_processes and restart the server, if this lasts longer than 5 s",
        ));
    }
    let (slots, quarantined) = check::awaiting()?;
    let (leaves, troubles) = registry::leaves()?;
    if slots == 0 || leaves.is_empty() {
        return Ok(found);
    }
    let waiting = format!("{slots} slots await re-encryption and their proof");
    if !guc::worker() {
        found.push(warn(
            format!("{waiting}, and rekey.worker is off"),
            "ALTER SYSTEM SET rekey.worker = on; SELECT pg_reload_conf()",
        ));
        return Ok(found);
    }
    let database = session::database_name();
    if guc::databases().is_some_and(|list| !list.contains(&database)) {
        found.push(warn(
            format!("{waiting}, and rekey.databases leaves this database out"),
            "ALTER SYSTEM SET rekey.databases = '*'; SELECT pg_reload_conf()",
        ));
        return Ok(found);
    }
    let here = background::database();
    let entry = shared::entries()
        .into_iter()
        .find(|entry| entry.database == here)
        .unwrap_or_default();
    for (oid, deaths) in entry.suspects.iter().filter(|(oid, _)| *oid != 0) {
        let name = table::name((*oid).into())?;
        found.push(Finding::new(
            Severity::Warning,
            format!("table {name}"),
            format!("workers have died at it, {deaths} times"),
            "look at the server log for what its triggers, constraints and index expressions did",
        ));
    }
    if entry.starved {
        found.push(warn(
            format!("{waiting}, and no place in max_worker_processes was free for a worker"),
            "ALTER SYSTEM SET max_worker_processes = 16 -- or more; then restart the server",
        ));
    } else if entry.failures > 0 {
        found.push(warn(
            format!(
                "{waiting}, and the worker has failed {} times in a row",
                entry.failures
            ),
            "the server log has the SQLSTATE; CALL rekey.reencrypt() shows the error",
        ));
    } else if entry.worker == 0
        && !entry.wanted
        && entry.due == 0
        && quarantined == 0
        && troubles.is_empty()
        && shared::has_launcher()
    {
        found.push(warn(
            format!("{waiting}, and no worker is at it"),
            "CALL rekey.reencrypt()",
        ));
    }
    Ok(found)
}

/// Registrations that cannot be served as their tables are now.
fn registrations() -> Result<Vec<Finding>> {
    let (leaves, troubles) = registry::leaves()?;
    let mut found = Vec::new();
    for trouble in troubles {
        let registered = table::name(trouble.registered)?;
        found.push(Finding::new(
            Severity::Error,
            format!("table {}", trouble.table),
            format!("{}: no slot can be proved unused", trouble.what),
            format!(
                "SELECT rekey.unregister_column({}, {})",
                quoted_literal(&registered),
                quoted_literal(&trouble.column)
            ),
        ));
    }
    let left = leaves.len().saturating_sub(elsewhere::SAMPLE_TABLES);
    if left > 0 {
        found.push(Finding::new(
            Severity::Notice,
            "registered tables",
            format!(
                "{left} of them were not looked at: a check opens {} at most",
                elsewhere::SAMPLE_TABLES
            ),
            "SELECT * FROM rekey.progress -- says of each what holds it up",
        ));
    }
    for leaf in leaves.into_iter().take(elsewhere::SAMPLE_TABLES) {
        let Some(table) = Table::open_for_scan(leaf.table) else {
            continue; // locked now: nothing to say about it
        };
        let columns: Vec<i16> = leaf.columns.iter().map(|column| column.attnum).collect();
        let refusal = if table.is_heap() {
            registry::refusal(table.relation(), &columns, leaf.fire_triggers)
        } else {
            Some(("is no heap table", String::new()))
        };
        if let Some((why, which)) = refusal {
            found.push(Finding::new(
                Severity::Error,
                format!("table {}", table::name(leaf.table)?),
                format!(
                    "it {why} {which}: its rows are not re-encrypted, and no slot can be \
                 proved unused"
                ),
                "take away what is named; SELECT rekey.unregister_column(table_name, column_name)",
            ));
        }
    }
    Ok(found)
}

/// What a sample of the registered columns holds.
fn registered_values() -> Result<Vec<Finding>> {
    let (samples, left) = elsewhere::sample_registered()?;
    let mut found = Vec::new();
    for sample in samples {
        found.extend(of_registered(&sample)?);
    }
    found.extend(left_out("registered", left));
    Ok(found)
}

fn of_registered(sample: &Sampled) -> Result<Vec<Finding>> {
    let mut found = Vec::new();
    let table = table::name(sample.table)?;
    let column = quoted_identifier(&sample.column);
    let object = format!("column {table}.{column}");
    let of = format!("of {} sampled values", sample.values);
    let mut say = |severity, finding: String, remedy: String| {
        found.push(Finding::new(severity, object.clone(), finding, remedy));
    };
    if sample.misplaced > 0 {
        let (is, belongs) = if sample.fingerprints {
            (Holds::Envelopes, Holds::Fingerprints)
        } else {
            (Holds::Fingerprints, Holds::Envelopes)
        };
        say(
            Severity::Error,
            format!(
                "{} {of} are {}, and the column is registered for {}: no slot that they name can be \
                 proved unused",
                sample.misplaced,
                is.name(),
                belongs.name()
            ),
            format!(
                "SELECT rekey.unregister_column({}, {}) -- then register it for what it holds",
                quoted_literal(&table),
                quoted_literal(&sample.column)
            ),
        );
    }
    if sample.plain > 0 && sample.fingerprints {
        say(
            Severity::Error,
            format!(
                "{} {of} are no fingerprints: no search finds them",
                sample.plain
            ),
            format!(
                "set {column} with {}.fingerprint_col in every statement that sets the value",
                check::schema_of_verbs()?
            ),
        );
    } else if sample.plain > 0 {
        let key = match sample.slot {
            Some(slot) => read::slot(slot)?.map(|slot| slot.key_name),
            None => None,
        };
        let context = match sample.context.as_str() {
            "" => String::new(),
            context => format!(", {context}"),
        };
        let remedy = format!(
            "UPDATE {table} SET {column} = {}.encrypt_col(convert_from({column}, 'UTF8'), \
             {}{context}) WHERE NOT rekey.is_envelope({column})",
            check::schema_of_verbs()?,
            quoted_literal(key.as_deref().unwrap_or("KEY")),
        );
        let finding = format!("{} {of} are no envelopes: plaintext", sample.plain);
        say(Severity::Error, finding, remedy);
    }
    if sample.unknown > 0 {
        say(
            Severity::Error,
            format!(
                "{} {of} name slots that this database does not have",
                sample.unknown
            ),
            "SELECT rekey.import_key(exported) -- what export_key gives where they were sealed"
                .to_string(),
        );
    }
    if sample.closed > 0 {
        say(
            Severity::Error,
            format!(
                "{} {of} name slots that are disabled or destroyed: they do not open",
                sample.closed
            ),
            "SELECT rekey.enable_slot(slot_id) FROM rekey.slots WHERE state = 'disabled'; a \
             destroyed one: rekey.restore_slot"
                .to_string(),
        );
    }
    if sample.bound > 0 && sample.context.is_empty() {
        let (t, c) = (quoted_literal(&table), quoted_literal(&sample.column));
        say(
            Severity::Error,
            format!(
                "{} {of} are bound to a context, and the column is registered without one: they \
                 cannot be re-encrypted",
                sample.bound
            ),
            format!(
                "SELECT rekey.unregister_column({t}, {c}); SELECT rekey.register_column({t}, {c}, \
                 'the expression that encrypt_col is given')"
            ),
        );
    }
    Ok(found)
}

/// What a sample of all other bytea columns holds.
fn unregistered_values() -> Result<Vec<Finding>> {
    let (samples, left) = elsewhere::sample_unregistered()?;
    let mut found = Vec::new();
    for sample in samples {
        let envelopes = sample.values - sample.plain - sample.unknown;
        if envelopes == 0 {
            continue;
        }
        let table = table::name(sample.table)?;
        let column = quoted_identifier(&sample.column);
        let remedy = if relation::kind(sample.table) == b'm' {
            format!("REFRESH MATERIALIZED VIEW {table} -- after each drain")
        } else {
            format!(
                "SELECT rekey.register_column({}, {})",
                quoted_literal(&table),
                quoted_literal(&sample.column)
            )
        };
        found.push(Finding::new(
            Severity::Warning,
            format!("column {table}.{column}"),
            format!(
                "{envelopes} of {} sampled values are envelopes, and the column is not registered: \
                 they are not re-encrypted, and no proof covers them",
                sample.values
            ),
            remedy,
        ));
    }
    for place in elsewhere::in_defaults()? {
        found.push(Finding::new(
            Severity::Warning,
            format!("column {}.{}", place.table, place.column),
            "its default is an envelope or a fingerprint: it is not made again, and no proof covers it",
            format!(
                "ALTER TABLE {} ALTER COLUMN {} DROP DEFAULT",
                place.table, place.column
            ),
        ));
    }
    found.extend(left_out("unregistered", left));
    Ok(found)
}

fn left_out(which: &str, columns: usize) -> Option<Finding> {
    (columns > 0).then(|| {
        Finding::new(
            Severity::Notice,
            format!("{which} columns"),
            format!(
                "{columns} of them were not looked at: a check reads {} blocks at most of each \
                 table and {} tables at most, the largest first, and none that is locked",
                elsewhere::SAMPLE_BLOCKS,
                elsewhere::SAMPLE_TABLES
            ),
            "SELECT * FROM rekey.find_envelopes() -- reads every table",
        )
    })
}
