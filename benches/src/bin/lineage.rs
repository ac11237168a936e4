//! What a long lineage costs: a thousand snapshots, each made on the one
//! before, with some pages changed all over the image.
//!
//! Prints one JSON document; progress goes to standard error. The last hundred
//! snapshots are made in turns with those of a second lineage, which is the
//! same and only as long as the warm-up: whatever else the host does meets
//! both, and the ratio of the medians is the result. Frames read for each MiB
//! are counted from page maps, against a fresh copy of the last image in a
//! store of its own.

use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use coppice_benches::effort::{Random, thread_cpu_ns};
use coppice_engine::{
    CommitOptions, GcOptions, GcReport, ImageRef, IndexKind, PageMap, Role, Settings, SnapshotId,
    SnapshotRecord, Store,
};
use serde::Serialize;
use serde_json::{Value, json};

const PAGE_LEN: usize = 4096;
/// Snapshots that both lineages make in turns, of which the medians are taken.
const SAMPLE: usize = 100;

/// Measures what a snapshot costs at the end of a long lineage.
#[derive(Debug, Parser)]
struct Options {
    /// Snapshots, one made on the other
    #[arg(long, default_value_t = 1000)]
    depth: usize,
    /// Snapshots of the short lineage before it is measured: until each leaf
    /// has changed often enough to be stored in full again
    #[arg(long, default_value_t = 300)]
    warm_up: usize,
    /// Pages changed for each
    #[arg(long, default_value_t = 100)]
    pages: usize,
    /// Collect after every so many snapshots, and not only at the end
    #[arg(long, default_value_t = 0)]
    gc_every: usize,
    /// Length of the image
    #[arg(long, value_name = "MiB", default_value_t = 256)]
    image: usize,
    /// Keep the index in memory and not in RocksDB
    #[arg(long)]
    memory_index: bool,
    /// Where to make the stores [default: a temporary folder]
    #[arg(long)]
    folder: Option<PathBuf>,
}

/// Gives a page other contents. Half of it compresses, as memory does.
fn change(random: &mut Random, page: &mut [u8]) {
    random.fill(&mut page[..PAGE_LEN / 2]);
}

/// What something took, in microseconds. The time of this thread alone is
/// what it costs on a host that does other things too.
#[derive(Debug, Default, Clone, Copy)]
struct Cost {
    wall: u64,
    thread: u64,
}

/// Costs of one snapshot.
#[derive(Debug, Default, Clone, Copy)]
struct Times {
    commit: Cost,
    open: Cost,
    look_up: Cost,
    map: Cost,
}

fn micros(begun: Instant) -> u64 {
    u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX)
}

fn cost<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, Cost)> {
    let (begun, thread) = (Instant::now(), thread_cpu_ns());
    let done = work()?;
    let thread = (thread_cpu_ns() - thread) / 1000;
    Ok((done, Cost { wall: micros(begun), thread }))
}

fn commit(
    store: &Store,
    bytes: &[u8],
    base: Option<(ImageRef, SnapshotId)>,
    pages: &[usize],
) -> Result<(ImageRef, SnapshotId)> {
    let mut session = store.begin()?;
    let base_image = base.map(|(image, _)| image);
    let mut writer = session.image(u64::try_from(bytes.len())?, base_image.as_ref())?;
    for page in pages {
        writer.write(u64::try_from(*page)?, &bytes[page * PAGE_LEN..(page + 1) * PAGE_LEN])?;
    }
    let image = writer.finish()?;
    let record = SnapshotRecord {
        images: vec![(Role::Memory, image)],
        config: Vec::new(),
        parent: base.map(|(_, id)| id),
    };
    Ok((image, session.commit(&record, CommitOptions::default())?.id))
}

fn measure(store: &Store, image: &ImageRef, id: &str, page: usize) -> Result<Times> {
    let ((entry, mut reader), open) = cost(|| Ok((store.lookup(id)?, store.reader(image)?)))?;
    ensure!(entry.record.image(Role::Memory) == Some(image), "another image was found");
    let mut out = [0; PAGE_LEN];
    let offset = u64::try_from(page * PAGE_LEN)?;
    let (_, look_up) = cost(|| Ok(reader.read_at(offset, &mut out)?))?;
    let (_, map) = cost(|| Ok(store.page_map(image)?))?;
    Ok(Times { commit: Cost::default(), open, look_up, map })
}

