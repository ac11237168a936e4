//! How byte streams are cut: what each cutter finds alike in versions of a
//! stream, what that costs in metadata, and how fast the store takes and gives
//! streams.
//!
//! ```sh
//! streams release-1.tar release-2.tar release-3.tar
//! ```
//!
//! Prints one JSON document; progress goes to standard error.

use std::collections::HashSet;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;
use coppice_engine::{
    ChunkId, ImportKind, ImportOptions, Name, Settings, Store, StoreError, stream_root_of,
};
use fastcdc::v2020::{FastCDC, Normalization};
use serde_json::{Value, json};

/// What each unique chunk takes beside its bytes: key and length in the pack,
/// entry of the index, child of a leaf.
const METADATA_LEN: usize = 20 + 4 + 28 + 36;
/// Plaintext compressed together.
const FRAME_LEN: usize = 64 << 10;

/// Measures how byte streams are cut, stored and read.
#[derive(Debug, Parser)]
struct Options {
    /// Versions of a stream, oldest first
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Where to make the store [default: a temporary folder]
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Only store and read, in the way that the store cuts
    #[arg(long)]
    store_only: bool,
}

/// A way to cut.
#[derive(Debug, Clone, Copy)]
enum Cutter {
    Fixed(usize),
    /// Least, mean and largest length, and how hard lengths are pulled to the
    /// mean.
    Content([usize; 3], Normalization),
}

impl Cutter {
    fn name(self) -> String {
        match self {
            Self::Fixed(len) => format!("fixed {} KiB", len >> 10),
            Self::Content([min, mean, max], level) => {
                format!("FastCDC {}-{}-{} KiB, level {level}", min >> 10, mean >> 10, max >> 10)
            }
        }
    }

    fn cut(self, bytes: &[u8]) -> Vec<&[u8]> {
        match self {
            Self::Fixed(len) => bytes.chunks(len).collect(),
            Self::Content([min, mean, max], level) => {
                FastCDC::with_level(bytes, min, mean, max, level)
                    .map(|chunk| &bytes[chunk.offset..chunk.offset + chunk.length])
                    .collect()
            }
        }
    }
}

fn cutters() -> Vec<Cutter> {
    let kib = |lens: [usize; 3]| lens.map(|len| len << 10);
    let means = [[1, 4, 16], [2, 8, 32], [4, 16, 64], [8, 32, 128], [16, 64, 256], [64, 256, 1024]];
    let mut all = vec![Cutter::Fixed(4 << 10), Cutter::Fixed(64 << 10)];
    all.extend(means.map(|lens| Cutter::Content(kib(lens), Normalization::Level1)));
    let levels = [Normalization::Level0, Normalization::Level2, Normalization::Level3];
    all.extend(levels.map(|level| Cutter::Content(kib([4, 16, 64]), level)));
    all
}

