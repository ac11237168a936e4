//! How fast files go into a store, beside the bare primitives on the same
//! bytes in the same run: reading, copying, hashing, zstd on all cores,
//! writing.
//!
//! Prints one JSON document; progress goes to standard error. The ratios are
//! the result: `to_slowest_primitive` is the time of the fastest import over
//! that of the slowest primitive alone, which no import can beat.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;
use coppice_benches::primitives::{Primitives, Rates, cpu_time};
use coppice_engine::{ImportOptions, ImportReport, Settings, Store};
use serde::Serialize;

/// Measures imports beside bare primitives.
#[derive(Debug, Parser)]
struct Options {
    /// Files to import, such as disk images
    files: Vec<PathBuf>,
    /// Also a generated file: a third does not compress, a third does, a
    /// sixth repeats what came before, and a sixth is zeros
    #[arg(long, value_name = "MiB", default_value_t = 4096)]
    generated: u64,
    /// Imports of each file, each into a store of its own
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Where to make the stores [default: a temporary folder]
    #[arg(long)]
    folder: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Row {
    file: String,
    logical_bytes: u64,
    new_bytes: u64,
    stored_bytes: u64,
    /// Of the first import into an empty store, commit and flush included.
    /// Wall and CPU.
    import_seconds: Vec<[f64; 2]>,
    /// Of the same file under another name.
    again_seconds: Vec<[f64; 2]>,
    import_data_gb_per_s: f64,
    again_data_gb_per_s: f64,
    primitives: Rates,
    to_slowest_primitive: f64,
    /// CPU time of the import over that of reading, hashing, compressing and
    /// writing alone.
    cpu_to_primitives: f64,
    again_to_hash_all_cores: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    cpus: usize,
    rows: Vec<Row>,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let temporary = tempfile::tempdir()?;
    let folder = options.folder.clone().unwrap_or_else(|| temporary.path().to_owned());
    let mut files = options.files.clone();
    if options.generated > 0 {
        eprintln!("generating {} MiB", options.generated);
        let path = folder.join("generated");
        generate(&path, options.generated)?;
        files.push(path);
    }
    let rows = files.iter().map(|file| measure(file, &folder, options.rounds));
    let rows = rows.collect::<Result<_>>()?;
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    println!("{}", serde_json::to_string_pretty(&Report { cpus, rows })?);
    Ok(())
}

/// Writes a mix of 64 KiB pieces; the same length gives the same bytes.
fn generate(path: &Path, mib: u64) -> Result<()> {
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut piece = vec![0; 64 << 10];
    for number in 0..mib * 16 {
        match number % 6 {
            0 | 3 => random(&mut state, &mut piece, u64::MAX),
            1 | 4 => random(&mut state, &mut piece, 0x0f0f_0f0f_000f_0f0f),
            2 => random(&mut (1 + number % 600), &mut piece, u64::MAX),
            _ => piece.fill(0),
        }
        out.write_all(&piece)?;
    }
    out.into_inner().context("cannot write the generated file")?.sync_all()?;
    Ok(())
}

fn random(state: &mut u64, piece: &mut [u8], mask: u64) {
    for word in piece.as_chunks_mut::<8>().0 {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        *word = (*state & mask).to_le_bytes();
    }
}

/// Imports; returns also the seconds that it took and those of CPU time.
fn import(store: &Store, file: &File, name: &str) -> Result<(ImportReport, [f64; 2])> {
    let (begun, cpu) = (Instant::now(), cpu_time());
    let done = store.import(file, name.parse()?, ImportOptions::default(), &mut |_| {})?;
    Ok((done, [begun.elapsed().as_secs_f64(), (cpu_time() - cpu).as_secs_f64()]))
}

fn measure(path: &Path, folder: &Path, rounds: usize) -> Result<Row> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut primitives: Option<Primitives> = None;
    let (mut first, mut again) = (Vec::new(), Vec::new());
    let mut report = None;
    for round in 0..rounds.max(1) {
        eprintln!("{}: round {} of {rounds}", path.display(), round + 1);
        let measured = Primitives::measure(&file, &folder.join("scratch"))?;
        if primitives.is_none_or(|best| measured.slowest() < best.slowest()) {
            primitives = Some(measured);
        }
        let dir = folder.join("store");
        let store = Store::open(&dir, &Settings::default())?;
        let (done, seconds) = import(&store, &file, "first")?;
        first.push(seconds);
        again.push(import(&store, &file, "again")?.1);
        report = Some(done);
        drop(store);
        std::fs::remove_dir_all(&dir)?;
    }
    let primitives = primitives.context("at least one round")?;
    let report = report.context("at least one round")?;
    let (fastest, cpu) = (least(&first, 0), least(&first, 1));
    let fastest_again = least(&again, 0);
    let hash = primitives.hash_all_cores.as_secs_f64();
    Ok(Row {
        file: path.display().to_string(),
        logical_bytes: report.logical_bytes,
        new_bytes: report.new_bytes,
        stored_bytes: report.stored_bytes,
        import_data_gb_per_s: gb(primitives.bytes) / fastest,
        again_data_gb_per_s: gb(primitives.bytes) / fastest_again,
        to_slowest_primitive: fastest / primitives.slowest().as_secs_f64(),
        cpu_to_primitives: cpu / primitives.cpu.as_secs_f64(),
        again_to_hash_all_cores: fastest_again / hash,
        primitives: primitives.rates(),
        import_seconds: first,
        again_seconds: again,
    })
}

fn least(seconds: &[[f64; 2]], which: usize) -> f64 {
    seconds.iter().map(|both| both[which]).fold(f64::INFINITY, f64::min)
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn gb(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}
