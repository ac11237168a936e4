//! The third pass: everything that a snapshot needs is there and sound.

use std::collections::HashSet;

use super::report::Findings;
use crate::catalog::Entry;
use crate::depot::{Depot, Locator};
use crate::error::{ErrorKind, StoreError};
use crate::id::{ChunkId, NodeId, ObjectKey};
use crate::tree::stream::{self, Seat};
use crate::tree::walk::check_level;
use crate::tree::{ImageRef, Node, NodeSource, RootRecord, Splitter};

struct Walker<'d, 'f> {
    depot: &'d Depot,
    locator: Locator<'d>,
    findings: &'f mut Findings,
    /// Nodes under which everything is sound; they are shared by many trees.
    sound: HashSet<NodeId>,
    /// The same for nodes of streams that are not the last of their level, with
    /// level and length, which their parents repeat.
    sound_streams: HashSet<(NodeId, u8, u64)>,
}

/// Follows every image of every snapshot.
pub(super) fn check_trees(
    depot: &Depot,
    entries: &[Entry],
    findings: &mut Findings,
) -> Result<(), StoreError> {
    let locator = Locator::new(depot);
    let mut walker =
        Walker { depot, locator, findings, sound: HashSet::new(), sound_streams: HashSet::new() };
    for entry in entries {
        let who = match entry.names.first() {
            Some(name) => name.to_string(),
            None => entry.id.to_string(),
        };
        for (_, image) in &entry.record.images {
            walker.check_image(image, &who)?;
        }
    }
    Ok(())
}

impl Walker<'_, '_> {
    fn check_image(&mut self, image: &ImageRef, who: &str) -> Result<(), StoreError> {
        match self.depot.root(image) {
            Ok(root) => match root.top {
                Some(top) if root.splitter == Splitter::Fixed4K => {
                    self.check_node(&top, root.level(), who).map(drop)
                }
                Some(_) => self.check_stream(&root, who),
                None => Ok(()),
            },
            Err(error) => self.note(error, who),
        }
    }

    /// A damaged object is a finding; anything else ends the check.
    fn note(&mut self, error: StoreError, who: &str) -> Result<(), StoreError> {
        if error.kind() == ErrorKind::Internal {
            return Err(error);
        }
        self.findings.hit_by_error(&error, who);
        Ok(())
    }

    /// Whether everything under the node is sound.
    fn check_node(&mut self, id: &NodeId, level: u8, who: &str) -> Result<bool, StoreError> {
        if self.sound.contains(id) {
            return Ok(true);
        }
        let node = match self.load(id, level) {
            Ok(node) => node,
            Err(error) => {
                self.note(error, who)?;
                return Ok(false);
            }
        };
        let mut is_sound = true;
        match level.checked_sub(1) {
            None => is_sound = self.check_leaf(&node, who)?,
            Some(below) => {
                for child in node.children().iter().flatten() {
                    is_sound &= self.check_node(&NodeId::from_bytes(*child), below, who)?;
                }
            }
        }
        if is_sound {
            self.sound.insert(*id);
        }
        Ok(is_sound)
    }

    fn load(&self, id: &NodeId, level: u8) -> Result<std::sync::Arc<Node>, StoreError> {
        let node = self.depot.load_node(id)?;
        check_level(id, &node, level)?;
        Ok(node)
    }

    fn check_stream(&mut self, root: &RootRecord, who: &str) -> Result<(), StoreError> {
        match stream::top(self.depot, root) {
            Ok(top) => top.map_or(Ok(()), |top| self.check_stream_node(&top, who).map(drop)),
            Err(error) => self.note(error, who),
        }
    }

    /// Whether everything under the node is sound. What is sound as the last
    /// of its level may not be elsewhere.
    fn check_stream_node(&mut self, seat: &Seat, who: &str) -> Result<bool, StoreError> {
        let key = (seat.id, seat.level, seat.len);
        if self.sound_streams.contains(&key) {
            return Ok(true);
        }
        let node = match seat.load(self.depot) {
            Ok(node) => node,
            Err(error) => {
                self.note(error, who)?;
                return Ok(false);
            }
        };
        let mut is_sound = self.check_chunks(&node.chunks().collect::<Vec<_>>(), who)?;
        for child in seat.below(&node) {
            is_sound &= self.check_stream_node(&child, who)?;
        }
        if is_sound && !seat.is_last {
            self.sound_streams.insert(key);
        }
        Ok(is_sound)
    }

    fn check_leaf(&mut self, leaf: &Node, who: &str) -> Result<bool, StoreError> {
        let chunks: Vec<ChunkId> =
            leaf.children().iter().flatten().copied().map(ChunkId::from_bytes).collect();
        self.check_chunks(&chunks, who)
    }

    fn check_chunks(&mut self, chunks: &[ChunkId], who: &str) -> Result<bool, StoreError> {
        let keys: Vec<ObjectKey> = chunks.iter().map(ChunkId::key).collect();
        let locations = match self.locator.locate(&keys) {
            Ok(locations) => locations,
            Err(error) => {
                self.note(error, who)?;
                return Ok(false);
            }
        };
        let mut is_sound = true;
        for (chunk, location) in chunks.iter().zip(locations) {
            match location {
                None => {
                    is_sound = false;
                    self.note(StoreError::Missing { what: "chunk", id: chunk.to_string() }, who)?;
                }
                Some(at) if self.findings.is_bad(at.pack, at.span.offset) => {
                    is_sound = false;
                    self.findings.hit_chunk(at.pack, at.span.offset, chunk, who);
                }
                Some(_) => {}
            }
        }
        Ok(is_sound)
    }
}
