//! The store: everything that callers do, in one place.

#[cfg(test)]
mod garbage;
#[cfg(test)]
mod hinted;
mod open;
mod reserve;
#[cfg(test)]
mod stale;
mod view;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;

use crate::account::{Accounts, StoreBill};
use crate::catalog::{Catalog, Entry};
use crate::check::{self, CheckReport, CheckScope, RepairReport};
use crate::depot::Depot;
use crate::error::StoreError;
use crate::gc::{self, GcOptions, GcPlan, GcReport, GcStep};
use crate::id::{Name, PackId};
use crate::index::SimIndex;
use crate::ingest::{ImportOptions, ImportReport, Progress, Session};
use crate::io::Disk;
use crate::lease::Lease;
use crate::read::{self, Ask, ImageReader, PageMap};
use crate::settings::Settings;
use crate::tree::{self, ImageDiff, ImageRef, RootRecord, Splitter};
use crate::units::{pages_of, to_u64};

/// An open store. Clones share it; it is closed with the last clone, session
/// and reader.
#[derive(Debug, Clone)]
pub struct Store {
    depot: Arc<Depot>,
    catalog: Arc<Catalog>,
    settings: Settings,
}

/// How much a store holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Bytes of all images of all listed snapshots.
    pub logical_bytes: u64,
    /// Plaintext bytes of all chunks.
    pub unique_bytes: u64,
    /// Bytes of all packs, tables included, and of the root log.
    pub stored_bytes: u64,
    /// Chunks.
    pub chunks: u64,
    /// Packs.
    pub packs: u64,
    /// Listed snapshots.
    pub snapshots: u64,
}

/// How readers find things: by hints, and where these are of no use by the
/// index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Lookups {
    /// Objects that the index was asked for since the store was opened.
    pub index_gets: u64,
    /// Hints in the index.
    pub hints: u64,
    /// Their bytes, keys included.
    pub hint_bytes: u64,
    /// Frames of chunks that readers had decoded since then.
    pub frames_decoded: u64,
    /// How often one was decoded already, or just then by somebody else.
    pub frames_shared: u64,
}

impl Store {
    /// Opens the store in a folder, and makes it if the folder is empty or
    /// absent. Only one process at a time can have it open.
    ///
    /// # Errors
    /// If another process has it open, it is of a newer format, the folder
    /// holds something else, or something cannot be read or written.
    pub fn open(dir: &Path, settings: &Settings) -> Result<Self, StoreError> {
        open::open_folder(dir, settings)
    }

    /// Opens an existing store after throwing its index away, so that it is
    /// built again from the packs alone.
    ///
    /// # Errors
    /// As [`Store::open`]; also if the folder does not exist.
    pub fn open_without_index(dir: &Path, settings: &Settings) -> Result<Self, StoreError> {
        open::open_without_index(dir, settings)
    }

    /// Opens an existing store for reading only, as it is at this moment. It
    /// takes no lock and writes nothing, so the store may lie on read-only
    /// media, and another process may own it and go on writing and collecting:
    /// packs are held open, and where they are too many, one that was
    /// collected since is told as [`StoreError::Retired`]. Everything that
    /// would write fails with [`StoreError::ReadOnly`].
    ///
    /// # Errors
    /// If the folder holds no store of a known format, or something cannot be
    /// read.
    pub fn open_read_only(dir: &Path, settings: &Settings) -> Result<Self, StoreError> {
        view::open(dir, settings)
    }

