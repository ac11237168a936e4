//! A page map as bytes, to hand it to another process.
//!
//! ```text
//! magic "CPMAP001" | image length u64 | frames u64 | pages u64 | checksum, 16
//! for each frame: pack id u64 | offset u64 | length u32 | pages u32
//! for each page:  page u32 | frame u32 | slot u32 | chunk id, 32
//! ```

use super::map::{FrameRef, PageMap, Row};
use crate::error::FormatError;
use crate::id::{ChunkId, PackId};
use crate::pack::fields::{Fields, bound, checksum};
use crate::pack::frame::HEADER_LEN;
use crate::pack::pieces::PIECES_MAX;
use crate::units::{FRAME_PLAIN_LEN_MAX, IMAGE_LEN_MAX, PACK_LEN_MAX, pages_of, to_u64, to_usize};

const MAGIC: [u8; 8] = *b"CPMAP001";
const HEAD_LEN: usize = 48;
const FRAME_LEN: usize = 24;
const ROW_LEN: usize = 44;
const CONTEXT: &str = "coppice 2026-11 page map checksum v1";

impl PageMap {
    /// The map as bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let rows = self.rows();
        let len = HEAD_LEN + self.frames().len() * FRAME_LEN + rows.len() * ROW_LEN;
        let mut out = Vec::with_capacity(len);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&self.len().to_le_bytes());
        out.extend_from_slice(&to_u64(self.frames().len()).to_le_bytes());
        out.extend_from_slice(&to_u64(rows.len()).to_le_bytes());
        out.extend_from_slice(&[0; 16]);
        for frame in self.frames() {
            out.extend_from_slice(&frame.pack.0.to_le_bytes());
            out.extend_from_slice(&frame.offset.to_le_bytes());
            out.extend_from_slice(&frame.len.to_le_bytes());
            out.extend_from_slice(&frame.count.to_le_bytes());
        }
        for row in rows {
            out.extend_from_slice(&row.page.to_le_bytes());
            out.extend_from_slice(&row.frame.to_le_bytes());
            out.extend_from_slice(&row.slot.to_le_bytes());
            out.extend_from_slice(row.chunk.as_bytes());
        }
        let sum = checksum(CONTEXT, &[&out[..32], &out[HEAD_LEN..]]);
        out[32..HEAD_LEN].copy_from_slice(&sum);
        out
    }

    /// Reads a map; every number in it is checked before it is used.
    ///
    /// # Errors
    /// Says what is wrong with the bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut fields = Fields::new(bytes);
        if fields.array()? != MAGIC {
            return Err(FormatError::Magic);
        }
        let len = fields.u64()?;
        bound("image length", len, IMAGE_LEN_MAX)?;
        let frames = fields.u64()?;
        bound("frames", frames, to_u64(bytes.len() / FRAME_LEN))?;
        let rows = fields.u64()?;
        bound("pages", rows, to_u64(bytes.len() / ROW_LEN))?;
        bound("pages", rows, pages_of(len))?;
        let sum: [u8; 16] = fields.array()?;
        if checksum(CONTEXT, &[&bytes[..32], &bytes[HEAD_LEN..]]) != sum {
            return Err(FormatError::Checksum);
        }
        let frames: Vec<FrameRef> =
            (0..frames).map(|_| read_frame(&mut fields)).collect::<Result<_, _>>()?;
        let mut next_page = 0;
        let mut read = || {
            let row = read_row(&mut fields, &frames, next_page, pages_of(len))?;
            next_page = u64::from(row.page) + 1;
            Ok(row)
        };
        let rows: Vec<Row> = (0..rows).map(|_| read()).collect::<Result<_, FormatError>>()?;
        fields.end()?;
        Ok(Self::new(len, frames, rows))
    }
}

fn read_frame(fields: &mut Fields<'_>) -> Result<FrameRef, FormatError> {
    let frame = FrameRef {
        pack: PackId(fields.u64()?),
        offset: fields.u64()?,
        len: fields.u32()?,
        count: fields.u32()?,
    };
    bound("pack id", frame.pack.0, PackId::LIMIT - 1)?;
    bound("frame offset", frame.offset, PACK_LEN_MAX)?;
    bound("frame length", u64::from(frame.len), to_u64(HEADER_LEN + FRAME_PLAIN_LEN_MAX))?;
    bound("frame pages", u64::from(frame.count), to_u64(PIECES_MAX))?;
    if to_usize(u64::from(frame.len)) < HEADER_LEN {
        return Err(FormatError::Field("frame length"));
    }
    Ok(frame)
}

fn read_row(
    fields: &mut Fields<'_>,
    frames: &[FrameRef],
    next_page: u64,
    pages: u64,
) -> Result<Row, FormatError> {
    let row = Row {
        page: fields.u32()?,
        frame: fields.u32()?,
        slot: fields.u32()?,
        chunk: ChunkId::from_bytes(fields.array()?),
    };
    if u64::from(row.page) < next_page || u64::from(row.page) >= pages {
        return Err(FormatError::Field("page"));
    }
    match frames.get(to_usize(u64::from(row.frame))) {
        Some(frame) if row.slot < frame.count => Ok(row),
        _ => Err(FormatError::Field("frame of a page")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::map::Extent;
    use super::*;

    fn sample() -> PageMap {
        let frame = |offset| FrameRef { pack: PackId(3), offset, len: 500, count: 2 };
        let row = |page, frame, slot| Row { page, frame, slot, chunk: ChunkId::of(b"c") };
        let rows = vec![row(1, 0, 0), row(2, 1, 1), row(7, 0, 1)];
        PageMap::new(8 * 4096, vec![frame(16), frame(516)], rows)
    }

    #[test]
    fn maps_survive() {
        let map = sample();
        let read = PageMap::from_bytes(&map.to_bytes()).expect("a sound map");
        assert_eq!(read, map);
        assert_eq!(read.extent(0), Extent::Zero);
        assert_eq!(read.extent(1 << 40), Extent::Zero);
        assert!(matches!(read.extent(7), Extent::Stored(at) if at.slot == 1));
        assert_eq!(read.packs(), [PackId(3)]);
        assert_eq!(read.stored(2..8).map(|(page, _)| page).collect::<Vec<_>>(), [2, 7]);
        let mates: Vec<_> = read.companions(0, 64).map(|row| row.page).collect();
        assert_eq!(mates, [1, 7]);
        let nearest: Vec<_> = read.companions(2, 1).map(|row| row.page).collect();
        assert_eq!(nearest, [7]);
    }

    #[test]
    fn other_bytes_are_refused() {
        let bytes = sample().to_bytes();
        for len in 0..bytes.len() {
            assert!(PageMap::from_bytes(&bytes[..len]).is_err(), "length {len}");
        }
        for at in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[at] ^= 0x40;
            assert!(PageMap::from_bytes(&bytes).is_err(), "byte {at}");
        }
    }
}
