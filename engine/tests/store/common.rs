//! What the tests of a store share.

use std::path::Path;
use std::time::Duration;

use coppice_engine::{
    Clock, CommitOptions, ImageRef, IndexKind, Name, PAGE_LEN, Role, Settings, SnapshotRecord,
    Store, StoreError,
};

/// Bytes that look random and depend on the seed only.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Pages of noise, softened so that they compress.
pub(crate) fn soft_pages(seed: u64, pages: usize) -> Vec<u8> {
    let mut bytes = noise(seed, pages * PAGE_LEN);
    bytes.iter_mut().for_each(|byte| *byte &= 0x0f);
    bytes
}

pub(crate) fn settings(index: IndexKind) -> Settings {
    Settings { index, clock: Clock::Fixed(1_700_000_000_000), ..Settings::default() }
}

pub(crate) fn open(dir: &Path) -> Store {
    open_as(dir, &settings(Settings::default().index)).expect("the store opens")
}

/// Opens a store that nobody else has open. A program that another test is
/// just starting holds, until it is replaced, all that this process has
/// locked; so a lock that was given back may be held for a moment.
pub(crate) fn open_as(dir: &Path, settings: &Settings) -> Result<Store, StoreError> {
    for _ in 0..1000 {
        match Store::open(dir, settings) {
            Err(StoreError::Locked) => std::thread::sleep(Duration::from_millis(5)),
            outcome => return outcome,
        }
    }
    Err(StoreError::Locked)
}

pub(crate) fn name(text: &str) -> Name {
    text.parse().expect("a good name")
}

pub(crate) fn named(text: &str) -> CommitOptions {
    CommitOptions { name: Some(name(text)), ..CommitOptions::default() }
}

pub(crate) fn record_of(image: ImageRef) -> SnapshotRecord {
    SnapshotRecord { images: vec![(Role::Memory, image)], config: Vec::new(), parent: None }
}

/// Commits one image with these bytes.
pub(crate) fn commit_bytes(store: &Store, bytes: &[u8], as_name: &str) -> ImageRef {
    let mut session = store.begin().expect("a session");
    let mut writer = session.image(bytes.len() as u64, None).expect("an image");
    writer.write(0, bytes).expect("a write");
    let image = writer.finish().expect("a finished image");
    session.commit(&record_of(image), named(as_name)).expect("a commit");
    image
}

/// All bytes of an image.
pub(crate) fn read_all(store: &Store, image: &ImageRef) -> Vec<u8> {
    let mut bytes = vec![0xaa; usize::try_from(image.len).expect("a small image")];
    let mut reader = store.reader(image).expect("a reader");
    assert_eq!(reader.read_at(0, &mut bytes).expect("a read"), bytes.len());
    bytes
}
