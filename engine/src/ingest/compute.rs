//! The root of an image without a store: what anyone can compute who has the
//! bytes.

use std::io::{self, Read};
use std::sync::Arc;

use crate::chunk;
use crate::error::StoreError;
use crate::id::NodeId;
use crate::tree::{
    ImageRef, Node, NodeSink, NodeSource, RootRecord, Splitter, TreeBuilder, top_level,
};
use crate::units::{PAGE_LEN, pages_of, to_u64};

/// Bytes read before they are hashed on all cores.
const BUFFER_LEN: usize = 1 << 20;

/// Reads to the end and says which image it was.
///
/// # Errors
/// If reading fails or the input is longer than an image may be.
pub fn tree_root_of(mut input: impl Read) -> Result<ImageRef, StoreError> {
    let mut tree = TreeBuilder::unbounded();
    let mut buffer = vec![0; BUFFER_LEN];
    let mut len = 0;
    loop {
        let count = fill(&mut input, &mut buffer).map_err(StoreError::transfer("read input"))?;
        let mut tail = [0; PAGE_LEN];
        let pages = chunk::split(&buffer[..count], &mut tail);
        for (id, page) in chunk::identify(&pages).into_iter().zip(pages_of(len)..) {
            if id.is_some() {
                tree.set(page, id, &mut Nowhere)?;
            }
        }
        len += to_u64(count);
        if len > crate::units::IMAGE_LEN_MAX {
            return Err(StoreError::ImageTooLong(len));
        }
        if count < BUFFER_LEN {
            break;
        }
    }
    let top = tree.finish(top_level(pages_of(len)), &mut Nowhere)?;
    Ok(RootRecord { splitter: Splitter::Fixed4K, len, top }.image())
}

/// Fills the buffer unless the input ends.
fn fill(input: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match input.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Keeps no nodes and has none.
struct Nowhere;

impl NodeSource for Nowhere {
    fn load_node(&self, id: &NodeId) -> Result<Arc<Node>, StoreError> {
        Err(StoreError::Missing { what: "tree node", id: id.to_string() })
    }
}

impl NodeSink for Nowhere {
    fn store_node(&mut self, _: NodeId, _: &Node, _: Option<NodeId>) -> Result<(), StoreError> {
        Ok(())
    }
}
