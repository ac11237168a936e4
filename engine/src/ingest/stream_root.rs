//! The root of a byte stream without a store: what anyone can compute who has
//! the bytes.

use std::io::Read;

use crate::chunk;
use crate::error::StoreError;
use crate::id::NodeId;
use crate::tree::ImageRef;
use crate::tree::stream::{StreamBuilder, StreamNode, StreamSink};
use crate::units::{IMAGE_LEN_MAX, to_u64};

/// Bytes that are cut together.
const BUFFER_LEN: u64 = 1 << 20;

/// Reads to the end and says which byte stream it was.
///
/// # Errors
/// If reading fails or the input is longer than an image may be.
pub fn stream_root_of(mut input: impl Read) -> Result<ImageRef, StoreError> {
    let mut tree = StreamBuilder::default();
    let mut rest = Vec::new();
    loop {
        let before = rest.len();
        let mut part = input.by_ref().take(BUFFER_LEN);
        part.read_to_end(&mut rest).map_err(StoreError::transfer("read input"))?;
        let len = tree.len() + to_u64(rest.len());
        if len > IMAGE_LEN_MAX {
            return Err(StoreError::ImageTooLong(len));
        }
        let is_end = rest.len() == before;
        let pieces = chunk::cut(&rest, is_end);
        let mut done = 0;
        for (id, piece) in chunk::identify_pieces(&pieces).into_iter().zip(pieces) {
            tree.push(id, piece.len(), &mut Nowhere)?;
            done += piece.len();
        }
        rest.drain(..done);
        if is_end {
            return Ok(tree.finish(&mut Nowhere)?.image());
        }
    }
}

/// Keeps no nodes.
struct Nowhere;

impl StreamSink for Nowhere {
    fn store_stream_node(&mut self, _: NodeId, _: &StreamNode) -> Result<(), StoreError> {
        Ok(())
    }
}
