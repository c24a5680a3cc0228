//! A payload into an envelope and back, each in one allocation.
//!
//! Called by encrypt_col and decrypt_col and by live columns, for the current user, whose
//! privilege on the key src/cache.rs asks for.

use pgrx::pg_sys;
use rekey_core::envelope::{CIPHERTEXT_AT, Envelope, HEADER_LEN, Kind, OVERHEAD, SALT_LEN};

use crate::cache::{self, Sealer};
use crate::error::Result;
use crate::ffi::text::Varlena;

/// Seals prefix and body under the active slot of the key (in the server's encoding); an empty
/// context binds nothing.
#[inline]
pub fn seal(
    key: &[u8],
    context: &[u8],
    kind: Kind,
    prefix: &[u8],
    body: &[u8],
) -> Result<pg_sys::Datum> {
    let len = prefix.len() + body.len();
    let mut envelope = Varlena::allocate(OVERHEAD + len)?;
    let bytes = envelope.data();
    bytes[CIPHERTEXT_AT..CIPHERTEXT_AT + prefix.len()].copy_from_slice(prefix);
    bytes[CIPHERTEXT_AT + prefix.len()..CIPHERTEXT_AT + len].copy_from_slice(body);
    cache::seal(key, kind, !context.is_empty(), len, |sealer| {
        let Sealer {
            header,
            salt,
            counter,
            subkey,
        } = sealer;
        let header = header.to_bytes();
        bytes[..HEADER_LEN].copy_from_slice(&header);
        bytes[HEADER_LEN..HEADER_LEN + SALT_LEN].copy_from_slice(&salt);
        bytes[HEADER_LEN + SALT_LEN..CIPHERTEXT_AT].copy_from_slice(&counter);
        let payload = &mut bytes[CIPHERTEXT_AT..CIPHERTEXT_AT + len];
        let tag = subkey.seal_in_place(&counter, &header, context, payload);
        bytes[CIPHERTEXT_AT + len..].copy_from_slice(&tag);
    })?;
    Ok(envelope.finish())
}

/// Opens the envelope into a varlena of its own. The payload stays there.
#[inline]
pub fn open(envelope: &Envelope<'_>, context: &[u8]) -> Result<Varlena> {
    let mut value = Varlena::allocate(envelope.ciphertext.len())?;
    value.data().copy_from_slice(envelope.ciphertext);
    let header = envelope.header_bytes;
    cache::open(envelope, context, |subkey| {
        subkey.open_in_place(
            envelope.counter,
            header,
            context,
            value.data(),
            envelope.tag,
        )
    })?;
    Ok(value)
}