/// What a cutter makes of all versions together.
fn study(cutter: Cutter, versions: &[Vec<u8>]) -> Result<Value> {
    let mut seen = HashSet::new();
    let mut frame = Vec::with_capacity(FRAME_LEN);
    let (mut cut_seconds, mut chunks, mut unique, mut stored) = (0.0, 0_usize, 0_usize, 0_usize);
    for bytes in versions {
        let begun = Instant::now();
        let pieces = cutter.cut(bytes);
        cut_seconds += begun.elapsed().as_secs_f64();
        chunks += pieces.len();
        for piece in pieces {
            if piece.iter().all(|byte| *byte == 0) || !seen.insert(ChunkId::of(piece)) {
                continue;
            }
            unique += piece.len();
            if frame.len() + piece.len() > FRAME_LEN.max(piece.len()) {
                stored += zstd::bulk::compress(&frame, 1)?.len();
                frame.clear();
            }
            frame.extend_from_slice(piece);
        }
        stored += zstd::bulk::compress(&frame, 1)?.len();
        frame.clear();
    }
    let total: usize = versions.iter().map(Vec::len).sum();
    let metadata = seen.len() * METADATA_LEN;
    eprintln!("{}: {unique} unique, {stored} + {metadata} stored", cutter.name());
    Ok(json!({
        "cutter": cutter.name(),
        "chunks": chunks,
        "unique_chunks": seen.len(),
        "unique_bytes": unique,
        "compressed_bytes": stored,
        "metadata_bytes": metadata,
        "dedup_ratio": ratio(total, unique),
        "ratio_in_all": ratio(total, stored + metadata),
        "cut_mb_per_second": ratio(total, 1_000_000) / cut_seconds,
    }))
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn ratio(part: usize, whole: usize) -> f64 {
    part as f64 / whole as f64
}

fn import(store: &Store, path: &Path, name: &str) -> Result<Value> {
    let options = ImportOptions { kind: ImportKind::Stream, ..ImportOptions::default() };
    let name: Name = name.parse()?;
    let file = File::open(path).with_context(|| path.display().to_string())?;
    let done = store.import(&file, name, options, &mut |_| {})?;
    let length = usize::try_from(done.logical_bytes)?;
    Ok(json!({
        "logical_bytes": done.logical_bytes,
        "new_bytes": done.new_bytes,
        "stored_bytes": done.stored_bytes,
        "mb_per_second": ratio(length, 1_000_000) / done.seconds,
    }))
}

/// Counts and forgets what is written.
struct Nowhere;

impl Write for Nowhere {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn export(store: &Store, name: &str, folder: &Path) -> Result<Value, StoreError> {
    let image = store.lookup(name)?.record.images[0].1;
    let length = usize::try_from(image.len).unwrap_or(usize::MAX);
    let begun = Instant::now();
    store.export_to(&image, &mut Nowhere, &mut |_| {})?;
    let piped = begun.elapsed().as_secs_f64();
    let failed = |source| StoreError::Transfer { op: "make a file", source };
    let out = File::create(folder.join("out")).map_err(failed)?;
    let begun = Instant::now();
    store.export(&image, &out, &mut |_| {})?;
    let filed = begun.elapsed().as_secs_f64();
    Ok(json!({
        "to_a_pipe_mb_per_second": ratio(length, 1_000_000) / piped,
        "to_a_file_mb_per_second": ratio(length, 1_000_000) / filed,
    }))
}

/// What the store does with all versions, and with a byte before the last one.
fn through_the_store(options: &Options, versions: &[Vec<u8>]) -> Result<Value> {
    let temporary = tempfile::tempdir()?;
    let folder = options.folder.as_deref().unwrap_or(temporary.path());
    let store = Store::open(&folder.join("store"), &Settings::default())?;
    let mut rows = Vec::new();
    for (path, number) in options.files.iter().zip(0..) {
        rows.push(import(&store, path, &format!("v{number}"))?);
        eprintln!("stored {}", path.display());
    }
    let last = versions.last().context("a version")?;
    let moved = folder.join("moved");
    std::fs::write(&moved, [&[42][..], last].concat())?;
    let inserted = import(&store, &moved, "moved")?;
    // What cutting and hashing alone take, on one thread each.
    let begun = Instant::now();
    let root = stream_root_of(&last[..])?;
    let bare = begun.elapsed().as_secs_f64();
    anyhow::ensure!(store.lookup(&format!("v{}", rows.len() - 1))?.record.images[0].1 == root);
    let again = import(&store, options.files.last().context("a version")?, "again")?;
    Ok(json!({
        "versions": rows,
        "a_byte_before_the_last": inserted,
        "the_last_again": again,
        "root_alone_mb_per_second": ratio(last.len(), 1_000_000) / bare,
        "export": export(&store, "again", folder)?,
        "stats": store.stats(),
    }))
}

fn main() -> Result<()> {
    let options = Options::parse();
    let read = |path: &PathBuf| std::fs::read(path).with_context(|| path.display().to_string());
    let versions: Vec<Vec<u8>> = options.files.iter().map(read).collect::<Result<_>>()?;
    let study = match options.store_only {
        true => Vec::new(),
        false => {
            cutters().into_iter().map(|cutter| study(cutter, &versions)).collect::<Result<_>>()?
        }
    };
    let store = through_the_store(&options, &versions)?;
    let document = json!({ "cutters": study, "store": store });
    println!("{}", serde_json::to_string_pretty(&document)?);
    Ok(())
}
