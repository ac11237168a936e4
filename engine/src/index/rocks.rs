//! The index in RocksDB. It keeps no write-ahead log: what a crash takes away
//! is published again from the packs. Families are flushed together, so that no
//! mark of a pack outlives its entries, and what no pack tells - that a pack was
//! retired, that an object is bad - is flushed at once.
//!
//! A flush may fail, because the disk is full. RocksDB then has to be opened
//! again, and what was not flushed is gone from it although the process goes
//! on. So packs are remembered until they are flushed, and published again
//! before anyone looks something up. While even that fails, they are looked up in
//! memory.

mod code;
mod setup;

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};

use rocksdb::{ColumnFamily, DB, Direction, FlushOptions, IteratorMode, WriteBatch, WriteOptions};

use self::code::{decode_key, decode_pack, decode_place, encode_summary};
use self::setup::{families, open_for_reading, options, try_open};
use super::rows::{self, RowChange, RowKey};
use super::{Index, MemIndex, PackSummary, Place, places};
use crate::env::lock;
use crate::error::StoreError;
use crate::id::{ObjectKey, PackId};
use crate::pack::DurablePack;
use crate::units::to_u64;

/// Key of an object -> its place, 8 bytes.
const ENTRIES: &str = "entries";
/// Pack id -> its summary, 24 bytes.
const PACKS: &str = "packs";
/// Key of an object whose stored bytes are bad -> nothing.
const DISTRUSTED: &str = "distrusted";

/// Rows of the ledger.
const LEDGER: &str = "ledger";
/// Key of a node or root -> where it and its chunks lie.
const HINTS: &str = "hints";

const FAMILIES: [&str; 5] = [ENTRIES, PACKS, DISTRUSTED, LEDGER, HINTS];
const BATCH_ENTRIES: usize = 1 << 16;
/// Entries of packs that are remembered until they are flushed, 20 bytes each.
const UNFLUSHED_MAX: usize = 1 << 20;

/// An index in a folder of its own.
pub(crate) struct RocksIndex {
    dir: PathBuf,
    /// `None` only while it is being opened again, or if that failed.
    db: RwLock<Option<DB>>,
    /// Where the objects of unflushed packs lie, while the database could only
    /// be opened to read it and lacks them.
    late: RwLock<Option<MemIndex>>,
    /// RocksDB takes no writes after one has failed, until it is opened again.
    stuck: AtomicBool,
    /// What was published since the last flush.
    unflushed: Mutex<Unflushed>,
    /// How often it was opened again.
    generation: AtomicU64,
}

#[derive(Default)]
struct Unflushed {
    packs: Vec<DurablePack>,
    entries: usize,
    /// Packs that were flushed since.
    forgotten: usize,
}

impl std::fmt::Debug for RocksIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RocksIndex").field("dir", &self.dir).finish_non_exhaustive()
    }
}

/// RocksDB tells a full disk only by its text.
fn failed(error: rocksdb::Error) -> StoreError {
    let text = error.into_string();
    if text.contains("No space left on device") {
        let source = std::io::Error::new(std::io::ErrorKind::StorageFull, text);
        StoreError::Io { op: "write", path: "index".to_owned(), source }
    } else {
        StoreError::Index(text)
    }
}

impl RocksIndex {
    /// Opens the index. One that RocksDB refuses is made anew, because the
    /// packs have everything in it.
    pub(crate) fn open(dir: &Path) -> Result<Self, StoreError> {
        let db = match try_open(dir) {
            Err(error) if is_damage(&error) => {
                tracing::warn!(%error, "the index is damaged; building it again");
                std::fs::remove_dir_all(dir).map_err(StoreError::io("remove", "index"))?;
                try_open(dir).map_err(failed)?
            }
            opened => opened.map_err(failed)?,
        };
        tell_copies(&db)?;
        Ok(Self::of(dir, db))
    }

    fn of(dir: &Path, db: DB) -> Self {
        let (stuck, unflushed) = (AtomicBool::new(false), Mutex::default());
        let (dir, generation) = (dir.to_owned(), AtomicU64::new(0));
        let (db, late) = (RwLock::new(Some(db)), RwLock::default());
        Self { dir, db, late, stuck, unflushed, generation }
    }

