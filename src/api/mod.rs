//! The SQL functions, by subject: a few lines each, over the cache, the life cycle and the
//! catalog. Their SQL declarations and comments are in sql/functions.sql and sql/guards.sql.

mod check;
mod columns;
mod fingerprint;
mod grants;
mod headers;
mod keys;
mod live;
mod open;
mod root_keys;
mod seal;
mod slots;
mod tenants;
mod touch;
mod transfer;
mod triggers;
mod views;
