//! Typed payloads (kind 2): a value's type name and text form, and back to a value.
//!
//! Called by encrypt_col(anyelement), decrypt_col_as and live columns. What is looked up of a type
//! lives in the memory context in which it was first asked for. Invariant: text is always kind 0
//! and bytea kind 1, whichever overload they came by, and a domain is sealed as its base type.

use std::borrow::Cow;
use std::cell::RefCell;
use std::ffi::CString;

use pgrx::pg_sys;
use rekey_core::envelope::{Kind, split_typed, typed_prefix};

use crate::error::{Error, Result};
use crate::ffi::call::Memory;
use crate::ffi::text::{self, Varlena};
use crate::ffi::types::{self, Cast, Function};

/// How values of one type are sealed.
pub enum Sealable {
    /// As text or bytea: the bytes as they are.
    Plain(Kind),
    /// As a typed payload.
    Typed {
        /// Length and name of the type, the beginning of every payload.
        prefix: Vec<u8>,
        /// Its output function.
        output: Function,
    },
}

impl Sealable {
    /// Looks a type up; 22023 for one that cannot be sealed.
    pub fn of(type_oid: pg_sys::Oid) -> Result<Sealable> {
        let base = types::base_type(type_oid);
        match base {
            pg_sys::TEXTOID => return Ok(Sealable::Plain(Kind::Text)),
            pg_sys::BYTEAOID => return Ok(Sealable::Plain(Kind::Bytea)),
            _ => {}
        }
        if let Some(reason) = types::refusal(type_oid) {
            return Err(Error::RefusedType(types::display_name(type_oid), reason));
        }
        let name = types::sealed_name(base);
        let prefix = typed_prefix(&name).ok_or(Error::RefusedType(name, "its name is too long"))?;
        let output = Function::output_of(base);
        Ok(Sealable::Typed { prefix, output })
    }

    /// What is sealed of a value.
    #[inline]
    pub fn payload(&self, value: pg_sys::Datum) -> Result<Payload<'_>> {
        Ok(match self {
            Sealable::Plain(Kind::Text) => {
                (Kind::Text, &[], text::to_utf8(text::detoasted(value))?)
            }
            Sealable::Plain(kind) => (*kind, &[], Cow::Borrowed(text::detoasted(value))),
            Sealable::Typed { prefix, output } => {
                let form = output.output(value)?.to_bytes();
                (Kind::Typed, prefix, text::to_utf8(form)?)
            }
        })
    }
}

/// What is sealed of a value: the kind, the prefix, and the body, in UTF-8 where it is text.
pub type Payload<'a> = (Kind, &'a [u8], Cow<'static, [u8]>);

/// The text form of an opened payload, whatever its kind.
pub fn text_form(kind: Kind, mut value: Varlena) -> Result<pg_sys::Datum> {
    match kind {
        Kind::Text if text::server_is_utf8() => Ok(value.finish()),
        Kind::Text => text::bytes_datum(&text::to_server(value.data())?),
        Kind::Bytea => text::bytes_datum(&hex(value.data())),
        Kind::Typed => {
            let (_, form) = split_typed(value.data())?;
            text::bytes_datum(&text::to_server(form)?)
        }
    }
}

/// What decrypt_col_as returns at one call site.
pub struct Target {
    type_oid: pg_sys::Oid,
    base: pg_sys::Oid,
    home: Memory,
    source: RefCell<Option<Source>>,
}

/// How values sealed as one type become the target's.
struct Source {
    sealed_name: Vec<u8>,
    conversion: Conversion,
}

enum Conversion {
    /// Read by the input function of the sealed type, then cast, if at all.
    Input(Function, Option<Function>),
    /// The text form is the value.
    Text,
    /// The payload's bytes are the value.
    Bytes,
}

impl Target {
    /// Looks the wanted type up; 22023 for one that cannot be.
    pub fn of(type_oid: pg_sys::Oid) -> Result<Target> {
        let base = types::base_type(type_oid);
        if let Some(reason) = types::refusal(type_oid) {
            return Err(Error::RefusedType(types::display_name(type_oid), reason));
        }
        Ok(Target {
            type_oid,
            base,
            home: Memory::current(),
            source: RefCell::new(None),
        })
    }

