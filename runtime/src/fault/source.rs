//! Where pages come from: the engine's packs, or a script.

use std::fs::File;
use std::io;
use std::sync::Arc;

use coppice_engine::ReadAhead;

/// The bytes of a page.
pub type Page = [u8; 4096];

/// Names what one fetch reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FrameKey {
    /// The pack.
    pub pack: u64,
    /// Bytes from the start of the pack.
    pub offset: u64,
}

/// What an image has at a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Zeros; nothing to fetch.
    Zero,
    /// Stored bytes.
    Stored(FrameKey),
}

/// What a fetch cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Fetched {
    /// Bytes read from the pack.
    pub bytes_read: u64,
}

/// Why a page or an image cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The store has lost or damaged it.
    #[error(transparent)]
    Read(#[from] coppice_engine::ReadError),
    /// A page map is not one.
    #[error("the page map is not valid: {0}")]
    PageMap(#[from] coppice_engine::FormatError),
    /// A page map could not be read.
    #[error("the page map cannot be read: {0}")]
    Descriptor(#[from] io::Error),
    /// A page map is longer than any that the engine makes.
    #[error("the page map has {0} bytes, more than any image needs")]
    PageMapTooLong(u64),
    /// A page map is of another image than the one that it should replace.
    #[error("the page map is of another image")]
    OtherImage,
    /// The fetch ended without the page.
    #[error("the fetch of page {0} ended without it")]
    NotDelivered(u64),
    /// The kernel refused to take the page.
    #[error("page {page} cannot be put into its pool: {source}")]
    Install {
        /// Index in the image.
        page: u64,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A page of a machine that was forked while it ran, and then could not
    /// be copied.
    #[error("page {page} of the machine that this one was forked from is lost: {reason}")]
    Layer {
        /// Index in the image.
        page: u64,
        /// Why it was not copied.
        reason: String,
    },
    /// The script says so.
    #[error("page {0} is lost by the script")]
    Scripted(u64),
}

/// One image.
pub trait PageSource: Send + Sync {
    /// Its length in bytes.
    fn image_len(&self) -> u64;

    /// What it has at a page. Called on every first fault of a page, so it
    /// answers from memory.
    fn extent(&self, page: u64) -> Extent;

    /// Reads from now on where this page map of the same image says. What is
    /// being fetched may still end where it began. Who has no packs has nowhere
    /// else to read.
    fn renew(&self, _map: File) -> Result<(), SourceError> {
        Err(SourceError::OtherImage)
    }

    /// Reads what one fetch yields and hands over verified pages: the one
    /// asked for first, then others of the same frame. If the page asked for
    /// cannot be had, that is the error, and nothing is handed over.
    fn fetch(&self, page: u64, sink: &mut dyn FnMut(u64, &Page)) -> Result<Fetched, SourceError>;

    /// Reads what will be fetched soon, in few large requests. Nothing is
    /// decoded, and what cannot be read is left out. Who has no packs has
    /// nothing to read.
    fn read_ahead(&self, _pages: &[u64]) -> ReadAhead {
        ReadAhead::default()
    }

    /// As [`PageSource::fetch`], but what was read ahead is not read again.
    fn fetch_with(
        &self,
        _ahead: &ReadAhead,
        page: u64,
        sink: &mut dyn FnMut(u64, &Page),
    ) -> Result<Fetched, SourceError> {
        self.fetch(page, sink)
    }
}

/// What images are opened from.
pub trait Library: Send + Sync {
    /// Takes over a pack. One that is known already is ignored.
    fn add_pack(&self, pack: u64, file: File);

    /// Lets packs go that no image needs any more.
    fn forget_packs(&self, _packs: &[u64]) {}

    /// Opens the image that a serialized page map describes.
    fn open(&self, map: File) -> Result<Arc<dyn PageSource>, SourceError>;
}
