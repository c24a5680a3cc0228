//! The root keyring file:
//! `{"version":1,"keys":[{"id":"<32 hex>","key":"<64 hex>","created_at":"<RFC 3339>"}]}`.
//!
//! Called by the root-key providers (file, command), which own the bytes and wipe them. Invariants:
//! a keyring holds each root key once and under its true id, and writes itself as a file that reads
//! back as the same keyring; what is not exactly that is refused (SQLSTATE F0000), never repaired.
//! Secrets are decoded from the caller's buffer straight into their boxes; no error holds any text
//! of the file (serde's own messages would, so they are dropped here).

use std::cell::Cell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use zeroize::Zeroizing;

use crate::cipher::{RootId, RootKey};
use crate::hex;

/// The largest keyring that is read: some 6,000 keys, and no provider's runaway output.
const MAX_LEN: usize = 1 << 20;
const VERSION: u64 = 1;

/// The root keys of a server, in file order. Empty only until the first [`RootKeyring::push`] to a
/// new one: an empty file is refused.
#[derive(Default)]
pub struct RootKeyring {
    entries: Vec<Entry>,
}

struct Entry {
    id: RootId,
    key: RootKey,
    created_at: String,
}

impl RootKeyring {
    /// Reads a keyring file or the output of a keyring command.
    pub fn parse(json: &[u8]) -> Result<Self, KeyringError> {
        if json.len() > MAX_LEN {
            return Err(KeyringError::TooLarge { len: json.len() });
        }
        let cause = Cell::new(None);
        let mut deserializer = serde_json::Deserializer::from_slice(json);
        let keyring = KeyringSeed { cause: &cause }
            .deserialize(&mut deserializer)
            .and_then(|keyring| deserializer.end().map(|()| keyring));
        keyring.map_err(|error| {
            cause.get().unwrap_or(KeyringError::NotAKeyring {
                line: error.line(),
                column: error.column(),
            })
        })
    }

    /// A keyring without keys, for a new file.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a key at the end. Refused are a key that is there already and a `created_at` that is
    /// not RFC 3339 (`2025-01-31T23:59:59Z`): such a file could not be read again.
    pub fn push(&mut self, key: RootKey, created_at: String) -> Result<(), KeyringError> {
        let id = key.id();
        if self.get(&id).is_some() {
            return Err(KeyringError::DuplicateId { id });
        }
        if rfc3339(created_at.as_bytes()).is_none() {
            return Err(KeyringError::BadCreatedAt {
                entry: self.entries.len() + 1,
            });
        }
        self.entries.push(Entry {
            id,
            key,
            created_at,
        });
        Ok(())
    }

