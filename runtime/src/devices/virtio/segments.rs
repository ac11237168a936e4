//! The buffers of a descriptor chain as two byte sequences: what the device
//! may read, then what it may write. Requests do not depend on how a driver
//! cuts them into descriptors.

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress};

use super::transport::Broken;
use crate::memory::GuestMap;

/// An indirect table may hold 65,535 descriptors; drivers use a few hundred.
const SEGMENTS_MAX: usize = 1024;

/// One sequence of bytes in guest memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Segments {
    pieces: Vec<(GuestAddress, u32)>,
}

/// Both sequences of a chain.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Buffers {
    /// The device reads these.
    pub(super) readable: Segments,
    /// The device writes these.
    pub(super) writable: Segments,
}

impl Buffers {
    /// Walks the chain. Writable buffers must follow the readable ones.
    pub(super) fn of(chain: DescriptorChain<&GuestMap>) -> Result<Self, Broken> {
        let mut buffers = Self::default();
        let mut count = 0;
        for descriptor in chain {
            count += 1;
            if count > SEGMENTS_MAX {
                return Err(Broken("a descriptor chain is too long"));
            }
            let piece = (descriptor.addr(), descriptor.len());
            if descriptor.is_write_only() {
                buffers.writable.pieces.push(piece);
            } else if buffers.writable.pieces.is_empty() {
                buffers.readable.pieces.push(piece);
            } else {
                return Err(Broken("a readable buffer follows a writable one"));
            }
        }
        Ok(buffers)
    }
}

impl Segments {
    /// Length in bytes.
    pub(super) fn len(&self) -> u64 {
        self.pieces.iter().map(|(_, len)| u64::from(*len)).sum()
    }

    /// Fills `bytes` from `offset` on.
    pub(super) fn read(
        &self,
        memory: &GuestMap,
        offset: u64,
        bytes: &mut [u8],
    ) -> Result<(), Broken> {
        let mut done = 0;
        self.walk(offset, bytes.len(), |address, len| {
            let result = memory.read_slice(&mut bytes[done..done + len], address);
            done += len;
            result.map_err(|_| Broken("a buffer lies outside memory"))
        })
    }

    /// Writes `bytes` from `offset` on.
    pub(super) fn write(&self, memory: &GuestMap, offset: u64, bytes: &[u8]) -> Result<(), Broken> {
        let mut done = 0;
        self.walk(offset, bytes.len(), |address, len| {
            let result = memory.write_slice(&bytes[done..done + len], address);
            done += len;
            result.map_err(|_| Broken("a buffer lies outside memory"))
        })
    }

    /// Calls `step` for the pieces of `offset..offset + len`.
    pub(super) fn walk(
        &self,
        offset: u64,
        len: usize,
        mut step: impl FnMut(GuestAddress, usize) -> Result<(), Broken>,
    ) -> Result<(), Broken> {
        let mut skip = offset;
        let mut left = len;
        for (address, piece) in &self.pieces {
            if left == 0 {
                return Ok(());
            }
            let piece = u64::from(*piece);
            if skip >= piece {
                skip -= piece;
                continue;
            }
            let here = usize::try_from(piece - skip).unwrap_or(usize::MAX).min(left);
            let start = address.0.checked_add(skip).ok_or(Broken("a buffer wraps around"))?;
            step(GuestAddress(start), here)?;
            left -= here;
            skip = 0;
        }
        if left == 0 { Ok(()) } else { Err(Broken("a buffer is shorter than its contents")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segments(pieces: &[(u64, u32)]) -> Segments {
        Segments { pieces: pieces.iter().map(|(at, len)| (GuestAddress(*at), *len)).collect() }
    }

    fn memory() -> GuestMap {
        GuestMap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap()
    }

    #[test]
    fn bytes_cross_pieces() {
        let memory = memory();
        let segments = segments(&[(0x1000, 3), (0x2000, 0), (0x3000, 4)]);
        segments.write(&memory, 1, b"abcde").unwrap();
        let mut bytes = [0; 5];
        segments.read(&memory, 1, &mut bytes).unwrap();
        assert_eq!(&bytes, b"abcde");
        assert_eq!(memory.read_obj::<[u8; 3]>(GuestAddress(0x3000)).unwrap(), *b"cde");
    }

    #[test]
    fn too_short_outside_and_wrapping_buffers_are_broken() {
        let memory = memory();
        let mut bytes = [0; 8];
        for pieces in [&[(0, 7)][..], &[(0xfffc, 8)], &[(u64::MAX - 1, 8)], &[]] {
            assert!(segments(pieces).read(&memory, 0, &mut bytes).is_err());
        }
        assert!(segments(&[(u64::MAX, 8)]).read(&memory, 4, &mut bytes[..2]).is_err());
    }
}
