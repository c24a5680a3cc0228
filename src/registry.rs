//! Registered columns as they stand now: which tables hold envelopes and fingerprints, under which
//! numbers.
//!
//! Called by the worker, the proof and the registration itself. Columns are registered by name and
//! found by number as long as it is the same table, so that a rename is followed; after a dump and
//! restore the table has another OID, and the name counts. Partitioned tables are resolved to their
//! leaves each time: partitions that are attached later are in.

use pgrx::pg_sys::{self, Oid};

use crate::catalog::read;
use crate::error::{Error, Result};
use crate::ffi::{relation, session};
use crate::stale::Holds;

/// A table that stores rows, with its registered columns.
pub struct Leaf {
    /// The table.
    pub table: Oid,
    /// Its columns, by number.
    pub columns: Vec<LeafColumn>,
    /// Whether its triggers fire when the worker updates a row.
    pub fire_triggers: bool,
}

/// A registered column of a leaf.
pub struct LeafColumn {
    /// Number in the leaf.
    pub attnum: i16,
    /// Present name.
    pub name: String,
    /// Expression of the context; empty for none.
    pub context: String,
    /// Table that it was registered for: the leaf, or the partitioned one above it.
    pub registered: Oid,
    /// How to make a fingerprint again, in a column of fingerprints; None in one of envelopes.
    pub fingerprint: Option<FingerprintColumn>,
}

impl LeafColumn {
    /// Refuses a column whose expressions are another role's than its table's owner's.
    pub fn refuse_other_owner(&self, table: Oid) -> Result<()> {
        let fingerprint = self.fingerprint.as_ref();
        if self.context.is_empty() && fingerprint.is_none_or(|of| of.normalise.is_empty()) {
            return Ok(());
        }
        refuse_other_owner(self.registered, table)
    }

    /// What the column stores.
    pub fn holds(&self) -> Holds {
        match self.fingerprint {
            Some(_) => Holds::Fingerprints,
            None => Holds::Envelopes,
        }
    }
}

/// How the fingerprints of a column are made.
pub struct FingerprintColumn {
    /// Number of the sealed column beside it, which is registered too.
    pub sealed: i16,
    /// Lookup key.
    pub key: String,
    /// Key of the sealed values.
    pub sealed_key: String,
    /// Expression over the value; empty for the value as it is.
    pub normalise: String,
}

/// A registration that cannot be served now: it stands in the way of every proof.
pub struct Trouble {
    /// Table, as people write it.
    pub table: String,
    /// Table that was registered: the same, or the partitioned one above it.
    pub registered: Oid,
    /// Column, as it was registered.
    pub column: String,
    /// What is wrong.
    pub what: String,
}

/// What tells a table from any other that has had or will have its OID: the server, the OID, and
/// the transaction that made the table. An OID alone does not: OIDs come round. Nor does the row
/// in pg_class, which any ALTER TABLE rewrites.
pub fn stamp(table: Oid) -> Option<String> {
    relation::born(table).map(|born| {
        let server = relation::system_identifier();
        format!("{server}/{}/{born}", table.to_u32())
    })
}

/// The present number of a registered column in its own table; None when it is gone.
pub fn attnum(row: &read::RegisteredRow) -> Option<i16> {
    place(row.table, &row.column, row.attnum, &row.stamp)
}

/// The present number of the sealed column beside a registered column of fingerprints.
pub fn sealed_attnum(row: &read::RegisteredRow) -> Option<i16> {
    let of = row.fingerprint.as_ref()?;
    place(row.table, &of.sealed_column, of.sealed_attnum, &row.stamp)
}

/// The present number of a column that was registered as `column`, with this number under this
/// stamp. Under the table's own stamp the number counts, whatever the column is called now; under
/// that of another server or OID (a dump was restored, the server upgraded) the name. A stamp of
/// this very OID on this server with another making is that of a table that was dropped: a later
/// table does not inherit it. (GRANT on a system column changes the making too. That is why the
/// registration then counts as one whose column is gone, which blocks proofs, and not as none.)
pub fn place(table: Oid, column: &str, attnum: i16, stamped: &str) -> Option<i16> {
    let now = stamp(table)?;
    if now == stamped {
        return relation::column_name(table, attnum).map(|_| attnum);
    }
    let made_for = |stamp: &str| stamp.rsplit_once('/').map(|(whose, _)| whose.to_string());
    if made_for(&now) == made_for(stamped) {
        return None;
    }
    relation::column_number(table, column)
}

