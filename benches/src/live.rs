//! How long a machine stands still when it is captured live, and whether what
//! was captured is one instant.
//!
//! The guest writes page after page of a window, round and round; the word in
//! each page tells which step of the walk wrote it. At any instant the words
//! of the window are consecutive numbers that end at the guest's own counter.
//! A captured window that is anything else has a page that was copied too
//! late, or a page of which one half was.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use coppice_runtime::protocol::{MachineKey, PoolId};
use serde::Serialize;

use crate::family::{Fork, Mapped};
use crate::figures::{Spread, real};
use crate::guest::{self, DATA_PAGE, Walk};
use crate::machine::Stopwatch;
use crate::orders::{Answer, Kind, Order};
use crate::pools::{Pool, memory_file};

/// Pages that the guest writes all the time.
const WINDOW: u64 = 512;

/// The pauses of one size of machine.
#[derive(Debug, Serialize)]
pub struct Live {
    /// Guest memory in MiB; every page of it is mapped.
    pub memory_mib: u64,
    /// Pages that the guest had written, all over its memory.
    pub dirty_pages: u64,
    /// What the pause may take: 2 ms, 12 ms for each mapped GiB and 1 us for
    /// each dirty page.
    pub bound_us: f64,
    /// From the order to stop until the guest was told to go on.
    pub pause_us: Spread,
    /// Of that: until the vCPU stood still.
    pub stop_us: Spread,
    /// Of that: finding and protecting the dirty pages.
    pub freeze_us: Spread,
    /// From the end of the pause until the last page was copied.
    pub drain_us: Spread,
    /// Captured windows that were checked, all of them right.
    pub consistent_captures: usize,
    /// Whether the median of the pauses keeps the bound.
    pub within_bound: bool,
}

/// Measures one machine with each number of dirty pages in turn; a number that
/// the machine has not enough pages for is left out.
pub fn measure(mib: u64, dirty: &[u64], rounds: usize) -> Result<Vec<Live>> {
    let image = memory_file(&guest::image(usize::try_from(mib << 20)?))?;
    let pool = Pool::in_file(&image)?;
    let fits = |count: &&u64| **count + WINDOW < mib * 256 - DATA_PAGE;
    dirty.iter().filter(fits).map(|count| cell(&pool, mib, *count, rounds)).collect()
}

fn cell(pool: &Pool, mib: u64, dirty: u64, rounds: usize) -> Result<Live> {
    let fork = Fork::start()?;
    let mapped = fork.map(Kind::Pooled, Some(pool.memory().as_fd()))?;
    let machine = pool.attach(&mapped)?;
    fork.touch(0, 1, mapped.len / 4096)?;
    fork.order(&Order::Populate, &[])?;
    fork.order(&Order::Run, &[])?;
    let writes = dirty > 0;
    for walk in scattered(mib * 256, dirty.saturating_sub(WINDOW)) {
        fork.walk(walk)?;
    }
    let round = Walk::run(0, u64::MAX >> 1, WINDOW - 1, writes);
    fork.order(&Order::Begin(round), &[])?;
    let subject = Subject { pool, fork, mapped, machine };
    let mut series = Series::default();
    for number in 0..rounds {
        std::thread::sleep(Duration::from_millis(if number == 0 { 200 } else { 5 }));
        series.add(&subject, PoolId(2 + u64::try_from(number)?), dirty)?;
    }
    let bound_us = 2000.0 + 12_000.0 * real(mib) / 1024.0 + real(dirty);
    let pause_us = Spread::of_ns_in_us(series.pause_ns);
    Ok(Live {
        memory_mib: mib,
        dirty_pages: dirty,
        bound_us,
        within_bound: pause_us.p50 <= bound_us,
        pause_us,
        stop_us: Spread::of_ns_in_us(series.stop_ns),
        freeze_us: Spread::of_ns_in_us(series.freeze_ns),
        drain_us: Spread::of_ns_in_us(series.drain_ns),
        consistent_captures: series.consistent,
    })
}

