//! Envelopes as bytes, by the published format: what an attacker or another tool would do.
//!
//! Knows nothing of the extension's own code. Offsets are those of envelope format 1:
//! magic, suite and flags, slot id (8, big-endian), nonce (24), ciphertext, tag (16).

/// The bytes that an envelope adds to its value.
pub const OVERHEAD: usize = 50;
/// Where the nonce lies.
pub const NONCE: std::ops::Range<usize> = 10..34;

/// Bytes of PostgreSQL's hex text form, `\x…` or bare.
pub fn unhex(text: &str) -> Vec<u8> {
    let digits = text.strip_prefix("\\x").unwrap_or(text);
    assert!(digits.len().is_multiple_of(2), "odd number of hex digits");
    (0..digits.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(&digits[i..i + 2], 16).expect("hex digits"))
        .collect()
}

/// Bare lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A bytea literal.
pub fn literal(bytes: &[u8]) -> String {
    format!("'\\x{}'::bytea", hex(bytes))
}

/// The standard base64 form, padded.
pub fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let group = (0..3).fold(0u32, |g, i| g << 8 | u32::from(*chunk.get(i).unwrap_or(&0)));
        for i in 0..4 {
            if i <= chunk.len() {
                let digit = (group >> (18 - 6 * i)) & 63;
                text.push(char::from(
                    DIGITS[usize::try_from(digit).expect("six bits")],
                ));
            } else {
                text.push('=');
            }
        }
    }
    text
}

/// The slot id in an envelope's header.
pub fn slot_id(envelope: &[u8]) -> u64 {
    u64::from_be_bytes(envelope[2..10].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_follows_rfc_4648() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }

    #[test]
    fn hex_round_trips() {
        assert_eq!(unhex("\\x00ff10"), [0, 255, 16]);
        assert_eq!(hex(&[0, 255, 16]), "00ff10");
    }
}
