//! Fixed pages against content-defined chunks: how much of a series of files
//! is unique, and what it takes to store.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use coppice_engine::{ChunkId, PAGE_LEN, Page, chunk_ids};
use fastcdc::v2020::{FastCDC, Normalization};
use rayon::prelude::*;
use serde::Serialize;

use crate::frame_study::FRAME_HEADER_LEN;

/// Bytes cut at a time; what is behind the last sure cut comes again.
const WINDOW_LEN: usize = 16 << 20;
const FRAME_LEN: usize = 64 << 10;
const LEVEL: i32 = 1;
/// About what a chunk costs beside its bytes: its place in a tree, in a pack
/// and in the index.
const CHUNK_METADATA_LEN: usize = 32 + 20 + 28;

/// How to cut.
#[derive(Debug, Clone, Copy)]
enum Splitter {
    Fixed,
    /// With this average in KiB.
    Cdc(usize),
}

const SPLITTERS: [Splitter; 4] =
    [Splitter::Fixed, Splitter::Cdc(8), Splitter::Cdc(16), Splitter::Cdc(64)];

/// One way to cut a series of files.
#[derive(Debug, Serialize)]
pub struct SplitterRow {
    splitter: String,
    logical_bytes: u64,
    unique_chunks: usize,
    unique_bytes: usize,
    /// Unique chunks in frames of 64 KiB at level 1, headers included.
    frame_bytes: usize,
    /// About what trees, packs and index need for them.
    metadata_bytes: usize,
    stored_bytes: usize,
}

/// All splitters on the same files, in order.
pub fn study(files: &[PathBuf], say: &dyn Fn(&str)) -> Result<Vec<SplitterRow>> {
    SPLITTERS
        .iter()
        .map(|splitter| {
            say(&format!("{splitter:?}"));
            row(*splitter, files)
        })
        .collect()
}

/// Counts what is new and packs it into frames.
#[derive(Default)]
struct Tally {
    seen: HashSet<ChunkId>,
    unique_bytes: usize,
    frame_bytes: usize,
    open: Vec<u8>,
    full: Vec<Vec<u8>>,
}

impl Tally {
    fn add(&mut self, id: ChunkId, bytes: &[u8]) {
        if !self.seen.insert(id) {
            return;
        }
        self.unique_bytes += bytes.len();
        if self.open.len() + bytes.len() > FRAME_LEN.max(bytes.len()) {
            self.full.push(std::mem::take(&mut self.open));
        }
        self.open.extend_from_slice(bytes);
    }

    fn flush(&mut self, is_end: bool) -> Result<()> {
        if is_end {
            self.full.push(std::mem::take(&mut self.open));
        }
        let full = std::mem::take(&mut self.full);
        let lens = full.par_iter().map(|frame| {
            let packed = zstd::bulk::compress(frame, LEVEL)?;
            Ok(packed.len().min(frame.len()) + FRAME_HEADER_LEN)
        });
        self.frame_bytes += lens.collect::<Result<Vec<usize>>>()?.iter().sum::<usize>();
        Ok(())
    }
}

fn row(splitter: Splitter, files: &[PathBuf]) -> Result<SplitterRow> {
    let mut tally = Tally::default();
    let mut logical_bytes = 0;
    for path in files {
        logical_bytes += cut_file(splitter, path, &mut tally)?;
        tally.flush(false)?;
    }
    tally.flush(true)?;
    let metadata_bytes = tally.seen.len() * CHUNK_METADATA_LEN;
    Ok(SplitterRow {
        splitter: match splitter {
            Splitter::Fixed => "fixed 4 KiB".to_owned(),
            Splitter::Cdc(kib) => format!("FastCDC {kib} KiB"),
        },
        logical_bytes,
        unique_chunks: tally.seen.len(),
        unique_bytes: tally.unique_bytes,
        frame_bytes: tally.frame_bytes,
        metadata_bytes,
        stored_bytes: tally.frame_bytes + metadata_bytes,
    })
}

fn cut_file(splitter: Splitter, path: &Path, tally: &mut Tally) -> Result<u64> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let len = file.metadata()?.len();
    let mut window = vec![0; WINDOW_LEN];
    let mut at = 0;
    while at < len {
        let count = usize::try_from((len - at).min(u64::try_from(WINDOW_LEN)?))?;
        file.read_exact_at(&mut window[..count], at)?;
        let is_end = at + u64::try_from(count)? == len;
        let done = match splitter {
            Splitter::Fixed => cut_fixed(&window[..count], tally),
            Splitter::Cdc(kib) => cut_by_content(&window[..count], kib << 10, is_end, tally),
        };
        at += u64::try_from(done)?;
        tally.flush(false)?;
    }
    Ok(len)
}

fn cut_fixed(bytes: &[u8], tally: &mut Tally) -> usize {
    let (pages, rest) = bytes.as_chunks::<PAGE_LEN>();
    let pages: Vec<&Page> = pages.iter().filter(|page| **page != [0; PAGE_LEN]).collect();
    let ids: Vec<ChunkId> = pages.par_chunks(64).flat_map_iter(chunk_ids).collect();
    ids.into_iter().zip(pages).for_each(|(id, page)| tally.add(id, page));
    if !rest.is_empty() {
        tally.add(ChunkId::of(rest), rest);
    }
    bytes.len()
}

/// Cuts as far as later bytes cannot change; returns how far that is.
fn cut_by_content(bytes: &[u8], average: usize, is_end: bool, tally: &mut Tally) -> usize {
    let (min, max) = (average / 4, average * 4);
    let cutter = FastCDC::with_level(bytes, min, average, max, Normalization::Level1);
    let mut pieces = Vec::new();
    let mut start = 0;
    while bytes.len() - start >= if is_end { 1 } else { max } {
        let (_, end) = cutter.cut(start, bytes.len() - start);
        pieces.push(&bytes[start..end]);
        start = end;
    }
    let hard = pieces.par_iter().filter(|piece| piece.iter().any(|byte| *byte != 0));
    let ids: Vec<(ChunkId, &[u8])> = hard.map(|piece| (ChunkId::of(piece), *piece)).collect();
    ids.into_iter().for_each(|(id, piece)| tally.add(id, piece));
    start
}
