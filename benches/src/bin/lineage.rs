//! What a long lineage costs: a thousand snapshots, each made on the one
//! before, with some pages changed all over the image.
//!
//! Prints one JSON document; progress goes to standard error. Times are
//! medians of the first hundred snapshots after a warm-up and of the last, and their ratio is
//! the result. Frames read for each MiB are counted from page maps, against a
//! fresh copy of the last image in a store of its own.

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use coppice_benches::effort::{Random, thread_cpu_ns};
use coppice_engine::{
    CommitOptions, GcOptions, GcReport, ImageRef, IndexKind, PageMap, Role, Settings,
    SnapshotRecord, Store,
};
use serde::Serialize;
use serde_json::json;

const PAGE_LEN: usize = 4096;
/// Snapshots at either end whose median is taken.
const SAMPLE: usize = 100;

/// Measures what a snapshot costs at the end of a long lineage.
#[derive(Debug, Parser)]
struct Options {
    /// Snapshots, one made on the other
    #[arg(long, default_value_t = 1000)]
    depth: usize,
    /// Snapshots at the beginning that are not measured: until each leaf has
    /// changed often enough to be stored in full again
    #[arg(long, default_value_t = 200)]
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
    base: Option<(ImageRef, coppice_engine::SnapshotId)>,
    pages: &[usize],
) -> Result<(ImageRef, coppice_engine::SnapshotId)> {
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
    let store = Store::open(&folder.join("lineage"), &settings)?;
    let mut random = Random::new(0x9e37_79b9_7f4a_7c15);
    let mut bytes = vec![0; options.image << 20];
    let count = bytes.len() / PAGE_LEN;
    bytes.chunks_mut(PAGE_LEN).for_each(|page| change(&mut random, page));
    let all: Vec<usize> = (0..count).collect();
    let mut last = commit(&store, &bytes, None, &all)?;
    let base_bill = store.accounts()?.store()?;
    let base_hints = store.lookups()?;
    let mut times = Vec::new();
    let mut between = Collections::default();
    let mut at_depth = vec![(0, last.0)];
    for depth in 0..options.depth {
        let mut pages = HashSet::new();
        while pages.len() < options.pages {
            pages.insert(random.below(count)?);
        }
        let mut pages: Vec<usize> = pages.into_iter().collect();
        pages.sort_unstable();
        for page in &pages {
            change(&mut random, &mut bytes[page * PAGE_LEN..(page + 1) * PAGE_LEN]);
        }
        let (made, commit_cost) = cost(|| commit(&store, &bytes, Some(last), &pages))?;
        last = made;
        let id = last.1.to_string();
        let measured = measure(&store, &last.0, &id, *pages.first().context("a page")?)?;
        times.push(Times { commit: commit_cost, ..measured });
        if (depth + 1) % (options.depth / 4) == 0 {
            at_depth.push((depth + 1, last.0));
        }
        if options.gc_every > 0 && (depth + 1) % options.gc_every == 0 {
            let (done, took) = cost(|| Ok(store.gc(GcOptions::default())?))?;
            between.add(&done, took);
        }
        if depth % 100 == 99 {
            eprintln!("{} snapshots", depth + 1);
        }
    }
    let (first, tail) = (&times[options.warm_up..][..SAMPLE], &times[times.len() - SAMPLE..]);
    let row = |of: fn(&Times) -> Cost| {
        let (one, other) = (median(first, |t| of(t).wall), median(tail, |t| of(t).wall));
        let (busy, later) = (median(first, |t| of(t).thread), median(tail, |t| of(t).thread));
        json!({
            "first_us": one, "last_us": other, "ratio": ratio(other, one),
            "thread_first_us": busy, "thread_last_us": later, "thread_ratio": ratio(later, busy),
        })
    };
    let bill = store.accounts()?.store()?;
    let lookups = store.lookups()?;
    let map = store.page_map(&last.0)?;
    let fresh = Store::open(&folder.join("fresh"), &settings)?;
    let copy = commit(&fresh, &bytes, None, &all)?;
    ensure!(copy.0 == last.0, "the copy has another root");
    let (aged, new) = (frames_per_mib(&map), frames_per_mib(&fresh.page_map(&copy.0)?));
    let before: Vec<Reads> =
        at_depth.iter().map(|(_, image)| reads(&store, image)).collect::<Result<_>>()?;
    let stored_before = store.stats().stored_bytes;
    let begun = Instant::now();
    let collected = store.gc(GcOptions::default())?;
    let gc_seconds = begun.elapsed().as_secs_f64();
    let straight = frames_per_mib(&store.page_map(&last.0)?);
    let mut depths = Vec::new();
    for ((depth, image), before) in at_depth.iter().zip(before) {
        let now = reads(&store, image)?;
        depths.push(json!({
            "depth": depth,
            "ratio_before": before.frames / new,
            "ratio_to_fresh_copy": now.frames / new,
            "export_decodes_before": before.decoded / new,
            "export_decodes": now.decoded / new,
        }));
    }
    let gc = json!({
        "seconds": gc_seconds,
        "straightened_images": collected.straightened_images,
        "frames_per_mib_of_last": straight,
        "ratio_to_fresh_copy": straight / new,
        "depths": depths,
        "between": between,
        "rewritten_bytes": collected.rewritten_bytes,
        "read_bytes": collected.read_bytes,
        "kept_twice_bytes": collected.kept_twice_bytes,
        "stored_bytes_before": stored_before,
        "stored_bytes_after": store.stats().stored_bytes,
    });
    let begun = Instant::now();
    drop(store);
    let store = Store::open(&folder.join("lineage"), &settings)?;
    let report = json!({
        "depth": options.depth,
        "warm_up": options.warm_up,
        "changed_pages": options.pages,
        "image_mib": options.image,
        "commit": row(|t| t.commit),
        "open_snapshot": row(|t| t.open),
        "look_up_page": row(|t| t.look_up),
        "page_map": row(|t| t.map),
        "open_store_us": micros(begun),
        "frames_per_mib": { "last": aged, "fresh_copy": new, "ratio": aged / new },
        "gc": gc,
        "packs": store.stats().packs,
        "page_bytes_per_snapshot":
            (bill.page_bytes - base_bill.page_bytes) / u64::try_from(options.depth)?,
        "metadata_bytes_per_snapshot":
            (bill.metadata_bytes - base_bill.metadata_bytes) / u64::try_from(options.depth)?,
        "hint_bytes_per_snapshot":
            (lookups.hint_bytes - base_hints.hint_bytes) / u64::try_from(options.depth)?,
        "hint_bytes_per_page_of_first": ratio(base_hints.hint_bytes, u64::try_from(count)?),
        "table_bytes_per_snapshot":
            (bill.table_bytes - base_bill.table_bytes) / u64::try_from(options.depth)?,
    });
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(())
}
