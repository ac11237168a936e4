//! Writing one image, page by page in ascending order.

use super::gather::{Batch, Gatherer};
use super::sink::Sink;
use crate::chunk::Page;
use crate::error::StoreError;
use crate::id::ChunkId;
use crate::tree::{FANOUT, ImageRef, RootRecord, Splitter, TreeBuilder, top_level};
use crate::units::{IMAGE_LEN_MAX, PAGE_LEN, pages_of, to_u64, to_usize};

/// An image that is being written. Pages are hashed and stored some time after
/// they were given, so an error may be that of an earlier write.
#[derive(Debug)]
pub struct ImageWriter<'s> {
    gatherer: Gatherer,
    part: Part<'s>,
    /// `None` while the length grows with what is appended.
    len: Option<u64>,
    next_page: u64,
    /// Appended bytes that are not a whole page yet.
    rest: Vec<u8>,
}

/// Where hashed pages go.
#[derive(Debug)]
struct Part<'s> {
    sink: &'s mut Sink,
    tree: TreeBuilder,
    has_base: bool,
}

impl<'s> ImageWriter<'s> {
    pub(super) fn sized(
        sink: &'s mut Sink,
        len: u64,
        base: Option<&RootRecord>,
    ) -> Result<Self, StoreError> {
        let tree = TreeBuilder::new(top_level(pages_of(len)), base, sink)?;
        let has_base = base.is_some_and(|base| base.top.is_some());
        Ok(Self::new(Part { sink, tree, has_base }, Some(len)))
    }

    pub(super) fn unbounded(sink: &'s mut Sink) -> Self {
        Self::new(Part { sink, tree: TreeBuilder::unbounded(), has_base: false }, None)
    }

    fn new(part: Part<'s>, len: Option<u64>) -> Self {
        Self { gatherer: Gatherer::default(), part, len, next_page: 0, rest: Vec::new() }
    }

    /// Writes whole pages from `first_page` on. Only the last page of the
    /// image may be partial; its bytes beyond the image's end must be absent.
    ///
    /// # Errors
    /// If pages do not come in ascending order or lie outside the image, or
    /// if something cannot be read or written.
    pub fn write(&mut self, first_page: u64, bytes: &[u8]) -> Result<(), StoreError> {
        self.check(first_page, bytes)?;
        self.put(first_page, bytes)
    }

    /// As [`ImageWriter::write`], for bytes that the caller does not need any
    /// more: up to 4 MiB of them are not copied.
    ///
    /// # Errors
    /// As [`ImageWriter::write`].
    pub fn write_owned(&mut self, first_page: u64, bytes: Vec<u8>) -> Result<(), StoreError> {
        self.check(first_page, &bytes)?;
        self.next_page = first_page + pages_of(to_u64(bytes.len()));
        let part = &mut self.part;
        let put = self.gatherer.put_owned(first_page, bytes, &mut |batch| part.store(&batch));
        part.sink.note(put)
    }

    /// Whether these pages may come next.
    fn check(&self, first_page: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let Some(len) = self.len else {
            return Err(StoreError::Invalid("a growing image is appended to, not written by page"));
        };
        let pages = pages_of(len);
        let end_page = pages_of(to_u64(bytes.len())).checked_add(first_page);
        if first_page < self.next_page || end_page.is_none_or(|end| end > pages) {
            let next = self.next_page;
            return Err(StoreError::PageOrder { page: first_page, next, pages });
        }
        let partial = !bytes.len().is_multiple_of(PAGE_LEN);
        let end = first_page * to_u64(PAGE_LEN) + to_u64(bytes.len());
        if (partial && end != len) || end > len.next_multiple_of(to_u64(PAGE_LEN)) {
            return Err(StoreError::Invalid("only the last page of an image may be partial"));
        }
        // A tail that comes as a whole page must be zero behind the end, or
        // the root would depend on bytes that are not part of the image.
        let beyond = to_usize(end.saturating_sub(len));
        if bytes[bytes.len() - beyond..].iter().any(|byte| *byte != 0) {
            return Err(StoreError::Invalid("bytes beyond the end of the image must be zero"));
        }
        Ok(())
    }

