//! What a checkout is for: the demo, the tests, the bench.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::cargo::{Cargo, target_folder};
use crate::checkout::Checkout;
use crate::guest::{self, Guest};
use crate::{python, setup};

/// Sets up, builds, makes the guest, and becomes `coppice demo`.
pub(crate) fn demo(checkout: &Checkout, arguments: &[String]) -> Result<ExitCode> {
    setup::run()?;
    let binary = build_binary(checkout)?;
    let guest = guest::make(checkout, None)?;
    let error = Command::new(&binary)
        .arg("demo")
        .arg("--kernel")
        .arg(&guest.kernel)
        .arg("--disk")
        .arg(&guest.disk)
        .args(arguments)
        .exec();
    Err(error).with_context(|| format!("cannot start {}", binary.display()))
}

/// Runs all tests.
pub(crate) fn test(checkout: &Checkout, long: bool) -> Result<()> {
    let binary = build_binary(checkout)?;
    let Guest { kernel, disk, .. } = guest::make(checkout, None)?;
    let mut cargo = Cargo::new(checkout, "test")?
        .args(["--release", "--workspace", "--no-fail-fast"])
        .env("COPPICE_BIN", binary)
        .env("COPPICE_READER_PACKAGES", python::make()?)
        .env("COPPICE_GUEST_KERNEL", kernel)
        .env("COPPICE_GUEST_DISK", disk);
    if long {
        // Ignored tests are tools, not tests: this asks the others for more.
        cargo = cargo.env("COPPICE_LONG", "1");
    }
    cargo.run("running the tests")?;
    crate::fuzz::run(checkout, long)
}

/// Builds the bench and becomes it.
pub(crate) fn bench(checkout: &Checkout, arguments: &[String]) -> Result<ExitCode> {
    setup::run()?;
    Cargo::new(checkout, "build")?
        .args(["--release", "--package", "coppice-benches", "--bin", "mechanisms"])
        .run("building the bench")?;
    let binary = target_folder(checkout)?.join("release/mechanisms");
    let error = Command::new(&binary).args(arguments).exec();
    Err(error).with_context(|| format!("cannot start {}", binary.display()))
}

pub(crate) fn build_binary(checkout: &Checkout) -> Result<PathBuf> {
    Cargo::new(checkout, "build")?
        .args(["--release", "--package", "coppice"])
        .run("building coppice")?;
    Ok(target_folder(checkout)?.join("release/coppice"))
}
