//! Which images are looked at: those that changed enough since the last time,
//! with so many of their relatives that what they share can be placed well.
//! So a collection costs what came since the last one, and not what there is.
//!
//! What was found is kept beside the ledger: it is derived, and without it
//! everything is looked at again.

use std::collections::HashSet;
use std::ops::Range;

use super::families::Member;
use crate::catalog::Entry;
use crate::depot::Depot;
use crate::error::{FormatError, StoreError};
use crate::index::rows::{LOOKED, RowChange, RowKey};
use crate::pack::fields::Fields;
use crate::tree::ImageRef;
use crate::units::PAGE_LEN;

/// Images are looked at when what is new among them may add so many frames,
/// in percent of those of one of them.
const NEW_PERCENT: u64 = 20;
/// Relatives are looked at together until so many chunks are new among them,
/// in percent of those of one of them.
const TOGETHER_PERCENT: u64 = 200;
/// Rows read at once.
const PAGE_ROWS: usize = 4096;

/// What was found when an image was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Looked {
    /// The budget that it was held to, in percent.
    pub(super) percent_max: u64,
    /// Its chunks.
    pub(super) chunks: u64,
}

impl Looked {
    /// `percent u64 | chunks u64`
    fn encode(self) -> Vec<u8> {
        [self.percent_max, self.chunks].iter().flat_map(|number| number.to_le_bytes()).collect()
    }

    fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut fields = Fields::new(bytes);
        let looked = Self { percent_max: fields.u64()?, chunks: fields.u64()? };
        fields.end()?;
        Ok(looked)
    }

    /// Whether so many bytes are at least this share of the image.
    fn is_part(self, bytes: u64, percent: u64) -> bool {
        let len = u128::from(self.chunks) * PAGE_LEN as u128;
        u128::from(bytes) * 100 >= len * u128::from(percent)
    }
}

fn row(image: &ImageRef) -> RowKey {
    let mut key = vec![LOOKED];
    key.extend_from_slice(image.root.as_bytes());
    key
}

/// The parts of a family to look at.
pub(super) fn due(
    depot: &Depot,
    family: &[Member],
    percent_max: u64,
    frame_len: u64,
) -> Result<Vec<Range<usize>>, StoreError> {
    let rows: Vec<RowKey> = family.iter().map(|member| row(&member.image)).collect();
    let looked: Vec<Option<Looked>> = depot
        .index()
        .rows(&rows)?
        .into_iter()
        .map(|found| found.and_then(|bytes| Looked::decode(&bytes).ok()))
        .map(|found| found.filter(|looked| looked.percent_max <= percent_max))
        .collect();
    Ok(parts(family, &looked, frame_len))
}

/// The parts with images that were not looked at, if these are enough.
fn parts(family: &[Member], looked: &[Option<Looked>], frame_len: u64) -> Vec<Range<usize>> {
    let mut parts: Vec<(Range<usize>, u64)> = Vec::new();
    for at in (0..family.len()).filter(|at| looked[*at].is_none()) {
        let new = frames(&family[at], frame_len) * frame_len;
        let follows = parts.last().is_some_and(|(part, _)| part.end == at);
        let first = if follows { at } else { relatives(family, looked, at, frame_len) };
        match parts.last_mut() {
            Some((part, sum)) if first <= part.end => {
                part.end = at + 1;
                *sum += new;
            }
            _ => parts.push((first..at + 1, new)),
        }
    }
    let is_enough = |part: &Range<usize>, new: u64| {
        let known = looked[part.clone()].iter().flatten().next_back();
        known.is_none_or(|known| known.is_part(new, NEW_PERCENT))
    };
    parts.into_iter().filter(|(part, new)| is_enough(part, *new)).map(|(part, _)| part).collect()
}

/// Frames that an image may take more than the one it was made from.
fn frames(member: &Member, frame_len: u64) -> u64 {
    member.new_bytes.div_ceil(frame_len)
}

/// The first of the relatives that an image is looked at with.
fn relatives(family: &[Member], looked: &[Option<Looked>], at: usize, frame_len: u64) -> usize {
    let (mut first, mut new) = (at, frames(&family[at], frame_len) * frame_len);
    let mut nearest: Option<Looked> = None;
    while first > 0 && !nearest.is_some_and(|known| known.is_part(new, TOGETHER_PERCENT)) {
        first -= 1;
        nearest = nearest.or(looked[first]);
        new += frames(&family[first], frame_len) * frame_len;
    }
    first
}

/// Remembers what was found. What cannot be remembered, as on a full disk, is
/// looked at again.
pub(super) fn remember(depot: &Depot, found: impl Iterator<Item = (ImageRef, Looked)>) {
    let rows = found.map(|(image, looked)| (row(&image), Some(looked.encode())));
    put(depot, &rows.collect::<Vec<_>>());
}

/// Forgets images that are not listed any more.
pub(super) fn forget_gone(depot: &Depot, entries: &[Entry]) -> Result<(), StoreError> {
    let images = entries.iter().flat_map(|entry| &entry.record.images);
    let listed: HashSet<RowKey> = images.map(|(_, image)| row(image)).collect();
    let mut after = Vec::new();
    loop {
        let rows = depot.index().rows_behind(&[LOOKED], &after, PAGE_ROWS)?;
        let Some((last, _)) = rows.last() else { return Ok(()) };
        after.clone_from(last);
        let gone = rows.into_iter().filter(|(row, _)| !listed.contains(row));
        put(depot, &gone.map(|(row, _)| (row, None)).collect::<Vec<_>>());
    }
}

fn put(depot: &Depot, rows: &[RowChange]) {
    if let Err(error) = depot.index().put_rows(depot.index().generation(), rows) {
        tracing::debug!(%error, "which images were looked at is not remembered");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::Root;
    use crate::tree::Splitter;

    const FRAME_LEN: u64 = 65_536;

    /// A lineage whose first image has 1,600 chunks, and each other one so
    /// many frames of new ones.
    fn family(count: u64, frames: u64) -> Vec<Member> {
        let member = |number: u64| {
            let root = Root::of(&number.to_le_bytes());
            let image = ImageRef { root, len: 1600 * PAGE_LEN as u64, splitter: Splitter::Fixed4K };
            Member { image, new_bytes: if number == 0 { 100 } else { frames } * FRAME_LEN }
        };
        (0..count).map(member).collect()
    }

    fn known(count: usize, of: usize) -> Vec<Option<Looked>> {
        let looked = Looked { percent_max: 150, chunks: 1600 };
        (0..of).map(|number| (number < count).then_some(looked)).collect()
    }

    #[test]
    fn what_is_new_is_looked_at_once_it_is_enough() {
        let family = family(300, 1);
        let due = |known_images| {
            let parts = parts(&family, &known(known_images, 300), FRAME_LEN);
            parts.into_iter().map(|part| (part.start, part.end)).collect::<Vec<_>>()
        };
        assert_eq!(due(0), [(0, 300)]);
        assert_eq!((due(300), due(281)), (vec![], vec![]));
        // 20 frames are new, and 200 are looked at together.
        assert_eq!(due(280), [(81, 300)]);
    }

    #[test]
    fn what_was_found_survives() {
        let looked = Looked { percent_max: 150, chunks: 7 };
        assert_eq!(Looked::decode(&looked.encode()), Ok(looked));
        assert!(Looked::decode(&[0; 15]).is_err());
    }
}
