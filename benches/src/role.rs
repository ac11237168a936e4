//! What the benches have in common that measure with several processes.

use std::io::Write;

use anyhow::Result;
use clap::Subcommand;
use serde::Serialize;

use crate::pools::{self, Origin};
use crate::{child, cold};

/// What the other processes of a bench are started as.
#[derive(Debug, Clone, Copy, Subcommand)]
pub enum Role {
    /// The process of one fork, or of a bare machine.
    #[command(hide = true)]
    Fork,
    /// The process of a machine that is started cold.
    #[command(hide = true)]
    Machine,
    /// A page server over a store.
    #[command(hide = true)]
    PagerStore,
    /// A page server over its own memory.
    #[command(hide = true)]
    PagerMemory,
    /// A page server over the file of an image.
    #[command(hide = true)]
    PagerFile,
}

impl Role {
    /// The life of such a process.
    pub fn play(self) -> Result<()> {
        match self {
            Self::Fork => child::run(),
            Self::Machine => cold::run(),
            Self::PagerStore => pools::serve(Origin::Store),
            Self::PagerMemory => pools::serve(Origin::Memory),
            Self::PagerFile => pools::serve(Origin::File),
        }
    }
}

/// Prints what was measured, as one JSON document.
pub fn print(report: &impl Serialize) -> Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, report)?;
    writeln!(out)?;
    Ok(())
}
