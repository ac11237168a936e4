//! Opening a store: is it one, is it ours, and what did the last owner leave?

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use super::{Store, reserve};
use crate::catalog::Catalog;
use crate::depot::Depot;
use crate::error::StoreError;
use crate::index::{Index, MemIndex};
use crate::io::{Access, Disk, RealDisk};
use crate::settings::{IndexKind, Settings};
use crate::units::{FORMAT_VERSION, PACKS_DIR, TEMP_DIR, to_usize};

/// Says what the folder is; one line of text.
const FORMAT_PATH: &str = "FORMAT";
const FORMAT_NEW_PATH: &str = "FORMAT.new";
const LOCK_PATH: &str = "LOCK";
pub(super) const INDEX_DIR: &str = "index";
const FORMAT_PREFIX: &str = "coppice store format ";
const FORMAT_FILE_LEN_MAX: u64 = 64;

pub(super) fn open_folder(dir: &Path, settings: &Settings) -> Result<Store, StoreError> {
    settings.check()?;
    let shown = dir.display().to_string();
    std::fs::create_dir_all(dir).map_err(StoreError::io("create", &shown))?;
    let disk = RealDisk::new(dir);
    refuse_foreign(&disk, &shown)?;
    let lock = disk.lock(LOCK_PATH).map_err(StoreError::io("lock", LOCK_PATH))?;
    let lock = lock.ok_or(StoreError::Locked)?;
    prepare(&disk)?;
    let disk: Arc<dyn Disk> = Arc::new(disk);
    let store = reserve::with(&*disk, || {
        let lock = lock.try_clone().map_err(StoreError::io("lock", LOCK_PATH))?;
        finish(Arc::clone(&disk), open_index(dir, settings)?, Some(lock), settings)
    })?;
    reserve::keep(&*disk);
    Ok(store)
}

fn open_index(dir: &Path, settings: &Settings) -> Result<Box<dyn Index>, StoreError> {
    Ok(match settings.index {
        #[cfg(feature = "rocksdb")]
        IndexKind::RocksDb => Box::new(crate::index::RocksIndex::open(&dir.join(INDEX_DIR))?),
        IndexKind::Memory => Box::new(MemIndex::default()),
    })
}

/// Throws the index away and opens the store, which builds it from the packs.
pub(super) fn open_without_index(dir: &Path, settings: &Settings) -> Result<Store, StoreError> {
    let disk = RealDisk::new(dir);
    refuse_foreign(&disk, &dir.display().to_string())?;
    let lock = disk.lock(LOCK_PATH).map_err(StoreError::io("lock", LOCK_PATH))?;
    let lock = lock.ok_or(StoreError::Locked)?;
    // Nothing but our own folder, and only if this is a store.
    prepare(&disk)?;
    match std::fs::remove_dir_all(dir.join(INDEX_DIR)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(StoreError::io("remove", INDEX_DIR)(error));
        }
        _ => {}
    }
    drop(lock);
    open_folder(dir, settings)
}

pub(super) fn open_disk(disk: Arc<dyn Disk>, settings: &Settings) -> Result<Store, StoreError> {
    open_with(disk, Box::new(MemIndex::default()), settings)
}

pub(super) fn open_with(
    disk: Arc<dyn Disk>,
    index: Box<dyn Index>,
    settings: &Settings,
) -> Result<Store, StoreError> {
    settings.check()?;
    refuse_foreign(&*disk, "the disk")?;
    prepare(&*disk)?;
    let store = finish(Arc::clone(&disk), index, None, settings)?;
    reserve::keep(&*disk);
    Ok(store)
}

fn finish(
    disk: Arc<dyn Disk>,
    index: Box<dyn Index>,
    lock: Option<File>,
    settings: &Settings,
) -> Result<Store, StoreError> {
    let depot = Depot::open(disk, index, lock)?;
    depot.chunk_frames().set_budget(settings.frame_cache_len);
    let catalog = Catalog::open(&depot)?;
    Ok(Store { depot: Arc::new(depot), catalog: Arc::new(catalog), settings: settings.clone() })
}

/// A folder that holds files but no format is somebody else's. One with only
/// our first few files is a store whose making was interrupted.
fn refuse_foreign(disk: &dyn Disk, shown: &str) -> Result<(), StoreError> {
    let files = disk.list("").map_err(StoreError::io("list", shown))?;
    let has_format = files.iter().any(|file| file.name == FORMAT_PATH);
    let ours = [FORMAT_NEW_PATH, LOCK_PATH, PACKS_DIR, TEMP_DIR];
    if has_format || files.iter().all(|file| ours.contains(&file.name.as_str())) {
        Ok(())
    } else {
        Err(StoreError::NotAStore(shown.to_owned()))
    }
}

/// Checks that this is a store, and that its format is known.
pub(super) fn check_is_store(disk: &dyn Disk, shown: &str) -> Result<(), StoreError> {
    let files = disk.list("").map_err(StoreError::io("list", shown))?;
    match files.iter().find(|file| file.name == FORMAT_PATH) {
        Some(format) => check_format(disk, format.len),
        None => Err(StoreError::NotAStore(shown.to_owned())),
    }
}

/// Checks the format, or makes the folders and then the format file, so that
/// whatever has a format file has the folders too.
fn prepare(disk: &dyn Disk) -> Result<(), StoreError> {
    let files = disk.list("").map_err(StoreError::io("list", "the store"))?;
    if let Some(format) = files.iter().find(|file| file.name == FORMAT_PATH) {
        return check_format(disk, format.len);
    }
    for dir in [PACKS_DIR, TEMP_DIR] {
        disk.make_dir(dir).map_err(StoreError::io("create", dir))?;
    }
    if files.iter().any(|file| file.name == FORMAT_NEW_PATH) {
        disk.remove(FORMAT_NEW_PATH).map_err(StoreError::io("remove", FORMAT_NEW_PATH))?;
    }
    let file = disk.create(FORMAT_NEW_PATH).map_err(StoreError::io("create", FORMAT_NEW_PATH))?;
    let text = format!("{FORMAT_PREFIX}{FORMAT_VERSION}\n");
    file.write_all_at(0, text.as_bytes()).map_err(StoreError::io("write", FORMAT_NEW_PATH))?;
    file.sync().map_err(StoreError::io("flush", FORMAT_NEW_PATH))?;
    disk.rename(FORMAT_NEW_PATH, FORMAT_PATH).map_err(StoreError::io("rename to", FORMAT_PATH))?;
    disk.sync_dir("").map_err(StoreError::io("flush", "the store"))
}

fn check_format(disk: &dyn Disk, len: u64) -> Result<(), StoreError> {
    let file = disk.open(FORMAT_PATH, Access::Read).map_err(StoreError::io("open", FORMAT_PATH))?;
    let bytes = file
        .read_at(0, to_usize(len.min(FORMAT_FILE_LEN_MAX)))
        .map_err(StoreError::io("read", FORMAT_PATH))?;
    let text = String::from_utf8_lossy(&bytes);
    let version = text.trim_end().strip_prefix(FORMAT_PREFIX).and_then(|rest| rest.parse().ok());
    match version {
        Some(FORMAT_VERSION) => Ok(()),
        Some(found) => Err(StoreError::NewerFormat { found, known: FORMAT_VERSION }),
        None => Err(StoreError::NotAStore(text.chars().take(40).collect())),
    }
}
