//! Pages out of the engine's packs.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use coppice_engine::{PackId, PageMap, PageReader};

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

    fn open(&self, map: File) -> Result<Arc<dyn PageSource>, SourceError> {
        let len = map.metadata()?.len();
        let size = usize::try_from(len).ok().filter(|_| len <= MAP_LEN_MAX);
        let mut bytes = vec![0; size.ok_or(SourceError::PageMapTooLong(len))?];
        // The sender wrote the map through the same file offset.
        map.read_exact_at(&mut bytes, 0)?;
        let map = PageMap::from_bytes(&bytes)?;
        Ok(Arc::new(EngineSource { reader: Arc::clone(&self.reader), map }))
    }
}

/// One image of a store.
#[derive(Debug)]
pub struct EngineSource {
    reader: Arc<PageReader>,
    map: PageMap,
}

impl PageSource for EngineSource {
    fn image_len(&self) -> u64 {
        self.map.len()
    }

    fn extent(&self, page: u64) -> Extent {
        match self.map.extent(page) {
            coppice_engine::Extent::Zero => Extent::Zero,
            coppice_engine::Extent::Stored(location) => Extent::Stored(FrameKey {
                pack: location.frame.pack.0,
                offset: location.frame.offset,
            }),
        }
    }

    fn fetch(&self, page: u64, sink: &mut dyn FnMut(u64, &Page)) -> Result<Fetched, SourceError> {
        let fetched = self.reader.fetch(&self.map, page, sink)?;
        Ok(Fetched { bytes_read: fetched.bytes_read })
    }
}
