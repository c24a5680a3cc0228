//! libFuzzer's way into `rekey_fuzz::exported_key`; the properties are there.
//!
//! Run by cargo-fuzz, by hand: see `fuzz/README.md`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| rekey_fuzz::exported_key(data));
