//! The arithmetic of explain_rotation: scaling, WAL, time, figures for people, the sample's places.

use proptest::prelude::*;
use rekey_core::forecast::{Sample, Writing, count, duration, percent, seconds, size, spread};
use rekey_core::schedule::{Brake, Limits};

const SAMPLE: Sample = Sample {
    blocks: 10_000,
    read: 1000,
    rows: 50_000,
    ours: 25_000,
    bytes: 2_500_000,
    out_of_line: 0,
};
const WRITING: Writing = Writing {
    indexes: 1,
    hot: 0.0,
    old_rows: false,
    full_pages: true,
};
const LIMITS: Limits = Limits {
    work_ratio: 0.2,
    wal_rate: Some(16 << 20),
    lag_ms: None,
    dead_ratio: None,
    free_disk_mb: None,
};

#[test]
fn a_sample_is_scaled_to_the_table_and_a_whole_table_is_not() {
    assert!(!SAMPLE.is_exact());
    assert_eq!(SAMPLE.whole(SAMPLE.ours), 250_000);
    let all = Sample {
        read: 10_000,
        ..SAMPLE
    };
    assert!(all.is_exact());
    assert_eq!(all.whole(all.ours), 25_000);
    let none = Sample::default();
    assert!(none.is_exact(), "an empty table");
    assert_eq!(none.wal(&WRITING), 0);
}

#[test]
fn the_wal_of_the_measured_table_is_that_of_the_benchmark() {
    // 1,000,000 rows of 150 bytes with one index: 562 bytes a row.
    let measured = Sample {
        blocks: 18_868,
        read: 18_868,
        rows: 1_000_000,
        ours: 1_000_000,
        bytes: 114_000_000,
        out_of_line: 0,
    };
    let wal = measured.wal(&WRITING) / 1_000_000;
    assert!((500..700).contains(&wal), "{wal}");
}

#[test]
fn what_makes_more_wal_counts() {
    let plain = SAMPLE.wal(&WRITING);
    let hot = Writing {
        hot: 1.0,
        ..WRITING
    };
    let full = Writing {
        old_rows: true,
        ..WRITING
    };
    let no_pages = Writing {
        full_pages: false,
        ..WRITING
    };
    let toasted = Sample {
        out_of_line: 1_000_000,
        ..SAMPLE
    };
    assert_eq!(plain - SAMPLE.wal(&hot), 250_000 * 80);
    assert!(SAMPLE.wal(&full) > plain);
    assert_eq!(plain - SAMPLE.wal(&no_pages), 10_000 * 8192);
    assert_eq!(toasted.wal(&WRITING) - plain, 24_000_000);
}

#[test]
fn the_slower_of_two_settings_sets_the_time() {
    let (by_ratio, brake) = seconds(10.0, 0, &LIMITS);
    assert_eq!((by_ratio, brake), (50.0, Some(Brake::WorkRatio)));
    let (by_wal, brake) = seconds(10.0, 16 << 30, &LIMITS);
    assert_eq!((by_wal, brake), (1024.0, Some(Brake::WalRate)));
    let free = Limits {
        work_ratio: 1.0,
        wal_rate: None,
        ..LIMITS
    };
    assert_eq!(seconds(10.0, 16 << 30, &free), (10.0, None));
}

#[test]
fn figures_are_for_people() {
    assert_eq!(count(0), "0");
    assert_eq!(count(999), "999");
    assert_eq!(count(1_234_567), "1,234,567");
    assert_eq!(size(9999), "9999 bytes");
    assert_eq!(size(10_240), "10 kB");
    assert_eq!(size(5 << 30), "5120 MB");
    assert_eq!(size(u64::MAX), "16777216 TB");
    assert_eq!(duration(0.2), "1 s");
    assert_eq!(duration(75.0), "1 min 15 s");
    assert_eq!(duration(7300.0), "2 h 1 min");
    assert_eq!(duration(200_000.0), "2 d 7 h");
    assert_eq!(percent(0.25), "25 %");
}

proptest! {
    #[test]
    fn the_places_of_a_sample_are_in_order_apart_and_within_the_table(
        blocks in 0u32.., most in 10u32..5000, seed: u64,
    ) {
        let ranges = spread(blocks, most, 10, seed);
        let mut end = 0;
        let mut sum = 0;
        for range in &ranges {
            prop_assert!(range.start >= end && range.end <= blocks);
            sum += range.end - range.start;
            end = range.end;
        }
        prop_assert!(sum <= most);
        prop_assert!(blocks > most || sum == blocks);
        prop_assert!(blocks <= most || sum > most / 2);
    }
}
