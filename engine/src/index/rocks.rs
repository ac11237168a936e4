//! The index in RocksDB. Flushing its log is not needed: what a power cut
//! takes away is published again from the packs.

use std::path::Path;

use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBCompressionType,
    IteratorMode, Options, WriteBatch,
};

use super::{Index, PackSummary, Place, places};
use crate::error::StoreError;
use crate::id::{ObjectKey, PackId};
use crate::pack::DurablePack;
use crate::pack::fields::Fields;

/// Key of an object -> its place, 8 bytes.
const ENTRIES: &str = "entries";
/// Pack id -> its summary, 16 bytes.
const PACKS: &str = "packs";
/// Key of an object whose stored bytes are bad -> nothing.
const DISTRUSTED: &str = "distrusted";

const FAMILIES: [&str; 3] = [ENTRIES, PACKS, DISTRUSTED];
const CACHE_LEN: usize = 32 << 20;
const BATCH_ENTRIES: usize = 1 << 16;

/// An index in a folder of its own.
pub(crate) struct RocksIndex {
    db: DB,
}

impl std::fmt::Debug for RocksIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RocksIndex").finish_non_exhaustive()
    }
}

fn failed(error: rocksdb::Error) -> StoreError {
    StoreError::Index(error.into_string())
}

fn options() -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_max_open_files(256);
    options.set_keep_log_file_num(2);
    options.set_write_buffer_size(32 << 20);
    options.set_max_total_wal_size(64 << 20);
    options
}

fn entry_options(cache: &Cache) -> Options {
    let mut table = BlockBasedOptions::default();
    table.set_bloom_filter(10.0, false);
    table.set_block_cache(cache);
    let mut options = options();
    options.set_block_based_table_factory(&table);
    // Keys are hashes and places are small: nothing here compresses.
    options.set_compression_type(DBCompressionType::None);
    options
}

impl RocksIndex {
    /// Opens the index. One that RocksDB refuses is made anew, because the
    /// packs have everything in it.
    pub(crate) fn open(dir: &Path) -> Result<Self, StoreError> {
        match Self::try_open(dir) {
            Ok(index) => Ok(index),
            Err(error) if is_damage(&error) => {
                tracing::warn!(%error, "the index is damaged; building it again");
                std::fs::remove_dir_all(dir).map_err(StoreError::io("remove", "index"))?;
                Self::try_open(dir).map_err(failed)
            }
            Err(error) => Err(failed(error)),
        }
    }

    fn try_open(dir: &Path) -> Result<Self, rocksdb::Error> {
        let cache = Cache::new_lru_cache(CACHE_LEN);
        let families =
            FAMILIES.map(|family| ColumnFamilyDescriptor::new(family, entry_options(&cache)));
        Ok(Self { db: DB::open_cf_descriptors(&options(), dir, families)? })
    }

    fn family(&self, name: &'static str) -> &ColumnFamily {
        self.db.cf_handle(name).expect("all families are opened together")
    }
}

fn is_damage(error: &rocksdb::Error) -> bool {
    use rocksdb::ErrorKind;
    matches!(error.kind(), ErrorKind::Corruption | ErrorKind::InvalidArgument | ErrorKind::NotFound)
}

fn decode_place(bytes: &[u8]) -> Result<Place, StoreError> {
    let bits = <[u8; 8]>::try_from(bytes);
    let bits = bits.map_err(|_| StoreError::Index("an entry has a wrong length".to_owned()))?;
    Ok(Place::from_bits(u64::from_le_bytes(bits)))
}

fn decode_key(bytes: &[u8]) -> Result<ObjectKey, StoreError> {
    let key = <[u8; ObjectKey::LEN]>::try_from(bytes);
    key.map(ObjectKey).map_err(|_| StoreError::Index("a key has a wrong length".to_owned()))
}

