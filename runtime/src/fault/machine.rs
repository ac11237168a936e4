//! A machine whose faults are served.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use super::capture::Captures;
use super::pool::Pool;
use super::touched::Touched;
use crate::protocol::{Content, MachineFaults, MachineKey, PAGE_SIZE, PageRun, PoolId, Region};
use crate::sys::userfault::Userfault;

/// A mapping of a pool in a machine's process.
#[derive(Debug)]
pub(super) struct Mapped {
    pub(super) pool: Arc<Pool>,
    pub(super) region: Region,
}

/// An attached machine. What it counts is only ever added to.
#[derive(Debug)]
pub(super) struct Machine {
    pub(super) key: MachineKey,
    pub(super) userfault: Userfault,
    /// In the order of their addresses.
    mapped: Vec<Mapped>,
    /// What is being captured of it.
    pub(super) captures: Captures,
    /// What it touched first.
    pub(super) touched: Touched,
    /// Whether it is not served any more.
    pub(super) gone: AtomicBool,
    pub(super) faults: AtomicU64,
    pub(super) store_faults: AtomicU64,
    pub(super) pages_installed: AtomicU64,
}

impl Machine {
    pub(super) fn new(key: MachineKey, userfault: Userfault, mut mapped: Vec<Mapped>) -> Self {
        mapped.sort_by_key(|mapped| mapped.region.address);
        Self {
            key,
            userfault,
            mapped,
            captures: Captures::default(),
            touched: Touched::default(),
            gone: AtomicBool::new(false),
            faults: AtomicU64::new(0),
            store_faults: AtomicU64::new(0),
            pages_installed: AtomicU64::new(0),
        }
    }

    /// The pool and the page that an address shows.
    pub(super) fn find(&self, address: u64) -> Option<(&Arc<Pool>, u64)> {
        let behind = self.mapped.partition_point(|mapped| mapped.region.address <= address);
        let hit = self.mapped.get(behind.checked_sub(1)?)?;
        let inside = address - hit.region.address;
        (inside < hit.region.len).then(|| (&hit.pool, (inside + hit.region.offset) / PAGE_SIZE))
    }

    /// Which pool shows which pages of its memory, in order.
    pub(super) fn memory_pools(&self) -> Vec<(PageRun, Arc<Pool>)> {
        let memory = self.mapped.iter().filter(|mapped| mapped.region.content == Content::Memory);
        let mut pools: Vec<_> = memory
            .map(|Mapped { pool, region }| {
                let first = region.offset / PAGE_SIZE;
                (PageRun { first, count: region.len / PAGE_SIZE }, Arc::clone(pool))
            })
            .collect();
        pools.sort_by_key(|(run, _)| run.first);
        pools
    }

    /// One of its pools.
    pub(super) fn any_pool(&self) -> Option<PoolId> {
        self.mapped.first().map(|mapped| mapped.pool.id())
    }

    /// The pool of one of its mappings.
    pub(super) fn pool(&self, id: PoolId) -> Option<&Arc<Pool>> {
        self.mapped.iter().map(|mapped| &mapped.pool).find(|pool| pool.id() == id)
    }

    /// Whether one of its mappings shows this pool.
    pub(super) fn uses(&self, pool: &Arc<Pool>) -> bool {
        self.mapped.iter().any(|mapped| Arc::ptr_eq(&mapped.pool, pool))
    }

    /// Lets the threads that wait for a page try again. The only way this
    /// fails is that the machine is gone, and then nobody waits.
    pub(super) fn wake(&self, address: u64) {
        drop(self.userfault.wake(address, 4096));
    }

    /// Lets all threads that wait for a page, or to write to one, ask again:
    /// whoever heard them first may have ended.
    pub(super) fn wake_all(&self) {
        let regions = self.mapped.iter().map(|mapped| mapped.region);
        let pooled = regions.map(|region| region.address..region.address + region.len);
        for range in pooled.chain(self.captured_range()) {
            let len = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
            // It fails only if the machine is gone, and then nobody waits.
            drop(self.userfault.wake(range.start, len));
        }
    }

    /// Its counters.
    pub(super) fn counters(&self) -> MachineFaults {
        MachineFaults {
            faults: self.faults.load(Relaxed),
            store_faults: self.store_faults.load(Relaxed),
            pages_installed: self.pages_installed.load(Relaxed),
        }
    }
}

/// A thread of a machine that waits for a page.
#[derive(Debug, Clone)]
pub(super) struct Waiter {
    pub(super) machine: Arc<Machine>,
    /// Start of the page in the machine's process.
    pub(super) address: u64,
    /// Index of the page in the image.
    pub(super) page: u64,
}

impl Waiter {
    pub(super) fn wake(&self) {
        self.machine.wake(self.address);
    }
}
