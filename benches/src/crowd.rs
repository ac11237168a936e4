//! What forks of the product cost when there are thousands, beside as many
//! processes with a bare machine each that do the same work.

use std::fs::File;
use std::os::fd::AsFd;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::accounting::{Host, group_kib, private_kib};
use crate::family::Fork;
use crate::figures::{Spread, real};
use crate::guest::Walk;
use crate::kernel::{self, DATA_PAGES, SEED};
use crate::orders::{Kind, Order};
use crate::product::Product;

/// Machines that are made at once.
const BATCH: u32 = 95;
/// Machines that are made one by one after each batch, so that nobody else of
/// them works while each does.
const SINGLES: u32 = 5;
/// Bare machines; more say the same.
const BARE_MAX: u32 = 1000;

/// Pages that a machine reads, and pages that it writes.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Work {
    /// Pages to read, scattered over 128 MiB.
    pub reads: u32,
    /// Of these, pages to write.
    pub writes: u32,
}

/// Memory of one machine, in KiB: the growth of the account by the number of
/// machines.
#[derive(Debug, Serialize)]
pub struct PerMachine {
    /// By `/proc/meminfo`: what the host had less, shared memory left out. On a
    /// host that does other things too this is not evidence.
    pub host_kib: f64,
    /// By the memory control group that the bench runs in, if there is one,
    /// caches of files left out.
    pub group_kib: Option<f64>,
    /// The sum of the parts below.
    pub accounts_kib: f64,
    /// Its process, with the guest's pages of its own.
    pub process_kib: f64,
    /// Page tables of its process.
    pub page_tables_kib: f64,
    /// Supervisor and page server, for each machine.
    pub servers_kib: f64,
    /// Page tables of the hypervisor.
    pub kvm_page_tables_kib: f64,
    /// Stacks of its threads in the kernel.
    pub kernel_stacks_kib: f64,
    /// Small objects of the kernel.
    pub slab_kib: f64,
    /// What the kernel maps piece by piece.
    pub vmalloc_kib: f64,
    /// What the kernel has for each CPU.
    pub percpu_kib: f64,
}

/// What was measured.
#[derive(Debug, Serialize)]
pub struct Crowd {
    /// Machines of each kind.
    pub machines: u32,
    /// What each did.
    pub work: Work,
    /// Forks of the product.
    pub forks: PerMachine,
    /// A process for each machine, on a private mapping of a file.
    pub bare: PerMachine,
    /// The sum of the parts by what the group says, or by what the host says.
    pub accounts_to_measured_ratio: f64,
    /// A fork by a bare machine, all parts.
    pub forks_to_bare_ratio: f64,
    /// The parts of a bare machine without the memory of its program: the least
    /// that any process with such a machine takes.
    pub least_bare_kib: f64,
    /// 1.3 of that, and 512 KiB.
    pub bound_kib: f64,
    /// For each hundred, from the request until all of a batch run, for one machine.
    pub fork_us_by_hundred: Vec<f64>,
    /// The median of single forks, from the request until the vCPU runs.
    pub single_us_by_hundred: Vec<f64>,
    /// The median of what their reads took, in ticks of the clock.
    pub read_ticks_by_hundred: Vec<f64>,
    /// The same for the writes.
    pub write_ticks_by_hundred: Vec<f64>,
    /// The last five hundred by the first five hundred (or halves of fewer).
    pub fork_last_to_first_ratio: f64,
    /// The same for single forks.
    pub single_last_to_first_ratio: f64,
    /// The same for reads.
    pub read_last_to_first_ratio: f64,
    /// The same for writes.
    pub write_last_to_first_ratio: f64,
}

/// All accounts at one moment.
struct Accounts {
    host: Host,
    group: Option<i64>,
    processes: i64,
    page_tables: i64,
    servers: i64,
}

impl Accounts {
    fn of(machines: &[u32], servers: &[u32]) -> Result<Self> {
        let (host, group) = (Host::now()?, group_kib());
        let sum = |pids: &[u32]| -> Result<(i64, i64)> {
            pids.iter().try_fold((0, 0), |(private, tables), pid| {
                let (more, more_tables) = private_kib(*pid)?;
                Ok((private + more, tables + more_tables))
            })
        };
        let ((processes, page_tables), (served, server_tables)) = (sum(machines)?, sum(servers)?);
        Ok(Self { host, group, processes, page_tables, servers: served + server_tables })
    }

    fn since(&self, before: &Self, machines: u32) -> PerMachine {
        let each = |kib: i64| {
            real(kib.unsigned_abs()) * if kib < 0 { -1.0 } else { 1.0 } / f64::from(machines)
        };
        let host = self.host - before.host;
        let mut parts = PerMachine {
            host_kib: each(host.used_kib - host.shmem_kib),
            group_kib: self.group.zip(before.group).map(|(now, then)| each(now - then)),
            accounts_kib: 0.0,
            process_kib: each(self.processes - before.processes),
            page_tables_kib: each(self.page_tables - before.page_tables),
            servers_kib: each(self.servers - before.servers),
            kvm_page_tables_kib: each(host.kvm_page_tables_kib),
            kernel_stacks_kib: each(host.kernel_stacks_kib),
            slab_kib: each(host.slab_kib),
            vmalloc_kib: each(host.vmalloc_kib),
            percpu_kib: each(host.percpu_kib),
        };
        parts.accounts_kib = parts.process_kib
            + parts.page_tables_kib
            + parts.servers_kib
            + parts.kvm_page_tables_kib
            + parts.kernel_stacks_kib
            + parts.slab_kib
            + parts.vmalloc_kib
            + parts.percpu_kib;
        parts
    }
}

