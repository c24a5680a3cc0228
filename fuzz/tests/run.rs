//! Runs every fuzz target over the corpus and a bounded number of mutations of it.
//!
//! Run by `cargo test -p rekey-fuzz`; needs no nightly compiler and no libFuzzer. Invariant: a run
//! is a function of its seed, which is printed, so that a failure comes again. `REKEY_FUZZ_SEED` (a
//! number) and `REKEY_FUZZ_ITERATIONS` (per target) change a run; `REKEY_FUZZ_CORPUS` (a folder)
//! also writes the starting corpus there, for libFuzzer.

use std::env;
use std::fs;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;

use rekey_fuzz::{TARGETS, Target};

const SEED: u64 = 0x7067_5f72_656b_6579;
/// A few seconds for all targets together without optimisation.
const ITERATIONS: u64 = 50_000;
/// Mutants may outgrow the corpus, within a bound: time goes to many inputs, not to long ones.
const MAX_LEN: usize = 4096;

#[test]
fn header() {
    run("header");
}

#[test]
fn opening() {
    run("opening");
}

#[test]
fn wrapped_key() {
    run("wrapped_key");
}

#[test]
fn keyring_file() {
    run("keyring_file");
}

#[test]
fn exported_key() {
    run("exported_key");
}

fn run(name: &str) {
    let target = TARGETS
        .iter()
        .find(|target| target.name == name)
        .expect("a target");
    let seed = setting("REKEY_FUZZ_SEED", SEED);
    let iterations = setting("REKEY_FUZZ_ITERATIONS", ITERATIONS);
    println!("{name}: REKEY_FUZZ_SEED={seed} REKEY_FUZZ_ITERATIONS={iterations}");
    let corpus = (target.corpus)();
    assert!(corpus.len() >= 4, "the vectors are the corpus");
    if let Some(folder) = env::var_os("REKEY_FUZZ_CORPUS") {
        write_corpus(&Path::new(&folder).join(name), &corpus);
    }
    for input in &corpus {
        attempt(target, input);
    }
    let mut random = Random(seed);
    for _ in 0..iterations {
        attempt(target, &mutant(&corpus, target.dictionary, &mut random));
    }
}

fn attempt(target: &Target, input: &[u8]) {
    let result = panic::catch_unwind(AssertUnwindSafe(|| (target.run)(input)));
    if let Err(panic) = result {
        let digits: String = input.iter().map(|byte| format!("{byte:02x}")).collect();
        eprintln!("{}: the failing input in hex is {digits}", target.name);
        panic::resume_unwind(panic);
    }
}

/// An input of the corpus, changed in one to four places.
fn mutant(corpus: &[Vec<u8>], dictionary: &[&[u8]], random: &mut Random) -> Vec<u8> {
    let mut input = random.pick(corpus).clone();
    for _ in 0..=random.below(4) {
        let at = random.below(input.len() + 1);
        let len = random.below(input.len() - at + 1);
        match random.below(9) {
            0 if at < input.len() => input[at] ^= 1 << random.below(8),
            1 if at < input.len() => input[at] = random.byte(),
            2 if at < input.len() => input[at] = *random.pick(&[0x00, 0x01, 0x7F, 0x80, 0xFF]),
            3 => input.insert(at, random.byte()),
            4 => drop(input.drain(at..at + len)),
            5 => input.truncate(at),
            6 => {
                let repeated = input[at..at + len].to_vec();
                input.splice(at..at, repeated);
            }
            7 if !dictionary.is_empty() => {
                let word = random.pick(dictionary).iter().copied();
                input.splice(at..at, word);
            }
            _ => {
                let other = random.pick(corpus);
                let from = random.below(other.len() + 1);
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
        }
        input.truncate(MAX_LEN);
    }
    input
}

/// SplitMix64: small, seeded, good enough to choose mutations.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn byte(&mut self) -> u8 {
        self.next().to_be_bytes()[0]
    }

    /// A number below `bound`, which is not 0.
    fn below(&mut self, bound: usize) -> usize {
        let bound = u64::try_from(bound).expect("64 bits");
        usize::try_from(self.next() % bound).expect("below a usize")
    }

    fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }
}

fn setting(name: &str, default: u64) -> u64 {
    match env::var(name) {
        Ok(value) => value
            .parse()
            .unwrap_or_else(|_| panic!("{name} is a number")),
        Err(_) => default,
    }
}

fn write_corpus(folder: &Path, corpus: &[Vec<u8>]) {
    fs::create_dir_all(folder).expect("the folder can be made");
    for (number, input) in corpus.iter().enumerate() {
        fs::write(folder.join(format!("{number:03}")), input).expect("the folder is writable");
    }
}
