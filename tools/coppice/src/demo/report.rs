//! What the demo found: checks, figures, and the table at its end.

use serde::Serialize;

use crate::output::{bytes, micros, table};

/// `demo --json`.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) ok: bool,
    pub(super) checks: Vec<Check>,
    pub(super) figures: Figures,
}

/// One claim that the demo checked.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Check {
    pub(super) name: String,
    pub(super) ok: bool,
    pub(super) detail: String,
}

/// Two percentiles.
#[derive(Debug, Default, Clone, Copy, Serialize)]
pub(super) struct Spread {
    pub(super) p50: u64,
    pub(super) p99: u64,
}

impl Spread {
    /// Of the given values, by nearest rank.
    pub(super) fn of(values: &[u64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_unstable();
        Self { p50: rank(&sorted, 50), p99: rank(&sorted, 99) }
    }
}

fn rank(sorted: &[u64], percent: usize) -> u64 {
    let index = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(index).copied().unwrap_or(0)
}

/// Everything measured.
#[derive(Debug, Default, Serialize)]
pub(super) struct Figures {
    pub(super) import_seconds: f64,
    pub(super) boot_seconds: f64,
    pub(super) snapshot_seconds: f64,
    pub(super) pause_us: u64,
    pub(super) logical_bytes: u64,
    pub(super) stored_bytes: u64,
    pub(super) forks: u32,
    pub(super) fork_ready_us: Spread,
    pub(super) fork_reply_us: Spread,
    pub(super) first_fork_store_pages: u64,
    pub(super) later_fork_store_pages: Spread,
    pub(super) first_fork_faults: u64,
    pub(super) later_fork_faults: Spread,
    pub(super) private_bytes_per_fork: u64,
    pub(super) shared_bytes_per_fork: u64,
    pub(super) pss_bytes_per_fork: u64,
    pub(super) page_table_bytes_per_fork: u64,
    pub(super) host_bytes_per_fork: u64,
    pub(super) host_available_before_bytes: u64,
    pub(super) host_available_after_bytes: u64,
    pub(super) incremental_dirty_pages: u64,
    pub(super) incremental_stored_bytes: u64,
    pub(super) incremental_seconds: f64,
    pub(super) second_incremental_stored_bytes: u64,
    pub(super) store_stored_bytes: u64,
    pub(super) check_seconds: f64,
    pub(super) total_seconds: f64,
}

impl Report {
    /// The table for people.
    pub(super) fn text(&self) -> String {
        let mut text = table(&self.figures.rows());
        text.push('\n');
        for check in &self.checks {
            let mark = if check.ok { "ok  " } else { "FAIL" };
            text.push_str(&format!("{mark} {}: {}\n", check.name, check.detail));
        }
        text
    }
}

impl Figures {
    fn rows(&self) -> Vec<Vec<String>> {
        let seconds = |value: f64| format!("{value:.2} s");
        let spread = |value: Spread| format!("{} / {}", micros(value.p50), micros(value.p99));
        let count = |value: Spread| format!("{} / {}", value.p50, value.p99);
        let rows: [(&str, String); 22] = [
            ("import of the root disk", seconds(self.import_seconds)),
            ("boot until the first command is answered", seconds(self.boot_seconds)),
            ("snapshot", seconds(self.snapshot_seconds)),
            ("  pause of the machine", micros(self.pause_us)),
            ("  memory and disk captured", bytes(self.logical_bytes)),
            ("  stored for it", bytes(self.stored_bytes)),
            ("forks", self.forks.to_string()),
            ("  until the vCPU runs, p50 / p99", spread(self.fork_ready_us)),
            ("  until the first exec is answered, p50 / p99", spread(self.fork_reply_us)),
            ("  pages read from the store: first fork", self.first_fork_store_pages.to_string()),
            ("  pages read from the store: later, p50 / p99", count(self.later_fork_store_pages)),
            ("  faults served: first fork", self.first_fork_faults.to_string()),
            ("  faults served: later, p50 / p99", count(self.later_fork_faults)),
            ("  private memory of a fork", bytes(self.private_bytes_per_fork)),
            ("  shared memory of a fork", bytes(self.shared_bytes_per_fork)),
            ("  host memory for a fork, all in", bytes(self.host_bytes_per_fork)),
            ("host memory available before", bytes(self.host_available_before_bytes)),
            ("host memory available after", bytes(self.host_available_after_bytes)),
            ("incremental snapshot: changed pages", self.incremental_dirty_pages.to_string()),
            ("  stored for it", bytes(self.incremental_stored_bytes)),
            (
                "  stored for the next, after 20 pages changed",
                bytes(self.second_incremental_stored_bytes),
            ),
            ("check of the whole store", seconds(self.check_seconds)),
        ];
        let mut table = vec![vec!["WHAT".to_owned(), "MEASURED".to_owned()]];
        table.extend(rows.map(|(what, value)| vec![what.to_owned(), value]));
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_by_nearest_rank() {
        let spread = Spread::of(&(1..=100).collect::<Vec<u64>>());
        assert_eq!((spread.p50, spread.p99), (50, 99));
        let one = Spread::of(&[7]);
        assert_eq!((one.p50, one.p99), (7, 7));
        assert_eq!(Spread::of(&[]).p50, 0);
    }
}
