//! The trigger functions of the catalog: refuse_direct_change, announce_change, guard_drop.
//! They decide nothing themselves: see src/catalog/guard.rs.

use pgrx::pg_sys::FunctionCallInfo;
use pgrx::prelude::*;

use crate::catalog::guard;
use crate::error::Error;
use crate::ffi::call::{Reply, reply};
use crate::ffi::trigger::TriggerCall;
use crate::ffi::{hooks, session};

#[pg_extern(sql = false)]
fn refuse_direct_change(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        let trigger = TriggerCall::of(&call).ok_or_else(not_a_trigger)?;
        guard::before_change(&trigger.table_name())?;
        Ok(trigger.proceed())
    })
}

#[pg_extern(sql = false)]
fn announce_change(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        let trigger = TriggerCall::of(&call).ok_or_else(not_a_trigger)?;
        hooks::announce(trigger.table());
        // For `locks::wait_for_end`, whatever writes the row.
        if trigger.table_name() == "key_slot" {
            session::keep_xid_locked();
        }
        // Restores and logical apply come this way too. Grants and wraps are no work.
        if matches!(trigger.table_name().as_str(), "key" | "key_slot") {
            hooks::wake_on_commit();
        }
        Ok(trigger.proceed())
    })
}

/// Being called has loaded the library: from here on its object access hook guards the drop.
#[pg_extern(sql = false)]
fn guard_drop(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |_| Ok(Reply::void()))
}

fn not_a_trigger() -> Error {
    Error::Internal("called outside a trigger".to_string())
}
