//! Windows: the places of some pages of an image, and the packs that were
//! opened for them, which stay open, so that a collection which retires a
//! pack meanwhile changes nothing for whoever reads from it.
//!
//! A place may be wrong: its pack may have gone, or be damaged while another
//! has the same chunk. Whoever finds that out asks the index, and only then
//! gives up.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::map::{FrameRef, Location, PageMap};
use super::map_build::{self, Ask, Built};
use super::page_reader::{decode_pages, verified};
use crate::chunk::Page;
use crate::depot::{Depot, Spot};
use crate::env::lock;
use crate::error::{ReadCause, ReadError, StoreError};
use crate::id::{ObjectKey, PackId};
use crate::io::DiskFile;
use crate::pack::{Frame, FrameKind};
use crate::tree::RootRecord;
use crate::units::to_usize;

/// The pages of a range and the packs that hold them.
#[derive(Debug)]
pub(super) struct Window {
    pub(super) map: PageMap,
    /// First pages and keys of the leaves.
    leaves: Vec<(u64, ObjectKey)>,
    packs: Mutex<BTreeMap<PackId, Arc<dyn DiskFile>>>,
}

impl Window {
    pub(super) fn open(
        depot: &Depot,
        root: &RootRecord,
        range: &Range<u64>,
    ) -> Result<Self, StoreError> {
        let built = depot.following(|| map_build::build(depot, root, range, Ask::Hints))?;
        let Built { map, leaves } = built;
        Ok(Self { map, leaves, packs: Mutex::default() })
    }

    /// Reads, checks and decompresses a frame of pages.
    pub(super) fn frame(&self, depot: &Depot, at: &FrameRef) -> Result<Arc<Frame>, ReadCause> {
        depot.chunk_frames().get((at.pack, at.offset), || {
            decode_pages(&self.file(depot, at)?.read_at(at.offset, to_usize(u64::from(at.len)))?)
        })
    }

    /// The file of the frame's pack.
    pub(super) fn file(
        &self,
        depot: &Depot,
        at: &FrameRef,
    ) -> Result<Arc<dyn DiskFile>, ReadCause> {
        if let Some(file) = lock(&self.packs).get(&at.pack) {
            return Ok(Arc::clone(file));
        }
        let file = open_pack(depot, at)?;
        lock(&self.packs).insert(at.pack, Arc::clone(&file));
        Ok(file)
    }

    /// A frame that has only this page, which was not where it was thought to
    /// lie when that was read before.
    pub(super) fn read_again(
        &self,
        depot: &Depot,
        page: u64,
        at: &Location,
    ) -> Result<Frame, StoreError> {
        let found = self.frame(depot, &at.frame);
        match found.and_then(|frame| only(verified(&frame, at.slot, &at.chunk)?)) {
            Ok(frame) => Ok(frame),
            Err(cause) => self.elsewhere(depot, page, at, cause),
        }
    }

    /// A page that could not be had where it was thought to lie, from where
    /// the index says it is now; if that is the same place, `cause` stands.
    pub(super) fn elsewhere(
        &self,
        depot: &Depot,
        page: u64,
        at: &Location,
        cause: ReadCause,
    ) -> Result<Frame, StoreError> {
        let before = self.leaves.partition_point(|(first, _)| *first <= page);
        if let Some((_, leaf)) = before.checked_sub(1).and_then(|at| self.leaves.get(at)) {
            depot.forget_leaf_hint(leaf);
        }
        let found = depot.following(|| {
            let Some(place) = depot.place(at.chunk.key())? else { return Ok(None) };
            let Some(spot) = depot.location(place)?.map(Spot::from) else { return Ok(None) };
            let Spot { pack, offset, len, count, slot } = spot;
            let frame = FrameRef { pack, offset, len, count };
            if (frame, slot) == (at.frame, at.slot) {
                return Ok(None);
            }
            let file = depot.file(pack)?;
            let read = || {
                let frame = decode_pages(&file.read_at(offset, to_usize(u64::from(len)))?)?;
                only(verified(&frame, slot, &at.chunk)?)
            };
            read().map(Some).map_err(|cause| fail(&Location { frame, slot, ..*at }, cause).into())
        })?;
        found.ok_or_else(|| fail(at, cause).into())
    }
}

fn only(page: &Page) -> Result<Frame, ReadCause> {
    Ok(Frame::new(FrameKind::Pages, 1, page.to_vec()))
}

/// Names what could not be had, and why.
pub(super) fn fail(at: &Location, cause: ReadCause) -> ReadError {
    ReadError { chunk: at.chunk, pack: at.frame.pack, offset: at.frame.offset, cause }
}

/// Reads, checks and decompresses a frame of pages.
pub(crate) fn read_frame(depot: &Depot, at: &FrameRef) -> Result<Frame, ReadCause> {
    decode_pages(&open_pack(depot, at)?.read_at(at.offset, to_usize(u64::from(at.len)))?)
}

fn open_pack(depot: &Depot, at: &FrameRef) -> Result<Arc<dyn DiskFile>, ReadCause> {
    if *at == FrameRef::NOWHERE {
        return Err(ReadCause::Lost);
    }
    depot.file(at.pack).map_err(|error| match error {
        StoreError::Io { source, .. } => ReadCause::Io(source),
        _ => ReadCause::UnknownPack,
    })
}
