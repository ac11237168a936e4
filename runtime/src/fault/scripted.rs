//! Pages made up on the spot, with the losses and delays that a script asks
//! for: what tests and benches put in the place of a store.

use std::collections::HashSet;
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use super::source::{Extent, Fetched, FrameKey, Library, Page, PageSource, SourceError};

/// An image of which each stored page holds its own index, over and over.
#[derive(Debug, Clone)]
pub struct Script {
    /// Length in bytes.
    pub len: u64,
    /// Pages that one fetch yields.
    pub frame_pages: u64,
    /// Each page whose index divides by this is zeros. Zero means none.
    pub zero_every: u64,
    /// Pages that cannot be had.
    pub lost: HashSet<u64>,
    /// What a fetch takes.
    pub delay: Duration,
}

impl Script {
    /// An image without holes, losses or delays, in frames of 16 pages.
    pub fn plain(len: u64) -> Self {
        Self { len, frame_pages: 16, zero_every: 0, lost: HashSet::new(), delay: Duration::ZERO }
    }

    /// The bytes of a page.
    pub fn page(&self, page: u64) -> Page {
        if self.is_zero(page) { [0; 4096] } else { filled(page) }
    }

    fn is_zero(&self, page: u64) -> bool {
        self.zero_every != 0 && page.is_multiple_of(self.zero_every)
    }
}

/// A page that is nowhere zero and says which it is.
fn filled(page: u64) -> Page {
    let word = (page ^ 0xC0FF_EE00_0000_0001).to_le_bytes();
    let mut bytes = [0; 4096];
    bytes.chunks_exact_mut(8).for_each(|chunk| chunk.copy_from_slice(&word));
    bytes
}

impl PageSource for Script {
    fn image_len(&self) -> u64 {
        self.len
    }

    fn extent(&self, page: u64) -> Extent {
        match self.is_zero(page) {
            true => Extent::Zero,
            false => Extent::Stored(FrameKey { pack: 0, offset: page / self.frame_pages }),
        }
    }

    fn fetch(&self, page: u64, sink: &mut dyn FnMut(u64, &Page)) -> Result<Fetched, SourceError> {
        if !self.delay.is_zero() {
            std::thread::sleep(self.delay);
        }
        if self.lost.contains(&page) {
            return Err(SourceError::Scripted(page));
        }
        sink(page, &self.page(page));
        let first = page / self.frame_pages * self.frame_pages;
        let end = (first + self.frame_pages).min(self.len.div_ceil(4096));
        for other in first..end {
            if other != page && !self.is_zero(other) && !self.lost.contains(&other) {
                sink(other, &filled(other));
            }
        }
        Ok(Fetched { bytes_read: self.frame_pages * 4096 })
    }
}

/// Opens the same script whatever the page map says.
#[derive(Debug)]
pub struct ScriptedLibrary(pub Script);

impl Library for ScriptedLibrary {
    fn add_pack(&self, _pack: u64, _file: File) {}

    fn open(&self, _map: File) -> Result<Arc<dyn PageSource>, SourceError> {
        Ok(Arc::new(self.0.clone()))
    }
}
