//! What one more fork costs the host in memory, and in which parts.

use std::fs::File;
use std::os::fd::AsFd;

use anyhow::Result;
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
    /// What the host had less, the pool's growth not included.
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
    /// Host memory of one by the other.
    pub pooled_to_bare_host_ratio: f64,
    /// What the pool grew by for all of them together.
    pub pool_growth_kib: i64,
}

const READS: u64 = 1000;
const WRITES: u64 = 50;

/// Measures `machines` bare ones, and then as many on the pool.
pub fn measure(image: &File, pool: &Pool, machines: u32, mask: u64) -> Result<Density> {
    let (bare, _) = series(machines, mask, || {
        let fork = Fork::start()?;
        let mapped = fork.map(Kind::Bare, Some(image.as_fd()))?;
        Ok((fork, mapped))
    })?;
    let (pooled, pool_growth_kib) = series(machines, mask, || {
        let fork = Fork::start()?;
        let mapped = fork.map(Kind::Pooled, Some(pool.memory().as_fd()))?;
        pool.attach(&mapped)?;
        Ok((fork, mapped))
    })?;
    Ok(Density {
        machines,
        read_pages: READS,
        written_pages: WRITES,
        pooled_to_bare_host_ratio: pooled.host_kib / bare.host_kib,
        bare,
        pooled,
        pool_growth_kib,
    })
}

fn series(
    machines: u32,
    mask: u64,
    make: impl Fn() -> Result<(Fork, Mapped)>,
) -> Result<(PerFork, i64)> {
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
    Ok((
        PerFork {
            host_kib,
            guest_private_kib,
            guest_shared_kib: Spread::of(counts.iter().map(|counts| real(counts.shared * 4))),
            page_tables_kib: spread(&processes, |process| process.page_tables_kib),
            vmm_private_kib: spread(&processes, |process| process.private_kib),
            vmm_shared_part_kib: spread(&processes, |process| process.shared_part_kib),
            kvm_page_tables_kib: each(spent.kvm_page_tables_kib),
            kernel_slab_kib: each(spent.slab_kib),
            kvm_and_kernel_kib: host_kib
                - private_mean
                - mean(&|process| process.page_tables_kib)
                - mean(&|process| process.private_kib),
        },
        spent.shmem_kib,
    ))
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
