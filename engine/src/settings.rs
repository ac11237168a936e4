//! What a store can be told when it is opened. None of it changes what a
//! store means; all of it may differ from one opening to the next.

use crate::env::Clock;
use crate::error::StoreError;
use crate::units::{FRAME_PLAIN_LEN_MAX, PACK_LEN_MAX, PAGE_LEN, to_u64};

/// Which index to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IndexKind {
    /// RocksDB in the folder `index`.
    #[cfg(feature = "rocksdb")]
    RocksDb,
    /// In memory, built from the packs at every opening.
    Memory,
}

/// How a store works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// zstd level of new frames.
    pub zstd_level: i32,
    /// Plaintext of a frame in bytes: a multiple of 4096, at most 512 KiB.
    pub frame_len_max: usize,
    /// A pack is sealed when it is about this long, in bytes.
    pub pack_len_max: u64,
    /// A pack is sealed when it holds about this many objects.
    pub pack_objects_max: u32,
    /// Bytes of decoded frames of chunks that are kept for readers.
    pub frame_cache_len: usize,
    /// Which index to use.
    pub index: IndexKind,
    /// Where creation times come from.
    pub clock: Clock,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            zstd_level: 3,
            frame_len_max: 64 << 10,
            pack_len_max: 256 << 20,
            pack_objects_max: 1 << 18,
            frame_cache_len: 64 << 20,
            #[cfg(feature = "rocksdb")]
            index: IndexKind::RocksDb,
            #[cfg(not(feature = "rocksdb"))]
            index: IndexKind::Memory,
            clock: Clock::System,
        }
    }
}

impl Settings {
    pub(crate) fn check(&self) -> Result<(), StoreError> {
        let frames = PAGE_LEN..=FRAME_PLAIN_LEN_MAX / 2;
        if !frames.contains(&self.frame_len_max) || !self.frame_len_max.is_multiple_of(PAGE_LEN) {
            return Err(StoreError::Invalid("frames must be a multiple of 4 KiB up to 512 KiB"));
        }
        if !(to_u64(FRAME_PLAIN_LEN_MAX)..=PACK_LEN_MAX / 2).contains(&self.pack_len_max) {
            return Err(StoreError::Invalid("packs must be between 1 MiB and 512 GiB"));
        }
        if !(1..=crate::units::PACK_ENTRIES_MAX / 2).contains(&self.pack_objects_max) {
            return Err(StoreError::Invalid("packs must hold between 1 and 2^23 objects"));
        }
        Ok(())
    }
}
