//! Visiting the pages of a tree in ascending order.

use std::ops::Range;

use super::build::NodeSource;
use super::node::Node;
use super::{RootRecord, span_of};
use crate::error::StoreError;
use crate::id::{ChunkId, NodeId};

/// Calls `visit` for every page in `range` that is not zero.
pub(crate) fn walk(
    source: &dyn NodeSource,
    root: &RootRecord,
    range: &Range<u64>,
    visit: &mut dyn FnMut(u64, ChunkId) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    match root.top {
        Some(top) => walk_node(source, &top, root.level(), 0, range, visit),
        None => Ok(()),
    }
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