    /// Whether the payload of a sealed bytea is the value as it stands.
    pub fn is_bytea(&self) -> bool {
        self.type_oid == pg_sys::BYTEAOID
    }

    /// Whether the payload of a sealed text is the value as it stands, in a UTF-8 database.
    pub fn is_text(&self) -> bool {
        self.type_oid == pg_sys::TEXTOID
    }

    /// The value of an opened payload.
    pub fn value(&self, kind: Kind, payload: &[u8]) -> Result<pg_sys::Datum> {
        let (name, body) = match kind {
            Kind::Text => ("text", payload),
            Kind::Bytea => ("bytea", payload),
            Kind::Typed => split_typed(payload)?,
        };
        let mut source = self.source.borrow_mut();
        if source
            .as_ref()
            .is_none_or(|s| s.sealed_name != name.as_bytes())
        {
            let conversion = self.conversion(kind, name)?;
            *source = Some(Source {
                sealed_name: name.as_bytes().to_vec(),
                conversion,
            });
        }
        let Some(Source { conversion, .. }) = source.as_ref() else {
            return Err(Error::Internal("no conversion".to_string()));
        };
        let value = match conversion {
            Conversion::Bytes => text::bytes_datum(body)?,
            Conversion::Text if kind == Kind::Bytea => text::bytes_datum(&hex(body))?,
            Conversion::Text => text::bytes_datum(&text::to_server(body)?)?,
            Conversion::Input(input, cast) => {
                let form = if kind == Kind::Bytea {
                    hex(body)
                } else {
                    text::to_server(body)?.into_owned()
                };
                let form = CString::new(form).map_err(|_| Error::NotEncodable)?;
                let value = input.input_as(&form, -1)?;
                match cast {
                    Some(cast) => cast.apply(value)?,
                    None => value,
                }
            }
        };
        if self.base != self.type_oid {
            types::check_domain(value, self.type_oid)?;
        }
        Ok(value)
    }

    fn conversion(&self, kind: Kind, name: &str) -> Result<Conversion> {
        let sealed = match kind {
            Kind::Text => pg_sys::TEXTOID,
            Kind::Bytea => pg_sys::BYTEAOID,
            Kind::Typed if self.base == pg_sys::TEXTOID => return Ok(Conversion::Text),
            Kind::Typed => types::type_of_sealed_name(name)
                .ok_or_else(|| Error::UnknownType(name.to_string()))?,
        };
        if self.base == pg_sys::TEXTOID {
            return Ok(Conversion::Text);
        }
        if sealed == pg_sys::BYTEAOID && self.base == pg_sys::BYTEAOID {
            return Ok(Conversion::Bytes);
        }
        let input_of = |oid| self.home.within(|| Function::input_of(oid));
        if sealed == self.base {
            return Ok(Conversion::Input(input_of(sealed), None));
        }
        let cast = self
            .home
            .within(|| types::cast_between(sealed, self.base))?;
        match cast {
            Some(Cast::Relabel) => Ok(Conversion::Input(input_of(sealed), None)),
            Some(Cast::By(function)) if sealed != pg_sys::TEXTOID => {
                Ok(Conversion::Input(input_of(sealed), Some(function)))
            }
            Some(Cast::ThroughText) if sealed != pg_sys::TEXTOID => {
                Ok(Conversion::Input(input_of(self.base), None))
            }
            _ => Err(Error::NoCast(
                name.to_string(),
                types::display_name(self.type_oid),
            )),
        }
    }
}

/// The text form of a bytea: `\x` and lower-case hex, whatever bytea_output says.
pub fn hex(bytes: &[u8]) -> Vec<u8> {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = Vec::with_capacity(2 + 2 * bytes.len());
    text.extend_from_slice(b"\\x");
    for byte in bytes {
        text.push(DIGITS[usize::from(byte >> 4)]);
        text.push(DIGITS[usize::from(byte & 15)]);
    }
    text
}
