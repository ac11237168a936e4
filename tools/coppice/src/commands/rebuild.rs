//! `coppice rebuild-index`: without a supervisor, because it needs the store
//! for itself.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use coppice_engine::{Settings, Store, StoreError};
use serde::Serialize;

use crate::output::Output;

/// `rebuild-index --json`.
#[derive(Serialize)]
struct Rebuilt {
    packs: u64,
    chunks: u64,
    seconds: f64,
}

pub(super) fn rebuild_index(folder: &Path, out: Output) -> Result<ExitCode> {
    if !folder.join("FORMAT").exists() {
        bail!("there is no store in {}", folder.display());
    }
    let begun = Instant::now();
    let store = match Store::open_without_index(folder, &Settings::default()) {
        Err(StoreError::Locked) => bail!(
            "the store in {} is in use: end its supervisor, and with it its machines, by `coppice serve --stop`",
            folder.display()
        ),
        opened => opened?,
    };
    let stats = store.stats();
    let done = Rebuilt {
        packs: stats.packs,
        chunks: stats.chunks,
        seconds: begun.elapsed().as_secs_f64(),
    };
    out.print(&done, || {
        format!("{} chunks in {} packs, in {:.1} s", done.chunks, done.packs, done.seconds)
    })?;
    Ok(ExitCode::SUCCESS)
}
