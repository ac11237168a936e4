//! Measures forks of a template through the product and prints one JSON document.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Parser;
use coppice_benches::bulk::{self, Bulk};
use coppice_benches::kernel::Orders;
use coppice_benches::product::Product;
use coppice_benches::role::{Role, print};
use serde::Serialize;

/// Measures how long forks of a template take until their vCPU runs: single
/// ones, batches beside as many processes that are started cold, and how both
/// change with the number of machines that run.
#[derive(Debug, Parser)]
struct Arguments {
    /// Machines that run at the end: a multiple of 100.
    #[arg(long, default_value_t = 1000)]
    machines: u32,
    /// Batches of a hundred and of as many cold starts, in turns.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// The product [default: `coppice` beside this program].
    #[arg(long)]
    coppice: Option<PathBuf>,
    #[command(subcommand)]
    role: Option<Role>,
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Report {
    memory_mib: u64,
    #[serde(flatten)]
    bulk: Bulk,
}

const TEMPLATE: &str = "template";

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    match arguments.role {
        None => measure(arguments),
        Some(role) => role.play(),
    }
}

fn measure(arguments: Arguments) -> Result<()> {
    ensure!(arguments.machines.is_multiple_of(100), "--machines must be a multiple of 100");
    let product = Product::new(arguments.coppice)?;
    product.make_template(TEMPLATE, Orders::Idle)?;
    let bulk = bulk::measure(&product, TEMPLATE, arguments.machines, arguments.rounds)?;
    let report = Report { memory_mib: coppice_benches::kernel::MEMORY_MIB, bulk };
    print(&report)
}
