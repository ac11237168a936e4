//! Reading an image from the beginning to the end: while one batch of pages is
//! used, the next one is decoded, the one after is read, and the places of
//! those behind are looked up.
//!
//! ```text
//! map (a thread) -> read (a thread) -> decode, verify (all cores) -> the caller
//! ```
//!
//! Between two stages there wait a window of places or two batches at most, so
//! memory is bounded: about 4 MiB for each batch, and the frames that are kept.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use rayon::prelude::*;

use super::coalesce::coalesce;
use super::map::{FrameRef, Location};
use super::page_reader::{decode_pages, page_in, verified_all};
use super::window::Window;
use crate::chunk::Page;
use crate::depot::Depot;
use crate::error::StoreError;
use crate::id::{ChunkId, PackId};
use crate::pack::Frame;
use crate::tree::RootRecord;
use crate::units::{pages_of, to_usize};

/// Pages whose places are looked up together: 16 MiB of the image.
const WINDOW_PAGES: u64 = 1 << 12;
/// Pages that are decoded together: 4 MiB.
const BATCH_PAGES: usize = 1 << 10;
/// Batches that wait between two stages.
const WAITING_MAX: usize = 2;

/// A verified page of the image, still in its frame.
#[derive(Debug)]
pub(super) struct ReadPage {
    pub(super) page: u64,
    frame: Arc<Frame>,
    slot: u32,
}

impl ReadPage {
    pub(super) fn bytes(&self) -> Result<&Page, StoreError> {
        page_in(&self.frame, self.slot)
            .map_err(|_| StoreError::Invalid("a verified page left its frame"))
    }
}

/// What the caller gets: pages, ascending, and how far the image is done.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) pages: Vec<ReadPage>,
    pub(super) pages_done: u64,
}

type Passed<T> = Result<T, StoreError>;

/// The stored bytes of a frame, or what it was decoded to before.
enum Raw {
    Kept(Arc<Frame>),
    Bytes {
        buffer: Arc<Vec<u8>>,
        start: usize,
        len: usize,
    },
    /// It is read once more, to say why.
    Failed,
}

struct FrameJob {
    at: FrameRef,
    raw: Raw,
    pages: Vec<(u64, Location)>,
}

struct RawBatch {
    window: Arc<Window>,
    jobs: Vec<FrameJob>,
    pages_done: u64,
}

/// Hands over all pages of an image that are not zero.
pub(super) fn read_through(
    depot: &Depot,
    root: &RootRecord,
    sink: &mut dyn FnMut(Batch) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let (windows, mapped) = sync_channel(1);
    let (raw, read) = sync_channel(WAITING_MAX);
    let (decoded, ready) = sync_channel(WAITING_MAX);
    std::thread::scope(|scope| {
        // Each ends when the one behind it does.
        scope.spawn(move || map(depot, root, &windows));
        scope.spawn(move || read_windows(depot, mapped, &raw));
        scope.spawn(move || decode_batches(depot, read, &decoded));
        ready.into_iter().try_for_each(|batch| sink(batch?))
    })
}

fn map(depot: &Depot, root: &RootRecord, out: &SyncSender<Passed<(Window, u64)>>) {
    let pages = pages_of(root.len);
    let mut start = 0;
    while start < pages {
        let end = (start + WINDOW_PAGES).min(pages);
        let window = Window::open(depot, root, &(start..end));
        let failed = window.is_err();
        if out.send(window.map(|window| (window, end))).is_err() || failed {
            return;
        }
        start = end;
    }
}

fn read_windows(
    depot: &Depot,
    windows: Receiver<Passed<(Window, u64)>>,
    out: &SyncSender<Passed<RawBatch>>,
) {
    for window in windows {
        let (window, end) = match window {
            Ok(opened) => opened,
            Err(error) => return drop(out.send(Err(error))),
        };
        let window = Arc::new(window);
        let pages: Vec<(u64, Location)> = window.map.stored(0..u64::MAX).collect();
        let mut batches = pages.chunks(BATCH_PAGES).peekable();
        if batches.peek().is_none() {
            let jobs = Vec::new();
            let window = Arc::clone(&window);
            if out.send(Ok(RawBatch { window, jobs, pages_done: end })).is_err() {
                return;
            }
        }
        while let Some(batch) = batches.next() {
            let next = batches.peek().and_then(|next| next.first());
            let pages_done = next.map_or(end, |(page, _)| *page);
            let jobs = read_batch(depot, &window, batch);
            let window = Arc::clone(&window);
            if out.send(Ok(RawBatch { window, jobs, pages_done })).is_err() {
                return;
            }
        }
    }
}

