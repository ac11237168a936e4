//! Measures live captures and prints one JSON document.

use std::io::Write;

use anyhow::Result;
use clap::{Parser, Subcommand};
use coppice_benches::live::{self, Live};
use coppice_benches::pools::{self, Origin};
use serde::Serialize;

/// Measures how long a machine that writes all the time stands still when it
/// is captured, and checks that each capture is one instant.
#[derive(Debug, Parser)]
struct Arguments {
    /// Guest memory in MiB: powers of two from 16 on.
    #[arg(long, value_delimiter = ',', default_value = "64,256,1024")]
    memory: Vec<u64>,
    /// Pages that the guest has written.
    #[arg(long, value_delimiter = ',', default_value = "0,1000,10000,50000")]
    dirty: Vec<u64>,
    /// Captures of each machine.
    #[arg(long, default_value_t = 20)]
    rounds: usize,
    #[command(subcommand)]
    role: Option<Role>,
}

/// What the other processes of the bench are started as.
#[derive(Debug, Subcommand)]
enum Role {
    /// The process of one fork.
    #[command(hide = true)]
    Fork,
    /// A page server over the file of an image.
    #[command(hide = true)]
    PagerFile,
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Report {
    captures: Vec<Live>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    match arguments.role {
        None => measure(&arguments),
        Some(Role::Fork) => coppice_benches::child::run(),
        Some(Role::PagerFile) => pools::serve(Origin::File),
    }
}

fn measure(arguments: &Arguments) -> Result<()> {
    let mut captures = Vec::new();
    for mib in &arguments.memory {
        eprintln!("measuring: {mib} MiB");
        captures.extend(live::measure(*mib, &arguments.dirty, arguments.rounds)?);
    }
    let mut out = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, &Report { captures })?;
    writeln!(out)?;
    Ok(())
}
