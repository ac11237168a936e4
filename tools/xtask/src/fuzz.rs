//! Running the fuzz targets for a bounded time.
//!
//! They are instrumented by flags that a stable compiler takes, in a target
//! folder of their own; the engine is built without RocksDB for them.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cargo::target_folder;
use crate::checkout::Checkout;
use crate::process::{run_logged, run_shown};

/// Seconds for each target, and with `--long`.
const SECONDS: u32 = 2;
const SECONDS_LONG: u32 = 120;

/// Coverage of edges and comparisons, as libFuzzer wants it.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1";

/// Flags are for this target only, and not for what runs while building.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The packages with fuzz targets beside their own: decoders, and devices.
const PACKAGES: [&str; 2] = ["engine/fuzz", "runtime/fuzz"];

/// Builds all targets and runs each from the committed corpus.
pub(crate) fn run(checkout: &Checkout, long: bool) -> Result<()> {
    let folder = target_folder(checkout)?.join("fuzz");
    let seconds = if long { SECONDS_LONG } else { SECONDS };
    let mut cases = 0;
    for package in PACKAGES {
        build(checkout, package, &folder)?;
        for target in targets(checkout, package)? {
            cases += fuzz(checkout, &folder, (package, &target), seconds)?;
        }
    }
    eprintln!("xtask: {cases} inputs fuzzed");
    Ok(())
}

fn build(checkout: &Checkout, package: &str, folder: &Path) -> Result<()> {
    let mut build = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    build
        .args(["build", "--release", "--locked", "--target", TARGET, "--manifest-path"])
        .arg(checkout.path(&format!("{package}/Cargo.toml")))
        .env("CARGO_TARGET_DIR", folder)
        .env("RUSTFLAGS", FLAGS);
    run_shown(&format!("building the fuzz targets of {package}"), build)
}

/// The targets are the programs of the fuzz package.
fn targets(checkout: &Checkout, package: &str) -> Result<Vec<String>> {
    let folder = checkout.path(&format!("{package}/src/bin"));
    let mut targets = Vec::new();
    for entry in std::fs::read_dir(&folder).with_context(|| format!("no {}", folder.display()))? {
        let path = entry?.path();
        targets.extend(path.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
    }
    targets.sort();
    Ok(targets)
}

/// Fuzzes one target; returns how many inputs were tried.
fn fuzz(
    checkout: &Checkout,
    folder: &Path,
    (package, target): (&str, &str),
    seconds: u32,
) -> Result<u64> {
    let found = folder.join("found").join(target);
    std::fs::create_dir_all(&found)?;
    let log = folder.join(format!("{target}.log"));
    let mut command = Command::new(folder.join(TARGET).join("release").join(target));
    command
        .arg(&found)
        .arg(checkout.path(&format!("{package}/corpus/{target}")))
        .arg(format!("-max_total_time={seconds}"))
        .args(["-rss_limit_mb=512", "-timeout=10", "-max_len=65536", "-print_final_stats=1"])
        .arg(format!("-artifact_prefix={}/", found.display()));
    run_logged(&format!("fuzzing {target}"), command, &log)?;
    let cases = executed(&std::fs::read_to_string(&log)?)?;
    eprintln!("tried: {cases} inputs of {target} in {package}");
    Ok(cases)
}

fn executed(log: &str) -> Result<u64> {
    let line = log.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
    let Some(count) = line else { bail!("the fuzzer did not say how many inputs it tried") };
    count.trim().parse().context("a number of inputs")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_read() {
        assert_eq!(executed("a\nstat::number_of_executed_units: 12\nb").unwrap(), 12);
        assert!(executed("Done").is_err());
    }
}
