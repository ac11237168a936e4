//! Which pool shows which pages of a machine's memory.
//!
//! A machine that continues from a live one maps what that one mapped, with a
//! layer on top where it had written. Each piece is a mapping, and mappings
//! are few (`PIECES_MAX`), so short gaps between written pages belong to the
//! layer too: the page server fills them from below when they are asked for.

use serde::{Deserialize, Serialize};

use crate::protocol::PageRun;

/// Mappings that a machine's memory may consist of. More cost time when a
/// machine is made: 1,000 take 5 ms, 32,000 take 180.
pub const PIECES_MAX: usize = 512;

/// Pages that one pool shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece<P> {
    /// The pages, by their index in memory; in the pool they have the same.
    pub run: PageRun,
    /// The pool.
    pub pool: P,
}

impl<P> Piece<P> {
    /// All of a memory of `pages` pages.
    pub fn whole(pages: u64, pool: P) -> Vec<Self> {
        vec![Self { run: PageRun { first: 0, count: pages }, pool }]
    }
}

/// `below` with a layer on top of it that has at least the `written` pages, in
/// at most `pieces_max` pieces. A machine that maps no pool has nothing below.
pub fn with_layer<P: Clone>(
    below: &[Piece<P>],
    written: &[PageRun],
    layer: &P,
    pages: u64,
    pieces_max: usize,
) -> Vec<Piece<P>> {
    // Each span adds itself, and cuts at most one piece in two.
    let spans_max = pieces_max.saturating_sub(below.len()) / 2;
    if below.is_empty() || (spans_max == 0 && !written.is_empty()) {
        return Piece::whole(pages, layer.clone());
    }
    let spans = spans(written, spans_max);
    let mut pieces: Vec<Piece<P>> =
        spans.iter().map(|span| Piece { run: *span, pool: layer.clone() }).collect();
    for piece in below {
        let left = without(piece.run, &spans);
        pieces.extend(left.into_iter().map(|run| Piece { run, pool: piece.pool.clone() }));
    }
    pieces.sort_by_key(|piece| piece.run.first);
    pieces
}

/// At most `spans_max` runs that have all the pages of `written`: the shortest
/// gaps are taken in.
fn spans(written: &[PageRun], spans_max: usize) -> Vec<PageRun> {
    let excess = written.len().saturating_sub(spans_max);
    let gap = |pair: &[PageRun]| pair[1].first - (pair[0].first + pair[0].count);
    let mut gaps: Vec<(u64, usize)> =
        written.windows(2).enumerate().map(|(index, pair)| (gap(pair), index + 1)).collect();
    gaps.sort_unstable();
    let mut joined = vec![false; written.len()];
    gaps.iter().take(excess).for_each(|(_, index)| joined[*index] = true);
    let mut spans: Vec<PageRun> = Vec::new();
    for (run, joined) in written.iter().zip(joined) {
        match spans.last_mut() {
            Some(last) if joined => last.count = run.first + run.count - last.first,
            _ => spans.push(*run),
        }
    }
    spans
}

/// What is left of a run when the spans, which ascend, are taken out.
fn without(run: PageRun, spans: &[PageRun]) -> Vec<PageRun> {
    let end = run.first + run.count;
    let mut left = Vec::new();
    let mut at = run.first;
    let first = spans.partition_point(|span| span.first + span.count <= run.first);
    for span in spans[first..].iter().take_while(|span| span.first < end) {
        if at < span.first {
            left.push(PageRun { first: at, count: span.first - at });
        }
        at = span.first + span.count;
    }
    if at < end {
        left.push(PageRun { first: at, count: end - at });
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn run(first: u64, count: u64) -> PageRun {
        PageRun { first, count }
    }

    fn shown(pieces: &[Piece<char>], pages: u64) -> String {
        let mut at = 0;
        for piece in pieces {
            assert_eq!(piece.run.first, at, "{pieces:?}");
            at += piece.run.count;
        }
        assert_eq!(at, pages, "{pieces:?}");
        pieces
            .iter()
            .flat_map(|piece| {
                std::iter::repeat_n(piece.pool, usize::try_from(piece.run.count).unwrap())
            })
            .collect()
    }

    #[test]
    fn a_layer_lies_on_top() {
        let base = Piece::whole(10, 'a');
        let first = with_layer(&base, &[run(2, 2), run(9, 1)], &'b', 10, 16);
        assert_eq!(shown(&first, 10), "aabbaaaaab");
        let second = with_layer(&first, &[run(0, 3), run(6, 1)], &'c', 10, 16);
        assert_eq!(shown(&second, 10), "cccbaacaab");
    }

    #[test]
    fn short_gaps_are_taken_in_when_pieces_are_few() {
        let base = Piece::whole(20, 'a');
        let written = [run(1, 1), run(3, 1), run(10, 1), run(14, 1)];
        let pieces = with_layer(&base, &written, &'b', 20, 5);
        assert_eq!(shown(&pieces, 20), "abbbaaaaaabbbbbaaaaa");
        assert!(pieces.len() <= 5);
    }

    #[test]
    fn no_room_or_nothing_below_makes_one_piece() {
        let base = Piece::whole(4, 'a');
        assert_eq!(shown(&with_layer(&base, &[run(1, 1)], &'b', 4, 2), 4), "bbbb");
        assert_eq!(shown(&with_layer(&[], &[], &'b', 4, 512), 4), "bbbb");
        assert_eq!(shown(&with_layer(&base, &[], &'b', 4, 1), 4), "aaaa");
    }

    #[test]
    fn all_that_was_written_is_the_layers_however_few_the_pieces() {
        let mut pieces = Piece::whole(1000, '0');
        for (generation, layer) in (1_u64..).zip("123456789".chars()) {
            let written: Vec<PageRun> =
                (0..40).map(|n| run(n * 25 + generation * 2, 1 + generation % 3)).collect();
            pieces = with_layer(&pieces, &written, &layer, 1000, 64);
            assert!(pieces.len() <= 64, "{}", pieces.len());
            let shown = shown(&pieces, 1000);
            for page in written.iter().flat_map(|run| run.first..run.first + run.count) {
                assert_eq!(shown.as_bytes()[usize::try_from(page).unwrap()], layer as u8);
            }
        }
    }
}
