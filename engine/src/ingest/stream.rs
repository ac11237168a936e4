//! Writing a byte stream: cut by content, hashed on all cores, its tree built
//! as it comes. Memory is bounded by the buffer, whatever the length, and the
//! image does not depend on how the bytes were handed over.

use super::sink::Sink;
use crate::chunk;
use crate::error::StoreError;
use crate::id::ChunkId;
use crate::tree::ImageRef;
use crate::tree::stream::StreamBuilder;
use crate::units::{IMAGE_LEN_MAX, to_u64};

/// Bytes gathered before they are cut.
const BUFFER_LEN: usize = 4 << 20;

/// A stream that is being written. Unlike an image of pages it can be of any
/// length, needs no base to share what it has in common with others, and no
/// machine can use it.
#[derive(Debug)]
pub struct StreamWriter<'s> {
    sink: &'s mut Sink,
    tree: StreamBuilder,
    /// Bytes behind the last cut.
    rest: Vec<u8>,
}

impl<'s> StreamWriter<'s> {
    pub(super) fn new(sink: &'s mut Sink) -> Self {
        Self { sink, tree: StreamBuilder::default(), rest: Vec::new() }
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// If the stream becomes longer than an image may be, or something cannot
    /// be read or written.
    pub fn append(&mut self, mut bytes: &[u8]) -> Result<(), StoreError> {
        let len = self.tree.len() + to_u64(self.rest.len()) + to_u64(bytes.len());
        if len > IMAGE_LEN_MAX {
            return Err(StoreError::ImageTooLong(len));
        }
        while !bytes.is_empty() {
            let room = BUFFER_LEN - self.rest.len();
            let (head, tail) = bytes.split_at(room.min(bytes.len()));
            self.rest.extend_from_slice(head);
            bytes = tail;
            if self.rest.len() == BUFFER_LEN {
                let put = self.put(false);
                self.sink.note(put)?;
            }
        }
        Ok(())
    }

    /// Stores what can be cut off the front of the buffer.
    fn put(&mut self, is_end: bool) -> Result<(), StoreError> {
        let rest = std::mem::take(&mut self.rest);
        let pieces = chunk::cut(&rest, is_end);
        let ids = chunk::identify_pieces(&pieces);
        let chunks: Vec<(ChunkId, &[u8])> =
            ids.iter().zip(&pieces).filter_map(|(id, piece)| Some(((*id)?, *piece))).collect();
        self.sink.put_pieces(&chunks)?;
        let mut done = 0;
        for (id, piece) in ids.into_iter().zip(pieces) {
            self.tree.push(id, piece.len(), self.sink)?;
            done += piece.len();
        }
        self.rest = rest;
        self.rest.drain(..done);
        Ok(())
    }

    /// Bytes that the session has stored for the first time so far.
    #[must_use]
    pub fn new_bytes(&self) -> u64 {
        self.sink.totals.new_bytes
    }

    /// Completes the stream.
    ///
    /// # Errors
    /// If something cannot be read or written.
    pub fn finish(mut self) -> Result<ImageRef, StoreError> {
        let put = self.put(true);
        self.sink.note(put)?;
        self.sink.end_pieces();
        let root = self.tree.finish(self.sink);
        let root = self.sink.note(root)?;
        let put = self.sink.put_root(&root);
        self.sink.note(put)?;
        Ok(root.image())
    }
}

#[cfg(test)]
mod tests;
