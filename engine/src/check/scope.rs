//! How much a check reads.

use crate::id::PackId;
use crate::pack::FrameSpan;

/// How much a check reads. Tables, footers, the index, trees and all that is
/// not a chunk are checked in any case.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CheckScope {
    /// Every byte.
    #[default]
    Full,
    /// No frames of chunks.
    Structure,
    /// Some frames of chunks.
    Sample {
        /// How many of a hundred.
        percent: u8,
        /// Which: the same seed takes the same frames of a pack.
        seed: u64,
    },
}

impl CheckScope {
    /// Whether a frame is to be read.
    pub(super) fn covers(self, pack: PackId, span: &FrameSpan) -> bool {
        match self {
            _ if !span.kind.holds_chunks() => true,
            Self::Full => true,
            Self::Structure => false,
            Self::Sample { percent, seed } => draw(seed, pack, span.offset) < u64::from(percent),
        }
    }

    /// Whether all frames are read, so that their common hash can be told.
    pub(super) fn is_whole(self) -> bool {
        self == Self::Full
    }
}

/// A number below 100 that depends on nothing but these.
fn draw(seed: u64, pack: PackId, offset: u64) -> u64 {
    let mut hasher = blake3::Hasher::new();
    [seed, pack.0, offset].iter().for_each(|part| {
        hasher.update(&part.to_le_bytes());
    });
    let hash = hasher.finalize();
    let bits = hash.as_bytes().first_chunk().expect("a hash has 32 bytes");
    u64::from_le_bytes(*bits) % 100
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::{EntryNo, FrameKind};

    #[test]
    fn a_sample_takes_its_share_and_all_that_is_no_page() {
        let span = |offset, kind| FrameSpan { offset, len: 100, first: EntryNo(0), count: 1, kind };
        let count = |scope: CheckScope, kind| {
            (0..10_000).filter(|at| scope.covers(PackId(3), &span(*at, kind))).count()
        };
        let sample = CheckScope::Sample { percent: 20, seed: 7 };
        assert!((1700..2300).contains(&count(sample, FrameKind::Pages)));
        assert_eq!(count(CheckScope::Sample { percent: 100, seed: 7 }, FrameKind::Pages), 10_000);
        assert_eq!(count(CheckScope::Structure, FrameKind::Pages), 0);
        assert_eq!(count(sample, FrameKind::Objects), 10_000);
    }
}
