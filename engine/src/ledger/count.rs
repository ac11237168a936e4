//! Counting: the images that came and those that went are walked, as deep as
//! the first or the last reference goes.

use std::collections::HashSet;

use super::rows::{Count, encode_image};
use super::{Ledger, Roots};
use crate::depot::StoredNode;
use crate::error::StoreError;
use crate::id::{ChunkId, NodeId, ObjectKey, SnapshotId};
use crate::index::rows::{IMAGE, RowChange, SNAPSHOT};
use crate::tree::stream::StreamSource;
use crate::tree::walk::check_level;
use crate::tree::{ImageRef, Node, Splitter};

/// Chunks whose references are counted together.
const PENDING_MAX: usize = 1 << 17;

impl Ledger<'_> {
    /// Counts what came, then takes away what went: what both have is not
    /// walked.
    pub(super) fn count_roots(&mut self, roots: &Roots) -> Result<(), StoreError> {
        let new: Vec<ImageRef> = roots.images.difference(&self.roots.images).copied().collect();
        new.iter().try_for_each(|image| self.gain_image(image))?;
        let gone: Vec<ImageRef> = self.roots.images.difference(&roots.images).copied().collect();
        let left: Vec<SnapshotId> =
            self.roots.snapshots.difference(&roots.snapshots).copied().collect();
        let listed: HashSet<SnapshotId> =
            roots.snapshots.difference(&self.roots.snapshots).copied().collect();
        for id in &listed {
            self.list(id, true)?;
        }
        for id in &left {
            self.list(id, false)?;
        }
        gone.iter().try_for_each(|image| self.lose_image(image))?;
        self.count_pending()?;
        let image = |image: &ImageRef, is_there| row(IMAGE, &encode_image(image), is_there);
        self.changes.extend(new.iter().map(|at| image(at, true)));
        self.changes.extend(gone.iter().map(|at| image(at, false)));
        self.changes.extend(listed.iter().map(|id| row(SNAPSHOT, id.as_bytes(), true)));
        self.changes.extend(left.iter().map(|id| row(SNAPSHOT, id.as_bytes(), false)));
        self.roots = roots.clone();
        Ok(())
    }

    fn gain_image(&mut self, image: &ImageRef) -> Result<(), StoreError> {
        if !self.add_refs(image.root.key(), 1)?.referenced {
            return Ok(());
        }
        let root = self.depot.root(image)?;
        root.top.map_or(Ok(()), |top| match root.splitter {
            Splitter::Fixed4K => self.gain_node(&top, root.level()),
            Splitter::FastCdc16K => self.turn_stream_node(&top, 1),
        })
    }

    fn lose_image(&mut self, image: &ImageRef) -> Result<(), StoreError> {
        if !self.add_refs(image.root.key(), -1)?.referenced {
            return Ok(());
        }
        let root = self.depot.root(image)?;
        root.top.map_or(Ok(()), |top| match root.splitter {
            Splitter::Fixed4K => self.lose_node(&top, root.level()),
            Splitter::FastCdc16K => self.turn_stream_node(&top, -1),
        })
    }

    fn gain_node(&mut self, id: &NodeId, level: u8) -> Result<(), StoreError> {
        let turn = self.add_refs(id.key(), 1)?;
        if !turn.referenced {
            return Ok(());
        }
        let stored = self.read_node(id)?;
        check_level(id, &stored.node, level)?;
        if turn.needed {
            self.patched(id.key(), stored.patch_of)?;
        }
        match level.checked_sub(1) {
            None => self.pend(chunks(&stored.node), 1),
            Some(below) => {
                children(&stored.node).try_for_each(|child| self.gain_node(&child, below))
            }
        }
    }

    fn lose_node(&mut self, id: &NodeId, level: u8) -> Result<(), StoreError> {
        let turn = self.add_refs(id.key(), -1)?;
        if !turn.referenced {
            return Ok(());
        }
        let stored = self.read_node(id)?;
        check_level(id, &stored.node, level)?;
        if turn.needed {
            self.patched(id.key(), None)?;
        }
        match level.checked_sub(1) {
            None => self.pend(chunks(&stored.node), -1),
            Some(below) => {
                children(&stored.node).try_for_each(|child| self.lose_node(&child, below))
            }
        }
    }

    /// Adds a reference to a node of a stream, or takes one away. None of them
    /// is a patch.
    fn turn_stream_node(&mut self, id: &NodeId, more: i64) -> Result<(), StoreError> {
        if !self.add_refs(id.key(), more)?.referenced {
            return Ok(());
        }
        self.effort.nodes_read += 1;
        let node = self.depot.load_stream_node(id)?;
        self.pend(node.chunks().map(|chunk| chunk.key()), more)?;
        node.nodes().try_for_each(|child| self.turn_stream_node(&child, more))
    }

    /// Notes which full node a needed node is stored as a patch of.
    pub(super) fn patched(
        &mut self,
        key: ObjectKey,
        patch_of: Option<NodeId>,
    ) -> Result<(), StoreError> {
        let count = self.count(key)?.count;
        if count.patch_of == patch_of {
            return Ok(());
        }
        self.set_count(key, Count { patch_of, ..count })?;
        if let Some(base) = patch_of
            && self.add_bases(base.key(), 1)?.needed
        {
            let form = self.read_node(&base)?.patch_of;
            self.patched(base.key(), form)?;
        }
        if let Some(base) = count.patch_of
            && self.add_bases(base.key(), -1)?.needed
        {
            self.patched(base.key(), None)?;
        }
        Ok(())
    }

    fn read_node(&mut self, id: &NodeId) -> Result<StoredNode, StoreError> {
        self.effort.nodes_read += 1;
        self.depot.stored_node(id)
    }

    /// Puts the chunks of a leaf off, so that they are looked up together.
    fn pend(
        &mut self,
        chunks: impl Iterator<Item = ObjectKey>,
        more: i64,
    ) -> Result<(), StoreError> {
        for chunk in chunks {
            *self.pending.entry(chunk).or_default() += more;
        }
        if self.pending.len() > PENDING_MAX { self.count_pending() } else { Ok(()) }
    }

    fn count_pending(&mut self) -> Result<(), StoreError> {
        let pending = std::mem::take(&mut self.pending);
        let mut pending: Vec<(ObjectKey, i64)> =
            pending.into_iter().filter(|(_, more)| *more != 0).collect();
        // The index finds neighbours faster.
        pending.sort_unstable();
        let keys: Vec<ObjectKey> = pending.iter().map(|(key, _)| *key).collect();
        self.hold(&keys)?;
        for (key, more) in pending {
            self.add_refs(key, more)?;
        }
        self.spill()
    }

    /// Counts a record or an event of the catalog once, or not at all.
    pub(super) fn count_once(&mut self, key: ObjectKey, is_needed: bool) -> Result<(), StoreError> {
        if self.count(key)?.at.is_none() {
            return Ok(());
        }
        let count = if is_needed { Count::ONE } else { Count::default() };
        self.set_count(key, count).map(drop)
    }
}

fn chunks(leaf: &Node) -> impl Iterator<Item = ObjectKey> + '_ {
    leaf.children().iter().flatten().map(|chunk| ChunkId::from_bytes(*chunk).key())
}

fn children(node: &Node) -> impl Iterator<Item = NodeId> + '_ {
    node.children().iter().flatten().copied().map(NodeId::from_bytes)
}

fn row(tag: u8, name: &[u8], is_there: bool) -> RowChange {
    let mut key = vec![tag];
    key.extend_from_slice(name);
    (key, is_there.then(Vec::new))
}
