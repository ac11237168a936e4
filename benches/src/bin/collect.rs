//! What a garbage collection costs: those who read and write beside it, and
//! itself in stores of different size.
//!
//! Prints one JSON document; progress goes to standard error. Reads are
//! measured in pairs of windows, one without and one with collections that
//! never stop, beside an ingest that goes on in both; the median of the ratios of the
//! pairs is the result. The cost of one collection is measured after
//! the same number of chunks died in stores of one, ten and a hundred times a
//! size, in turns.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use coppice_benches::effort::{Random, thread_cpu_ns};
use coppice_engine::{
    CommitOptions, GcOptions, GcReport, ImageRef, PAGE_LEN, Role, Settings, SnapshotId,
    SnapshotRecord, Store,
};
use serde_json::{Value, json};

/// Measures garbage collection.
#[derive(Debug, Parser)]
struct Options {
    /// Pairs of windows
    #[arg(long, default_value_t = 10)]
    pairs: usize,
    /// Length of a window
    #[arg(long, value_name = "ms", default_value_t = 2000)]
    window: u64,
    /// Collections measured in each store
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Pages of an image; half of them die in each round
    #[arg(long, default_value_t = 2048)]
    pages: usize,
    /// Where to make the stores [default: a temporary folder]
    #[arg(long)]
    folder: Option<PathBuf>,
}

/// Images that the reader's store keeps.
const KEPT: usize = 16;
/// Images that the ingest leaves listed before it removes the oldest.
const LISTED: usize = 4;
/// How long the ingest rests between two images.
const REST: Duration = Duration::from_millis(50);

/// Makes images that have no page in common.
struct Maker<'s> {
    store: &'s Store,
    random: Random,
    pages: usize,
}

impl Maker<'_> {
    /// An image of new pages, or one on `base` of which every second is new.
    fn image(&mut self, base: Option<(ImageRef, SnapshotId)>) -> Result<(ImageRef, SnapshotId)> {
        let step = if base.is_some() { 2 } else { 1 };
        let mut session = self.store.begin()?;
        let len = u64::try_from(self.pages * PAGE_LEN)?;
        let mut writer = session.image(len, base.map(|(image, _)| image).as_ref())?;
        let mut page = [0; PAGE_LEN];
        for number in (0..self.pages).step_by(step) {
            // Half of it compresses, as memory does.
            self.random.fill(&mut page[..PAGE_LEN / 2]);
            writer.write(u64::try_from(number)?, &page)?;
        }
        let images = vec![(Role::Memory, writer.finish()?)];
        let image = images[0].1;
        let parent = base.map(|(_, id)| id);
        let record = SnapshotRecord { images, config: Vec::new(), parent };
        Ok((image, session.commit(&record, CommitOptions::default())?.id))
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn ratio(one: u64, other: u64) -> f64 {
    one as f64 / other.max(1) as f64
}

/// Reads of one window.
struct Window {
    /// Nanoseconds of each, ascending.
    reads: Vec<u64>,
    collections: u64,
    images_ingested: u64,
}

impl Window {
    fn at(&self, percent: usize) -> u64 {
        self.reads.get(self.reads.len().saturating_sub(1) * percent / 100).copied().unwrap_or(0)
    }

    fn mean(&self) -> u64 {
        self.reads.iter().sum::<u64>() / u64::try_from(self.reads.len()).unwrap_or(1).max(1)
    }
}

/// Reads single pages until told to stop.
fn read_on(store: &Store, images: &[ImageRef], stop: &AtomicBool) -> Result<Vec<u64>> {
    let mut random = Random::new(0x1234_5678_9abc_def1);
    let mut readers = images.iter().map(|at| store.reader(at)).collect::<Result<Vec<_>, _>>()?;
    let mut reads = Vec::new();
    let mut page = [0; PAGE_LEN];
    while !stop.load(Ordering::Acquire) {
        let reader = random.below(readers.len())?;
        let pages = usize::try_from(images[reader].len)? / PAGE_LEN;
        let offset = u64::try_from(random.below(pages)? * PAGE_LEN)?;
        let begun = Instant::now();
        readers[reader].read_at(offset, &mut page)?;
        reads.push(u64::try_from(begun.elapsed().as_nanos())?);
    }
    reads.sort_unstable();
    Ok(reads)
}

/// Commits images and removes older ones until told to stop.
fn ingest_on(maker: &mut Maker<'_>, stop: &AtomicBool, count: &AtomicU64) -> Result<()> {
    let mut listed: Vec<SnapshotId> = Vec::new();
    let mut last = None;
    while !stop.load(Ordering::Acquire) {
        let made = maker.image(last)?;
        // Every second image builds on the one before, so that packs die in part.
        last = if last.is_none() { Some(made) } else { None };
        listed.push(made.1);
        if listed.len() > LISTED {
            maker.store.remove(&listed.remove(0).to_string())?;
        }
        count.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(REST);
    }
    for id in listed {
        maker.store.remove(&id.to_string())?;
    }
    Ok(())
}

fn window(
    maker: &mut Maker<'_>,
    images: &[ImageRef],
    length: Duration,
    collect: bool,
) -> Result<Window> {
    let store = maker.store;
    let (stop, ingested) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| read_on(store, images, &stop));
        let writer = scope.spawn(|| ingest_on(maker, &stop, &ingested));
        let begun = Instant::now();
        let mut collections = 0;
        let mut outcome = Ok(());
        while begun.elapsed() < length && outcome.is_ok() {
            if collect {
                outcome = store.gc(GcOptions::default()).map(drop);
                collections += 1;
            } else {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        stop.store(true, Ordering::Release);
        let reads = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
        writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
        outcome?;
        Ok(Window { reads, collections, images_ingested: ingested.load(Ordering::Relaxed) })
    })
}

