//! Where a byte stream is cut: FastCDC, so that an insertion moves cuts only
//! around itself. The cuts are part of the format: roots depend on them.

use fastcdc::v2020::{FastCDC, Normalization};

/// No chunk of a stream is shorter than this, in bytes, but the last one.
pub(crate) const CUT_MIN: usize = 4 << 10;
/// From this length on, cuts are made more readily.
const CUT_AVERAGE: usize = 16 << 10;
/// No chunk of a stream is longer than this, in bytes.
pub(crate) const CUT_MAX: usize = 64 << 10;

/// Cuts the front of `bytes`, which begin at a cut. Without the stream's end,
/// bytes that a later one could still move a cut in are left over; so the
/// cuts do not depend on how the stream was read.
pub(crate) fn cut(bytes: &[u8], is_end: bool) -> Vec<&[u8]> {
    let cutter = FastCDC::with_level(bytes, CUT_MIN, CUT_AVERAGE, CUT_MAX, Normalization::Level1);
    let mut pieces = Vec::with_capacity(bytes.len() / CUT_AVERAGE + 1);
    let mut start = 0;
    while bytes.len() - start >= if is_end { 1 } else { CUT_MAX } {
        let (_, end) = cutter.cut(start, bytes.len() - start);
        pieces.push(&bytes[start..end]);
        start = end;
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        bytes
    }

    #[test]
    fn lengths_are_bounded_and_cover_everything() {
        let bytes = noise(4 << 20);
        let pieces = cut(&bytes, true);
        assert_eq!(pieces.concat(), bytes);
        let (last, others) = pieces.split_last().expect("pieces");
        assert!(others.iter().all(|piece| (CUT_MIN..=CUT_MAX).contains(&piece.len())));
        assert!((1..=CUT_MAX).contains(&last.len()));
        let average = bytes.len() / pieces.len();
        assert!((CUT_AVERAGE / 2..CUT_AVERAGE * 2).contains(&average), "{average}");
    }

    #[test]
    fn short_and_monotonous_streams() {
        for (len, lens) in [
            (0, vec![]),
            (1, vec![1]),
            (CUT_MIN, vec![CUT_MIN]),
            (CUT_MAX, vec![CUT_MAX]),
            (CUT_MAX + 1, vec![CUT_MAX, 1]),
        ] {
            let bytes = vec![0; len];
            let found: Vec<usize> = cut(&bytes, true).iter().map(|piece| piece.len()).collect();
            assert_eq!(found, lens);
        }
        assert!(cut(&vec![0; CUT_MAX - 1], false).is_empty());
    }

    #[test]
    fn the_end_moves_no_cut_that_was_made() {
        let bytes = noise(1 << 20);
        let all = cut(&bytes, true);
        for len in [CUT_MAX, 200_001, 777_777] {
            let early = cut(&bytes[..len], false);
            assert!(!early.is_empty());
            assert_eq!(early, all[..early.len()]);
        }
    }
}
