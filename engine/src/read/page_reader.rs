//! The reader of the page server: pages by their location, verified, without
//! a store or an index. The fault path takes no lock across a read; threads
//! that want the same frame at once have it read by one of them.

use std::collections::HashMap;
use std::fs::File;
use std::sync::{Arc, PoisonError, RwLock};

use super::ahead::ReadAhead;
use super::map::{FrameRef, PageMap};
use crate::chunk::{Page, chunk_ids};
use crate::depot::ChunkFrames;
use crate::error::{FormatError, ReadCause, ReadError};
use crate::id::{ChunkId, PackId};
use crate::io::read_exact_at;
use crate::pack::frame::{self, Frame};
use crate::units::{to_u64, to_usize};

/// Pages handed over for one fetch.
const COMPANIONS_MAX: usize = 64;

/// What a fetch cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fetched {
    /// Bytes read from the pack; zero if nothing was: the page is zero, or its
    /// frame was decoded for another page.
    pub bytes_read: u64,
    /// Pages handed to the sink.
    pub pages: u64,
}

/// Reads pages out of packs that were handed to it.
#[derive(Debug)]
pub struct PageReader {
    packs: RwLock<HashMap<PackId, Arc<File>>>,
    frames: ChunkFrames,
}

/// Bytes of decoded frames that a reader keeps: images that are forked together
/// share frames, and the pages of one frame are not all asked for at once.
const FRAMES_LEN_MAX: usize = 16 << 20;

impl Default for PageReader {
    fn default() -> Self {
        Self { packs: RwLock::default(), frames: ChunkFrames::new(FRAMES_LEN_MAX) }
    }
}

impl PageReader {
    /// A reader without packs.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Hands over a pack. One that is known already is kept as it is.
    pub fn add_pack(&self, pack: PackId, file: File) {
        let mut packs = self.packs.write().unwrap_or_else(PoisonError::into_inner);
        packs.entry(pack).or_insert_with(|| Arc::new(file));
    }

    /// Lets packs go. Whoever reads one of them right now still ends.
    pub fn forget_packs(&self, forgotten: &[PackId]) {
        let mut packs = self.packs.write().unwrap_or_else(PoisonError::into_inner);
        forgotten.iter().for_each(|pack| {
            packs.remove(pack);
        });
    }

    /// Whether a pack was handed over.
    #[must_use]
    pub fn has_pack(&self, pack: PackId) -> bool {
        self.packs.read().unwrap_or_else(PoisonError::into_inner).contains_key(&pack)
    }

    /// Reads the frame of a page and hands its pages to `sink`: first the one
    /// asked for, then other pages of the map that lie in the same frame, at
    /// most 64. A page that is zero is handed over without any reading. Every
    /// page was verified; a damaged companion is left out, a damaged page
    /// that was asked for is an error and `sink` is not called.
    ///
    /// # Errors
    /// If the page cannot be had; the error names chunk, pack and offset.
    pub fn fetch(
        &self,
        map: &PageMap,
        page: u64,
        sink: &mut dyn FnMut(u64, &Page),
    ) -> Result<Fetched, ReadError> {
        self.fetch_with(&ReadAhead::default(), map, page, sink)
    }