    /// Opens the index for looking at it, beside an owner that may go on
    /// writing. All files are opened at once, so that it does not matter which
    /// of them the owner removes later.
    pub(crate) fn open_view(dir: &Path) -> Result<Self, StoreError> {
        let mut options = options();
        options.create_if_missing(false);
        options.create_missing_column_families(false);
        options.set_max_open_files(-1);
        let db = DB::open_cf_descriptors_read_only(&options, dir, families(), false);
        Ok(Self::of(dir, db.map_err(failed)?))
    }

    fn reading<T>(&self, work: impl FnOnce(&DB) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let db = self.db.read().unwrap_or_else(PoisonError::into_inner);
        work(db.as_ref().ok_or_else(closed)?)
    }

    fn writing(&self, work: impl Fn(&DB) -> Result<(), StoreError>) -> Result<(), StoreError> {
        if self.stuck.load(Ordering::Acquire) {
            self.open_again()?;
        }
        self.reading(work).inspect_err(|_| self.stuck.store(true, Ordering::Release))
    }

    /// Makes everything so far durable.
    fn flush(&self, db: &DB) -> Result<(), StoreError> {
        // What comes in between is perhaps not seen by the flush.
        let seen = lock(&self.unflushed).end();
        flush(db)?;
        lock(&self.unflushed).forget(seen);
        Ok(())
    }

    /// Publishes a pack and keeps it until it is flushed. Both while the
    /// database is held: it is not opened again in between.
    fn put(
        &self,
        pack: &DurablePack,
        add: impl Fn(&DB) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.writing(|db| {
            add(db)?;
            lock(&self.unflushed).add(pack.clone());
            Ok(())
        })?;
        if lock(&self.unflushed).entries > UNFLUSHED_MAX {
            self.writing(|db| self.flush(db))?;
        }
        Ok(())
    }

    /// Opens the database again after a write failed. If that fails too,
    /// because the disk is still full, it can at least be read.
    fn open_again(&self) -> Result<(), StoreError> {
        let mut db = self.db.write().unwrap_or_else(PoisonError::into_inner);
        if !self.stuck.load(Ordering::Acquire) {
            return Ok(());
        }
        self.generation.fetch_add(1, Ordering::AcqRel);
        // RocksDB's own lock allows only one at a time.
        drop(db.take());
        match try_open(&self.dir) {
            Ok(opened) => {
                let unflushed = lock(&self.unflushed);
                unflushed.packs.iter().try_for_each(|pack| add(&opened, pack))?;
                *db = Some(opened);
                *self.late.write().unwrap_or_else(PoisonError::into_inner) = None;
                self.stuck.store(false, Ordering::Release);
                Ok(())
            }
            Err(error) => {
                let late = MemIndex::default();
                lock(&self.unflushed).packs.iter().try_for_each(|pack| late.publish(pack))?;
                *self.late.write().unwrap_or_else(PoisonError::into_inner) = Some(late);
                *db = open_for_reading(&self.dir).ok();
                Err(failed(error))
            }
        }
    }

    /// What is asked of the packs that only memory has, if there are any. While
    /// the database is held, so that none goes over to it unseen.
    fn late<T: Default>(
        &self,
        ask: impl FnOnce(&MemIndex) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let late = self.late.read().unwrap_or_else(PoisonError::into_inner);
        late.as_ref().map_or_else(|| Ok(T::default()), ask)
    }
}

impl Unflushed {
    fn add(&mut self, pack: DurablePack) {
        self.entries += pack.directory.keys.len();
        self.packs.push(pack);
    }

    /// How many packs were ever added.
    fn end(&self) -> usize {
        self.forgotten + self.packs.len()
    }

    /// Forgets the packs that were added when there had been so many.
    fn forget(&mut self, end: usize) {
        let count = end.saturating_sub(self.forgotten).min(self.packs.len());
        let gone = self.packs.drain(..count);
        self.entries -= gone.map(|pack| pack.directory.keys.len()).sum::<usize>();
        self.forgotten += count;
    }
}

/// Says that every copy from now on is told, in an index that has no pack.
fn tell_copies(db: &DB) -> Result<(), StoreError> {
    let mut batch = WriteBatch::default();
    if db.iterator_cf(family(db, PACKS), IteratorMode::Start).next().is_none() {
        batch.put_cf(family(db, LEDGER), [rows::COPIES_TOLD], []);
    }
    unlogged(db, batch)
}

/// Publishes a pack.
fn add(db: &DB, pack: &DurablePack) -> Result<(), StoreError> {
    add_over(db, pack, places_before(db, pack)?)
}

