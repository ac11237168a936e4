//! The depot: the packs of a store and their index as one thing.
//!
//! Writing: a pack is sealed, flushed and renamed before the index learns of
//! it. Reading: an object is found through the index, its frame is read and
//! checked, and its own hash is verified before anyone sees it.

mod cache;
mod chunk_frames;
mod copies;
pub(crate) mod hint;
mod hints;
mod locate;
mod nodes;
mod notes;
mod novelty;
mod pins;
mod recover;
mod retire;
mod stream;
mod view;
mod whole;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};

use cache::Cache;
pub(crate) use chunk_frames::ChunkFrames;
pub(crate) use hint::Spot;
pub(crate) use hints::{HintEpoch, LeafHint, PublishedPacks, Resolved};
pub(crate) use locate::{Location, Locator, LocatorState};
pub(crate) use nodes::{RecentNode, StoredNode};
pub(crate) use notes::LeafNotes;
pub(crate) use novelty::Novelty;
pub(crate) use pins::{Pins, SessionPins};
pub(crate) use retire::Disposal;

use crate::env::lock;
use crate::error::StoreError;
use crate::id::{NodeId, ObjectKey, PackId};
use crate::index::{Index, PackSummary, Place};
use crate::io::{Access, Disk, DiskFile};
use crate::pack::{Directory, DurablePack, Frame, FrameSpan, PackWriter, scan};
use crate::units::TEMP_DIR;

/// Pack ids skipped when the root log is lost; there are 2^40.
const LOST_IDS: u64 = 1 << 20;
/// Open pack files kept at once, whatever the process may open.
const FILES_MIN: usize = 128;
/// The same at most.
const FILES_MAX: u64 = 4096;
/// Bytes of directories kept in memory.
const DIRECTORIES_LEN_MAX: usize = 32 << 20;
/// Bytes of nodes kept in memory: the leaves of 4 GiB of images.
const NODES_LEN_MAX: usize = 36 << 20;
/// About what a node takes in memory.
const NODE_LEN: usize = 4400;
/// Bytes of decoded frames of nodes and records kept in memory.
const FRAMES_LEN_MAX: usize = 16 << 20;
/// Bytes of hints kept in memory.
const HINTS_LEN_MAX: usize = 16 << 20;

/// All packs and their index.
#[derive(Debug)]
pub(crate) struct Depot {
    disk: Arc<dyn Disk>,
    /// Held as long as the depot lives; its owner is the only one.
    _lock: Option<File>,
    index: Box<dyn Index>,
    packs: Mutex<BTreeMap<PackId, PackSummary>>,
    distrusted: Mutex<HashSet<ObjectKey>>,
    /// Packs that could not be read when the store was opened, and why.
    unreadable: Mutex<BTreeMap<PackId, String>>,
    pins: Pins,
    /// One pack at a time enters or leaves the index.
    publishing: Mutex<()>,
    /// Held by whoever needs the packs to stay the same ones.
    upkeep: Mutex<()>,
    publications: AtomicU64,
    retirements: AtomicU64,
    next_pack: AtomicU64,
    next_temp: AtomicU64,
    fenced: AtomicBool,
    /// Nothing is ever written: somebody else may own the store.
    read_only: bool,
    files: Mutex<Cache<PackId, Arc<dyn DiskFile>>>,
    directories: Mutex<Cache<PackId, Arc<Directory>>>,
    frames: Mutex<Cache<(PackId, u64), Arc<Frame>>>,
    chunk_frames: ChunkFrames,
    nodes: Mutex<Cache<NodeId, RecentNode>>,
    hints: Mutex<Cache<ObjectKey, Arc<hint::Hint>>>,
    hint_epoch: AtomicU64,
    /// Held for writing by whoever forgets all hints, so that none is written
    /// behind that which was found before. Nobody who reads waits for it.
    hint_writes: RwLock<()>,
    index_gets: AtomicU64,
}

impl Depot {
    /// The disk that everything lies on.
    pub(crate) fn disk(&self) -> &dyn Disk {
        &*self.disk
    }

    /// Whether nothing is ever written.
    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Fails if an earlier flush failed, or nothing may be written at all.
    pub(crate) fn check_fence(&self) -> Result<(), StoreError> {
        if self.read_only {
            return Err(StoreError::ReadOnly);
        }
        if self.fenced.load(Ordering::Acquire) { Err(StoreError::Fenced) } else { Ok(()) }
    }

    /// Refuses writes from now on, because a flush failed: what the disk
    /// holds is unknown until the store is opened again.
    pub(crate) fn fence(&self) {
        tracing::error!("a flush failed; the store takes no writes until it is opened again");
        self.fenced.store(true, Ordering::Release);
    }

