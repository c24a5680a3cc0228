//! What the worker does next, from facts and a clock: how large a batch, how long a rest.
//!
//! Called by src/worker/. Pure: no server, no clock of its own.

use std::time::Duration;

/// Blocks and rows of a batch, learnt from how long the last one took. Blocks alone would not do:
/// behind a stretch where nothing is stale they would be many, and full of rows.
#[derive(Clone, Copy, Debug)]
pub struct BatchSize {
    blocks: u32,
    rows: u32,
}

/// 128 MB of 8 kB blocks: what one batch looks at, at most.
pub const MAX_BLOCKS: u32 = 16_384;
/// What one batch re-encrypts, at most.
pub const MAX_ROWS: u32 = 1_000_000;

impl BatchSize {
    /// A first, small batch.
    #[must_use]
    pub fn new() -> BatchSize {
        BatchSize {
            blocks: 16,
            rows: 64,
        }
    }

    /// Blocks that the next batch looks at.
    #[must_use]
    pub fn blocks(self) -> u32 {
        self.blocks
    }

    /// Rows that the next batch re-encrypts.
    #[must_use]
    pub fn rows(self) -> u32 {
        self.rows
    }

    /// Learns from a batch of so many blocks and rows that took `took_ms`: at most twice as large
    /// the next time, and smaller at once. Nothing is learnt of what there was none of.
    pub fn learn(&mut self, blocks: u32, rows: u32, took_ms: u64, target_ms: u64) {
        let next = |last: u32, done: u32, most: u32| {
            let fitting = u64::from(done) * target_ms.max(1) / took_ms.max(1);
            let next = fitting.min(u64::from(last) * 2);
            u32::try_from(next).unwrap_or(most).clamp(1, most)
        };
        if blocks > 0 {
            self.blocks = next(self.blocks, blocks, MAX_BLOCKS);
        }
        if rows > 0 {
            self.rows = next(self.rows, rows, MAX_ROWS);
        }
    }
}

impl Default for BatchSize {
    fn default() -> Self {
        BatchSize::new()
    }
}

/// Rest after `tries` failures in a row, in ms: 1 s, doubling up to one hour, with up to a quarter
/// taken off by `seed`, so that what failed together is not tried again together.
#[must_use]
pub fn backoff_ms(tries: u32, seed: u64) -> u64 {
    let full = 1000u64 << tries.saturating_sub(1).min(12);
    let full = full.min(3_600_000);
    let spread = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
    full - full / 4 * spread / (1 << 32)
}

/// Why the worker rests between batches.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Brake {
    /// rekey.work_ratio
    WorkRatio,
    /// rekey.max_wal_rate
    WalRate,
    /// rekey.max_replication_lag
    ReplicationLag,
    /// rekey.max_dead_ratio
    DeadRows,
    /// rekey.min_free_disk
    FreeDisk,
    /// pg_stat_archiver reports a failure that no success followed.
    Archiver,
    /// A replication slot loses WAL that it needs.
    ReplicationSlot,
}

impl Brake {
    /// Whether it lasts until the server is better, and not for a time.
    #[must_use]
    pub fn is_alarm(self) -> bool {
        !matches!(self, Brake::WorkRatio | Brake::WalRate)
    }

    /// In words, for the progress view.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Brake::WorkRatio => "rekey.work_ratio",
            Brake::WalRate => "rekey.max_wal_rate",
            Brake::ReplicationLag => "a standby lags (rekey.max_replication_lag)",
            Brake::DeadRows => "the table waits for vacuum (rekey.max_dead_ratio)",
            Brake::FreeDisk => "the disk is nearly full (rekey.min_free_disk)",
            Brake::Archiver => "WAL archiving fails",
            Brake::ReplicationSlot => "a replication slot is losing WAL",
        }
    }
}

