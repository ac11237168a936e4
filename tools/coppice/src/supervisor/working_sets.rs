//! Working sets of the store's snapshots: noted while machines run for the
//! first time, prefetched when others continue from the same instant.
//!
//! The page server notes what a machine touches first (`Pager::touched`).
//! It is asked once: when noting is over, or when the machine ends before.
//! A page server that is gone takes along what it noted, and that is all.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use coppice_engine::{SnapshotId, Store};
use coppice_runtime::host::Pager;
use coppice_runtime::protocol::{MachineKey, PoolId};

use super::machine::lock;
use super::pools::Pool;
use super::working_set::{ImageNumber, WorkingSet};

/// How often to look for machines of which nothing more is noted.
pub(crate) const TICK: Duration = Duration::from_secs(1);

/// When a machine is asked for, after it began. Noting ends a little earlier.
const NOTED_AFTER: Duration = Duration::from_secs(32);

/// What machines that begin alike have in common.
#[derive(Debug)]
pub(crate) struct Recall {
    snapshot: SnapshotId,
    /// The pool of each image.
    pools: Vec<(PoolId, ImageNumber)>,
    /// What to prefetch; the first machine takes it.
    pages: Mutex<Vec<(PoolId, u64)>>,
}

/// A machine whose touches are noted.
#[derive(Debug)]
struct Noted {
    snapshot: SnapshotId,
    pools: Vec<(PoolId, ImageNumber)>,
    since: Instant,
}

/// All of them.
#[derive(Debug)]
pub(crate) struct WorkingSets {
    folder: PathBuf,
    noted: Mutex<BTreeMap<MachineKey, Noted>>,
    /// Held while a file is changed.
    files: Mutex<()>,
}

impl WorkingSets {
    /// Those in a folder, which need not exist.
    pub(crate) fn new(folder: PathBuf) -> Self {
        Self { folder, noted: Mutex::default(), files: Mutex::default() }
    }

    /// What machines of this snapshot touch first, if it is to be prefetched.
    pub(crate) fn recall(
        &self,
        snapshot: SnapshotId,
        memory: Option<&Arc<Pool>>,
        disks: &[Arc<Pool>],
        prefetch: bool,
    ) -> Recall {
        let memory = memory.map(|pool| (pool.id, 0));
        let disks = disks.iter().map(|pool| pool.id).zip(1..);
        let pools: Vec<(PoolId, ImageNumber)> = memory.into_iter().chain(disks).collect();
        let set = match prefetch {
            true => WorkingSet::load(&self.folder, &snapshot),
            false => WorkingSet::default(),
        };
        let pool = |image| pools.iter().find(|(_, number)| *number == image).map(|(id, _)| *id);
        let pages = set.touches().iter().filter_map(|(image, page)| Some((pool(*image)?, *page)));
        let pages = Mutex::new(pages.collect());
        Recall { snapshot, pools, pages }
    }

    /// Notes what a machine that was just started touches, and has prefetched
    /// what others touched before it.
    pub(crate) fn begin(&self, machine: MachineKey, pager: &Pager, recall: Option<&Recall>) {
        let Some(recall) = recall else { return };
        let (snapshot, pools) = (recall.snapshot, recall.pools.clone());
        let noted = Noted { snapshot, pools, since: Instant::now() };
        lock(&self.noted).insert(machine, noted);
        let pages = std::mem::take(&mut *lock(&recall.pages));
        if !pages.is_empty()
            && let Err(error) = pager.prefetch(machine, pages)
        {
            tracing::debug!(machine = machine.0, %error, "nothing is prefetched");
        }
    }

    /// Keeps what a machine has touched, before it is detached.
    pub(crate) fn collect(&self, machine: MachineKey, pager: Option<&Pager>) {
        let Some(noted) = lock(&self.noted).remove(&machine) else { return };
        let touched = match pager.map(|pager| pager.touched(machine)) {
            Some(Ok(touched)) => touched,
            Some(Err(error)) => {
                return tracing::debug!(machine = machine.0, %error, "its touches are lost");
            }
            None => return,
        };
        if let Err(error) = self.keep(&noted, &touched) {
            tracing::warn!(snapshot = %noted.snapshot, %error, "its working set is not kept");
        }
    }

    /// Keeps what machines have touched of which nothing more is noted.
    pub(crate) fn collect_due(&self, pager: Option<&Pager>) {
        let due: Vec<MachineKey> = (lock(&self.noted).iter())
            .filter(|(_, noted)| noted.since.elapsed() > NOTED_AFTER)
            .map(|(machine, _)| *machine)
            .collect();
        for machine in due {
            self.collect(machine, pager);
        }
    }

    fn keep(&self, noted: &Noted, touched: &[(PoolId, u64)]) -> std::io::Result<()> {
        let image = |id| noted.pools.iter().find(|(pool, _)| *pool == id).map(|(_, image)| *image);
        let _alone = lock(&self.files);
        let mut set = WorkingSet::load(&self.folder, &noted.snapshot);
        let touched = touched.iter().filter_map(|(pool, page)| Some((image(*pool)?, *page)));
        if !set.merge(touched) {
            return Ok(());
        }
        set.save(&self.folder, &noted.snapshot)
    }

    /// Removes those of snapshots that the store does not list.
    pub(crate) fn keep_only(&self, store: &Store) {
        let _alone = lock(&self.files);
        let listed: BTreeSet<String> =
            store.snapshots().iter().map(|entry| entry.id.to_string()).collect();
        for file in std::fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            if !file.file_name().to_str().is_some_and(|name| listed.contains(name))
                && let Err(error) = std::fs::remove_file(file.path())
            {
                tracing::warn!(file = %file.path().display(), %error, "cannot remove it");
            }
        }
    }
}
