//! Envelopes in places that nobody has registered: other bytea columns, materialized views,
//! defaults.
//!
//! Called by find_envelopes() and before a slot is destroyed. Every table is read once, headers
//! only; a table that is locked is said to be so and counts as a place. Arrays, composites, other
//! types and what clients keep are not looked into.

use std::collections::HashSet;

use pgrx::pg_sys::{self, Oid};
use rekey_core::envelope::{Header, SlotId};
use serde_json::{Value, json};

use crate::error::Result;
use crate::ffi::sql;
use crate::ffi::table::{self, Snapshot, Table};
use crate::registry;
use crate::stale::{self, BySlot, Standing};

/// Envelopes of one slot in one place.
pub struct Place {
    /// Table, as people write it.
    pub table: String,
    /// Column, or what else.
    pub column: String,
    /// Slot that they name.
    pub slot: Option<SlotId>,
    /// How many.
    pub envelopes: i64,
}

/// Every bytea column of the database that is stored.
pub(super) const COLUMNS: &str = "\
    SELECT c.oid::text, a.attnum::text, a.attname::text \
      FROM pg_catalog.pg_class c \
      JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
      JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid \
      JOIN pg_catalog.pg_type t ON t.oid = a.atttypid \
     WHERE c.relkind IN ('r', 'm') AND c.relpersistence <> 't' AND a.attnum > 0 \
       AND NOT a.attisdropped AND 'bytea'::regtype IN (t.oid, t.typbasetype) \
       AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'rekey') \
     ORDER BY c.oid, a.attnum";

const DEFAULTS: &str = "\
    SELECT d.adrelid::text, a.attname::text, \
           (pg_catalog.regexp_matches(pg_catalog.pg_get_expr(d.adbin, d.adrelid), \
                '\\\\x(f9[0-9a-f]{98,})', 'g'))[1] \
      FROM pg_catalog.pg_attrdef d \
      JOIN pg_catalog.pg_attribute a ON a.attrelid = d.adrelid AND a.attnum = d.adnum";

/// Every place that is not registered and holds envelopes of slots of this database.
pub fn all() -> Result<Vec<Place>> {
    let (leaves, _) = registry::leaves()?;
    let registered: HashSet<(Oid, i16)> = leaves
        .iter()
        .flat_map(|leaf| leaf.columns.iter().map(|c| (leaf.table, c.attnum)))
        .collect();
    let slots = stale::slots()?;
    let snapshot = Snapshot::latest();
    let mut places = Vec::new();
    let parse = |cell: &Option<String>| cell.as_deref().and_then(|c| c.parse::<u32>().ok());
    for row in sql::rows(COLUMNS, &[])? {
        let (Some(oid), Some(number)) = (parse(&row[0]), parse(&row[1])) else {
            continue;
        };
        let (oid, attnum) = (Oid::from_u32(oid), i16::try_from(number).unwrap_or(0));
        if registered.contains(&(oid, attnum)) {
            continue;
        }
        let column = row[2].clone().unwrap_or_default();
        let Some(table) = Table::open_for_scan(oid) else {
            places.push(Place {
                table: table::name(oid)?,
                column: format!("{column} (locked, not read)"),
                slot: None,
                envelopes: 0,
            });
            continue;
        };
        if !table.stores_heap() {
            continue;
        }
        let mut counts: BySlot<i64> = BySlot::default();
        table.scan(&snapshot, 0..table.blocks(), &[attnum], |_, values| {
            if let Some(header) = values[0].and_then(stale::header)
                && slots.standing(header.slot) != Standing::Unknown
            {
                *counts.entry(header.slot).or_insert(0) += 1;
            }
            true
        });
        for (slot, envelopes) in counts {
            places.push(Place {
                table: table::name(oid)?,
                column: column.clone(),
                slot: Some(slot),
                envelopes,
            });
        }
    }
    for row in sql::rows(DEFAULTS, &[])? {
        let oid = parse(&row[0]).map_or(pg_sys::InvalidOid, Oid::from_u32);
        let header = row[2].as_deref().and_then(header_of_hex);
        if let Some(header) = header
            && slots.standing(header.slot) != Standing::Unknown
        {
            places.push(Place {
                table: table::name(oid)?,
                column: format!("{} (default)", row[1].clone().unwrap_or_default()),
                slot: Some(header.slot),
                envelopes: 1,
            });
        }
    }
    Ok(places)
}

fn header_of_hex(hex: &str) -> Option<Header> {
    let byte = |at: usize| u8::from_str_radix(hex.get(at * 2..at * 2 + 2)?, 16).ok();
    let bytes: Vec<u8> = (0..10).map_while(byte).collect();
    Header::parse(&bytes).ok()
}

/// The unregistered places with envelopes of one slot, or that could not be read; None: none.
pub fn of_slot(slot: SlotId) -> Result<Option<String>> {
    let places: Vec<String> = all()?
        .into_iter()
        .filter(|place| place.slot.is_none_or(|found| found == slot))
        .map(|place| format!("{}.{} ({})", place.table, place.column, place.envelopes))
        .collect();
    Ok((!places.is_empty()).then(|| places.join(", ")))
}

/// All places as a JSON array, for find_envelopes().
pub fn as_json() -> Result<String> {
    let place = |place: Place| {
        json!({
            "table_name": place.table,
            "column_name": place.column,
            "slot_id": place.slot.map(SlotId::as_i64),
            "envelopes": place.envelopes,
        })
    };
    let places: Vec<Value> = all()?.into_iter().map(place).collect();
    Ok(Value::Array(places).to_string())
}