    /// Begins a pack in a temporary file.
    pub(crate) fn begin_pack(&self) -> Result<PackWriter, StoreError> {
        self.check_fence()?;
        let number = self.next_temp.fetch_add(1, Ordering::Relaxed);
        PackWriter::create(self.disk(), format!("{TEMP_DIR}/{number}.pack"))
    }

    /// Throws an unfinished pack away.
    pub(crate) fn abandon(&self, path: &str) {
        // A file that stays is removed when the store is opened next.
        if let Err(error) = self.disk.remove(path) {
            tracing::warn!(path, %error, "cannot remove an unfinished pack");
        }
    }

    /// Seals a pack and lets the index know it. The session that it belongs
    /// to relies on it from the beginning. Returns its length in bytes.
    pub(crate) fn publish(
        &self,
        writer: PackWriter,
        session: Option<&SessionPins>,
    ) -> Result<(PackId, u64), StoreError> {
        self.publish_noted(writer, session, None, &mut LeafNotes::default())
    }

    /// As [`Depot::publish`], with notes of new leaves, and with what was
    /// published when the pack's objects were looked for in vain.
    pub(crate) fn publish_noted(
        &self,
        writer: PackWriter,
        session: Option<&SessionPins>,
        novelty: Option<Novelty>,
        notes: &mut LeafNotes,
    ) -> Result<(PackId, u64), StoreError> {
        self.check_fence()?;
        let pack = PackId(self.next_pack.fetch_add(1, Ordering::Relaxed));
        let path = writer.path().to_owned();
        if pack > PackId::LAST {
            self.abandon(&path);
            return Err(StoreError::Invalid(
                "the store has used up its pack ids: export what is needed into a new one",
            ));
        }
        if let Some(session) = session {
            session.own(pack);
        }
        let durable = writer.seal(self.disk(), pack).map_err(|failure| {
            if failure.flush_failed {
                self.fence();
            } else {
                self.abandon(&path);
            }
            failure.error
        })?;
        self.publish_durable(&durable, session, novelty)?;
        self.hint_published(&durable, notes);
        Ok((pack, durable.file_len))
    }

    fn publish_durable(
        &self,
        pack: &DurablePack,
        session: Option<&SessionPins>,
        novelty: Option<Novelty>,
    ) -> Result<(), StoreError> {
        let _publishing = lock(&self.publishing);
        let new = session.zip(novelty).and_then(|(session, novelty)| novelty.still(self, session));
        let published = match new {
            Some(generation) => self.index.publish_new(pack, generation),
            None => self.index.publish(pack),
        };
        if let Err(error) = published {
            // The index may have it nevertheless, so it counts.
            self.publications.fetch_add(1, Ordering::AcqRel);
            return Err(error);
        }
        lock(&self.packs).insert(pack.pack, PackSummary::of(pack));
        session.into_iter().for_each(SessionPins::count_published);
        self.publications.fetch_add(1, Ordering::AcqRel);
        if self.distrusts_any() {
            // What was found while a copy was bad may name that copy. Readers
            // ask what is distrusted, so that is not held meanwhile.
            self.forget_all_hints()?;
            let mut distrusted = lock(&self.distrusted);
            pack.directory.keys.iter().for_each(|key| {
                distrusted.remove(key);
            });
        }
        Ok(())
    }

    /// Makes sure that pack ids begin above one that was used earlier.
    pub(crate) fn reserve_ids_through(&self, pack: PackId) {
        self.next_pack.fetch_max(pack.0 + 1, Ordering::Relaxed);
    }

    /// Skips ids that packs may have had of which nothing is known any more,
    /// because they were collected and the root log is lost.
    pub(crate) fn skip_lost_ids(&self) {
        let highest = self.highest_pack();
        if highest.0 > 0 {
            self.reserve_ids_through(PackId(highest.0 + LOST_IDS));
        }
    }

    /// The highest pack id given out so far.
    pub(crate) fn highest_pack(&self) -> PackId {
        PackId(self.next_pack.load(Ordering::Relaxed).saturating_sub(1))
    }

    /// Counts published packs. An id is given out before its pack is
    /// published, so the highest one does not tell.
    pub(crate) fn publications(&self) -> u64 {
        self.publications.load(Ordering::Acquire)
    }

    /// Takes packs back into use that are still there.
    pub(crate) fn pardon(&self, packs: &BTreeSet<PackId>) {
        let there = lock(&self.packs);
        let left = packs.iter().filter(|pack| there.contains_key(pack)).copied().collect();
        drop(there);
        self.pins.pardon(&left);
    }