    /// Opens a store on any disk, with the index in memory.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_on(disk: Arc<dyn Disk>, settings: &Settings) -> Result<Self, StoreError> {
        open::open_disk(disk, settings)
    }

    /// As [`Store::open_on`], with a simulated index that lives on.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_with_index(
        disk: Arc<dyn Disk>,
        index: &SimIndex,
        settings: &Settings,
    ) -> Result<Self, StoreError> {
        open::open_with(disk, Box::new(index.clone()), settings)
    }

    /// Begins a session, which becomes one snapshot.
    ///
    /// # Errors
    /// If an earlier flush failed.
    pub fn begin(&self) -> Result<Session, StoreError> {
        if !self.depot.is_read_only() {
            reserve::keep(self.depot.disk());
        }
        Session::new(self.depot.clone(), self.catalog.clone(), self.settings.clone())
    }

    /// Imports a file or stream under a free name.
    ///
    /// # Errors
    /// If the name exists, or something cannot be read or written.
    pub fn import(
        &self,
        input: &File,
        name: Name,
        options: ImportOptions,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<ImportReport, StoreError> {
        self.begin()?.import((input, &[]), name, options, progress)
    }

    /// Imports a qcow2 disk that is written over other files: the first of
    /// `backing`, which may be written over the next, and so on.
    ///
    /// # Errors
    /// As [`Store::import`]; also if there are too few or too many files, or
    /// one twice.
    pub fn import_over(
        &self,
        input: &File,
        backing: &[File],
        name: Name,
        options: ImportOptions,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<ImportReport, StoreError> {
        self.begin()?.import((input, backing), name, options, progress)
    }

    /// Writes an image into a file, whose content is replaced. Holes stay
    /// holes; every chunk is verified.
    ///
    /// # Errors
    /// If something cannot be read or written.
    pub fn export(
        &self,
        image: &ImageRef,
        out: &File,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), StoreError> {
        let root = self.depot.root_to_read(image)?;
        read::export(&self.depot, &root, out, &mut |done| {
            progress(Progress { done, total: Some(root.len), new_bytes: 0 });
        })
    }

    /// Writes an image from its first byte to its last, zeros and all, to
    /// what need not be a file. Every chunk is verified.
    ///
    /// # Errors
    /// If something cannot be read or written.
    pub fn export_to(
        &self,
        image: &ImageRef,
        out: &mut dyn Write,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), StoreError> {
        read::pour(&mut self.reader(image)?, out, &mut |done| {
            progress(Progress { done, total: Some(image.len), new_bytes: 0 });
        })
    }

    /// Bytes of an image that are not in chunks of zeros.
    ///
    /// # Errors
    /// If the image or a node of its tree is not in the store.
    pub fn data_bytes(&self, image: &ImageRef) -> Result<u64, StoreError> {
        tree::data_bytes(&*self.depot, &*self.depot, &self.depot.root(image)?)
    }

    #[cfg(test)]
    pub(crate) fn depot(&self) -> &Arc<Depot> {
        &self.depot
    }

    /// All snapshots, oldest first.
    #[must_use]
    pub fn snapshots(&self) -> Vec<Entry> {
        self.catalog.entries()
    }

    /// The snapshot with this name, or whose id begins with these four or
    /// more digits.
    ///
    /// # Errors
    /// If there is none, or more than one.
    pub fn lookup(&self, name_or_id: &str) -> Result<Entry, StoreError> {
        self.catalog.lookup(name_or_id)
    }

    /// Gives a snapshot another name.
    ///
    /// # Errors
    /// If the snapshot does not exist, the name does, or nothing can be
    /// written.
    pub fn tag(&self, name_or_id: &str, name: Name) -> Result<Entry, StoreError> {
        let id = self.lookup(name_or_id)?.id;
        self.begin()?.commit_tag(id, name)?;
        self.lookup(&id.to_string())
    }

    /// Removes a name; a snapshot that loses its last one leaves the catalog.
    /// With an id, a snapshot that has no name is removed. Its bytes stay
    /// until they are collected.
    ///
    /// # Errors
    /// If there is no such snapshot, an id is given for one that has names,
    /// or nothing can be written.
    pub fn remove(&self, name_or_id: &str) -> Result<Entry, StoreError> {
        let now = self.settings.clock.now_unix_ms();
        self.freeing(|| self.catalog.remove(&self.depot, name_or_id, now))
    }

    /// How much the store holds.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let packs = self.depot.packs();
        let chunks = packs.iter().map(|(_, pack)| u64::from(pack.chunks)).sum::<u64>();
        let unique_bytes = packs.iter().map(|(_, pack)| pack.chunk_bytes).sum();
        let pack_bytes = packs.iter().map(|(_, pack)| pack.file_len).sum::<u64>();
        let entries = self.snapshots();
        Stats {
            logical_bytes: entries.iter().map(|entry| entry.record.logical_bytes()).sum(),
            unique_bytes,
            stored_bytes: pack_bytes + self.catalog.log_len(),
            chunks,
            packs: to_u64(packs.len()),
            snapshots: to_u64(entries.len()),
        }
    }

    /// Keeps images from being collected until the lease is dropped.
    ///
    /// # Errors
    /// If an image is neither leased nor part of a listed snapshot.
    pub fn lease(&self, images: &[ImageRef]) -> Result<Lease, StoreError> {
        Lease::take(&self.depot, &self.catalog, images)
    }

    /// What a collection would do now.
    ///
    /// # Errors
    /// If something that is needed cannot be read.
    pub fn gc_plan(&self, options: GcOptions) -> Result<GcPlan, StoreError> {
        gc::plan(&self.depot, &self.catalog, &self.settings, options)
    }

    /// Frees what neither a listed snapshot nor a lease needs, beside
    /// everything else that goes on.
    ///
    /// # Errors
    /// If something that is needed cannot be read, or nothing can be written.
    pub fn gc(&self, options: GcOptions) -> Result<GcReport, StoreError> {
        self.gc_with(options, &mut |_| {})
    }

    /// As [`Store::gc`], and tells how far it is.
    ///
    /// # Errors
    /// As [`Store::gc`].
    pub fn gc_with(
        &self,
        options: GcOptions,
        step: &mut dyn FnMut(GcStep),
    ) -> Result<GcReport, StoreError> {
        let collect = |options, step: &mut dyn FnMut(GcStep)| {
            self.freeing(|| gc::collect(&self.depot, &self.catalog, &self.settings, options, step))
        };
        let mut report = collect(options, step)?;
        if report.incomplete.is_some() && reserve::give_back_if_short(self.depot.disk()) {
            // What was given back is for making room, not for better places.
            let options = GcOptions { frames_percent_max: u32::MAX, ..options };
            report = report.and(collect(options, step)?);
        }
        reserve::keep(self.depot.disk());
        Ok(report)
    }

    /// Does what must be possible on a full disk.
    fn freeing<T>(&self, work: impl FnMut() -> Result<T, StoreError>) -> Result<T, StoreError> {
        if self.depot.is_read_only() {
            let mut work = work;
            return work();
        }
        reserve::with(self.depot.disk(), work)
    }

    /// What the store holds and where its bytes are, and how many tree nodes
    /// were read to know it: those that came and went since somebody asked
    /// last. What is leased counts as needed.
    ///
    /// # Errors
    /// If something that is needed cannot be read.
    pub fn totals(&self) -> Result<(StoreBill, u64), StoreError> {
        if self.depot.is_read_only() {
            let accounts = self.accounts()?;
            return Ok((accounts.store()?, accounts.nodes_walked()));
        }
        gc::totals(&self.depot, &self.catalog)
    }

    /// Stored bytes that are kept twice, as they were when everything was
    /// counted last, by a collection or for [`Store::totals`]; `None` before
    /// the first time.
    ///
    /// # Errors
    /// If the index cannot be read.
    pub fn kept_twice_when_counted(&self) -> Result<Option<u64>, StoreError> {
        gc::kept_twice_when_counted(&self.depot)
    }

    /// Counts what every listed snapshot references: one walk over all trees.
    ///
    /// # Errors
    /// If a tree or the tables of a pack cannot be read.
    pub fn accounts(&self) -> Result<Accounts, StoreError> {
        let _upkeep = self.depot.upkeep();
        Accounts::count(&self.depot, &self.catalog)
    }

    /// The pages, or bytes of streams, in which two images differ; equal
    /// subtrees are not read.
    ///
    /// # Errors
    /// If an image or a node of its tree is not in the store, or one is a
    /// stream and the other is not.
    pub fn diff(&self, one: &ImageRef, other: &ImageRef) -> Result<ImageDiff, StoreError> {
        let (left, right) = (self.depot.root(one)?, self.depot.root(other)?);
        match (one.splitter, other.splitter) {
            (Splitter::Fixed4K, Splitter::Fixed4K) => tree::diff(&*self.depot, &left, &right),
            (Splitter::FastCdc16K, Splitter::FastCdc16K) => {
                tree::stream::diff(&*self.depot, &left, &right)
            }
            _ => Err(StoreError::Invalid(
                "one of them was cut into pages and the other as a stream: export both and compare the files",
            )),
        }
    }

    /// Reads and checks everything. What is bad is named with the snapshots
    /// that need it, and is no longer used for deduplication.
    ///
    /// # Errors
    /// If the check itself cannot go on; damage is not an error but a finding.
    pub fn check(&self, progress: &mut dyn FnMut(Progress)) -> Result<CheckReport, StoreError> {
        self.check_some(CheckScope::Full, progress)
    }

    /// As [`Store::check`], but reads only some frames of pages.
    ///
    /// # Errors
    /// As [`Store::check`].
    pub fn check_some(
        &self,
        scope: CheckScope,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<CheckReport, StoreError> {
        let _upkeep = self.depot.upkeep();
        self.freeing(|| check::check(&self.depot, &self.catalog, scope, progress))
    }

    /// Checks everything, puts damaged packs aside into `quarantine/` and
    /// keeps what is sound in them, and checks again. What the second report
    /// names is lost, until the same bytes are ingested again.
    ///
    /// # Errors
    /// If the check itself cannot go on, or something cannot be written.
    pub fn repair(
        &self,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(RepairReport, CheckReport), StoreError> {
        let _upkeep = self.depot.upkeep();
        let check = |progress: &mut dyn FnMut(Progress)| {
            check::check(&self.depot, &self.catalog, CheckScope::Full, progress)
        };
        let found = self.freeing(|| check(progress))?;
        let now = self.settings.clock.now_unix_ms();
        let repair = || check::repair(&self.depot, &self.catalog, now, &found);
        let repaired = self.freeing(repair)?;
        let left = self.freeing(|| check(progress))?;
        Ok((repaired, left))
    }

    /// Reads an image at any offset.
    ///
    /// # Errors
    /// If the image is not in the store.
    pub fn reader(&self, image: &ImageRef) -> Result<ImageReader, StoreError> {
        ImageReader::open(self.depot.clone(), image)
    }

    /// Where all pages of an image lie, for the page server.
    ///
    /// # Errors
    /// If the image or one of its chunks is not in the store.
    pub fn page_map(&self, image: &ImageRef) -> Result<PageMap, StoreError> {
        let root = self.depot.root_to_read(image)?;
        self.depot.following(|| self.build_map(&root))
    }

    /// Where all pages of an image lie, with read-only descriptors of those
    /// packs that are not `known`: what has been opened stays readable when
    /// the pack is collected.
    ///
    /// # Errors
    /// As [`Store::page_map`], and if a pack cannot be opened.
    pub fn page_map_with_packs(
        &self,
        image: &ImageRef,
        known: &dyn Fn(PackId) -> bool,
    ) -> Result<(PageMap, Vec<(PackId, File)>), StoreError> {
        let root = self.depot.root_to_read(image)?;
        self.depot.following(|| {
            let map = self.build_map(&root)?;
            let new = map.packs().iter().filter(|pack| !known(**pack));
            let packs = new.map(|pack| Ok((*pack, self.pack_file(*pack)?)));
            let packs = packs.collect::<Result<_, StoreError>>()?;
            Ok((map, packs))
        })
    }

    fn build_map(&self, root: &RootRecord) -> Result<PageMap, StoreError> {
        let range = 0..pages_of(root.len);
        Ok(read::build_map(&self.depot, root, &range, Ask::Hints)?.map)
    }

    /// How readers find things, and what that takes.
    ///
    /// # Errors
    /// If the index cannot be read.
    pub fn lookups(&self) -> Result<Lookups, StoreError> {
        let (hints, hint_bytes) = self.depot.index().hint_totals()?;
        let (frames_decoded, frames_shared) = self.depot.chunk_frames().counts();
        let index_gets = self.depot.index_gets();
        Ok(Lookups { index_gets, hints, hint_bytes, frames_decoded, frames_shared })
    }

    /// Throws all hints away. Reading makes them again.
    ///
    /// # Errors
    /// If the index cannot be written.
    pub fn forget_hints(&self) -> Result<(), StoreError> {
        self.depot.forget_all_hints()
    }

    /// The packs that the store has. Those that a collection replaced are not
    /// among them.
    ///
    /// # Errors
    /// If the index cannot be read.
    pub fn packs(&self) -> Result<BTreeSet<PackId>, StoreError> {
        Ok(self.depot.index().packs()?.into_iter().map(|(pack, _)| pack).collect())
    }

    /// A read-only descriptor of a pack, for the page server.
    ///
    /// # Errors
    /// If the pack cannot be opened.
    pub fn pack_file(&self, pack: PackId) -> Result<File, StoreError> {
        let opened = self.depot.disk().descriptor(&pack.path());
        opened.map_err(|error| self.depot.not_open(pack, error))
    }
}
