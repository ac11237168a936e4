//! Collecting objects into the plaintext of frames.

use crate::id::ObjectKey;
use crate::pack::{FrameKind, ObjectKind, object};

/// The plaintext of a frame.
#[derive(Debug)]
pub(super) struct PlainFrame {
    pub(super) kind: FrameKind,
    pub(super) plain: Vec<u8>,
    pub(super) keys: Vec<ObjectKey>,
}

/// Fills one frame after the other.
#[derive(Debug)]
pub(super) struct FrameBuilder {
    kind: FrameKind,
    len_max: usize,
    open: PlainFrame,
    full: Vec<PlainFrame>,
}

impl FrameBuilder {
    pub(super) fn new(kind: FrameKind, len_max: usize) -> Self {
        Self { kind, len_max, open: empty(kind), full: Vec::new() }
    }

    /// Adds a page.
    pub(super) fn put_page(&mut self, key: ObjectKey, page: &[u8]) {
        self.make_room(page.len());
        self.open.plain.extend_from_slice(page);
        self.open.keys.push(key);
    }

    /// Adds an object with its header.
    pub(super) fn put_object(&mut self, key: ObjectKey, kind: ObjectKind, bytes: &[u8]) {
        self.make_room(bytes.len() + object::OBJECT_HEADER_LEN);
        object::put(&mut self.open.plain, kind, bytes);
        self.open.keys.push(key);
    }

    fn make_room(&mut self, len: usize) {
        if self.open.plain.len() + len > self.len_max {
            self.end_frame();
        }
    }

    /// Ends the open frame even if it is not full.
    pub(super) fn end_frame(&mut self) {
        if !self.open.keys.is_empty() {
            self.full.push(std::mem::replace(&mut self.open, empty(self.kind)));
        }
    }

    /// How many frames are full.
    pub(super) fn full_count(&self) -> usize {
        self.full.len()
    }

    /// Takes the full frames, in order.
    pub(super) fn take_full(&mut self) -> Vec<PlainFrame> {
        std::mem::take(&mut self.full)
    }
}

fn empty(kind: FrameKind) -> PlainFrame {
    PlainFrame { kind, plain: Vec::new(), keys: Vec::new() }
}