fn beside(folder: &Path, options: &Options) -> Result<Value> {
    let store = Store::open(folder, &Settings::default())?;
    let random = Random::new(0x9e37_79b9_7f4a_7c15);
    let mut maker = Maker { store: &store, random, pages: options.pages };
    let images = (0..KEPT).map(|_| Ok(maker.image(None)?.0)).collect::<Result<Vec<_>>>()?;
    let length = Duration::from_millis(options.window);
    window(&mut maker, &images, length, false).context("the warm-up")?;
    let mut pairs = Vec::new();
    for number in 0..options.pairs {
        let quiet = window(&mut maker, &images, length, false)?;
        let busy = window(&mut maker, &images, length, true)?;
        ensure!(!quiet.reads.is_empty() && !busy.reads.is_empty(), "nothing was read");
        eprintln!("pair {} of {}", number + 1, options.pairs);
        pairs.push((quiet, busy));
    }
    let of = |value: fn(&Window) -> u64| {
        let ratios = pairs.iter().map(|(quiet, busy)| ratio(value(busy), value(quiet)));
        median(ratios.collect())
    };
    let sum = |value: fn(&(Window, Window)) -> u64| pairs.iter().map(value).sum::<u64>();
    Ok(json!({
        "errors": 0,
        "slow_down": { "p50": of(|w| w.at(50)), "p99": of(|w| w.at(99)), "mean": of(Window::mean) },
        "quiet_p50_ns": median(pairs.iter().map(|(quiet, _)| ratio(quiet.at(50), 1)).collect()),
        "busy_p50_ns": median(pairs.iter().map(|(_, busy)| ratio(busy.at(50), 1)).collect()),
        "collections": sum(|(_, busy)| busy.collections),
        "images_ingested": [sum(|(q, _)| q.images_ingested), sum(|(_, b)| b.images_ingested)],
    }))
}

/// One collection.
struct Cost {
    wall_us: u64,
    thread_us: u64,
    report: GcReport,
}

/// A store of some size in which images come and go.
struct Grown {
    store: Store,
    images: usize,
    seed: u64,
    costs: Vec<Cost>,
}

impl Grown {
    fn make(folder: &Path, images: usize, pages: usize) -> Result<Self> {
        let store = Store::open(&folder.join(format!("{images}")), &Settings::default())?;
        let random = Random::new(0x0dd0_5eed);
        let mut maker = Maker { store: &store, random, pages };
        for _ in 0..images {
            maker.image(None)?;
        }
        let seed = maker.random.number();
        store.gc(GcOptions::default())?;
        Ok(Self { store, images, seed, costs: Vec::new() })
    }

    fn collect(&mut self, pages: usize) -> Result<()> {
        let mut maker = Maker { store: &self.store, random: Random::new(self.seed), pages };
        let base = maker.image(None)?;
        let next = maker.image(Some(base))?;
        self.seed = maker.random.number();
        self.store.gc(GcOptions::default())?;
        // Every second page of its pack is dead.
        self.store.remove(&base.1.to_string())?;
        let (begun, thread) = (Instant::now(), thread_cpu_ns());
        let report = self.store.gc(GcOptions::default())?;
        let thread_us = (thread_cpu_ns() - thread) / 1000;
        let wall_us = u64::try_from(begun.elapsed().as_micros())?;
        ensure!(report.repacked_packs >= 1, "nothing was repacked");
        self.costs.push(Cost { wall_us, thread_us, report });
        self.store.remove(&next.1.to_string())?;
        self.store.gc(GcOptions::default())?;
        Ok(())
    }

    fn median(&self, of: impl Fn(&Cost) -> u64) -> f64 {
        median(self.costs.iter().map(|cost| ratio(of(cost), 1)).collect())
    }

    fn told(&self, first: &Self, pages: usize) -> Value {
        let thread = self.median(|cost| cost.thread_us);
        json!({
            "chunks": self.images * pages,
            "wall_us": self.median(|cost| cost.wall_us),
            "thread_us": thread,
            "nodes_read": self.median(|cost| cost.report.nodes_read),
            "read_bytes": self.median(|cost| cost.report.read_bytes),
            "rewritten_bytes": self.median(|cost| cost.report.rewritten_bytes),
            "thread_ratio_to_smallest": thread / first.median(|cost| cost.thread_us).max(1.0),
        })
    }
}

fn main() -> Result<()> {
    let options = Options::parse();
    let temporary = tempfile::tempdir()?;
    let folder = options.folder.clone().unwrap_or_else(|| temporary.path().to_owned());
    let reads = beside(&folder.join("beside"), &options)?;
    let mut stores = [1, 10, 100]
        .iter()
        .map(|images| Grown::make(&folder, *images, options.pages))
        .collect::<Result<Vec<_>>>()?;
    eprintln!("the stores are made");
    for _ in 0..options.rounds {
        stores.iter_mut().try_for_each(|store| store.collect(options.pages))?;
    }
    let sizes: Vec<Value> =
        stores.iter().map(|store| store.told(&stores[0], options.pages)).collect();
    let report = json!({
        "beside": reads,
        "dead_chunks": options.pages / 2,
        "cost_by_size": sizes,
    });
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(())
}