/// Walks that write `count` pages behind the window, none twice.
fn scattered(pages: u64, count: u64) -> Vec<Walk> {
    let mut walks = Vec::new();
    let (mut base, mut left) = (DATA_PAGE + WINDOW, count);
    while left > 0 && base < pages {
        let size = 1 << (pages - base).ilog2();
        let here = left.min(size);
        walks.push(Walk { base, ..Walk::scattered(1, here, size - 1, true) });
        (base, left) = (base + size, left - here);
    }
    walks
}

struct Subject<'a> {
    pool: &'a Pool,
    fork: Fork,
    mapped: Mapped,
    machine: MachineKey,
}

#[derive(Default)]
struct Series {
    pause_ns: Vec<u64>,
    stop_ns: Vec<u64>,
    freeze_ns: Vec<u64>,
    drain_ns: Vec<u64>,
    consistent: usize,
}

impl Series {
    fn add(&mut self, subject: &Subject<'_>, layer: PoolId, dirty: u64) -> Result<()> {
        let pager = subject.pool.pager();
        let file = subject.open(layer)?;
        let (mut pause, mut part) = (Stopwatch::start(), Stopwatch::start());
        let counter = subject.stop()?;
        self.stop_ns.push(part.lap_ns());
        let pages = pager.freeze(layer, u64::MAX)?;
        self.freeze_ns.push(part.lap_ns());
        subject.fork.order(&Order::GoOn, &[])?;
        self.pause_ns.push(pause.lap_ns());
        part.lap_ns();
        pager.wait_for_layer(layer)?;
        self.drain_ns.push(part.lap_ns());
        ensure!(pages == dirty, "{pages} pages were found, {dirty} were written");
        if dirty > 0 {
            check(&File::from(file), counter).with_context(|| format!("layer {layer:?}"))?;
            self.consistent += 1;
        }
        pager.close_pool(layer)?;
        Ok(())
    }
}

impl Subject<'_> {
    fn open(&self, layer: PoolId) -> Result<OwnedFd> {
        let Mapped { address, len, descriptors: [pagemap, memory], .. } = &self.mapped;
        let range = *address..*address + *len;
        let descriptors = [pagemap.as_fd(), memory.as_fd()];
        Ok(self.pool.pager().open_layer(layer, self.machine, &range, descriptors)?)
    }

    fn stop(&self) -> Result<u64> {
        match self.fork.order(&Order::Stop, &[])?.0 {
            Answer::Stopped { counter } => Ok(counter),
            other => bail!("unexpected {other:?}"),
        }
    }
}

/// Checks that a captured window is what it was when the guest had counted
/// down to `counter`. The guest may have been stopped anywhere in a step.
fn check(layer: &File, counter: u64) -> Result<()> {
    let words = |page: u64| -> Result<(u64, u64)> {
        let mut bytes = [0; 4096];
        layer.read_exact_at(&mut bytes, (DATA_PAGE + page) * 4096)?;
        let (words, _) = bytes.as_chunks::<8>();
        Ok((u64::from_le_bytes(words[0]), u64::from_le_bytes(words[511])))
    };
    let pages: Vec<(u64, u64)> = (0..WINDOW).map(words).collect::<Result<_>>()?;
    let youngest = (0..WINDOW).zip(&pages).min_by_key(|(_, (first, _))| *first);
    let (place, (newest, end)) = youngest.context("a window has pages")?;
    ensure!(
        (*newest).wrapping_sub(counter) <= 1,
        "the last captured write is {newest}, the guest was at {counter}"
    );
    ensure!(*end == *newest || *end == newest + WINDOW, "page {place} is torn: {newest}, {end}");
    for back in 1..WINDOW {
        let page = (place + WINDOW - back) % WINDOW;
        let (first, end) = pages[usize::try_from(page)?];
        let expected = newest + back;
        ensure!(first == expected, "page {page} has write {first}, not {expected}");
        ensure!(end == expected, "page {page} is torn: {first}, {end}");
    }
    Ok(())
}
