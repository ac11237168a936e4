//! A working set: which pages machines of a snapshot touch first, in order.
//!
//! One file for each snapshot, laid out in `docs/format.md`. It is derived:
//! one that is absent, damaged or of another version is as good as empty, and
//! no page is believed to be anything because of it.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use coppice_engine::SnapshotId;

/// Touches kept for a snapshot.
pub(crate) const TOUCHES_MAX: usize = 1 << 15;

const MAGIC: [u8; 8] = *b"COPWKSET";
const VERSION: u32 = 1;
const CONTEXT: &str = "coppice 2026-11 working set checksum v1";
const HEADER: usize = 8 + 4 + 4 + 32;
const CHECKSUM: usize = 16;
/// Of the longest file.
const LEN_MAX: u64 = (HEADER + TOUCHES_MAX * 8 + CHECKSUM) as u64;

/// The place of an image in its snapshot: 0 is the memory, 1 the first disk.
pub(crate) type ImageNumber = u16;

/// Pages have this many bits in a file.
const PAGE_BITS: u32 = 48;

/// Touches, none twice.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct WorkingSet {
    touches: Vec<(ImageNumber, u64)>,
}

impl WorkingSet {
    /// The touches, the first one first.
    pub(crate) fn touches(&self) -> &[(ImageNumber, u64)] {
        &self.touches
    }

    /// Adds what another machine touched that was not there; whether that was
    /// anything. It comes behind what is known, and not beyond the limit.
    pub(crate) fn merge(&mut self, touched: impl IntoIterator<Item = (ImageNumber, u64)>) -> bool {
        let before = self.touches.len();
        let mut seen: HashSet<_> = self.touches.iter().copied().collect();
        let room = TOUCHES_MAX.saturating_sub(before);
        let news = touched.into_iter().filter(|(_, page)| *page < 1 << PAGE_BITS);
        self.touches.extend(news.filter(|touch| seen.insert(*touch)).take(room));
        self.touches.len() > before
    }

    /// The bytes of its file.
    fn to_bytes(&self, snapshot: &SnapshotId) -> Vec<u8> {
        let count = u32::try_from(self.touches.len()).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(HEADER + self.touches.len() * 8 + CHECKSUM);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(count.to_le_bytes());
        bytes.extend(snapshot.as_bytes());
        for (image, page) in &self.touches {
            bytes.extend((u64::from(*image) << PAGE_BITS | page).to_le_bytes());
        }
        let checksum = checksum(&bytes);
        bytes.extend(checksum);
        bytes
    }

    /// What bytes say, if they are those of a file of this snapshot.
    fn from_bytes(bytes: &[u8], snapshot: &SnapshotId) -> Option<Self> {
        let (body, stored) = bytes.split_at_checked(bytes.len().checked_sub(CHECKSUM)?)?;
        if checksum(body) != *stored {
            return None;
        }
        let (header, rest) = body.split_at_checked(HEADER)?;
        let (named, owner) = header.split_at_checked(16)?;
        let count = u32::from_le_bytes(named[12..].try_into().ok()?);
        let (touches, over) = rest.as_chunks::<8>();
        let as_expected = named[..8] == MAGIC
            && named[8..12] == VERSION.to_le_bytes()
            && owner == snapshot.as_bytes()
            && usize::try_from(count) == Ok(touches.len())
            && touches.len() <= TOUCHES_MAX
            && over.is_empty();
        let mut set = Self::default();
        let read = touches.iter().map(|bytes| u64::from_le_bytes(*bytes));
        let read = read.map(|word| (image_of(word), word & ((1 << PAGE_BITS) - 1)));
        if !as_expected {
            return None;
        }
        set.merge(read);
        Some(set)
    }

    /// The one in a folder; empty if there is none.
    pub(crate) fn load(folder: &Path, snapshot: &SnapshotId) -> Self {
        let mut bytes = Vec::new();
        // One byte more than the longest is no file of ours either.
        let read = File::open(folder.join(snapshot.to_string()))
            .and_then(|file| file.take(LEN_MAX + 1).read_to_end(&mut bytes));
        read.ok().and_then(|_| Self::from_bytes(&bytes, snapshot)).unwrap_or_default()
    }

    /// Writes or replaces the one in a folder. Nothing is flushed: what a
    /// crash tears does not have its checksum.
    pub(crate) fn save(&self, folder: &Path, snapshot: &SnapshotId) -> io::Result<()> {
        std::fs::create_dir_all(folder)?;
        let path = folder.join(snapshot.to_string());
        let partial = path.with_extension("tmp");
        std::fs::write(&partial, self.to_bytes(snapshot))?;
        std::fs::rename(&partial, &path)
    }
}

fn image_of(word: u64) -> ImageNumber {
    let [.., low, high] = word.to_le_bytes();
    ImageNumber::from_le_bytes([low, high])
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM] {
    let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
    hasher.update(bytes);
    let mut checksum = [0; CHECKSUM];
    hasher.finalize_xof().fill(&mut checksum);
    checksum
}

#[cfg(test)]
mod tests {
    use super::*;

    const SNAPSHOT: SnapshotId = SnapshotId::from_bytes([7; 32]);

    fn set(touches: &[(ImageNumber, u64)]) -> WorkingSet {
        let mut set = WorkingSet::default();
        set.merge(touches.iter().copied());
        set
    }

    #[test]
    fn a_set_survives_its_file_and_no_damage_does() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("sets");
        assert_eq!(WorkingSet::load(&folder, &SNAPSHOT), WorkingSet::default());
        let one = set(&[(0, 5), (2, (1 << PAGE_BITS) - 1), (u16::MAX, 0), (0, 1)]);
        one.save(&folder, &SNAPSHOT).unwrap();
        assert_eq!(WorkingSet::load(&folder, &SNAPSHOT), one);

        let bytes = one.to_bytes(&SNAPSHOT);
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert_eq!(WorkingSet::from_bytes(&bad, &SNAPSHOT), None, "byte {at}");
            assert_eq!(WorkingSet::from_bytes(&bytes[..at], &SNAPSHOT), None, "{at} bytes");
        }
        let other = SnapshotId::from_bytes([8; 32]);
        assert_eq!(WorkingSet::from_bytes(&bytes, &other), None, "of another snapshot");
    }

    #[test]
    fn merging_keeps_the_order_and_the_limit() {
        let mut one = set(&[(0, 5), (1, 5)]);
        assert!(!one.merge([(1, 5), (0, 5)]), "nothing new");
        assert!(one.merge([(0, 9), (0, 5), (0, 9), (0, 1 << PAGE_BITS)]));
        assert_eq!(one.touches(), [(0, 5), (1, 5), (0, 9)]);
        assert!(one.merge((0..100_000).map(|page| (3, page))));
        assert_eq!(one.touches().len(), TOUCHES_MAX);
        assert!(!one.merge([(4, 4)]), "it is full");
    }
}
