//! Measures the mechanisms of forking and prints one JSON document.

use anyhow::{Context, Result, ensure};
use clap::Parser;
use coppice_benches::density::{self, Density};
use coppice_benches::dirty::{self, DirtyScan};
use coppice_benches::faults::{self, Faults};
use coppice_benches::forks::{self, Forks};
use coppice_benches::guest::{self, DATA_PAGE};
use coppice_benches::pools::{Pool, memory_file};
use coppice_benches::role::{Role, print};
use serde::Serialize;

/// Measures fork, fault, dirty scan and memory per fork, each beside the bare
/// kernel primitive, with a guest that runs in ring 3.
#[derive(Debug, Parser)]
struct Arguments {
    /// Forks alive at the same time when memory is measured, and processes
    /// in which forking is timed.
    #[arg(long, default_value_t = 100)]
    forks: u32,
    /// Guest memory in MiB: a power of two from 16 to 16384.
    #[arg(long, default_value_t = 256)]
    memory: u64,
    /// Machines of each kind that every process makes when forking is timed.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    #[command(subcommand)]
    role: Option<Role>,
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Report {
    host: HostFacts,
    memory_mib: u64,
    fork: Forks,
    fault: Faults,
    dirty_scan: DirtyScan,
    memory_per_fork: Density,
}

/// What the figures depend on.
#[derive(Debug, Serialize)]
struct HostFacts {
    kernel: String,
    cpu: String,
    cpus: usize,
    /// The hypervisor module that is loaded, as far as `/sys/module` says.
    kvm: Vec<String>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    match arguments.role {
        None => measure(&arguments),
        Some(role) => role.play(),
    }
}

fn measure(arguments: &Arguments) -> Result<()> {
    let mib = arguments.memory;
    ensure!(
        mib.is_power_of_two() && (16..=16384).contains(&mib),
        "--memory must be a power of two from 16 to 16384"
    );
    let image = memory_file(&guest::image(usize::try_from(mib << 20)?))?;
    let folder = tempfile::tempdir().context("a folder for the store")?;
    let pages = mib * 256;
    // The largest power of two of data pages.
    let mask = (1 << (pages - DATA_PAGE).ilog2()) - 1;

    say("faults");
    let fault = faults::measure(&image, pages)?;
    say("forks");
    let store = Pool::in_store(&image, folder.path())?;
    forks::run_template(&store)?;
    let fork = forks::measure(&image, &store, arguments.forks, arguments.rounds)?;
    say("dirty scan");
    let dirty_scan = dirty::measure(&store, mask)?;
    say("memory");
    let memory_per_fork = density::measure(&image, &store, arguments.forks, mask)?;
    let report =
        Report { host: host_facts(), memory_mib: mib, fork, fault, dirty_scan, memory_per_fork };
    print(&report)
}

fn say(what: &str) {
    eprintln!("measuring: {what}");
}

fn host_facts() -> HostFacts {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find(|line| line.starts_with("model name"));
    let cpu = model.and_then(|line| line.split(": ").nth(1)).unwrap_or("unknown").to_owned();
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let modules = std::fs::read_dir("/sys/module").into_iter().flatten().flatten();
    let names = modules.map(|entry| entry.file_name().to_string_lossy().into_owned());
    HostFacts {
        kernel: kernel.trim().to_owned(),
        cpu,
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        kvm: names.filter(|name| name.starts_with("kvm_")).collect(),
    }
}
