//! Building a tree from pages in ascending order, on top of a base or on
//! zeros. Only the path to the current leaf is in memory; subtrees that no
//! page touches keep the base's ids and are neither read nor hashed.

use std::ops::Range;
use std::sync::Arc;

use super::node::{ChildId, Node};
use super::{FANOUT, LEVEL_MAX, RootRecord, span_of};
use crate::error::StoreError;
use crate::id::{ChunkId, NodeId};

/// Where existing nodes come from.
pub(crate) trait NodeSource {
    /// A verified node.
    fn load_node(&self, id: &NodeId) -> Result<Arc<Node>, StoreError>;
}

/// Where new nodes go.
pub(crate) trait NodeSink: NodeSource {
    /// Keeps a node; `base` is the one it was derived from.
    fn store_node(
        &mut self,
        id: NodeId,
        node: &Node,
        base: Option<NodeId>,
    ) -> Result<(), StoreError>;
}

/// A node on the path to the current leaf.
#[derive(Debug)]
struct Open {
    /// Its number among the nodes of its level.
    index: u64,
    node: Node,
    base: Option<NodeId>,
    changed: bool,
}

/// The path to the page written last.
#[derive(Debug)]
pub(crate) struct TreeBuilder {
    top: u8,
    /// From the top node downwards.
    path: Vec<Open>,
    /// The top node of a base that is as high as the new tree.
    base: Option<NodeId>,
}

impl TreeBuilder {
    /// Begins a tree whose top node has level `top`, over a base that is not
    /// higher.
    pub(crate) fn new(
        top: u8,
        base: Option<&RootRecord>,
        source: &dyn NodeSource,
    ) -> Result<Self, StoreError> {
        base.map_or(Ok(()), RootRecord::require_pages)?;
        let mut builder = Self { top, path: Vec::new(), base: None };
        let Some((level, id)) = base.and_then(|base| Some((base.level(), base.top?))) else {
            return Ok(builder);
        };
        if level == top {
            builder.base = Some(id);
            return Ok(builder);
        }
        // A lower base is the first descendant of new nodes above it. They
        // are opened now and closed as soon as writing moves on.
        for above in (level + 1..=top).rev() {
            builder.path.push(Open {
                index: 0,
                node: Node::empty(above),
                base: None,
                changed: true,
            });
        }
        builder.push_existing(level, 0, id, source)?;
        Ok(builder)
    }

    /// Begins a tree of a length that is not known yet.
    pub(crate) fn unbounded() -> Self {
        Self { top: LEVEL_MAX, path: Vec::new(), base: None }
    }

    fn push_existing(
        &mut self,
        level: u8,
        index: u64,
        id: NodeId,
        source: &dyn NodeSource,
    ) -> Result<(), StoreError> {
        let node = Node::clone(&*source.load_node(&id)?);
        if node.level != level {
            return Err(StoreError::BadObject {
                what: "tree node",
                id: id.to_string(),
                source: crate::error::FormatError::Field("node level"),
            });
        }
        self.path.push(Open { index, node, base: Some(id), changed: false });
        Ok(())
    }

    fn level_of(&self, depth: usize) -> u8 {
        self.top - u8::try_from(depth).expect("a path is at most five nodes long")
    }

    /// The chunk that the page has now, from the base.
    pub(crate) fn get(
        &mut self,
        page: u64,
        sink: &mut dyn NodeSink,
    ) -> Result<Option<ChunkId>, StoreError> {
        let leaf = self.seek(page, sink)?;
        Ok(leaf.node.children()[slot_in(page, 0)].map(ChunkId::from_bytes))
    }

    /// Gives a page a chunk, or makes it zero.
    pub(crate) fn set(
        &mut self,
        page: u64,
        chunk: Option<ChunkId>,
        sink: &mut dyn NodeSink,
    ) -> Result<(), StoreError> {
        let leaf = self.seek(page, sink)?;
        leaf.changed |= leaf.node.set(slot_in(page, 0), chunk.map(|id| *id.as_bytes()));
        Ok(())
    }

    /// Makes pages zero. Subtrees that lie within are dropped unread, and
    /// where there is none nothing is done.
    pub(crate) fn clear(
        &mut self,
        pages: Range<u64>,
        sink: &mut dyn NodeSink,
    ) -> Result<(), StoreError> {
        let mut page = pages.start;
        while page < pages.end {
            self.close_beside(page, sink)?;
            page = self.clear_part(page, pages.end, sink)?;
        }
        Ok(())
    }

