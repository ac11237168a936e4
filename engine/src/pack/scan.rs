//! Reading what a pack holds: from its tables, or by walking its frames when
//! the tables are damaged or cut off.

use super::directory::{Directory, FOOTER_LEN, Footer, FrameSpan, PACK_HEADER_LEN, pack_header};
use super::frame::{self, Frame, FrameHeader, FrameKind, HEADER_LEN};
use super::object::{self, Object, ObjectKind};
use super::pieces;
use crate::chunk::{Page, chunk_ids};
use crate::error::{FormatError, StoreError};
use crate::id::{ChunkId, EventId, ObjectKey, PackId, Root, SnapshotId};
use crate::io::DiskFile;
use crate::units::{PACK_ENTRIES_MAX, PACK_LEN_MAX, PAGE_LEN, to_u64, to_usize};

/// The tables of a pack, and how they were had.
#[derive(Debug)]
pub(crate) struct Listing {
    pub(crate) directory: Directory,
    /// What the footer says the content hashes to; `None` if the frames were
    /// walked because the tables are damaged.
    pub(crate) content_hash: Option<[u8; 32]>,
    pub(crate) damage: Option<FormatError>,
}

/// Lists a pack from its tables, or else from its frames.
pub(crate) fn list(file: &dyn DiskFile, pack: PackId) -> Result<Listing, StoreError> {
    let path = pack.path();
    let len = file.length().map_err(StoreError::io("read", &path))?;
    match read_tables(file, pack, len) {
        Ok((directory, footer)) => {
            Ok(Listing { directory, content_hash: Some(footer.content_hash), damage: None })
        }
        Err(StoreError::Damaged { source, .. }) => {
            let (directory, end) = walk(file, len, to_usize(u64::from(PACK_ENTRIES_MAX)));
            end.map_err(StoreError::io("read", &path))?;
            Ok(Listing { directory, content_hash: None, damage: Some(source) })
        }
        Err(error) => Err(error),
    }
}

fn read_tables(
    file: &dyn DiskFile,
    pack: PackId,
    len: u64,
) -> Result<(Directory, Footer), StoreError> {
    let path = pack.path();
    let damaged = |offset| move |source| StoreError::Damaged { pack, offset, source };
    let footer_at = len.checked_sub(to_u64(FOOTER_LEN)).filter(|_| len <= PACK_LEN_MAX);
    let footer_at = footer_at.ok_or(FormatError::Short).map_err(damaged(len))?;
    let bytes = file.read_at(footer_at, FOOTER_LEN).map_err(StoreError::io("read", &path))?;
    let bytes = bytes.first_chunk().ok_or(FormatError::Short).map_err(damaged(footer_at))?;
    let footer = Footer::parse(bytes).map_err(damaged(footer_at))?;
    if footer.pack != pack {
        return Err(damaged(footer_at)(FormatError::Field("pack id")));
    }
    let room = footer_at.saturating_sub(to_u64(PACK_HEADER_LEN));
    if footer.tables_len() > room {
        return Err(damaged(footer_at)(FormatError::Short));
    }
    let tables_at = footer_at - footer.tables_len();
    let tables = file.read_at(tables_at, to_usize(footer.tables_len()));
    let tables = tables.map_err(StoreError::io("read", &path))?;
    let directory = footer.parse_tables(&tables).map_err(damaged(tables_at))?;
    if directory.content_len == tables_at {
        Ok((directory, footer))
    } else {
        Err(damaged(tables_at)(FormatError::Field("frame table")))
    }
}

/// The frames of a pack whose tables cannot be read, as far as it can be read
/// itself.
pub(crate) fn walk_readable(file: &dyn DiskFile) -> Directory {
    let len = file.length().unwrap_or(PACK_LEN_MAX);
    walk(file, len, to_usize(u64::from(PACK_ENTRIES_MAX))).0
}

/// Every sound frame from the start up to the first gap that is none, or to
/// what cannot be read. Damaged frames whose headers still make sense are
/// stepped over. No more objects are taken in than a pack may have.
fn walk(file: &dyn DiskFile, len: u64, objects_max: usize) -> (Directory, std::io::Result<()>) {
    let mut directory = Directory::empty();
    loop {
        let offset = directory.content_len;
        let bytes = match read_frame_bytes(file, offset, len.min(PACK_LEN_MAX)) {
            Ok(Some(bytes)) => bytes,
            end => return (directory, end.map(drop)),
        };
        let found = frame::decode(&bytes)
            .and_then(|frame| Ok((frame.kind, keys_of(&frame)?, frame.lens()?)));
        let frame_len = crate::units::to_u32(bytes.len());
        match found {
            Ok((_, keys, _)) if directory.keys.len() + keys.len() > objects_max => {
                return (directory, Ok(()));
            }
            Ok((kind, keys, lens)) => directory.push(kind, frame_len, &keys, &lens),
            Err(_) => directory.push(FrameKind::Objects, frame_len, &[], &[]),
        }
    }
}