    /// All published packs.
    pub(crate) fn packs(&self) -> Vec<(PackId, PackSummary)> {
        lock(&self.packs).iter().map(|(pack, summary)| (*pack, *summary)).collect()
    }

    /// What is in use now.
    pub(crate) fn pins(&self) -> &Pins {
        &self.pins
    }

    /// Keeps packs from being collected until it is dropped; a check and a
    /// collection wait for each other.
    pub(crate) fn upkeep(&self) -> MutexGuard<'_, ()> {
        lock(&self.upkeep)
    }

    /// The index itself, for `check`.
    pub(crate) fn index(&self) -> &dyn Index {
        &*self.index
    }

    /// An open pack file.
    pub(crate) fn file(&self, pack: PackId) -> Result<Arc<dyn DiskFile>, StoreError> {
        if let Some(file) = lock(&self.files).get(&pack) {
            return Ok(file);
        }
        let path = pack.path();
        let file =
            self.disk.open(&path, Access::Read).map_err(|error| self.not_open(pack, error))?;
        let file: Arc<dyn DiskFile> = Arc::from(file);
        lock(&self.files).put(pack, Arc::clone(&file), 1);
        if self.is_gone(pack) {
            lock(&self.files).remove(&pack);
        }
        Ok(file)
    }

    /// Whether a pack is not published (any more). Who retires one first says
    /// so and then forgets what is kept of it; who keeps something asks behind
    /// that, so that nothing is kept of a pack that is gone.
    fn is_gone(&self, pack: PackId) -> bool {
        !self.read_only && !lock(&self.packs).contains_key(&pack)
    }

    /// A pack that was retired in the meantime is told from one that is lost.
    pub(crate) fn not_open(&self, pack: PackId, error: std::io::Error) -> StoreError {
        let gone = error.kind() == std::io::ErrorKind::NotFound;
        if gone && (self.read_only || !lock(&self.packs).contains_key(&pack)) {
            StoreError::Retired { pack }
        } else {
            StoreError::io("open", &pack.path())(error)
        }
    }

    /// What a pack holds.
    pub(crate) fn directory(&self, pack: PackId) -> Result<Arc<Directory>, StoreError> {
        if let Some(directory) = lock(&self.directories).get(&pack) {
            return Ok(directory);
        }
        let listing = scan::list(&*self.file(pack)?, pack)?;
        if let Some(damage) = listing.damage {
            tracing::warn!(%pack, %damage, "the tables of a pack are damaged; its frames were walked");
        }
        let directory = Arc::new(listing.directory);
        lock(&self.directories).put(pack, Arc::clone(&directory), directory.memory_len());
        if self.is_gone(pack) {
            lock(&self.directories).remove(&pack);
        }
        Ok(directory)
    }

    /// A checked frame, from memory if it was read lately.
    pub(crate) fn frame(&self, pack: PackId, span: &FrameSpan) -> Result<Arc<Frame>, StoreError> {
        if let Some(frame) = lock(&self.frames).get(&(pack, span.offset)) {
            return Ok(frame);
        }
        let frame = Arc::new(scan::read_frame(&*self.file(pack)?, pack, span)?);
        lock(&self.frames).put((pack, span.offset), Arc::clone(&frame), frame.plain.len());
        Ok(frame)
    }

    /// Decoded frames of chunks.
    pub(crate) fn chunk_frames(&self) -> &ChunkFrames {
        &self.chunk_frames
    }

    /// Forgets decoded frames, so that the next read goes to the disk.
    pub(crate) fn forget_cached(&self) {
        lock(&self.frames).clear();
        self.chunk_frames.clear();
        lock(&self.directories).clear();
        lock(&self.nodes).clear();
        lock(&self.hints).clear();
    }

    /// Where one object lies.
    pub(crate) fn place(&self, key: ObjectKey) -> Result<Option<Place>, StoreError> {
        Ok(self.ask_index(&[key])?.first().copied().flatten())
    }

    /// Stops using the stored bytes of these objects for deduplication, so
    /// that ingesting the same bytes again heals them.
    pub(crate) fn distrust(&self, keys: &[ObjectKey]) -> Result<(), StoreError> {
        let publishing = lock(&self.publishing);
        self.index.distrust(keys)?;
        lock(&self.distrusted).extend(keys);
        drop(publishing);
        self.forget_all_hints()
    }

    /// Which of these objects must not be reused.
    pub(crate) fn is_distrusted(&self, key: &ObjectKey) -> bool {
        lock(&self.distrusted).contains(key)
    }

    /// Whether any object must not be reused.
    pub(crate) fn distrusts_any(&self) -> bool {
        !lock(&self.distrusted).is_empty()
    }
}