/// Publishes a pack of which these objects have a place already.
fn add_over(
    db: &DB,
    pack: &DurablePack,
    mut before: HashMap<ObjectKey, Place>,
) -> Result<(), StoreError> {
    let mut batch = WriteBatch::default();
    let mut copies = BTreeSet::new();
    let mut new: Vec<_> = places(pack).collect();
    new.sort_unstable();
    for (key, place) in new {
        if let Some(before) = before.get_mut(&key) {
            // A pack that is added again, because the index may have lost it,
            // must not hide from where its objects moved.
            if *before == place {
                continue;
            }
            copies.insert(((*before).max(place).pack, (*before).min(place).pack));
            if *before > place {
                continue;
            }
            batch.put_cf(family(db, LEDGER), rows::moved(place), before.to_bits().to_le_bytes());
            *before = place;
        }
        batch.put_cf(family(db, ENTRIES), key.0, place.to_bits().to_le_bytes());
    }
    for (younger, older) in copies {
        batch.put_cf(family(db, LEDGER), rows::copy(younger, older), []);
    }
    for key in distrusted(db)?.iter().filter(|key| pack.directory.keys.contains(*key)) {
        batch.delete_cf(family(db, DISTRUSTED), key.0);
    }
    // The mark that the pack is published goes with its entries.
    let summary = encode_summary(&PackSummary::of(pack));
    batch.put_cf(family(db, PACKS), pack.pack.0.to_be_bytes(), summary);
    unlogged(db, batch)
}

fn distrusted(db: &DB) -> Result<Vec<ObjectKey>, StoreError> {
    let all = db.iterator_cf(family(db, DISTRUSTED), IteratorMode::Start);
    all.map(|item| decode_key(&item.map_err(failed)?.0)).collect()
}

fn closed() -> StoreError {
    StoreError::Index("it could not be opened again after a failed write".to_owned())
}

fn family<'d>(db: &'d DB, name: &'static str) -> &'d ColumnFamily {
    db.cf_handle(name).expect("all families are opened together")
}

/// Writes a batch, each key beside the one before of its family. So many keys
/// come in ascending order: out of order, each would walk far through what is
/// not flushed yet.
fn unlogged(db: &DB, batch: WriteBatch) -> Result<(), StoreError> {
    let mut options = WriteOptions::default();
    options.disable_wal(true);
    options.set_memtable_insert_hint_per_batch(true);
    db.write_opt(batch, &options).map_err(failed)
}

/// Makes everything so far durable.
fn flush(db: &DB) -> Result<(), StoreError> {
    let families = FAMILIES.map(|name| family(db, name));
    db.flush_cfs_opt(&families.each_ref().map(|family| &**family), &FlushOptions::default())
        .map_err(failed)
}

fn is_damage(error: &rocksdb::Error) -> bool {
    use rocksdb::ErrorKind;
    matches!(error.kind(), ErrorKind::Corruption | ErrorKind::InvalidArgument | ErrorKind::NotFound)
}

/// Objects of a pack that are in another one already, and where.
fn places_before(db: &DB, pack: &DurablePack) -> Result<HashMap<ObjectKey, Place>, StoreError> {
    let mut before = HashMap::new();
    for keys in pack.directory.keys.chunks(BATCH_ENTRIES) {
        let found =
            db.batched_multi_get_cf(family(db, ENTRIES), keys.iter().map(|key| &key.0), false);
        for (key, value) in keys.iter().zip(found) {
            if let Some(bytes) = value.map_err(failed)? {
                before.insert(*key, decode_place(&bytes)?);
            }
        }
    }
    Ok(before)
}