fn read_frame_bytes(
    file: &dyn DiskFile,
    offset: u64,
    len: u64,
) -> std::io::Result<Option<Vec<u8>>> {
    if offset + to_u64(HEADER_LEN) > len {
        return Ok(None);
    }
    let Ok(header) = FrameHeader::parse(&file.read_at(offset, HEADER_LEN)?) else {
        return Ok(None);
    };
    if offset + header.total_len() > len {
        return Ok(None);
    }
    file.read_at(offset, to_usize(header.total_len())).map(Some)
}

/// Reads, checks and decompresses a frame of a pack.
pub(crate) fn read_frame(
    file: &dyn DiskFile,
    pack: PackId,
    span: &FrameSpan,
) -> Result<Frame, StoreError> {
    let bytes = file
        .read_at(span.offset, to_usize(u64::from(span.len)))
        .map_err(StoreError::io("read", &pack.path()))?;
    frame::decode(&bytes)
        .and_then(|frame| {
            let same = frame.kind == span.kind && frame.count == span.count;
            if same { Ok(frame) } else { Err(FormatError::Field("frame table")) }
        })
        .map_err(|source| StoreError::Damaged { pack, offset: span.offset, source })
}

/// Checks the first bytes of a pack.
pub(crate) fn check_header(file: &dyn DiskFile, pack: PackId) -> Result<(), StoreError> {
    let bytes = file.read_at(0, PACK_HEADER_LEN).map_err(StoreError::io("read", &pack.path()))?;
    if bytes == pack_header() {
        Ok(())
    } else {
        Err(StoreError::Damaged { pack, offset: 0, source: FormatError::Magic })
    }
}

/// The keys of all objects in a frame, computed from their bytes. A patched
/// node has its key in its first bytes; who applies the patch verifies it.
pub(crate) fn keys_of(frame: &Frame) -> Result<Vec<ObjectKey>, FormatError> {
    match frame.kind {
        FrameKind::Pages => {
            let (pages, _) = frame.plain.as_chunks::<PAGE_LEN>();
            let pages: Vec<&Page> = pages.iter().collect();
            Ok(chunk_ids(&pages).iter().map(ChunkId::key).collect())
        }
        FrameKind::Pieces => {
            Ok(pieces::list(frame)?.into_iter().map(|piece| ChunkId::of(piece).key()).collect())
        }
        FrameKind::Objects | FrameKind::Catalog => {
            object::list(frame)?.iter().map(key_of).collect()
        }
    }
}

fn key_of(object: &Object<'_>) -> Result<ObjectKey, FormatError> {
    Ok(match object.kind {
        ObjectKind::Node => crate::id::NodeId::of(object.bytes).key(),
        ObjectKind::NodePatch => {
            let id = object.bytes.first_chunk().ok_or(FormatError::Short)?;
            crate::id::NodeId::from_bytes(*id).key()
        }
        ObjectKind::Root => Root::of(object.bytes).key(),
        ObjectKind::Snapshot => SnapshotId::of(object.bytes).key(),
        ObjectKind::Event => EventId::of(object.bytes).key(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::{Disk, SimDisk};
    use crate::units::to_u32;

    #[test]
    fn frames_are_walked_up_to_the_limit_of_a_pack() {
        let disk = SimDisk::new();
        let file = disk.create("pack").expect("a file");
        file.write_all_at(0, &pack_header()).expect("a write");
        let mut len = to_u64(PACK_HEADER_LEN);
        for byte in 0..10_u8 {
            let plain = vec![byte + 1; 3 * PAGE_LEN];
            let keys = vec![ObjectKey([byte; ObjectKey::LEN]); 3];
            let frame = frame::encode(FrameKind::Pages, &plain, keys, 1);
            file.write_all_at(len, &frame.bytes).expect("a write");
            len += to_u64(frame.bytes.len());
        }
        for (limit, objects) in [(100, 30), (30, 30), (29, 27), (2, 0)] {
            let (directory, end) = walk(&*file, len, limit);
            assert!(end.is_ok());
            assert_eq!(to_u32(directory.keys.len()), objects);
        }
    }
}
