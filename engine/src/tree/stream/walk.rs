//! Visiting the chunks of a stream in order. Levels go down by one with each
//! step and begin at 15 at most, so no bytes can make a walk endless.

use std::ops::Range;
use std::sync::Arc;

use super::node::{Child, StreamNode};
use crate::error::{FormatError, StoreError};
use crate::id::{ChunkId, NodeId};
use crate::tree::{RootRecord, Splitter};

/// Where existing nodes come from.
pub(crate) trait StreamSource {
    /// A verified node.
    fn load_stream_node(&self, id: &NodeId) -> Result<Arc<StreamNode>, StoreError>;
}

/// A chunk of a stream and where it lies in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// `None` for zeros.
    pub(crate) chunk: Option<ChunkId>,
}

/// A node and where it sits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seat {
    pub(crate) id: NodeId,
    pub(crate) level: u8,
    /// Bytes before it.
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// Whether it is the last of its level.
    pub(crate) is_last: bool,
}

impl Seat {
    /// Loads the node and refuses it if it does not belong here.
    pub(crate) fn load(&self, source: &dyn StreamSource) -> Result<Arc<StreamNode>, StoreError> {
        let node = source.load_stream_node(&self.id)?;
        let fits = node.check_place(self.level, self.len, self.is_last);
        fits.map_err(|source| bad_node(&self.id, source))?;
        Ok(node)
    }

    /// The children of its node above the leaves.
    pub(crate) fn below(&self, node: &StreamNode) -> Vec<Self> {
        let Some(level) = self.level.checked_sub(1) else { return Vec::new() };
        let last = node.children.len() - 1;
        let mut offset = self.offset;
        let seat = |(at, child): (usize, &Child)| {
            let seat = Self {
                id: NodeId::from_bytes(child.id),
                level,
                offset,
                len: child.len,
                is_last: self.is_last && at == last,
            };
            offset += child.len;
            seat
        };
        node.children.iter().enumerate().map(seat).collect()
    }

    /// The chunks of its node, which is a leaf.
    pub(crate) fn pieces(&self, leaf: &StreamNode) -> Vec<Piece> {
        let mut offset = self.offset;
        let piece = |child: &Child| {
            let piece = Piece { offset, len: child.len, chunk: child.chunk() };
            offset += child.len;
            piece
        };
        leaf.children.iter().map(piece).collect()
    }
}

/// Where the top node sits; `None` for a stream without bytes.
pub(crate) fn top(
    source: &dyn StreamSource,
    root: &RootRecord,
) -> Result<Option<Seat>, StoreError> {
    if root.splitter != Splitter::FastCdc16K {
        return Err(StoreError::Invalid("the image was cut into pages, not as a stream"));
    }
    let Some(id) = root.top else { return Ok(None) };
    let node = source.load_stream_node(&id)?;
    // One node over one node would have been the top itself.
    if node.level > 0 && node.children.len() < 2 {
        return Err(bad_node(&id, FormatError::Field("node children")));
    }
    Ok(Some(Seat { id, level: node.level, offset: 0, len: root.len, is_last: true }))
}

/// Calls `visit` for every chunk that has a byte in `range`.
pub(crate) fn walk(
    source: &dyn StreamSource,
    root: &RootRecord,
    range: &Range<u64>,
    visit: &mut dyn FnMut(Piece) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    match top(source, root)? {
        Some(top) => walk_node(source, &top, range, visit),
        None => Ok(()),
    }
}

fn walk_node(
    source: &dyn StreamSource,
    seat: &Seat,
    range: &Range<u64>,
    visit: &mut dyn FnMut(Piece) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let is_asked = |offset: u64, len: u64| offset < range.end && offset + len > range.start;
    let node = seat.load(source)?;
    if seat.level == 0 {
        let pieces = seat.pieces(&node);
        return pieces
            .into_iter()
            .filter(|piece| is_asked(piece.offset, piece.len))
            .try_for_each(visit);
    }
    for child in seat.below(&node) {
        if is_asked(child.offset, child.len) {
            walk_node(source, &child, range, visit)?;
        }
    }
    Ok(())
}

fn bad_node(id: &NodeId, source: FormatError) -> StoreError {
    StoreError::BadObject { what: "tree node", id: id.to_string(), source }
}
