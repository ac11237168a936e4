//! Building a page map: the tree says which chunks, the index says where.

use std::collections::HashMap;
use std::ops::Range;

use super::map::{FrameRef, PageMap, Row};
use crate::depot::{Depot, Location, Locator};
use crate::error::StoreError;
use crate::id::{ChunkId, ObjectKey, PackId};
use crate::tree::{RootRecord, walk};
use crate::units::to_u32;

/// Chunks looked up together.
const BATCH: usize = 4096;

/// Collects rows and the frames that they need.
struct Builder<'d> {
    locator: Locator<'d>,
    frames: Vec<FrameRef>,
    frame_numbers: HashMap<(PackId, u64), u32>,
    rows: Vec<Row>,
    waiting: Vec<(u64, ChunkId)>,
}

/// The map of the pages in `range`; those outside it appear as zero.
pub(crate) fn build(
    depot: &Depot,
    root: &RootRecord,
    range: &Range<u64>,
) -> Result<PageMap, StoreError> {
    let mut builder = Builder {
        locator: Locator::new(depot),
        frames: Vec::new(),
        frame_numbers: HashMap::new(),
        rows: Vec::new(),
        waiting: Vec::new(),
    };
    walk(depot, root, range, &mut |page, chunk| {
        if range.contains(&page) {
            builder.waiting.push((page, chunk));
        }
        if builder.waiting.len() >= BATCH { builder.settle() } else { Ok(()) }
    })?;
    builder.settle()?;
    Ok(PageMap::new(root.len, builder.frames, builder.rows))
}

impl Builder<'_> {
    fn settle(&mut self) -> Result<(), StoreError> {
        let waiting = std::mem::take(&mut self.waiting);
        let keys: Vec<ObjectKey> = waiting.iter().map(|(_, chunk)| chunk.key()).collect();
        let locations = self.locator.locate(&keys)?;
        for ((page, chunk), location) in waiting.into_iter().zip(locations) {
            let (frame, slot) = location.map_or((FrameRef::NOWHERE, 0), |location| {
                let Location { pack, span, slot } = location;
                let (offset, len, count) = (span.offset, span.len, span.count);
                (FrameRef { pack, offset, len, count }, slot)
            });
            let frame = self.frame_number(frame);
            let page = u32::try_from(page).expect("an image has at most 2^32 pages");
            self.rows.push(Row { page, frame, slot, chunk });
        }
        Ok(())
    }

    fn frame_number(&mut self, frame: FrameRef) -> u32 {
        let frames = &mut self.frames;
        *self.frame_numbers.entry((frame.pack, frame.offset)).or_insert_with(|| {
            frames.push(frame);
            to_u32(frames.len() - 1)
        })
    }
}