/// Measures `machines` forks of a template that does this work, and as many
/// bare ones.
pub fn measure(
    product: &Product,
    template: &str,
    image: &File,
    (machines, work): (u32, Work),
) -> Result<Crowd> {
    let mut hundreds = Hundreds::default();
    // One that comes before, so that nothing is counted that only the first costs.
    hundreds.make(product, template)?;
    let machines_before = SINGLES + BATCH;
    hundreds = Hundreds::default();
    let (pids, servers) = product.processes()?;
    let before = Accounts::of(&pids, &servers)?;
    for number in 1..=machines / machines_before {
        hundreds.make(product, template)?;
        eprintln!("measuring: {} machines", number * machines_before);
    }
    let (pids, servers) = product.processes()?;
    let forks = Accounts::of(&pids, &servers)?.since(&before, machines);
    product.end()?;
    eprintln!("measuring: bare machines");
    let bare = bare(image, machines.min(BARE_MAX), work)?;
    let least_bare_kib = bare.accounts_kib - bare.process_kib + 4.0 * f64::from(work.writes);
    let measured = forks.group_kib.unwrap_or(forks.host_kib);
    Ok(Crowd {
        machines,
        work,
        accounts_to_measured_ratio: forks.accounts_kib / measured,
        forks_to_bare_ratio: forks.accounts_kib / bare.accounts_kib,
        least_bare_kib,
        bound_kib: least_bare_kib * 1.3 + 512.0,
        forks,
        bare,
        fork_last_to_first_ratio: last_to_first(&hundreds.fork_us),
        single_last_to_first_ratio: last_to_first(&hundreds.singles),
        read_last_to_first_ratio: last_to_first(&hundreds.reads),
        write_last_to_first_ratio: last_to_first(&hundreds.writes),
        fork_us_by_hundred: hundreds.fork_us,
        single_us_by_hundred: hundreds.singles,
        read_ticks_by_hundred: hundreds.reads,
        write_ticks_by_hundred: hundreds.writes,
    })
}

#[derive(Debug, Default)]
struct Hundreds {
    fork_us: Vec<f64>,
    singles: Vec<f64>,
    reads: Vec<f64>,
    writes: Vec<f64>,
}

impl Hundreds {
    /// Forks a hundred, and waits until all have done their work.
    fn make(&mut self, product: &Product, template: &str) -> Result<()> {
        let forked = product.fork(template, BATCH)?;
        for name in &forked.names {
            product.wait_for(name, kernel::said)?;
        }
        let (mut singles, mut reads, mut writes) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..SINGLES {
            let single = product.fork(template, 1)?;
            singles.extend(single.ready_us.iter().copied().map(real));
            for name in &single.names {
                let (read, written) = product.wait_for(name, kernel::said)?;
                reads.push(f64::from(read));
                writes.push(f64::from(written));
            }
        }
        self.fork_us.push(real(forked.all_ready_us) / f64::from(BATCH));
        self.singles.push(Spread::of(singles).p50);
        self.reads.push(Spread::of(reads).p50);
        self.writes.push(Spread::of(writes).p50);
        Ok(())
    }
}

/// The median of the last by that of the first.
fn last_to_first(all: &[f64]) -> f64 {
    let some = (all.len() / 2).clamp(1, 5).min(all.len());
    let median = |part: &[f64]| Spread::of(part.iter().copied()).p50;
    median(&all[all.len() - some..]) / median(&all[..some])
}

fn bare(image: &File, machines: u32, work: Work) -> Result<PerMachine> {
    drop(bare_machine(image, work)?);
    let before = Accounts::of(&[], &[])?;
    let forks: Result<Vec<Fork>> = (0..machines).map(|_| bare_machine(image, work)).collect();
    let forks = forks?;
    let pids: Vec<u32> = forks.iter().map(Fork::pid).collect();
    Ok(Accounts::of(&pids, &[])?.since(&before, machines))
}

fn bare_machine(image: &File, work: Work) -> Result<Fork> {
    let fork = Fork::start()?;
    fork.map(Kind::Bare, Some(image.as_fd()))?;
    fork.order(&Order::Run, &[]).context("a bare machine")?;
    let mask = DATA_PAGES - 1;
    fork.walk(Walk::scattered(SEED, u64::from(work.reads), mask, false))?;
    fork.walk(Walk::scattered(SEED, u64::from(work.writes), mask, true))?;
    Ok(fork)
}
