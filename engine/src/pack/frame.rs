//! Frames: neighbouring objects compressed together, the unit of reading.
//!
//! ```text
//!  0  magic "CPF1"      12  plain length u32    48  tag, 16 (zero: no cipher)
//!  4  codec u8          16  objects u32         64  checksum, 16
//!  5  kind u8           20  zero u32            80  stored bytes
//!  6  cipher u8 (0)     24  nonce, 24 (zero)
//!  7  zero u8            8  stored length u32
//! ```
//!
//! The checksum covers the header before it and the stored bytes, and is
//! verified before anything is decompressed.

use std::cell::RefCell;
use std::sync::OnceLock;

use zstd::bulk::{Compressor, Decompressor};

use super::fields::{Fields, bound, checksum};
use super::object::{self, Object};
use super::pieces;
use crate::error::FormatError;
use crate::id::ObjectKey;
use crate::units::{FRAME_PLAIN_LEN_MAX, PAGE_LEN, to_u32, to_u64, to_usize};

/// Bytes of a frame before its stored bytes.
pub(crate) const HEADER_LEN: usize = 80;

/// Begins every frame.
pub(crate) const MAGIC: [u8; 4] = *b"CPF1";

/// No frame holds more objects than its row in the frame table can say.
const OBJECTS_MAX: u16 = u16::MAX;

const CHECKED_LEN: usize = 64;
const CONTEXT: &str = "coppice 2026-11 frame checksum v1";
const CODEC_RAW: u8 = 0;
const CODEC_ZSTD: u8 = 1;

/// What a frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FrameKind {
    /// Whole pages, one behind the other.
    Pages,
    /// Nodes and image roots.
    Objects,
    /// Snapshot records and catalog events.
    Catalog,
    /// Chunks of streams, behind their lengths.
    Pieces,
}

impl FrameKind {
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Pages => 1,
            Self::Objects => 2,
            Self::Catalog => 3,
            Self::Pieces => 4,
        }
    }

    /// Whether its objects are chunks.
    pub(crate) fn holds_chunks(self) -> bool {
        matches!(self, Self::Pages | Self::Pieces)
    }

    pub(crate) fn from_code(code: u8) -> Result<Self, FormatError> {
        match code {
            1 => Ok(Self::Pages),
            2 => Ok(Self::Objects),
            3 => Ok(Self::Catalog),
            4 => Ok(Self::Pieces),
            _ => Err(FormatError::Field("frame kind")),
        }
    }
}

/// A frame as it goes into a pack.
#[derive(Debug)]
pub(crate) struct EncodedFrame {
    pub(crate) kind: FrameKind,
    /// Header and stored bytes.
    pub(crate) bytes: Vec<u8>,
    /// Keys of its objects, in order.
    pub(crate) keys: Vec<ObjectKey>,
    /// Lengths of the chunks in a frame of pieces, in order.
    pub(crate) lens: Vec<u32>,
}

/// The decoded header of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FrameHeader {
    codec: u8,
    pub(crate) kind: FrameKind,
    pub(crate) stored_len: u32,
    pub(crate) plain_len: u32,
    pub(crate) count: u32,
}

/// A frame that was read, checked and decompressed.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) kind: FrameKind,
    pub(crate) count: u32,
    pub(crate) plain: Vec<u8>,
    /// Where its objects begin, once somebody asked; a frame is kept and asked
    /// for one object after the other.
    starts: OnceLock<Box<[u32]>>,
}

impl Frame {
    pub(crate) fn new(kind: FrameKind, count: u32, plain: Vec<u8>) -> Self {
        Self { kind, count, plain, starts: OnceLock::new() }
    }

