//! How the chunks of a family lie, and how they would lie better.

use std::collections::HashMap;
use std::ops::Range;

use super::cells::{Extent, Point, cells};
use super::lifetimes::{Lifetimes, lifetimes};
use crate::depot::Depot;
use crate::error::StoreError;
use crate::id::ObjectKey;
use crate::pack::FrameKind;
use crate::read::{FrameRef, Location};
use crate::tree::RootRecord;
use crate::units::{to_u64, to_usize};

/// A frame is left behind if the images that need it need less than this
/// share of it, in percent.
const USE_PERCENT_MIN: u64 = 75;
/// And only if that spares at least this share of the frames, in percent.
const GAIN_PERCENT_MIN: u64 = 10;

/// Some pages of a family, and where they lie.
pub(super) struct Layout {
    images: usize,
    in_frame: usize,
    /// What names the chunks.
    pub(super) leaves: Vec<ObjectKey>,
    /// Chunks by their frames, which hold pages only.
    frames: HashMap<FrameRef, Vec<Point>>,
    /// As `frames`, of other kinds: these stay.
    others: Vec<Vec<Point>>,
}

/// What images of a family take.
#[derive(Debug, Clone, Default)]
pub(super) struct Taken {
    /// Frames that each image needs.
    pub(super) frames: Vec<u64>,
    /// Different chunks that each image has.
    pub(super) chunks: Vec<u64>,
}

impl Taken {
    pub(super) fn nothing(images: usize) -> Self {
        Self { frames: vec![0; images], chunks: vec![0; images] }
    }

    pub(super) fn add(&mut self, other: &Self) {
        let add = |sums: &mut [u64], more: &[u64]| {
            sums.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
        };
        add(&mut self.frames, &other.frames);
        add(&mut self.chunks, &other.chunks);
    }
}

impl Layout {
    /// Looks where the chunks in some pages lie.
    pub(super) fn of(
        depot: &Depot,
        family: &[RootRecord],
        pages: &Range<u64>,
        in_frame: usize,
    ) -> Result<Self, StoreError> {
        let Lifetimes { chunks, leaves } = lifetimes(depot, family, pages)?;
        let lives: Vec<_> = chunks.into_iter().collect();
        let keys: Vec<ObjectKey> = lives.iter().map(|(chunk, _)| chunk.key()).collect();
        let mut layout = Self {
            images: family.len(),
            in_frame,
            leaves,
            frames: HashMap::new(),
            others: Vec::new(),
        };
        let mut others: HashMap<FrameRef, Vec<Point>> = HashMap::new();
        for ((chunk, life), place) in lives.into_iter().zip(depot.index().get_many(&keys)?) {
            let Some(place) = place else { continue };
            let Some(found) = depot.location(place)? else { continue };
            let (offset, len, count) = (found.span.offset, found.span.len, found.span.count);
            let frame = FrameRef { pack: found.pack, offset, len, count };
            let at = Location { chunk, frame, slot: found.slot };
            let point = Point { life, born: i64::from(life.first), at };
            let is_pages = found.span.kind == FrameKind::Pages;
            let frames = if is_pages { &mut layout.frames } else { &mut others };
            frames.entry(frame).or_default().push(point);
        }
        layout.others = others.into_values().collect();
        Ok(layout)
    }

    /// What the images take.
    pub(super) fn taken(&self) -> Taken {
        let all = self.frames.values().chain(&self.others);
        let mut taken = Taken::nothing(self.images);
        taken.frames = count(self.images, all.clone().flat_map(|frame| needed(frame)));
        let lives = all.flatten().map(|point| point.life.first..point.life.last + 1);
        taken.chunks = count(self.images, lives);
        taken
    }

    /// The frames to write so that the crooked images need fewer; none if
    /// that would spare too little. `has_elders` says that images which are
    /// not looked at came before these.
    pub(super) fn better(
        &self,
        crooked: &[bool],
        extent: Extent,
        has_elders: bool,
    ) -> Vec<Vec<Point>> {
        let crooked_before: Vec<u64> = sums(crooked);
        let weigh = |range: &Range<u32>| {
            let at = |number: u32| crooked_before[to_usize(u64::from(number))];
            at(range.end) - at(range.start)
        };
        let mut left = Vec::new();
        let mut frames_left = 0;
        for frame in self.frames.values() {
            let used: u64 = frame.iter().map(|p| weigh(&(p.life.first..p.life.last + 1))).sum();
            let users: u64 = needed(frame).iter().map(weigh).sum();
            if users > 0 && used * 100 < users * to_u64(self.in_frame) * USE_PERCENT_MIN {
                frames_left += users;
                left.extend(frame.iter().copied());
            }
        }
        if has_elders {
            guess_births(&mut left, extent);
        }
        let better = cells(left, self.in_frame, extent);
        let frames_new: u64 = better.iter().flat_map(|cell| needed(cell)).map(|r| weigh(&r)).sum();
        let spares = frames_left.saturating_sub(frames_new);
        if spares * 100 < frames_left * GAIN_PERCENT_MIN || spares == 0 {
            return Vec::new();
        }
        better
    }
}

/// Chunks that the first image has came before it. Packs are written one after
/// the other, so those in older packs came earlier; and those that were placed
/// together once came at about the same time.
fn guess_births(points: &mut [Point], extent: Extent) {
    points.sort_unstable_by_key(|point| (point.life.first, point.at.frame, point.at.slot));
    let old = points.partition_point(|point| point.life.first == 0);
    let images = i64::try_from(extent.images).unwrap_or(i64::MAX);
    let count = i64::try_from(old).unwrap_or(i64::MAX).max(1);
    for (point, rank) in points[..old].iter_mut().zip(0_i64..) {
        point.born = rank.saturating_mul(images) / count - images;
    }
}

/// The images that need something of a frame, as few ranges.
fn needed(frame: &[Point]) -> Vec<Range<u32>> {
    let mut lives: Vec<Range<u32>> =
        frame.iter().map(|point| point.life.first..point.life.last + 1).collect();
    lives.sort_unstable_by_key(|life| life.start);
    let mut ranges: Vec<Range<u32>> = Vec::new();
    for life in lives {
        match ranges.last_mut() {
            Some(last) if life.start <= last.end => last.end = last.end.max(life.end),
            _ => ranges.push(life),
        }
    }
    ranges
}

/// How many of the ranges each image is in.
fn count(images: usize, ranges: impl Iterator<Item = Range<u32>>) -> Vec<u64> {
    let (mut begin, mut end) = (vec![0_u64; images + 1], vec![0_u64; images + 1]);
    for range in ranges {
        begin[to_usize(u64::from(range.start))] += 1;
        end[to_usize(u64::from(range.end))] += 1;
    }
    let mut open = 0;
    let step = |number: usize| {
        open = open + begin[number] - end[number];
        open
    };
    (0..images).map(step).collect()
}

/// How many are set before each number.
fn sums(set: &[bool]) -> Vec<u64> {
    let mut sum = 0;
    let mut sums = vec![0];
    sums.extend(set.iter().map(|is_set| {
        sum += u64::from(*is_set);
        sum
    }));
    sums
}

/// Chunks among these that each image needs.
pub(super) fn moved(images: usize, groups: &[Vec<Point>]) -> Vec<u64> {
    let lives = groups.iter().flatten().map(|point| point.life.first..point.life.last + 1);
    count(images, lives)
}
