//! Pages out of the engine's packs.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, PoisonError, RwLock};

use coppice_engine::{PackId, PageMap, PageReader, ReadAhead};

use super::source::{Extent, Fetched, FrameKey, Library, Page, PageSource, SourceError};

/// A page map longer than this is refused before anything is allocated: 64
/// bytes for each page of an image of 256 GiB.
const MAP_LEN_MAX: u64 = 4 << 30;

/// Packs, shared by all images.
#[derive(Debug, Default)]
pub struct EngineLibrary {
    reader: Arc<PageReader>,
}

impl Library for EngineLibrary {
    fn add_pack(&self, pack: u64, file: File) {
        self.reader.add_pack(PackId(pack), file);
    }

    fn forget_packs(&self, packs: &[u64]) {
        let packs: Vec<PackId> = packs.iter().copied().map(PackId).collect();
        self.reader.forget_packs(&packs);
    }

    fn open(&self, map: File) -> Result<Arc<dyn PageSource>, SourceError> {
        let map = RwLock::new(Arc::new(read_map(&map)?));
        Ok(Arc::new(EngineSource { reader: Arc::clone(&self.reader), map }))
    }
}

fn read_map(file: &File) -> Result<PageMap, SourceError> {
    let len = file.metadata()?.len();
    let size = usize::try_from(len).ok().filter(|_| len <= MAP_LEN_MAX);
    let mut bytes = vec![0; size.ok_or(SourceError::PageMapTooLong(len))?];
    // The sender wrote the map through the same file offset.
    file.read_exact_at(&mut bytes, 0)?;
    Ok(PageMap::from_bytes(&bytes)?)
}

/// One image of a store. A collection may move its pages to other packs; then
/// it gets another map, under the machines that use it.
#[derive(Debug)]
pub struct EngineSource {
    reader: Arc<PageReader>,
    map: RwLock<Arc<PageMap>>,
}

impl EngineSource {
    fn map(&self) -> Arc<PageMap> {
        Arc::clone(&self.map.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl PageSource for EngineSource {
    fn image_len(&self) -> u64 {
        self.map().len()
    }

    fn extent(&self, page: u64) -> Extent {
        match self.map.read().unwrap_or_else(PoisonError::into_inner).extent(page) {
            coppice_engine::Extent::Zero => Extent::Zero,
            coppice_engine::Extent::Stored(location) => Extent::Stored(FrameKey {
                pack: location.frame.pack.0,
                offset: location.frame.offset,
            }),
        }
    }

    fn renew(&self, map: File) -> Result<(), SourceError> {
        let renewed = Arc::new(read_map(&map)?);
        if !renewed.shows_the_same_as(&self.map()) {
            return Err(SourceError::OtherImage);
        }
        *self.map.write().unwrap_or_else(PoisonError::into_inner) = renewed;
        Ok(())
    }

    fn fetch(&self, page: u64, sink: &mut dyn FnMut(u64, &Page)) -> Result<Fetched, SourceError> {
        self.fetch_with(&ReadAhead::default(), page, sink)
    }

    fn read_ahead(&self, pages: &[u64]) -> ReadAhead {
        self.reader.read_ahead(&self.map(), pages)
    }

    fn fetch_with(
        &self,
        ahead: &ReadAhead,
        page: u64,
        sink: &mut dyn FnMut(u64, &Page),
    ) -> Result<Fetched, SourceError> {
        let mut map = self.map();
        loop {
            match self.reader.fetch_with(ahead, &map, page, sink) {
                Ok(fetched) => return Ok(Fetched { bytes_read: fetched.bytes_read }),
                // Its pack may have gone since the map was taken.
                Err(error) => {
                    let now = self.map();
                    if Arc::ptr_eq(&map, &now) {
                        return Err(error.into());
                    }
                    map = now;
                }
            }
        }
    }
}
