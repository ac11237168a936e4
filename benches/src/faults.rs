//! What a fault costs: bare, through a pool, and when the page is there.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::Serialize;

use crate::bare::BareHandler;
use crate::family::{Fork, Mapped};
use crate::figures::{Spread, real};
use crate::guest::DATA_PAGE;
use crate::orders::Kind;
use crate::pools::{self, Pool};

/// Faults of a thread in a process of its own, answered by another process.
#[derive(Debug, Serialize)]
pub struct Faults {
    /// Round trips in which nothing is read or decoded, both processes on one
    /// CPU, so that no figure depends on where the scheduler puts them or on
    /// how long an idle CPU takes to wake.
    pub round_trip: RoundTrip,
    /// Through a pool over a store, wherever the scheduler puts the
    /// processes: read, checksum, decompression and hash. Each fault reads a
    /// frame of up to 16 pages.
    pub pool_store_us: Spread,
    /// The mean of that, divided by the pages that it installed.
    pub pool_store_per_page_us: f64,
    /// A page that another fork had fetched: no process is asked.
    pub resident_us: Spread,
}

/// The same fault answered in three ways.
#[derive(Debug, Serialize)]
pub struct RoundTrip {
    /// One thread that polls, reads and copies; nothing else.
    pub bare_us: Spread,
    /// The same thread, but it copies into a file that the process maps
    /// privately, and wakes it: the least that shares a page between forks.
    pub bare_shared_us: Spread,
    /// The page server, whose pages lie decoded and verified in memory.
    pub pool_us: Spread,
    /// The medians of the last and the first.
    pub pool_to_bare_p50_ratio: f64,
    /// The medians of the last and the second.
    pub pool_to_bare_shared_p50_ratio: f64,
}

/// Pages touched before another kind has its turn, so that what the host does
/// besides meets all of them alike.
const TURN: u64 = 100;

/// Pages from one touched page to the next: those of a frame.
const STRIDE: u64 = 16;

/// Measures all of them on fresh pools over the image.
pub fn measure(image: &File, pages: u64) -> Result<Faults> {
    let turns = ((pages - DATA_PAGE) / STRIDE / TURN).clamp(2, 20);
    let round_trip = on_one_cpu(|| round_trips(image, pages, turns))?;

    let folder = tempfile::tempdir().context("a folder for the store")?;
    let store = Pool::in_store(image, folder.path())?;
    let first = attached(&store)?;
    first.touch(DATA_PAGE, STRIDE, TURN)?;
    let cold = first.touch(DATA_PAGE + TURN * STRIDE, STRIDE, (turns - 1) * TURN)?;
    let later = attached(&store)?;
    let resident = later.touch(DATA_PAGE, STRIDE, turns * TURN)?;

    let stats = store.stats()?;
    let pages_per_frame = real(stats.resident_pages) / real(stats.frames_read.max(1));
    let mean_us = real(cold.iter().sum()) / 1000.0 / real((cold.len() as u64).max(1));
    Ok(Faults {
        round_trip,
        pool_store_us: Spread::of_ns_in_us(cold),
        pool_store_per_page_us: mean_us / pages_per_frame,
        resident_us: Spread::of_ns_in_us(resident),
    })
}

/// Whatever `measured` starts inherits the CPU.
fn on_one_cpu<T>(measured: impl FnOnce() -> Result<T>) -> Result<T> {
    let everywhere = sched_getaffinity(None).context("sched_getaffinity")?;
    let first = (0..CpuSet::MAX_CPU).find(|cpu| everywhere.is_set(*cpu));
    let mut one = CpuSet::new();
    one.set(first.context("a CPU")?);
    sched_setaffinity(None, &one).context("sched_setaffinity")?;
    let result = measured();
    sched_setaffinity(None, &everywhere).context("sched_setaffinity")?;
    result
}

fn round_trips(image: &File, pages: u64, turns: u64) -> Result<RoundTrip> {
    let bare = Fork::start()?;
    let mapped = bare.map(Kind::Anonymous { len: pages * 4096 }, None)?;
    let _handler = BareHandler::start(userfault_of(&mapped)?)?;
    let file = pools::memory_file(&[])?;
    file.set_len(pages * 4096)?;
    let shared = Fork::start()?;
    let mapped = shared.map(Kind::Pooled, Some(file.as_fd()))?;
    let _beside = BareHandler::start_beside(userfault_of(&mapped)?, &file, mapped.address)?;
    let memory = Pool::in_memory(image)?;
    let pooled = attached(&memory)?;

    let (mut bare_ns, mut shared_ns, mut pool_ns) = (Vec::new(), Vec::new(), Vec::new());
    for turn in 0..turns {
        let first = DATA_PAGE + turn * TURN * STRIDE;
        let ways = [(&bare, &mut bare_ns), (&shared, &mut shared_ns), (&pooled, &mut pool_ns)];
        for (fork, taken) in ways {
            let ns = fork.touch(first, STRIDE, TURN)?;
            // The first turn warms everything up and is not counted.
            if turn > 0 {
                taken.extend(ns);
            }
        }
    }
    let [bare_us, bare_shared_us, pool_us] = [bare_ns, shared_ns, pool_ns].map(Spread::of_ns_in_us);
    Ok(RoundTrip {
        pool_to_bare_p50_ratio: pool_us.p50 / bare_us.p50,
        pool_to_bare_shared_p50_ratio: pool_us.p50 / bare_shared_us.p50,
        bare_us,
        bare_shared_us,
        pool_us,
    })
}

fn userfault_of(mapped: &Mapped) -> Result<OwnedFd> {
    Ok(mapped.userfault.as_ref().context("a userfaultfd")?.try_clone()?)
}

fn attached(pool: &Pool) -> Result<Fork> {
    let fork = Fork::start()?;
    let mapped = fork.map(Kind::Pooled, Some(pool.memory().as_fd()))?;
    pool.attach(&mapped)?;
    Ok(fork)
}