/// Every leaf with its columns, and what cannot be served.
pub fn leaves() -> Result<(Vec<Leaf>, Vec<Trouble>)> {
    let mut leaves: Vec<Leaf> = Vec::new();
    let mut troubles = Vec::new();
    let mut rows = read::registered_columns()?;
    // What a partition says of itself goes before what the table above it says of it.
    rows.sort_by_key(|row| (relation::kind(row.table) == b'p', row.table.to_u32()));
    for row in rows {
        if !relation::exists(row.table) {
            continue; // dropped in a session that has not loaded the library
        }
        let root_name = attnum(&row).and_then(|number| relation::column_name(row.table, number));
        let Some(name) = root_name else {
            troubles.push(Trouble {
                table: crate::ffi::table::name(row.table)?,
                registered: row.table,
                column: row.column.clone(),
                what: format!("column \"{}\" is gone", row.column),
            });
            continue;
        };
        let sealed = sealed_attnum(&row).and_then(|n| relation::column_name(row.table, n));
        for table in relation::leaves(row.table) {
            if relation::kind(table) != b'r' {
                troubles.push(Trouble {
                    table: crate::ffi::table::name(table)?,
                    registered: row.table,
                    column: name.clone(),
                    what: "a partition that is a foreign table cannot be re-encrypted here"
                        .to_string(),
                });
                continue;
            }
            let number = relation::column_number(table, &name);
            let Some(attnum) = number.filter(|n| relation::is_bytea(table, *n)) else {
                troubles.push(Trouble {
                    table: crate::ffi::table::name(table)?,
                    registered: row.table,
                    column: name.clone(),
                    what: format!("column \"{name}\" is not of type bytea"),
                });
                continue;
            };
            let sealed = sealed.as_deref();
            let sealed = sealed.and_then(|sealed| relation::column_number(table, sealed));
            let fingerprint = row.fingerprint.as_ref().map(|of| FingerprintColumn {
                sealed: sealed.unwrap_or(0),
                key: of.key.clone(),
                sealed_key: of.sealed_key.clone(),
                normalise: of.normalise.clone(),
            });
            let column = LeafColumn {
                attnum,
                name: name.clone(),
                context: row.context.clone(),
                registered: row.table,
                fingerprint,
            };
            match leaves.iter_mut().find(|leaf| leaf.table == table) {
                Some(leaf) if leaf.columns.iter().any(|c| c.attnum == attnum) => {}
                Some(leaf) => {
                    leaf.columns.push(column);
                    leaf.fire_triggers |= row.fire_triggers;
                }
                None => leaves.push(Leaf {
                    table,
                    columns: vec![column],
                    fire_triggers: row.fire_triggers,
                }),
            }
        }
    }
    for leaf in &mut leaves {
        leaf.columns.sort_by_key(|column| column.attnum);
        for column in &leaf.columns {
            let Some(of) = &column.fingerprint else {
                continue;
            };
            let is_sealed = |c: &LeafColumn| c.fingerprint.is_none() && c.attnum == of.sealed;
            if !leaf.columns.iter().any(is_sealed) {
                troubles.push(Trouble {
                    table: crate::ffi::table::name(leaf.table)?,
                    registered: column.registered,
                    column: column.name.clone(),
                    what: format!(
                        "the sealed column beside \"{}\" is gone or not registered",
                        column.name
                    ),
                });
            }
        }
    }
    leaves.sort_by_key(|leaf| leaf.table.to_u32());
    Ok((leaves, troubles))
}

/// One table with its columns, as `leaves` would give it; of a partitioned table the columns that
/// its partitions have through it, those of envelopes. None when nothing of it is registered, or can
/// be served.
pub fn leaf(table: Oid) -> Result<Option<Leaf>> {
    let mut leaf = Leaf {
        table,
        columns: Vec::new(),
        fire_triggers: false,
    };
    for (row, attnum, name) in registered_for(table)? {
        if row.fingerprint.is_some() {
            continue;
        }
        leaf.fire_triggers |= row.fire_triggers;
        if leaf.columns.iter().all(|column| column.attnum != attnum) {
            leaf.columns.push(LeafColumn {
                attnum,
                name,
                context: row.context.clone(),
                registered: row.table,
                fingerprint: None,
            });
        }
    }
    leaf.columns.sort_by_key(|column| column.attnum);
    Ok((!leaf.columns.is_empty()).then_some(leaf))
}

