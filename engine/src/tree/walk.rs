//! Visiting the pages of a tree in ascending order.

use std::ops::Range;

use super::build::NodeSource;
use super::node::Node;
use super::stream::{self, StreamSource};
use super::{RootRecord, Splitter, span_of};
use crate::error::StoreError;
use crate::id::{ChunkId, NodeId};
use crate::units::{PAGE_LEN, pages_of, to_u64};

/// Calls `visit` for every page in `range` that is not zero.
pub(crate) fn walk(
    source: &dyn NodeSource,
    root: &RootRecord,
    range: &Range<u64>,
    visit: &mut dyn FnMut(u64, ChunkId) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    root.require_pages()?;
    match root.top {
        Some(top) => walk_node(source, &top, root.level(), 0, range, visit),
        None => Ok(()),
    }
}

/// Bytes of an image, of whichever form, that are not in chunks of zeros.
pub(crate) fn data_bytes(
    pages: &dyn NodeSource,
    streams: &dyn StreamSource,
    root: &RootRecord,
) -> Result<u64, StoreError> {
    let mut bytes = 0;
    match root.splitter {
        Splitter::Fixed4K => walk(pages, root, &(0..pages_of(root.len)), &mut |_, _| {
            bytes += to_u64(PAGE_LEN);
            Ok(())
        }),
        Splitter::FastCdc16K => stream::walk(streams, root, &(0..root.len), &mut |piece| {
            bytes += piece.chunk.map_or(0, |_| piece.len);
            Ok(())
        }),
    }?;
    Ok(bytes)
}

fn walk_node(
    source: &dyn NodeSource,
    id: &NodeId,
    level: u8,
    first: u64,
    range: &Range<u64>,
    visit: &mut dyn FnMut(u64, ChunkId) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let node = source.load_node(id)?;
    check_level(id, &node, level)?;
    let span = span_of(level) / 128;
    let mut page = first;
    for child in node.children() {
        let covered = page..page + span;
        page = covered.end;
        let Some(child) = child else { continue };
        if covered.end <= range.start || covered.start >= range.end {
            continue;
        }
        match level.checked_sub(1) {
            None => visit(covered.start, ChunkId::from_bytes(*child))?,
            Some(below) => {
                let child = NodeId::from_bytes(*child);
                walk_node(source, &child, below, covered.start, range, visit)?;
            }
        }
    }
    Ok(())
}

/// Refuses a node that sits at the wrong height.
pub(crate) fn check_level(id: &NodeId, node: &Node, level: u8) -> Result<(), StoreError> {
    if node.level == level {
        return Ok(());
    }
    Err(StoreError::BadObject {
        what: "tree node",
        id: id.to_string(),
        source: crate::error::FormatError::Field("node level"),
    })
}
