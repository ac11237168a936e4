//! Pages gathered into batches, which are hashed on all cores while the
//! batch before is deduplicated and the next one is read.

use std::collections::VecDeque;

use super::task::{self, Task};
use crate::chunk::{self, Page};
use crate::id::ChunkId;
use crate::units::PAGE_LEN;

/// Pages hashed together: 4 MiB.
pub(super) const BATCH_PAGES: usize = 1024;
/// Batches that are being hashed at once.
const HASHING_MAX: usize = 2;

/// Pages and where they belong, in ascending order.
#[derive(Debug, Default)]
pub(super) struct Batch {
    numbers: Vec<u64>,
    bytes: Vec<u8>,
    /// One for each page; none if it is zero. Empty until they are hashed.
    ids: Vec<Option<ChunkId>>,
}

/// Batches on their way: at most one that fills and a few that are hashed.
#[derive(Debug, Default)]
pub(super) struct Gatherer {
    open: Batch,
    hashing: VecDeque<Task<Batch>>,
}

impl Batch {
    /// Each page with its number and id.
    pub(super) fn pages(&self) -> impl Iterator<Item = (u64, Option<ChunkId>, &Page)> {
        let (pages, _) = self.bytes.as_chunks::<PAGE_LEN>();
        let ids = self.ids.iter().copied();
        self.numbers.iter().copied().zip(ids).zip(pages).map(|((n, id), page)| (n, id, page))
    }

    fn hashed(mut self) -> Self {
        let (pages, _) = self.bytes.as_chunks::<PAGE_LEN>();
        let pages: Vec<&Page> = pages.iter().collect();
        self.ids = chunk::identify(&pages);
        self
    }
}

impl Gatherer {
    /// Takes pages from `first_page` on; a partial last one is padded with
    /// zeros. `next` gets each batch that is hashed, in order.
    pub(super) fn put<E>(
        &mut self,
        first_page: u64,
        mut bytes: &[u8],
        next: &mut dyn FnMut(Batch) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut page = first_page;
        while !bytes.is_empty() {
            let room = (BATCH_PAGES - self.open.numbers.len()) * PAGE_LEN;
            let (now, later) = bytes.split_at(bytes.len().min(room));
            self.open.bytes.extend_from_slice(now);
            self.number_pages(page);
            page = self.open.numbers.last().map_or(page, |last| last + 1);
            bytes = later;
            self.pass_on(next)?;
        }
        Ok(())
    }

    /// As [`Gatherer::put`], for bytes that nobody else needs: they are not
    /// copied if nothing else waits.
    pub(super) fn put_owned<E>(
        &mut self,
        first_page: u64,
        bytes: Vec<u8>,
        next: &mut dyn FnMut(Batch) -> Result<(), E>,
    ) -> Result<(), E> {
        if !self.open.numbers.is_empty() || bytes.len() > BATCH_PAGES * PAGE_LEN {
            return self.put(first_page, &bytes, next);
        }
        self.open.bytes = bytes;
        self.number_pages(first_page);
        self.pass_on(next)
    }

    /// Gives numbers to the bytes that have none yet, and pads the last page.
    fn number_pages(&mut self, first_page: u64) {
        let Batch { numbers, bytes, .. } = &mut self.open;
        bytes.resize(bytes.len().next_multiple_of(PAGE_LEN), 0);
        let new = bytes.len() / PAGE_LEN - numbers.len();
        numbers.extend((first_page..).take(new));
    }

    /// Has a full batch hashed, and takes the oldest back if many are.
    fn pass_on<E>(&mut self, next: &mut dyn FnMut(Batch) -> Result<(), E>) -> Result<(), E> {
        if self.open.numbers.len() < BATCH_PAGES {
            return Ok(());
        }
        let batch = std::mem::take(&mut self.open);
        self.hashing.push_back(task::begin(move || batch.hashed()));
        if self.hashing.len() > HASHING_MAX
            && let Some(oldest) = self.hashing.pop_front()
        {
            next(oldest.wait())?;
        }
        Ok(())
    }

    /// Passes everything on.
    pub(super) fn finish<E>(
        &mut self,
        next: &mut dyn FnMut(Batch) -> Result<(), E>,
    ) -> Result<(), E> {
        while let Some(oldest) = self.hashing.pop_front() {
            next(oldest.wait())?;
        }
        next(std::mem::take(&mut self.open).hashed())
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    #[test]
    fn every_page_comes_once_in_order_with_its_id() {
        let mut gatherer = Gatherer::default();
        let mut found = Vec::new();
        let mut next = |batch: Batch| {
            found.extend(batch.pages().map(|(number, id, page)| (number, id, page[0])));
            Ok::<(), Infallible>(())
        };
        let bytes = |page: u64| vec![u8::try_from(page % 251).expect("small"); PAGE_LEN];
        let mut expected = Vec::new();
        let mut page = 0;
        for run in [1, 3, 700, 1024, 1, 4000, 2, 1024, 9] {
            page += 5;
            let run: Vec<u64> = (page..page + run).collect();
            let content: Vec<u8> = run.iter().flat_map(|page| bytes(*page)).collect();
            if run.len().is_multiple_of(2) {
                gatherer.put_owned(page, content, &mut next).expect("no error");
            } else {
                gatherer.put(page, &content, &mut next).expect("no error");
            }
            page += run.len() as u64;
            expected.extend(run);
        }
        gatherer.put(page, &[1, 2, 3], &mut next).expect("no error");
        gatherer.finish(&mut next).expect("no error");
        let (tail, found) = found.split_last().expect("pages");
        let mut padded = [0; PAGE_LEN];
        padded[..3].copy_from_slice(&[1, 2, 3]);
        assert_eq!(*tail, (page, Some(ChunkId::of(&padded)), 1));
        let expected: Vec<_> = expected
            .into_iter()
            .map(|page| {
                let bytes = bytes(page);
                (page, (bytes[0] != 0).then(|| ChunkId::of(&bytes)), bytes[0])
            })
            .collect();
        assert!(found == expected);
    }
}