    /// The keyring as a file. The text holds the keys; it wipes itself.
    pub fn to_json(&self) -> Zeroizing<String> {
        const FIXED: usize = r#"{"version":1,"keys":[]}"#.len() + 1;
        const ENTRY: usize = r#"{"id":"","key":"","created_at":""},"#.len() + 32 + 64;
        let dates: usize = self
            .entries
            .iter()
            .map(|entry| entry.created_at.len())
            .sum();
        // Exact: a string that grows would leave copies of itself behind.
        let capacity = FIXED + ENTRY * self.entries.len() + dates;
        let mut json = Zeroizing::new(String::with_capacity(capacity));
        json.push_str(r#"{"version":1,"keys":["#);
        for (at, entry) in self.entries.iter().enumerate() {
            json.push_str(if at == 0 { r#"{"id":""# } else { r#",{"id":""# });
            hex::push(&mut json, entry.id.as_bytes());
            json.push_str(r#"","key":""#);
            hex::push(&mut json, entry.key.expose());
            json.push_str(r#"","created_at":""#);
            json.push_str(&entry.created_at);
            json.push_str(r#""}"#);
        }
        json.push_str("]}\n");
        debug_assert!(json.len() <= capacity);
        json
    }

    /// The root key of that id.
    pub fn get(&self, id: &RootId) -> Option<&RootKey> {
        self.entries
            .iter()
            .find(|entry| entry.id == *id)
            .map(|entry| &entry.key)
    }

    /// When the root key of that id was made, as the file says.
    pub fn created_at(&self, id: &RootId) -> Option<&str> {
        self.entries
            .iter()
            .find(|entry| entry.id == *id)
            .map(|entry| entry.created_at.as_str())
    }

    /// The ids, in file order.
    pub fn ids(&self) -> impl ExactSizeIterator<Item = RootId> + '_ {
        self.entries.iter().map(|entry| entry.id)
    }

    /// How many root keys there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none yet.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

/// Why a keyring is refused (SQLSTATE F0000).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KeyringError {
    /// More than 1 MiB.
    TooLarge {
        /// Bytes that there are.
        len: usize,
    },
    /// Not JSON, cut off, followed by something, or of another shape.
    NotAKeyring {
        /// Line, from 1.
        line: usize,
        /// Column, in bytes.
        column: usize,
    },
    /// A field that this version does not know.
    UnknownField,
    /// A field twice in one object.
    DuplicateField(&'static str),
    /// A field that is not there.
    MissingField(&'static str),
    /// The version is another number than 1.
    UnknownVersion,
    /// The list of keys is empty.
    Empty,
    /// An id that is not 32 lower-case hex digits.
    BadId {
        /// Number of the entry, from 1.
        entry: usize,
    },
    /// A key that is not 64 lower-case hex digits.
    BadKey {
        /// Number of the entry, from 1.
        entry: usize,
    },
    /// A date that is not RFC 3339.
    BadCreatedAt {
        /// Number of the entry, from 1.
        entry: usize,
    },
    /// The id does not belong to the key: one of them was swapped or altered.
    IdMismatch {
        /// Number of the entry, from 1.
        entry: usize,
        /// The id that the entry states.
        id: RootId,
    },
    /// The same root key twice.
    DuplicateId {
        /// The id.
        id: RootId,
    },
}

impl KeyringError {
    /// The facts, for an error's DETAIL. Ids are public; nothing else of the file is shown.
    pub fn detail(self) -> String {
        match self {
            KeyringError::TooLarge { len } => {
                format!("The keyring has {len} bytes; at most {MAX_LEN} are read.")
            }
            KeyringError::NotAKeyring { line, column } => format!(
                "The keyring is not the expected JSON document: line {line}, column {column}."
            ),
            KeyringError::UnknownField => "The keyring has a field that is not known.".to_owned(),
            KeyringError::DuplicateField(field) => {
                format!("The field \"{field}\" occurs twice in one object.")
            }
            KeyringError::MissingField(field) => format!("The field \"{field}\" is missing."),
            KeyringError::UnknownVersion => {
                format!("The keyring is not of version {VERSION}.")
            }
            KeyringError::Empty => "The keyring has no key.".to_owned(),
            KeyringError::BadId { entry } => {
                format!("The id of entry {entry} is not 32 lower-case hexadecimal digits.")
            }
            KeyringError::BadKey { entry } => {
                format!("The key of entry {entry} is not 64 lower-case hexadecimal digits.")
            }
            KeyringError::BadCreatedAt { entry } => {
                format!("The created_at of entry {entry} is not an RFC 3339 date and time.")
            }
            KeyringError::IdMismatch { entry, id } => {
                format!("The key of entry {entry} does not have the root id {id} that it states.")
            }
            KeyringError::DuplicateId { id } => format!("The root id {id} occurs twice."),
        }
    }
}

impl fmt::Display for KeyringError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail())
    }
}

impl std::error::Error for KeyringError {}

// The deserialisers. They are written by hand so that each cause has its variant: they note it in
// `cause` and end the parse with an error that says nothing.

type Cause = Cell<Option<KeyringError>>;

fn refuse<E: Error>(cause: &Cause, error: KeyringError) -> E {
    cause.set(Some(error));
    E::custom("refused")
}

/// Puts a field's value where none was.
fn fill<T, E: Error>(
    field: &'static str,
    cause: &Cause,
    place: &mut Option<T>,
    value: T,
) -> Result<(), E> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(refuse(cause, KeyringError::DuplicateField(field))),
    }
}

fn require<T, E: Error>(field: &'static str, cause: &Cause, value: Option<T>) -> Result<T, E> {
    value.ok_or_else(|| refuse(cause, KeyringError::MissingField(field)))
}

/// The whole document.
struct KeyringSeed<'a> {
    cause: &'a Cause,
}

impl<'de> DeserializeSeed<'de> for KeyringSeed<'_> {
    type Value = RootKeyring;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<RootKeyring, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for KeyringSeed<'_> {
    type Value = RootKeyring;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a keyring")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RootKeyring, A::Error> {
        let cause = self.cause;
        let mut version = None;
        let mut keyring = None;
        while let Some(field) = map.next_key_seed(FieldSeed)? {
            match field {
                Field::Version => {
                    map.next_value_seed(VersionSeed { cause })?;
                    fill("version", cause, &mut version, ())?;
                }
                Field::Keys => {
                    let keys = map.next_value_seed(KeysSeed { cause })?;
                    fill("keys", cause, &mut keyring, keys)?;
                }
                _ => return Err(refuse(cause, KeyringError::UnknownField)),
            }
        }
        require("version", cause, version)?;
        require("keys", cause, keyring)
    }
}

