//! What a capture takes of a machine's memory: its own pages, and zeros for those
//! that its guest has freed and not used since. Everything else is as in the
//! image that the capture builds on.

use anyhow::Result;
use coppice_engine::ImageWriter;
use coppice_runtime::protocol::{PAGE_SIZE, PageRun};

/// Freed runs of at least this many pages are taken out of the tree; shorter ones
/// are written as zeros, which keeps the batches of the writer whole.
const ERASE_MIN: u64 = 64;

/// A part of memory, as a capture writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Taken {
    /// The machine's own pages.
    Own(PageRun),
    /// Pages of zeros.
    Zero(PageRun),
}

/// The machine's own pages and the freed ones that are none of these, in order.
/// Both are ascending runs.
pub(crate) fn taken(own: &[PageRun], freed: &[PageRun]) -> Vec<Taken> {
    let mut parts: Vec<Taken> = own.iter().copied().map(Taken::Own).collect();
    let mut rest = own;
    for run in freed {
        let (mut first, end) = (run.first, run.first + run.count);
        while first < end {
            // Own runs that end before here are of no use to later freed runs.
            while let [past, others @ ..] = rest
                && past.first + past.count <= first
            {
                rest = others;
            }
            let next = rest.first().map_or(end, |own| own.first.clamp(first, end));
            if first < next {
                parts.push(Taken::Zero(PageRun { first, count: next - first }));
            }
            first = rest.first().map_or(end, |own| own.first + own.count).max(next);
        }
    }
    parts.sort_by_key(|part| part.run().first);
    parts
}

/// All pages of these parts, as runs that do not touch.
pub(crate) fn covered(own: &[PageRun], freed: &[PageRun]) -> Vec<PageRun> {
    let mut runs: Vec<PageRun> = Vec::new();
    for run in taken(own, freed).iter().map(Taken::run) {
        match runs.last_mut() {
            Some(last) if last.first + last.count == run.first => last.count += run.count,
            _ => runs.push(run),
        }
    }
    runs
}

impl Taken {
    fn run(&self) -> PageRun {
        match self {
            Self::Own(run) | Self::Zero(run) => *run,
        }
    }
}

/// Makes pages of an image zero.
pub(crate) fn write_zeros(writer: &mut ImageWriter<'_>, run: PageRun) -> Result<()> {
    if run.count >= ERASE_MIN {
        writer.erase(run.first, run.count)?;
    } else {
        writer.write(run.first, &vec![0; usize::try_from(run.count * PAGE_SIZE)?])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, count: u64) -> PageRun {
        PageRun { first, count }
    }

    /// The runs of the pages that `holds` names.
    fn runs(holds: impl Fn(u64) -> bool) -> Vec<PageRun> {
        let mut runs: Vec<PageRun> = Vec::new();
        for page in (0..64).filter(|page| holds(*page)) {
            match runs.last_mut() {
                Some(last) if last.first + last.count == page => last.count += 1,
                _ => runs.push(run(page, 1)),
            }
        }
        runs
    }

    #[test]
    fn own_pages_come_first_and_freed_ones_fill_what_is_left() {
        let parts = taken(&[run(4, 2), run(8, 4)], &[run(0, 5), run(7, 2), run(20, 1)]);
        let expected = [
            Taken::Zero(run(0, 4)),
            Taken::Own(run(4, 2)),
            Taken::Zero(run(7, 1)),
            Taken::Own(run(8, 4)),
            Taken::Zero(run(20, 1)),
        ];
        assert_eq!(parts, expected);
    }

    #[test]
    fn every_pattern_is_parted_page_by_page() {
        for seed in 0..2000u64 {
            let bits = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let other = (seed + 7).wrapping_mul(0xbf58_476d_1ce4_e5b9) | (bits >> (seed % 60));
            let (own, freed) =
                (runs(|page| bits >> page & 1 != 0), runs(|page| other >> page & 1 != 0));
            let parts = taken(&own, &freed);
            assert!(
                parts
                    .windows(2)
                    .all(|two| two[0].run().first + two[0].run().count <= two[1].run().first)
            );
            for page in 0..64 {
                let hit = parts.iter().find(|part| {
                    (part.run().first..part.run().first + part.run().count).contains(&page)
                });
                match (bits >> page & 1 != 0, other >> page & 1 != 0, hit) {
                    (true, _, Some(Taken::Own(_)))
                    | (false, true, Some(Taken::Zero(_)))
                    | (false, false, None) => {}
                    wrong => panic!("page {page} of {seed}: {wrong:?}"),
                }
            }
            assert_eq!(covered(&own, &freed), runs(|page| (bits | other) >> page & 1 != 0));
        }
    }
}
