//! The harness of the black-box tests: throwaway PostgreSQL servers and plain questions in SQL.
//!
//! `cluster` starts, stops, crashes and copies servers; `sql` puts questions to them and judges
//! refusals; `provider` has their root keys come from elsewhere; `page` runs the pages of docs/;
//! `bytes` builds and takes apart envelopes by the published format. The tests in `tests/*.rs` know
//! the extension only by its SQL surface. A test binary starts a server on first use and shares it
//! among its tests, each in a database of its own.
//! No test sleeps to synchronise: [`wait_until`] polls with a deadline.
//!
//! Environment: `REKEY_PG_BIN` is the folder of the server's programs (default: Debian's
//! PostgreSQL 15), `REKEY_WORK` the work folder, `REKEY_LONG=1` asks for the long runs,
//! `REKEY_KEEP=1` leaves the clusters' folders in place.

pub mod bytes;
pub mod cluster;
pub mod page;
pub mod provider;
pub mod sql;

use std::thread::sleep;
use std::time::{Duration, Instant};

pub use cluster::{BOUNDARIES, Cluster, Database, GATE, Options, Tree};
pub use page::Page;
pub use sql::{Ask, Refusal};

/// How long a poll may take before a test fails. Generous: a loaded machine is not a bug.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Polls `done` until it returns true; panics with `what` after [`PATIENCE`].
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "gave up waiting until {what}");
        sleep(Duration::from_millis(10));
    }
}

/// Whether the long runs are asked for.
pub fn long_runs() -> bool {
    std::env::var_os("REKEY_LONG").is_some_and(|value| value == "1")
}
