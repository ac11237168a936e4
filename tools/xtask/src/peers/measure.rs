//! One operation: a shell command, what it took, and what it left on the disk.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::program::Program;
use super::steps::Step;
use crate::process::run_logged;

/// What an operation took.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Run {
    pub(super) wall_seconds: f64,
    /// User and system, of all processes.
    pub(super) cpu_seconds: f64,
    /// Of the largest process.
    pub(super) peak_memory_kib: u64,
    /// Blocks of the whole store when it had ended.
    pub(super) stored_bytes: u64,
}

impl Run {
    #[expect(clippy::cast_precision_loss, reason = "a figure to look at")]
    pub(super) fn peak_mib(&self) -> f64 {
        self.peak_memory_kib as f64 / 1024.0
    }

    #[expect(clippy::cast_precision_loss, reason = "a figure to look at")]
    pub(super) fn stored_mib(&self) -> f64 {
        self.stored_bytes as f64 / f64::from(1 << 20)
    }
}

/// Runs the script of a step in the folder.
pub(super) fn measure(program: &Program, step: Step, work: &Path, script: &str) -> Result<Run> {
    if step.cold() {
        drop_page_cache();
    }
    let figures = work.join("figures");
    let mut command = Command::new("/usr/bin/time");
    command
        .args(["--format", "%e %U %S %M", "--output"])
        .arg(&figures)
        .args(["bash", "-euo", "pipefail", "-c", script]);
    start(program, step.doing(), work, command)?;
    parse(&std::fs::read_to_string(&figures)?, stored_bytes(&work.join("store"))?)
}

/// Runs a script in the folder that is no part of the comparison.
pub(super) fn run_unmeasured(
    program: &Program,
    what: &str,
    work: &Path,
    script: &str,
) -> Result<()> {
    let mut command = Command::new("bash");
    command.args(["-euo", "pipefail", "-c", script]);
    start(program, what, work, command)
}

fn start(program: &Program, what: &str, work: &Path, mut command: Command) -> Result<()> {
    command.current_dir(work).envs(program.environment.iter().cloned());
    run_logged(&format!("{}: {what}", program.name), command, &work.join("log"))
}

fn parse(text: &str, stored_bytes: u64) -> Result<Run> {
    let line = text.lines().last().unwrap_or_default();
    let fields: Vec<&str> = line.split_whitespace().collect();
    let [wall, user, system, peak] = fields[..] else { bail!("`time` said {line:?}") };
    let seconds = |text: &str| text.parse::<f64>().context("a number of seconds");
    let hundredths = |seconds: f64| (seconds * 100.0).round() / 100.0;
    Ok(Run {
        wall_seconds: seconds(wall)?,
        cpu_seconds: hundredths(seconds(user)? + seconds(system)?),
        peak_memory_kib: peak.parse()?,
        stored_bytes,
    })
}

/// Only root may; without, the operations are warm, and alike for all.
fn drop_page_cache() {
    drop(Command::new("sync").status());
    drop(std::fs::write("/proc/sys/vm/drop_caches", "3"));
}

/// Blocks of everything in a folder.
fn stored_bytes(folder: &Path) -> Result<u64> {
    let metadata = std::fs::symlink_metadata(folder)
        .with_context(|| format!("there is no {}", folder.display()))?;
    let mut bytes = metadata.blocks() * 512;
    if metadata.is_dir() {
        for entry in std::fs::read_dir(folder)? {
            bytes += stored_bytes(&entry?.path())?;
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_time_says_is_read() {
        let run = parse("Command exited\n1.50 2.25 0.25 1234\n", 5).unwrap();
        assert_eq!((run.peak_memory_kib, run.stored_bytes), (1234, 5));
        assert!((run.cpu_seconds - 2.5).abs() < 1e-9);
        assert!(parse("nonsense", 5).is_err());
    }
}
