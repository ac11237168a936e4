//! The bare primitives of ingest, on the bytes that are ingested: what no
//! store can do without.

use std::fs::File;
use std::hint::black_box;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use coppice_engine::{ChunkId, PAGE_LEN, Page, Settings, chunk_ids};
use rayon::prelude::*;
use serde::Serialize;

/// Bytes on which each primitive has its turn.
const WINDOW_LEN: usize = 64 << 20;
const FRAME_LEN: usize = 64 << 10;

/// What each primitive took for all pages that are not zero.
#[derive(Debug, Default, Clone, Copy)]
pub struct Primitives {
    /// Bytes that were not zero.
    pub bytes: u64,
    /// What zstd made of them, each 64 KiB by itself.
    pub packed_bytes: u64,
    /// Reading them from the page cache.
    pub read: Duration,
    /// Copying them in memory, one core.
    pub copy: Duration,
    /// BLAKE3 of each page by the plain crate, one core.
    pub hash_plain: Duration,
    /// BLAKE3 of the pages across lanes, one core.
    pub hash_lanes: Duration,
    /// BLAKE3 of the pages across lanes, all cores.
    pub hash_all_cores: Duration,
    /// zstd at a store's level, all cores.
    pub compress_all_cores: Duration,
    /// Writing what zstd made, flush included.
    pub write: Duration,
    /// CPU time of reading, hashing, compressing and writing.
    pub cpu: Duration,
}

/// The same as rates, in bytes of input a second.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Rates {
    bytes: u64,
    packed_bytes: u64,
    read_gb_per_s: f64,
    copy_gb_per_s: f64,
    hash_plain_one_core_gb_per_s: f64,
    hash_lanes_one_core_gb_per_s: f64,
    hash_lanes_to_plain_ratio: f64,
    hash_all_cores_gb_per_s: f64,
    compress_all_cores_gb_per_s: f64,
    write_gb_per_s: f64,
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn rate(bytes: u64, took: Duration) -> f64 {
    bytes as f64 / took.as_secs_f64().max(1e-9) / 1e9
}

impl Primitives {
    /// Measures each in turn, a window at a time; `scratch` is written to.
    pub fn measure(input: &File, scratch: &Path) -> Result<Self> {
        let len = input.metadata()?.len();
        let mut sum = Self::default();
        let mut buffer = vec![0; WINDOW_LEN];
        let mut copy = vec![0; WINDOW_LEN];
        let mut out = File::create(scratch)?;
        let mut at = 0;
        while at < len {
            let count = usize::try_from((len - at).min(u64::try_from(WINDOW_LEN)?))?;
            let (begun, cpu) = (Instant::now(), cpu_time());
            input.read_exact_at(&mut buffer[..count], at)?;
            let (read, cpu) = (begun.elapsed(), cpu_time() - cpu);
            at += u64::try_from(count)?;
            let kept = squeeze(&mut buffer[..count]);
            if let Some(share) = count.checked_div(kept) {
                let share = u32::try_from(share)?;
                sum.read += read / share;
                sum.cpu += cpu / share;
                sum.window(&buffer[..kept], &mut copy, &mut out)?;
            }
        }
        let (begun, cpu) = (Instant::now(), cpu_time());
        out.sync_all()?;
        sum.write += begun.elapsed();
        sum.cpu += cpu_time() - cpu;
        std::fs::remove_file(scratch).context("cannot remove the scratch file")?;
        Ok(sum)
    }

    fn window(&mut self, bytes: &[u8], copy: &mut [u8], out: &mut File) -> Result<()> {
        self.bytes += u64::try_from(bytes.len())?;
        let (pages, _) = bytes.as_chunks::<PAGE_LEN>();
        let pages: Vec<&Page> = pages.iter().collect();
        self.copy += time(|| {
            copy[..bytes.len()].copy_from_slice(black_box(bytes));
            black_box(&copy);
        });
        self.hash_plain += time(|| {
            let ids: Vec<ChunkId> = pages.iter().map(|page| ChunkId::of(*page)).collect();
            black_box(ids);
        });
        self.hash_lanes += time(|| drop(black_box(chunk_ids(&pages))));
        let cpu = cpu_time();
        self.hash_all_cores += time(|| {
            let ids: Vec<ChunkId> = pages.par_chunks(64).flat_map_iter(chunk_ids).collect();
            black_box(ids);
        });
        let mut packed = Vec::new();
        self.compress_all_cores += time(|| packed = compress(bytes));
        self.packed_bytes += u64::try_from(packed.iter().map(Vec::len).sum::<usize>())?;
        let begun = Instant::now();
        packed.iter().try_for_each(|frame| out.write_all(frame))?;
        self.write += begun.elapsed();
        self.cpu += cpu_time() - cpu;
        Ok(())
    }

    /// The slowest of those that have to be done on this machine, if all the
    /// others cost nothing.
    pub fn slowest(&self) -> Duration {
        self.read.max(self.hash_all_cores).max(self.compress_all_cores).max(self.write)
    }

    /// For printing.
    pub fn rates(&self) -> Rates {
        let of = |took| rate(self.bytes, took);
        Rates {
            bytes: self.bytes,
            packed_bytes: self.packed_bytes,
            read_gb_per_s: of(self.read),
            copy_gb_per_s: of(self.copy),
            hash_plain_one_core_gb_per_s: of(self.hash_plain),
            hash_lanes_one_core_gb_per_s: of(self.hash_lanes),
            hash_lanes_to_plain_ratio: of(self.hash_lanes) / of(self.hash_plain),
            hash_all_cores_gb_per_s: of(self.hash_all_cores),
            compress_all_cores_gb_per_s: of(self.compress_all_cores),
            write_gb_per_s: of(self.write),
        }
    }
}

/// CPU time of this process so far, all threads.
pub fn cpu_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::try_from(now).unwrap_or_default()
}

fn time(work: impl FnOnce()) -> Duration {
    let begun = Instant::now();
    work();
    begun.elapsed()
}

/// Moves the pages that are not zero together and says how long they are.
fn squeeze(bytes: &mut [u8]) -> usize {
    let mut kept = 0;
    for at in (0..bytes.len() - bytes.len() % PAGE_LEN).step_by(PAGE_LEN) {
        if bytes[at..at + PAGE_LEN] != [0; PAGE_LEN] {
            bytes.copy_within(at..at + PAGE_LEN, kept);
            kept += PAGE_LEN;
        }
    }
    kept
}

fn compress(bytes: &[u8]) -> Vec<Vec<u8>> {
    let level = Settings::default().zstd_level;
    let begin = || zstd::bulk::Compressor::new(level).expect("zstd has this level");
    bytes
        .par_chunks(FRAME_LEN)
        .map_init(begin, |packer, frame| packer.compress(frame).expect("memory for a frame"))
        .collect()
}
