//! Opening a store for reading only, beside whoever owns it.
//!
//! The root log is read before the packs are listed and opened: what it names
//! was durable by then. It is read again behind that; if it grew, a snapshot
//! may have been removed and collected in between, and all is read again.

use std::path::Path;
use std::sync::Arc;

use super::Store;
use super::open::{INDEX_DIR, check_is_store};
use crate::catalog::Catalog;
use crate::depot::Depot;
use crate::error::StoreError;
use crate::index::{Index, MemIndex, ViewIndex};
use crate::io::{Disk, RealDisk};
use crate::settings::{IndexKind, Settings};

/// How often the index on disk is tried, and a root log is read that goes on
/// growing; after that, as often, all is taken from the tables of the packs.
const ATTEMPTS: u32 = 8;

pub(super) fn open(dir: &Path, settings: &Settings) -> Result<Store, StoreError> {
    settings.check()?;
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::new(dir));
    check_is_store(&*disk, &dir.display().to_string())?;
    for attempt in 0..2 * ATTEMPTS {
        let hasty = attempt >= ATTEMPTS;
        if let Some((depot, catalog)) = try_open(dir, &disk, settings, hasty)? {
            let (depot, catalog) = (Arc::new(depot), Arc::new(catalog));
            return Ok(Store { depot, catalog, settings: settings.clone() });
        }
    }
    // Its owner is too busy to be looked at.
    Err(StoreError::Locked)
}

/// One look; `None` if the store changed meanwhile.
fn try_open(
    dir: &Path,
    disk: &Arc<dyn Disk>,
    settings: &Settings,
    hasty: bool,
) -> Result<Option<(Depot, Catalog)>, StoreError> {
    let before = Catalog::look(&**disk)?;
    let index = index(dir, settings, hasty);
    let Some(depot) = Depot::open_view(Arc::clone(disk), index)? else { return Ok(None) };
    let catalog = match before {
        Some(before) if hasty || is_same(&before, &**disk)? => before,
        Some(_) => return Ok(None),
        None => Catalog::look_in_packs(&depot)?,
    };
    Ok(Some((depot, catalog)))
}

fn is_same(before: &Catalog, disk: &dyn Disk) -> Result<bool, StoreError> {
    Ok(Catalog::look(disk)?.is_some_and(|after| after.log_len() == before.log_len()))
}

/// The index on disk, if it can be read. Without it, all is taken from the
/// tables of the packs.
fn index(dir: &Path, settings: &Settings, in_memory: bool) -> Box<dyn Index> {
    match settings.index {
        #[cfg(feature = "rocksdb")]
        IndexKind::RocksDb if !in_memory => {
            match crate::index::RocksIndex::open_view(&dir.join(INDEX_DIR)) {
                Ok(index) => Box::new(ViewIndex::over(Box::new(index))),
                Err(error) => {
                    tracing::debug!(%error, "the tables of the packs are read instead");
                    Box::new(MemIndex::default())
                }
            }
        }
        _ => Box::new(MemIndex::default()),
    }
}