fn encode_summary(summary: &PackSummary) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&summary.file_len.to_le_bytes());
    bytes[8..12].copy_from_slice(&summary.entries.to_le_bytes());
    bytes[12..].copy_from_slice(&summary.chunks.to_le_bytes());
    bytes
}

fn decode_pack(key: &[u8], value: &[u8]) -> Result<(PackId, PackSummary), StoreError> {
    let mut fields = Fields::new(value);
    let mut read = || {
        let pack = PackId(u64::from_be_bytes(Fields::new(key).array()?));
        let summary =
            PackSummary { file_len: fields.u64()?, entries: fields.u32()?, chunks: fields.u32()? };
        Ok((pack, summary))
    };
    read().map_err(|error: crate::error::FormatError| StoreError::Index(error.to_string()))
}

impl Index for RocksIndex {
    fn get_many(&self, keys: &[ObjectKey]) -> Result<Vec<Option<Place>>, StoreError> {
        let family = self.family(ENTRIES);
        let found = self.db.batched_multi_get_cf(family, keys.iter().map(|key| &key.0), false);
        let decode = |value: Result<Option<rocksdb::DBPinnableSlice<'_>>, rocksdb::Error>| {
            value.map_err(failed)?.map(|bytes| decode_place(&bytes)).transpose()
        };
        found.into_iter().map(decode).collect()
    }

    fn publish(&self, pack: &DurablePack) -> Result<(), StoreError> {
        let (entries, distrusted) = (self.family(ENTRIES), self.family(DISTRUSTED));
        let mut batch = WriteBatch::default();
        for (key, place) in places(pack) {
            batch.put_cf(entries, key.0, place.to_bits().to_le_bytes());
        }
        for key in self.distrusted()? {
            if pack.directory.keys.contains(&key) {
                batch.delete_cf(distrusted, key.0);
            }
        }
        // The mark that the pack is published goes with its entries.
        let summary = encode_summary(&PackSummary::of(pack));
        batch.put_cf(self.family(PACKS), pack.pack.0.to_be_bytes(), summary);
        self.db.write(batch).map_err(failed)
    }

    fn packs(&self) -> Result<Vec<(PackId, PackSummary)>, StoreError> {
        let all = self.db.iterator_cf(self.family(PACKS), IteratorMode::Start);
        all.map(|item| {
            let (key, value) = item.map_err(failed)?;
            decode_pack(&key, &value)
        })
        .collect()
    }

    fn clear(&self) -> Result<(), StoreError> {
        // Marks go first: entries without a mark are published again.
        for family in [PACKS, ENTRIES, DISTRUSTED] {
            let family = self.family(family);
            loop {
                let mut batch = WriteBatch::default();
                for item in self.db.iterator_cf(family, IteratorMode::Start).take(BATCH_ENTRIES) {
                    batch.delete_cf(family, item.map_err(failed)?.0);
                }
                if batch.is_empty() {
                    break;
                }
                self.db.write(batch).map_err(failed)?;
            }
        }
        Ok(())
    }

    fn for_each(
        &self,
        visit: &mut dyn FnMut(ObjectKey, Place) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        for item in self.db.iterator_cf(self.family(ENTRIES), IteratorMode::Start) {
            let (key, value) = item.map_err(failed)?;
            visit(decode_key(&key)?, decode_place(&value)?)?;
        }
        Ok(())
    }

    fn distrust(&self, keys: &[ObjectKey]) -> Result<(), StoreError> {
        let family = self.family(DISTRUSTED);
        let mut batch = WriteBatch::default();
        keys.iter().for_each(|key| batch.put_cf(family, key.0, []));
        self.db.write(batch).map_err(failed)
    }

    fn distrusted(&self) -> Result<Vec<ObjectKey>, StoreError> {
        let all = self.db.iterator_cf(self.family(DISTRUSTED), IteratorMode::Start);
        all.map(|item| decode_key(&item.map_err(failed)?.0)).collect()
    }
}