/// What is known after a batch.
#[derive(Clone, Copy, Default, Debug)]
pub struct Facts {
    /// Time that the batch took, its own rests included.
    pub took: Duration,
    /// Time of it that it rested.
    pub rested: Duration,
    /// WAL that it wrote, in bytes.
    pub wal_bytes: u64,
    /// Largest replay lag of a standby that counts, in ms.
    pub lag_ms: u64,
    /// Share of dead rows of the table.
    pub dead_ratio: f64,
    /// Free space of the data directory, in MB.
    pub free_disk_mb: Option<u64>,
    /// Whether archiving fails.
    pub archiver_fails: bool,
    /// Whether a replication slot is losing WAL.
    pub slot_loses_wal: bool,
}

/// The settings.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Share of the time that is worked, above 0 up to 1.
    pub work_ratio: f64,
    /// WAL per second, in bytes.
    pub wal_rate: Option<u64>,
    /// Largest lag, in ms.
    pub lag_ms: Option<u64>,
    /// Largest share of dead rows.
    pub dead_ratio: Option<f64>,
    /// Least free space, in MB.
    pub free_disk_mb: Option<u64>,
}

/// Rest after so much work, so that work takes the share `ratio` of the time.
#[must_use]
pub fn rest_after(worked: Duration, ratio: f64) -> Duration {
    worked.mul_f64(1.0 / ratio.clamp(0.01, 1.0) - 1.0)
}

/// Of work that has waited for a lock the time by the clock was no work: no rest is longer.
const LONGEST_REST: Duration = Duration::from_secs(1);

/// How long rows may be locked by a batch that is to take `aim`, its rests included: half of the
/// batches take longer than foreseen, and should rest to their ends all the same.
#[must_use]
pub fn window(aim: Duration) -> Duration {
    (aim * 2).min(LONGEST_REST / 2)
}

/// The rests that are due after so much work and WAL, for the share of the time and for the WAL rate.
fn due(facts: &Facts, limits: &Limits) -> (Duration, Duration) {
    let worked = facts.took.saturating_sub(facts.rested);
    let by_ratio = rest_after(worked, limits.work_ratio).saturating_sub(facts.rested);
    let by_wal = limits.wal_rate.map_or(Duration::ZERO, |rate| {
        let least = facts.wal_bytes.saturating_mul(1_000_000) / rate.max(1);
        Duration::from_micros(least).saturating_sub(facts.took)
    });
    (by_ratio, by_wal)
}

/// The rest that is due in the middle of work, so that it keeps to both limits all along: none that
/// is shorter than that of a `piece` of work, and none that is longer than the `room` that is left,
/// if that is limited.
#[must_use]
pub fn rest_between(
    facts: &Facts,
    limits: &Limits,
    piece: Duration,
    room: Option<Duration>,
) -> Duration {
    let room = room.unwrap_or(LONGEST_REST).min(LONGEST_REST);
    let (by_ratio, by_wal) = due(facts, limits);
    let due = by_ratio.max(by_wal);
    if due < rest_after(piece, limits.work_ratio) {
        return Duration::ZERO;
    }
    due.min(room)
}

