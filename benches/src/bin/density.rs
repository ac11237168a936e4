//! Measures what many forks cost the host, and prints one JSON document.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Parser;
use coppice_benches::crowd::{self, Work};
use coppice_benches::guest;
use coppice_benches::kernel::{MEMORY_MIB, Orders};
use coppice_benches::pools::memory_file;
use coppice_benches::product::Product;
use coppice_benches::role::{Role, print};

/// Measures memory, fork time and fault time of many forks of a template of
/// 256 MiB, each of which reads and writes pages, beside as many bare machines
/// in processes of their own. Run it in a memory control group of its own if
/// the host does other things too.
#[derive(Debug, Parser)]
struct Arguments {
    /// Machines of each kind: a multiple of 100.
    #[arg(long, default_value_t = 1000)]
    machines: u32,
    /// 5,000 machines.
    #[arg(long)]
    long: bool,
    /// Pages that each reads.
    #[arg(long, default_value_t = 1000)]
    reads: u32,
    /// Pages that each writes.
    #[arg(long, default_value_t = 50)]
    writes: u32,
    /// The product [default: `coppice` beside this program].
    #[arg(long)]
    coppice: Option<PathBuf>,
    #[command(subcommand)]
    role: Option<Role>,
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
    let machines = if arguments.long { 5000 } else { arguments.machines };
    ensure!(machines > 0 && machines.is_multiple_of(100), "--machines must be a multiple of 100");
    let work = Work { reads: arguments.reads, writes: arguments.writes };
    let product = Product::new(arguments.coppice)?;
    let orders = Orders::Work { reads: work.reads, writes: work.writes };
    product.make_template(TEMPLATE, orders)?;
    let image = memory_file(&guest::image(usize::try_from(MEMORY_MIB << 20)?))?;
    let crowd = crowd::measure(&product, TEMPLATE, &image, (machines, work))?;
    print(&crowd)
}
