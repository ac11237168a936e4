//! Snapshot records: what a whole machine, or a single file, consists of.
//!
//! ```text
//! version u16 | has parent u8 | zero u8 | images u32
//! for each image, ascending by role:
//!     role u8 | splitter u8 | disk u16 | zero u32 | length u64 | root, 32
//! parent id, 32 (zeros if none) | config length u32 | config
//! ```

use serde::{Deserialize, Serialize};

use crate::error::FormatError;
use crate::id::{Root, SnapshotId};
use crate::pack::fields::{Fields, bound, put_bytes};
use crate::tree::{ImageRef, Splitter};
use crate::units::{IMAGE_LEN_MAX, RECORD_LEN_MAX, to_u32};

const VERSION: u16 = 1;
const IMAGES_MAX: u32 = 1024;

/// What an image is in a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Role {
    /// Guest memory.
    Memory,
    /// A disk, by its number.
    Disk(u16),
    /// Machine state: CPUs, devices.
    State,
    /// A byte stream.
    Stream,
}

/// What a snapshot consists of. Its id is the hash of its canonical bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// The images, each role once.
    pub images: Vec<(Role, ImageRef)>,
    /// What the guest can see of its machine; opaque here, so the caller has
    /// to keep it canonical.
    pub config: Vec<u8>,
    /// The snapshot that the machine came from; it need not exist any more.
    pub parent: Option<SnapshotId>,
}

impl Role {
    fn code(self) -> (u8, u16) {
        match self {
            Self::Memory => (1, 0),
            Self::Disk(number) => (2, number),
            Self::State => (3, 0),
            Self::Stream => (4, 0),
        }
    }

    fn from_code(code: u8, disk: u16) -> Result<Self, FormatError> {
        match (code, disk) {
            (1, 0) => Ok(Self::Memory),
            (2, number) => Ok(Self::Disk(number)),
            (3, 0) => Ok(Self::State),
            (4, 0) => Ok(Self::Stream),
            _ => Err(FormatError::Field("image role")),
        }
    }
}

impl SnapshotRecord {
    /// The id of the snapshot.
    #[must_use]
    pub fn id(&self) -> SnapshotId {
        SnapshotId::of(&self.encode())
    }

    /// The image in a role.
    #[must_use]
    pub fn image(&self, role: Role) -> Option<&ImageRef> {
        self.images.iter().find(|(own, _)| *own == role).map(|(_, image)| image)
    }

    /// Bytes of all images together.
    #[must_use]
    pub fn logical_bytes(&self) -> u64 {
        self.images.iter().map(|(_, image)| image.len).sum()
    }

    /// Refuses what cannot be encoded.
    pub(crate) fn check(&self) -> Result<(), FormatError> {
        bound("snapshot images", self.images.len() as u64, u64::from(IMAGES_MAX))?;
        bound("snapshot config", self.config.len() as u64, RECORD_LEN_MAX as u64 / 2)?;
        let mut roles: Vec<Role> = self.images.iter().map(|(role, _)| *role).collect();
        roles.sort_unstable();
        if roles.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(FormatError::Field("image role"));
        }
        Ok(())
    }

    /// The canonical bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut images = self.images.clone();
        images.sort_unstable_by_key(|(role, _)| *role);
        let mut out = VERSION.to_le_bytes().to_vec();
        out.extend_from_slice(&[u8::from(self.parent.is_some()), 0]);
        out.extend_from_slice(&to_u32(images.len()).to_le_bytes());
        for (role, image) in images {
            let (code, disk) = role.code();
            out.extend_from_slice(&[code, image.splitter.code()]);
            out.extend_from_slice(&disk.to_le_bytes());
            out.extend_from_slice(&[0; 4]);
            out.extend_from_slice(&image.len.to_le_bytes());
            out.extend_from_slice(image.root.as_bytes());
        }
        out.extend_from_slice(&self.parent.map_or([0; 32], |id| *id.as_bytes()));
        put_bytes(&mut out, &self.config);
        out
    }

    /// Reads canonical bytes and nothing else.
    ///
    /// # Errors
    /// Says what is wrong with other bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut fields = Fields::new(bytes);
        match fields.u16()? {
            VERSION => {}
            version => return Err(FormatError::Version(u32::from(version))),
        }
        let has_parent = fields.u8()?;
        fields.zeros(1, "snapshot header")?;
        let count = fields.u32()?;
        bound("snapshot images", u64::from(count), u64::from(IMAGES_MAX))?;
        let images = (0..count).map(|_| decode_image(&mut fields)).collect::<Result<_, _>>()?;
        let parent = match (has_parent, fields.array()?) {
            (0, _) => None,
            (1, id) => Some(SnapshotId::from_bytes(id)),
            _ => return Err(FormatError::Field("snapshot parent")),
        };
        let config = fields.bytes("snapshot config", RECORD_LEN_MAX / 2)?.to_vec();
        fields.end()?;
        let record = Self { images, config, parent };
        record.check()?;
        if record.encode() == bytes { Ok(record) } else { Err(FormatError::Field("snapshot")) }
    }
}

fn decode_image(fields: &mut Fields<'_>) -> Result<(Role, ImageRef), FormatError> {
    let code = fields.u8()?;
    let splitter = Splitter::from_code(fields.u8()?)?;
    let role = Role::from_code(code, fields.u16()?)?;
    fields.zeros(4, "snapshot image")?;
    let len = fields.u64()?;
    bound("image length", len, IMAGE_LEN_MAX)?;
    let root = Root::from_bytes(fields.array()?);
    Ok((role, ImageRef { root, len, splitter }))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample() -> SnapshotRecord {
        let image = |len| ImageRef { root: Root::of(b"r"), len, splitter: Splitter::Fixed4K };
        SnapshotRecord {
            images: vec![
                (Role::Memory, image(1)),
                (Role::Disk(0), image(2)),
                (Role::State, image(3)),
            ],
            config: b"config".to_vec(),
            parent: Some(SnapshotId::of(b"p")),
        }
    }

    #[test]
    fn records_survive() {
        let record = sample();
        assert_eq!(SnapshotRecord::decode(&record.encode()), Ok(record.clone()));
        let bare = SnapshotRecord { images: vec![], config: vec![], parent: None };
        assert_eq!(SnapshotRecord::decode(&bare.encode()), Ok(bare));
        assert_eq!(record.logical_bytes(), 6);
    }

    #[test]
    fn the_id_does_not_depend_on_the_order_given() {
        let mut record = sample();
        let id = record.id();
        record.images.reverse();
        assert_eq!(record.id(), id);
        record.config.push(0);
        assert_ne!(record.id(), id);
    }

    #[test]
    fn other_bytes_are_refused() {
        let bytes = sample().encode();
        for len in 0..bytes.len() {
            assert!(SnapshotRecord::decode(&bytes[..len]).is_err(), "length {len}");
        }
        let mut swapped = sample();
        swapped.images.swap(0, 1);
        let mut twice = sample();
        twice.images.push(twice.images[0]);
        assert!(SnapshotRecord::decode(&twice.encode()).is_err());
        assert_eq!(swapped.encode(), bytes);
    }
}
