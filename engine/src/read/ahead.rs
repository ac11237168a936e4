//! Frames that will be wanted soon, read together and before anybody waits.
//!
//! What was read ahead is stored bytes and nothing more: it is decoded and
//! verified when a page is fetched from it, as if it had been read just then.

use std::collections::BTreeSet;

use super::coalesce::{Request, coalesce};
use super::map::{FrameRef, PageMap};
use super::page_reader::PageReader;
use crate::id::PackId;
use crate::units::to_usize;

/// Stored bytes of frames.
#[derive(Debug, Default)]
pub struct ReadAhead {
    /// Ascending by pack and offset.
    parts: Vec<Part>,
}

#[derive(Debug)]
struct Part {
    pack: PackId,
    offset: u64,
    bytes: Vec<u8>,
}

impl ReadAhead {
    /// The bytes of a frame, if they were read.
    pub(super) fn bytes(&self, at: &FrameRef) -> Option<&[u8]> {
        let key = (at.pack, at.offset);
        let behind = self.parts.partition_point(|part| (part.pack, part.offset) <= key);
        let part = &self.parts[behind.checked_sub(1)?];
        let begin = to_usize(at.offset.checked_sub(part.offset)?);
        let end = begin.checked_add(to_usize(u64::from(at.len)))?;
        if part.pack == at.pack { part.bytes.get(begin..end) } else { None }
    }
}

impl PageReader {
    /// Reads the frames of these pages in as few requests as their places
    /// allow, all of which are under way before the first is waited for. What
    /// cannot be read is left out: whoever fetches it is told why.
    #[must_use]
    pub fn read_ahead(&self, map: &PageMap, pages: &[u64]) -> ReadAhead {
        let wanted = self.frames_of(map, pages);
        let mut requests = Vec::new();
        for frames in wanted.chunk_by(|one, other| one.pack == other.pack) {
            let parts: Vec<_> = frames.iter().map(|frame| (frame.offset, frame.len)).collect();
            let pack = frames[0].pack;
            requests.extend(coalesce(&parts).into_iter().map(|request| (pack, request)));
        }
        for (pack, request) in &requests {
            self.announce(*pack, request);
        }
        let read = |(pack, request): &(PackId, Request)| {
            let bytes = self.read_bytes(*pack, request.offset, to_usize(request.len)).ok()?;
            Some(Part { pack: *pack, offset: request.offset, bytes })
        };
        ReadAhead { parts: requests.iter().filter_map(read).collect() }
    }

    /// The frames to be read, ascending by place.
    fn frames_of(&self, map: &PageMap, pages: &[u64]) -> Vec<FrameRef> {
        let mut frames = BTreeSet::new();
        for row in pages.iter().filter_map(|page| map.row_of(*page)) {
            let frame = map.frames()[to_usize(u64::from(map.rows()[row].frame))];
            if frame != FrameRef::NOWHERE && !self.is_kept(&frame) {
                frames.insert(frame);
            }
        }
        frames.into_iter().collect()
    }

    /// Tells the kernel what will be read.
    fn announce(&self, pack: PackId, request: &Request) {
        let Ok(file) = self.pack(pack) else { return };
        let len = std::num::NonZeroU64::new(request.len);
        // Advice that is not taken costs nothing but time.
        let _refusal =
            rustix::fs::fadvise(&*file, request.offset, len, rustix::fs::Advice::WillNeed);
    }
}
