//! What every change must pass, cheapest first.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::cache;
use crate::cargo::Cargo;
use crate::checkout::Checkout;
use crate::process::{in_path, run_shown};
use crate::{setup, story, tidy};

/// The version of `cargo deny` that is used where none is installed.
const DENY_VERSION: &str = "0.20.2";

/// Runs everything.
pub(crate) fn run(checkout: &Checkout) -> Result<()> {
    Cargo::new(checkout, "fmt")?.args(["--all", "--check"]).run("checking the format")?;
    tidy::run(checkout)?;
    setup::run()?;
    deny(checkout)?;
    Cargo::new(checkout, "clippy")?
        .args(["--release", "--workspace", "--all-targets", "--", "-D", "warnings"])
        .run("running clippy")?;
    Cargo::new(checkout, "doc")?
        .args(["--release", "--workspace", "--no-deps"])
        .env("RUSTDOCFLAGS", "-D warnings")
        .run("building the documentation")?;
    story::test(checkout, false)?;
    eprintln!("xtask: all is well");
    Ok(())
}

/// Checks licences, bans and sources of all dependencies.
fn deny(checkout: &Checkout) -> Result<()> {
    let program = deny_program()?;
    let mut command = Command::new(program);
    command
        .current_dir(checkout.root())
        .args(["--all-features", "--locked", "check", "--hide-inclusion-graph"])
        .args(["licenses", "bans", "sources"]);
    run_shown("checking the dependencies", command)
}

/// `cargo-deny` as the user has it, else one of our own, built once.
fn deny_program() -> Result<PathBuf> {
    if let Some(program) = in_path("cargo-deny") {
        return Ok(program);
    }
    let tools = cache::folder()?.join("tools");
    let key = cache::Key::default().bytes("version", DENY_VERSION.as_bytes());
    let folder = cache::once(&tools, "cargo-deny", key, |partial| {
        let mut command = Command::new("cargo");
        // The debug profile: it runs for a second, and builds twice as fast.
        command
            .args(["install", "--locked", "--debug", "--no-default-features", "--root"])
            .arg(partial)
            .args(["--version", DENY_VERSION, "cargo-deny"])
            .env("CARGO_TARGET_DIR", partial.join("target"))
            .env("CARGO_PROFILE_DEV_DEBUG", "0");
        run_shown("installing cargo-deny", command)?;
        Ok(std::fs::remove_dir_all(partial.join("target"))?)
    })?;
    Ok(folder.join("bin/cargo-deny"))
}
