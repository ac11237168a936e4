//! What it costs to find the pages that a machine has changed.

use std::os::fd::AsFd;

use anyhow::{Result, ensure};
use coppice_runtime::protocol::PageRun;
use serde::Serialize;

use crate::family::{Fork, Mapped};
use crate::figures::{Spread, real};
use crate::guest::Walk;
use crate::machine::Stopwatch;
use crate::orders::{Kind, Order};
use crate::pools::Pool;

/// Scans from another process, through the descriptor that was handed over.
#[derive(Debug, Serialize)]
pub struct DirtyScan {
    /// Mapped pages of the machine.
    pub mapped_pages: u64,
    /// One scan when no page is dirty.
    pub clean_us: Spread,
    /// That for a GiB of mapped pages, from the median.
    pub clean_us_per_mapped_gib: f64,
    /// Dirty pages, scattered, in the second series.
    pub dirty_pages: u64,
    /// One scan then.
    pub dirty_us: Spread,
    /// What each dirty page added, from the medians.
    pub added_ns_per_dirty_page: f64,
}

const SCANS: usize = 30;

/// Maps a resident pool whole, and dirties a sixteenth of it. The guest's
/// own walk says which pages must be found.
pub fn measure(pool: &Pool, mask: u64) -> Result<DirtyScan> {
    let fork = Fork::start()?;
    let mapped = fork.map(Kind::Pooled, Some(pool.memory().as_fd()))?;
    pool.attach(&mapped)?;
    fork.touch(0, 1, mapped.len / 4096)?;
    fork.order(&Order::Populate, &[])?;
    fork.order(&Order::Run, &[])?;
    let range = mapped.address..mapped.address + mapped.len;
    let mapped_pages = mapped.pagemap.count(range)?.shared;
    let (clean_us, clean) = scans(&mapped)?;
    ensure!(clean.is_empty(), "a machine that has written nothing has dirty pages: {clean:?}");

    let walk = Walk::scattered(1, (mask + 1) / 16, mask, true);
    fork.walk(walk)?;
    let (dirty_us, dirty) = scans(&mapped)?;
    let mut written = walk.pages();
    written.sort_unstable();
    let found: Vec<u64> = dirty.iter().flat_map(|run| run.first..run.first + run.count).collect();
    ensure!(found == written, "the scan found {} pages of {}", found.len(), written.len());
    Ok(DirtyScan {
        mapped_pages,
        clean_us_per_mapped_gib: clean_us.p50 * real((1 << 30) / 4096) / real(mapped_pages.max(1)),
        added_ns_per_dirty_page: (dirty_us.p50 - clean_us.p50) * 1000.0 / real(walk.count),
        clean_us,
        dirty_pages: walk.count,
        dirty_us,
    })
}

fn scans(mapped: &Mapped) -> Result<(Spread, Vec<PageRun>)> {
    let mut taken = Vec::new();
    let mut found = Vec::new();
    for _ in 0..SCANS {
        let mut watch = Stopwatch::start();
        found = mapped.pagemap.dirty(mapped.address..mapped.address + mapped.len)?;
        taken.push(watch.lap_ns());
    }
    Ok((Spread::of_ns_in_us(taken), found))
}
