//! Calling cargo: one profile and one target folder for everything, so that
//! RocksDB is built once.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::cache;
use crate::checkout::Checkout;
use crate::process::run_shown;

/// Digits that tell the target folders of two compilers apart.
const COMPILER_DIGITS: usize = 12;

/// A call of cargo in the checkout.
#[derive(Debug)]
pub(crate) struct Cargo {
    command: Command,
}

impl Cargo {
    /// `cargo SUBCOMMAND`. `--release` is the caller's to add: not every
    /// subcommand knows it.
    pub(crate) fn new(checkout: &Checkout, subcommand: &str) -> Result<Self> {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.current_dir(checkout.root()).arg(subcommand);
        command.env("CARGO_TARGET_DIR", target_folder(checkout)?);
        // What `cargo run` says of the package xtask is not true of another.
        for (name, _) in std::env::vars_os() {
            let of_xtask = name.to_str().is_some_and(|name| {
                name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")
            });
            if of_xtask {
                command.env_remove(name);
            }
        }
        Ok(Self { command })
    }

    /// Adds arguments.
    pub(crate) fn args<'a>(mut self, arguments: impl IntoIterator<Item = &'a str>) -> Self {
        self.command.args(arguments);
        self
    }

    /// Sets a variable of its environment.
    pub(crate) fn env(mut self, name: &str, value: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Runs it and shows its progress.
    pub(crate) fn run(self, what: &str) -> Result<()> {
        run_shown(what, self.command)
    }
}

/// Where cargo builds: `$CARGO_TARGET_DIR`, else a folder of this compiler in
/// the cache, which all checkouts share.
pub(crate) fn target_folder(checkout: &Checkout) -> Result<PathBuf> {
    if let Some(folder) = std::env::var_os("CARGO_TARGET_DIR").filter(|value| !value.is_empty()) {
        return Ok(checkout.root().join(folder));
    }
    // As `.ci/run` finds it: `rustc -vV | sha256sum`.
    let output = Command::new("rustc")
        .arg("-vV")
        .current_dir(checkout.root())
        .output()
        .context("cannot start rustc")?;
    if !output.status.success() {
        bail!("rustc -vV ended with {}", output.status);
    }
    let digest = Sha256::digest(&output.stdout);
    let mut compiler: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    compiler.truncate(COMPILER_DIGITS);
    Ok(cache::folder()?.join(format!("target-{compiler}")))
}
