//! Measures restores with and without their working set, and prints one JSON
//! document.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use coppice_benches::guest::{self, DATA_PAGE};
use coppice_benches::pools::{Stored, memory_file};
use coppice_benches::restores::{self, Linux, Resident, Restores};
use coppice_benches::role::{Role, print};
use serde::Serialize;

/// Measures cold restores with and without prefetching, of a guest that runs
/// in ring 3 and of a Linux snapshot, if one is given.
#[derive(Debug, Parser)]
struct Arguments {
    /// Memory of the ring-3 guest in MiB: a power of two.
    #[arg(long, default_value_t = 128)]
    memory: u64,
    /// Pages that it reads.
    #[arg(long, default_value_t = 2000)]
    pages: u64,
    /// Restores of each kind.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// The program that restores the Linux snapshot.
    #[arg(long, requires = "store")]
    coppice: Option<PathBuf>,
    /// Its store. Its supervisor is ended.
    #[arg(long, requires = "snapshot")]
    store: Option<PathBuf>,
    /// The snapshot, in which the agent runs.
    #[arg(long, requires = "coppice")]
    snapshot: Option<String>,
    /// What the agent is to run.
    #[arg(long, default_value = "echo", value_delimiter = ' ')]
    command: Vec<String>,
    #[command(subcommand)]
    role: Option<Role>,
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Report {
    memory_mib: u64,
    pages: u64,
    ring_3: Restores,
    resident: Resident,
    linux: Option<Restores>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    match arguments.role {
        None => measure(arguments),
        Some(role) => role.play(),
    }
}

fn measure(arguments: Arguments) -> Result<()> {
    let Arguments { memory: mib, pages, rounds, .. } = arguments;
    let image = memory_file(&guest::image(usize::try_from(mib << 20)?))?;
    let mask = (1 << (mib * 256 - DATA_PAGE).ilog2()) - 1;
    let folder = tempfile::tempdir().context("a folder for the store")?;
    let stored = Stored::import(&image, folder.path())?;
    let ring_3 = restores::ring_3(&stored, pages, mask, rounds)?;
    let resident = restores::resident(&image, pages, mask, rounds)?;
    let linux = match (arguments.coppice, arguments.store, arguments.snapshot) {
        (Some(coppice), Some(store), Some(snapshot)) => {
            let linux = Linux { coppice, store, snapshot, command: arguments.command };
            Some(linux.measure(rounds)?)
        }
        _ => None,
    };
    let report = Report { memory_mib: mib, pages, ring_3, resident, linux };
    print(&report)
}
