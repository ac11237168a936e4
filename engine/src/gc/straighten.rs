//! Straightening: images that were changed here and there have their pages in
//! many frames, each of which holds little of them. The pages in such frames
//! are written once more, so that those which the same images need lie
//! together: then every image of a family, at whatever depth, needs few more
//! frames than a fresh copy of it, although each page lies in one place.
//!
//! The copies lie in younger packs, so the index names them from then on, and
//! what they were copied from is dead.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::cells::{Extent, Point};
use super::families::{Member, families};
use super::layout::{Layout, Taken, moved};
use super::looked::{self, Looked};
use super::plan::GcFragmented;
use crate::catalog::Entry;
use crate::depot::Depot;
use crate::error::{ReadError, StoreError};
use crate::id::ObjectKey;
use crate::pack::frame::{self, EncodedFrame};
use crate::pack::{Frame, FrameKind, PackWriter};
use crate::read::{FrameRef, Location, read_frame, verified};
use crate::settings::Settings;
use crate::tree::{FANOUT, ImageRef, RootRecord};
use crate::units::{PAGE_LEN, pages_of, to_u64, to_usize};

/// Pages copied before their frames are forgotten: 16 MiB.
const BATCH_PAGES: usize = 4096;
/// About so many chunks are looked at together.
const WINDOW_CHUNKS: u64 = 1 << 19;

/// How much may be taken.
#[derive(Debug, Clone, Copy)]
pub(super) struct Budget<'s> {
    pub(super) settings: &'s Settings,
    /// Frames of an image in percent of those of a fresh one.
    pub(super) percent_max: u64,
}

/// What straightening did.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Straightened {
    pub(super) images: u64,
    pub(super) rewritten_bytes: u64,
}

/// Writes frames of chunks together, which these leaves name.
type Write<'w> = dyn FnMut(&[Vec<Point>], &[ObjectKey]) -> Result<(), StoreError> + 'w;

/// What some images of a family take.
struct Sight {
    roots: Vec<RootRecord>,
    taken: Taken,
    /// Which take too many frames.
    crooked: Vec<bool>,
    /// Images that are not looked at came before these.
    has_elders: bool,
    windows: Vec<Range<u64>>,
    /// How the images lie, if one window shows them whole.
    whole: Option<Layout>,
}

/// The images that take too many frames; how many pages would be gathered, and
/// about how many stored bytes these are.
pub(super) fn fragmented(
    depot: &Depot,
    entries: &[Entry],
    budget: Budget<'_>,
) -> Result<(Vec<GcFragmented>, u64, u64), StoreError> {
    let (mut all, mut pages, mut bytes) = (Vec::new(), 0, 0);
    for family in families(entries) {
        for part in due(depot, &family, budget)? {
            let mut sight = look(depot, &family, part, budget)?;
            let moving = sight.mend(depot, budget, &mut |groups, _| {
                for point in groups.iter().flatten() {
                    pages += 1;
                    bytes += u64::from(point.at.frame.len / point.at.frame.count.max(1));
                }
                Ok(())
            })?;
            all.extend(sight.told(&moving, budget));
        }
    }
    Ok((all, pages, bytes))
}

/// Mends the images that take too many frames.
pub(super) fn straighten(
    depot: &Arc<Depot>,
    entries: &[Entry],
    budget: Budget<'_>,
) -> Result<Straightened, StoreError> {
    let mut done = Straightened::default();
    for family in families(entries) {
        for part in due(depot, &family, budget)? {
            let mut sight = look(depot, &family, part, budget)?;
            let moving = sight.mend(depot, budget, &mut |groups, leaves| {
                done.rewritten_bytes += write_anew(depot, groups, budget)?;
                // Readers ask the index from now on.
                depot.forget_hints(leaves);
                Ok(())
            })?;
            done.images += to_u64(sight.told(&moving, budget).len());
            looked::remember(depot, sight.found(budget));
        }
    }
    looked::forget_gone(depot, entries)?;
    Ok(done)
}

fn due(
    depot: &Depot,
    family: &[Member],
    budget: Budget<'_>,
) -> Result<Vec<Range<usize>>, StoreError> {
    looked::due(depot, family, budget.percent_max, to_u64(budget.in_frame() * PAGE_LEN))
}

/// Looks at a part of a family.
fn look(
    depot: &Depot,
    family: &[Member],
    part: Range<usize>,
    budget: Budget<'_>,
) -> Result<Sight, StoreError> {
    let has_elders = part.start > 0;
    let new_chunks = family[part.clone()].iter().map(|member| pages_of(member.new_bytes)).sum();
    let roots: Vec<RootRecord> =
        family[part].iter().map(|member| depot.root(&member.image)).collect::<Result<_, _>>()?;
    let mut taken = Taken::nothing(roots.len());
    let mut whole = None;
    let windows = windows(longest(&roots), new_chunks);
    for window in &windows {
        let layout = Layout::of(depot, &roots, window, budget.in_frame())?;
        taken.add(&layout.taken());
        whole = (windows.len() == 1).then_some(layout);
    }
    let counts = taken.frames.iter().zip(&taken.chunks);
    let crooked = counts
        .map(|(frames, chunks)| frames * 100 > budget.fresh(*chunks) * budget.percent_max)
        .collect();
    Ok(Sight { roots, taken, crooked, has_elders, windows, whole })
}