    /// An object that is not a chunk, if there are so many; it is not verified
    /// yet.
    pub(crate) fn object(&self, slot: u32) -> Result<Option<Object<'_>>, FormatError> {
        let starts = match self.starts.get() {
            Some(starts) => starts,
            None => {
                let starts = object::starts(self)?;
                self.starts.get_or_init(|| starts)
            }
        };
        let start = starts.get(to_usize(u64::from(slot)));
        start.map(|start| object::at(self, to_usize(u64::from(*start)))).transpose()
    }

    /// The chunk in a slot; it is not verified yet.
    pub(crate) fn chunk(&self, slot: u32) -> Option<&[u8]> {
        let slot = to_usize(u64::from(slot));
        match self.kind {
            FrameKind::Pages => {
                let (pages, _) = self.plain.as_chunks::<PAGE_LEN>();
                pages.get(slot).map(<[u8; PAGE_LEN]>::as_slice)
            }
            FrameKind::Pieces => pieces::list(self).ok()?.get(slot).copied(),
            FrameKind::Objects | FrameKind::Catalog => None,
        }
    }

    /// The chunk in a slot if it is as long as a page; it is not verified yet.
    pub(crate) fn page(&self, slot: u32) -> Option<&[u8; PAGE_LEN]> {
        self.chunk(slot)?.try_into().ok()
    }

    /// The lengths of its chunks, if it is a frame of pieces.
    pub(crate) fn lens(&self) -> Result<Vec<u32>, FormatError> {
        lens_in(self.kind, &self.plain, self.count)
    }
}

/// Compresses `plain`, or keeps it raw if that is not longer.
pub(crate) fn encode(
    kind: FrameKind,
    plain: &[u8],
    keys: Vec<ObjectKey>,
    level: i32,
) -> EncodedFrame {
    assert!(plain.len() <= FRAME_PLAIN_LEN_MAX, "a frame stays within the format's limit");
    let mut bytes = vec![0; HEADER_LEN];
    let codec = if compress_behind(&mut bytes, plain, level) {
        CODEC_ZSTD
    } else {
        bytes.truncate(HEADER_LEN);
        bytes.extend_from_slice(plain);
        CODEC_RAW
    };
    let stored_len = to_u32(bytes.len() - HEADER_LEN);
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4] = codec;
    bytes[5] = kind.code();
    bytes[8..12].copy_from_slice(&stored_len.to_le_bytes());
    bytes[12..16].copy_from_slice(&to_u32(plain.len()).to_le_bytes());
    bytes[16..20].copy_from_slice(&to_u32(keys.len()).to_le_bytes());
    let sum = checksum(CONTEXT, &[&bytes[..CHECKED_LEN], &bytes[HEADER_LEN..]]);
    bytes[CHECKED_LEN..HEADER_LEN].copy_from_slice(&sum);
    let lens = lens_in(kind, plain, to_u32(keys.len())).expect("pieces come with their lengths");
    EncodedFrame { kind, bytes, keys, lens }
}

fn lens_in(kind: FrameKind, plain: &[u8], count: u32) -> Result<Vec<u32>, FormatError> {
    match kind {
        FrameKind::Pieces => pieces::lens(plain, count),
        FrameKind::Pages | FrameKind::Objects | FrameKind::Catalog => Ok(Vec::new()),
    }
}

