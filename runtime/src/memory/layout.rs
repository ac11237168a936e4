//! The guest-physical address map.
//!
//! RAM is one linear image. The guest sees its first 3 GiB at address 0 and
//! the rest from 4 GiB on; devices live in the hole between.
//!
//! ```text
//! image   0 ───────────────── 3 GiB ──────────── len
//!         │                   └──────────┐
//! guest   0 ───────────────── 3 GiB      4 GiB ─────── len + 1 GiB
//!                             │ devices  │
//!                             d000_0000  virtio-mmio, one page each
//!                             fec0_0000  I/O APIC
//!                             fee0_0000  local APIC
//!                             fffb_c000  KVM's identity map and TSS
//! ```

use crate::protocol::PAGE_SIZE;

/// Where the hole for devices starts.
pub(crate) const HOLE_START: u64 = 0xc000_0000;
/// Where RAM goes on after the hole.
pub(crate) const HIGH_START: u64 = 1 << 32;
/// The first virtio-mmio device.
pub(crate) const MMIO_BASE: u64 = 0xd000_0000;

const MEMORY_MIN: u64 = 16 << 20;
const MEMORY_MAX: u64 = 1 << 40;

/// Why a memory size is not accepted.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "memory of {0} bytes: it must be a multiple of {PAGE_SIZE} between {MEMORY_MIN} and {MEMORY_MAX}"
)]
pub(crate) struct LayoutError(u64);

/// A piece of RAM that is contiguous for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RamRange {
    /// Guest-physical address.
    pub(crate) gpa: u64,
    /// Offset in the RAM image.
    pub(crate) offset: u64,
    /// Length in bytes.
    pub(crate) len: u64,
}

/// How RAM of a given length lies in the guest's address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RamLayout {
    len: u64,
}

impl RamLayout {
    /// Checks the length.
    pub(crate) fn new(len: u64) -> Result<Self, LayoutError> {
        if len.is_multiple_of(PAGE_SIZE) && (MEMORY_MIN..=MEMORY_MAX).contains(&len) {
            Ok(Self { len })
        } else {
            Err(LayoutError(len))
        }
    }

    /// Length of the RAM image in bytes.
    pub(crate) fn len(self) -> u64 {
        self.len
    }

    /// The pieces in ascending order; together they are the whole image.
    pub(crate) fn ranges(self) -> Vec<RamRange> {
        let low = self.len.min(HOLE_START);
        let mut ranges = vec![RamRange { gpa: 0, offset: 0, len: low }];
        if self.len > low {
            ranges.push(RamRange { gpa: HIGH_START, offset: low, len: self.len - low });
        }
        ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_memory_is_one_range() {
        let layout = RamLayout::new(64 << 20).unwrap();
        assert_eq!(layout.ranges(), [RamRange { gpa: 0, offset: 0, len: 64 << 20 }]);
    }

    #[test]
    fn memory_over_three_gib_goes_on_after_the_hole() {
        let layout = RamLayout::new(5 << 30).unwrap();
        let ranges = layout.ranges();
        assert_eq!(ranges[0], RamRange { gpa: 0, offset: 0, len: 3 << 30 });
        assert_eq!(ranges[1], RamRange { gpa: 4 << 30, offset: 3 << 30, len: 2 << 30 });
    }

    #[test]
    fn odd_and_absurd_lengths_are_refused() {
        for len in [0, 4096, (64 << 20) + 1, u64::MAX] {
            assert_eq!(RamLayout::new(len), Err(LayoutError(len)));
        }
    }
}
