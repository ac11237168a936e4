//! What `bench-peers` prints, and what is read out of it.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::measure::Run;
use super::round::Runs;
use super::steps::Step;
use crate::process::first_line;

/// All that was measured.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Report {
    pub(super) host: Host,
    pub(super) corpus_files: usize,
    /// Lengths of all files.
    pub(super) logical_bytes: u64,
    /// Blocks that they take on the disk; the rest is holes.
    pub(super) data_bytes: u64,
    /// Blocks of 4 KiB that are read at random from each file.
    pub(super) blocks_per_file: usize,
    /// Before each round.
    pub(super) load_averages: Vec<String>,
    pub(super) programs: Vec<Outcome>,
}

/// Where it was measured.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Host {
    pub(super) cpus: usize,
    pub(super) memory_mib: u64,
    pub(super) kernel: String,
}

/// What one program did.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Outcome {
    pub(super) program: String,
    pub(super) version: String,
    pub(super) compression: String,
    /// A run for each round; a step that the program cannot take is absent.
    pub(super) steps: BTreeMap<Step, Vec<Run>>,
}

/// A figure of several rounds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Spread {
    pub(super) min: f64,
    pub(super) median: f64,
    pub(super) max: f64,
}

impl Report {
    /// Reads what was printed.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text)
            .with_context(|| format!("{} is not what `bench-peers` printed", path.display()))
    }

    pub(super) fn json(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(self)?)
    }
}

impl Host {
    pub(super) fn this() -> Result<Self> {
        let memory = std::fs::read_to_string("/proc/meminfo")?;
        let total = memory.split_whitespace().nth(1).context("no MemTotal in /proc/meminfo")?;
        Ok(Self {
            cpus: std::thread::available_parallelism()?.get(),
            memory_mib: total.parse::<u64>()? >> 10,
            kernel: first_line(std::process::Command::new("uname").arg("-sr"))?,
        })
    }
}

pub(super) fn load_average() -> Result<String> {
    Ok(std::fs::read_to_string("/proc/loadavg")?.trim().to_owned())
}

impl Outcome {
    pub(super) fn add(&mut self, runs: Runs) {
        for (step, run) in runs {
            self.steps.entry(step).or_default().push(run);
        }
    }

    /// Whether this is Coppice.
    pub(super) fn own(&self) -> bool {
        self.program.split('@').next() == Some("coppice")
    }

    /// A figure of some steps, summed in each round; none if one of them was
    /// not taken.
    pub(super) fn over(&self, steps: &[Step], figure: fn(&Run) -> f64) -> Option<Spread> {
        let runs: Vec<&Vec<Run>> =
            steps.iter().map(|step| self.steps.get(step)).collect::<Option<_>>()?;
        let rounds = runs.iter().map(|runs| runs.len()).min()?;
        let sum = |round: usize| runs.iter().map(|runs| figure(&runs[round])).sum();
        Spread::of((0..rounds).map(sum).collect())
    }
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len().is_multiple_of(2) {
            f64::midpoint(values[middle - 1], values[middle])
        } else {
            values[middle]
        };
        Some(Self { min, median, max })
    }
}

#[cfg(test)]
mod tests {
    use super::super::steps::INGEST;
    use super::*;

    #[test]
    fn the_median_of_several_rounds_is_told() {
        assert_eq!(Spread::of(Vec::new()), None);
        let spread = Spread::of(vec![3.0, 1.0, 2.5]).unwrap();
        assert_eq!(spread, Spread { min: 1.0, median: 2.5, max: 3.0 });
        assert!((Spread::of(vec![4.0, 1.0]).unwrap().median - 2.5).abs() < 1e-9);
    }

    #[test]
    fn sums_are_taken_in_each_round() {
        let run = |wall_seconds| Run {
            wall_seconds,
            cpu_seconds: 1.0,
            peak_memory_kib: 2048,
            stored_bytes: 1,
            set_aside_bytes: 0,
        };
        let steps = INGEST.iter().zip([1.0, 10.0, 100.0]);
        let mut outcome = Outcome {
            program: "coppice@1".to_owned(),
            version: String::new(),
            compression: String::new(),
            steps: BTreeMap::new(),
        };
        for factor in [1.0, 3.0, 2.0] {
            outcome.add(steps.clone().map(|(step, wall)| (*step, run(wall * factor))).collect());
        }
        let wall = outcome.over(&INGEST, |run| run.wall_seconds).unwrap();
        assert_eq!(wall, Spread { min: 111.0, median: 222.0, max: 333.0 });
        assert!(outcome.own() && outcome.over(&[Step::Read], |run| run.cpu_seconds).is_none());
    }
}
