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

const SCANS: usize = 40;

/// Maps a resident pool whole in two forks, dirties a sixteenth of the one,
/// and scans both in turn. The guest's own walk says which pages must be
/// found.
pub fn measure(pool: &Pool, mask: u64) -> Result<DirtyScan> {
    let (_idle, untouched) = mapped_whole(pool)?;
    let (busy, written) = mapped_whole(pool)?;
    let walk = Walk::scattered(1, (mask + 1) / 16, mask, true);
    busy.walk(walk)?;

    let (mut clean_ns, mut dirty_ns) = (Vec::new(), Vec::new());
    for _ in 0..SCANS {
        let (ns, none) = scan(&untouched)?;
        ensure!(none.is_empty(), "a machine that wrote nothing has dirty pages: {none:?}");
        clean_ns.push(ns);
        let (ns, found) = scan(&written)?;
        let found: Vec<u64> =
            found.iter().flat_map(|run| run.first..run.first + run.count).collect();
        let mut expected = walk.pages();
        expected.sort_unstable();
        ensure!(found == expected, "the scan found {} of {}", found.len(), expected.len());
        dirty_ns.push(ns);
    }
    let mapped_pages = untouched.pagemap.count(range(&untouched))?.shared;
    let (clean_us, dirty_us) = (Spread::of_ns_in_us(clean_ns), Spread::of_ns_in_us(dirty_ns));
    Ok(DirtyScan {
        mapped_pages,
        clean_us_per_mapped_gib: clean_us.p50 * real((1 << 30) / 4096) / real(mapped_pages.max(1)),
        added_ns_per_dirty_page: (dirty_us.p50 - clean_us.p50) * 1000.0 / real(walk.count),
        clean_us,
        dirty_pages: walk.count,
        dirty_us,
    })
}

fn mapped_whole(pool: &Pool) -> Result<(Fork, Mapped)> {
    let fork = Fork::start()?;
    let mapped = fork.map(Kind::Pooled, Some(pool.memory().as_fd()))?;
    pool.attach(&mapped)?;
    fork.touch(0, 1, mapped.len / 4096)?;
    fork.order(&Order::Populate, &[])?;
    fork.order(&Order::Run, &[])?;
    Ok((fork, mapped))
}

fn scan(mapped: &Mapped) -> Result<(u64, Vec<PageRun>)> {
    let mut watch = Stopwatch::start();
    let found = mapped.pagemap.dirty(range(mapped))?;
    Ok((watch.lap_ns(), found))
}

fn range(mapped: &Mapped) -> std::ops::Range<u64> {
    mapped.address..mapped.address + mapped.len
}
