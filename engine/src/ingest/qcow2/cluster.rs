//! Clusters of a qcow2 file: where they lie and what is in them.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use super::header::{Compression, Header};
use super::read;
use crate::error::{Qcow2Error, StoreError};
use crate::units::{to_u64, to_usize};

/// The offset in an entry of either table.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeros, whatever its offset.
const ZERO: u64 = 1;
const SECTOR_LEN: u64 = 512;
/// Compressed clusters are hardly ever shorter than this.
const COMPRESSED_LEN_MIN: u64 = 32;

/// What a file says about a cluster of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// It has its bytes.
    Data,
    /// It is zeros.
    Zero,
    /// What the file below has, if there is one.
    Absent,
}

/// Reads clusters and remembers which were used, so that none is used twice.
#[derive(Debug)]
pub(super) struct Clusters<'f> {
    file: &'f File,
    file_len: u64,
    header: Header,
    /// A bit for each cluster of the file that was used, in words of 64 by
    /// their number. A sparse file may be of any length.
    used: HashMap<u64, u64>,
    compressed_left: u64,
}

impl<'f> Clusters<'f> {
    pub(super) fn new(file: &'f File, file_len: u64, header: &Header) -> Self {
        Self {
            file,
            file_len,
            header: *header,
            used: HashMap::new(),
            compressed_left: file_len / COMPRESSED_LEN_MIN + 1,
        }
    }

    /// The lower table that an entry of the upper one names.
    pub(super) fn table(&mut self, entry: u64) -> Result<Option<Vec<u8>>, StoreError> {
        let offset = entry & OFFSET_MASK;
        if offset == 0 {
            return Ok(None);
        }
        self.take(offset, "a lower table")?;
        read(self.file, offset, to_usize(self.header.cluster_len())).map(Some)
    }

    /// What an entry of a lower table says.
    pub(super) fn state(&self, entry: u64) -> State {
        if entry & COMPRESSED != 0 {
            State::Data
        } else if self.header.version >= 3 && entry & ZERO != 0 {
            State::Zero
        } else if entry & OFFSET_MASK == 0 {
            State::Absent
        } else {
            State::Data
        }
    }

    /// Fills `out`, which holds zeros, with a cluster.
    pub(super) fn read(&mut self, entry: u64, out: &mut [u8]) -> Result<(), StoreError> {
        if entry & COMPRESSED != 0 {
            return self.read_compressed(entry, out);
        }
        if self.state(entry) != State::Data {
            return Ok(());
        }
        let offset = entry & OFFSET_MASK;
        self.take(offset, "a cluster")?;
        // The last cluster of a file may be cut short; the rest is zeros.
        let len = to_usize((self.file_len - offset).min(to_u64(out.len())));
        let done = self.file.read_exact_at(&mut out[..len], offset);
        done.map_err(StoreError::transfer("read input"))
    }

    fn read_compressed(&mut self, entry: u64, out: &mut [u8]) -> Result<(), StoreError> {
        let left = self.compressed_left.checked_sub(1);
        self.compressed_left = left.ok_or(Qcow2Error::TooMuchCompressed)?;
        let offset_bits = 62 - (self.header.cluster_bits - 8);
        let offset = entry & ((1 << offset_bits) - 1);
        let sectors = (entry & (COMPRESSED - 1)) >> offset_bits;
        let len = (sectors + 1) * SECTOR_LEN - offset % SECTOR_LEN;
        if offset >= self.file_len {
            return Err(Qcow2Error::Outside { what: "a compressed cluster", offset }.into());
        }
        let stored = read(self.file, offset, to_usize(len.min(self.file_len - offset)))?;
        let whole = match self.header.compression {
            Compression::Deflate => inflate(&stored, out),
            Compression::Zstd => unpack_zstd(&stored, out),
        };
        if whole { Ok(()) } else { Err(Qcow2Error::Compressed { offset }.into()) }
    }

    /// Marks a host cluster as used.
    fn take(&mut self, offset: u64, what: &'static str) -> Result<(), StoreError> {
        if !offset.is_multiple_of(self.header.cluster_len()) || offset >= self.file_len {
            return Err(Qcow2Error::Outside { what, offset }.into());
        }
        let cluster = offset / self.header.cluster_len();
        let word = self.used.entry(cluster / 64).or_default();
        let bit = 1 << (cluster % 64);
        if *word & bit != 0 {
            return Err(Qcow2Error::UsedTwice { offset }.into());
        }
        *word |= bit;
        Ok(())
    }
}

/// Whether the raw deflate stream fills `out` exactly; padding may follow it.
fn inflate(stored: &[u8], out: &mut [u8]) -> bool {
    let done = miniz_oxide::inflate::decompress_slice_iter_to_slice(
        out,
        std::iter::once(stored),
        false,
        true,
    );
    done.is_ok_and(|len| len == out.len())
}

/// Whether the zstd frame fills `out` exactly; padding may follow it.
fn unpack_zstd(stored: &[u8], out: &mut [u8]) -> bool {
    let frame = zstd::zstd_safe::find_frame_compressed_size(stored);
    let Some(frame) = frame.ok().and_then(|len| stored.get(..len)) else { return false };
    zstd::bulk::decompress_to_buffer(frame, out).is_ok_and(|len| len == out.len())
}
