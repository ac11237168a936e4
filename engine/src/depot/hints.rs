//! The table of hints: readers ask it before the index, many objects at once.
//!
//! Packs are never rewritten and their ids never used again, so a hint is
//! stale exactly if its pack is no longer published. Whoever comes upon that
//! asks the index and keeps the answer. While an object is known to be bad no
//! hint is read or written, because the index may learn of a better copy; so
//! deduplication, marking and checks, which must know what the index knows,
//! never look here at all.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use foldhash::HashMap as FastMap;

use super::hint::{Hint, Spot};
use super::{Depot, LocatorState};
use crate::env::lock;
use crate::error::StoreError;
use crate::id::{NodeId, ObjectKey, PackId};
use crate::tree::{FANOUT, Node};
use crate::units::to_u64;

/// Where the chunks of a leaf lie, as far as that is known.
pub(crate) type Spots = [Option<Spot>; FANOUT];

/// Hints that were found before everything was forgotten are not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HintEpoch(u64);

/// What is known about a leaf.
#[derive(Debug, Clone)]
pub(crate) struct LeafHint {
    pub(crate) own: Option<Spot>,
    pub(crate) chunks: Box<Spots>,
}

impl LeafHint {
    pub(crate) fn unknown() -> Self {
        Self { own: None, chunks: Box::new([None; FANOUT]) }
    }
}

/// A leaf of which more is known than its record said.
#[derive(Debug)]
pub(crate) struct Resolved<'a> {
    pub(crate) leaf: NodeId,
    pub(crate) node: &'a Node,
    pub(crate) patch_of: Option<NodeId>,
    pub(crate) hint: &'a LeafHint,
}

/// Remembers which packs are published, for as long as one look-up takes.
#[derive(Debug, Default)]
pub(crate) struct PublishedPacks {
    lens: FastMap<PackId, Option<u64>>,
    last: Option<(PackId, Option<u64>)>,
}

impl PublishedPacks {
    /// Whether a spot lies in a pack that is published.
    pub(crate) fn have(&mut self, depot: &Depot, at: &Spot) -> bool {
        let len = match self.last {
            Some((pack, len)) if pack == at.pack => len,
            _ => *self
                .lens
                .entry(at.pack)
                .or_insert_with(|| lock(&depot.packs).get(&at.pack).map(|pack| pack.file_len)),
        };
        self.last = Some((at.pack, len));
        len.is_some_and(|len| at.end() <= len)
    }
}

impl Depot {
    /// The epoch in which places are looked up from now on.
    pub(crate) fn hint_epoch(&self) -> HintEpoch {
        HintEpoch(self.hint_epoch.load(Ordering::SeqCst))
    }

    /// The records of objects. One that is damaged or cannot be read is as
    /// good as none.
    pub(super) fn records(&self, keys: &[ObjectKey]) -> Vec<Option<Arc<Hint>>> {
        if self.distrusts_any() {
            return vec![None; keys.len()];
        }
        let mut found: Vec<Option<Arc<Hint>>> = {
            let mut cache = lock(&self.hints);
            keys.iter().map(|key| cache.get(key)).collect()
        };
        let missed: Vec<usize> = (0..keys.len()).filter(|at| found[*at].is_none()).collect();
        if missed.is_empty() {
            return found;
        }
        let missed_keys: Vec<ObjectKey> = missed.iter().map(|at| keys[*at]).collect();
        let epoch = self.hint_epoch();
        match self.index.hints(&missed_keys) {
            Err(error) => tracing::debug!(%error, "hints cannot be read"),
            Ok(records) => {
                for (at, record) in missed.into_iter().zip(records) {
                    let decode = |bytes: Vec<u8>| Hint::decode(&keys[at], &bytes).ok();
                    found[at] = record.and_then(decode).map(Arc::new);
                }
                let new = keys.iter().zip(&found);
                self.cache_records(
                    epoch,
                    new.filter_map(|(key, hint)| Some((key, hint.as_ref()?))),
                );
            }
        }
        found
    }

