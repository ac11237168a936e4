//! The guest agent: a static program, so that it runs on any root disk.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::cargo::{Cargo, target_folder};
use crate::checkout::Checkout;

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds the agent in a target folder of its own (its compiler flags would
/// make cargo build everything else again) and returns its path. No path of
/// this machine gets into it, so that every checkout makes the same disk.
pub(super) fn build(checkout: &Checkout) -> Result<PathBuf> {
    let folder = target_folder(checkout)?.join("agent");
    let mut flags = vec!["-Ctarget-feature=+crt-static".to_owned(), "-Cstrip=symbols".to_owned()];
    flags.push(remap(checkout.root(), "/coppice"));
    if let Some(home) = cargo_home() {
        flags.push(remap(&home, "/cargo"));
    }
    // Incremental code depends on what was built before.
    Cargo::new(checkout, "build")?
        .args(["--release", "--package", "coppice-agent", "--target", TARGET])
        .env("CARGO_TARGET_DIR", &folder)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .env("CARGO_INCREMENTAL", "0")
        .run("building the guest agent")?;
    Ok(folder.join(TARGET).join("release/coppice-agent"))
}

fn remap(from: &Path, to: &str) -> String {
    format!("--remap-path-prefix={}={to}", from.display())
}

fn cargo_home() -> Option<PathBuf> {
    let set = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    set.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")))
}
