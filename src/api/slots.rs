//! Single slots: disable_slot, enable_slot, destroy_slot, mark_compromised, restore_slot.

use std::time::Duration;

use pgrx::pg_sys::FunctionCallInfo;
use pgrx::prelude::*;
use rekey_core::keyring::{Privilege, SlotState};

use super::grants::claim;
use super::root_keys::root_id;
use crate::catalog::read::SlotRow;
use crate::catalog::write;
use crate::error::{Error, Result};
use crate::ffi::call::{Call, Reply, reply};
use crate::ffi::session;
use crate::worker::ending::{self, Candidate};
use crate::{lifecycle, registry};

/// The slot of the first argument, which the caller may manage, its key locked.
fn managed_slot(call: &Call) -> Result<SlotRow> {
    let id = call.required_i64(0, "slot_id")?;
    claim(&lifecycle::slot(id)?.key_name, Privilege::Manage)?;
    lifecycle::slot(id)
}

/// Force is for superusers: it can lose data.
fn forced(call: &Call) -> Result<bool> {
    let force = call.required_bool(1, "force")?;
    if force && !session::is_superuser(session::current_user()) {
        return Err(Error::Privilege(
            "force is for superusers".to_string(),
            "It skips the proof that nothing is sealed under the slot any more.".to_string(),
            "Without force the slot must be proved unused first.".to_string(),
        ));
    }
    Ok(force)
}

fn repeated(slot: &SlotRow) -> Error {
    Error::State(
        format!("slot {} is already {}", slot.id, slot.state),
        format!(
            "It is version {} of key \"{}\".",
            slot.version, slot.key_name
        ),
        "Nothing is left to do.".to_string(),
    )
}

fn in_service(slot: &SlotRow) -> Error {
    Error::State(
        format!("slot {} is {}", slot.id, slot.state),
        format!(
            "Values are, or will be, sealed under it for key \"{}\".",
            slot.key_name
        ),
        "Rotate first (rotate_key); to end the key itself use rekey.shred_key.".to_string(),
    )
}

fn not_proved(slot: &SlotRow) -> Error {
    Error::State(
        format!("slot {} is not drained", slot.id),
        format!(
            "It is {}: there is no proof that nothing is sealed under it any more.",
            slot.state
        ),
        "Re-encrypt the values first; a superuser may pass force => true and lose what is left."
            .to_string(),
    )
}

/// Grace, quarantine, horizon and the second scan: 55000 says what stands in the way.
fn prove_again(slot: &SlotRow, destroy: bool) -> Result<()> {
    let (leaves, troubles) = registry::leaves()?;
    let mut why = troubles
        .first()
        .map(|trouble| format!("{}: {}", trouble.table, trouble.what));
    if why.is_none() {
        let slot = slot.clone();
        let candidates = [Candidate { slot, destroy }];
        why = ending::may_go(&candidates, &leaves, None, Duration::from_secs(2))?
            .into_iter()
            .next()
            .flatten()
            .map(|obstacle| obstacle.why);
    }
    match why {
        None => Ok(()),
        Some(why) => Err(Error::State(
            format!("slot {} cannot go yet", slot.id),
            format!("{}{}.", why[..1].to_uppercase(), &why[1..]),
            "Try again later, or CALL rekey.reencrypt() for what is sealed under it; a superuser \
             may pass force => true and lose what is left."
                .to_string(),
        )),
    }
}

#[pg_extern(sql = false)]
fn disable_slot(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"disable_slot()");
        let force = forced(&call)?;
        let slot = managed_slot(&call)?;
        match slot.state {
            SlotState::Pending | SlotState::Active => return Err(in_service(&slot)),
            SlotState::Disabled | SlotState::Destroyed => return Err(repeated(&slot)),
            SlotState::Previous | SlotState::Drained if force => {}
            SlotState::Previous => return Err(not_proved(&slot)),
            SlotState::Drained => prove_again(&slot, false)?,
        }
        let reason = if force { "forced" } else { "" };
        write::transition(&slot, SlotState::Disabled, "disable_slot", reason)?;
        Ok(Reply::void())
    })
}

#[pg_extern(sql = false)]
fn enable_slot(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"enable_slot()");
        let slot = managed_slot(&call)?;
        if slot.state != SlotState::Disabled {
            return Err(Error::State(
                format!("slot {} is not disabled", slot.id),
                format!("It is {}.", slot.state),
                "Only a disabled slot is enabled.".to_string(),
            ));
        }
        let to = if slot.proved {
            SlotState::Drained
        } else {
            SlotState::Previous
        };
        lifecycle::unwrap(&slot)?;
        write::transition(&slot, to, "enable_slot", "")?;
        Ok(Reply::void())
    })
}

#[pg_extern(sql = false)]
fn destroy_slot(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"destroy_slot()");
        let force = forced(&call)?;
        let slot = managed_slot(&call)?;
        match slot.state {
            SlotState::Active => return Err(in_service(&slot)),
            SlotState::Destroyed => return Err(repeated(&slot)),
            SlotState::Pending => {}
            _ if force => {}
            SlotState::Drained | SlotState::Disabled if slot.proved => prove_again(&slot, true)?,
            _ => return Err(not_proved(&slot)),
        }
        let reason = if force { "forced" } else { "" };
        write::transition(&slot, SlotState::Destroyed, "destroy_slot", reason)?;
        Ok(Reply::void())
    })
}

#[pg_extern(sql = false)]
fn mark_compromised(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"mark_compromised()");
        let reason = call.required_text(1, "reason")?;
        let slot = managed_slot(&call)?;
        if slot.state == SlotState::Destroyed {
            return Err(repeated(&slot));
        }
        if slot.compromised {
            return Err(Error::State(
                format!("slot {} is marked as compromised already", slot.id),
                format!(
                    "It is version {} of key \"{}\".",
                    slot.version, slot.key_name
                ),
                "Nothing is left to do but to re-encrypt what it sealed.".to_string(),
            ));
        }
        lifecycle::mark_compromised(&slot, &reason)?;
        Ok(Reply::void())
    })
}

/// Asks no key privilege: EXECUTE on it is the privilege, which only a superuser has by default.
#[pg_extern(sql = false)]
fn restore_slot(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"restore_slot()");
        let id = call.required_i64(0, "slot_id")?;
        let wrapped = call.bytes(1).ok_or(Error::NullArgument("wrapped_key"))?;
        let root = root_id(&call.required_text(2, "root_id")?)?;
        let reason = call.required_text(3, "reason")?;
        lifecycle::lock(&lifecycle::slot(id)?.key_name)?;
        let slot = lifecycle::slot(id)?;
        if slot.state != SlotState::Destroyed {
            return Err(Error::State(
                format!("slot {} is {}", slot.id, slot.state),
                "Only a destroyed slot is restored.".to_string(),
                "Nothing is missing: rekey.slots shows the slot.".to_string(),
            ));
        }
        lifecycle::restore(&slot, wrapped, root, &reason)?;
        Ok(Reply::void())
    })
}
