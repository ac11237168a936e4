//! Straightening: an image that was changed here and there has its pages in
//! many frames, each of which holds little of it. Those that hold least are
//! left behind: their pages are written once more, together and in the order
//! of the image, until reading the whole image takes few enough frames.
//!
//! The copies lie in a younger pack, so the index names them from then on, and
//! what they were copied from is dead as soon as no frame of it is needed. Only
//! images that no later snapshot builds on are looked at: later ones have
//! mostly the pages of earlier ones.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use rayon::prelude::*;

use super::plan::GcFragmented;
use crate::catalog::Entry;
use crate::depot::Depot;
use crate::error::{ReadError, StoreError};
use crate::id::ObjectKey;
use crate::pack::frame::{self, EncodedFrame};
use crate::pack::{Frame, FrameKind, PackWriter};
use crate::read::{Ask, FrameRef, Location, PageMap, build_map, read_frame, verified};
use crate::settings::Settings;
use crate::tree::{ImageRef, Splitter};
use crate::units::{PAGE_LEN, pages_of, to_u64, to_usize};

/// Pages copied before their frames are forgotten: 16 MiB.
const BATCH_PAGES: usize = 4096;

/// What straightening did.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Straightened {
    pub(super) images: u64,
    pub(super) rewritten_bytes: u64,
}

/// An image that takes too many frames, and what would mend it.
struct Crooked {
    told: GcFragmented,
    /// Where the pages that move are now, in the order of the image, each
    /// chunk once.
    moving: Vec<Location>,
}

/// The images that take too many frames.
pub(super) fn fragmented(
    depot: &Depot,
    entries: &[Entry],
    settings: &Settings,
    percent_max: u32,
) -> Result<Vec<GcFragmented>, StoreError> {
    let mut all = Vec::new();
    for image in heads(entries) {
        all.extend(look(depot, &image, settings, percent_max)?.map(|crooked| crooked.told));
    }
    Ok(all)
}

/// Mends the images that take too many frames.
pub(super) fn straighten(
    depot: &Arc<Depot>,
    entries: &[Entry],
    settings: &Settings,
    percent_max: u32,
) -> Result<Straightened, StoreError> {
    let mut done = Straightened::default();
    for image in heads(entries) {
        if let Some(crooked) = look(depot, &image, settings, percent_max)? {
            done.images += 1;
            done.rewritten_bytes += write_anew(depot, &crooked.moving, settings)?;
            // Readers find the copies from now on.
            let root = depot.root(&image)?;
            build_map(depot, &root, &(0..pages_of(root.len)), Ask::IndexAndRenew)?;
        }
    }
    Ok(done)
}

/// The page images of snapshots that no listed one was made from.
fn heads(entries: &[Entry]) -> Vec<ImageRef> {
    let parents: HashSet<_> = entries.iter().filter_map(|entry| entry.record.parent).collect();
    let mut seen = HashSet::new();
    entries
        .iter()
        .filter(|entry| !parents.contains(&entry.id))
        .flat_map(|entry| entry.record.images.iter().map(|(_, image)| *image))
        .filter(|image| image.splitter == Splitter::Fixed4K && seen.insert(*image))
        .collect()
}

fn look(
    depot: &Depot,
    image: &ImageRef,
    settings: &Settings,
    percent_max: u32,
) -> Result<Option<Crooked>, StoreError> {
    let root = depot.root(image)?;
    let map = build_map(depot, &root, &(0..pages_of(root.len)), Ask::Index)?.map;
    let in_frame = to_u64(settings.frame_len_max / PAGE_LEN);
    let fresh = map.stored_pages().div_ceil(in_frame);
    let frames = to_u64(map.frames().len());
    if frames * 100 <= fresh * u64::from(percent_max) {
        return Ok(None);
    }
    // Half-way to a fresh image, so that the next change is not too much.
    let wanted = fresh * (100 + u64::from(percent_max)) / 200;
    let leaving = leaving(&map, wanted, in_frame);
    if leaving.is_empty() {
        return Ok(None);
    }
    let mut seen = HashSet::new();
    let moving: Vec<Location> = map
        .stored(0..u64::MAX)
        .map(|(_, location)| location)
        .filter(|at| leaving.contains(&at.frame) && seen.insert(at.chunk))
        .collect();
    let told = GcFragmented {
        root: image.root,
        frames,
        frames_when_fresh: fresh,
        rewritten_pages: to_u64(moving.len()),
    };
    Ok(Some(Crooked { told, moving }))
}

