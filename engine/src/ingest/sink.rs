//! Where a session's new objects go: deduplicated, framed, and handed to the
//! packer, which compresses and writes them.
//!
//! Memory is bounded: what is remembered about a pack ends when the pack is
//! published, and at most one is being published while the next one fills.

mod pieces;

use std::collections::HashSet;
use std::sync::Arc;

use self::pieces::PieceBuilder;
use super::appender::failed_before;
use super::frames::FrameBuilder;
use super::packer::Packer;
use crate::chunk::Page;
use crate::depot::{Depot, LeafNotes, LocatorState, Novelty, SessionPins};
use crate::error::{ErrorKind, StoreError};
use crate::id::{ChunkId, NodeId, ObjectKey};
use crate::pack::{FrameKind, ObjectKind};
use crate::settings::Settings;
use crate::tree::patch::Patch;
use crate::tree::{ImageRef, Node, NodeSink, NodeSource, RootRecord};
use crate::units::{PAGE_LEN, to_u64};

/// What a session has added so far.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Totals {
    pub(super) new_bytes: u64,
    pub(super) stored_bytes: u64,
}

/// The writing half of a session.
#[derive(Debug)]
pub(super) struct Sink {
    depot: Arc<Depot>,
    packer: Packer,
    /// Objects in the open pack and in frames that wait for it.
    unpublished: HashSet<ObjectKey>,
    /// Objects in the pack that is being published.
    publishing: HashSet<ObjectKey>,
    pages: FrameBuilder,
    pieces: PieceBuilder,
    objects: FrameBuilder,
    catalog: FrameBuilder,
    locator: LocatorState,
    notes: LeafNotes,
    /// As of before the first look-up for the open pack; none once the session
    /// stores what the index has already.
    novelty: Option<Novelty>,
    /// As of before the last look-up.
    looked: Novelty,
    pins: Arc<SessionPins>,
    packs_ended: u64,
    /// Images that this session completed.
    made: HashSet<ImageRef>,
    /// Something that was given to be written is not written: nothing of this
    /// session can be told whole any more.
    is_broken: bool,
    pub(super) totals: Totals,
}

impl Sink {
    pub(super) fn new(depot: Arc<Depot>, settings: Settings) -> Self {
        let builder = |kind| FrameBuilder::new(kind, settings.frame_len_max);
        let pins = Arc::new(SessionPins::begin(depot.clone()));
        let looked = Novelty::begin(&depot, &pins);
        Self {
            novelty: Some(looked),
            looked,
            made: HashSet::new(),
            packs_ended: 0,
            is_broken: false,
            unpublished: HashSet::new(),
            publishing: HashSet::new(),
            pages: builder(FrameKind::Pages),
            pieces: PieceBuilder::new(settings.frame_len_max),
            objects: builder(FrameKind::Objects),
            catalog: builder(FrameKind::Catalog),
            locator: LocatorState::default(),
            notes: LeafNotes::default(),
            totals: Totals::default(),
            packer: Packer::new(depot.clone(), pins.clone(), settings),
            depot,
            pins,
        }
    }

    pub(super) fn depot(&self) -> &Arc<Depot> {
        &self.depot
    }

    /// Remembers that a write failed. Whoever told the session to write may not
    /// have listened, but must not be told that all is well later.
    pub(super) fn note<T>(&mut self, outcome: Result<T, StoreError>) -> Result<T, StoreError> {
        self.is_broken |= outcome.is_err();
        outcome
    }

    /// Refuses to complete anything after a write failed.
    fn refuse_broken(&self) -> Result<(), StoreError> {
        if self.is_broken { Err(failed_before()) } else { Ok(()) }
    }

    /// Whether this session stored the object and it is in no index yet.
    fn is_unpublished(&self, key: &ObjectKey) -> bool {
        self.unpublished.contains(key) || self.publishing.contains(key)
    }

    /// Which of these objects the store does not have yet.
    fn missing(&mut self, keys: &[ObjectKey]) -> Result<Vec<bool>, StoreError> {
        let doubt = self.depot.distrusts_any();
        self.looked = Novelty::begin(&self.depot, &self.pins);
        let unknown: Vec<ObjectKey> =
            keys.iter().filter(|key| !self.is_unpublished(key)).copied().collect();
        let mut places = self.locator.find(&self.depot, &unknown)?;
        let found = places.iter().flatten().count();
        self.pins.claim(&mut places);
        if doubt || places.iter().flatten().count() < found {
            self.novelty = None;
        }
        let mut places = places.into_iter();
        let mut answer = Vec::with_capacity(keys.len());
        for key in keys {
            let missing = if self.is_unpublished(key) {
                false
            } else {
                let place = places.next().flatten();
                place.is_none() || (doubt && self.depot.is_distrusted(key))
            };
            answer.push(missing);
        }
        Ok(answer)
    }

