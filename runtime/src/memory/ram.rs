//! The guest's RAM in this process.
//!
//! Invariant: one range of private mappings holds the whole image in order, so
//! that an offset in the image is an offset in the range; the guest ranges are views
//! of it. Clean pages of a pooled mapping belong to the pool, dirty ones to
//! this process alone.
#![expect(unsafe_code, reason = "the guest ranges are views of one mapping")]

use std::fs::File;

use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionCollectionError, GuestRegionMmap};

use super::layout::RamLayout;
use crate::protocol::PageRun;
use crate::sys::mapping::{Mapping, MappingError};

/// Guest-physical memory as the rust-vmm crates see it.
pub(crate) type GuestMap = GuestMemoryMmap<()>;

/// Why the RAM could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RamError {
    /// The mapping failed.
    #[error("guest memory: {0}")]
    Mapping(#[from] MappingError),
    /// A view of it was refused.
    #[error("guest memory: {0}")]
    Region(#[from] MmapRegionError),
    /// The views do not form an address space.
    #[error("guest memory: {0}")]
    Collection(#[from] GuestRegionCollectionError),
    /// A range lies outside 64-bit guest-physical addresses.
    #[error("guest memory: the range at {0:#x} does not fit the address space")]
    Range(u64),
}

/// All of the guest's RAM.
#[derive(Debug)]
pub(crate) struct Ram {
    // Dropped before the mapping that it looks into.
    guest: GuestMap,
    mapping: Mapping,
    layout: RamLayout,
}

impl Ram {
    /// Empty memory for a machine that boots.
    pub(crate) fn anonymous(layout: RamLayout) -> Result<Self, RamError> {
        Self::over(Mapping::anonymous(layout.len())?, layout)
    }

    /// Memory that continues from pieces of pools.
    pub(crate) fn of_pieces(
        pieces: &[(PageRun, &File)],
        layout: RamLayout,
    ) -> Result<Self, RamError> {
        Self::over(Mapping::private_pieces(layout.len(), pieces)?, layout)
    }

    fn over(mapping: Mapping, layout: RamLayout) -> Result<Self, RamError> {
        let mut regions = Vec::new();
        for range in layout.ranges() {
            let outside = |_| RamError::Range(range.gpa);
            let offset = usize::try_from(range.offset).map_err(outside)?;
            let len = usize::try_from(range.len).map_err(outside)?;
            // SAFETY: the layout's ranges lie inside the image, which is as
            // long as the mapping.
            let start = unsafe { mapping.pointer().add(offset) };
            let builder = MmapRegionBuilder::new(len)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE);
            // SAFETY: `start..start + len` is part of the mapping, which
            // outlives the region (see the order of the fields).
            let builder = unsafe { builder.with_raw_mmap_pointer(start) };
            let region = GuestRegionMmap::new(builder.build()?, GuestAddress(range.gpa))
                .ok_or(RamError::Range(range.gpa))?;
            regions.push(region);
        }
        Ok(Self { guest: GuestMap::from_regions(regions)?, mapping, layout })
    }

    /// The guest's view.
    pub(crate) fn guest(&self) -> &GuestMap {
        &self.guest
    }

    /// The mapping that holds the image.
    pub(crate) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// How it is laid out.
    pub(crate) fn layout(&self) -> RamLayout {
        self.layout
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn image_offsets_and_guest_addresses_agree_on_both_sides_of_the_hole() {
        let ram = Ram::anonymous(RamLayout::new((3 << 30) + (1 << 20)).unwrap()).unwrap();
        ram.guest().write_obj(0x11u8, GuestAddress(0x1234)).unwrap();
        ram.guest().write_obj(0x22u8, GuestAddress((4 << 30) + 5)).unwrap();
        assert_eq!(ram.mapping().bytes().read_obj::<u8>(0x1234).unwrap(), 0x11);
        assert_eq!(ram.mapping().bytes().read_obj::<u8>((3 << 30) + 5).unwrap(), 0x22);
    }

    #[test]
    fn the_hole_is_no_memory() {
        let ram = Ram::anonymous(RamLayout::new(4 << 30).unwrap()).unwrap();
        assert!(ram.guest().read_obj::<u8>(GuestAddress(0xd000_0000)).is_err());
    }
}
