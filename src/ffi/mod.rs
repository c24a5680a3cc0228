//! Raw PostgreSQL calls that pgrx lacks or that the hot path cannot afford through it.
//!
//! Every `unsafe` of the extension lives under this folder, behind safe functions that state
//! what they rely on; the other modules call those. By subject: function calls, text and
//! bytea (`call`, `text`), catalog scans (`scan`), session state (`session`), callbacks and
//! hooks (`hooks`), types and their text form (`types`), SQL as the extension (`sql`), users'
//! tables (`table`), work that may fail (`subtransaction`), who holds what (`locks`),
//! other programs (`command`).
//! One rule holds throughout: nothing here keeps a borrow across a call that may raise.

pub mod background;
pub mod call;
pub mod command;
pub mod expression;
pub mod hooks;
pub mod locks;
pub mod relation;
pub mod scan;
pub mod session;
pub mod shared;
pub mod sql;
pub mod statement;
pub mod subtransaction;
pub mod table;
pub mod text;
pub mod timer;
pub mod trigger;
pub mod types;
pub mod view;