/// The frames to leave behind: those that hold least of the image, as long as
/// fewer take their place.
fn leaving(map: &PageMap, wanted: u64, in_frame: u64) -> HashSet<FrameRef> {
    let mut held: HashMap<FrameRef, u64> = HashMap::new();
    let there = map.stored(0..u64::MAX).filter(|(_, at)| at.frame != FrameRef::NOWHERE);
    for (_, at) in there {
        *held.entry(at.frame).or_default() += 1;
    }
    let mut by_use: Vec<(u64, FrameRef)> =
        held.into_iter().map(|(at, count)| (count, at)).collect();
    by_use.sort_unstable();
    let (mut pages, mut leaving) = (0, HashSet::new());
    let mut left = to_u64(by_use.len());
    for (count, at) in by_use {
        let new = (pages + count).div_ceil(in_frame);
        if left + pages.div_ceil(in_frame) <= wanted || count >= in_frame {
            break;
        }
        if left - 1 + new > left + pages.div_ceil(in_frame) {
            break;
        }
        (pages, left) = (pages + count, left - 1);
        leaving.insert(at);
    }
    leaving
}

/// Writes chunks once more, together. Returns the bytes of the new packs.
fn write_anew(
    depot: &Arc<Depot>,
    moving: &[Location],
    settings: &Settings,
) -> Result<u64, StoreError> {
    let objects_max = to_usize(u64::from(settings.pack_objects_max)).max(1);
    let mut bytes = 0;
    for part in moving.chunks(objects_max) {
        let mut writer = depot.begin_pack()?;
        let path = writer.path().to_owned();
        copy(depot, part, &mut writer, settings).inspect_err(|_| depot.abandon(&path))?;
        let (_, len) = depot.publish(writer, None)?;
        bytes += len;
    }
    Ok(bytes)
}

fn copy(
    depot: &Depot,
    moving: &[Location],
    writer: &mut PackWriter,
    settings: &Settings,
) -> Result<(), StoreError> {
    let in_frame = settings.frame_len_max / PAGE_LEN;
    for batch in moving.chunks(BATCH_PAGES.next_multiple_of(in_frame)) {
        let frames = read_frames(depot, batch)?;
        let encoded: Vec<EncodedFrame> = batch
            .par_chunks(in_frame)
            .map(|pages| together(pages, &frames, settings.zstd_level))
            .collect::<Result<_, StoreError>>()?;
        encoded.iter().try_for_each(|frame| writer.append(frame))?;
    }
    Ok(())
}

fn read_frames(depot: &Depot, pages: &[Location]) -> Result<HashMap<FrameRef, Frame>, StoreError> {
    let mut first: HashMap<FrameRef, Location> = HashMap::new();
    for at in pages {
        first.entry(at.frame).or_insert(*at);
    }
    first
        .into_par_iter()
        .map(|(frame, at)| {
            let plain = read_frame(depot, &frame).map_err(|cause| failed(&at, cause))?;
            Ok((frame, plain))
        })
        .collect()
}

/// A frame of these pages, each verified.
fn together(
    pages: &[Location],
    frames: &HashMap<FrameRef, Frame>,
    level: i32,
) -> Result<EncodedFrame, StoreError> {
    let mut plain = Vec::with_capacity(pages.len() * PAGE_LEN);
    for at in pages {
        let frame = frames.get(&at.frame).expect("all frames of the batch were read");
        let page = verified(frame, at.slot, &at.chunk).map_err(|cause| failed(at, cause))?;
        plain.extend_from_slice(page);
    }
    let keys: Vec<ObjectKey> = pages.iter().map(|at| at.chunk.key()).collect();
    Ok(frame::encode(FrameKind::Pages, &plain, keys, level))
}

fn failed(at: &Location, cause: crate::error::ReadCause) -> StoreError {
    ReadError { chunk: at.chunk, pack: at.frame.pack, offset: at.frame.offset, cause }.into()
}
