//! The data that PostgreSQL passes to a trigger function, as far as ours need it.
//!
//! Called by src/api/triggers.rs, for statement and row triggers alike.

use pgrx::pg_sys;

use super::call::{Call, Reply};

/// One firing of a trigger.
pub struct TriggerCall(*mut pg_sys::TriggerData);

impl TriggerCall {
    /// The trigger data of a call, or None when the function was not called as a trigger.
    pub fn of(call: &Call) -> Option<TriggerCall> {
        let context = call.context();
        // SAFETY: context is NULL or a node; only a TriggerData is taken for one.
        unsafe {
            (!context.is_null() && (*context).type_ == pg_sys::NodeTag::T_TriggerData)
                .then(|| TriggerCall(context.cast()))
        }
    }

    /// The table that changes.
    pub fn table(&self) -> pg_sys::Oid {
        // SAFETY: the relation is open while the trigger runs.
        unsafe { (*(*self.0).tg_relation).rd_id }
    }

    /// The table's name.
    pub fn table_name(&self) -> String {
        // SAFETY: as above; relname is a NUL-terminated name.
        unsafe {
            let name = &(*(*(*self.0).tg_relation).rd_rel).relname;
            super::text::c_string(name.data.as_ptr())
        }
    }

    /// Lets the change go on.
    pub fn proceed(&self) -> Reply {
        // SAFETY: the tuple is the trigger's own, or NULL in a statement trigger, whose result
        // is not looked at.
        unsafe { Reply::datum(pg_sys::Datum::from((*self.0).tg_trigtuple)) }
    }
}
