//! A key on its way to another database: the JSON document of `export_key` and `import_key`.
//!
//! ```text
//! {"version":1,"key_name":"pii","purpose":"seal","require_context":false,"shredded":false,
//!  "slots":[{"slot_id":"81985529216486895","version":1,"state":"active",
//!            "check_value":"<64 hex>","compromised":false,
//!            "wraps":[{"root_id":"<32 hex>","wrapped_key":"<146 hex>"}]}]}
//! ```
//!
//! Called by src/transfer.rs. It holds wrapped keys only, so it is no secret by itself. Invariants:
//! what is not exactly that is refused (SQLSTATE 22023), never repaired; a document that was read is
//! one key as a catalog could hold it: one active slot at most, every living slot wrapped, no id
//! twice. Slot ids are texts, since JSON readers round numbers of that size.

use std::collections::HashSet;
use std::fmt;

use serde_json::{Map, Value, json};

use crate::cipher::RootId;
use crate::envelope::SlotId;
use crate::hex;
use crate::keyring::{SlotState, valid_key_name};

const VERSION: u64 = 1;

/// A key with all its slots, tombstones included.
pub struct ExportedKey {
    /// Name, which the wrapped keys are bound to.
    pub key_name: String,
    /// Whether it seals (purpose seal) or makes fingerprints (lookup).
    pub seals: bool,
    /// Whether sealing needs a context.
    pub require_context: bool,
    /// Whether it was shredded.
    pub shredded: bool,
    /// Its slots by version.
    pub slots: Vec<ExportedSlot>,
}

/// One slot.
pub struct ExportedSlot {
    /// Slot id.
    pub id: SlotId,
    /// Number within the key.
    pub version: i32,
    /// State.
    pub state: SlotState,
    /// Proves the DEK.
    pub check_value: [u8; 32],
    /// Whether it was reported compromised.
    pub compromised: bool,
    /// Wrapped keys by root key; none if and only if the slot is destroyed.
    pub wraps: Vec<(RootId, [u8; 73])>,
}

/// Why a document is refused: where in it, and what is wrong there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExportError(String);

impl ExportError {
    /// The facts, for an error's DETAIL. Nothing of the document is quoted.
    pub fn detail(self) -> String {
        self.0
    }
}

impl fmt::Display for ExportError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ExportError {}

impl ExportedKey {
    /// Reads a document.
    pub fn parse(json: &[u8]) -> Result<ExportedKey, ExportError> {
        let document: Value = serde_json::from_slice(json)
            .map_err(|_| ExportError("It is not a JSON document.".to_owned()))?;
        let key = Object::of(
            &document,
            "The document",
            &[
                "version",
                "key_name",
                "purpose",
                "require_context",
                "shredded",
                "slots",
            ],
        )?;
        if key.field("version").as_u64() != Some(VERSION) {
            return Err(key.wrong("version", "is not 1"));
        }
        let key_name = key.text("key_name")?.to_owned();
        valid_key_name(&key_name).map_err(|_| key.wrong("key_name", "is no key name"))?;
        let seals = match key.text("purpose")? {
            "seal" => true,
            "lookup" => false,
            _ => return Err(key.wrong("purpose", "is neither seal nor lookup")),
        };
        let slots = key
            .list("slots")?
            .iter()
            .enumerate()
            .map(|(at, slot)| ExportedSlot::parse(slot, at + 1))
            .collect::<Result<Vec<_>, _>>()?;
        let key = ExportedKey {
            key_name,
            seals,
            require_context: key.truth("require_context")?,
            shredded: key.truth("shredded")?,
            slots,
        };
        key.consistent()?;
        Ok(key)
    }

    fn consistent(&self) -> Result<(), ExportError> {
        let refuse = |text: &str| Err(ExportError(text.to_owned()));
        let count = |state| self.slots.iter().filter(|slot| slot.state == state).count();
        let ids: HashSet<SlotId> = self.slots.iter().map(|slot| slot.id).collect();
        if self.slots.is_empty() {
            return refuse("The key has no slot.");
        }
        if ids.len() < self.slots.len() {
            return refuse("A slot id occurs twice.");
        }
        if !self.slots.is_sorted_by(|a, b| a.version < b.version) {
            return refuse("The slots are not in the order of their versions.");
        }
        if count(SlotState::Active) > 1 || count(SlotState::Pending) > 1 {
            return refuse("More than one slot is active, or more than one is pending.");
        }
        if self.shredded && count(SlotState::Active) + count(SlotState::Pending) > 0 {
            return refuse("The key is shredded and has an active or a pending slot.");
        }
        Ok(())
    }

    /// Writes the document.
    pub fn to_json(&self) -> String {
        let slots: Vec<Value> = self.slots.iter().map(ExportedSlot::to_value).collect();
        json!({
            "version": VERSION,
            "key_name": self.key_name,
            "purpose": if self.seals { "seal" } else { "lookup" },
            "require_context": self.require_context,
            "shredded": self.shredded,
            "slots": slots,
        })
        .to_string()
    }
}

