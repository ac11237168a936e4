//! What a pack holds: its frames and the keys of their objects.
//!
//! On disk, behind the frames:
//!
//! ```text
//! frame table: for each frame   total length u32 | objects u16 | kind u8 | zero u8
//! key table:   for each object  key, 20
//! piece table: for each chunk of a frame of pieces  length u32
//! footer 96:
//!   0  magic "CPPKEND1"    24  frames u32           64  tables checksum, 16
//!   8  version u32         28  objects u32          80  footer checksum, 16
//!  12  pieces u32          32  content hash, 32
//!  16  pack id u64
//! ```
//!
//! The content hash is the BLAKE3 of everything before the frame table.

use super::fields::{Fields, bound, checksum};
use super::frame::{FrameKind, HEADER_LEN};
use super::pieces::{LEN_LEN, PieceLens};
use crate::error::FormatError;
use crate::id::{ObjectKey, PackId};
use crate::units::{
    FORMAT_VERSION, FRAME_PLAIN_LEN_MAX, PACK_ENTRIES_MAX, PAGE_LEN, to_u32, to_u64, to_usize,
};

/// Bytes of a pack before its first frame.
pub(crate) const PACK_HEADER_LEN: usize = 16;
/// Bytes of the footer.
pub(crate) const FOOTER_LEN: usize = 96;

const HEADER_MAGIC: [u8; 8] = *b"CPPACK01";
const FOOTER_MAGIC: [u8; 8] = *b"CPPKEND1";
const FRAME_ROW_LEN: usize = 8;
const TABLES_CONTEXT: &str = "coppice 2026-11 pack tables checksum v1";
const FOOTER_CONTEXT: &str = "coppice 2026-11 pack footer checksum v1";
const CONTENT_CONTEXT: &str = "coppice 2026-11 pack content v1";

/// Position of an object among all objects of its pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct EntryNo(pub(crate) u32);

/// Where a frame lies in its pack and which objects it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FrameSpan {
    /// Bytes from the start of the pack.
    pub(crate) offset: u64,
    /// Bytes of header and stored bytes.
    pub(crate) len: u32,
    /// Its first object.
    pub(crate) first: EntryNo,
    /// How many objects it holds.
    pub(crate) count: u32,
    pub(crate) kind: FrameKind,
}

/// The frames and keys of a pack.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Directory {
    pub(crate) frames: Vec<FrameSpan>,
    pub(crate) keys: Vec<ObjectKey>,
    pieces: PieceLens,
    /// Bytes of header and frames.
    pub(crate) content_len: u64,
}

/// The last bytes of a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Footer {
    pub(crate) pack: PackId,
    pub(crate) frames: u32,
    pub(crate) entries: u32,
    /// How many objects lie in frames of pieces.
    pub(crate) pieces: u32,
    pub(crate) content_hash: [u8; 32],
    tables_sum: [u8; 16],
}