    /// As [`PageReader::fetch`], but what was read ahead is not read again.
    ///
    /// # Errors
    /// If the page cannot be had; the error names chunk, pack and offset.
    pub fn fetch_with(
        &self,
        ahead: &ReadAhead,
        map: &PageMap,
        page: u64,
        sink: &mut dyn FnMut(u64, &Page),
    ) -> Result<Fetched, ReadError> {
        let Some(number) = map.row_of(page) else {
            sink(page, &crate::units::ZERO_PAGE);
            return Ok(Fetched { bytes_read: 0, pages: 1 });
        };
        let row = map.rows()[number];
        let at = map.frames()[to_usize(u64::from(row.frame))];
        let fail = |cause| ReadError { chunk: row.chunk, pack: at.pack, offset: at.offset, cause };
        let mut bytes_read = 0;
        let read = || {
            bytes_read = u64::from(at.len);
            self.read(&at, ahead)
        };
        let frame = self.frames.get((at.pack, at.offset), read).map_err(fail)?;
        sink(page, verified(&frame, row.slot, &row.chunk).map_err(fail)?);
        let mut pages = 1;
        let companions = map.companions(number, COMPANIONS_MAX);
        let others: Vec<_> = companions.filter(|other| u64::from(other.page) != page).collect();
        let wanted: Vec<_> = others.iter().map(|other| (other.slot, other.chunk)).collect();
        for (other, found) in others.iter().zip(verified_all(&frame, &wanted)) {
            if let Ok(bytes) = found {
                sink(u64::from(other.page), bytes);
                pages += 1;
            }
        }
        Ok(Fetched { bytes_read, pages })
    }

    fn read(&self, at: &FrameRef, ahead: &ReadAhead) -> Result<Frame, ReadCause> {
        if *at == FrameRef::NOWHERE {
            return Err(ReadCause::Lost);
        }
        match ahead.bytes(at) {
            Some(bytes) => decode_pages(bytes),
            None => {
                decode_pages(&self.read_bytes(at.pack, at.offset, to_usize(u64::from(at.len)))?)
            }
        }
    }

    pub(super) fn read_bytes(
        &self,
        pack: PackId,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>, ReadCause> {
        Ok(read_exact_at(&*self.pack(pack)?, offset, len)?)
    }

    pub(super) fn pack(&self, pack: PackId) -> Result<Arc<File>, ReadCause> {
        let packs = self.packs.read().unwrap_or_else(PoisonError::into_inner);
        packs.get(&pack).cloned().ok_or(ReadCause::UnknownPack)
    }

    /// Whether a frame is decoded already.
    pub(super) fn is_kept(&self, at: &FrameRef) -> bool {
        self.frames.kept((at.pack, at.offset)).is_some()
    }
}

/// Checks and decompresses a frame of chunks. A page may also lie in a frame of
/// pieces: a stream may have a chunk that is as long, and the same bytes.
pub(super) fn decode_pages(bytes: &[u8]) -> Result<Frame, ReadCause> {
    let frame = frame::decode(bytes)?;
    if frame.kind.holds_chunks() { Ok(frame) } else { Err(FormatError::Field("frame kind").into()) }
}

/// The page in a slot, if it is the chunk that it should be.
pub(crate) fn verified<'f>(
    frame: &'f Frame,
    slot: u32,
    chunk: &ChunkId,
) -> Result<&'f Page, ReadCause> {
    let page = page_in(frame, slot)?;
    let found = ChunkId::of(page);
    if found == *chunk { Ok(page) } else { Err(ReadCause::Mismatch { found }) }
}

/// As [`verified`] for many slots of a frame, whose pages are hashed together.
pub(crate) fn verified_all<'f>(
    frame: &'f Frame,
    wanted: &[(u32, ChunkId)],
) -> Vec<Result<&'f Page, ReadCause>> {
    let found: Vec<_> = wanted.iter().map(|(slot, _)| page_in(frame, *slot)).collect();
    let there: Vec<&Page> = found.iter().filter_map(|page| page.as_ref().ok()).copied().collect();
    let mut ids = chunk_ids(&there).into_iter();
    let verify = |(page, (_, chunk)): (Result<&'f Page, ReadCause>, &(u32, ChunkId))| {
        let page = page?;
        let found = ids.next().expect("each page has an id");
        if found == *chunk { Ok(page) } else { Err(ReadCause::Mismatch { found }) }
    };
    found.into_iter().zip(wanted).map(verify).collect()
}

/// The page in a slot, which is not verified yet.
pub(super) fn page_in(frame: &Frame, slot: u32) -> Result<&Page, ReadCause> {
    let (value, limit) = (u64::from(slot), to_u64(frame.plain.len()));
    frame.page(slot).ok_or_else(|| FormatError::TooLong { what: "slot", value, limit }.into())
}
