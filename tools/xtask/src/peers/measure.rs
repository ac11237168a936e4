//! One operation: a shell command, what it took, and what it left on the disk.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::program::Program;
use crate::process::run_logged;

/// What an operation took.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Figures {
    pub(super) wall_seconds: f64,
    /// User and system, of all processes.
    pub(super) cpu_seconds: f64,
    /// Of the largest process.
    pub(super) peak_memory_kib: u64,
}

/// Runs a script in the folder with a cold page cache.
pub(super) fn measure(program: &Program, what: &str, work: &Path, script: &str) -> Result<Figures> {
    drop_page_cache();
    measure_warm(program, what, work, script)
}

/// Runs a script in the folder with whatever the page cache has.
pub(super) fn measure_warm(
    program: &Program,
    what: &str,
    work: &Path,
    script: &str,
) -> Result<Figures> {
    let figures = work.join("figures");
    let mut command = Command::new("/usr/bin/time");
    command
        .args(["--format", "%e %U %S %M", "--output"])
        .arg(&figures)
        .args(["bash", "-euo", "pipefail", "-c", script])
        .current_dir(work)
        .envs(program.environment.iter().cloned());
    run_logged(&format!("{}: {what}", program.name), command, &work.join("log"))?;
    parse(&std::fs::read_to_string(&figures)?)
}

fn parse(text: &str) -> Result<Figures> {
    let line = text.lines().last().unwrap_or_default();
    let fields: Vec<&str> = line.split_whitespace().collect();
    let [wall, user, system, peak] = fields[..] else { bail!("`time` said {line:?}") };
    let seconds = |text: &str| text.parse::<f64>().context("a number of seconds");
    Ok(Figures {
        wall_seconds: seconds(wall)?,
        cpu_seconds: seconds(user)? + seconds(system)?,
        peak_memory_kib: peak.parse()?,
    })
}

/// Only root may; without, the operations are warm, and alike for all.
fn drop_page_cache() {
    drop(Command::new("sync").status());
    drop(std::fs::write("/proc/sys/vm/drop_caches", "3"));
}

/// Blocks of everything in a folder.
pub(super) fn stored_bytes(folder: &Path) -> Result<u64> {
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
        let figures = parse("Command exited\n1.50 2.25 0.25 1234\n").unwrap();
        assert_eq!(figures.peak_memory_kib, 1234);
        assert!((figures.cpu_seconds - 2.5).abs() < 1e-9);
        assert!(parse("nonsense").is_err());
    }
}
