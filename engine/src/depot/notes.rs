//! Notes: what a session remembers of its leaves until their pack is sealed,
//! because only then is it known where their chunks lie. Then they become
//! hints, for which what the leaves before them had is taken over.

use super::hint::{Hint, Spot};
use super::hints::{LeafHint, PublishedPacks};
use super::{Depot, LocatorState};
use crate::error::StoreError;
use crate::id::{ChunkId, NodeId, ObjectKey, PackId};
use crate::pack::{Directory, DurablePack, EntryNo, FrameKind};
use crate::tree::Node;
use crate::units::{to_u32, to_usize};

/// Leaves of which hints are made together.
const BATCH: usize = 256;

/// A leaf that is about to be stored.
#[derive(Debug)]
struct LeafNote {
    leaf: ObjectKey,
    /// The full leaf that it is stored as a patch of.
    patch_of: Option<ObjectKey>,
    /// The leaf that it was made from.
    before: Option<ObjectKey>,
    /// Its chunks that `patch_of` does not have, or else those that `before`
    /// does not have.
    chunks: Vec<NotedChunk>,
    /// Which children exist.
    present: [u64; 2],
}

#[derive(Debug)]
struct NotedChunk {
    child: u8,
    key: ObjectKey,
    /// `before` has it at the same place.
    is_old: bool,
}

/// The leaves of a session since its last sealed pack.
#[derive(Debug, Default)]
pub(crate) struct LeafNotes {
    notes: Vec<LeafNote>,
}

impl LeafNotes {
    /// Notes a leaf with the one it was made from, and with the one that it is
    /// stored as a patch of.
    pub(crate) fn add(
        &mut self,
        (id, leaf): (NodeId, &Node),
        before: Option<(NodeId, &Node)>,
        patch_of: Option<(NodeId, &Node)>,
    ) {
        let has = |other: Option<(NodeId, &Node)>, child: usize| {
            other.is_some_and(|(_, node)| node.children()[child] == leaf.children()[child])
        };
        let reference = patch_of.or(before);
        let mut note = LeafNote {
            leaf: id.key(),
            patch_of: patch_of.map(|(id, _)| id.key()),
            before: before.map(|(id, _)| id.key()),
            chunks: Vec::new(),
            present: [0; 2],
        };
        for (child, chunk) in (0_u8..).zip(leaf.children()) {
            let Some(chunk) = chunk else { continue };
            let at = usize::from(child);
            note.present[at / 64] |= 1 << (at % 64);
            if !has(reference, at) {
                let key = ChunkId::from_bytes(*chunk).key();
                note.chunks.push(NotedChunk { child, key, is_old: has(before, at) });
            }
        }
        self.notes.push(note);
    }
}

/// Where the chunks of a pack lie, by key.
struct NewChunks<'p> {
    pack: PackId,
    directory: &'p Directory,
    /// Numbers of the objects in frames of pages, by ascending key.
    sorted: Vec<u32>,
}

impl<'p> NewChunks<'p> {
    fn of(pack: PackId, directory: &'p Directory) -> Self {
        let pages = directory.frames.iter().filter(|frame| frame.kind.holds_chunks());
        let mut sorted: Vec<u32> =
            pages.flat_map(|frame| frame.first.0..frame.first.0 + frame.count).collect();
        sorted.sort_unstable_by_key(|entry| directory.keys[to_usize(u64::from(*entry))]);
        Self { pack, directory, sorted }
    }

    fn spot(&self, key: &ObjectKey) -> Option<Spot> {
        let key_of = |entry: &u32| self.directory.keys[to_usize(u64::from(*entry))];
        let at = self.sorted.binary_search_by_key(key, key_of).ok()?;
        let (frame, slot) = self.directory.find(EntryNo(self.sorted[at]))?;
        let (pack, offset, len, count) = (self.pack, frame.offset, frame.len, frame.count);
        Some(Spot { pack, offset, len, count, slot })
    }
}

impl Depot {
    /// Makes hints of a pack that was just published. What fails is left out.
    pub(super) fn hint_published(&self, pack: &DurablePack, notes: &mut LeafNotes) {
        let epoch = self.hint_epoch();
        self.keep_hints(epoch, self.moved_objects(pack));
        let notes = std::mem::take(&mut notes.notes);
        if notes.is_empty() {
            return;
        }
        let new = NewChunks::of(pack.pack, &pack.directory);
        let mut locator = LocatorState::default();
        for batch in notes.chunks(BATCH) {
            match self.hints_of_notes(batch, &new, &mut locator) {
                Ok(hints) => self.keep_hints(epoch, hints),
                Err(error) => tracing::debug!(%error, "no hints for new leaves"),
            }
        }
    }