impl ExportedSlot {
    fn parse(value: &Value, number: usize) -> Result<ExportedSlot, ExportError> {
        let place = format!("Slot {number}");
        let slot = Object::of(
            value,
            &place,
            &[
                "slot_id",
                "version",
                "state",
                "check_value",
                "compromised",
                "wraps",
            ],
        )?;
        let text = slot.text("slot_id")?;
        let id = text
            .parse()
            .ok()
            .and_then(SlotId::from_i64)
            .filter(|id| id.to_string() == text)
            .ok_or_else(|| slot.wrong("slot_id", "is no slot id in decimal digits"))?;
        let version = slot
            .field("version")
            .as_i64()
            .and_then(|version| i32::try_from(version).ok())
            .filter(|version| *version > 0)
            .ok_or_else(|| slot.wrong("version", "is not a positive integer"))?;
        let state = SlotState::parse(slot.text("state")?)
            .ok_or_else(|| slot.wrong("state", "is no state of a slot"))?;
        let wraps = slot
            .list("wraps")?
            .iter()
            .enumerate()
            .map(|(at, wrap)| parse_wrap(wrap, &format!("Wrap {} of slot {number}", at + 1)))
            .collect::<Result<Vec<_>, _>>()?;
        let roots: HashSet<RootId> = wraps.iter().map(|(root, _)| *root).collect();
        if roots.len() < wraps.len() {
            return Err(slot.wrong("wraps", "names a root id twice"));
        }
        if wraps.is_empty() != (state == SlotState::Destroyed) {
            let why = "is empty for a slot that is not destroyed, or not for one that is";
            return Err(slot.wrong("wraps", why));
        }
        Ok(ExportedSlot {
            id,
            version,
            state,
            check_value: slot.bytes("check_value")?,
            compromised: slot.truth("compromised")?,
            wraps,
        })
    }

    fn to_value(&self) -> Value {
        let wraps: Vec<Value> = self
            .wraps
            .iter()
            .map(|(root, wrapped)| {
                json!({"root_id": root.to_string(), "wrapped_key": in_hex(wrapped)})
            })
            .collect();
        json!({
            "slot_id": self.id.to_string(),
            "version": self.version,
            "state": self.state.name(),
            "check_value": in_hex(&self.check_value),
            "compromised": self.compromised,
            "wraps": wraps,
        })
    }
}

fn parse_wrap(value: &Value, place: &str) -> Result<(RootId, [u8; 73]), ExportError> {
    let wrap = Object::of(value, place, &["root_id", "wrapped_key"])?;
    let root = RootId::parse(wrap.text("root_id")?)
        .ok_or_else(|| wrap.wrong("root_id", "is not 32 lower-case hexadecimal digits"))?;
    Ok((root, wrap.bytes("wrapped_key")?))
}

fn in_hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 * bytes.len());
    hex::push(&mut text, bytes);
    text
}

/// A JSON object with exactly the fields that it should have, and its place for errors.
struct Object<'a> {
    fields: &'a Map<String, Value>,
    place: &'a str,
}

impl<'a> Object<'a> {
    fn of(value: &'a Value, place: &'a str, names: &[&str]) -> Result<Object<'a>, ExportError> {
        let Value::Object(fields) = value else {
            return Err(ExportError(format!("{place} is not a JSON object.")));
        };
        let object = Object { fields, place };
        if let Some(name) = names.iter().find(|name| !fields.contains_key(**name)) {
            return Err(object.wrong(name, "is missing"));
        }
        if fields.len() > names.len() {
            return Err(ExportError(format!(
                "{place} has a field that is not known."
            )));
        }
        Ok(object)
    }

    /// A field that `of` has found.
    fn field(&self, name: &str) -> &'a Value {
        self.fields.get(name).unwrap_or(&Value::Null)
    }

    fn text(&self, name: &str) -> Result<&'a str, ExportError> {
        let text = self.field(name).as_str();
        text.ok_or_else(|| self.wrong(name, "is not a text"))
    }

    fn truth(&self, name: &str) -> Result<bool, ExportError> {
        let truth = self.field(name).as_bool();
        truth.ok_or_else(|| self.wrong(name, "is not true or false"))
    }

    fn list(&self, name: &str) -> Result<&'a Vec<Value>, ExportError> {
        let list = self.field(name).as_array();
        list.ok_or_else(|| self.wrong(name, "is not a list"))
    }

    fn bytes<const N: usize>(&self, name: &str) -> Result<[u8; N], ExportError> {
        let mut bytes = [0; N];
        hex::decode(self.text(name)?, &mut bytes).ok_or_else(|| {
            self.wrong(
                name,
                &format!("is not {} lower-case hexadecimal digits", 2 * N),
            )
        })?;
        Ok(bytes)
    }

    fn wrong(&self, name: &str, what: &str) -> ExportError {
        ExportError(format!("{}: \"{name}\" {what}.", self.place))
    }
}