/// Every field name of the document.
enum Field {
    Version,
    Keys,
    Id,
    Key,
    CreatedAt,
    Unknown,
}

struct FieldSeed;

impl<'de> DeserializeSeed<'de> for FieldSeed {
    type Value = Field;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Field, D::Error> {
        deserializer.deserialize_identifier(self)
    }
}

impl Visitor<'_> for FieldSeed {
    type Value = Field;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a field name")
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<Field, E> {
        Ok(match name {
            "version" => Field::Version,
            "keys" => Field::Keys,
            "id" => Field::Id,
            "key" => Field::Key,
            "created_at" => Field::CreatedAt,
            _ => Field::Unknown,
        })
    }
}

struct VersionSeed<'a> {
    cause: &'a Cause,
}

impl<'de> DeserializeSeed<'de> for VersionSeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_u64(self)
    }
}

impl Visitor<'_> for VersionSeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a version")
    }

    fn visit_u64<E: Error>(self, version: u64) -> Result<(), E> {
        match version {
            VERSION => Ok(()),
            _ => Err(refuse(self.cause, KeyringError::UnknownVersion)),
        }
    }
}

/// The list of entries.
struct KeysSeed<'a> {
    cause: &'a Cause,
}

impl<'de> DeserializeSeed<'de> for KeysSeed<'_> {
    type Value = RootKeyring;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<RootKeyring, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for KeysSeed<'_> {
    type Value = RootKeyring;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of keys")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<RootKeyring, A::Error> {
        let cause = self.cause;
        let mut keyring = RootKeyring::new();
        loop {
            let entry = keyring.len() + 1;
            let Some((id, key, created_at)) = list.next_element_seed(EntrySeed { entry, cause })?
            else {
                break;
            };
            if key.id() != id {
                return Err(refuse(cause, KeyringError::IdMismatch { entry, id }));
            }
            keyring
                .push(key, created_at)
                .map_err(|error| refuse(cause, error))?;
        }
        if keyring.is_empty() {
            return Err(refuse(cause, KeyringError::Empty));
        }
        Ok(keyring)
    }
}

/// One entry, its id not yet compared with its key.
struct EntrySeed<'a> {
    entry: usize,
    cause: &'a Cause,
}

