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
    /// Blocks of the whole store when it had ended, without the next.
    pub(super) stored_bytes: u64,
    /// Room that the store sets aside for clearing a full disk.
    pub(super) set_aside_bytes: u64,
}

impl Run {
    #[expect(clippy::cast_precision_loss, reason = "a figure to look at")]
    pub(super) fn peak_mib(&self) -> f64 {
        self.peak_memory_kib as f64 / 1024.0
    }

    pub(super) fn stored_mib(&self) -> f64 {
        mib(self.stored_bytes)
    }

    pub(super) fn set_aside_mib(&self) -> f64 {
        mib(self.set_aside_bytes)
    }
}

#[expect(clippy::cast_precision_loss, reason = "a figure to look at")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Runs the script of a step in the folder.
pub(super) fn measure(program: &Program, step: Step, work: &Path, script: &str) -> Result<Run> {
    if step.cold() {
        drop_page_cache();
    }
    let figures = work.join("figures");
    let mut command = Command::new("/usr/bin/time");
    command.args(["--format", "%e %U %S %M", "--output"]).arg(&figures).args(BASH);
    start(program, step.doing(), work, command, script)?;
    let run = parse(&std::fs::read_to_string(&figures)?)?;
    let store = work.join("store");
    let set_aside_bytes = disk_bytes(&store.join(SET_ASIDE)).unwrap_or(0);
    Ok(Run { stored_bytes: disk_bytes(&store)? - set_aside_bytes, set_aside_bytes, ..run })
}

/// Coppice's file of room without content. The others have none.
const SET_ASIDE: &str = "reserve";

/// Runs a script in the folder that is no part of the comparison.
pub(super) fn run_unmeasured(
    program: &Program,
    what: &str,
    work: &Path,
    script: &str,
) -> Result<()> {
    let mut command = Command::new(BASH[0]);
    command.args(&BASH[1..]);
    start(program, what, work, command, script)
}

/// What runs a script. It is a file, because an argument has at most 128 KiB.
const BASH: [&str; 4] = ["bash", "-euo", "pipefail", "script"];

fn start(
    program: &Program,
    what: &str,
    work: &Path,
    mut command: Command,
    script: &str,
) -> Result<()> {
    std::fs::write(work.join("script"), script)?;
    command.current_dir(work).envs(program.environment.iter().cloned());
    run_logged(&format!("{}: {what}", program.name), command, &work.join("log"))
}

/// Reads what `time` wrote; of the store it knows nothing.
fn parse(text: &str) -> Result<Run> {
    let line = text.lines().last().unwrap_or_default();
    let fields: Vec<&str> = line.split_whitespace().collect();
    let [wall, user, system, peak] = fields[..] else { bail!("`time` said {line:?}") };
    let seconds = |text: &str| text.parse::<f64>().context("a number of seconds");
    let hundredths = |seconds: f64| (seconds * 100.0).round() / 100.0;
    Ok(Run {
        wall_seconds: seconds(wall)?,
        cpu_seconds: hundredths(seconds(user)? + seconds(system)?),
        peak_memory_kib: peak.parse()?,
        stored_bytes: 0,
        set_aside_bytes: 0,
    })
}

/// Only root may; without, the operations are warm, and alike for all.
fn drop_page_cache() {
    drop(Command::new("sync").status());
    drop(std::fs::write("/proc/sys/vm/drop_caches", "3"));
}

/// Blocks of a file, or of a folder and everything in it.
fn disk_bytes(folder: &Path) -> Result<u64> {
    let metadata = std::fs::symlink_metadata(folder)
        .with_context(|| format!("there is no {}", folder.display()))?;
    let mut bytes = metadata.blocks() * 512;
    if metadata.is_dir() {
        for entry in std::fs::read_dir(folder)? {
            bytes += disk_bytes(&entry?.path())?;
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_time_says_is_read() {
        let run = parse("Command exited\n1.50 2.25 0.25 1234\n").unwrap();
        assert_eq!(run.peak_memory_kib, 1234);
        assert!((run.cpu_seconds - 2.5).abs() < 1e-9);
        assert!(parse("nonsense").is_err());
    }
}