    fn is_missing(&mut self, key: ObjectKey) -> Result<bool, StoreError> {
        Ok(self.missing(&[key])?.first().copied().unwrap_or(true))
    }

    /// Whether a chunk that the base has at the same place must be looked at
    /// nevertheless.
    pub(super) fn doubts(&self, chunk: &ChunkId) -> bool {
        self.depot.distrusts_any() && self.depot.is_distrusted(&chunk.key())
    }

    /// Stores the chunks that the store does not have yet.
    pub(super) fn put_pages(&mut self, pages: &[(ChunkId, &Page)]) -> Result<(), StoreError> {
        let keys: Vec<ObjectKey> = pages.iter().map(|(id, _)| id.key()).collect();
        self.put_missing(&keys, &mut |sink, at| {
            sink.pages.put_page(keys[at], pages[at].1);
            sink.totals.new_bytes += to_u64(PAGE_LEN);
            if sink.pages.full_count() > 0 { sink.pack_chunks() } else { Ok(()) }
        })
    }

    /// Puts those objects that the store does not have yet, by their numbers.
    /// After a pack ended the others are looked for again: one that was given
    /// twice may lie in that pack, and must not be stored once more.
    fn put_missing(
        &mut self,
        keys: &[ObjectKey],
        put: &mut dyn FnMut(&mut Self, usize) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let mut at = 0;
        while at < keys.len() {
            let missing = self.missing(&keys[at..])?;
            let ended = self.packs_ended;
            for missing in missing {
                if missing && self.unpublished.insert(keys[at]) {
                    put(self, at)?;
                }
                at += 1;
                if self.packs_ended != ended {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Ends the frame of pages, so that images do not share frames.
    pub(super) fn end_pages(&mut self) {
        self.pages.end_frame();
    }

    fn pack_chunks(&mut self) -> Result<(), StoreError> {
        let pieces = self.pieces.take_full();
        self.pages.take_full().into_iter().chain(pieces).try_for_each(|f| self.packer.put(f))?;
        if self.packer.is_full() { self.end_pack() } else { Ok(()) }
    }

    /// Objects wait for the end of the pack, so that they lie together,
    /// unless there are very many beside few pages.
    fn pack_objects(&mut self) -> Result<(), StoreError> {
        if self.objects.full_count() < self.packer.waiting_frames() {
            return Ok(());
        }
        self.objects.take_full().into_iter().try_for_each(|frame| self.packer.put(frame))?;
        if self.packer.is_full() { self.end_pack() } else { Ok(()) }
    }

    /// Ends the open pack; it is published while the next one fills.
    fn end_pack(&mut self) -> Result<(), StoreError> {
        for builder in [&mut self.pages, &mut self.objects, &mut self.catalog] {
            builder.end_frame();
        }
        self.pieces.end_frame();
        let mut frames = self.pages.take_full();
        frames.extend(self.pieces.take_full());
        frames.extend(self.objects.take_full());
        frames.extend(self.catalog.take_full());
        frames.into_iter().try_for_each(|frame| self.packer.put(frame))?;
        self.packer.end_pack(std::mem::take(&mut self.notes), self.novelty)?;
        self.packs_ended += 1;
        // Objects of the last look-up may lie on either side of this end.
        self.novelty = self.novelty.map(|_| self.looked);
        self.totals.stored_bytes += self.packer.wait_sealed(1)?;
        self.publishing = std::mem::take(&mut self.unpublished);
        Ok(())
    }

    /// Stores the root of an image.
    pub(super) fn put_root(&mut self, root: &RootRecord) -> Result<(), StoreError> {
        self.refuse_broken()?;
        let bytes = root.encode();
        let key = root.image().root.key();
        self.made.insert(root.image());
        if self.is_missing(key)? && self.unpublished.insert(key) {
            self.objects.put_object(key, ObjectKind::Root, &bytes);
        }
        Ok(())
    }

    /// Stores a record of the catalog.
    pub(super) fn put_catalog(
        &mut self,
        key: ObjectKey,
        kind: ObjectKind,
        bytes: &[u8],
    ) -> Result<(), StoreError> {
        if self.is_missing(key)? && self.unpublished.insert(key) {
            self.catalog.put_object(key, kind, bytes);
        }
        Ok(())
    }

    /// Whether this session made the image.
    pub(super) fn made(&self, image: &ImageRef) -> bool {
        self.made.contains(image)
    }

    /// Makes everything so far durable and known to the index.
    pub(super) fn seal(&mut self) -> Result<(), StoreError> {
        self.refuse_broken()?;
        let ended = self.end_pack();
        self.note(ended)?;
        self.totals.stored_bytes += self.packer.wait_sealed(0)?;
        self.publishing.clear();
        Ok(())
    }

    /// Whether a node that was found can be read, and goes on being so: what a
    /// patch is based on is relied on too. A dead node may have lost its base.
    fn is_readable(&mut self, id: NodeId) -> Result<bool, StoreError> {
        let mut next = Some(id);
        while let Some(node) = next {
            if self.is_unpublished(&node.key()) {
                return Ok(true);
            }
            if self.is_missing(node.key())? {
                return Ok(false);
            }
            next = match self.depot.stored_node(&node) {
                Ok(stored) => stored.patch_of,
                Err(error) if error.kind() == ErrorKind::Corrupt => return Ok(false),
                Err(error) => return Err(error),
            };
        }
        Ok(true)
    }

    /// A patch on the base, if that is small enough and the full node is
    /// there, and stays. How the base is stored may have changed since it was
    /// remembered, so the full node is relied on in its own right.
    fn patch(
        &mut self,
        id: NodeId,
        node: &Node,
        base: NodeId,
    ) -> Result<Option<Patch>, StoreError> {
        let recent = self.depot.recent_node(&base)?;
        let (full_id, full) = match recent.patch_of {
            None => (base, recent.node),
            // The base may be stored otherwise by now, and this one be gone.
            Some(full) => match self.depot.load_node(&full) {
                Err(error) if error.kind() == ErrorKind::Corrupt => return Ok(None),
                node => (full, node?),
            },
        };
        let patch = Patch::between((full_id, &full), (id, node));
        Ok(if patch.is_some() && self.is_readable(full_id)? { patch } else { None })
    }
}

impl Sink {
    /// Remembers of a leaf what becomes a hint when its pack is sealed.
    fn note_leaf(
        &mut self,
        id: NodeId,
        leaf: &Node,
        before: Option<NodeId>,
        patch_of: Option<NodeId>,
    ) -> Result<(), StoreError> {
        if leaf.level > 0 {
            return Ok(());
        }
        let load = |id: Option<NodeId>| {
            id.map(|id| Ok::<_, StoreError>((id, self.depot.load_node(&id)?))).transpose()
        };
        let (before, full) = match (load(before), load(patch_of)) {
            (Ok(before), Ok(full)) => (before, full),
            // A leaf without a note gets its hint when it is read.
            (Err(error), _) | (_, Err(error)) if error.kind() == ErrorKind::Corrupt => {
                return Ok(());
            }
            (before, full) => (before?, full?),
        };
        let before = before.as_ref().map(|(id, node)| (*id, &**node));
        let full = full.as_ref().map(|(id, node)| (*id, &**node));
        self.notes.add((id, leaf), before, full);
        Ok(())
    }
}

impl NodeSource for Sink {
    fn load_node(&self, id: &NodeId) -> Result<Arc<Node>, StoreError> {
        self.depot.load_node(id)
    }
}

impl NodeSink for Sink {
    fn store_node(
        &mut self,
        id: NodeId,
        node: &Node,
        base: Option<NodeId>,
    ) -> Result<(), StoreError> {
        let key = id.key();
        if !self.is_missing(key)? {
            if self.is_readable(id)? {
                return Ok(());
            }
            self.novelty = None;
        }
        let patch = base.map_or(Ok(None), |base| self.patch(id, node, base))?;
        let patch = patch.map(|patch| (patch.base, patch.encode()));
        // Patches on half-empty nodes may be longer than the node.
        let full_len = 20 + 32 * node.children().iter().flatten().count();
        let patch = patch.filter(|(_, bytes)| bytes.len() < full_len);
        self.depot.remember(id, node, patch.as_ref().map(|(full, _)| *full));
        self.note_leaf(id, node, base, patch.as_ref().map(|(full, _)| *full))?;
        let (kind, bytes) = match patch {
            Some((_, bytes)) => (ObjectKind::NodePatch, bytes),
            None => (ObjectKind::Node, node.encode()),
        };
        if self.unpublished.insert(key) {
            self.objects.put_object(key, kind, &bytes);
        }
        self.pack_objects()
    }
}