impl Index for RocksIndex {
    fn get_many(&self, keys: &[ObjectKey]) -> Result<Vec<Option<Place>>, StoreError> {
        self.reading(|db| {
            let bytes = keys.iter().map(|key| &key.0);
            let found = db.batched_multi_get_cf(family(db, ENTRIES), bytes, false);
            let decode = |value: Result<Option<rocksdb::DBPinnableSlice<'_>>, rocksdb::Error>| {
                value.map_err(failed)?.map(|bytes| decode_place(&bytes)).transpose()
            };
            let mut found: Vec<Option<Place>> =
                found.into_iter().map(decode).collect::<Result<_, StoreError>>()?;
            for (place, late) in found.iter_mut().zip(self.late(|late| late.get_many(keys))?) {
                *place = late.max(*place);
            }
            Ok(found)
        })
    }

    fn publish(&self, pack: &DurablePack) -> Result<(), StoreError> {
        self.put(pack, |db| add(db, pack))
    }

    fn publish_new(&self, pack: &DurablePack, generation: u64) -> Result<(), StoreError> {
        // Generations rise where writing begins, before this is asked.
        self.put(pack, |db| match self.generation() == generation {
            true => add_over(db, pack, HashMap::new()),
            false => add(db, pack),
        })
    }

    fn retire(&self, pack: PackId, moves: &[(ObjectKey, Option<Place>)]) -> Result<(), StoreError> {
        self.writing(|db| {
            let mut batch = WriteBatch::default();
            for (key, place) in moves {
                match place {
                    Some(place) => {
                        batch.put_cf(family(db, ENTRIES), key.0, place.to_bits().to_le_bytes());
                    }
                    None => batch.delete_cf(family(db, ENTRIES), key.0),
                }
            }
            batch.delete_cf(family(db, PACKS), pack.0.to_be_bytes());
            for tag in [rows::LIVE, rows::PACK, rows::TWICE] {
                batch.delete_cf(family(db, LEDGER), rows::of_pack(tag, pack));
            }
            let moved = rows::of_pack(rows::MOVED, pack);
            let from = IteratorMode::From(&moved, Direction::Forward);
            for row in db.iterator_cf(family(db, LEDGER), from) {
                let (key, _) = row.map_err(failed)?;
                if !key.starts_with(&moved) {
                    break;
                }
                batch.delete_cf(family(db, LEDGER), key);
            }
            // Flushed, so that no mark outlives the file that it stands for.
            unlogged(db, batch)?;
            self.flush(db)
        })
    }

    fn packs(&self) -> Result<Vec<(PackId, PackSummary)>, StoreError> {
        self.reading(|db| {
            let all = db.iterator_cf(family(db, PACKS), IteratorMode::Start);
            let decoded = all.map(|item| {
                let (key, value) = item.map_err(failed)?;
                decode_pack(&key, &value)
            });
            let mut packs: BTreeMap<PackId, PackSummary> =
                decoded.collect::<Result<_, StoreError>>()?;
            packs.extend(self.late(|late| late.packs())?);
            Ok(packs.into_iter().collect())
        })
    }

    fn clear(&self) -> Result<(), StoreError> {
        // Marks go first: entries without a mark are published again.
        self.writing(|db| {
            let all = [PACKS, ENTRIES, DISTRUSTED, LEDGER, HINTS];
            all.iter().try_for_each(|family| clear(db, family))?;
            lock(&self.unflushed).forget(usize::MAX);
            tell_copies(db)?;
            flush(db)
        })
    }

    fn for_each(
        &self,
        visit: &mut dyn FnMut(ObjectKey, Place) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.reading(|db| {
            for item in db.iterator_cf(family(db, ENTRIES), IteratorMode::Start) {
                let (key, value) = item.map_err(failed)?;
                visit(decode_key(&key)?, decode_place(&value)?)?;
            }
            self.late(|late| late.for_each(visit))
        })
    }

    fn distrust(&self, keys: &[ObjectKey]) -> Result<(), StoreError> {
        self.writing(|db| {
            let mut batch = WriteBatch::default();
            keys.iter().for_each(|key| batch.put_cf(family(db, DISTRUSTED), key.0, []));
            unlogged(db, batch)?;
            self.flush(db)
        })
    }

    fn hints(&self, keys: &[ObjectKey]) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
        self.reading(|db| {
            let keys = keys.iter().map(|key| &key.0);
            let found = db.batched_multi_get_cf(family(db, HINTS), keys, false);
            let found = found.into_iter().map(|value| value.map_err(failed));
            found.map(|value| Ok(value?.map(|bytes| bytes.to_vec()))).collect()
        })
    }

    fn write_hints(&self, hints: &[(ObjectKey, Option<Vec<u8>>)]) -> Result<(), StoreError> {
        self.writing(|db| {
            let mut batch = WriteBatch::default();
            let mut sorted: Vec<_> = hints.iter().collect();
            sorted.sort_by_key(|(key, _)| *key);
            for (key, hint) in sorted {
                match hint {
                    Some(bytes) => batch.put_cf(family(db, HINTS), key.0, bytes),
                    None => batch.delete_cf(family(db, HINTS), key.0),
                }
            }
            unlogged(db, batch)
        })
    }

    fn clear_hints(&self) -> Result<(), StoreError> {
        self.writing(|db| {
            clear(db, HINTS)?;
            flush(db)
        })
    }

    fn hint_totals(&self) -> Result<(u64, u64), StoreError> {
        self.reading(|db| {
            let mut totals = (0, 0);
            for item in db.iterator_cf(family(db, HINTS), IteratorMode::Start) {
                let (key, value) = item.map_err(failed)?;
                totals = (totals.0 + 1, totals.1 + to_u64(key.len() + value.len()));
            }
            Ok(totals)
        })
    }

    fn distrusted(&self) -> Result<Vec<ObjectKey>, StoreError> {
        self.reading(distrusted)
    }

    fn rows(&self, keys: &[RowKey]) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
        self.reading(|db| {
            let found = db.batched_multi_get_cf(family(db, LEDGER), keys, false);
            found.into_iter().map(|row| Ok(row.map_err(failed)?.map(|row| row.to_vec()))).collect()
        })
    }

    fn rows_behind(
        &self,
        prefix: &[u8],
        after: &[u8],
        limit: usize,
    ) -> Result<Vec<(RowKey, Vec<u8>)>, StoreError> {
        self.reading(|db| {
            let from = IteratorMode::From(after.max(prefix), Direction::Forward);
            let mut found = Vec::new();
            for row in db.iterator_cf(family(db, LEDGER), from) {
                let (key, value) = row.map_err(failed)?;
                if !key.starts_with(prefix) || found.len() == limit {
                    break;
                }
                if *key != *after {
                    found.push((key.into_vec(), value.into_vec()));
                }
            }
            Ok(found)
        })
    }

    fn put_rows(&self, generation: u64, rows: &[RowChange]) -> Result<(), StoreError> {
        let went_back = Cell::new(false);
        self.writing(|db| {
            went_back.set(self.generation() != generation);
            if went_back.get() {
                return Ok(());
            }
            let mut batch = WriteBatch::default();
            let mut sorted: Vec<&RowChange> = rows.iter().collect();
            sorted.sort_by_key(|(key, _)| key);
            for (key, value) in sorted {
                match value {
                    Some(value) => batch.put_cf(family(db, LEDGER), key, value),
                    None => batch.delete_cf(family(db, LEDGER), key),
                }
            }
            unlogged(db, batch)
        })?;
        if went_back.get() { Err(StoreError::Ledger) } else { Ok(()) }
    }

    fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }
}