/// Appends the compressed form to `bytes`; false if that gains nothing.
fn compress_behind(bytes: &mut Vec<u8>, plain: &[u8], level: i32) -> bool {
    thread_local! {
        static COMPRESSOR: RefCell<Option<(i32, Compressor<'static>)>> = const { RefCell::new(None) };
    }
    COMPRESSOR.with_borrow_mut(|kept| {
        if kept.as_ref().is_none_or(|(for_level, _)| *for_level != level) {
            *kept = Compressor::new(level).ok().map(|compressor| (level, compressor));
        }
        let Some((_, compressor)) = kept else { return false };
        let mut packed = Vec::with_capacity(plain.len());
        // Running out of room means that the result would not be shorter.
        match compressor.compress_to_buffer(plain, &mut packed) {
            Ok(len) if len < plain.len() => {
                bytes.extend_from_slice(&packed);
                true
            }
            Ok(_) | Err(_) => false,
        }
    })
}

impl FrameHeader {
    /// Reads a header and bounds what it says; its checksum is not known yet.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut fields = Fields::new(bytes);
        if fields.array()? != MAGIC {
            return Err(FormatError::Magic);
        }
        let codec = fields.u8()?;
        let kind = FrameKind::from_code(fields.u8()?)?;
        fields.zeros(2, "frame cipher")?;
        let header = Self {
            codec,
            kind,
            stored_len: fields.u32()?,
            plain_len: fields.u32()?,
            count: fields.u32()?,
        };
        fields.zeros(44, "frame nonce")?;
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<(), FormatError> {
        let limit = to_u64(FRAME_PLAIN_LEN_MAX);
        bound("frame plain length", u64::from(self.plain_len), limit)?;
        bound("frame stored length", u64::from(self.stored_len), u64::from(self.plain_len))?;
        let objects_max = u64::from(self.plain_len).min(u64::from(OBJECTS_MAX));
        bound("frame objects", u64::from(self.count), objects_max)?;
        let page_len = to_u32(PAGE_LEN);
        match (self.codec, self.kind) {
            (CODEC_RAW, _) if self.stored_len != self.plain_len => {
                Err(FormatError::Field("frame raw length"))
            }
            (CODEC_RAW | CODEC_ZSTD, FrameKind::Pages)
                if u64::from(self.count) * u64::from(page_len) != u64::from(self.plain_len) =>
            {
                Err(FormatError::Field("frame pages"))
            }
            (CODEC_RAW | CODEC_ZSTD, _) => Ok(()),
            _ => Err(FormatError::Field("frame codec")),
        }
    }

    /// Bytes of the whole frame.
    pub(crate) fn total_len(&self) -> u64 {
        to_u64(HEADER_LEN) + u64::from(self.stored_len)
    }
}

/// Checks and decompresses a frame, which must be exactly `bytes`.
pub(crate) fn decode(bytes: &[u8]) -> Result<Frame, FormatError> {
    let header = FrameHeader::parse(bytes)?;
    if to_u64(bytes.len()) != header.total_len() {
        return Err(FormatError::Short);
    }
    let stored = &bytes[HEADER_LEN..];
    if checksum(CONTEXT, &[&bytes[..CHECKED_LEN], stored]) != bytes[CHECKED_LEN..HEADER_LEN] {
        return Err(FormatError::Checksum);
    }
    let plain = match header.codec {
        CODEC_RAW => stored.to_vec(),
        _ => decompress(stored, to_usize(u64::from(header.plain_len)))?,
    };
    Ok(Frame::new(header.kind, header.count, plain))
}

fn decompress(stored: &[u8], plain_len: usize) -> Result<Vec<u8>, FormatError> {
    thread_local! {
        static DECOMPRESSOR: RefCell<Decompressor<'static>> = RefCell::new(Decompressor::default());
    }
    DECOMPRESSOR.with_borrow_mut(|decompressor| {
        let mut plain = Vec::with_capacity(plain_len);
        match decompressor.decompress_to_buffer(stored, &mut plain) {
            Ok(len) if len == plain_len => Ok(plain),
            Ok(_) | Err(_) => Err(FormatError::Decompress),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::ChunkId;

    fn key() -> ObjectKey {
        ChunkId::of(b"k").key()
    }

    #[test]
    fn frames_survive_compressed_and_raw() {
        let soft = vec![1; 2 * PAGE_LEN];
        let mut hard = vec![0; PAGE_LEN];
        blake3::Hasher::new().finalize_xof().fill(&mut hard);
        for (plain, count) in [(soft, 2), (hard, 1)] {
            let encoded = encode(FrameKind::Pages, &plain, vec![key(); count], 1);
            assert!(encoded.bytes.len() <= HEADER_LEN + plain.len());
            let frame = decode(&encoded.bytes).expect("a sound frame");
            assert_eq!(frame.plain, plain);
            assert_eq!(frame.page(0), plain.first_chunk());
            assert_eq!(frame.page(to_u32(count)), None);
        }
    }

    #[test]
    fn a_frame_of_more_objects_than_a_table_can_say_is_refused() {
        let objects = |count: usize| {
            let encoded = encode(FrameKind::Objects, &vec![0; 8 * count], vec![key(); count], 1);
            decode(&encoded.bytes).map(|frame| frame.count)
        };
        assert_eq!(objects(65_535), Ok(65_535));
        assert!(matches!(objects(65_536), Err(FormatError::TooLong { limit: 65_535, .. })));
    }

    #[test]
    fn every_flipped_bit_is_seen() {
        let encoded = encode(FrameKind::Pages, &vec![1; PAGE_LEN], vec![key()], 1);
        for at in 0..encoded.bytes.len() {
            let mut bytes = encoded.bytes.clone();
            bytes[at] ^= 1;
            assert!(decode(&bytes).is_err(), "byte {at}");
        }
        for len in 0..encoded.bytes.len() {
            assert!(decode(&encoded.bytes[..len]).is_err(), "length {len}");
        }
    }
}
