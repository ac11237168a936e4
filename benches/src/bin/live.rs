//! Measures live captures and prints one JSON document.

use anyhow::Result;
use clap::Parser;
use coppice_benches::live::{self, Live};
use coppice_benches::role::{Role, print};
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

/// What is printed.
#[derive(Debug, Serialize)]
struct Report {
    captures: Vec<Live>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    match arguments.role {
        None => measure(&arguments),
        Some(role) => role.play(),
    }
}

fn measure(arguments: &Arguments) -> Result<()> {
    let mut captures = Vec::new();
    for mib in &arguments.memory {
        eprintln!("measuring: {mib} MiB");
        captures.extend(live::measure(*mib, &arguments.dirty, arguments.rounds)?);
    }
    print(&Report { captures })
}
