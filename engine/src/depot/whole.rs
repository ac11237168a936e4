//! Whether an image is there at all: collected parts are absent, damaged ones
//! are not.

use std::collections::HashSet;

use super::Depot;
use crate::error::StoreError;
use crate::id::{ChunkId, NodeId, ObjectKey};
use crate::tree::stream::StreamSource;
use crate::tree::{ImageRef, Splitter};

impl Depot {
    /// Whether no part of the image is absent. `whole` remembers nodes for
    /// the next image.
    pub(crate) fn is_whole(
        &self,
        image: &ImageRef,
        whole: &mut HashSet<NodeId>,
    ) -> Result<bool, StoreError> {
        match self.root(image) {
            Ok(root) => root.top.map_or(Ok(true), |top| match root.splitter {
                Splitter::Fixed4K => self.is_node_whole(&top, whole),
                Splitter::FastCdc16K => self.is_stream_whole(&top, whole),
            }),
            Err(error) => absent(error),
        }
    }

    fn is_node_whole(&self, id: &NodeId, whole: &mut HashSet<NodeId>) -> Result<bool, StoreError> {
        if whole.contains(id) {
            return Ok(true);
        }
        let node = match self.stored_node(id) {
            Ok(stored) => stored.node,
            Err(error) => return absent(error),
        };
        let children = node.children().iter().flatten();
        if node.level == 0 {
            let keys: Vec<ObjectKey> =
                children.map(|child| ChunkId::from_bytes(*child).key()).collect();
            if self.index.get_many(&keys)?.iter().any(Option::is_none) {
                return Ok(false);
            }
        } else {
            for child in children {
                if !self.is_node_whole(&NodeId::from_bytes(*child), whole)? {
                    return Ok(false);
                }
            }
        }
        whole.insert(*id);
        Ok(true)
    }
}

impl Depot {
    fn is_stream_whole(
        &self,
        id: &NodeId,
        whole: &mut HashSet<NodeId>,
    ) -> Result<bool, StoreError> {
        if whole.contains(id) {
            return Ok(true);
        }
        let node = match self.load_stream_node(id) {
            Ok(node) => node,
            Err(error) => return absent(error),
        };
        let keys: Vec<ObjectKey> = node.chunks().map(|chunk| chunk.key()).collect();
        if self.index.get_many(&keys)?.iter().any(Option::is_none) {
            return Ok(false);
        }
        for child in node.nodes() {
            if !self.is_stream_whole(&child, whole)? {
                return Ok(false);
            }
        }
        whole.insert(*id);
        Ok(true)
    }
}

/// What is damaged is there: its snapshot is worth listing, and `check` says
/// what it lost.
fn absent(error: StoreError) -> Result<bool, StoreError> {
    match error {
        StoreError::Missing { .. } => Ok(false),
        StoreError::Damaged { .. } | StoreError::BadObject { .. } => Ok(true),
        other => Err(other),
    }
}
