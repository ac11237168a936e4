//! Chunks: pages of plaintext, or content-defined pieces of a byte stream,
//! hashed on all cores.

mod cut;
mod lanes;

pub(crate) use cut::{CUT_MAX, CUT_MIN, cut};
use rayon::prelude::*;

use crate::id::ChunkId;
use crate::units::{PAGE_LEN, ZERO_PAGE};

/// Pages that one core hashes before it asks for more: some lanes full.
const GROUP_PAGES: usize = 4 * lanes::LANES;

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

/// The ids of pages, on all cores; a page of zeros has none.
pub(crate) fn identify(pages: &[&Page]) -> Vec<Option<ChunkId>> {
    pages.par_chunks(GROUP_PAGES).flat_map_iter(identify_here).collect()
}

/// The ids of pages, on this thread; a page of zeros has none.
pub(crate) fn identify_here(pages: &[&Page]) -> Vec<Option<ChunkId>> {
    let hard: Vec<&Page> = pages.iter().filter(|page| !is_zero(page)).copied().collect();
    let mut ids = chunk_ids(&hard).into_iter();
    if hard.len() == pages.len() {
        return ids.map(Some).collect();
    }
    pages.iter().map(|page| if is_zero(page) { None } else { ids.next() }).collect()
}

/// The ids of pages, zeros or not, on this thread: [`ChunkId::of`] for many
/// at once, several times as fast.
#[must_use]
pub fn chunk_ids(pages: &[&Page]) -> Vec<ChunkId> {
    lanes::hash_all(pages)
}

/// Whether a page is all zeros. Most pages that are not differ in the first
/// bytes, so this mostly costs what it costs to look at zeros.
pub(crate) fn is_zero(page: &Page) -> bool {
    *page == ZERO_PAGE
}

/// The ids of pieces of a stream; a piece of zeros has none.
pub(crate) fn identify_pieces(pieces: &[&[u8]]) -> Vec<Option<ChunkId>> {
    pieces.par_iter().with_min_len(4).map(|piece| identify_piece(piece)).collect()
}

/// The id of a piece of a stream; one of zeros has none.
fn identify_piece(piece: &[u8]) -> Option<ChunkId> {
    let is_zero = piece.chunks(PAGE_LEN).all(|part| *part == ZERO_PAGE[..part.len()]);
    (!is_zero).then(|| ChunkId::of(piece))
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

    #[test]
    fn ids_stay_with_their_pages() {
        let pages: Vec<Page> = (0..200_u8).map(|n| [n % 5; PAGE_LEN]).collect();
        let pages: Vec<&Page> = pages.iter().collect();
        let expected: Vec<_> =
            pages.iter().map(|page| (page[0] != 0).then(|| ChunkId::of(*page))).collect();
        assert_eq!(identify(&pages), expected);
        assert_eq!(identify_here(&pages), expected);
    }
}
