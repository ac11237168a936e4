//! A depot for reading only, which may belong to another process that goes on
//! writing and collecting.
//!
//! Invariant: every pack that the index names was there when the view was
//! opened. Its files are held open, so what is collected later is still read;
//! where there are more packs than descriptors allow, a pack that is gone is
//! told as [`StoreError::Retired`].

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use rustix::process::{Resource, getrlimit};

use super::{Cache, Depot, FILES_MAX, FILES_MIN};
use crate::env::lock;
use crate::error::StoreError;
use crate::id::PackId;
use crate::index::{Index, PackSummary};
use crate::io::Disk;
use crate::pack::DurablePack;
use crate::units::to_usize;

/// Held pack files at most, whatever the process may open.
const HELD_MAX: u64 = 1 << 16;

impl Depot {
    /// Opens the packs that are there now. `None` if they changed meanwhile
    /// in a way that the index does not know: the caller opens both again.
    pub(crate) fn open_view(
        disk: Arc<dyn Disk>,
        index: Box<dyn Index>,
    ) -> Result<Option<Self>, StoreError> {
        let held_max = held_max();
        let mut depot = Self::empty(disk, index, None);
        depot.read_only = true;
        depot.files = Mutex::new(Cache::new(held_max));
        let on_disk = depot.packs_on_disk()?;
        let known: BTreeMap<PackId, PackSummary> = depot.index.packs()?.into_iter().collect();
        if known.iter().any(|(pack, summary)| on_disk.get(pack) != Some(&summary.file_len)) {
            return Ok(None);
        }
        match depot.take_in(&on_disk, &known, held_max) {
            Err(StoreError::Retired { .. }) => return Ok(None),
            taken => taken?,
        }
        *lock(&depot.packs) = depot.index.packs()?.into_iter().collect();
        *lock(&depot.distrusted) = depot.index.distrusted()?.into_iter().collect();
        Ok(Some(depot))
    }

    /// Opens packs, and tells the index of those that it does not know.
    fn take_in(
        &self,
        on_disk: &BTreeMap<PackId, u64>,
        known: &BTreeMap<PackId, PackSummary>,
        held_max: usize,
    ) -> Result<(), StoreError> {
        for (number, (pack, file_len)) in on_disk.iter().enumerate() {
            if number < held_max {
                self.file(*pack)?;
            }
            if !known.contains_key(pack) {
                let directory = self.directory(*pack)?.as_ref().clone();
                let pack = DurablePack { pack: *pack, directory, file_len: *file_len };
                self.index.publish(&pack)?;
            }
        }
        Ok(())
    }
}

/// Half of what the process may open is left to everything else.
fn held_max() -> usize {
    to_usize((files_limit() / 2).min(HELD_MAX)).max(FILES_MIN)
}

/// Open pack files kept at once, if they can be opened again: an eighth of
/// what the process may open.
pub(super) fn files_max() -> usize {
    to_usize((files_limit() / 8).min(FILES_MAX)).max(FILES_MIN)
}

fn files_limit() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(HELD_MAX)
}