fn median(times: &[Times], of: impl Fn(&Times) -> u64) -> u64 {
    let mut all: Vec<u64> = times.iter().map(of).collect();
    all.sort_unstable();
    all.get(all.len() / 2).copied().unwrap_or(0)
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn ratio(one: u64, other: u64) -> f64 {
    one as f64 / other.max(1) as f64
}

/// Frames that hold the image's pages, for each MiB of data.
fn frames_per_mib(map: &PageMap) -> f64 {
    let frames: HashSet<_> = map.frames().iter().collect();
    ratio(u64::try_from(frames.len()).unwrap_or(u64::MAX) << 8, map.stored_pages())
}

/// Collections on the way, together.
#[derive(Debug, Default, Serialize)]
struct Collections {
    count: u64,
    thread_us: u64,
    thread_us_max: u64,
    rewritten_bytes: u64,
    straightened_images: u64,
}

impl Collections {
    fn add(&mut self, done: &GcReport, took: Cost) {
        self.count += 1;
        self.thread_us += took.thread;
        self.thread_us_max = self.thread_us_max.max(took.thread);
        self.rewritten_bytes += done.rewritten_bytes;
        self.straightened_images += done.straightened_images;
    }
}

/// What reading an image takes, for each MiB of data.
struct Reads {
    /// Frames in which it lies.
    frames: f64,
    /// Frames that an export decoded, those that it decoded again included.
    decoded: f64,
}

fn reads(store: &Store, image: &ImageRef) -> Result<Reads> {
    let map = store.page_map(image)?;
    let before = store.lookups()?.frames_decoded;
    store.export_to(image, &mut std::io::sink(), &mut |_| {})?;
    let decoded = store.lookups()?.frames_decoded - before;
    Ok(Reads { frames: frames_per_mib(&map), decoded: ratio(decoded << 8, map.stored_pages()) })
}

/// A store, and a lineage in it that grows.
struct Lineage {
    store: Store,
    random: Random,
    /// The last image.
    bytes: Vec<u8>,
    last: (ImageRef, SnapshotId),
    depth: usize,
    times: Vec<Times>,
}

impl Lineage {
    fn begin(folder: &Path, settings: &Settings, len: usize) -> Result<Self> {
        let store = Store::open(folder, settings)?;
        let mut random = Random::new(0x9e37_79b9_7f4a_7c15);
        let mut bytes = vec![0; len];
        bytes.chunks_mut(PAGE_LEN).for_each(|page| change(&mut random, page));
        let all: Vec<usize> = (0..len / PAGE_LEN).collect();
        let last = commit(&store, &bytes, None, &all)?;
        Ok(Self { store, random, bytes, last, depth: 0, times: Vec::new() })
    }

    /// One more snapshot, with some pages changed.
    fn grow(&mut self, changed: usize) -> Result<()> {
        let mut pages = BTreeSet::new();
        while pages.len() < changed {
            pages.insert(self.random.below(self.bytes.len() / PAGE_LEN)?);
        }
        for page in &pages {
            change(&mut self.random, &mut self.bytes[page * PAGE_LEN..(page + 1) * PAGE_LEN]);
        }
        let pages: Vec<usize> = pages.into_iter().collect();
        let (made, took) = cost(|| commit(&self.store, &self.bytes, Some(self.last), &pages))?;
        self.last = made;
        let (id, page) = (self.last.1.to_string(), *pages.first().context("a page")?);
        let measured = measure(&self.store, &self.last.0, &id, page)?;
        self.times.push(Times { commit: took, ..measured });
        self.depth += 1;
        if self.depth.is_multiple_of(100) {
            eprintln!("{} snapshots", self.depth);
        }
        Ok(())
    }
}

/// Lets both lineages grow in turns, and compares what it took.
fn in_turns(young: &mut Lineage, old: &mut Lineage, changed: usize) -> Result<Value> {
    for round in 0..SAMPLE {
        if round % 2 == 0 {
            young.grow(changed)?;
            old.grow(changed)?;
        } else {
            old.grow(changed)?;
            young.grow(changed)?;
        }
    }
    let (first, last) =
        (&young.times[young.times.len() - SAMPLE..], &old.times[old.times.len() - SAMPLE..]);
    let row = |of: fn(&Times) -> Cost| {
        let (one, other) = (median(first, |t| of(t).wall), median(last, |t| of(t).wall));
        let (busy, later) = (median(first, |t| of(t).thread), median(last, |t| of(t).thread));
        let sum = |times: &[Times]| times.iter().map(|t| of(t).thread).sum();
        json!({
            "first_us": one, "last_us": other, "ratio": ratio(other, one),
            "thread_first_us": busy, "thread_last_us": later, "thread_ratio": ratio(later, busy),
            "thread_mean_ratio": ratio(sum(last), sum(first)),
        })
    };
    Ok(json!({
        "depth_of_first": young.depth,
        "commit": row(|t| t.commit),
        "open_snapshot": row(|t| t.open),
        "look_up_page": row(|t| t.look_up),
        "page_map": row(|t| t.map),
    }))
}

/// Collects, and counts what reading takes before and after.
fn collect(store: &Store, at_depth: &[(usize, ImageRef)], fresh: f64) -> Result<Value> {
    let before: Vec<Reads> =
        at_depth.iter().map(|(_, image)| reads(store, image)).collect::<Result<_>>()?;
    let stored_before = store.stats().stored_bytes;
    let begun = Instant::now();
    let collected = store.gc(GcOptions::default())?;
    let seconds = begun.elapsed().as_secs_f64();
    let mut depths = Vec::new();
    let mut straight = 0.0;
    for ((depth, image), before) in at_depth.iter().zip(before) {
        let now = reads(store, image)?;
        straight = now.frames;
        depths.push(json!({
            "depth": depth,
            "ratio_before": before.frames / fresh,
            "ratio_to_fresh_copy": now.frames / fresh,
            "export_decodes_before": before.decoded / fresh,
            "export_decodes": now.decoded / fresh,
        }));
    }
    Ok(json!({
        "seconds": seconds,
        "straightened_images": collected.straightened_images,
        "frames_per_mib_of_last": straight,
        "ratio_to_fresh_copy": straight / fresh,
        "depths": depths,
        "rewritten_bytes": collected.rewritten_bytes,
        "read_bytes": collected.read_bytes,
        "kept_twice_bytes": collected.kept_twice_bytes,
        "stored_bytes_before": stored_before,
        "stored_bytes_after": store.stats().stored_bytes,
    }))
}

fn main() -> Result<()> {
    let options = Options::parse();
    let least = options.warm_up + 2 * SAMPLE;
    ensure!(options.depth >= least, "--depth must be at least {least}");
    let temporary = tempfile::tempdir()?;
    let folder = options.folder.clone().unwrap_or_else(|| temporary.path().to_owned());
    let mut settings = Settings::default();
    if options.memory_index {
        settings.index = IndexKind::Memory;
    }
    let len = options.image << 20;
    let mut young = Lineage::begin(&folder.join("young"), &settings, len)?;
    for _ in 0..options.warm_up {
        young.grow(options.pages)?;
    }
    let mut old = Lineage::begin(&folder.join("lineage"), &settings, len)?;
    let base_bill = old.store.accounts()?.store()?;
    let base_hints = old.store.lookups()?;
    let mut between = Collections::default();
    let mut at_depth = vec![(0, old.last.0)];
    while old.depth < options.depth - SAMPLE {
        old.grow(options.pages)?;
        if old.depth.is_multiple_of(options.depth / 4) {
            at_depth.push((old.depth, old.last.0));
        }
        if options.gc_every > 0 && old.depth.is_multiple_of(options.gc_every) {
            let (done, took) = cost(|| Ok(old.store.gc(GcOptions::default())?))?;
            between.add(&done, took);
        }
    }
    let times = in_turns(&mut young, &mut old, options.pages)?;
    drop(young);
    at_depth.push((old.depth, old.last.0));
    let Lineage { store, bytes, last, depth, .. } = old;
    let bill = store.accounts()?.store()?;
    let lookups = store.lookups()?;
    let map = store.page_map(&last.0)?;
    let fresh = Store::open(&folder.join("fresh"), &settings)?;
    let all: Vec<usize> = (0..len / PAGE_LEN).collect();
    let copy = commit(&fresh, &bytes, None, &all)?;
    ensure!(copy.0 == last.0, "the copy has another root");
    let (aged, new) = (frames_per_mib(&map), frames_per_mib(&fresh.page_map(&copy.0)?));
    let gc = collect(&store, &at_depth, new)?;
    let begun = Instant::now();
    drop(store);
    let store = Store::open(&folder.join("lineage"), &settings)?;
    let open_store_us = micros(begun);
    let snapshots = u64::try_from(depth)?;
    let report = json!({
        "depth": depth,
        "warm_up": options.warm_up,
        "changed_pages": options.pages,
        "image_mib": options.image,
        "in_turns": times,
        "open_store_us": open_store_us,
        "frames_per_mib": { "last": aged, "fresh_copy": new, "ratio": aged / new },
        "gc": gc,
        "gc_between": between,
        "packs": store.stats().packs,
        "page_bytes_per_snapshot": (bill.page_bytes - base_bill.page_bytes) / snapshots,
        "metadata_bytes_per_snapshot":
            (bill.metadata_bytes - base_bill.metadata_bytes) / snapshots,
        "hint_bytes_per_snapshot": (lookups.hint_bytes - base_hints.hint_bytes) / snapshots,
        "hint_bytes_per_page_of_first":
            ratio(base_hints.hint_bytes, u64::try_from(len / PAGE_LEN)?),
        "table_bytes_per_snapshot": (bill.table_bytes - base_bill.table_bytes) / snapshots,
    });
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(())
}