/// The first bytes of every pack.
pub(crate) fn pack_header() -> [u8; PACK_HEADER_LEN] {
    let mut header = [0; PACK_HEADER_LEN];
    header[..8].copy_from_slice(&HEADER_MAGIC);
    header[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
    header
}

/// Hashes everything before the frame table.
pub(crate) fn content_hasher() -> blake3::Hasher {
    blake3::Hasher::new_derive_key(CONTENT_CONTEXT)
}

impl Directory {
    /// A pack without frames.
    pub(crate) fn empty() -> Self {
        Self { content_len: to_u64(PACK_HEADER_LEN), ..Self::default() }
    }

    /// Adds the next frame; `lens` are those of the chunks in a frame of
    /// pieces.
    pub(crate) fn push(&mut self, kind: FrameKind, len: u32, keys: &[ObjectKey], lens: &[u32]) {
        self.pieces.extend(EntryNo(to_u32(self.keys.len())), lens);
        self.frames.push(FrameSpan {
            offset: self.content_len,
            len,
            first: EntryNo(to_u32(self.keys.len())),
            count: to_u32(keys.len()),
            kind,
        });
        self.keys.extend_from_slice(keys);
        self.content_len += u64::from(len);
    }

    /// The frame that holds an object, and the object's slot in it.
    pub(crate) fn find(&self, entry: EntryNo) -> Option<(FrameSpan, u32)> {
        let behind = self.frames.partition_point(|frame| frame.first <= entry);
        let frame = *self.frames.get(behind.checked_sub(1)?)?;
        let slot = entry.0 - frame.first.0;
        (slot < frame.count).then_some((frame, slot))
    }

    /// The key of an object.
    pub(crate) fn key(&self, entry: EntryNo) -> Option<ObjectKey> {
        self.keys.get(to_usize(u64::from(entry.0))).copied()
    }

    /// How many chunks it holds.
    pub(crate) fn chunks(&self) -> u64 {
        let frames = self.frames.iter().filter(|frame| frame.kind.holds_chunks());
        frames.map(|frame| u64::from(frame.count)).sum()
    }

    /// Plaintext bytes of all its chunks.
    pub(crate) fn chunk_bytes(&self) -> u64 {
        (self.chunks() - to_u64(self.pieces.count())) * to_u64(PAGE_LEN) + self.pieces.sum()
    }

    /// Plaintext bytes of an object that lies in this frame, if it is a chunk,
    /// else nothing.
    pub(crate) fn chunk_len(&self, frame: &FrameSpan, entry: EntryNo) -> u64 {
        match frame.kind {
            FrameKind::Pages => to_u64(PAGE_LEN),
            FrameKind::Pieces => self.pieces.of(entry).map_or(0, u64::from),
            FrameKind::Objects | FrameKind::Catalog => 0,
        }
    }

    /// The lengths of the chunks in a frame of pieces.
    pub(crate) fn piece_lens(&self, frame: &FrameSpan) -> Vec<u32> {
        self.pieces.among(frame.first, frame.count).collect()
    }

    /// About how much memory it takes, in bytes.
    pub(crate) fn memory_len(&self) -> usize {
        self.frames.len() * size_of::<FrameSpan>()
            + self.keys.len() * ObjectKey::LEN
            + self.pieces.count() * size_of::<(EntryNo, u32)>()
    }

    /// Tables and footer, to be put behind the frames.
    pub(crate) fn trailer(&self, pack: PackId, content_hash: &[u8; 32]) -> Vec<u8> {
        let tables_len = self.frames.len() * FRAME_ROW_LEN
            + self.keys.len() * ObjectKey::LEN
            + self.pieces.count() * LEN_LEN;
        let mut out = Vec::with_capacity(tables_len + FOOTER_LEN);
        for frame in &self.frames {
            let count = u16::try_from(frame.count).expect("a frame holds fewer than 2^16 objects");
            out.extend_from_slice(&frame.len.to_le_bytes());
            out.extend_from_slice(&count.to_le_bytes());
            out.extend_from_slice(&[frame.kind.code(), 0]);
        }
        for key in &self.keys {
            out.extend_from_slice(&key.0);
        }
        self.pieces.encode(&mut out);
        let tables_sum = checksum(TABLES_CONTEXT, &[&out]);
        let start = out.len();
        out.extend_from_slice(&FOOTER_MAGIC);
        out.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        out.extend_from_slice(&to_u32(self.pieces.count()).to_le_bytes());
        out.extend_from_slice(&pack.0.to_le_bytes());
        out.extend_from_slice(&to_u32(self.frames.len()).to_le_bytes());
        out.extend_from_slice(&to_u32(self.keys.len()).to_le_bytes());
        out.extend_from_slice(content_hash);
        out.extend_from_slice(&tables_sum);
        let footer_sum = checksum(FOOTER_CONTEXT, &[&out[start..]]);
        out.extend_from_slice(&footer_sum);
        out
    }
}

impl Footer {
    /// Reads the last [`FOOTER_LEN`] bytes of a pack.
    pub(crate) fn parse(bytes: &[u8; FOOTER_LEN]) -> Result<Self, FormatError> {
        let mut fields = Fields::new(bytes);
        if fields.array()? != FOOTER_MAGIC {
            return Err(FormatError::Magic);
        }
        if checksum(FOOTER_CONTEXT, &[&bytes[..80]]) != bytes[80..] {
            return Err(FormatError::Checksum);
        }
        match fields.u32()? {
            FORMAT_VERSION => {}
            version => return Err(FormatError::Version(version)),
        }
        let pieces = fields.u32()?;
        let footer = Self {
            pieces,
            pack: PackId(fields.u64()?),
            frames: fields.u32()?,
            entries: fields.u32()?,
            content_hash: fields.array()?,
            tables_sum: fields.array()?,
        };
        bound("pack objects", u64::from(footer.entries), u64::from(PACK_ENTRIES_MAX))?;
        bound("pack frames", u64::from(footer.frames), u64::from(footer.entries))?;
        bound("pack pieces", u64::from(footer.pieces), u64::from(footer.entries))?;
        Ok(footer)
    }

    /// Bytes of the tables before the footer.
    pub(crate) fn tables_len(&self) -> u64 {
        u64::from(self.frames) * to_u64(FRAME_ROW_LEN)
            + u64::from(self.entries) * to_u64(ObjectKey::LEN)
            + u64::from(self.pieces) * to_u64(LEN_LEN)
    }

    /// Reads the tables, which must be exactly `bytes`.
    pub(crate) fn parse_tables(&self, bytes: &[u8]) -> Result<Directory, FormatError> {
        if to_u64(bytes.len()) != self.tables_len() {
            return Err(FormatError::Short);
        }
        if checksum(TABLES_CONTEXT, &[bytes]) != self.tables_sum {
            return Err(FormatError::Checksum);
        }
        let frames_len = to_usize(u64::from(self.frames)) * FRAME_ROW_LEN;
        let mut rows = Fields::new(&bytes[..frames_len]);
        let keys_end = frames_len + to_usize(u64::from(self.entries)) * ObjectKey::LEN;
        let (keys, _) = bytes[frames_len..keys_end].as_chunks::<{ ObjectKey::LEN }>();
        let mut pieces = Fields::new(&bytes[keys_end..]);
        let keys: Vec<ObjectKey> = keys.iter().copied().map(ObjectKey).collect();
        let mut directory = Directory::empty();
        let mut first = 0;
        while !rows.is_empty() {
            let (kind, len, count) = parse_row(&mut rows)?;
            let after = first + usize::from(count);
            let own = keys.get(first..after).ok_or(FormatError::Field("pack objects"))?;
            let lens = match kind {
                FrameKind::Pieces => PieceLens::parse(&mut pieces, count)?,
                FrameKind::Pages | FrameKind::Objects | FrameKind::Catalog => Vec::new(),
            };
            directory.push(kind, len, own, &lens);
            first = after;
        }
        pieces.end()?;
        if first == keys.len() { Ok(directory) } else { Err(FormatError::Field("pack objects")) }
    }
}

fn parse_row(rows: &mut Fields<'_>) -> Result<(FrameKind, u32, u16), FormatError> {
    let len = rows.u32()?;
    bound("frame length", u64::from(len), to_u64(HEADER_LEN + FRAME_PLAIN_LEN_MAX))?;
    if to_usize(u64::from(len)) < HEADER_LEN {
        return Err(FormatError::Field("frame length"));
    }
    let count = rows.u16()?;
    let kind = FrameKind::from_code(rows.u8()?)?;
    rows.zeros(1, "frame table")?;
    Ok((kind, len, count))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::ChunkId;

    fn sample() -> Directory {
        let keys: Vec<_> = (0..5_u8).map(|n| ChunkId::of(&[n]).key()).collect();
        let mut directory = Directory::empty();
        directory.push(FrameKind::Pages, 100, &keys[..2], &[]);
        directory.push(FrameKind::Pieces, 100, &keys[2..4], &[7, 65_536]);
        directory.push(FrameKind::Catalog, 200, &keys[4..], &[]);
        directory
    }

    #[test]
    fn tables_survive() {
        let directory = sample();
        let trailer = directory.trailer(PackId(9), &[7; 32]);
        let (tables, footer) = trailer.split_last_chunk().expect("a footer");
        let footer = Footer::parse(footer).expect("a sound footer");
        assert_eq!((footer.pack, footer.content_hash), (PackId(9), [7; 32]));
        assert_eq!(footer.parse_tables(tables), Ok(directory));
    }

    #[test]
    fn entries_are_found_in_their_frames() {
        let directory = sample();
        let place = |entry| directory.find(EntryNo(entry)).map(|(f, slot)| (f.offset, slot));
        assert_eq!(place(0), Some((16, 0)));
        assert_eq!(place(1), Some((16, 1)));
        assert_eq!(place(3), Some((116, 1)));
        assert_eq!(place(4), Some((216, 0)));
        assert_eq!(place(5), None);
        assert_eq!((directory.chunks(), directory.chunk_bytes()), (4, 2 * 4096 + 7 + 65_536));
        let len =
            |frame: usize, entry| directory.chunk_len(&directory.frames[frame], EntryNo(entry));
        assert_eq!([len(0, 1), len(1, 2), len(1, 3), len(2, 4)], [4096, 7, 65_536, 0]);
        assert_eq!(directory.piece_lens(&directory.frames[1]), [7, 65_536]);
        assert!(directory.piece_lens(&directory.frames[2]).is_empty());
    }

    #[test]
    fn every_flipped_bit_is_seen() {
        let trailer = sample().trailer(PackId(9), &[7; 32]);
        for at in 0..trailer.len() {
            let mut bytes = trailer.clone();
            bytes[at] ^= 0x10;
            let (tables, footer) = bytes.split_last_chunk().expect("a footer");
            let read = Footer::parse(footer).and_then(|footer| footer.parse_tables(tables));
            assert!(read.is_err(), "byte {at}");
        }
    }
}
