//! How the ledger's rows are written.

use crate::error::FormatError;
use crate::id::{NodeId, Root, SnapshotId};
use crate::pack::fields::Fields;
use crate::tree::{ImageRef, Splitter};

/// How often an object is needed.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Count {
    /// References from trees and from the catalog.
    pub(super) refs: u32,
    /// Patches that need it as their base.
    pub(super) bases: u32,
    /// The node that it is stored as a patch of.
    pub(super) patch_of: Option<NodeId>,
}

impl Count {
    /// What most objects have; it takes no row.
    pub(super) const ONE: Self = Self { refs: 1, bases: 0, patch_of: None };

    pub(super) fn is_needed(&self) -> bool {
        self.refs > 0 || self.bases > 0
    }

    /// `refs u32 | bases u32 | id of the base, 32, if there is one`
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = self.refs.to_le_bytes().to_vec();
        out.extend_from_slice(&self.bases.to_le_bytes());
        out.extend(self.patch_of.iter().flat_map(|base| *base.as_bytes()));
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut fields = Fields::new(bytes);
        let (refs, bases) = (fields.u32()?, fields.u32()?);
        let patch_of =
            if fields.is_empty() { None } else { Some(NodeId::from_bytes(fields.array()?)) };
        fields.end()?;
        Ok(Self { refs, bases, patch_of })
    }
}

/// What lives in a pack.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PackRow {
    /// Objects that somebody needs.
    pub(crate) live_objects: u64,
    /// Objects that nobody needs, or that a younger pack has too.
    pub(crate) dead_objects: u64,
    /// Plaintext of chunks that somebody needs.
    pub(crate) live_chunk_bytes: u64,
    /// Plaintext of other chunks.
    pub(crate) dead_chunk_bytes: u64,
    /// Bytes of frames, each split among its objects: the living.
    pub(crate) live_stored_bytes: u64,
    /// Bytes of frames, each split among its objects: the dead.
    pub(crate) dead_stored_bytes: u64,
    /// Frames of pages among the bytes of frames.
    pub(crate) page_bytes: u64,
    /// Of the dead bytes, those of objects that are needed and found in a
    /// younger pack.
    pub(crate) twice_stored_bytes: u64,
}

impl PackRow {
    /// Eight numbers of 64 bits.
    pub(super) fn encode(&self) -> Vec<u8> {
        let all = [
            self.live_objects,
            self.dead_objects,
            self.live_chunk_bytes,
            self.dead_chunk_bytes,
            self.live_stored_bytes,
            self.dead_stored_bytes,
            self.page_bytes,
            self.twice_stored_bytes,
        ];
        all.iter().flat_map(|number| number.to_le_bytes()).collect()
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut fields = Fields::new(bytes);
        let row = Self {
            live_objects: fields.u64()?,
            dead_objects: fields.u64()?,
            live_chunk_bytes: fields.u64()?,
            dead_chunk_bytes: fields.u64()?,
            live_stored_bytes: fields.u64()?,
            dead_stored_bytes: fields.u64()?,
            page_bytes: fields.u64()?,
            twice_stored_bytes: fields.u64()?,
        };
        fields.end()?;
        Ok(row)
    }
}

/// `root 32 | length u64 | splitter u8`
pub(super) fn encode_image(image: &ImageRef) -> Vec<u8> {
    let mut out = image.root.as_bytes().to_vec();
    out.extend_from_slice(&image.len.to_le_bytes());
    out.push(image.splitter.code());
    out
}

pub(super) fn decode_image(bytes: &[u8]) -> Result<ImageRef, FormatError> {
    let mut fields = Fields::new(bytes);
    let root = Root::from_bytes(fields.array()?);
    let len = fields.u64()?;
    let splitter = Splitter::from_code(fields.u8()?)?;
    fields.end()?;
    Ok(ImageRef { root, len, splitter })
}

pub(super) fn decode_snapshot(bytes: &[u8]) -> Result<SnapshotId, FormatError> {
    let mut fields = Fields::new(bytes);
    let id = SnapshotId::from_bytes(fields.array()?);
    fields.end()?;
    Ok(id)
}

/// The bytes as the key and the value of a row of each kind, for tests of the
/// decoders.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn decode_any(bytes: &[u8]) {
    use crate::index::rows::{copy_of, pack_of, place_from, place_of};
    if let Ok(count) = Count::decode(bytes) {
        assert_eq!(count.encode(), bytes, "what decodes is canonical");
    }
    if let Ok(row) = PackRow::decode(bytes) {
        assert_eq!(row.encode(), bytes, "what decodes is canonical");
    }
    if let Ok(image) = decode_image(bytes) {
        assert_eq!(encode_image(&image), bytes, "what decodes is canonical");
    }
    drop((decode_snapshot(bytes), super::Bits::decode(bytes)));
    let places = (place_of(bytes), place_from(bytes));
    let packs = (pack_of(bytes), copy_of(bytes));
    assert!(bytes.len() < 8 || places.1.is_some());
    assert!(bytes.len() < 9 || packs.0.is_some());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_survive() {
        for patch_of in [None, Some(NodeId::of(b"base"))] {
            let count = Count { refs: 7, bases: 2, patch_of };
            assert_eq!(Count::decode(&count.encode()), Ok(count));
        }
        let row =
            PackRow { live_objects: 1, page_bytes: 9, twice_stored_bytes: 3, ..PackRow::default() };
        assert_eq!(PackRow::decode(&row.encode()), Ok(row));
        let image = ImageRef { root: Root::of(b"root"), len: 4096, splitter: Splitter::Fixed4K };
        assert_eq!(decode_image(&encode_image(&image)), Ok(image));
        assert!(Count::decode(&[1; 9]).is_err());
    }
}
