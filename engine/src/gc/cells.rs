//! Which chunks go into one frame: those that the same images need and that
//! lie near each other in them.
//!
//! Chunks are points in three dimensions: when one came, the last image that
//! has it, and the page. Halving the widest dimension until a frame is full
//! gives cells of about one shape, so an image needs most frames whole or not
//! at all: only the cells through which its own planes go are needed in part.

use super::lifetimes::Life;
use crate::read::Location;

/// How much more it counts that pages lie near each other than that they are
/// needed at the same time.
const NEARNESS: u64 = 4;

/// A chunk that is to be placed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Point {
    pub(super) life: Life,
    /// The first image that has it, or about how long before the first one
    /// that is looked at it came.
    pub(super) born: i64,
    pub(super) at: Location,
}

/// How long the dimensions are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extent {
    /// Images of the family.
    pub(super) images: u64,
    /// Pages of its longest image.
    pub(super) pages: u64,
}

/// Groups of up to `in_frame` chunks, each in the order of its pages.
pub(super) fn cells(mut points: Vec<Point>, in_frame: usize, extent: Extent) -> Vec<Vec<Point>> {
    let mut out = Vec::new();
    split(&mut points, in_frame.max(1), extent, &mut out);
    out
}

type Dimension = fn(&Point) -> i64;

const DIMENSIONS: [Dimension; 3] =
    [|point| point.life.page.cast_signed(), |point| point.born, |point| i64::from(point.life.last)];

fn split(points: &mut [Point], in_frame: usize, extent: Extent, out: &mut Vec<Vec<Point>>) {
    if points.len() <= in_frame {
        points.sort_unstable_by_key(|point| point.life.page);
        if !points.is_empty() {
            out.push(points.to_vec());
        }
        return;
    }
    let lengths = [extent.pages, extent.images, extent.images];
    let width = |number: usize| {
        let of = DIMENSIONS[number];
        let least = points.iter().map(of).min().unwrap_or(0);
        let most = points.iter().map(of).max().unwrap_or(0);
        let weight = if number == 0 { NEARNESS } else { 1 };
        // In millionths of the whole.
        most.abs_diff(least) * weight * 1_000_000 / lengths[number].max(1)
    };
    let widest = (0..DIMENSIONS.len()).rev().max_by_key(|number| width(*number)).unwrap_or(0);
    let of = DIMENSIONS[widest];
    points.sort_unstable_by_key(|point| (of(point), point.life.page));
    let half = (points.len() / 2).next_multiple_of(in_frame);
    let middle = if half < points.len() { half } else { half - in_frame };
    let (left, right) = points.split_at_mut(middle.max(in_frame));
    split(left, in_frame, extent, out);
    split(right, in_frame, extent, out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{ChunkId, PackId};
    use crate::read::FrameRef;

    fn point(first: u32, last: u32, page: u64) -> Point {
        let frame = FrameRef { pack: PackId(1), offset: 16, len: 100, count: 1 };
        let at = Location { chunk: ChunkId::of(&page.to_le_bytes()), frame, slot: 0 };
        Point { life: Life { first, last, page }, born: i64::from(first), at }
    }

    #[test]
    fn pages_of_one_image_are_in_order_and_frames_full() {
        let points: Vec<Point> = (0..100).rev().map(|page| point(0, 0, page)).collect();
        let cells = cells(points, 16, Extent { images: 1, pages: 100 });
        let pages: Vec<u64> = cells.iter().flatten().map(|point| point.life.page).collect();
        assert_eq!(pages, (0..100).collect::<Vec<_>>());
        assert_eq!(cells.len(), 7);
    }

    #[test]
    fn what_is_needed_at_different_times_lies_apart() {
        let old = (0..64).map(|page| point(0, 4, page));
        let new = (0..64).map(|page| point(5, 9, page));
        let cells = cells(old.chain(new).collect(), 16, Extent { images: 10, pages: 4096 });
        assert_eq!(cells.len(), 8);
        for cell in cells {
            let first = cell[0].life.first;
            assert!(cell.len() == 16 && cell.iter().all(|point| point.life.first == first));
        }
    }
}
