//! What the next page server must know of a layer: a file of memory that the
//! supervisor keeps.
//!
//! ```text
//! ┌───────────────┬──────────────────────────────────────────┐
//! │ u64: not zero │ a bit for each page of the machine, in   │
//! │ if pages are  │ words of 64: set for those that belong   │
//! │ lost          │ to the layer                             │
//! └───────────────┴──────────────────────────────────────────┘
//! ```
//!
//! Invariant: the bits are there before the machine goes on, and the loss is
//! before a page that was not copied is unprotected. So a page that belongs to
//! the layer is either in it, or protected still, or the layer says that pages
//! are lost. Which pages are copied is not written down: those that are there.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, memfd_create};

use crate::pages::PageSet;

const WORD: usize = 8;

/// The record of one layer.
#[derive(Debug)]
pub(super) struct LayerRecord(File);

impl LayerRecord {
    /// An empty one.
    pub(super) fn new() -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::NOEXEC_SEAL;
        let file = File::from(memfd_create("coppice-layer", flags)?);
        // So that there is room for it when memory is short.
        file.write_all_at(&[0; WORD], 0)?;
        Ok(Self(file))
    }

    /// That of a former page server.
    pub(super) fn adopt(descriptor: OwnedFd) -> Self {
        Self(File::from(descriptor))
    }

    /// A second descriptor, for whoever outlives this process.
    pub(super) fn share(&self) -> io::Result<OwnedFd> {
        Ok(self.0.try_clone()?.into())
    }

    /// Notes which pages belong to the layer.
    pub(super) fn note(&self, pages: &PageSet) -> io::Result<()> {
        let bytes: Vec<u8> = pages.words().iter().flat_map(|word| word.to_le_bytes()).collect();
        self.0.write_all_at(&bytes, WORD as u64)
    }

    /// Notes that pages are lost.
    pub(super) fn note_loss(&self) -> io::Result<()> {
        self.0.write_all_at(&[1], 0)
    }

    /// Whether pages are lost.
    pub(super) fn has_loss(&self) -> io::Result<bool> {
        let mut lost = [0; WORD];
        self.0.read_exact_at(&mut lost, 0)?;
        Ok(lost != [0; WORD])
    }

    /// Which pages belong to the layer, of the `pages` of its machine.
    pub(super) fn pages(&self, pages: u64) -> io::Result<PageSet> {
        let words = usize::try_from(pages.div_ceil(64)).map_err(io::Error::other)?;
        let mut bytes = vec![0; words * WORD];
        self.0.read_exact_at(&mut bytes, WORD as u64)?;
        let (words, _) = bytes.as_chunks::<WORD>();
        Ok(PageSet::of_words(words.iter().copied().map(u64::from_le_bytes).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::PageRun;

    #[test]
    fn the_next_one_reads_what_this_one_noted() {
        let record = LayerRecord::new().unwrap();
        let next = LayerRecord::adopt(record.share().unwrap());
        // One that was never frozen has no pages.
        assert!(next.pages(130).is_err());
        let runs = [PageRun { first: 1, count: 3 }, PageRun { first: 63, count: 67 }];
        record.note(&PageSet::of(&runs, 130)).unwrap();
        assert!(!next.has_loss().unwrap());
        record.note_loss().unwrap();
        drop(record);
        assert_eq!(next.pages(130).unwrap().runs(), runs);
        assert!(next.has_loss().unwrap());
    }
}
