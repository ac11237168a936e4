//! What a large store costs: opening it, its index, and ingest into it.
//!
//! Unique pages are ingested in tenths of a number of chunks. CPU time and
//! bytes written for each GB are told for each tenth, and each against a first
//! tenth that goes into an empty store at the same time, in turns, so that
//! whatever else the host does meets both alike. Making the pages is not
//! counted. With `--entries` a
//! store gets packs that are nothing but tables of keys (their frames are
//! holes), so that the index of a much larger store can be looked at.
//!
//! Prints one JSON document; progress goes to standard error.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use coppice_benches::effort::{Effort, Random, Resident, thread_cpu_ns};
use coppice_benches::figures::real;
use coppice_benches::packs::{self, Contents};
use coppice_engine::{CommitOptions, Role, Settings, SnapshotRecord, Store};
use serde_json::{Value, json};

const PAGE_LEN: usize = 4096;
/// Pages made and written together.
const BATCH: u64 = 1024;
const TENTHS: u64 = 10;
/// Objects of a pack that is only tables.
const HOLLOW_OBJECTS: u32 = 1 << 20;
/// Pages that are looked up in an index of many entries.
const PROBES: u64 = 100_000;

/// Measures a store of many chunks.
#[derive(Debug, Parser)]
struct Options {
    /// Unique chunks to ingest; ten million take 12 GB of disk
    #[arg(long, default_value_t = 500_000)]
    chunks: u64,
    /// Bytes of each chunk that do not compress
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u16).range(16..=4096))]
    noise: u16,
    /// Look at an index of so many entries instead; 10^8 take 6 GB of disk
    #[arg(long)]
    entries: Option<u64>,
    /// `--entries 100000000`
    #[arg(long, conflicts_with = "entries")]
    long: bool,
    /// Where to make the store [default: a temporary folder]
    #[arg(long)]
    folder: Option<PathBuf>,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let temporary = match &options.folder {
        Some(folder) => tempfile::tempdir_in(folder)?,
        None => tempfile::tempdir()?,
    };
    let store = temporary.path().join("store");
    let entries = if options.long { Some(100_000_000) } else { options.entries };
    let report = match entries {
        Some(entries) => many_entries(&store, entries)?,
        None => many_chunks(&store, options.chunks, usize::from(options.noise))?,
    };
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(())
}

/// Pages of which no two are the same.
struct Pages {
    random: Random,
    noise: usize,
    buffer: Vec<u8>,
    /// CPU time that making them took.
    cpu_ns: u64,
}

impl Pages {
    fn new(seed: u64, noise: usize) -> Self {
        let buffer = b"a page that compresses a little ".repeat(PAGE_LEN / 32);
        let buffer = buffer.repeat(usize::try_from(BATCH).expect("a small number"));
        Self { random: Random::new(seed), noise, buffer, cpu_ns: 0 }
    }

    fn next(&mut self) -> &[u8] {
        let begun = thread_cpu_ns();
        for page in self.buffer.chunks_mut(PAGE_LEN) {
            self.random.fill(&mut page[..self.noise]);
        }
        self.cpu_ns += thread_cpu_ns() - begun;
        &self.buffer
    }
}

/// Commits an image of unique pages; returns the CPU time of making them.
fn ingest(store: &Store, seed: u64, chunks: u64, noise: usize) -> Result<u64> {
    let mut pages = Pages::new(seed, noise);
    let mut session = store.begin()?;
    let mut writer = session.image(chunks * PAGE_LEN as u64, None)?;
    for first in (0..chunks).step_by(usize::try_from(BATCH)?) {
        let count = usize::try_from(BATCH.min(chunks - first))?;
        writer.write(first, &pages.next()[..count * PAGE_LEN])?;
    }
    let images = vec![(Role::Memory, writer.finish()?)];
    let record = SnapshotRecord { images, config: Vec::new(), parent: None };
    session.commit(&record, CommitOptions::default())?;
    Ok(pages.cpu_ns)
}

/// What a part of the ingest took, for each GB of it.
#[derive(Debug, Clone, Copy)]
struct PerGb {
    cpu_seconds: f64,
    written: f64,
    wall_seconds: f64,
}

fn measured(chunks: u64, work: impl FnOnce() -> Result<u64>) -> Result<PerGb> {
    let (begun, before) = (Instant::now(), Effort::now()?);
    let not_counted = work()?;
    let used = Effort::now()? - before;
    let gb = real(chunks * PAGE_LEN as u64) / 1e9;
    Ok(PerGb {
        cpu_seconds: real(used.cpu_ns - not_counted) / 1e9 / gb,
        written: real(used.written) / gb,
        wall_seconds: begun.elapsed().as_secs_f64() / gb,
    })
}

/// A tenth, and a first tenth of another store beside it.
#[derive(Debug, Clone, Copy)]
struct Pair {
    here: PerGb,
    first: PerGb,
}

/// Ingests a tenth, and the same into an empty store, before or after.
fn pair(store: &Store, fresh: &Path, number: u64, tenth: u64, noise: usize) -> Result<Pair> {
    let here = || measured(tenth, || ingest(store, number + 1, tenth, noise));
    let first = || -> Result<PerGb> {
        let empty = Store::open(fresh, &Settings::default())?;
        let first = measured(tenth, || ingest(&empty, number + 1, tenth, noise))?;
        drop(empty);
        std::fs::remove_dir_all(fresh)?;
        Ok(first)
    };
    if number.is_multiple_of(2) {
        let first = first()?;
        Ok(Pair { here: here()?, first })
    } else {
        Ok(Pair { here: here()?, first: first()? })
    }
}

