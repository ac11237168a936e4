//! Constants of the format and the few conversions between integer widths.
//!
//! Every length that is read from a disk or a peer is compared with one of
//! these limits before memory is set aside for it.

/// Chunks of memory and disks are this long, in bytes.
pub const PAGE_LEN: usize = 4096;

/// A page of zeros; such a page is never stored.
pub(crate) static ZERO_PAGE: [u8; PAGE_LEN] = [0; PAGE_LEN];

/// No frame holds more plaintext than this, in bytes.
pub const FRAME_PLAIN_LEN_MAX: usize = 1 << 20;

/// No pack file is longer than this, in bytes.
pub const PACK_LEN_MAX: u64 = 1 << 40;

/// No pack holds more objects than this.
pub(crate) const PACK_ENTRIES_MAX: u32 = 1 << 24;

/// No image is longer than this: 2^32 pages, 16 TiB.
pub const IMAGE_LEN_MAX: u64 = 1 << 44;

/// No snapshot record is longer than this, in bytes.
pub(crate) const RECORD_LEN_MAX: usize = 512 << 10;

/// The version of the on-disk format that this code reads and writes.
pub const FORMAT_VERSION: u32 = 1;

/// Where packs lie in a store.
pub(crate) const PACKS_DIR: &str = "packs";

/// Where a repair puts damaged packs.
pub(crate) const QUARANTINE_DIR: &str = "quarantine";

/// Where unfinished packs lie in a store.
pub(crate) const TEMP_DIR: &str = "tmp";

/// A length or count that lies in memory already, so it fits.
pub(crate) fn to_u64(len: usize) -> u64 {
    u64::try_from(len).expect("usize is at most 64 bits")
}

/// A length that a format constant bounds well below the address space.
pub(crate) fn to_usize(len: u64) -> usize {
    usize::try_from(len).expect("bounded lengths fit the address space")
}

/// A count that a format constant bounds below 2^32.
pub(crate) fn to_u32(count: usize) -> u32 {
    u32::try_from(count).expect("bounded counts fit 32 bits")
}

/// Pages that cover `len` bytes.
pub(crate) const fn pages_of(len: u64) -> u64 {
    len.div_ceil(PAGE_LEN as u64)
}

/// Byte offset of a page.
pub(crate) const fn page_offset(page: u64) -> u64 {
    page * PAGE_LEN as u64
}
