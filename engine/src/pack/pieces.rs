//! Chunks of byte streams, which differ in length, in frames of their own.
//!
//! The plaintext of such a frame:
//!
//! ```text
//! length u32 of each chunk | the chunks, one behind the other
//! ```
//!
//! The tables of a pack repeat the lengths, so that nothing is decompressed to
//! know them. Every length is between 1 and that of the largest cut.

use super::directory::EntryNo;
use super::fields::{Fields, bound};
use super::frame::{Frame, FrameKind};
use crate::chunk::CUT_MAX;
use crate::error::FormatError;
use crate::id::ObjectKey;
use crate::units::{to_u32, to_u64, to_usize};

/// No frame holds more chunks of streams than this.
pub(crate) const PIECES_MAX: usize = 4096;

/// Bytes of a length.
pub(super) const LEN_LEN: usize = 4;

/// Chunks that are gathered for a frame.
#[derive(Debug, Default)]
pub(crate) struct PieceFrame {
    lens: Vec<u8>,
    bytes: Vec<u8>,
    keys: Vec<ObjectKey>,
}

impl PieceFrame {
    /// Adds a chunk.
    pub(crate) fn push(&mut self, key: ObjectKey, piece: &[u8]) {
        self.lens.extend_from_slice(&to_u32(piece.len()).to_le_bytes());
        self.bytes.extend_from_slice(piece);
        self.keys.push(key);
    }

    /// Whether a chunk fits beside the others into a frame of this length.
    /// One that is longer than a frame is a frame of its own.
    pub(crate) fn has_room(&self, piece: &[u8], len_max: usize) -> bool {
        let fits = self.bytes.len() + piece.len() <= len_max && self.keys.len() < PIECES_MAX;
        fits || self.keys.is_empty()
    }

    /// The plaintext and the keys, unless it is empty; it is empty afterwards.
    pub(crate) fn take(&mut self) -> Option<(Vec<u8>, Vec<ObjectKey>)> {
        let Self { mut lens, bytes, keys } = std::mem::take(self);
        lens.extend_from_slice(&bytes);
        (!keys.is_empty()).then_some((lens, keys))
    }
}

/// The lengths in the plaintext of a frame of so many chunks, which they fill.
pub(crate) fn lens(plain: &[u8], count: u32) -> Result<Vec<u32>, FormatError> {
    bound("frame pieces", u64::from(count), to_u64(PIECES_MAX))?;
    let count = to_usize(u64::from(count));
    let mut table = Fields::new(Fields::new(plain).take(count * LEN_LEN)?);
    let lens: Vec<u32> = (0..count).map(|_| read_len(&mut table)).collect::<Result<_, _>>()?;
    let all: u64 = lens.iter().copied().map(u64::from).sum();
    if to_u64(count * LEN_LEN) + all == to_u64(plain.len()) {
        Ok(lens)
    } else {
        Err(FormatError::Field("length of a chunk"))
    }
}

/// The chunks of a frame; they are not verified yet.
pub(crate) fn list(frame: &Frame) -> Result<Vec<&[u8]>, FormatError> {
    if frame.kind != FrameKind::Pieces {
        return Err(FormatError::Field("frame kind"));
    }
    let lens = lens(&frame.plain, frame.count)?;
    let mut rest = Fields::new(&frame.plain[lens.len() * LEN_LEN..]);
    lens.into_iter().map(|len| rest.take(to_usize(u64::from(len)))).collect()
}

fn read_len(fields: &mut Fields<'_>) -> Result<u32, FormatError> {
    let len = fields.u32()?;
    if (1..=to_u32(CUT_MAX)).contains(&len) {
        Ok(len)
    } else {
        Err(FormatError::Field("length of a chunk"))
    }
}

/// How long the chunks of streams in a pack are, ascending by their number.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct PieceLens {
    rows: Vec<(EntryNo, u32)>,
}

impl PieceLens {
    /// Adds the lengths of a frame's chunks, which begin with this one.
    pub(super) fn extend(&mut self, first: EntryNo, lens: &[u32]) {
        self.rows.extend((first.0..).map(EntryNo).zip(lens.iter().copied()));
    }

    /// Reads the lengths of a frame's chunks.
    pub(super) fn parse(fields: &mut Fields<'_>, count: u16) -> Result<Vec<u32>, FormatError> {
        (0..count).map(|_| read_len(fields)).collect()
    }

    /// The table as bytes.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        self.rows.iter().for_each(|(_, len)| out.extend_from_slice(&len.to_le_bytes()));
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.rows.len()
    }

    /// The length of one chunk.
    pub(super) fn of(&self, entry: EntryNo) -> Option<u32> {
        let at = self.rows.binary_search_by_key(&entry, |(entry, _)| *entry).ok()?;
        self.rows.get(at).map(|(_, len)| *len)
    }

    /// The lengths of neighbouring chunks.
    pub(super) fn among(&self, first: EntryNo, count: u32) -> impl Iterator<Item = u32> + '_ {
        let from = self.rows.partition_point(|(entry, _)| *entry < first);
        let rows = self.rows[from..].iter().take_while(move |(e, _)| e.0 - first.0 < count);
        rows.map(|(_, len)| *len)
    }

    /// Bytes of all of them.
    pub(super) fn sum(&self) -> u64 {
        self.rows.iter().map(|(_, len)| u64::from(*len)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::ChunkId;
    use crate::pack::frame;

    fn sample() -> (Vec<u8>, Vec<ObjectKey>) {
        let mut gathered = PieceFrame::default();
        for piece in [&[1_u8; 5000][..], &[2; 1], &[3; CUT_MAX]] {
            gathered.push(ChunkId::of(piece).key(), piece);
        }
        assert!(
            gathered.has_room(&[1], 5002 + CUT_MAX) && !gathered.has_room(&[1; 2], 5002 + CUT_MAX)
        );
        let taken = gathered.take().expect("three chunks");
        assert_eq!(gathered.take(), None);
        taken
    }

    #[test]
    fn chunks_survive_with_their_lengths() {
        let (plain, keys) = sample();
        let encoded = frame::encode(FrameKind::Pieces, &plain, keys, 1);
        assert_eq!(encoded.lens, [5000, 1, 65_536]);
        let frame = frame::decode(&encoded.bytes).expect("a sound frame");
        let pieces = list(&frame).expect("chunks");
        assert_eq!(pieces, [&[1_u8; 5000][..], &[2; 1], &[3; CUT_MAX]]);
        assert_eq!(frame.chunk(1), Some(&[2_u8][..]));
        assert_eq!((frame.chunk(3), frame.page(0)), (None, None));
    }

    #[test]
    fn other_lengths_are_refused() {
        let (plain, _) = sample();
        for (at, bad) in [(0, 0), (0, 1), (4, 0), (4, 2), (10, 2)] {
            let mut plain = plain.clone();
            plain[at] = bad;
            assert!(lens(&plain, 3).is_err(), "byte {at}");
        }
        assert!(lens(&plain[..plain.len() - 1], 3).is_err());
        assert!(lens(&plain, 2).is_err() && lens(&plain, u32::MAX).is_err());
        assert_eq!(lens(&[], 0), Ok(Vec::new()));
    }
}