impl<'de> DeserializeSeed<'de> for EntrySeed<'_> {
    type Value = (RootId, RootKey, String);

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for EntrySeed<'_> {
    type Value = (RootId, RootKey, String);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an entry")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let EntrySeed { entry, cause } = self;
        let mut id = None;
        let mut key = None;
        let mut created_at = None;
        while let Some(field) = map.next_key_seed(FieldSeed)? {
            match field {
                Field::Id => {
                    let error = KeyringError::BadId { entry };
                    let seed = TextSeed {
                        parse: RootId::parse,
                        error,
                        cause,
                    };
                    fill("id", cause, &mut id, map.next_value_seed(seed)?)?;
                }
                Field::Key => {
                    let error = KeyringError::BadKey { entry };
                    let seed = TextSeed {
                        parse: RootKey::from_hex,
                        error,
                        cause,
                    };
                    fill("key", cause, &mut key, map.next_value_seed(seed)?)?;
                }
                Field::CreatedAt => {
                    let error = KeyringError::BadCreatedAt { entry };
                    let seed = TextSeed {
                        parse: created_at_text,
                        error,
                        cause,
                    };
                    fill(
                        "created_at",
                        cause,
                        &mut created_at,
                        map.next_value_seed(seed)?,
                    )?;
                }
                _ => return Err(refuse(cause, KeyringError::UnknownField)),
            }
        }
        Ok((
            require("id", cause, id)?,
            require("key", cause, key)?,
            require("created_at", cause, created_at)?,
        ))
    }
}

/// A text that is parsed where it stands in the input. A text with JSON escapes stands nowhere and
/// is refused: none of these needs one.
struct TextSeed<'a, T> {
    parse: fn(&str) -> Option<T>,
    error: KeyringError,
    cause: &'a Cause,
}

impl<'de, T> DeserializeSeed<'de> for TextSeed<'_, T> {
    type Value = T;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<T, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'de, T> Visitor<'de> for TextSeed<'_, T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text")
    }

    fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<T, E> {
        (self.parse)(text).ok_or_else(|| refuse(self.cause, self.error))
    }

    fn visit_str<E: Error>(self, _escaped: &str) -> Result<T, E> {
        Err(refuse(self.cause, self.error))
    }
}

fn created_at_text(text: &str) -> Option<String> {
    rfc3339(text.as_bytes()).map(|()| text.to_owned())
}

/// Checks an RFC 3339 date-time: `2025-01-31T23:59:60.123Z`, or with an offset such as `+01:00`.
fn rfc3339(text: &[u8]) -> Option<()> {
    let (year, rest) = number(text, 4)?;
    let (month, rest) = number(rest.strip_prefix(b"-")?, 2)?;
    let (day, rest) = number(rest.strip_prefix(b"-")?, 2)?;
    let (hour, rest) = number(rest.strip_prefix(b"T")?, 2)?;
    let (minute, rest) = number(rest.strip_prefix(b":")?, 2)?;
    let (second, rest) = number(rest.strip_prefix(b":")?, 2)?;
    let rest = match rest.strip_prefix(b".") {
        None => rest,
        Some(fraction) => {
            let digits = fraction
                .iter()
                .take_while(|byte| byte.is_ascii_digit())
                .count();
            if digits == 0 {
                return None;
            }
            &fraction[digits..]
        }
    };
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let days = match month {
        1 | 3 | 5 | 7 | 8 | 10 | 12 => 31,
        4 | 6 | 9 | 11 => 30,
        2 if leap => 29,
        2 => 28,
        _ => return None,
    };
    if !(1..=days).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    if rest == b"Z" {
        return Some(());
    }
    let rest = rest
        .strip_prefix(b"+")
        .or_else(|| rest.strip_prefix(b"-"))?;
    let (hour, rest) = number(rest, 2)?;
    let (minute, rest) = number(rest.strip_prefix(b":")?, 2)?;
    (hour <= 23 && minute <= 59 && rest.is_empty()).then_some(())
}

/// The number of exactly `digits` decimal digits that `text` begins with, and the rest.
fn number(text: &[u8], digits: usize) -> Option<(u32, &[u8])> {
    let (number, rest) = text.split_at_checked(digits)?;
    let value = number.iter().try_fold(0, |value, digit| {
        digit
            .is_ascii_digit()
            .then(|| value * 10 + u32::from(digit - b'0'))
    })?;
    Some((value, rest))
}
