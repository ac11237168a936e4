//! What a fault costs: bare, through a pool, and when the page is there.

use std::os::fd::AsFd;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::bare::BareHandler;
use crate::family::Fork;
use crate::figures::Spread;
use crate::guest::DATA_PAGE;
use crate::orders::Kind;
use crate::pools::{self, Pool};

/// Faults of a thread in a process of its own, answered by another process.
#[derive(Debug, Serialize)]
pub struct Faults {
    /// One thread that polls, reads and copies; nothing else.
    pub bare_us: Spread,
    /// The same thread, but it copies into a file that the process maps
    /// privately, and wakes it: the least that shares a page between forks.
    pub bare_shared_us: Spread,
    /// Through a pool whose pages lie decoded and verified in memory.
    pub pool_memory_us: Spread,
    /// The median of that by the bare median.
    pub pool_memory_to_bare_p50_ratio: f64,
    /// The median of that by the bare shared median.
    pub pool_memory_to_bare_shared_p50_ratio: f64,
    /// Through a pool over a store: read, checksum, decompression and hash.
    /// Each fault reads a frame of up to 16 pages.
    pub pool_store_us: Spread,
    /// The same, divided by the pages that it installed.
    pub pool_store_per_page_us: f64,
    /// A page that another fork had fetched: no process is asked.
    pub resident_us: Spread,
}

/// Pages touched before another kind has its turn, so that what the host does
/// besides meets all of them alike.
const TURN: u64 = 100;

/// Measures all of them on fresh pools.
pub fn measure(memory: &Pool, store: &Pool, pages: u64) -> Result<Faults> {
    let data = pages - DATA_PAGE;
    let bare = Fork::start()?;
    let mapped = bare.map(Kind::Anonymous { len: pages * 4096 }, None)?;
    let _handler = BareHandler::start(mapped.userfault.context("a userfaultfd")?)?;
    let file = pools::memory_file(&[])?;
    file.set_len(pages * 4096)?;
    let shared = Fork::start()?;
    let mapped = shared.map(Kind::Pooled, Some(file.as_fd()))?;
    let userfault = mapped.userfault.context("a userfaultfd")?;
    let _beside = BareHandler::start_beside(userfault, &file, mapped.address)?;
    let through_memory = attached(memory)?;
    let through_store = attached(store)?;

    let (mut bare_ns, mut shared_ns) = (Vec::new(), Vec::new());
    let (mut memory_ns, mut store_ns) = (Vec::new(), Vec::new());
    // The first turn warms everything up and is not counted.
    let turns = (data / 16 / TURN).clamp(2, 20);
    for turn in 0..turns {
        let first = DATA_PAGE + turn * TURN * 16;
        for (fork, taken) in [
            (&bare, &mut bare_ns),
            (&shared, &mut shared_ns),
            (&through_memory, &mut memory_ns),
            (&through_store, &mut store_ns),
        ] {
            let ns = fork.touch(first, 16, TURN)?;
            if turn > 0 {
                taken.extend(ns);
            }
        }
    }
    let later = attached(store)?;
    let resident = later.touch(DATA_PAGE, 16, turns * TURN)?;

    let stats = store.stats()?;
    let store_total: u64 = store_ns.iter().sum();
    let bare_us = Spread::of_ns_in_us(bare_ns);
    let bare_shared_us = Spread::of_ns_in_us(shared_ns);
    let pool_memory_us = Spread::of_ns_in_us(memory_ns);
    let pages_per_fault =
        crate::figures::real(stats.resident_pages) / crate::figures::real(stats.frames_read.max(1));
    let mean_us = crate::figures::real(store_total)
        / 1000.0
        / crate::figures::real((store_ns.len() as u64).max(1));
    Ok(Faults {
        pool_memory_to_bare_p50_ratio: pool_memory_us.p50 / bare_us.p50,
        pool_memory_to_bare_shared_p50_ratio: pool_memory_us.p50 / bare_shared_us.p50,
        bare_us,
        bare_shared_us,
        pool_memory_us,
        pool_store_us: Spread::of_ns_in_us(store_ns),
        pool_store_per_page_us: mean_us / pages_per_fault,
        resident_us: Spread::of_ns_in_us(resident),
    })
}

fn attached(pool: &Pool) -> Result<Fork> {
    let fork = Fork::start()?;
    let mapped = fork.map(Kind::Pooled, Some(pool.memory().as_fd()))?;
    pool.attach(&mapped)?;
    Ok(fork)
}
