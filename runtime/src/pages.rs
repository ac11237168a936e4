//! Sets and runs of pages.

use std::ops::Range;

use crate::protocol::PageRun;

/// One bit for each page.
#[derive(Debug)]
pub(crate) struct PageSet(Box<[u64]>);

impl PageSet {
    /// The pages of these runs that lie in an image of `pages` pages. Runs may be
    /// any: a machine's process may have named them.
    pub(crate) fn of(runs: &[PageRun], pages: u64) -> Self {
        let mut set = Self::empty(pages);
        for run in runs {
            set.add(run.first..run.first.saturating_add(run.count).min(pages));
        }
        set
    }

    /// No page yet, of an image of `pages` pages.
    pub(crate) fn empty(pages: u64) -> Self {
        let words = usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX);
        Self(vec![0; words].into_boxed_slice())
    }

    /// Adds pages, a word at a time. Those beyond the image are left out.
    pub(crate) fn add(&mut self, pages: Range<u64>) {
        let mut page = pages.start;
        while page < pages.end {
            let Some(word) = self.0.get_mut(place(page).0) else { return };
            let count = (64 - page % 64).min(pages.end - page);
            *word |= (u64::MAX >> (64 - count)) << (page % 64);
            page += count;
        }
    }

    /// One that was written down.
    pub(crate) fn of_words(words: Vec<u64>) -> Self {
        Self(words.into_boxed_slice())
    }

    /// Its bits, a page each, the lowest first.
    pub(crate) fn words(&self) -> &[u64] {
        &self.0
    }

    /// Its pages, as ascending runs that do not touch.
    pub(crate) fn runs(&self) -> Vec<PageRun> {
        let mut runs: Vec<PageRun> = Vec::new();
        for (base, word) in (0..).step_by(64).zip(&self.0) {
            let mut left = *word;
            while left != 0 {
                let zeros = left.trailing_zeros();
                let ones = (left >> zeros).trailing_ones();
                // All ones would be shifted out whole.
                left &= u64::MAX.checked_shl(zeros + ones).unwrap_or(0);
                let (first, count) = (base + u64::from(zeros), u64::from(ones));
                match runs.last_mut() {
                    Some(last) if last.first + last.count == first => last.count += count,
                    _ => runs.push(PageRun { first, count }),
                }
            }
        }
        runs
    }

    /// Whether it has a page.
    pub(crate) fn contains(&self, page: u64) -> bool {
        let (word, bit) = place(page);
        self.0.get(word).is_some_and(|word| word & bit != 0)
    }
}

fn place(page: u64) -> (usize, u64) {
    (usize::try_from(page / 64).unwrap_or(usize::MAX), 1 << (page % 64))
}

/// The longest runs of pages of `run` that `wanted` names.
pub(crate) fn runs_of(run: PageRun, mut wanted: impl FnMut(u64) -> bool) -> Vec<PageRun> {
    let mut runs: Vec<PageRun> = Vec::new();
    for page in (run.first..run.first + run.count).filter(|page| wanted(*page)) {
        match runs.last_mut() {
            Some(last) if last.first + last.count == page => last.count += 1,
            _ => runs.push(PageRun { first: page, count: 1 }),
        }
    }
    runs
}

/// A run in pieces of at most `count` pages.
pub(crate) fn pieces_of(run: PageRun, count: u64) -> impl Iterator<Item = PageRun> {
    let end = run.first + run.count;
    (0..run.count.div_ceil(count)).map(move |number| {
        let first = run.first + number * count;
        PageRun { first, count: count.min(end - first) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn run(first: u64, count: u64) -> PageRun {
        PageRun { first, count }
    }

    #[test]
    fn a_set_has_what_its_runs_have() {
        let set = PageSet::of(&[run(2, 3), run(63, 2), run(129, 1)], 130);
        let has: Vec<u64> = (0..200).filter(|page| set.contains(*page)).collect();
        assert_eq!(has, [2, 3, 4, 63, 64, 129]);
    }

    #[test]
    fn runs_that_reach_beyond_the_image_are_cut_off() {
        let wild = [run(u64::MAX, u64::MAX), run(7, u64::MAX), run(1, 1), run(70, 0), run(11, 1)];
        let set = PageSet::of(&wild, 10);
        assert_eq!(set.runs(), [run(1, 1), run(7, 3)]);
    }

    #[test]
    fn the_runs_of_a_set_are_those_it_was_made_of() {
        let runs = [run(0, 1), run(2, 3), run(60, 140), run(255, 1), run(257, 63)];
        let set = PageSet::of(&runs, 320);
        assert_eq!(set.runs(), runs);
        assert_eq!(PageSet::of_words(set.words().to_vec()).runs(), runs);
        assert!(PageSet::of(&[], 320).runs().is_empty());
    }

    #[test]
    fn runs_are_the_longest() {
        assert_eq!(runs_of(run(1, 8), |page| page % 4 != 0), [run(1, 3), run(5, 3)]);
        assert!(runs_of(run(1, 8), |_| false).is_empty());
    }

    #[test]
    fn pieces_are_the_run() {
        let pieces: Vec<PageRun> = pieces_of(run(5, 7), 3).collect();
        assert_eq!(pieces, [run(5, 3), run(8, 3), run(11, 1)]);
    }
}
