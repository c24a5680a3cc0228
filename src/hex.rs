//! Lower-case hexadecimal, strict: what root ids and the keyring file are written in.
//!
//! Called by `stored_key` and `root_keyring`. Invariant: one text per byte string (no upper case,
//! no spaces, exact length), decoded in place so that a secret has no intermediate copy.

/// Writes the bytes of `text` into `out`. None unless `text` is exactly `2 * out.len()` lower-case
/// hex digits; `out` may then be partly written.
pub(crate) fn decode(text: &str, out: &mut [u8]) -> Option<()> {
    let digits = text.as_bytes();
    if digits.len() != 2 * out.len() {
        return None;
    }
    for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(())
}

/// Appends `bytes` to `out`, two digits a byte.
pub(crate) fn push(out: &mut String, bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for byte in bytes {
        out.push(char::from(DIGITS[usize::from(byte >> 4)]));
        out.push(char::from(DIGITS[usize::from(byte & 0x0f)]));
    }
}

fn digit(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    }
}
