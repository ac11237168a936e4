//! How often each object is referenced by what is listed.
//!
//! A node is referenced by trees, or only as the base of a patch: then its
//! bytes are needed but not its children.

use std::collections::{HashMap, HashSet};

use crate::catalog::{Entry, Event};
use crate::depot::{Depot, Locator, StoredNode};
use crate::error::StoreError;
use crate::id::{ChunkId, EventId, NodeId, ObjectKey, PackId, SnapshotId};
use crate::ledger::share::{Share, chunk_len, share_of};
use crate::pack::{FrameKind, ObjectKind, object};
use crate::tree::stream::StreamSource;
use crate::tree::walk::check_level;
use crate::tree::{ImageRef, Node, RootRecord, Splitter};
use crate::units::to_u64;

/// One object that is needed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row {
    /// References from trees and from the catalog.
    pub(super) refs: u32,
    /// Patches that need it as their base.
    pub(super) bases: u32,
    pub(super) share: Share,
    /// Plaintext bytes, if it is a chunk.
    pub(super) chunk_len: u32,
}

/// All objects that are needed.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) rows: HashMap<ObjectKey, Row>,
    /// Needed objects of each pack.
    pub(super) packs: HashMap<PackId, u64>,
    /// The events about each listed snapshot.
    pub(super) events: HashMap<SnapshotId, Vec<ObjectKey>>,
    pub(super) nodes_walked: u64,
}

impl Table {
    /// Counts everything that the snapshots need.
    pub(super) fn count(depot: &Depot, entries: &[Entry]) -> Result<Self, StoreError> {
        let mut table = Self { events: events(depot, entries)?, ..Self::default() };
        let mut locator = Locator::new(depot);
        for entry in entries {
            let mut keys = table.events.get(&entry.id).cloned().unwrap_or_default();
            keys.push(entry.id.key());
            table.gain_many(depot, &mut locator, &keys)?;
            for (_, image) in &entry.record.images {
                table.gain_image(depot, &mut locator, image)?;
            }
        }
        Ok(table)
    }

    fn gain_image(
        &mut self,
        depot: &Depot,
        locator: &mut Locator<'_>,
        image: &ImageRef,
    ) -> Result<(), StoreError> {
        if self.gain_known(image.root.key()) {
            return Ok(());
        }
        self.gain_many(depot, locator, &[image.root.key()])?;
        let root = depot.root(image)?;
        root.top.map_or(Ok(()), |top| match root.splitter {
            Splitter::Fixed4K => self.gain_node(depot, locator, top, root.level()),
            Splitter::FastCdc16K => self.gain_stream_node(depot, locator, top),
        })
    }

    fn gain_stream_node(
        &mut self,
        depot: &Depot,
        locator: &mut Locator<'_>,
        id: NodeId,
    ) -> Result<(), StoreError> {
        if self.gain_known(id.key()) {
            return Ok(());
        }
        self.gain_many(depot, locator, &[id.key()])?;
        let node = depot.load_stream_node(&id)?;
        self.nodes_walked += 1;
        let chunks: Vec<ObjectKey> = node.chunks().map(|chunk| chunk.key()).collect();
        self.gain_many(depot, locator, &chunks)?;
        node.nodes().try_for_each(|child| self.gain_stream_node(depot, locator, child))
    }

    fn gain_node(
        &mut self,
        depot: &Depot,
        locator: &mut Locator<'_>,
        id: NodeId,
        level: u8,
    ) -> Result<(), StoreError> {
        let known = self.rows.get(&id.key()).copied();
        if known.is_some_and(|row| row.refs > 0) {
            self.gain_known(id.key());
            return Ok(());
        }
        self.gain_many(depot, locator, &[id.key()])?;
        let stored = load(depot, &id, level)?;
        self.nodes_walked += 1;
        if known.is_none() {
            self.gain_base(depot, locator, &stored)?;
        }
        let Some(below) = level.checked_sub(1) else {
            return self.gain_many(depot, locator, &chunk_keys(&stored.node));
        };
        children(&stored.node).try_for_each(|child| self.gain_node(depot, locator, child, below))
    }

    /// Counts the bases that a stored node needs.
    fn gain_base(
        &mut self,
        depot: &Depot,
        locator: &mut Locator<'_>,
        stored: &StoredNode,
    ) -> Result<(), StoreError> {
        let Some(base) = stored.patch_of else { return Ok(()) };
        if let Some(row) = self.rows.get_mut(&base.key()) {
            row.bases += 1;
            return Ok(());
        }
        self.gain_many(depot, locator, &[base.key()])?;
        if let Some(row) = self.rows.get_mut(&base.key()) {
            (row.refs, row.bases) = (0, 1);
        }
        self.nodes_walked += 1;
        self.gain_base(depot, locator, &depot.stored_node(&base)?)
    }

    fn gain_known(&mut self, key: ObjectKey) -> bool {
        match self.rows.get_mut(&key) {
            Some(row) => {
                row.refs += 1;
                true
            }
            None => false,
        }
    }

