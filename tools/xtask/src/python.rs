//! The Python packages of the independent reader of the format, which the
//! tests run; installed once into the cache, and nowhere else.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::cache;
use crate::process::{first_line, run_logged};

/// Pinned, so that a new release changes nothing here by itself.
const PACKAGES: [&str; 2] = ["blake3==1.0.11", "zstandard==0.25.0"];

/// The folder of the packages, for `PYTHONPATH`.
pub(crate) fn make() -> Result<PathBuf> {
    let tools = cache::folder()?.join("tools");
    cache::create(&tools)?;
    let logs = cache::folder()?.join("logs");
    cache::create(&logs)?;
    let version = first_line(Command::new("python3").arg("--version"))?;
    let key = cache::Key::default()
        .bytes("python", version.as_bytes())
        .bytes("packages", PACKAGES.join(" ").as_bytes());
    cache::once(&tools, "python", key, |partial| {
        // No virtual environment: those hold absolute paths, and this folder
        // is renamed when it is complete.
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"])
            .args(["--only-binary", ":all:", "--target"])
            .arg(partial)
            .args(PACKAGES);
        run_logged("installing the reader's Python packages", pip, &logs.join("python.log"))
    })
}
