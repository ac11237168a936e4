//! How RocksDB is set up, and opened. Keys are hashes, spread evenly, and most
//! look-ups find nothing: see the bench `scale` for what the settings do for a
//! large store.

use std::path::Path;

use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamilyDescriptor, DB, DBCompactionStyle, DBCompressionType,
    Options,
};

use super::FAMILIES;

const CACHE_LEN: usize = 32 << 20;
/// Sorted runs of entries before some are merged.
const RUNS_MAX: i32 = 8;
const WRITE_BUFFER_LEN: usize = 32 << 20;

pub(super) fn options() -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_max_open_files(256);
    options.set_keep_log_file_num(2);
    options.set_write_buffer_size(WRITE_BUFFER_LEN);
    options.set_atomic_flush(true);
    options.set_manifest_preallocation_size(64 << 10);
    options
}

fn entry_options(cache: &Cache) -> Options {
    let mut table = BlockBasedOptions::default();
    // A look-up of something new asks every run; one in a thousand is wrong.
    table.set_bloom_filter(14.0, false);
    table.set_block_cache(cache);
    let mut options = options();
    options.set_block_based_table_factory(&table);
    // Keys are hashes and places are small: nothing here compresses.
    options.set_compression_type(DBCompressionType::None);
    // Most look-ups find nothing: a filter spares them the walk through what
    // is not flushed yet.
    options.set_memtable_prefix_bloom_ratio(0.05);
    options.set_memtable_whole_key_filtering(true);
    // Keys are spread evenly, so merging into levels rewrites all of a level
    // each time; merging runs of like size rewrites an entry once for each
    // eightfold growth.
    options.set_compaction_style(DBCompactionStyle::Universal);
    options.set_level_zero_file_num_compaction_trigger(RUNS_MAX);
    options
}

pub(super) fn families() -> [ColumnFamilyDescriptor; FAMILIES.len()] {
    let cache = Cache::new_lru_cache(CACHE_LEN);
    FAMILIES.map(|family| ColumnFamilyDescriptor::new(family, entry_options(&cache)))
}

pub(super) fn try_open(dir: &Path) -> Result<DB, rocksdb::Error> {
    DB::open_cf_descriptors(&options(), dir, families())
}

pub(super) fn open_for_reading(dir: &Path) -> Result<DB, rocksdb::Error> {
    DB::open_cf_descriptors_read_only(&options(), dir, families(), false)
}
