//! A disk: what the image held, and what the machine has written since.
//!
//! What was written lies in overlays, one on the other (`overlay`). A capture
//! freezes the newest and puts another on top, so that the disk and the memory
//! that it captures belong to one instant though the machine goes on.
//!
//! Invariant: a block whose bit is set in an overlay has its whole contents
//! there; a block without one is that of the image. A write of part of a block
//! first completes the block.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::FallocateFlags;
use vm_memory::{Bytes, VolatileMemoryError};

use super::SECTOR;
use super::overlay::{OverlayError, Overlays};
use crate::protocol::{PAGE_SIZE, PageRun};
use crate::sys::mapping::{Mapping, MappingError};

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskError {
    /// The pool cannot be mapped.
    #[error("disk pool: {0}")]
    Pool(#[from] MappingError),
    /// The overlay cannot be read or written.
    #[error("disk overlay: {0}")]
    Overlay(#[from] io::Error),
    /// Reading behind the mapping.
    #[error("disk pool: {0}")]
    Outside(#[from] VolatileMemoryError),
    /// A request behind the end of the disk.
    #[error("bytes {offset}..+{len} lie outside the disk")]
    Range {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// Overlays that cannot lie on this disk.
    #[error(transparent)]
    Overlays(#[from] OverlayError),
}

/// One disk of a machine.
#[derive(Debug)]
pub(crate) struct Disk {
    len: u64,
    read_only: bool,
    pool: Mapping,
    overlays: Mutex<Overlays>,
}

/// A write that is complete to whole blocks, ready for the overlay.
#[derive(Debug)]
pub(super) struct WholeBlocks {
    offset: u64,
    bytes: Vec<u8>,
}

/// Ranges that are to read as zeros: whole blocks, and the parts of blocks at
/// both ends, completed.
#[derive(Debug)]
pub(super) struct Erasure {
    whole: Range<u64>,
    edges: Vec<WholeBlocks>,
}

impl Disk {
    /// A disk over the pool of its image, frozen overlays, the oldest first,
    /// and an empty one.
    pub(crate) fn new(
        len: u64,
        read_only: bool,
        pool: &File,
        overlay: File,
        frozen: Vec<(File, &Vec<PageRun>)>,
    ) -> Result<Self, DiskError> {
        let pool = Mapping::private(pool, len, false)?;
        let blocks =
            usize::try_from(len.div_ceil(PAGE_SIZE)).map_err(|_| MappingError::TooLong(len))?;
        let overlays = Mutex::new(Overlays::new(blocks, frozen, overlay)?);
        Ok(Self { len, read_only, pool, overlays })
    }

    /// Puts an overlay on top, unless the newest holds nothing yet. Only
    /// while nobody has a pass.
    pub(crate) fn freeze(&self, overlay: File) {
        self.overlays().freeze(overlay);
    }

    /// Replaces the `count` oldest overlays, which are frozen, by one that
    /// holds the same.
    pub(crate) fn fold(
        &self,
        count: usize,
        overlay: File,
        runs: &[PageRun],
    ) -> Result<(), DiskError> {
        Ok(self.overlays().fold(count, overlay, runs)?)
    }

    /// The mapping of the pool.
    pub(crate) fn pool(&self) -> &Mapping {
        &self.pool
    }

    /// Whether writes are refused.
    pub(super) fn read_only(&self) -> bool {
        self.read_only
    }

    /// The blocks that the newest overlay holds.
    pub(crate) fn overlay_runs(&self) -> Vec<PageRun> {
        self.overlays().newest().runs()
    }

    /// The byte offset of a range of sectors, if it lies on the disk.
    pub(super) fn range(&self, sector: u64, len: u64) -> Result<u64, DiskError> {
        let offset = sector.saturating_mul(SECTOR);
        let end = offset.checked_add(len);
        if end.is_some_and(|end| end <= self.len) {
            Ok(offset)
        } else {
            Err(DiskError::Range { offset, len })
        }
    }

    /// Reads; may wait for the page server.
    pub(super) fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), DiskError> {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let in_block = usize::try_from(PAGE_SIZE - at % PAGE_SIZE).unwrap_or(usize::MAX);
            let here = in_block.min(bytes.len() - done);
            self.read_in_block(at, &mut bytes[done..done + here])?;
            done += here;
        }
        Ok(())
    }

    fn read_in_block(&self, at: u64, bytes: &mut [u8]) -> Result<(), DiskError> {
        let holder = self.overlays().holder(at / PAGE_SIZE);
        if let Some(file) = holder {
            file.read_exact_at(bytes, at)?;
        } else {
            let start = usize::try_from(at).unwrap_or(usize::MAX);
            self.pool.bytes().read_slice(bytes, start)?;
        }
        Ok(())
    }

    /// Completes a write to whole blocks; may wait for the page server.
    pub(super) fn prepare(&self, offset: u64, bytes: &[u8]) -> Result<WholeBlocks, DiskError> {
        let len = bytes.len() as u64;
        let end = offset
            .checked_add(len)
            .filter(|end| *end <= self.len)
            .ok_or(DiskError::Range { offset, len })?;
        let first = offset - offset % PAGE_SIZE;
        let last = end.next_multiple_of(PAGE_SIZE).min(self.len);
        let size = usize::try_from(last - first).map_err(|_| DiskError::Range { offset, len })?;
        let head = usize::try_from(offset - first).unwrap_or(0);
        let mut whole = vec![0; size];
        self.read(first, &mut whole[..head])?;
        self.read(end, &mut whole[head + bytes.len()..])?;
        whole[head..head + bytes.len()].copy_from_slice(bytes);
        Ok(WholeBlocks { offset: first, bytes: whole })
    }

    /// Writes whole blocks to the overlay. Only with a pass.
    pub(super) fn commit(&self, blocks: &WholeBlocks) -> Result<(), DiskError> {
        let first = blocks.offset / PAGE_SIZE;
        let count = (blocks.bytes.len() as u64).div_ceil(PAGE_SIZE);
        self.in_newest(first, count, |file| file.write_all_at(&blocks.bytes, blocks.offset))
    }

    /// Gives blocks their contents in the newest overlay. Only with a pass:
    /// without one it may not be the newest any more when it has them.
    fn in_newest(
        &self,
        first: u64,
        count: u64,
        change: impl FnOnce(&File) -> io::Result<()>,
    ) -> Result<(), DiskError> {
        let file = self.overlays().newest().file();
        change(&file)?;
        self.overlays().insert(first, count);
        Ok(())
    }

    /// Completes the ends of a range that is to be erased; may wait for the
    /// page server.
    pub(super) fn prepare_erase(&self, offset: u64, len: u64) -> Result<Erasure, DiskError> {
        let end = offset + len;
        let first = offset.next_multiple_of(PAGE_SIZE).min(end);
        let last = if end == self.len { end } else { (end - end % PAGE_SIZE).max(first) };
        let mut edges = Vec::new();
        for (start, stop) in [(offset, first), (last, end)] {
            if start < stop {
                let zeros = vec![0; usize::try_from(stop - start).unwrap_or(0)];
                edges.push(self.prepare(start, &zeros)?);
            }
        }
        Ok(Erasure { whole: first..last, edges })
    }

    /// Makes a range zeros. Only with a pass.
    pub(super) fn erase(&self, erasure: &Erasure) -> Result<(), DiskError> {
        for edge in &erasure.edges {
            self.commit(edge)?;
        }
        let Range { start, end } = erasure.whole;
        if start < end {
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            self.in_newest(start / PAGE_SIZE, (end - start).div_ceil(PAGE_SIZE), |file| {
                Ok(rustix::fs::fallocate(file, hole, start, end - start)?)
            })?;
        }
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn overlay_allocated(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        self.overlays().newest().file().metadata().unwrap().blocks() * 512
    }

    fn overlays(&self) -> MutexGuard<'_, Overlays> {
        // Setting bits cannot panic half-way.
        self.overlays.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn disk(len: usize) -> Disk {
        let mut pool =
            File::from(rustix::fs::memfd_create("p", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        let bytes: Vec<u8> = (0..len).map(|at| (at / 512).to_le_bytes()[0]).collect();
        pool.write_all(&bytes).unwrap();
        let overlay = tempfile::tempfile().unwrap();
        overlay.set_len(len as u64).unwrap();
        Disk::new(len as u64, false, &pool, overlay, Vec::new()).unwrap()
    }

    fn write(disk: &Disk, offset: u64, bytes: &[u8]) {
        disk.commit(&disk.prepare(offset, bytes).unwrap()).unwrap();
    }

    #[test]
    fn reads_see_the_image_and_then_the_writes() {
        let disk = disk(64 << 10);
        let mut bytes = [0; 1024];
        disk.read(1024, &mut bytes).unwrap();
        assert_eq!((bytes[0], bytes[512]), (2, 3));
        write(&disk, 1536, &[0xee; 512]);
        disk.read(1024, &mut bytes).unwrap();
        assert_eq!((bytes[0], bytes[512]), (2, 0xee));
    }

    #[test]
    fn part_of_a_block_takes_the_rest_from_the_image() {
        let disk = disk(64 << 10);
        write(&disk, 4096 + 512, &[0xaa; 512]);
        let mut block = [0; 4096];
        disk.overlays().holder(1).unwrap().read_exact_at(&mut block, 4096).unwrap();
        assert_eq!((block[0], block[512], block[1024], block[4095]), (8, 0xaa, 10, 15));
        assert_eq!(disk.overlay_runs(), [PageRun { first: 1, count: 1 }]);
    }

    #[test]
    fn a_second_partial_write_keeps_the_first() {
        let disk = disk(64 << 10);
        write(&disk, 0, &[1; 512]);
        write(&disk, 1024, &[2; 512]);
        let mut bytes = [9; 1536];
        disk.read(0, &mut bytes).unwrap();
        assert_eq!((bytes[0], bytes[512], bytes[1024]), (1, 1, 2));
        assert_eq!(bytes[512..1024], [1; 512]);
    }

    #[test]
    fn writes_across_blocks_mark_all_of_them() {
        let disk = disk(64 << 10);
        write(&disk, 4096 - 512, &[7; 4096 + 1024]);
        write(&disk, 8 * 4096, &[7; 4096]);
        let runs = [PageRun { first: 0, count: 3 }, PageRun { first: 8, count: 1 }];
        assert_eq!(disk.overlay_runs(), runs);
    }

    #[test]
    fn a_disk_that_ends_inside_a_block_is_whole() {
        let disk = disk(4096 + 1536);
        write(&disk, 4096 + 1024, &[5; 512]);
        let mut tail = [0; 1536];
        disk.read(4096, &mut tail).unwrap();
        assert_eq!((tail[0], tail[1024], tail[1535]), (8, 5, 5));
        assert_eq!(disk.overlays().holder(1).unwrap().metadata().unwrap().len(), 4096 + 1536);
    }

    #[test]
    fn nothing_behind_the_end_is_reached() {
        let disk = disk(8192);
        assert!(disk.range(15, 512).is_ok());
        assert!(disk.range(15, 513).is_err());
        assert!(disk.range(u64::MAX, 512).is_err());
        assert!(disk.prepare(8192 - 512, &[0; 1024]).is_err());
    }

    #[test]
    fn a_pool_that_is_too_short_is_refused() {
        let pool =
            File::from(rustix::fs::memfd_create("p", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        let made = Disk::new(8192, false, &pool, tempfile::tempfile().unwrap(), Vec::new());
        assert!(matches!(made, Err(DiskError::Pool(_))));
    }
}