    fn cache_records<'h>(
        &self,
        epoch: HintEpoch,
        records: impl Iterator<Item = (&'h ObjectKey, &'h Arc<Hint>)>,
    ) {
        // Whoever forgets all raises the epoch before it empties the cache.
        let mut cache = lock(&self.hints);
        if self.hint_epoch() == epoch {
            for (key, hint) in records {
                cache.replace(*key, Arc::clone(hint), 128 + 40 * hint.chunks.len());
            }
        }
    }

    /// Where objects lie that are not chunks.
    pub(crate) fn own_spots(&self, keys: &[ObjectKey]) -> Vec<Option<Spot>> {
        let records = self.records(keys);
        let mut packs = PublishedPacks::default();
        let spots = records.iter().map(|record| record.as_ref()?.own);
        spots.map(|spot| spot.filter(|at| packs.have(self, at))).collect()
    }

    /// Where leaves and their chunks lie, or lay: [`PublishedPacks`] knows.
    pub(crate) fn leaf_hints(&self, leaves: &[ObjectKey]) -> Vec<LeafHint> {
        let records = self.records(leaves);
        let mut bases: Vec<ObjectKey> =
            records.iter().filter_map(|record| record.as_ref()?.base).collect();
        bases.sort_unstable();
        bases.dedup();
        let below: HashMap<ObjectKey, Option<Arc<Hint>>> =
            bases.iter().copied().zip(self.records(&bases)).collect();
        let mut hints: Vec<LeafHint> = Vec::with_capacity(leaves.len());
        for record in records {
            let mut hint = LeafHint::unknown();
            if let Some(record) = record {
                hint.own = record.own;
                let base = record.base.and_then(|base| below.get(&base)?.as_ref());
                let base = base.filter(|base| base.base.is_none());
                let layers = base.into_iter().chain([&record]);
                for (child, spot) in layers.flat_map(|layer| &layer.chunks) {
                    hint.chunks[usize::from(*child)] = Some(*spot);
                }
            }
            hints.push(hint);
        }
        hints
    }

    /// Keeps what was found out. That it cannot be kept is no error: it is
    /// asked for again.
    pub(crate) fn keep_hints(&self, epoch: HintEpoch, hints: Vec<(ObjectKey, Hint)>) {
        if hints.is_empty() || self.distrusts_any() {
            return;
        }
        let records: Vec<_> =
            hints.iter().map(|(key, hint)| (*key, Some(hint.encode(key)))).collect();
        // While all are being forgotten there is no use in keeping some.
        let Ok(writing) = self.hint_writes.try_read() else { return };
        if self.hint_epoch() != epoch {
            return;
        }
        if let Err(error) = self.index.write_hints(&records) {
            tracing::debug!(%error, "hints cannot be written");
        }
        drop(writing);
        let hints: Vec<_> = hints.into_iter().map(|(key, hint)| (key, Arc::new(hint))).collect();
        self.cache_records(epoch, hints.iter().map(|(key, hint)| (key, hint)));
    }

    /// Forgets the records of these objects.
    pub(crate) fn forget_hints(&self, keys: &[ObjectKey]) {
        // Those that are being forgotten need not be removed.
        let Ok(_writing) = self.hint_writes.try_read() else { return };
        let records: Vec<_> = keys.iter().map(|key| (*key, None)).collect();
        if let Err(error) = self.index.write_hints(&records) {
            tracing::debug!(%error, "hints cannot be removed");
        }
        let mut cache = lock(&self.hints);
        keys.iter().for_each(|key| cache.replace(*key, Arc::default(), 128));
    }

    /// Forgets the record of a leaf and what it builds on: they were wrong.
    pub(crate) fn forget_leaf_hint(&self, leaf: &ObjectKey) {
        let base = self.records(&[*leaf]).pop().flatten().and_then(|record| record.base);
        let keys: Vec<ObjectKey> = base.into_iter().chain([*leaf]).collect();
        self.forget_hints(&keys);
    }

    /// Forgets all records: the index may know better ones.
    pub(crate) fn forget_all_hints(&self) -> Result<(), StoreError> {
        let _alone = self.hint_writes.write().unwrap_or_else(PoisonError::into_inner);
        self.hint_epoch.fetch_add(1, Ordering::SeqCst);
        self.index.clear_hints()?;
        lock(&self.hints).clear();
        Ok(())
    }

    /// The records that say what is known about a leaf. What a patched leaf
    /// shares with its base goes into the record of the base.
    pub(crate) fn records_of(&self, resolved: &Resolved<'_>) -> Vec<(ObjectKey, Hint)> {
        let key = resolved.leaf.key();
        let own = resolved.hint.own;
        let known = |has: &dyn Fn(usize) -> bool| -> Vec<(u8, Spot)> {
            let all = (0_u8..).zip(resolved.hint.chunks.iter());
            let all = all.filter(|(child, _)| has(usize::from(*child)));
            all.filter_map(|(child, spot)| Some((child, (*spot)?))).collect()
        };
        let children = resolved.node.children();
        let full = || (key, Hint { own, base: None, chunks: known(&|at| children[at].is_some()) });
        let Some(base) = resolved.patch_of else { return vec![full()] };
        let Ok(base_node) = self.load_node_quietly(&base) else { return vec![full()] };
        let mut record = match self.records(&[base.key()]).pop().flatten() {
            Some(record) if record.base.is_some() => return vec![full()],
            record => record.map(|record| Hint::clone(&record)).unwrap_or_default(),
        };
        let shared = |at: usize| children[at].is_some() && children[at] == base_node.children()[at];
        let differs = |at: usize| children[at].is_some() && !shared(at);
        let own_chunks = known(&differs);
        // What a difference does not tell would be looked up in the base.
        if own_chunks.len() < (0..FANOUT).filter(|at| differs(*at)).count() {
            return vec![full()];
        }
        let delta = (key, Hint { own, base: Some(base.key()), chunks: own_chunks });
        if overlay(&mut record.chunks, &known(&shared)) {
            vec![(base.key(), record), delta]
        } else {
            vec![delta]
        }
    }

    fn load_node_quietly(&self, id: &NodeId) -> Result<Arc<Node>, StoreError> {
        let own = self.own_spots(&[id.key()]).pop().flatten();
        self.node_to_read(id, own).map(|recent| recent.node)
    }

    /// Asks the index, and counts what it was asked for.
    pub(super) fn ask_index(
        &self,
        keys: &[ObjectKey],
    ) -> Result<Vec<Option<crate::index::Place>>, StoreError> {
        self.index_gets.fetch_add(to_u64(keys.len()), std::sync::atomic::Ordering::Relaxed);
        self.index.get_many(keys)
    }

    /// How many objects the index was asked for.
    pub(crate) fn index_gets(&self) -> u64 {
        self.index_gets.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Finds a node or root by the index, and keeps where it lies.
    pub(super) fn renew_own_spot(&self, key: ObjectKey) {
        let epoch = self.hint_epoch();
        let location =
            self.place(key).and_then(|place| place.map_or(Ok(None), |p| self.location(p)));
        let Ok(Some(location)) = location else { return };
        let record = self.records(&[key]).pop().flatten();
        let known = record.map(|record| Hint::clone(&record)).unwrap_or_default();
        self.keep_hints(epoch, vec![(key, Hint { own: Some(location.into()), ..known })]);
    }

    /// Where many objects lie, by the index; what lies in a pack that went
    /// meanwhile counts as unknown.
    pub(super) fn indexed_spots(
        &self,
        locator: &mut LocatorState,
        keys: &[ObjectKey],
    ) -> Result<Vec<Option<Spot>>, StoreError> {
        let places = locator.find(self, keys)?;
        let spot = |place: Option<crate::index::Place>| {
            place.and_then(|place| self.location(place).ok().flatten()).map(Spot::from)
        };
        Ok(places.into_iter().map(spot).collect())
    }
}

/// Puts places over others; says whether that changed anything.
fn overlay(chunks: &mut Vec<(u8, Spot)>, new: &[(u8, Spot)]) -> bool {
    let mut changed = false;
    for (child, spot) in new {
        match chunks.binary_search_by_key(child, |(child, _)| *child) {
            Ok(at) => changed |= std::mem::replace(&mut chunks[at].1, *spot) != *spot,
            Err(at) => {
                chunks.insert(at, (*child, *spot));
                changed = true;
            }
        }
    }
    changed
}
