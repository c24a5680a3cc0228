//! The data that PostgreSQL passes to a trigger function, as far as ours need it.
//!
//! Called by src/api/triggers.rs, touch.rs, live.rs and views.rs, for statement and row triggers
//! alike.

use std::ffi::c_int;

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

    /// The table that changes, open.
    pub fn relation(&self) -> pg_sys::Relation {
        // SAFETY: as above.
        unsafe { (*self.0).tg_relation }
    }

    /// The owner of the table.
    pub fn table_owner(&self) -> pg_sys::Oid {
        // SAFETY: as above.
        unsafe { (*(*(*self.0).tg_relation).rd_rel).relowner }
    }

    /// The trigger's name.
    pub fn name(&self) -> String {
        // SAFETY: the trigger is that of the live call; its name is a C string.
        unsafe { super::text::c_string((*(*self.0).tg_trigger).tgname) }
    }

    /// Whether it fires before a row is inserted or updated.
    pub fn is_before_store(&self) -> bool {
        // SAFETY: the trigger data is live.
        let event = unsafe { (*self.0).tg_event };
        event & pg_sys::TRIGGER_EVENT_ROW != 0
            && event & pg_sys::TRIGGER_EVENT_TIMINGMASK == pg_sys::TRIGGER_EVENT_BEFORE
            && (self.is_update()
                || event & pg_sys::TRIGGER_EVENT_OPMASK == pg_sys::TRIGGER_EVENT_INSERT)
    }

    /// Whether it stands in the place of a change of a view's row.
    pub fn is_instead(&self) -> bool {
        // SAFETY: the trigger data is live.
        let event = unsafe { (*self.0).tg_event };
        event & pg_sys::TRIGGER_EVENT_ROW != 0
            && event & pg_sys::TRIGGER_EVENT_TIMINGMASK == pg_sys::TRIGGER_EVENT_INSTEAD
    }

    /// Whether a DELETE fires it.
    pub fn is_delete(&self) -> bool {
        // SAFETY: the trigger data is live.
        let event = unsafe { (*self.0).tg_event };
        event & pg_sys::TRIGGER_EVENT_OPMASK == pg_sys::TRIGGER_EVENT_DELETE
    }

    /// The arguments of CREATE TRIGGER, in UTF-8.
    pub fn arguments(&self) -> crate::error::Result<Vec<String>> {
        // SAFETY: the trigger is that of the live call; tgargs holds tgnargs C strings.
        unsafe {
            let trigger = &*(*self.0).tg_trigger;
            (0..usize::try_from(trigger.tgnargs).unwrap_or(0))
                .map(|at| std::ffi::CStr::from_ptr(*trigger.tgargs.add(at)).to_bytes())
                .map(super::text::to_utf8_string)
                .collect()
        }
    }

    /// Whether an UPDATE fires it.
    pub fn is_update(&self) -> bool {
        // SAFETY: the trigger data is live.
        let event = unsafe { (*self.0).tg_event };
        event & pg_sys::TRIGGER_EVENT_OPMASK == pg_sys::TRIGGER_EVENT_UPDATE
    }

    /// Whether the trigger was made for INSERT too.
    pub fn serves_inserts(&self) -> bool {
        // SAFETY: the trigger is that of the live call.
        let kind = unsafe { (*(*self.0).tg_trigger).tgtype };
        u32::from(kind.unsigned_abs()) & pg_sys::TRIGGER_TYPE_INSERT != 0
    }

    /// The row as it is to be stored. Of a row trigger.
    pub fn new_row(&self) -> *mut pg_sys::TupleTableSlot {
        // SAFETY: ExecBRInsertTriggers passes the one row in tg_trigslot, ExecBRUpdateTriggers the
        // new one in tg_newslot.
        unsafe {
            if self.is_update() {
                (*self.0).tg_newslot
            } else {
                (*self.0).tg_trigslot
            }
        }
    }

    /// The row as it was, for an UPDATE or a DELETE. Of a row trigger.
    pub fn old_row(&self) -> Option<*mut pg_sys::TupleTableSlot> {
        // SAFETY: as in `new_row`; ExecIRDeleteTriggers passes the one row in tg_trigslot.
        (self.is_update() || self.is_delete()).then(|| unsafe { (*self.0).tg_trigslot })
    }

    /// Lets the row be stored with other values in some columns, None for NULL. Of a row trigger
    /// before a store, or in the place of a change of a view.
    pub fn store_with(&self, changes: &[(i16, Option<pg_sys::Datum>)]) -> Reply {
        let mut columns: Vec<c_int> = changes.iter().map(|(at, _)| c_int::from(*at)).collect();
        let value = |change: &(i16, Option<_>)| change.1.unwrap_or(pg_sys::Datum::null());
        let mut values: Vec<pg_sys::Datum> = changes.iter().map(value).collect();
        let mut nulls: Vec<bool> = changes.iter().map(|(_, value)| value.is_none()).collect();
        // SAFETY: the tuple is of the relation's descriptor; the three lists are of one length, and
        // each value is of its column's type. The result is a fresh tuple.
        unsafe {
            let tuple = if self.is_update() {
                (*self.0).tg_newtuple
            } else {
                (*self.0).tg_trigtuple
            };
            if changes.is_empty() {
                return Reply::datum(pg_sys::Datum::from(tuple));
            }
            Reply::datum(pg_sys::Datum::from(pg_sys::heap_modify_tuple_by_cols(
                tuple,
                (*(*self.0).tg_relation).rd_att,
                c_int::try_from(changes.len()).unwrap_or(0),
                columns.as_mut_ptr(),
                values.as_mut_ptr(),
                nulls.as_mut_ptr(),
            )))
        }
    }

    /// Leaves the row out: it counts as not changed. Of a row trigger.
    pub fn leave_out(&self) -> Reply {
        Reply::datum(pg_sys::Datum::null())
    }

    /// Lets the change go on.
    pub fn proceed(&self) -> Reply {
        // SAFETY: the tuple is the trigger's own, or NULL in a statement trigger, whose result
        // is not looked at.
        unsafe { Reply::datum(pg_sys::Datum::from((*self.0).tg_trigtuple)) }
    }
}