    fn gain_many(
        &mut self,
        depot: &Depot,
        locator: &mut Locator<'_>,
        keys: &[ObjectKey],
    ) -> Result<(), StoreError> {
        let new: Vec<ObjectKey> =
            keys.iter().filter(|key| !self.gain_known(**key)).copied().collect();
        for (key, at) in new.iter().zip(locator.locate(&new)?) {
            // A leaf may name a chunk twice.
            if self.gain_known(*key) {
                continue;
            }
            let at = at.ok_or(StoreError::Missing { what: "object", id: key.to_string() })?;
            let chunk_len = u32::try_from(chunk_len(depot, &at)?).expect("a chunk fits a frame");
            let row = Row { refs: 1, bases: 0, share: share_of(depot, &at)?, chunk_len };
            self.rows.insert(*key, row);
            *self.packs.entry(at.pack).or_default() += 1;
        }
        Ok(())
    }

    /// Plaintext bytes of the chunks that these snapshots reach, and how many
    /// nodes were read to know it.
    pub(super) fn chunks_of(
        &self,
        depot: &Depot,
        entries: &[&Entry],
    ) -> Result<(u64, u64), StoreError> {
        let mut seen = HashSet::new();
        let mut chunks = HashSet::new();
        for (_, image) in entries.iter().flat_map(|entry| &entry.record.images) {
            let root = depot.root(image)?;
            match root.splitter {
                Splitter::Fixed4K => reach_pages(depot, &root, &mut seen, &mut chunks)?,
                Splitter::FastCdc16K => reach_stream(depot, &root, &mut seen, &mut chunks)?,
            }
        }
        let rows = chunks.iter().filter_map(|key| self.rows.get(key));
        Ok((rows.map(|row| u64::from(row.chunk_len)).sum(), to_u64(seen.len())))
    }
}

fn reach_pages(
    depot: &Depot,
    root: &RootRecord,
    seen: &mut HashSet<ObjectKey>,
    chunks: &mut HashSet<ObjectKey>,
) -> Result<(), StoreError> {
    let mut open: Vec<(NodeId, u8)> = root.top.map(|top| (top, root.level())).into_iter().collect();
    while let Some((id, level)) = open.pop() {
        if !seen.insert(id.key()) {
            continue;
        }
        let node = load(depot, &id, level)?.node;
        match level.checked_sub(1) {
            None => chunks.extend(chunk_keys(&node)),
            Some(below) => open.extend(children(&node).map(|child| (child, below))),
        }
    }
    Ok(())
}

fn reach_stream(
    depot: &Depot,
    root: &RootRecord,
    seen: &mut HashSet<ObjectKey>,
    chunks: &mut HashSet<ObjectKey>,
) -> Result<(), StoreError> {
    let mut open: Vec<NodeId> = root.top.into_iter().collect();
    while let Some(id) = open.pop() {
        if seen.insert(id.key()) {
            let node = depot.load_stream_node(&id)?;
            chunks.extend(node.chunks().map(|chunk| chunk.key()));
            open.extend(node.nodes());
        }
    }
    Ok(())
}

/// A node of the expected level.
pub(super) fn load(depot: &Depot, id: &NodeId, level: u8) -> Result<StoredNode, StoreError> {
    let stored = depot.stored_node(id)?;
    check_level(id, &stored.node, level)?;
    Ok(stored)
}

pub(super) fn children(node: &Node) -> impl Iterator<Item = NodeId> + '_ {
    node.children().iter().flatten().copied().map(NodeId::from_bytes)
}

pub(super) fn chunk_keys(leaf: &Node) -> Vec<ObjectKey> {
    leaf.children().iter().flatten().map(|id| ChunkId::from_bytes(*id).key()).collect()
}

/// The events in the packs about listed snapshots.
fn events(
    depot: &Depot,
    entries: &[Entry],
) -> Result<HashMap<SnapshotId, Vec<ObjectKey>>, StoreError> {
    let mut found: HashMap<SnapshotId, Vec<ObjectKey>> =
        entries.iter().map(|entry| (entry.id, Vec::new())).collect();
    for (pack, _) in depot.packs() {
        let directory = depot.directory(pack)?;
        for span in directory.frames.iter().filter(|span| span.kind == FrameKind::Catalog) {
            let frame = depot.frame(pack, span)?;
            let bad = |source| StoreError::Damaged { pack, offset: span.offset, source };
            for object in object::list(&frame).map_err(bad)? {
                if object.kind != ObjectKind::Event {
                    continue;
                }
                let event = Event::decode(object.bytes).map_err(bad)?;
                if let Some(keys) = found.get_mut(&event.snapshot) {
                    keys.push(EventId::of(object.bytes).key());
                }
            }
        }
    }
    // The same event may lie in two packs; it is one object.
    for keys in found.values_mut() {
        keys.sort_unstable();
        keys.dedup();
    }
    Ok(found)
}
