//! What streams add to a session: chunks of any length, in frames of their
//! own, and nodes that are always stored in full.

use super::Sink;
use crate::error::StoreError;
use crate::id::{ChunkId, NodeId, ObjectKey};
use crate::ingest::frames::PlainFrame;
use crate::pack::pieces::PieceFrame;
use crate::pack::{FrameKind, ObjectKind};
use crate::tree::stream::{StreamNode, StreamSink};
use crate::units::to_u64;

/// Fills one frame of chunks after the other.
#[derive(Debug)]
pub(super) struct PieceBuilder {
    len_max: usize,
    open: PieceFrame,
    full: Vec<PlainFrame>,
}

impl PieceBuilder {
    pub(super) fn new(len_max: usize) -> Self {
        Self { len_max, open: PieceFrame::default(), full: Vec::new() }
    }

    /// Adds a chunk.
    fn put(&mut self, key: ObjectKey, piece: &[u8]) {
        if !self.open.has_room(piece, self.len_max) {
            self.end_frame();
        }
        self.open.push(key, piece);
    }

    /// Ends the open frame even if it is not full.
    pub(super) fn end_frame(&mut self) {
        if let Some((plain, keys)) = self.open.take() {
            self.full.push(PlainFrame { kind: FrameKind::Pieces, plain, keys });
        }
    }

    /// Takes the full frames, in order.
    pub(super) fn take_full(&mut self) -> Vec<PlainFrame> {
        std::mem::take(&mut self.full)
    }
}

impl Sink {
    /// Stores the chunks of a stream that the store does not have yet.
    pub(in crate::ingest) fn put_pieces(
        &mut self,
        pieces: &[(ChunkId, &[u8])],
    ) -> Result<(), StoreError> {
        let keys: Vec<ObjectKey> = pieces.iter().map(|(id, _)| id.key()).collect();
        self.put_missing(&keys, &mut |sink, at| {
            let piece = pieces[at].1;
            sink.pieces.put(keys[at], piece);
            sink.totals.new_bytes += to_u64(piece.len());
            if sink.pieces.full.is_empty() { Ok(()) } else { sink.pack_chunks() }
        })
    }

    /// Ends the frame of chunks, so that streams do not share frames.
    pub(in crate::ingest) fn end_pieces(&mut self) {
        self.pieces.end_frame();
    }
}

impl StreamSink for Sink {
    fn store_stream_node(&mut self, id: NodeId, node: &StreamNode) -> Result<(), StoreError> {
        let key = id.key();
        if self.is_missing(key)? && self.unpublished.insert(key) {
            self.objects.put_object(key, ObjectKind::Node, &node.encode());
        }
        self.pack_objects()
    }
}
