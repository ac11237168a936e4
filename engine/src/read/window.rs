//! Windows: the places of some pages of an image, with the packs in which
//! they lie held open, so that a collection which retires a pack meanwhile
//! changes nothing for whoever reads from it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::map::{FrameRef, PageMap};
use super::map_build;
use super::page_reader::decode_pages;
use crate::depot::Depot;
use crate::error::{ReadCause, StoreError};
use crate::id::PackId;
use crate::io::DiskFile;
use crate::pack::Frame;
use crate::tree::RootRecord;
use crate::units::to_usize;

/// The pages of a range and the packs that hold them.
#[derive(Debug)]
pub(super) struct Window {
    pub(super) map: PageMap,
    packs: BTreeMap<PackId, Arc<dyn DiskFile>>,
}

impl Window {
    pub(super) fn open(
        depot: &Depot,
        root: &RootRecord,
        range: &Range<u64>,
    ) -> Result<Self, StoreError> {
        depot.following(|| {
            let map = map_build::build(depot, root, range)?;
            let mut packs = BTreeMap::new();
            for pack in map.packs() {
                match depot.file(*pack) {
                    Ok(file) => drop(packs.insert(*pack, file)),
                    Err(error @ StoreError::Retired { .. }) => return Err(error),
                    // Who needs a page of it is told why it cannot be had.
                    Err(error) => tracing::debug!(%pack, %error, "a pack cannot be opened"),
                }
            }
            Ok(Self { map, packs })
        })
    }

    /// Reads, checks and decompresses a frame of pages.
    pub(super) fn frame(&self, depot: &Depot, at: &FrameRef) -> Result<Frame, ReadCause> {
        match self.packs.get(&at.pack) {
            Some(file) => decode_pages(&file.read_at(at.offset, to_usize(u64::from(at.len)))?),
            None => read_frame(depot, at),
        }
    }
}

/// Reads, checks and decompresses a frame of pages.
pub(crate) fn read_frame(depot: &Depot, at: &FrameRef) -> Result<Frame, ReadCause> {
    if *at == FrameRef::NOWHERE {
        return Err(ReadCause::Lost);
    }
    let file = depot.file(at.pack).map_err(|error| match error {
        StoreError::Io { source, .. } => ReadCause::Io(source),
        _ => ReadCause::UnknownPack,
    })?;
    decode_pages(&file.read_at(at.offset, to_usize(u64::from(at.len)))?)
}