    /// Makes pages zero, which must come in order as those that are written.
    /// It takes time for the part of the tree that changes, not for each page.
    ///
    /// # Errors
    /// As [`ImageWriter::write`].
    pub fn erase(&mut self, first_page: u64, count: u64) -> Result<(), StoreError> {
        if count == 0 {
            return Ok(());
        }
        let pages = pages_of(self.byte_len());
        let end = first_page.checked_add(count).filter(|end| *end <= pages);
        let Some(end) = end.filter(|_| first_page >= self.next_page) else {
            return Err(StoreError::PageOrder { page: first_page, next: self.next_page, pages });
        };
        let part = &mut self.part;
        let flushed = self.gatherer.finish(&mut |batch| part.store(&batch));
        part.sink.note(flushed)?;
        self.next_page = end;
        let cleared = part.tree.clear(first_page..end, part.sink);
        part.sink.note(cleared)
    }

    /// How long the image is in bytes; nothing while it grows.
    pub(super) fn byte_len(&self) -> u64 {
        self.len.unwrap_or(0)
    }

    /// Appends bytes to a growing image.
    ///
    /// # Errors
    /// If something cannot be read or written.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        if self.len.is_some() {
            return Err(StoreError::Invalid("an image of known length is written by page"));
        }
        let total = self.next_page * to_u64(PAGE_LEN) + to_u64(self.rest.len() + bytes.len());
        if total > IMAGE_LEN_MAX {
            return Err(StoreError::ImageTooLong(total));
        }
        let missing = (PAGE_LEN - self.rest.len()) % PAGE_LEN;
        let (head, tail) = bytes.split_at(missing.min(bytes.len()));
        self.rest.extend_from_slice(head);
        if self.rest.len() == PAGE_LEN {
            let page = std::mem::take(&mut self.rest);
            self.put(self.next_page, &page)?;
        }
        let whole = tail.len() - tail.len() % PAGE_LEN;
        self.put(self.next_page, &tail[..whole])?;
        self.rest.extend_from_slice(&tail[whole..]);
        Ok(())
    }

    fn put(&mut self, first_page: u64, bytes: &[u8]) -> Result<(), StoreError> {
        self.next_page = first_page + pages_of(to_u64(bytes.len()));
        let part = &mut self.part;
        let put = self.gatherer.put(first_page, bytes, &mut |batch| part.store(&batch));
        part.sink.note(put)
    }

    /// Bytes that the session has stored for the first time so far.
    #[must_use]
    pub fn new_bytes(&self) -> u64 {
        self.part.sink.totals.new_bytes
    }

    /// Completes the image.
    ///
    /// # Errors
    /// If something cannot be read or written.
    pub fn finish(mut self) -> Result<ImageRef, StoreError> {
        let len = match self.len {
            Some(len) => len,
            None => {
                let rest = std::mem::take(&mut self.rest);
                let len = self.next_page * to_u64(PAGE_LEN) + to_u64(rest.len());
                self.put(self.next_page, &rest)?;
                len
            }
        };
        let mut part = self.part;
        let put = self.gatherer.finish(&mut |batch| part.store(&batch));
        let Part { sink, tree, .. } = part;
        sink.note(put)?;
        sink.end_pages();
        let top = tree.finish(top_level(pages_of(len)), sink);
        let root = RootRecord { splitter: Splitter::Fixed4K, len, top: sink.note(top)? };
        let put = sink.put_root(&root);
        sink.note(put)?;
        Ok(root.image())
    }
}

impl Part<'_> {
    /// Puts pages into the tree, and those that are new into the store. A
    /// leaf is closed when the next one begins, so its chunks are stored
    /// before: they lie in its own pack or in earlier ones, where the hints that
    /// are made of it find them.
    fn store(&mut self, batch: &Batch) -> Result<(), StoreError> {
        let mut candidates: Vec<(ChunkId, &Page)> = Vec::new();
        let mut last_leaf = None;
        for (number, id, page) in batch.pages() {
            if id.is_none() && !self.has_base {
                continue;
            }
            let leaf = number / to_u64(FANOUT);
            if last_leaf.replace(leaf).is_some_and(|last| last != leaf) {
                self.sink.put_pages(&candidates)?;
                candidates.clear();
            }
            let before = if self.has_base { self.tree.get(number, self.sink)? } else { None };
            if before != id {
                self.tree.set(number, id, self.sink)?;
            }
            if let Some(id) = id.filter(|id| before != Some(*id) || self.sink.doubts(id)) {
                candidates.push((id, page));
            }
        }
        self.sink.put_pages(&candidates)
    }
}
