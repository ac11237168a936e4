//! Chunks: pages of plaintext, hashed on all cores.

use rayon::prelude::*;

use crate::id::ChunkId;
use crate::units::{PAGE_LEN, ZERO_PAGE};

/// A page, which is one chunk of a fixed-length image.
pub type Page = [u8; PAGE_LEN];

/// Splits bytes into pages. A partial tail is padded with zeros into `tail`,
/// which has to outlive the pages.
pub(crate) fn split<'a>(bytes: &'a [u8], tail: &'a mut Page) -> Vec<&'a Page> {
    let (pages, rest) = bytes.as_chunks::<PAGE_LEN>();
    let mut all: Vec<&Page> = pages.iter().collect();
    if !rest.is_empty() {
        tail[..rest.len()].copy_from_slice(rest);
        tail[rest.len()..].fill(0);
        all.push(tail);
    }
    all
}

/// The ids of pages; a page of zeros has none.
pub(crate) fn identify(pages: &[&Page]) -> Vec<Option<ChunkId>> {
    pages.par_iter().with_min_len(16).map(|page| identify_one(page)).collect()
}

/// The id of a page; a page of zeros has none.
pub(crate) fn identify_one(page: &Page) -> Option<ChunkId> {
    (*page != ZERO_PAGE).then(|| ChunkId::of(page))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partial_tail_is_padded() {
        let bytes = vec![3; PAGE_LEN + 5];
        let mut tail = [9; PAGE_LEN];
        let pages = split(&bytes, &mut tail);
        assert_eq!(pages.len(), 2);
        assert_eq!(&pages[1][..6], &[3, 3, 3, 3, 3, 0]);
        assert!(pages[1][6..].iter().all(|b| *b == 0));
    }

    #[test]
    fn zeros_have_no_id() {
        let mut page = [0; PAGE_LEN];
        assert_eq!(identify(&[&page]), vec![None]);
        page[PAGE_LEN - 1] = 1;
        assert_eq!(identify(&[&page]), vec![Some(ChunkId::of(&page))]);
    }
}