fn many_chunks(folder: &Path, chunks: u64, noise: usize) -> Result<Value> {
    ensure!(chunks >= TENTHS * BATCH, "--chunks must be at least {}", TENTHS * BATCH);
    let tenth = chunks / TENTHS;
    let store = Store::open(folder, &Settings::default())?;
    let fresh = folder.with_file_name("fresh");
    let mut pairs = Vec::new();
    for number in 0..TENTHS {
        let one = pair(&store, &fresh, number, tenth, noise)?;
        eprintln!("tenth {}: {one:.2?} {:?}", number + 1, Resident::now()?);
        pairs.push(one);
    }
    let (resident, stats) = (Resident::now()?, store.stats());
    drop(store);
    let (open_ms, open_resident) = reopened(folder)?;
    Ok(json!({
        "chunks": stats.chunks,
        "packs": stats.packs,
        "logical_bytes": stats.logical_bytes,
        "noise_bytes_per_chunk": noise,
        "cpu_seconds_per_gb": row(&pairs, |one| one.cpu_seconds)?,
        "written_bytes_per_gb": row(&pairs, |one| one.written)?,
        "wall_seconds_per_gb": row(&pairs, |one| one.wall_seconds)?,
        "resident": resident,
        "reopen_ms": open_ms,
        "reopened_resident": open_resident,
        "per_chunk": per_chunk(folder)?,
    }))
}

/// One figure of all tenths.
fn row(pairs: &[Pair], of: impl Fn(&PerGb) -> f64) -> Result<Value> {
    let ratios: Vec<f64> = pairs.iter().map(|pair| of(&pair.here) / of(&pair.first)).collect();
    Ok(json!({
        "tenths": pairs.iter().map(|pair| of(&pair.here)).collect::<Vec<_>>(),
        "first_tenths_beside": pairs.iter().map(|pair| of(&pair.first)).collect::<Vec<_>>(),
        "last_to_first": ratios.last().context("a tenth")?,
        "most_to_first": ratios.iter().copied().fold(0.0, f64::max),
        "mean_to_first": ratios.iter().sum::<f64>() / real(ratios.len() as u64),
    }))
}

/// Opens a store that was closed, some times; the median in milliseconds.
fn reopened(folder: &Path) -> Result<(f64, Resident)> {
    let mut times = Vec::new();
    let mut resident = Resident::default();
    for _ in 0..5 {
        let begun = Instant::now();
        let store = Store::open(folder, &Settings::default())?;
        times.push(begun.elapsed().as_secs_f64() * 1e3);
        resident = Resident::now()?;
        drop(store);
    }
    times.sort_by(f64::total_cmp);
    Ok((times[times.len() / 2], resident))
}

/// Bytes on disk for each chunk: the index, and all that is not a page.
fn per_chunk(folder: &Path) -> Result<Value> {
    let contents = Contents::of_store(folder)?;
    let index = packs::disk_bytes(&folder.join("index"))?;
    let all = contents.file_bytes + index + std::fs::metadata(folder.join("roots.log"))?.len();
    let per = |bytes: u64| real(bytes) / real(contents.chunks.max(1));
    Ok(json!({
        "index_bytes": per(index),
        "all_metadata_bytes": per(all - contents.page_bytes),
        "compressed_page_bytes": per(contents.page_bytes),
    }))
}

fn many_entries(folder: &Path, entries: u64) -> Result<Value> {
    drop(Store::open(folder, &Settings::default())?);
    let mut made = 0;
    for id in 1.. {
        if made >= entries {
            break;
        }
        let objects = u32::try_from(entries - made).unwrap_or(u32::MAX).min(HOLLOW_OBJECTS);
        packs::make_hollow(&folder.join("packs"), id, objects)?;
        made += u64::from(objects);
    }
    eprintln!("{made} keys in packs");
    Resident::forget_peak();
    let (begun, before) = (Instant::now(), Effort::now()?);
    let store = Store::open(folder, &Settings::default())?;
    let (build_seconds, built) = (begun.elapsed().as_secs_f64(), Effort::now()? - before);
    let build_resident = Resident::now()?;
    drop(store);
    eprintln!("the index is built: {build_seconds:.0} s, {build_resident:?}");
    Resident::forget_peak();
    let (reopen_ms, _) = reopened(folder)?;
    let index_bytes = packs::disk_bytes(&folder.join("index"))?;
    let store = Store::open(folder, &Settings::default())?;
    let probe = |seed| measured(PROBES, || ingest(&store, seed, PROBES, 64));
    let (new, again) = (probe(1)?, probe(1)?);
    Ok(json!({
        "entries": made,
        "build_seconds": build_seconds,
        "build_cpu_seconds": real(built.cpu_ns) / 1e9,
        "build_written_bytes_per_entry": real(built.written) / real(made),
        "build_resident": build_resident,
        "reopen_ms": reopen_ms,
        "index_bytes_per_entry": real(index_bytes) / real(made),
        "ingest_new_cpu_seconds_per_gb": new.cpu_seconds,
        "ingest_again_cpu_seconds_per_gb": again.cpu_seconds,
        "resident_after": Resident::now()?,
    }))
}
