//! The pure core of pg_rekey: envelope bytes, the cipher, slot states and the keyring file.
//!
//! The extension (cache, catalog, worker) calls it; nothing here knows PostgreSQL, so all of it is
//! tested, fuzzed and measured without a server. Invariants: no unsafe code, no I/O but the
//! system's random generator, no secret in a type that can be printed, copied or compared by
//! accident.
//! Imports point one way: `root_keyring`, `exported_key` -> `cipher` -> `envelope`; `keyring`
//! stands alone.

#![forbid(unsafe_code)]

pub mod cipher;
pub mod envelope;
pub mod exported_key;
pub mod forecast;
pub mod keyring;
pub mod root_keyring;
pub mod schedule;

mod hex;
mod random;
mod stored_key;
mod xaes;
