//! Images: a root, which names length, splitter and top node together.
//!
//! ```text
//! splitter u8 | top level u8 | has top u8 | zero, 5 | length u64 | top node id, 32
//! ```
//!
//! The top level follows from the length for pages; for streams it is zero
//! here, and the top node itself says it.

use serde::{Deserialize, Serialize};

use super::top_level;
use crate::error::{FormatError, StoreError};
use crate::id::{NodeId, Root};
use crate::pack::fields::{Fields, bound};
use crate::units::{IMAGE_LEN_MAX, pages_of};

/// How an image was cut into chunks. Codes from 2 on are free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Splitter {
    /// Aligned pages of 4 KiB.
    Fixed4K,
    /// Content-defined chunks of 4 to 64 KiB, about 16 KiB long: for byte
    /// streams, which no machine can run from.
    FastCdc16K,
}

impl Splitter {
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Fixed4K => 0,
            Self::FastCdc16K => 1,
        }
    }

    pub(crate) fn from_code(code: u8) -> Result<Self, FormatError> {
        match code {
            0 => Ok(Self::Fixed4K),
            1 => Ok(Self::FastCdc16K),
            _ => Err(FormatError::Field("splitter")),
        }
    }
}

/// Names an image and says how long it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ImageRef {
    /// The hash of the whole image.
    pub root: Root,
    /// Its length in bytes.
    pub len: u64,
    /// How it was cut.
    pub splitter: Splitter,
}

/// What a root hashes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RootRecord {
    pub(crate) splitter: Splitter,
    pub(crate) len: u64,
    /// Absent if all pages are zero.
    pub(crate) top: Option<NodeId>,
}

impl RootRecord {
    /// Level of the top node of an image of pages; zero for a stream, whose
    /// top node has its level in itself.
    pub(crate) fn level(&self) -> u8 {
        match self.splitter {
            Splitter::Fixed4K => top_level(pages_of(self.len)),
            Splitter::FastCdc16K => 0,
        }
    }

    /// Refuses a stream where pages are needed.
    pub(crate) fn require_pages(&self) -> Result<(), StoreError> {
        match self.splitter {
            Splitter::Fixed4K => Ok(()),
            Splitter::FastCdc16K => Err(StoreError::Invalid(
                "a byte stream has no pages, so no machine can use it; import the file as a disk",
            )),
        }
    }

    /// The canonical bytes.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = vec![self.splitter.code(), self.level(), u8::from(self.top.is_some())];
        out.extend_from_slice(&[0; 5]);
        out.extend_from_slice(&self.len.to_le_bytes());
        out.extend_from_slice(&self.top.map_or([0; 32], |top| *top.as_bytes()));
        out
    }

    /// Reads canonical bytes and nothing else.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut fields = Fields::new(bytes);
        let splitter = Splitter::from_code(fields.u8()?)?;
        let level = fields.u8()?;
        let has_top = fields.u8()?;
        fields.zeros(5, "image root")?;
        let len = fields.u64()?;
        bound("image length", len, IMAGE_LEN_MAX)?;
        let top = match (has_top, fields.array()?) {
            (0, _) => None,
            (1, id) => Some(NodeId::from_bytes(id)),
            _ => return Err(FormatError::Field("image root")),
        };
        fields.end()?;
        let record = Self { splitter, len, top };
        // A stream has a node as soon as it has a byte.
        let sensible = splitter == Splitter::Fixed4K || record.top.is_some() == (len > 0);
        if sensible && level == record.level() && record.encode() == bytes {
            Ok(record)
        } else {
            Err(FormatError::Field("image root"))
        }
    }

    /// The reference to it.
    pub(crate) fn image(&self) -> ImageRef {
        ImageRef { root: Root::of(&self.encode()), len: self.len, splitter: self.splitter }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_survive_and_depend_on_length() {
        let top = Some(NodeId::of(b"top"));
        for record in [
            RootRecord { splitter: Splitter::Fixed4K, len: 5000, top },
            RootRecord { splitter: Splitter::Fixed4K, len: 0, top: None },
            RootRecord { splitter: Splitter::FastCdc16K, len: 5000, top },
            RootRecord { splitter: Splitter::FastCdc16K, len: 0, top: None },
        ] {
            assert_eq!(RootRecord::decode(&record.encode()), Ok(record));
        }
        let long = RootRecord { splitter: Splitter::Fixed4K, len: 8192, top: None };
        let short = RootRecord { splitter: Splitter::Fixed4K, len: 8191, top: None };
        assert_ne!(long.image().root, short.image().root);
    }

    #[test]
    fn other_bytes_are_refused() {
        let good = RootRecord { splitter: Splitter::Fixed4K, len: 5000, top: None }.encode();
        for at in 0..good.len() {
            let mut bytes = good.clone();
            bytes[at] ^= 0x80;
            // A changed length is another image, unless it is out of range.
            assert!(RootRecord::decode(&bytes).is_err() || (8..16).contains(&at), "byte {at}");
        }
        assert_eq!(RootRecord::decode(&good[..47]), Err(FormatError::Short));
        for (len, top) in [(5000, None), (0, Some(NodeId::of(b"top")))] {
            let bad = RootRecord { splitter: Splitter::FastCdc16K, len, top };
            assert!(RootRecord::decode(&bad.encode()).is_err());
        }
    }
}
