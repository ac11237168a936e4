//! Reading an image at any offset.

use std::ops::Range;
use std::sync::Arc;

use super::map::{Extent, FrameRef, Location};
use super::page_reader::verified;
use super::stream::StreamReader;
use super::window::{Window, fail};
use crate::depot::Depot;
use crate::error::{ReadCause, StoreError};
use crate::pack::Frame;
use crate::tree::{ImageRef, RootRecord, Splitter};
use crate::units::{PAGE_LEN, page_offset, pages_of, to_u64, to_usize};

/// Pages whose places are looked up together: 64 KiB, as much as a frame, and
/// up to 64 MiB for whoever reads on from window to window.
const WINDOW_PAGES_MIN: u64 = 1 << 4;
const WINDOW_PAGES_MAX: u64 = 1 << 14;

/// Reads verified bytes of an image. The places of one window of pages and
/// the frame read last stay in memory.
#[derive(Debug)]
pub struct ImageReader {
    depot: Arc<Depot>,
    root: RootRecord,
    window: Option<(Range<u64>, Window)>,
    last: Option<(FrameRef, Arc<Frame>)>,
    /// A page that was found elsewhere than it was thought to lie.
    moved: Option<Frame>,
    /// Instead of all, for a byte stream.
    stream: Option<StreamReader>,
}

impl ImageReader {
    pub(crate) fn open(depot: Arc<Depot>, image: &ImageRef) -> Result<Self, StoreError> {
        let root = depot.root_to_read(image)?;
        let stream = (root.splitter == Splitter::FastCdc16K).then(StreamReader::new);
        Ok(Self { depot, root, window: None, last: None, moved: None, stream })
    }

    /// Length of the image in bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "the length of an image, not of a collection")]
    pub fn len(&self) -> u64 {
        self.root.len
    }

    /// Reads from `offset` on, as much as fits or the image has; returns how
    /// much.
    ///
    /// # Errors
    /// If a chunk cannot be had or is not what it should be.
    pub fn read_at(&mut self, offset: u64, out: &mut [u8]) -> Result<usize, StoreError> {
        let len = to_u64(out.len()).min(self.root.len.saturating_sub(offset));
        if let Some(stream) = &mut self.stream {
            stream.read_at(&self.depot, &self.root, offset, &mut out[..to_usize(len)])?;
            return Ok(to_usize(len));
        }
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let page = at / to_u64(PAGE_LEN);
            let inside = to_usize(at - page_offset(page));
            let count = (PAGE_LEN - inside).min(to_usize(len - done));
            let start = to_usize(done);
            self.copy_page(page, inside, &mut out[start..start + count])?;
            done += to_u64(count);
        }
        Ok(to_usize(len))
    }

    fn copy_page(&mut self, page: u64, inside: usize, out: &mut [u8]) -> Result<(), StoreError> {
        match self.extent(page)? {
            Extent::Zero => out.fill(0),
            Extent::Stored(location) => {
                let bytes = self.page(page, &location)?;
                out.copy_from_slice(&bytes[inside..inside + out.len()]);
            }
        }
        Ok(())
    }

    fn extent(&mut self, page: u64) -> Result<Extent, StoreError> {
        if let Some((range, window)) = &self.window
            && range.contains(&page)
        {
            return Ok(window.map.extent(page));
        }
        let start = page - page % WINDOW_PAGES_MIN;
        let pages = match &self.window {
            Some((last, _)) if last.end == start => {
                ((last.end - last.start) * 4).min(WINDOW_PAGES_MAX)
            }
            _ => WINDOW_PAGES_MIN,
        };
        let range = start..(start + pages).min(pages_of(self.root.len));
        let window = Window::open(&self.depot, &self.root, &range)?;
        let extent = window.map.extent(page);
        self.window = Some((range, window));
        Ok(extent)
    }

    fn page(&mut self, page: u64, at: &Location) -> Result<&[u8; PAGE_LEN], StoreError> {
        let Some((_, window)) = &self.window else {
            return Err(fail(at, ReadCause::UnknownPack).into());
        };
        if self.last.as_ref().is_none_or(|(kept, _)| *kept != at.frame) {
            self.last = None;
            match window.frame(&self.depot, &at.frame) {
                Ok(frame) => self.last = Some((at.frame, frame)),
                Err(cause) => {
                    let moved = window.elsewhere(&self.depot, page, at, cause)?;
                    return moved_page(self.moved.insert(moved), at);
                }
            }
        }
        let Some((_, frame)) = &self.last else { return Err(fail(at, ReadCause::Lost).into()) };
        match verified(frame, at.slot, &at.chunk) {
            Ok(bytes) => Ok(bytes),
            Err(cause) => {
                let moved = window.elsewhere(&self.depot, page, at, cause)?;
                moved_page(self.moved.insert(moved), at)
            }
        }
    }
}

fn moved_page<'f>(frame: &'f Frame, at: &Location) -> Result<&'f [u8; PAGE_LEN], StoreError> {
    Ok(verified(frame, 0, &at.chunk).map_err(|cause| fail(at, cause))?)
}
