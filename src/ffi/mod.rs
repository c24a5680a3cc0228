//! Raw PostgreSQL calls that pgrx lacks or that the hot path cannot afford through it.
//!
//! Every `unsafe` of the extension lives under this folder, behind safe functions that state
//! what they rely on; the other modules call those. By subject: function calls, text and
//! bytea (`call`, `text`), catalog scans (`scan`), session state (`session`), callbacks and
//! hooks (`hooks`), types and their text form (`types`), SQL as the extension (`sql`), other
//! programs (`command`).
//! One rule holds throughout: nothing here keeps a borrow across a call that may raise.

pub mod call;
pub mod command;
pub mod hooks;
pub mod scan;
pub mod session;
pub mod sql;
pub mod text;
pub mod trigger;
pub mod types;