/// How long to rest before the next batch, and why; None: no rest. What endangers the server rests
/// for a second and is looked at again.
#[must_use]
pub fn rest(facts: &Facts, limits: &Limits) -> Option<(Duration, Brake)> {
    const LOOK_AGAIN: Duration = Duration::from_secs(1);
    const WORTH: Duration = Duration::from_millis(1);
    let alarms = [
        (
            limits
                .free_disk_mb
                .is_some_and(|least| facts.free_disk_mb.is_some_and(|free| free < least)),
            Brake::FreeDisk,
        ),
        (facts.slot_loses_wal, Brake::ReplicationSlot),
        (facts.archiver_fails, Brake::Archiver),
        (
            limits.lag_ms.is_some_and(|most| facts.lag_ms > most),
            Brake::ReplicationLag,
        ),
        (
            limits
                .dead_ratio
                .is_some_and(|most| facts.dead_ratio > most),
            Brake::DeadRows,
        ),
    ];
    if let Some((_, brake)) = alarms.into_iter().find(|(raised, _)| *raised) {
        return Some((LOOK_AGAIN, brake));
    }
    let (by_ratio, by_wal) = due(facts, limits);
    match by_ratio.max(by_wal) {
        rest if rest < WORTH => None,
        rest if by_wal > by_ratio => Some((rest, Brake::WalRate)),
        rest => Some((rest, Brake::WorkRatio)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        work_ratio: 0.2,
        wal_rate: Some(16_000_000),
        lag_ms: Some(30_000),
        dead_ratio: Some(0.25),
        free_disk_mb: Some(1024),
    };

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// After so many ms of which so many were rests, and so many kB of WAL.
    fn spent(took: u64, rested: u64, wal_kb: u64) -> Facts {
        Facts {
            took: ms(took),
            rested: ms(rested),
            wal_bytes: wal_kb * 1000,
            ..Facts::default()
        }
    }

    #[test]
    fn work_rests_after_each_piece_for_its_share() {
        let rest = |took, rested| rest_between(&spent(took, rested, 0), &LIMITS, ms(1), None);
        assert_eq!(rest(0, 0), ms(0));
        assert_eq!(rest(1, 0), ms(4));
        // What an earlier rest was too short for comes with the next one.
        assert_eq!(rest(5, 3), ms(5));
        assert_eq!(rest(5, 4), ms(0), "not before the next piece is done");
        assert_eq!(rest(6, 4), ms(4));
        assert_eq!(rest(60_000, 0), ms(1000), "so long it was no work");
        let unthrottled = Limits {
            work_ratio: 1.0,
            ..LIMITS
        };
        assert_eq!(
            rest_between(&spent(9, 0, 0), &unthrottled, ms(1), None),
            ms(0)
        );
    }

    #[test]
    fn work_that_writes_much_rests_in_its_middle_as_long_as_the_wal_rate_wants() {
        let rest =
            |took, rested, wal| rest_between(&spent(took, rested, wal), &LIMITS, ms(1), None);
        assert_eq!(rest(1, 0, 160), ms(9));
        assert_eq!(rest(1, 0, 16), ms(4), "the share of the time wants more");
        assert_eq!(rest(11, 9, 160), ms(0), "not before more is written");
        assert_eq!(rest(11, 9, 240), ms(4));
    }

    #[test]
    fn a_batch_that_takes_longer_than_foreseen_still_rests_and_one_of_twice_its_time_does_not() {
        // Of a batch that has begun to lock rows 100 ms after its step.
        let rest = |locked: u64, rested: u64| {
            let room = window(ms(25)).saturating_sub(ms(locked));
            let facts = spent(100 + locked, 80 + rested, 0);
            rest_between(&facts, &LIMITS, ms(1), Some(room))
        };
        assert_eq!(rest(26, 20), ms(4));
        assert_eq!(rest(47, 35), ms(3), "up to the end of the window");
        assert_eq!(rest(50, 36), ms(0));
        assert_eq!(rest(90, 36), ms(0));
        assert_eq!(window(ms(10_000)), ms(500));
    }

    #[test]
    fn a_batch_grows_to_twice_at_most_and_shrinks_at_once() {
        let mut size = BatchSize::new();
        size.learn(16, 64, 1, 100);
        assert_eq!((size.blocks(), size.rows()), (32, 128));
        size.learn(32, 128, 1000, 100);
        assert_eq!((size.blocks(), size.rows()), (3, 12));
        size.learn(3, 12, 100_000, 100);
        assert_eq!((size.blocks(), size.rows()), (1, 1), "never none");
        for _ in 0..30 {
            size.learn(size.blocks(), size.rows(), 0, 100);
        }
        assert_eq!((size.blocks(), size.rows()), (MAX_BLOCKS, MAX_ROWS));
    }

    #[test]
    fn a_batch_of_the_right_length_keeps_its_size() {
        let mut size = BatchSize::new();
        size.learn(16, 64, 100, 100);
        assert_eq!((size.blocks(), size.rows()), (16, 64));
    }

    #[test]
    fn blocks_without_stale_rows_do_not_make_the_next_batch_rewrite_more() {
        let mut size = BatchSize::new();
        for _ in 0..30 {
            size.learn(size.blocks(), 0, 1, 100);
        }
        assert_eq!((size.blocks(), size.rows()), (MAX_BLOCKS, 64));
        size.learn(2, 64, 10, 100);
        assert_eq!((size.blocks(), size.rows()), (20, 128), "full of rows");
        size.learn(0, 128, 1000, 100);
        assert_eq!((size.blocks(), size.rows()), (20, 12), "single rows");
    }

    #[test]
    fn the_back_off_doubles_up_to_an_hour_and_spreads() {
        for tries in 1..40 {
            let most = (1000u64 << (tries - 1).min(12)).min(3_600_000);
            for seed in 0..100 {
                let wait = backoff_ms(tries, seed);
                assert!(
                    wait <= most && wait >= most / 4 * 3,
                    "{tries} {seed}: {wait}"
                );
            }
        }
        assert_ne!(backoff_ms(5, 1), backoff_ms(5, 2));
    }

    #[test]
    fn a_fifth_of_the_time_is_worked() {
        let facts = Facts {
            took: Duration::from_millis(100),
            ..Facts::default()
        };
        assert_eq!(
            rest(&facts, &LIMITS),
            Some((Duration::from_millis(400), Brake::WorkRatio))
        );
        let unthrottled = Limits {
            work_ratio: 1.0,
            wal_rate: None,
            ..LIMITS
        };
        assert_eq!(rest(&facts, &unthrottled), None);
    }

    #[test]
    fn the_wal_rate_holds_over_work_and_rest_together() {
        let facts = Facts {
            took: Duration::from_millis(100),
            wal_bytes: 32_000_000,
            ..Facts::default()
        };
        assert_eq!(
            rest(&facts, &LIMITS),
            Some((Duration::from_millis(1900), Brake::WalRate))
        );
    }

    #[test]
    fn what_a_batch_has_rested_itself_counts() {
        let facts = |took, rested| Facts {
            took: Duration::from_millis(took),
            rested: Duration::from_millis(rested),
            ..Facts::default()
        };
        assert_eq!(rest(&facts(100, 80), &LIMITS), None);
        assert_eq!(rest(&facts(100, 90), &LIMITS), None);
        assert_eq!(
            rest(&facts(100, 75), &LIMITS),
            Some((Duration::from_millis(25), Brake::WorkRatio))
        );
        // A scan that has rested for its share of the time still owes what it wrote, less its time.
        for rested in [80, 100] {
            let written = Facts {
                wal_bytes: 3_200_000,
                ..facts(100, rested)
            };
            assert_eq!(
                rest(&written, &LIMITS),
                Some((Duration::from_millis(100), Brake::WalRate))
            );
        }
        assert_eq!(rest(&facts(100, 100), &LIMITS), None);
    }

    #[test]
    fn what_endangers_the_server_comes_first() {
        let calm = Facts {
            took: Duration::from_millis(100),
            free_disk_mb: Some(5000),
            ..Facts::default()
        };
        let cases = [
            (
                Facts {
                    free_disk_mb: Some(1000),
                    ..calm
                },
                Brake::FreeDisk,
            ),
            (
                Facts {
                    slot_loses_wal: true,
                    ..calm
                },
                Brake::ReplicationSlot,
            ),
            (
                Facts {
                    archiver_fails: true,
                    ..calm
                },
                Brake::Archiver,
            ),
            (
                Facts {
                    lag_ms: 30_001,
                    ..calm
                },
                Brake::ReplicationLag,
            ),
            (
                Facts {
                    dead_ratio: 0.26,
                    ..calm
                },
                Brake::DeadRows,
            ),
        ];
        for (facts, brake) in cases {
            assert_eq!(rest(&facts, &LIMITS), Some((Duration::from_secs(1), brake)));
        }
    }
}
