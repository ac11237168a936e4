//! What one more fork costs the host in memory, and in which parts.

use std::fs::File;
use std::os::fd::AsFd;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::accounting::{Host, Process};
use crate::family::{Fork, Mapped};
use crate::figures::{Spread, real};
use crate::guest::Walk;
use crate::orders::{Kind, Order};
use crate::pools::Pool;

/// Memory of one fork, in KiB, the mean over all unless it is a spread.
#[derive(Debug, Serialize)]
pub struct PerFork {
    /// All parts that the kernel accounts for, each from its own account:
    /// private guest pages, page tables of process and hypervisor, the process
    /// and the kernel's small objects.
    pub parts_kib: f64,
    /// What the host had less, the pool's growth not included. Whatever else
    /// the host does meanwhile is in it: it means something on a quiet host.
    pub host_kib: f64,
    /// Guest pages of its own: what it wrote.
    pub guest_private_kib: Spread,
    /// Guest pages that it shares with all others.
    pub guest_shared_kib: Spread,
    /// Page tables of its process.
    pub page_tables_kib: Spread,
    /// Its process: what only it has.
    pub vmm_private_kib: Spread,
    /// Its process: its part of the program and the libraries.
    pub vmm_shared_part_kib: Spread,
    /// Page tables of the hypervisor, where the kernel counts them.
    pub kvm_page_tables_kib: f64,
    /// Small objects of the kernel, those of KVM among them.
    pub kernel_slab_kib: f64,
    /// KVM and all else of the kernel: what the host had less, without the
    /// guest's private pages, the page tables and the process.
    pub kvm_and_kernel_kib: f64,
}

/// Both kinds, and what the shared memory of the pooled one costs.
#[derive(Debug, Serialize)]
pub struct Density {
    /// Machines of each kind, one process each, alive at the same time.
    pub machines: u32,
    /// Pages that each guest reads, scattered.
    pub read_pages: u64,
    /// Pages that each guest writes, scattered.
    pub written_pages: u64,
    /// A process and a machine on a private mapping of a memory file.
    pub bare: PerFork,
    /// A process and a machine on a pool.
    pub pooled: PerFork,
    /// The parts of one by those of the other.
    pub pooled_to_bare_parts_ratio: f64,
    /// Host memory of one by the other, on a quiet host.
    pub pooled_to_bare_host_ratio: f64,
    /// What the pool grew by for all of them together.
    pub pool_growth_kib: u64,
}

/// Series of each kind, in turn; the median is told.
const SERIES: usize = 3;

const READS: u64 = 1000;
const WRITES: u64 = 50;

/// Measures series of `machines` bare ones and of as many on the pool.
pub fn measure(image: &File, pool: &Pool, machines: u32, mask: u64) -> Result<Density> {
    let make_bare = || {
        let fork = Fork::start()?;
        let mapped = fork.map(Kind::Bare, Some(image.as_fd()))?;
        Ok((fork, mapped))
    };
    let make_pooled = || {
        let fork = Fork::start()?;
        let mapped = fork.map(Kind::Pooled, Some(pool.memory().as_fd()))?;
        pool.attach(&mapped)?;
        Ok((fork, mapped))
    };
    let resident_before = pool.stats()?.resident_pages;
    let (mut bare, mut pooled) = (Vec::new(), Vec::new());
    for _ in 0..SERIES {
        bare.push(series(machines, mask, make_bare)?);
        pooled.push(series(machines, mask, make_pooled)?);
    }
    let (bare, pooled) = (median(bare)?, median(pooled)?);
    let pool_growth_pages = pool.stats()?.resident_pages - resident_before;
    Ok(Density {
        machines,
        read_pages: READS,
        written_pages: WRITES,
        pooled_to_bare_parts_ratio: pooled.parts_kib / bare.parts_kib,
        pooled_to_bare_host_ratio: pooled.host_kib / bare.host_kib,
        bare,
        pooled,
        pool_growth_kib: pool_growth_pages * 4,
    })
}

/// The series in the middle: other processes of the host come
/// and go, and their memory is in the same account.
fn median(mut all: Vec<PerFork>) -> Result<PerFork> {
    all.sort_by(|a, b| a.parts_kib.total_cmp(&b.parts_kib));
    let middle = all.len() / 2;
    all.into_iter().nth(middle).context("at least one series")
}

fn series(machines: u32, mask: u64, make: impl Fn() -> Result<(Fork, Mapped)>) -> Result<PerFork> {
    // One that comes and goes, so that nothing is counted that only the first costs.
    drop(lived(&make, mask)?);
    let before = Host::now()?;
    let forks: Result<Vec<_>> = (0..machines).map(|_| lived(&make, mask)).collect();
    let forks = forks?;
    let spent = Host::now()? - before;
    let processes: Result<Vec<_>> =
        forks.iter().map(|(fork, mapped)| Process::of(fork.pid(), mapped.address)).collect();
    let processes = processes?;
    let counts: Result<Vec<_>> = forks
        .iter()
        .map(|(_, mapped)| Ok(mapped.pagemap.count(mapped.address..mapped.address + mapped.len)?))
        .collect();
    let counts = counts?;

    let each = |kib: i64| signed(kib) / f64::from(machines.max(1));
    let mean = |part: &dyn Fn(&Process) -> i64| each(processes.iter().map(part).sum());
    let host_kib = each(spent.used_kib - spent.shmem_kib);
    let guest_private = counts.iter().map(|counts| counts.private * 4);
    let guest_private_kib = Spread::of(guest_private.clone().map(real));
    let private_mean = real(guest_private.sum()) / f64::from(machines.max(1));
    let known_kib = private_mean
        + mean(&|process| process.page_tables_kib)
        + mean(&|process| process.private_kib);
    let (kvm_page_tables_kib, kernel_slab_kib) =
        (each(spent.kvm_page_tables_kib), each(spent.slab_kib));
    Ok(PerFork {
        parts_kib: known_kib + kvm_page_tables_kib + kernel_slab_kib,
        host_kib,
        guest_private_kib,
        guest_shared_kib: Spread::of(counts.iter().map(|counts| real(counts.shared * 4))),
        page_tables_kib: spread(&processes, |process| process.page_tables_kib),
        vmm_private_kib: spread(&processes, |process| process.private_kib),
        vmm_shared_part_kib: spread(&processes, |process| process.shared_part_kib),
        kvm_page_tables_kib,
        kernel_slab_kib,
        kvm_and_kernel_kib: host_kib - known_kib,
    })
}

/// A fork that has run, read and written.
fn lived(make: impl Fn() -> Result<(Fork, Mapped)>, mask: u64) -> Result<(Fork, Mapped)> {
    let (fork, mapped) = make()?;
    fork.order(&Order::Run, &[])?;
    fork.walk(Walk::scattered(11, READS.min(mask), mask, false))?;
    fork.walk(Walk::scattered(11, WRITES.min(mask), mask, true))?;
    Ok((fork, mapped))
}

fn spread(processes: &[Process], part: fn(&Process) -> i64) -> Spread {
    Spread::of(processes.iter().map(|process| signed(part(process))))
}

fn signed(kib: i64) -> f64 {
    real(kib.unsigned_abs()) * if kib < 0 { -1.0 } else { 1.0 }
}
