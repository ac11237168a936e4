//! The index: where each object lies. It is derived from the packs and can be
//! thrown away at any time.
//!
//! Invariant: an entry is published only for a pack that is durable, in one
//! atomic step with the mark that the pack was published. A pack without its
//! mark is published again when the store is opened.

mod memory;
#[cfg(feature = "rocksdb")]
mod rocks;
pub(crate) mod rows;
mod sim;
mod view;

use std::fmt::Debug;

pub(crate) use memory::MemIndex;
#[cfg(feature = "rocksdb")]
pub(crate) use rocks::RocksIndex;
use rows::{RowChange, RowKey};
pub use sim::SimIndex;
pub(crate) use view::ViewIndex;

use crate::error::StoreError;
use crate::id::{ObjectKey, PackId};
use crate::pack::{DurablePack, EntryNo};
use crate::units::to_u32;

/// Where an object lies: 8 bytes, so that an entry with its key takes 28.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) pack: PackId,
    pub(crate) entry: EntryNo,
}

const ENTRY_BITS: u32 = 24;

impl Place {
    pub(crate) fn to_bits(self) -> u64 {
        assert!(self.pack.0 < PackId::LIMIT, "pack ids have 40 bits");
        (self.pack.0 << ENTRY_BITS) | u64::from(self.entry.0)
    }

    pub(crate) fn from_bits(bits: u64) -> Self {
        let entry = u32::try_from(bits & ((1 << ENTRY_BITS) - 1)).expect("24 bits");
        Self { pack: PackId(bits >> ENTRY_BITS), entry: EntryNo(entry) }
    }
}

/// What the index remembers about a published pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PackSummary {
    /// Length of its file in bytes.
    pub(crate) file_len: u64,
    /// Objects in it.
    pub(crate) entries: u32,
    /// Chunks among them.
    pub(crate) chunks: u32,
    /// Plaintext bytes of these.
    pub(crate) chunk_bytes: u64,
}

impl PackSummary {
    pub(crate) fn of(pack: &DurablePack) -> Self {
        let chunks = u32::try_from(pack.directory.chunks()).unwrap_or(u32::MAX);
        let entries = to_u32(pack.directory.keys.len());
        let chunk_bytes = pack.directory.chunk_bytes();
        Self { file_len: pack.file_len, entries, chunks, chunk_bytes }
    }
}

/// Finds objects. Implementations: [`RocksIndex`] on disk, [`MemIndex`].
pub(crate) trait Index: Send + Sync + Debug {
    /// The places of objects, in the order of the keys.
    fn get_many(&self, keys: &[ObjectKey]) -> Result<Vec<Option<Place>>, StoreError>;

    /// Adds all objects of a durable pack, replacing places in older packs,
    /// and trusts them again. So an object is always found in the youngest
    /// pack that has it, in whatever order packs are published. Only one pack
    /// at a time is published or retired. From where an object moved is told
    /// in a row of the ledger.
    fn publish(&self, pack: &DurablePack) -> Result<(), StoreError>;

    /// As [`Index::publish`], for a pack of which no object is in the index,
    /// unless it went back to an earlier state since it had this generation.
    fn publish_new(&self, pack: &DurablePack, generation: u64) -> Result<(), StoreError>;

    /// Takes a pack out: gives its objects other places, or none, and removes
    /// the mark and the ledger's rows of the pack, those of what moved there
    /// too, in one atomic and durable step.
    fn retire(&self, pack: PackId, moves: &[(ObjectKey, Option<Place>)]) -> Result<(), StoreError>;

    /// The packs that were published.
    fn packs(&self) -> Result<Vec<(PackId, PackSummary)>, StoreError>;

    /// Forgets everything.
    fn clear(&self) -> Result<(), StoreError>;

    /// Visits every entry, in no particular order. `visit` must not use the
    /// index.
    fn for_each(
        &self,
        visit: &mut dyn FnMut(ObjectKey, Place) -> Result<(), StoreError>,
    ) -> Result<(), StoreError>;

    /// Remembers that the stored bytes of these objects are bad. Not while a
    /// pack is published or retired.
    fn distrust(&self, keys: &[ObjectKey]) -> Result<(), StoreError>;

    /// The hints of objects, in the order of the keys.
    fn hints(&self, keys: &[ObjectKey]) -> Result<Vec<Option<Vec<u8>>>, StoreError>;

    /// Keeps hints, or takes them away. They need not survive a crash.
    fn write_hints(&self, hints: &[(ObjectKey, Option<Vec<u8>>)]) -> Result<(), StoreError>;

    /// Takes all hints away.
    fn clear_hints(&self) -> Result<(), StoreError>;

    /// How many hints there are, and their bytes, keys included.
    fn hint_totals(&self) -> Result<(u64, u64), StoreError>;

    /// All objects that are not trusted.
    fn distrusted(&self) -> Result<Vec<ObjectKey>, StoreError>;

    /// Rows of the ledger.
    fn rows(&self, keys: &[RowKey]) -> Result<Vec<Option<Vec<u8>>>, StoreError>;

    /// Up to `limit` rows whose keys begin with `prefix` and lie behind
    /// `after`, ascending.
    fn rows_behind(
        &self,
        prefix: &[u8],
        after: &[u8],
        limit: usize,
    ) -> Result<Vec<(RowKey, Vec<u8>)>, StoreError>;

    /// Changes rows in one atomic step; not if the index went back to an
    /// earlier state since it had this generation.
    fn put_rows(&self, generation: u64, rows: &[RowChange]) -> Result<(), StoreError>;

    /// Rises whenever the index went back to an earlier state.
    fn generation(&self) -> u64;
}

/// The places of all objects of a pack.
pub(crate) fn places(pack: &DurablePack) -> impl Iterator<Item = (ObjectKey, Place)> + '_ {
    let entries = pack.directory.keys.iter().zip(0_u32..);
    entries.map(|(key, entry)| (*key, Place { pack: pack.pack, entry: EntryNo(entry) }))
}

const _: () = assert!(1_u64 << ENTRY_BITS == crate::units::PACK_ENTRIES_MAX as u64);
