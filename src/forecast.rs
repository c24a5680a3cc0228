//! What a rotation will cost, from a sample and the settings: pure arithmetic, and figures for
//! people.
//!
//! Called by src/worker/forecast.rs. Estimates err on the high side; the constants say where they
//! are from.

use crate::schedule::{Brake, Limits};

/// Bytes of a block.
pub const BLOCK: u64 = 8192;
/// Rows a second that one pass re-encrypts without pauses: 1,000,000 rows took 5.7 s with the proof
/// (`make bench-reencrypt`, two cores).
const ROWS_PER_SECOND: f64 = 175_000.0;
/// Blocks a second of a scan that finds nothing: 400 MB a second.
const BLOCKS_PER_SECOND: f64 = 50_000.0;
/// WAL of one updated row beside the row itself: locking, pruning, record headers. 562 bytes were
/// measured for rows of 150 bytes with one index, full-page images included.
const WAL_OF_A_ROW: f64 = 200.0;
/// WAL of one new index entry.
const WAL_OF_AN_ENTRY: f64 = 80.0;
/// WAL for each byte that is stored out of line: the new chunks with their index, and the page
/// images of the old ones, which are deleted. 26 MB were measured for 10 MB.
const WAL_OUT_OF_LINE: f64 = 1.1;
const WAL_OF_OLD_CHUNKS: f64 = 1.3;

/// What a sample of a table has found.
#[derive(Clone, Copy, Default, Debug)]
pub struct Sample {
    /// Blocks of the table.
    pub blocks: u64,
    /// Blocks that were read.
    pub read: u64,
    /// Rows in them.
    pub rows: u64,
    /// Rows that hold an envelope of the key.
    pub ours: u64,
    /// Bytes of these envelopes.
    pub bytes: u64,
    /// Of these the ones that are stored out of line.
    pub out_of_line: u64,
}

/// What else the WAL depends on.
#[derive(Clone, Copy, Debug)]
pub struct Writing {
    /// Indexes of the table.
    pub indexes: u32,
    /// Share of the updates that need no index entries, from 0 to 1.
    pub hot: f64,
    /// Whether the old row is logged too (REPLICA IDENTITY FULL).
    pub old_rows: bool,
    /// Whether a page is logged whole at its first change after a checkpoint.
    pub full_pages: bool,
}

#[allow(clippy::cast_precision_loss, reason = "estimates")]
fn float(number: u64) -> f64 {
    number as f64
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "not negative"
)]
fn whole(number: f64) -> u64 {
    number.round().max(0.0) as u64
}

impl Sample {
    /// Whether the whole table was read.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.read >= self.blocks
    }

    /// A figure of the sample for the whole table.
    #[must_use]
    pub fn whole(&self, of_sample: u64) -> u64 {
        if self.is_exact() {
            return of_sample;
        }
        whole(float(of_sample) * float(self.blocks) / float(self.read.max(1)))
    }

    /// WAL that re-encrypting the table writes, in bytes.
    #[must_use]
    pub fn wal(&self, writing: &Writing) -> u64 {
        if self.ours == 0 {
            return 0;
        }
        let rows = float(self.whole(self.ours));
        let row = float(self.read * BLOCK) / float(self.rows.max(1));
        let copies = if writing.old_rows { 2.0 } else { 1.0 };
        let entries = f64::from(writing.indexes) * (1.0 - writing.hot.clamp(0.0, 1.0));
        let old_chunks = if writing.full_pages {
            WAL_OF_OLD_CHUNKS
        } else {
            0.0
        };
        let out_of_line = WAL_OUT_OF_LINE + old_chunks;
        let pages = if writing.full_pages {
            rows.min(float(self.blocks))
        } else {
            0.0
        };
        whole(
            rows * (copies * row + WAL_OF_A_ROW + entries * WAL_OF_AN_ENTRY)
                + float(self.whole(self.out_of_line)) * out_of_line
                + pages * float(BLOCK),
        )
    }

    /// Seconds of work without pauses: the pass, and the scan of the proof.
    #[must_use]
    pub fn work_seconds(&self) -> f64 {
        float(self.whole(self.ours)) / ROWS_PER_SECOND
            + 2.0 * float(self.blocks) / BLOCKS_PER_SECOND
    }
}

/// Seconds that so much work takes at the pace of the settings, and which of them sets it.
#[must_use]
pub fn seconds(work: f64, wal: u64, limits: &Limits) -> (f64, Option<Brake>) {
    let ratio = limits.work_ratio.clamp(0.01, 1.0);
    let by_ratio = work / ratio;
    let by_wal = limits
        .wal_rate
        .map_or(0.0, |rate| float(wal) / float(rate.max(1)));
    if by_wal > by_ratio {
        (by_wal, Some(Brake::WalRate))
    } else {
        (by_ratio, (ratio < 1.0).then_some(Brake::WorkRatio))
    }
}

/// A share of a whole, in per cent.
#[must_use]
pub fn percent(share: f64) -> String {
    format!("{} %", whole(share * 100.0))
}

/// A number with its thousands apart.
#[must_use]
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A number of bytes in the unit that gives it two to four digits.
#[must_use]
pub fn size(bytes: u64) -> String {
    let mut left = bytes;
    let mut unit = "bytes";
    for larger in ["kB", "MB", "GB", "TB"] {
        if left < 10_000 {
            break;
        }
        left = left.div_ceil(1024);
        unit = larger;
    }
    format!("{left} {unit}")
}

/// A span of time in its two largest units.
#[must_use]
pub fn duration(seconds: f64) -> String {
    let s = whole(seconds.ceil());
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        3600..86400 => format!("{} h {} min", s / 3600, s % 3600 / 60),
        _ => format!("{} d {} h", s / 86400, s % 86400 / 3600),
    }
}

/// The ranges of blocks to read of a table of `blocks`, about `most` in all: everything, or pieces
/// of `piece` blocks that are spread over the table, each at a place that `seed` shifts.
#[must_use]
pub fn spread(blocks: u32, most: u32, piece: u32, seed: u64) -> Vec<std::ops::Range<u32>> {
    let (pieces, piece) = if blocks <= most {
        (1, blocks)
    } else {
        ((most / piece).max(1), piece)
    };
    let step = blocks / pieces;
    let mut state = seed;
    let mut shift = || {
        state = state
            .wrapping_mul(0x5851_F42D_4C95_7F2D)
            .wrapping_add(0x1405_7B7E_F767_814F);
        u32::try_from(state >> 33).unwrap_or(0) % (step - piece + 1)
    };
    (0..pieces)
        .map(|at| {
            let first = at * step + shift();
            first..first + piece
        })
        .collect()
}
