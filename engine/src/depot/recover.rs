//! Opening a depot: what a crash left behind is put in order.
//!
//! Unfinished packs are removed, because no root names anything in them.
//! Durable packs that the index has not seen are published. If the index
//! knows a pack that is gone or has another length, the index is thrown away
//! and built again.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, RwLock};

use super::view::files_max;
use super::{Cache, DIRECTORIES_LEN_MAX, Depot, FRAMES_LEN_MAX, HINTS_LEN_MAX};
use super::{ChunkFrames, NODES_LEN_MAX, Pins};
use crate::env::lock;
use crate::error::StoreError;
use crate::id::PackId;
use crate::index::Index;
use crate::io::{Disk, Listed};
use crate::pack::DurablePack;
use crate::units::{PACKS_DIR, QUARANTINE_DIR, TEMP_DIR};

/// What a disk says that has lost the bytes of a file: EIO, EISDIR, EBADMSG,
/// EUCLEAN. Whatever else is wrong may be right at the next try.
const LOST: [i32; 4] = [5, 21, 74, 117];

fn is_unreadable(error: &StoreError) -> bool {
    let StoreError::Io { source, .. } = error else { return false };
    source.raw_os_error().is_some_and(|number| LOST.contains(&number))
}

impl Depot {
    /// Opens the packs on a disk whose folders exist.
    pub(crate) fn open(
        disk: Arc<dyn Disk>,
        index: Box<dyn Index>,
        held: Option<File>,
    ) -> Result<Self, StoreError> {
        let depot = Self::empty(disk, index, held);
        depot.remove_unfinished()?;
        depot.publish_missing()?;
        *lock(&depot.distrusted) = depot.index.distrusted()?.into_iter().collect();
        Ok(depot)
    }

    /// A depot that knows no packs yet.
    pub(super) fn empty(disk: Arc<dyn Disk>, index: Box<dyn Index>, lock: Option<File>) -> Self {
        Self {
            disk,
            _lock: lock,
            index,
            packs: Mutex::default(),
            distrusted: Mutex::default(),
            unreadable: Mutex::default(),
            pins: Pins::default(),
            publishing: Mutex::default(),
            upkeep: Mutex::default(),
            publications: AtomicU64::new(0),
            retirements: AtomicU64::new(0),
            next_pack: AtomicU64::new(1),
            next_temp: AtomicU64::new(1),
            fenced: AtomicBool::new(false),
            read_only: false,
            files: Mutex::new(Cache::new(files_max())),
            directories: Mutex::new(Cache::new(DIRECTORIES_LEN_MAX)),
            frames: Mutex::new(Cache::new(FRAMES_LEN_MAX)),
            chunk_frames: ChunkFrames::new(0),
            nodes: Mutex::new(Cache::new(NODES_LEN_MAX)),
            hints: Mutex::new(Cache::new(HINTS_LEN_MAX)),
            hint_epoch: AtomicU64::new(0),
            hint_writes: RwLock::default(),
            index_gets: AtomicU64::new(0),
        }
    }

    fn remove_unfinished(&self) -> Result<(), StoreError> {
        for file in self.disk.list(TEMP_DIR).map_err(StoreError::io("list", TEMP_DIR))? {
            let path = format!("{TEMP_DIR}/{}", file.name);
            self.disk.remove(&path).map_err(StoreError::io("remove", &path))?;
        }
        Ok(())
    }

    /// The ids of packs that were put aside are not used again either.
    fn reserve_quarantined(&self) -> Result<(), StoreError> {
        let files = match self.disk.list(QUARANTINE_DIR) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            files => files.map_err(StoreError::io("list", QUARANTINE_DIR))?,
        };
        let packs = files.iter().filter_map(|file| PackId::from_file_name(&file.name));
        packs.for_each(|pack| self.reserve_ids_through(pack));
        Ok(())
    }

    /// The pack files that there are, and their lengths.
    pub(super) fn packs_on_disk(&self) -> Result<BTreeMap<PackId, u64>, StoreError> {
        let files = self.disk.list(PACKS_DIR).map_err(StoreError::io("list", PACKS_DIR))?;
        let pack = |file: &Listed| Some((PackId::from_file_name(&file.name)?, file.len));
        Ok(files.iter().filter_map(pack).collect())
    }

    /// Packs that are left out because the disk does not give their bytes, and
    /// why. They are tried again at the next opening.
    pub(crate) fn unreadable(&self) -> BTreeMap<PackId, String> {
        lock(&self.unreadable).clone()
    }

    fn publish_missing(&self) -> Result<(), StoreError> {
        let on_disk = self.packs_on_disk()?;
        let known: HashMap<PackId, u64> = self
            .index
            .packs()?
            .into_iter()
            .map(|(pack, summary)| (pack, summary.file_len))
            .collect();
        let stale = known.iter().any(|(pack, len)| on_disk.get(pack) != Some(len));
        if stale {
            tracing::warn!("the index knows packs that are gone; building it again");
            self.index.clear()?;
        }
        // What the index is told now must not lose its name in a power cut.
        self.disk.sync_dir(PACKS_DIR).map_err(StoreError::io("flush", PACKS_DIR))?;
        self.reserve_quarantined()?;
        for (pack, file_len) in &on_disk {
            self.reserve_ids_through(*pack);
            if stale || !known.contains_key(pack) {
                let directory = match self.directory(*pack) {
                    Err(error) if is_unreadable(&error) => {
                        tracing::error!(%pack, %error, "a pack is left out");
                        lock(&self.unreadable).insert(*pack, error.to_string());
                        continue;
                    }
                    directory => directory?.as_ref().clone(),
                };
                let pack = DurablePack { pack: *pack, directory, file_len: *file_len };
                self.index.publish(&pack)?;
            }
        }
        *lock(&self.packs) = self.index.packs()?.into_iter().collect();
        Ok(())
    }
}
