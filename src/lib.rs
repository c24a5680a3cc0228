//! pg_rekey: envelope-key rotation for PostgreSQL columns. This file is the map.
//!
//! Imports point one way: api -> lifecycle, cache -> catalog -> ffi; the bytes, the cipher and
//! the states are the pure crate rekey_core (src/core.rs), which needs no server.
//!
//! | module | job |
//! |---|---|
//! | `api` | the SQL functions, by subject |
//! | `lifecycle` | creation, rotation, rollback, end of keys and slots |
//! | `cache` | what a session keeps ready: slots, subkeys, privileges |
//! | `stale` | which envelopes are to be re-encrypted, by their header |
//! | `root_rotation` | rotation, retirement and compromise of root keys |
//! | `transfer` | keys to another database and back |
//! | `standbys` | waiting until they have replayed what was committed |
//! | `worker` | re-encryption of stale rows, and the proof that a slot is unused |
//! | `typed`, `sealing` | values of any type as payloads, payloads as envelopes, and back |
//! | `check` | what is wrong with the set-up, and what to do about it |
//! | `registry` | registered columns as they stand now |
//! | `live` | columns that are being sealed, or opened, while they are in use |
//! | `root_key` | where root keys come from |
//! | `catalog` | the only place that knows our tables |
//! | `guc`, `error` | settings; the one table of errors |
//! | `failpoint` | where tests of debug builds stop or kill the server |
//! | `ffi` | raw PostgreSQL calls, fenced |

use pgrx::prelude::*;

mod api;
mod cache;
mod catalog;
mod check;
mod error;
mod failpoint;
mod ffi;
mod guc;
mod lifecycle;
mod live;
mod registry;
mod root_key;
mod root_rotation;
mod sealing;
mod stale;
mod standbys;
mod transfer;
mod typed;
mod worker;

pgrx::pg_module_magic!(name, version);

extension_sql_file!("../sql/catalog.sql", name = "catalog", bootstrap);
extension_sql_file!(
    "../sql/functions.sql",
    name = "functions",
    requires = ["catalog"]
);
extension_sql_file!("../sql/views.sql", name = "views", requires = ["functions"]);
extension_sql_file!("../sql/guards.sql", name = "guards", requires = ["views"]);
extension_sql_file!(
    "../sql/privileges.sql",
    name = "privileges",
    requires = ["guards"],
    finalize
);

/// Runs when the library is loaded: in the postmaster under shared_preload_libraries, else in
/// the first backend that calls one of our functions.
#[pg_guard]
pub extern "C-unwind" fn _PG_init() {
    guc::init();
    ffi::hooks::init();
    if ffi::session::in_preload() {
        ffi::shared::init();
        ffi::background::register_launcher();
    }
    root_key::init();
}

#[cfg(any(test, feature = "pg_test"))]
#[path = "../pg_test/mod.rs"]
mod tests;

/// What `cargo pgrx test` asks of an extension: how to start its server.
#[cfg(test)]
pub mod pg_test {
    /// Called once, before the first test.
    pub fn setup(_options: Vec<&str>) {}
    /// Settings of the test server. The root key lies outside its data directory: in the folder
    /// that scripts/test.sh makes for it, or in the system's temporary folder.
    #[must_use]
    pub fn postgresql_conf_options() -> Vec<&'static str> {
        let folder = std::env::var_os("REKEY_TEST_KEYS")
            .map_or_else(std::env::temp_dir, std::path::PathBuf::from);
        let file = folder.join(format!("pg_rekey-test-{}.json", std::process::id()));
        let root_key = format!("rekey.root_key_file = '{}'", file.display());
        vec![
            "shared_preload_libraries = 'pg_rekey'",
            Box::leak(root_key.into_boxed_str()),
        ]
    }
}