/// Reads the frames of a batch, neighbours with one request.
fn read_batch(depot: &Depot, window: &Window, pages: &[(u64, Location)]) -> Vec<FrameJob> {
    let mut numbers: HashMap<(PackId, u64), usize> = HashMap::new();
    let mut jobs: Vec<FrameJob> = Vec::new();
    for (page, location) in pages {
        let at = location.frame;
        let number = *numbers.entry((at.pack, at.offset)).or_insert_with(|| {
            let kept = depot.chunk_frames().kept((at.pack, at.offset));
            let raw = kept.map_or(Raw::Failed, Raw::Kept);
            jobs.push(FrameJob { at, raw, pages: Vec::new() });
            jobs.len() - 1
        });
        jobs[number].pages.push((*page, *location));
    }
    jobs.sort_unstable_by_key(|job| (job.at.pack, job.at.offset));
    jobs.chunk_by_mut(|one, next| one.at.pack == next.at.pack)
        .for_each(|of_pack| read_pack(depot, window, of_pack));
    jobs
}

/// Reads those frames of one pack that are not there yet.
fn read_pack(depot: &Depot, window: &Window, jobs: &mut [FrameJob]) {
    let mut missing: Vec<&mut FrameJob> =
        jobs.iter_mut().filter(|job| matches!(job.raw, Raw::Failed)).collect();
    let Some(Ok(file)) = missing.first().map(|job| window.file(depot, &job.at)) else { return };
    let parts: Vec<(u64, u32)> = missing.iter().map(|job| (job.at.offset, job.at.len)).collect();
    let requests = coalesce(&parts);
    let ranges: Vec<(u64, usize)> =
        requests.iter().map(|request| (request.offset, to_usize(request.len))).collect();
    for (request, bytes) in requests.into_iter().zip(file.read_many(&ranges)) {
        let Ok(bytes) = bytes else { continue };
        let buffer = Arc::new(bytes);
        for job in &mut missing[request.parts] {
            let start = to_usize(job.at.offset - request.offset);
            let len = to_usize(u64::from(job.at.len));
            job.raw = Raw::Bytes { buffer: Arc::clone(&buffer), start, len };
        }
    }
}

fn decode_batches(
    depot: &Depot,
    batches: Receiver<Passed<RawBatch>>,
    out: &SyncSender<Passed<Batch>>,
) {
    for batch in batches {
        let decoded = batch.and_then(|batch| decode_batch(depot, batch));
        let failed = decoded.is_err();
        if out.send(decoded).is_err() || failed {
            return;
        }
    }
}

fn decode_batch(depot: &Depot, batch: RawBatch) -> Result<Batch, StoreError> {
    let RawBatch { window, jobs, pages_done } = batch;
    let decode = |job: FrameJob| decode_job(depot, &window, job);
    let pages: Vec<Vec<ReadPage>> =
        jobs.into_par_iter().map(decode).collect::<Result<_, StoreError>>()?;
    let mut pages: Vec<ReadPage> = pages.into_iter().flatten().collect();
    pages.sort_unstable_by_key(|page| page.page);
    Ok(Batch { pages, pages_done })
}

/// Decodes a frame and verifies its pages; those that are not in it are looked
/// for elsewhere.
fn decode_job(depot: &Depot, window: &Window, job: FrameJob) -> Result<Vec<ReadPage>, StoreError> {
    let key = (job.at.pack, job.at.offset);
    let frame = match job.raw {
        Raw::Kept(frame) => Ok(frame),
        Raw::Bytes { buffer, start, len } => {
            depot.chunk_frames().get(key, || decode_pages(&buffer[start..start + len]))
        }
        Raw::Failed => window.frame(depot, &job.at),
    };
    let wanted: Vec<(u32, ChunkId)> = job.pages.iter().map(|(_, at)| (at.slot, at.chunk)).collect();
    let sound: Vec<bool> = match &frame {
        Ok(frame) => verified_all(frame, &wanted).iter().map(Result::is_ok).collect(),
        Err(_) => vec![false; wanted.len()],
    };
    let pages = job.pages.iter().zip(sound).map(|((page, at), is_sound)| match &frame {
        Ok(frame) if is_sound => {
            Ok(ReadPage { page: *page, frame: Arc::clone(frame), slot: at.slot })
        }
        _ => window.read_again(depot, *page, at).map(|frame| ReadPage {
            page: *page,
            frame: Arc::new(frame),
            slot: 0,
        }),
    });
    pages.collect()
}
