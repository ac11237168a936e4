//! An image that lies decoded in the page server's memory: what a fault costs
//! when there is nothing to read, to decompress or to verify.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use coppice_runtime::fault::{Extent, Fetched, FrameKey, Library, Page, PageSource, SourceError};

/// Opens images whose page map is the image itself.
#[derive(Debug)]
pub struct MemoryLibrary;

impl Library for MemoryLibrary {
    fn add_pack(&self, _pack: u64, _file: File) {}

    fn open(&self, map: File) -> Result<Arc<dyn PageSource>, SourceError> {
        let len = map.metadata()?.len();
        let size = usize::try_from(len).map_err(|_| SourceError::PageMapTooLong(len))?;
        let mut bytes = vec![0; size];
        map.read_exact_at(&mut bytes, 0)?;
        Ok(Arc::new(MemorySource { bytes }))
    }
}

struct MemorySource {
    bytes: Vec<u8>,
}

impl PageSource for MemorySource {
    fn image_len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn extent(&self, page: u64) -> Extent {
        Extent::Stored(FrameKey { pack: 0, offset: page })
    }

    fn fetch(&self, page: u64, sink: &mut dyn FnMut(u64, &Page)) -> Result<Fetched, SourceError> {
        let number = usize::try_from(page).map_err(|_| SourceError::NotDelivered(page))?;
        let (pages, _) = self.bytes.as_chunks::<4096>();
        sink(page, pages.get(number).ok_or(SourceError::NotDelivered(page))?);
        Ok(Fetched::default())
    }
}

/// Opens images whose page map is the image itself, and leaves them where they
/// are: for images too large to be held twice.
#[derive(Debug)]
pub struct FileLibrary;

impl Library for FileLibrary {
    fn add_pack(&self, _pack: u64, _file: File) {}

    fn open(&self, map: File) -> Result<Arc<dyn PageSource>, SourceError> {
        let len = map.metadata()?.len();
        Ok(Arc::new(FileSource { file: map, len }))
    }
}

struct FileSource {
    file: File,
    len: u64,
}

/// Pages that one fetch yields.
const FRAME_PAGES: u64 = 32;

impl PageSource for FileSource {
    fn image_len(&self) -> u64 {
        self.len
    }

    fn extent(&self, page: u64) -> Extent {
        Extent::Stored(FrameKey { pack: 0, offset: page / FRAME_PAGES })
    }

    fn fetch(&self, page: u64, sink: &mut dyn FnMut(u64, &Page)) -> Result<Fetched, SourceError> {
        let mut bytes = [0; 4096];
        let first = page / FRAME_PAGES * FRAME_PAGES;
        let end = (first + FRAME_PAGES).min(self.len / 4096);
        for page in std::iter::once(page).chain((first..end).filter(|other| *other != page)) {
            self.file.read_exact_at(&mut bytes, page * 4096)?;
            sink(page, &bytes);
        }
        Ok(Fetched::default())
    }
}