/// As many pages of all images at a time as bound what is held in memory.
fn windows(pages: u64, chunks: u64) -> Vec<Range<u64>> {
    let count = pages.max(chunks).div_ceil(WINDOW_CHUNKS).max(1);
    let step = pages.div_ceil(count).next_multiple_of(to_u64(FANOUT)).max(1);
    (0..pages.div_ceil(step)).map(|number| number * step..(number + 1) * step).collect()
}

fn longest(roots: &[RootRecord]) -> u64 {
    roots.iter().map(|root| pages_of(root.len)).max().unwrap_or(0)
}

impl Budget<'_> {
    fn in_frame(self) -> usize {
        (self.settings.frame_len_max / PAGE_LEN).max(1)
    }

    /// Frames that a fresh image of so many chunks takes.
    fn fresh(self, chunks: u64) -> u64 {
        chunks.div_ceil(to_u64(self.in_frame()))
    }
}

impl Sight {
    /// Hands out what is to be written together, with the leaves around it,
    /// window by window. Returns how many pages of each image that moves.
    fn mend(
        &mut self,
        depot: &Depot,
        budget: Budget<'_>,
        write: &mut Write<'_>,
    ) -> Result<Vec<u64>, StoreError> {
        let mut moving = vec![0; self.roots.len()];
        if !self.crooked.contains(&true) {
            return Ok(moving);
        }
        let extent = Extent { images: to_u64(self.roots.len()), pages: longest(&self.roots) };
        for window in std::mem::take(&mut self.windows) {
            let layout = match self.whole.take() {
                Some(layout) => layout,
                None => Layout::of(depot, &self.roots, &window, budget.in_frame())?,
            };
            let groups = layout.better(&self.crooked, extent, self.has_elders);
            if groups.is_empty() {
                continue;
            }
            let more = moved(moving.len(), &groups);
            moving.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
            write(&groups, &layout.leaves)?;
        }
        Ok(moving)
    }

    /// The crooked images of which something moves.
    fn told(&self, moving: &[u64], budget: Budget<'_>) -> Vec<GcFragmented> {
        let numbers = (0..self.roots.len()).filter(|at| self.crooked[*at] && moving[*at] > 0);
        numbers
            .map(|at| GcFragmented {
                root: self.roots[at].image().root,
                frames: self.taken.frames[at],
                frames_when_fresh: budget.fresh(self.taken.chunks[at]),
                rewritten_pages: moving[at],
            })
            .collect()
    }

    /// What is remembered of the images.
    fn found(&self, budget: Budget<'_>) -> impl Iterator<Item = (ImageRef, Looked)> {
        let percent_max = budget.percent_max;
        let chunks = self.taken.chunks.iter();
        self.roots
            .iter()
            .zip(chunks)
            .map(move |(root, chunks)| (root.image(), Looked { percent_max, chunks: *chunks }))
    }
}

/// Writes chunks once more, a frame for each group. Returns the bytes of the
/// new packs.
fn write_anew(
    depot: &Arc<Depot>,
    groups: &[Vec<Point>],
    budget: Budget<'_>,
) -> Result<u64, StoreError> {
    let objects_max = to_usize(u64::from(budget.settings.pack_objects_max));
    let frames_max = (objects_max / budget.in_frame()).max(1);
    let mut bytes = 0;
    for part in groups.chunks(frames_max) {
        let mut writer = depot.begin_pack()?;
        let path = writer.path().to_owned();
        copy(depot, part, &mut writer, budget).inspect_err(|_| depot.abandon(&path))?;
        let (_, len) = depot.publish(writer, None)?;
        bytes += len;
    }
    Ok(bytes)
}

fn copy(
    depot: &Depot,
    groups: &[Vec<Point>],
    writer: &mut PackWriter,
    budget: Budget<'_>,
) -> Result<(), StoreError> {
    for batch in groups.chunks(BATCH_PAGES.div_ceil(budget.in_frame())) {
        let batch: Vec<Vec<Location>> =
            batch.iter().map(|group| group.iter().map(|point| point.at).collect()).collect();
        let frames = read_frames(depot, &batch.concat())?;
        let encoded: Vec<EncodedFrame> = batch
            .par_iter()
            .map(|pages| together(pages, &frames, budget.settings.zstd_level))
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
