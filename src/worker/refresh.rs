//! Stale fingerprints are made again, from the sealed value beside them.
//!
//! Called by src/worker/rewrite.rs for each stale fingerprint of a locked row, acting as the
//! table's owner. The value is opened, normalised as registered, and fingerprinted under the slot
//! that the stored fingerprint names: only if that gives the stored one, the new one takes its
//! place. So a refresh never changes what a row is found by, and tells nothing to whoever can
//! write the columns: neither a foreign envelope nor a made-up fingerprint gets a new one.
//! Invariant: the value is seen by no code but PostgreSQL's, a superuser's or that of a role that
//! may decrypt it.

use pgrx::pg_sys::{Datum, Oid};
use rekey_core::envelope::Envelope;
use rekey_core::keyring::Privilege;

use crate::cache::{self, lookup};
use crate::catalog::read;
use crate::error::{Error, Result};
use crate::ffi::expression::Expression;
use crate::ffi::{session, text};
use crate::registry::{Leaf, LeafColumn};
use crate::typed;

/// How the fingerprints of one column are made, for one batch.
pub struct Refresher {
    /// Place of the sealed column among the leaf's columns.
    sealed_at: Option<usize>,
    /// Names of the keys in the server's encoding.
    key: Vec<u8>,
    sealed_key: Vec<u8>,
    normalise: Option<Expression>,
}

impl Refresher {
    /// None for a column of envelopes. Acting as the table's owner.
    pub fn prepare(leaf: &Leaf, column: &LeafColumn) -> Result<Option<Refresher>> {
        let Some(of) = &column.fingerprint else {
            return Ok(None);
        };
        let is_sealed = |c: &LeafColumn| c.fingerprint.is_none() && c.attnum == of.sealed;
        Ok(Some(Refresher {
            sealed_at: leaf.columns.iter().position(is_sealed),
            key: text::to_server(of.key.as_bytes())?.into_owned(),
            sealed_key: text::to_server(of.sealed_key.as_bytes())?.into_owned(),
            normalise: normaliser(&of.normalise, &of.sealed_key)?,
        }))
    }

    /// The fingerprint that takes the place of `stored`; None when it is the active slot's already.
    /// `values` are those of the leaf's columns, `context_at` gives the contexts that are registered
    /// for them, in UTF-8.
    pub fn renew(
        &self,
        stored: Datum,
        values: &[Option<Datum>],
        context_at: impl Fn(usize) -> Result<Vec<u8>>,
        context: &[u8],
    ) -> Result<Option<Datum>> {
        let sealed = self.sealed_at.and_then(|at| Some((at, values[at]?)));
        let (at, sealed) = sealed.ok_or(Error::NullArgument("the sealed value"))?;
        let envelope = Envelope::parse(text::detoasted(sealed))?;
        let sealed_context = if envelope.header.context_bound {
            context_at(at)?
        } else {
            Vec::new()
        };
        let value = cache::open_unasked(&envelope, &self.sealed_key, &sealed_context)?;
        let value = typed::text_form(envelope.header.kind, value)?;
        let normal = match &self.normalise {
            Some(expression) => expression.evaluate_over(value)?,
            None => Some(text::to_utf8(text::detoasted(value))?.into_owned()),
        };
        let normal = normal.ok_or(Error::NullArgument("the normalised value"))?;
        let stored = text::detoasted(stored);
        let fresh = lookup::renew(stored, &self.key, context, &normal)?;
        fresh.map(|fresh| text::bytes_datum(&fresh)).transpose()
    }
}

/// Prepares the expression that normalises values; None for none. Acting as the table's owner, with
/// its functions looked up under the pinned search path. The owner need not be able to decrypt:
/// what sees the value must not be his code then.
pub fn normaliser(expression: &str, sealed_key: &str) -> Result<Option<Expression>> {
    if expression.is_empty() {
        return Ok(None);
    }
    let sealed_key = text::to_server(sealed_key.as_bytes())?;
    let trusted = |owner: Oid| {
        Ok(session::is_superuser(owner)
            || read::privileges(&sealed_key, owner)?.implies(Privilege::Decrypt))
    };
    Expression::over_value(expression, trusted).map(Some)
}
