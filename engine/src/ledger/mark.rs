//! The mark: one bit for each object of each pack that somebody needs, set
//! where the index finds the object. It reads every node of the store; the
//! ledger must say the same.

use std::collections::HashSet;

use super::{Places, Roots};
use crate::catalog::Event;
use crate::depot::Depot;
use crate::error::StoreError;
use crate::id::{ChunkId, NodeId, ObjectKey, SnapshotId};
use crate::index::Place;
use crate::pack::{FrameKind, ObjectKind, object};
use crate::tree::stream::StreamSource;
use crate::tree::{ImageRef, Node, Splitter};
use crate::units::to_usize;

struct Marker<'d> {
    depot: &'d Depot,
    needed: Places,
    /// Nodes whose children were followed; a node that is only the base of a
    /// patch is needed without them.
    followed: Places,
}

/// Marks everything that the roots reach.
pub(crate) fn mark(depot: &Depot, roots: &Roots) -> Result<Places, StoreError> {
    let mut marker = Marker { depot, needed: Places::default(), followed: Places::default() };
    for image in &roots.images {
        marker.image(image)?;
    }
    marker.catalog(&roots.snapshots)?;
    Ok(marker.needed)
}

impl Marker<'_> {
    fn need(&mut self, key: ObjectKey) -> Result<Option<Place>, StoreError> {
        let place = self.depot.place(key)?;
        if let Some(place) = place {
            self.needed.insert(place);
        }
        Ok(place)
    }

    fn image(&mut self, image: &ImageRef) -> Result<(), StoreError> {
        self.need(image.root.key())?;
        let root = self.depot.root(image)?;
        match (root.top, root.splitter) {
            (Some(top), Splitter::Fixed4K) => self.node(&top),
            (Some(top), Splitter::FastCdc16K) => self.stream_node(&top),
            (None, _) => Ok(()),
        }
    }

    fn stream_node(&mut self, id: &NodeId) -> Result<(), StoreError> {
        if let Some(place) = self.need(id.key())?
            && !self.followed.insert(place)
        {
            return Ok(());
        }
        let node = self.depot.load_stream_node(id)?;
        let keys: Vec<ObjectKey> = node.chunks().map(|chunk| chunk.key()).collect();
        for place in self.depot.index().get_many(&keys)?.into_iter().flatten() {
            self.needed.insert(place);
        }
        node.nodes().try_for_each(|child| self.stream_node(&child))
    }

    fn node(&mut self, id: &NodeId) -> Result<(), StoreError> {
        if let Some(place) = self.need(id.key())?
            && !self.followed.insert(place)
        {
            return Ok(());
        }
        let stored = self.depot.stored_node(id)?;
        let mut base = stored.patch_of;
        while let Some(full) = base {
            self.need(full.key())?;
            base = self.depot.stored_node(&full)?.patch_of;
        }
        self.children(&stored.node)
    }

    fn children(&mut self, node: &Node) -> Result<(), StoreError> {
        let children = node.children().iter().flatten();
        if node.level > 0 {
            return children
                .copied()
                .map(NodeId::from_bytes)
                .try_for_each(|child| self.node(&child));
        }
        let keys: Vec<ObjectKey> =
            children.map(|child| ChunkId::from_bytes(*child).key()).collect();
        for place in self.depot.index().get_many(&keys)?.into_iter().flatten() {
            self.needed.insert(place);
        }
        Ok(())
    }

    /// The records of listed snapshots, and what happened to them.
    fn catalog(&mut self, listed: &HashSet<SnapshotId>) -> Result<(), StoreError> {
        for id in listed {
            self.need(id.key())?;
        }
        for (pack, _) in self.depot.packs() {
            let directory = self.depot.directory(pack)?;
            for span in directory.frames.iter().filter(|span| span.kind == FrameKind::Catalog) {
                let frame = self.depot.frame(pack, span)?;
                let damaged = |source| StoreError::Damaged { pack, offset: span.offset, source };
                for (object, slot) in object::list(&frame).map_err(damaged)?.iter().zip(0..) {
                    if object.kind != ObjectKind::Event {
                        continue;
                    }
                    let event = Event::decode(object.bytes).map_err(damaged)?;
                    if listed.contains(&event.snapshot) {
                        let first = to_usize(u64::from(span.first.0));
                        self.need(directory.keys[first + slot])?;
                    }
                }
            }
        }
        Ok(())
    }
}