    /// Records of the nodes and roots in a pack: what was known of their
    /// chunks, and that they themselves lie here now.
    fn moved_objects(&self, pack: &DurablePack) -> Vec<(ObjectKey, Hint)> {
        let mut keys = Vec::new();
        let mut spots = Vec::new();
        for frame in pack.directory.frames.iter().filter(|it| it.kind == FrameKind::Objects) {
            let first = to_usize(u64::from(frame.first.0));
            let own = &pack.directory.keys[first..first + to_usize(u64::from(frame.count))];
            keys.extend_from_slice(own);
            let (pack, offset, len, count) = (pack.pack, frame.offset, frame.len, frame.count);
            spots.extend((0..to_u32(own.len())).map(|slot| Spot {
                pack,
                offset,
                len,
                count,
                slot,
            }));
        }
        let records = self.records(&keys);
        let hints = records.into_iter().zip(spots).map(|(record, own)| {
            let known = record.map(|record| Hint::clone(&record)).unwrap_or_default();
            Hint { own: Some(own), ..known }
        });
        keys.into_iter().zip(hints).collect()
    }

    fn hints_of_notes(
        &self,
        notes: &[LeafNote],
        new: &NewChunks<'_>,
        locator: &mut LocatorState,
    ) -> Result<Vec<(ObjectKey, Hint)>, StoreError> {
        let before: Vec<ObjectKey> = notes.iter().filter_map(|note| note.before).collect();
        let mut before = self.leaf_hints(&before).into_iter();
        let mut packs = PublishedPacks::default();
        let keys: Vec<ObjectKey> = notes.iter().map(|note| note.leaf).collect();
        let own = self.own_spots(&keys);
        let mut hints = Vec::with_capacity(notes.len());
        let mut unknown = Vec::new();
        for (number, (note, own)) in notes.iter().zip(own).enumerate() {
            let mut before = note.before.and_then(|_| before.next());
            for spot in before.iter_mut().flat_map(|before| before.chunks.iter_mut()) {
                *spot = spot.filter(|at| packs.have(self, at));
            }
            let mut chunks = known_chunks(note, new, before.as_ref());
            if note.patch_of.is_none()
                && let Some(before) = &before
            {
                inherit(note, before, &mut chunks);
            }
            let missing = note.chunks.iter().filter(|chunk| !has(&chunks, chunk.child));
            unknown.extend(missing.map(|chunk| (number, chunk.child, chunk.key)));
            hints.push((note.leaf, Hint { own, base: note.patch_of, chunks }));
        }
        let keys: Vec<ObjectKey> = unknown.iter().map(|(_, _, key)| *key).collect();
        let found = self.indexed_spots(locator, &keys)?;
        for ((number, child, _), spot) in unknown.into_iter().zip(found) {
            hints[number].1.chunks.extend(spot.map(|spot| (child, spot)));
        }
        hints.iter_mut().for_each(|(_, hint)| hint.chunks.sort_unstable_by_key(|(at, _)| *at));
        // What a difference does not tell would be looked up in the base.
        let is_whole = |(note, (_, hint)): &(&LeafNote, (ObjectKey, Hint))| {
            note.patch_of.is_none() || hint.chunks.len() == note.chunks.len()
        };
        Ok(notes.iter().zip(hints).filter(is_whole).map(|(_, hint)| hint).collect())
    }
}

/// What is known without the index, by ascending child.
fn known_chunks(
    note: &LeafNote,
    new: &NewChunks<'_>,
    before: Option<&LeafHint>,
) -> Vec<(u8, Spot)> {
    let spot = |chunk: &NotedChunk| {
        let old = before.filter(|_| chunk.is_old);
        let old = || old.and_then(|before| before.chunks[usize::from(chunk.child)]);
        Some((chunk.child, new.spot(&chunk.key).or_else(old)?))
    };
    note.chunks.iter().filter_map(spot).collect()
}

/// Takes over where the chunks lie that the leaf has from the one before.
fn inherit(note: &LeafNote, before: &LeafHint, chunks: &mut Vec<(u8, Spot)>) {
    let changed: Vec<u8> = note.chunks.iter().map(|chunk| chunk.child).collect();
    for (child, spot) in (0_u8..).zip(before.chunks.iter()) {
        let at = usize::from(child);
        let is_present = note.present[at / 64] & (1 << (at % 64)) != 0;
        if is_present && !changed.contains(&child) {
            chunks.extend(spot.map(|spot| (child, spot)));
        }
    }
    chunks.sort_unstable_by_key(|(child, _)| *child);
}

fn has(chunks: &[(u8, Spot)], child: u8) -> bool {
    chunks.binary_search_by_key(&child, |(child, _)| *child).is_ok()
}
