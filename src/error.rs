//! The one table of errors: SQLSTATE, message, DETAIL and HINT of each.
//!
//! Every function of src/api/ ends in `Result<_, Error>`; `raise` turns the error into an ERROR.
//! Invariant: no key material and no value in any text; all authentication failures read alike.

use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgLogLevel, function_name};
use rekey_core::cipher::{OpenError, RandomError};
use rekey_core::envelope::{EnvelopeError, SlotId};
use rekey_core::keyring::{KeyNameError, Privilege, SlotState, valid_key_name};

use crate::ffi::text;

/// What can go wrong, with the facts that the message needs.
#[derive(Debug)]
pub enum Error {
    /// The bytes are not an envelope of ours.
    Envelope(EnvelopeError),
    /// The bytes are not a fingerprint.
    Fingerprint,
    /// Wrong context, altered bytes: one error for all.
    Authentication(SlotId),
    /// The envelope has a context bound and none was given.
    ContextMissing(SlotId),
    /// The envelope has no context bound and one was given; true if it names a key.
    ContextUnexpected(SlotId, bool),
    /// The key's policy asks for a context.
    ContextRequired(String),
    /// A NULL argument where a value is needed.
    NullArgument(&'static str),
    /// An object of the wrong kind, or in a way that forbids it: SQLSTATE, message, detail, hint.
    Object(Code, String, String, String),
    /// A bad argument: message, detail, hint.
    Argument(String, String, String),
    /// A key name that breaks the rules.
    KeyName(KeyNameError),
    /// key_name is empty and rekey.default_key is not set.
    NoDefaultKey,
    /// No key of that name.
    UnknownKey(String),
    /// A key of that name exists.
    KeyExists(String),
    /// No role of that name.
    UnknownRole(String),
    /// A key of the other purpose: key, the purpose that was needed.
    Purpose(String, &'static str),
    /// A value names a slot of another key than that of its column.
    OtherKey(SlotId, String),
    /// No slot of that id in this database.
    UnknownSlot(i64),
    /// Nobody seals under this key now: it has no active slot.
    NoActiveSlot(String),
    /// The slot's state forbids opening it; when it got there.
    SlotClosed(SlotId, SlotState, String),
    /// Something is not in the state that the action needs: message, detail, hint.
    State(String, String, String),
    /// The user lacks a privilege on a key: role, key, privilege.
    KeyPrivilege(String, String, Privilege),
    /// The user may not do this at all: message, detail, hint.
    Privilege(String, String, String),
    /// No usable root key: detail, hint.
    RootKey(String, String),
    /// The root key command gave nothing: detail, hint.
    Provider(String, String),
    /// No root key of that id in this database.
    UnknownRootKey(String),
    /// The transaction's snapshot is older than a change that it would have to see.
    Snapshot,
    /// A type that cannot be sealed or opened to: type, reason.
    RefusedType(String, &'static str),
    /// decrypt_col_as finds no cast: from, to.
    NoCast(String, String),
    /// The type of a sealed value is not in this database.
    UnknownType(String),
    /// Users' code refused: its SQLSTATE, our words.
    Foreign {
        /// SQLSTATE of the original error, in PostgreSQL's coding: users make their own.
        code: i32,
        /// What failed.
        what: &'static str,
    },
    /// Text that has no form in the target encoding.
    NotEncodable,
    /// More than PostgreSQL can hold in a value.
    TooLarge {
        /// Size in bytes.
        bytes: usize,
    },
    /// The system gave no random bytes.
    Random,
    /// Code of a table's owner failed in a way that no row is to blame for.
    Owner(Code),
    /// The user has cancelled the statement.
    Cancelled,
    /// The extension is not created in this database.
    NoCatalog,
    /// The library and the catalog are of versions that do not understand each other.
    Version {
        /// The library's version.
        library: &'static str,
        /// The catalog's: pg_extension.extversion.
        catalog: String,
        /// Which of the two is behind.
        catalog_is_newer: bool,
    },
    /// The extension would go with keys in use: open slots, keys.
    InUse(i64, i64),
    /// Direct change of a catalog table.
    DirectChange(String),
    /// A catalog row that cannot be, or SPI failing.
    Internal(String),
}

/// Results of the extension.
pub type Result<T> = std::result::Result<T, Error>;

impl From<EnvelopeError> for Error {
    fn from(error: EnvelopeError) -> Self {
        Error::Envelope(error)
    }
}

impl From<RandomError> for Error {
    fn from(_: RandomError) -> Self {
        Error::Random
    }
}

impl From<KeyNameError> for Error {
    fn from(error: KeyNameError) -> Self {
        Error::KeyName(error)
    }
}

/// For places where the slot is known and the cause must not be.
pub fn authentication(slot: SlotId) -> impl FnOnce(OpenError) -> Error {
    move |OpenError| Error::Authentication(slot)
}

impl Error {
    /// No key of that name: 22023 for one that no key can have, else 42704.
    pub fn unknown_key(name: String) -> Error {
        match valid_key_name(&name) {
            Err(cause) => Error::KeyName(cause),
            Ok(()) => Error::UnknownKey(name),
        }
    }

    /// Raises the error. Does not return.
    #[cold]
    pub fn raise(self) -> ! {
        if let Error::Foreign { code, .. } = self {
            crate::ffi::types::override_sqlstate(code);
        }
        let (code, message, detail, hint) = self.texts();
        let (message, detail, hint) = (
            text::message(message),
            text::message(detail),
            text::message(hint),
        );
        let mut report = ErrorReport::new(code, message, function_name!());
        if !detail.is_empty() {
            report = report.set_detail(detail);
        }
        if !hint.is_empty() {
            report = report.set_hint(hint);
        }
        report.report(PgLogLevel::ERROR);
        unreachable!("ERROR does not return")
    }

    /// The facts and the next step, as rekey.check() shows them.
    pub fn explain(self) -> (String, String) {
        let (_, message, detail, hint) = self.texts();
        let facts = if detail.is_empty() {
            message
        } else {
            format!("{message}: {detail}")
        };
        (facts, hint)
    }

    /// Its SQLSTATE.
    pub fn code(self) -> Code {
        self.texts().0
    }

    fn texts(self) -> (Code, String, String, String) {
        use Code::{
            ERRCODE_CHARACTER_NOT_IN_REPERTOIRE, ERRCODE_CONFIG_FILE_ERROR,
            ERRCODE_DATATYPE_MISMATCH, ERRCODE_DUPLICATE_OBJECT,
            ERRCODE_EXTERNAL_ROUTINE_INVOCATION_EXCEPTION, ERRCODE_INSUFFICIENT_PRIVILEGE,
            ERRCODE_INTERNAL_ERROR, ERRCODE_INVALID_BINARY_REPRESENTATION,
            ERRCODE_INVALID_PARAMETER_VALUE, ERRCODE_NULL_VALUE_NOT_ALLOWED,
            ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE, ERRCODE_PROGRAM_LIMIT_EXCEEDED,
            ERRCODE_SYSTEM_ERROR, ERRCODE_T_R_SERIALIZATION_FAILURE, ERRCODE_UNDEFINED_OBJECT,
        };
        let entry = |code, message: &str, detail: String, hint: &str| {
            (code, message.to_string(), detail, hint.to_string())
        };
        match self {
            Error::Envelope(cause) => entry(
                ERRCODE_INVALID_BINARY_REPRESENTATION,
                "the value is not a valid envelope",
                cause.detail(),
                "Pass bytes that encrypt_col has returned, whole and unchanged; \
                 rekey.is_envelope(value) tells them apart.",
            ),
            Error::Fingerprint => entry(
                ERRCODE_INVALID_BINARY_REPRESENTATION,
                "the value is not a valid fingerprint",
                "A fingerprint has 40 bytes and begins with a slot id.".to_string(),
                "Pass bytes that fingerprint_col has returned, whole and unchanged.",
            ),
            Error::Purpose(key, "lookup") => (
                ERRCODE_INVALID_PARAMETER_VALUE,
                format!("key \"{key}\" seals and makes no fingerprints"),
                "Its purpose is seal.".to_string(),
                "Make fingerprints under a key of its own: rekey.create_key(key_name, \
                 purpose => 'lookup')."
                    .to_string(),
            ),
            Error::Purpose(key, _) => (
                ERRCODE_INVALID_PARAMETER_VALUE,
                format!("key \"{key}\" makes fingerprints and does not seal"),
                "Its purpose is lookup.".to_string(),
                "Seal under a key with purpose seal.".to_string(),
            ),
            Error::OtherKey(slot, key) => (
                ERRCODE_INVALID_PARAMETER_VALUE,
                format!("slot {slot} is not one of key \"{key}\""),
                "The column is registered for values of this key.".to_string(),
                "rekey.columns shows the registration, rekey.slots the slot's key.".to_string(),
            ),
            Error::Authentication(slot) => entry(
                ERRCODE_EXTERNAL_ROUTINE_INVOCATION_EXCEPTION,
                "the envelope could not be authenticated",
                format!("Slot {slot} does not vouch for these bytes with this context."),
                "Pass the context that the value was sealed with; if it is right, the stored \
                 bytes were altered or moved.",
            ),
            Error::ContextMissing(slot) => entry(
                ERRCODE_INVALID_PARAMETER_VALUE,
                "the envelope is bound to a context and none was given",
                format!("The envelope names slot {slot}."),
                "Pass the context that the value was sealed with: decrypt_col(envelope, context).",
            ),
            Error::ContextUnexpected(slot, names_key) => entry(
                ERRCODE_INVALID_PARAMETER_VALUE,
                "a context was given and the envelope is not bound to one",
                format!("The envelope names slot {slot}."),
                if names_key {
                    "decrypt_col takes no key name: the envelope names its own slot. Call \
                     decrypt_col(envelope)."
                } else {
                    "Leave the context out: decrypt_col(envelope). decrypt_col takes no key name."
                },
            ),
            Error::Object(code, message, detail, hint) => (code, message, detail, hint),
            Error::ContextRequired(key) => (
                ERRCODE_INVALID_PARAMETER_VALUE,
                format!("key \"{key}\" seals only with a context"),
                "Its policy has require_context on.".to_string(),
                "Pass a context that names the cell, for example \
                 rekey.context('customer.email', id::text)."
                    .to_string(),
            ),
            Error::NullArgument(name) => (
                ERRCODE_NULL_VALUE_NOT_ALLOWED,
                format!("{name} must not be null"),
                "NULL is never taken for a default: it could mean another key, or no binding."
                    .to_string(),
                format!("Pass a value for {name}, or leave the argument out for its default."),
            ),
            Error::Argument(message, detail, hint) => {
                (ERRCODE_INVALID_PARAMETER_VALUE, message, detail, hint)
            }
            Error::KeyName(cause) => entry(
                ERRCODE_INVALID_PARAMETER_VALUE,
                "invalid key name",
                cause.detail(),
                "Use 1 to 200 bytes without control characters and without spaces at either end.",
            ),
            Error::NoDefaultKey => entry(
                ERRCODE_UNDEFINED_OBJECT,
                "no key name was given and rekey.default_key is not set",
                "An empty key_name means the setting rekey.default_key.".to_string(),
                "Pass key_name, or set rekey.default_key.",
            ),
            Error::UnknownKey(key) => (
                ERRCODE_UNDEFINED_OBJECT,
                format!("key \"{key}\" does not exist"),
                "Key names are case-sensitive, and sealing never creates a key.".to_string(),
                "SELECT key_name FROM rekey.keys shows the keys that you may use; \
                 rekey.create_key makes one."
                    .to_string(),
            ),
            Error::KeyExists(key) => (
                ERRCODE_DUPLICATE_OBJECT,
                format!("key \"{key}\" already exists"),
                "A key keeps its name for good, whatever happens to its slots.".to_string(),
                "Pass if_not_exists => true to accept an existing key; rotate_key gives it a new \
                 slot."
                    .to_string(),
            ),
            Error::UnknownRole(role) => (
                ERRCODE_UNDEFINED_OBJECT,
                format!("role \"{role}\" does not exist"),
                "Privileges on keys are granted to roles of this cluster.".to_string(),
                "Use the role's exact name, or 'public' for everyone.".to_string(),
            ),
            Error::UnknownSlot(slot) => (
                ERRCODE_UNDEFINED_OBJECT,
                format!("slot {slot} does not exist in this database"),
                "The key slots travel with a whole dump of the database, not with single tables."
                    .to_string(),
                "Was the value sealed in another database, or restored without the schema rekey? \
                 Restore the keys from the same dump, or look the id up in rekey.slots."
                    .to_string(),
            ),
            Error::NoActiveSlot(key) => (
                ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                format!("key \"{key}\" has no active slot"),
                "Values can be opened as the slots' states allow, but none can be sealed."
                    .to_string(),
                "SELECT * FROM rekey.slots shows its slots. If the key was not shredded, \
                 rotate_key makes an active slot."
                    .to_string(),
            ),
            Error::SlotClosed(slot, state, when) => (
                ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                format!("slot {slot} is {state}"),
                format!("It was {state} at {when}."),
                if state == SlotState::Destroyed {
                    "Its key is gone from this database; an older backup, if any, holds it still."
                } else {
                    "rekey.enable_slot opens it again."
                }
                .to_string(),
            ),
            Error::State(message, detail, hint) => (
                ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                message,
                detail,
                hint,
            ),
            Error::KeyPrivilege(role, key, privilege) => (
                ERRCODE_INSUFFICIENT_PRIVILEGE,
                format!("permission denied for key \"{key}\""),
                format!("Role \"{role}\" lacks the privilege {privilege} on it."),
                format!(
                    "{} of the key can grant it: rekey.grant_key(key_name, role_name, \
                     '{{{privilege}}}').",
                    if privilege == Privilege::Owner {
                        "An owner"
                    } else {
                        "An owner or manager"
                    }
                ),
            ),
            Error::Privilege(message, detail, hint) => {
                (ERRCODE_INSUFFICIENT_PRIVILEGE, message, detail, hint)
            }
            Error::RootKey(detail, hint) => (
                ERRCODE_CONFIG_FILE_ERROR,
                "the root key is not available".to_string(),
                detail,
                hint,
            ),
            Error::Provider(detail, hint) => (
                ERRCODE_SYSTEM_ERROR,
                "the root key command failed".to_string(),
                detail,
                hint,
            ),
            Error::UnknownRootKey(id) => (
                ERRCODE_UNDEFINED_OBJECT,
                format!("root key {id} is not known to this database"),
                "Only root keys that it has adopted are retired or marked.".to_string(),
                "SELECT root_id, state FROM rekey.root_keys shows them.".to_string(),
            ),
            Error::Snapshot => entry(
                ERRCODE_T_R_SERIALIZATION_FAILURE,
                "could not serialize access due to a concurrent rotation of the root key",
                "The transaction's snapshot does not see all wrapped keys.".to_string(),
                "Run the transaction again, or at READ COMMITTED.",
            ),
            Error::RefusedType(name, reason) => (
                ERRCODE_INVALID_PARAMETER_VALUE,
                format!("type {name} cannot be sealed or opened to"),
                format!("Reason: {reason}."),
                "Cast the value to text or to a type with a portable text form first.".to_string(),
            ),
            Error::NoCast(from, to) => (
                ERRCODE_DATATYPE_MISMATCH,
                format!("the envelope holds {from}, which does not become {to}"),
                "Only binary-coercible, implicit and assignment casts are applied.".to_string(),
                "Open it as its own type, or with decrypt_col as text, and cast explicitly."
                    .to_string(),
            ),
            Error::UnknownType(name) => (
                ERRCODE_UNDEFINED_OBJECT,
                format!("the envelope holds a value of type {name}, which does not exist here"),
                "The type's name is part of the sealed value.".to_string(),
                "decrypt_col returns its text form without the type.".to_string(),
            ),
            // One that users have made takes the place of this one: see `raise`.
            Error::Foreign { code, what } => (
                Code::from(code),
                format!("the value could not be converted: {what}"),
                "The original message is withheld, since it may quote the value.".to_string(),
                "Check that the value fits the type that was asked for.".to_string(),
            ),
            Error::NotEncodable => entry(
                ERRCODE_CHARACTER_NOT_IN_REPERTOIRE,
                "text cannot be converted between UTF-8 and the database encoding",
                "Text is UTF-8 inside an envelope whatever the database encoding is.".to_string(),
                "Seal bytes that are not text as bytea; open other databases' text as bytea or \
                 in a database whose encoding has these characters.",
            ),
            Error::TooLarge { bytes } => entry(
                ERRCODE_PROGRAM_LIMIT_EXCEEDED,
                "the value is too large",
                format!("The result would have {bytes} bytes; the limit is just under 1 GB."),
                "Split the value.",
            ),
            Error::Random => entry(
                ERRCODE_SYSTEM_ERROR,
                "the operating system gave no random bytes",
                "Keys and nonces come from its generator only.".to_string(),
                "Check the system's generator (getrandom).",
            ),
            Error::Owner(code) => entry(
                code,
                "code of the table's owner failed",
                "An index expression, constraint or trigger raised it; its text may quote values \
                 and is withheld."
                    .to_string(),
                "Run the update by hand as the table's owner to see it.",
            ),
            Error::Cancelled => entry(
                Code::ERRCODE_QUERY_CANCELED,
                "re-encryption was cancelled",
                "What was committed stays; the batch in hand is undone.".to_string(),
                "CALL rekey.reencrypt() goes on where it ended.",
            ),
            Error::NoCatalog => entry(
                ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                "the catalog of pg_rekey is not in this database",
                "Schema rekey or one of its tables is missing.".to_string(),
                "Run CREATE EXTENSION pg_rekey in this database.",
            ),
            Error::Version {
                library,
                catalog,
                catalog_is_newer,
            } => entry(
                ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                "the library of pg_rekey does not fit the catalog of this database",
                format!("The library is version {library}, the catalog version {catalog}."),
                if catalog_is_newer {
                    "Install the newer library and restart the server; without the preload \
                     reconnecting is enough."
                } else {
                    "Run ALTER EXTENSION pg_rekey UPDATE in this database."
                },
            ),
            Error::InUse(slots, keys) => (
                ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                "extension pg_rekey is in use and cannot be dropped".to_string(),
                format!(
                    "Slots that can still open values: {slots}, of keys: {keys}; without them \
                     every sealed value is lost."
                ),
                "Take the values out and shred the keys (rekey.shred_key), or, as a superuser \
                 who means it, SET rekey.allow_drop = on."
                    .to_string(),
            ),
            Error::DirectChange(table) => (
                ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                format!("rekey.{table} is not changed directly"),
                "Its rows change through the functions of schema rekey only, which keep keys, \
                 slots and audit together."
                    .to_string(),
                "\\df rekey.* lists the functions.".to_string(),
            ),
            Error::Internal(message) => (
                ERRCODE_INTERNAL_ERROR,
                message,
                String::new(),
                String::new(),
            ),
        }
    }
}