/// The columns of fingerprints of one table, by number: its own, and those of the tables above it.
pub fn fingerprint_columns(table: Oid) -> Result<Vec<i16>> {
    let rows = registered_for(table)?.into_iter();
    Ok(rows
        .filter(|(row, ..)| row.fingerprint.is_some())
        .map(|(_, attnum, _)| attnum)
        .collect())
}

/// What is registered for a table or one above it, with the column's number and name in this one;
/// what a partition says of itself first.
fn registered_for(table: Oid) -> Result<Vec<(read::RegisteredRow, i16, String)>> {
    let mut above = relation::ancestors(table);
    above.insert(0, table);
    let mut rows = read::registered_columns()?;
    let place = |row: &read::RegisteredRow| above.iter().position(|oid| *oid == row.table);
    rows.retain(|row| place(row).is_some());
    rows.sort_by_key(place);
    let here = |row: read::RegisteredRow| {
        let name = attnum(&row).and_then(|number| relation::column_name(row.table, number))?;
        let number = relation::column_number(table, &name)?;
        relation::is_bytea(table, number).then_some((row, number, name))
    };
    Ok(rows.into_iter().filter_map(here).collect())
}

/// Refuses a leaf that belongs to another role than the table `root` above it: an expression that
/// was given for the root is its owner's code, and would run with the privileges of the leaf's.
pub fn refuse_other_owner(root: Oid, leaf: Oid) -> Result<()> {
    let owner = relation::owner_of(root);
    if owner == relation::owner_of(leaf) {
        return Ok(());
    }
    let owner = owner.map_or(String::new(), session::role_name);
    let (root, leaf) = (
        crate::ffi::table::name(root)?,
        crate::ffi::table::name(leaf)?,
    );
    Err(Error::State(
        format!("partition {leaf} belongs to another role than {root}"),
        "What was begun or registered for a partitioned table runs as its owner.".to_string(),
        format!("ALTER TABLE {leaf} OWNER TO \"{owner}\"."),
    ))
}

/// Why a table cannot be re-encrypted safely, if so: asked at registration and again before each
/// batch, since its owner may have changed it. `relation` is open.
pub fn refusal(
    relation: pg_sys::Relation,
    columns: &[i16],
    fire_triggers: bool,
) -> Option<(&'static str, String)> {
    relation::refusal(relation, columns, fire_triggers)
}

/// Why a column cannot change its bytes freely, if so.
pub fn column_refusal(table: Oid, attnum: i16) -> Result<Option<String>> {
    use crate::ffi::sql::{Arg, text};
    text(
        "SELECT coalesce( \
           (SELECT 'has the column in constraint ' || quote_ident(conname) \
              FROM pg_catalog.pg_constraint \
             WHERE contype IN ('p', 'u', 'f', 'x') AND (conrelid = $1 AND $2 = ANY (conkey) \
                OR confrelid = $1 AND $2 = ANY (confkey)) LIMIT 1), \
           (SELECT 'has the column in unique index ' || indexrelid::regclass::text \
              FROM pg_catalog.pg_index \
             WHERE indrelid = $1 AND (indisunique OR indisexclusion) \
               AND ($2 = ANY ((indkey::smallint[])[0:indnkeyatts - 1]) \
                 OR indexprs IS NOT NULL AND EXISTS (SELECT FROM pg_catalog.pg_depend \
                     WHERE classid = 'pg_catalog.pg_class'::regclass AND objid = indexrelid \
                       AND refclassid = 'pg_catalog.pg_class'::regclass \
                       AND refobjid = $1 AND refobjsubid = $2)) LIMIT 1), \
           (SELECT 'has the column in the partition key of ' || partrelid::regclass::text \
              FROM pg_catalog.pg_partitioned_table p \
              JOIN pg_catalog.pg_attribute a ON a.attrelid = partrelid \
               AND a.attnum = ANY (partattrs::smallint[]) \
             WHERE partrelid IN (SELECT relid::oid FROM pg_catalog.pg_partition_ancestors($1)) \
               AND a.attname = (SELECT attname FROM pg_catalog.pg_attribute \
                     WHERE attrelid = $1 AND attnum = $2) LIMIT 1), \
           (SELECT 'computes the column: it is generated' FROM pg_catalog.pg_attribute \
             WHERE attrelid = $1 AND attnum = $2 AND attgenerated <> ''))",
        &[Arg::Oid(table), Arg::Bigint(i64::from(attnum))],
    )
}