    /// Clears as far as one subtree goes; returns where to go on.
    fn clear_part(
        &mut self,
        page: u64,
        end: u64,
        sink: &mut dyn NodeSink,
    ) -> Result<u64, StoreError> {
        while self.path.len() <= usize::from(self.top) {
            let level = self.level_of(self.path.len());
            let span = span_of(level);
            let next = (page / span + 1) * span;
            match self.path.last_mut() {
                None if self.base.is_none() => return Ok(end),
                None => {}
                Some(parent) => {
                    let slot = slot_in(page, level + 1);
                    if parent.node.children()[slot].is_none() {
                        return Ok(next.min(end));
                    }
                    if page.is_multiple_of(span) && next <= end {
                        parent.changed |= parent.node.set(slot, None);
                        return Ok(next);
                    }
                }
            }
            self.descend(page, sink)?;
        }
        let leaf = self.path.last_mut().expect("a path with its leaf is not empty");
        let next = (page / span_of(0) + 1) * span_of(0);
        for page in page..next.min(end) {
            leaf.changed |= leaf.node.set(slot_in(page, 0), None);
        }
        Ok(next.min(end))
    }

    /// Closes what does not cover the page.
    fn close_beside(&mut self, page: u64, sink: &mut dyn NodeSink) -> Result<(), StoreError> {
        while let Some(open) = self.path.last() {
            if open.index == page / span_of(self.level_of(self.path.len() - 1)) {
                break;
            }
            self.close(sink)?;
        }
        Ok(())
    }

    /// Closes what does not cover the page and opens the path to its leaf.
    fn seek(&mut self, page: u64, sink: &mut dyn NodeSink) -> Result<&mut Open, StoreError> {
        self.close_beside(page, sink)?;
        while self.path.len() <= usize::from(self.top) {
            self.descend(page, sink)?;
        }
        Ok(self.path.last_mut().expect("a path with its leaf is not empty"))
    }

    fn descend(&mut self, page: u64, sink: &mut dyn NodeSink) -> Result<(), StoreError> {
        let level = self.level_of(self.path.len());
        let index = page / span_of(level);
        let existing = match self.path.last() {
            Some(parent) => {
                parent.node.children()[slot_in(page, level + 1)].map(NodeId::from_bytes)
            }
            None => self.base,
        };
        match existing {
            Some(id) => self.push_existing(level, index, id, sink),
            None => {
                let node = Node::empty(level);
                self.path.push(Open { index, node, base: None, changed: false });
                Ok(())
            }
        }
    }

    /// Closes the lowest open node and tells its parent.
    fn close(&mut self, sink: &mut dyn NodeSink) -> Result<Option<NodeId>, StoreError> {
        let open = self.path.pop().expect("only an open node is closed");
        let id = settle(&open, sink)?;
        if let Some(parent) = self.path.last_mut() {
            let slot = usize::try_from(open.index % 128).expect("below the fanout");
            let child: Option<ChildId> = id.map(|id| *id.as_bytes());
            parent.changed |= parent.node.set(slot, child);
        }
        Ok(id)
    }

    /// Closes everything; `level` is that of the finished tree's top node.
    pub(crate) fn finish(
        mut self,
        level: u8,
        sink: &mut dyn NodeSink,
    ) -> Result<Option<NodeId>, StoreError> {
        if self.path.is_empty() {
            return Ok(self.base);
        }
        let above = usize::from(self.top - level);
        let mut id = None;
        while self.path.len() > above {
            id = self.close(sink)?;
        }
        Ok(id)
    }
}

/// The id of a node that is complete now.
fn settle(open: &Open, sink: &mut dyn NodeSink) -> Result<Option<NodeId>, StoreError> {
    if !open.changed {
        return Ok(open.base);
    }
    if open.node.is_empty() {
        return Ok(None);
    }
    let id = open.node.id();
    if open.base != Some(id) {
        sink.store_node(id, &open.node, open.base)?;
    }
    Ok(Some(id))
}

/// Which child of a node of this level covers the page.
fn slot_in(page: u64, level: u8) -> usize {
    let child = page >> (7 * u32::from(level));
    usize::try_from(child % 128).expect("below the fanout")
}

const _: () = assert!(FANOUT == 128);
