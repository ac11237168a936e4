//! What frame size, zstd level and dictionary do to size and to the cost of
//! compressing and decoding: on real pages, deduplicated as a store does it.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use coppice_engine::{ChunkId, PAGE_LEN, Page, chunk_ids};
use rayon::prelude::*;
use serde::Serialize;
use zstd::bulk::{Compressor, Decompressor};

use crate::primitives::cpu_time;

/// Bytes of a frame that are not its content.
pub const FRAME_HEADER_LEN: usize = 80;
/// Pages that stay together when a sample is drawn: 1 MiB.
const RUN_PAGES: usize = 256;
const FRAME_KIB: [usize; 6] = [4, 8, 16, 32, 64, 128];
const LEVELS: [i32; 5] = [-1, 1, 3, 6, 9];
const DICTIONARY_LEN: usize = 110 << 10;
/// Frames that are decoded one by one.
const DECODED_FRAMES: usize = 500;

/// One way to make frames.
#[derive(Debug, Serialize)]
pub struct FrameRow {
    frame_kib: usize,
    zstd_level: i32,
    dictionary: bool,
    /// Stored bytes, headers included, of a hundred plain ones.
    stored_percent: f64,
    /// CPU time.
    compress_mb_per_s: f64,
    /// CPU time of one frame.
    decode_us_per_frame: f64,
    decode_mb_per_s: f64,
}

/// Pages of files in order, each once, no zeros; evenly drawn runs of them if
/// there are more than `bytes_max`.
pub fn unique_pages(files: &[PathBuf], bytes_max: usize) -> Result<Vec<u8>> {
    let mut seen: HashSet<ChunkId> = HashSet::new();
    let mut unique = Vec::new();
    let mut buffer = vec![0; 4 << 20];
    for path in files {
        let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        let len = file.metadata()?.len();
        let mut at = 0;
        while at < len {
            let count = usize::try_from((len - at).min(u64::try_from(buffer.len())?))?;
            file.read_exact_at(&mut buffer[..count], at)?;
            at += u64::try_from(count)?;
            let (pages, _) = buffer[..count].as_chunks::<PAGE_LEN>();
            let pages: Vec<&Page> = pages.iter().filter(|page| **page != [0; PAGE_LEN]).collect();
            let new = pages.iter().zip(chunk_ids(&pages)).filter(|(_, id)| seen.insert(*id));
            new.for_each(|(page, _)| unique.extend_from_slice(*page));
        }
    }
    Ok(sample(unique, bytes_max))
}

fn sample(unique: Vec<u8>, bytes_max: usize) -> Vec<u8> {
    let run = RUN_PAGES * PAGE_LEN;
    let every = unique.len().div_ceil(bytes_max.max(run));
    if every <= 1 {
        return unique;
    }
    unique.chunks(run).step_by(every).flatten().copied().collect()
}

/// Every combination of size, level and dictionary.
pub fn study(pages: &[u8], say: &dyn Fn(&str)) -> Result<Vec<FrameRow>> {
    let mut rows = Vec::new();
    for kib in FRAME_KIB {
        say(&format!("frames of {kib} KiB"));
        let frames: Vec<&[u8]> = pages.chunks(kib << 10).collect();
        // Trained on frames that are spread over the sample, as many as the
        // trainer is made for: a hundred times the dictionary.
        let every = (pages.len() / (100 * DICTIONARY_LEN)).max(1);
        let samples: Vec<&[u8]> = frames.iter().step_by(every).copied().collect();
        let trained = zstd::dict::from_samples(&samples, DICTIONARY_LEN)?;
        for level in LEVELS {
            rows.push(row(&frames, kib, level, None)?);
            rows.push(row(&frames, kib, level, Some(&trained))?);
        }
    }
    Ok(rows)
}

fn row(
    frames: &[&[u8]],
    frame_kib: usize,
    level: i32,
    dictionary: Option<&Vec<u8>>,
) -> Result<FrameRow> {
    let dictionary = dictionary.map_or(&[][..], Vec::as_slice);
    // Digested once, as a store would keep it.
    let prepared = zstd::dict::EncoderDictionary::copy(dictionary, level);
    let begin = || Compressor::with_prepared_dictionary(&prepared);
    let cpu = cpu_time();
    let packed = frames
        .par_iter()
        .map_init(begin, |packer, frame| match packer {
            Ok(packer) => packer.compress(frame),
            Err(error) => Err(std::io::Error::other(error.to_string())),
        })
        .collect::<Result<Vec<Vec<u8>>, _>>()?;
    let compress = cpu_time() - cpu;
    let plain: usize = frames.iter().map(|frame| frame.len()).sum();
    let pairs = frames.iter().zip(&packed);
    let stored: usize =
        pairs.map(|(frame, packed)| packed.len().min(frame.len()) + FRAME_HEADER_LEN).sum();
    let (decoded, took) = decode(frames, &packed, dictionary)?;
    let count = packed.len().clamp(1, DECODED_FRAMES);
    Ok(FrameRow {
        frame_kib,
        zstd_level: level,
        dictionary: !dictionary.is_empty(),
        stored_percent: 100.0 * real(stored) / real(plain),
        compress_mb_per_s: real(plain) / 1e6 / compress.as_secs_f64(),
        decode_us_per_frame: took.as_secs_f64() * 1e6 / real(count),
        decode_mb_per_s: real(decoded) / 1e6 / took.as_secs_f64(),
    })
}

/// Decodes some frames, spread over all; returns their bytes and the CPU time.
fn decode(frames: &[&[u8]], packed: &[Vec<u8>], dictionary: &[u8]) -> Result<(usize, Duration)> {
    let prepared = zstd::dict::DecoderDictionary::copy(dictionary);
    let mut unpacker = Decompressor::with_prepared_dictionary(&prepared)?;
    let every = (packed.len() / DECODED_FRAMES).max(1);
    let chosen = packed.iter().zip(frames).step_by(every).take(DECODED_FRAMES);
    let mut out = Vec::with_capacity(frames.first().map_or(0, |frame| frame.len()));
    let (mut bytes, mut took) = (0, Duration::ZERO);
    for (packed, frame) in chosen {
        out.clear();
        let cpu = cpu_time();
        unpacker.decompress_to_buffer(packed, &mut out)?;
        took += cpu_time() - cpu;
        anyhow::ensure!(out == *frame, "a frame did not come back");
        bytes += out.len();
    }
    Ok((bytes, took))
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn real(count: usize) -> f64 {
    count as f64
}