fn clear(db: &DB, name: &'static str) -> Result<(), StoreError> {
    let family = family(db, name);
    loop {
        let mut batch = WriteBatch::default();
        for item in db.iterator_cf(family, IteratorMode::Start).take(BATCH_ENTRIES) {
            batch.delete_cf(family, item.map_err(failed)?.0);
        }
        if batch.is_empty() {
            return Ok(());
        }
        unlogged(db, batch)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::ChunkId;
    use crate::pack::{Directory, EntryNo, FrameKind};

    fn pack(number: u64) -> DurablePack {
        let mut directory = Directory::empty();
        directory.push(FrameKind::Pages, 100, &[ChunkId::of(b"x").key()], &[]);
        DurablePack { pack: PackId(number), directory, file_len: 500 }
    }

    #[test]
    fn only_what_was_there_before_a_flush_is_forgotten_by_it() {
        let mut unflushed = Unflushed::default();
        unflushed.add(pack(1));
        let (one, other) = (unflushed.end(), unflushed.end());
        unflushed.add(pack(2));
        unflushed.forget(one);
        unflushed.forget(other);
        assert_eq!((unflushed.packs.len(), unflushed.entries), (1, 1));
        unflushed.forget(usize::MAX);
        assert_eq!((unflushed.packs.len(), unflushed.entries), (0, 0));
    }

    #[test]
    fn a_pack_that_is_added_again_hides_no_move() {
        let folder = tempfile::tempdir().expect("a folder");
        let index = RocksIndex::open(folder.path()).expect("an index");
        for number in [1, 2, 2] {
            index.publish(&pack(number)).expect("published");
        }
        let place = |number| Place { pack: PackId(number), entry: EntryNo(0) };
        let row = index.rows(&[rows::moved(place(2))]).expect("rows").pop().flatten();
        assert_eq!(row, Some(place(1).to_bits().to_le_bytes().to_vec()));
    }
}
