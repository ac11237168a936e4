//! A run that uses every kind of change, and what must be true afterwards.

use std::collections::BTreeMap;
use std::sync::Arc;

use coppice_engine::{
    Clock, CommitOptions, ImageRef, IndexKind, Name, PAGE_LEN, Role, Settings, SimDisk,
    SnapshotRecord, Store, StoreError,
};

/// What callers were told and may rely on: bytes by name.
#[derive(Debug, Default, Clone)]
pub(crate) struct Promises {
    pub(crate) kept: BTreeMap<String, Vec<u8>>,
    /// Images that collections straightened.
    pub(crate) straightened: u64,
    /// The change under way when it ended; it may or may not have happened.
    pub(crate) open: Option<Change>,
}

#[derive(Debug, Clone)]
pub(crate) enum Change {
    Commit(String, Vec<u8>),
    Remove(String),
}

pub(crate) fn settings() -> Settings {
    Settings {
        index: IndexKind::Memory,
        clock: Clock::Fixed(1),
        // Small packs, so that a session seals several.
        pack_objects_max: 70,
        ..Settings::default()
    }
}

pub(crate) fn open(disk: &SimDisk) -> Result<Store, StoreError> {
    Store::open_on(Arc::new(disk.clone()), &settings())
}

fn name(text: &str) -> Name {
    text.parse().expect("a good name")
}

/// Pages that differ from each other and between seeds.
pub(crate) fn pages(seed: u8, count: usize) -> Vec<u8> {
    let mut bytes = vec![seed; count * PAGE_LEN];
    for (page, number) in bytes.chunks_mut(PAGE_LEN).zip(0_u32..) {
        page[..4].copy_from_slice(&number.to_le_bytes());
        page[4] = seed;
    }
    bytes
}

/// The byte stream of a snapshot: the end of its memory, moved by a byte, so
/// that versions share most chunks and none of them is a page.
fn stream_of(bytes: &[u8]) -> Vec<u8> {
    [&[0x5a], &bytes[bytes.len().saturating_sub(50 * PAGE_LEN)..]].concat()
}

/// Commits bytes over an optional base whose other pages stay.
pub(crate) fn commit(
    store: &Store,
    as_name: &str,
    bytes: &[u8],
    base: Option<&ImageRef>,
    changed: std::ops::Range<usize>,
) -> Result<ImageRef, StoreError> {
    let mut session = store.begin()?;
    let mut writer = session.image(bytes.len() as u64, base)?;
    writer.write(changed.start as u64, &bytes[changed.start * PAGE_LEN..changed.end * PAGE_LEN])?;
    let image = writer.finish()?;
    let state = session.blob(b"state")?;
    let mut writer = session.stream();
    writer.append(&stream_of(bytes))?;
    let stream = writer.finish()?;
    let images = vec![(Role::Memory, image), (Role::State, state), (Role::Stream, stream)];
    let record = SnapshotRecord { images, config: b"c".to_vec(), parent: None };
    let options = CommitOptions { name: Some(name(as_name)), ..CommitOptions::default() };
    session.commit(&record, options)?;
    Ok(image)
}

/// The whole run; ends at the first error.
pub(crate) fn run(disk: &SimDisk, promises: &mut Promises) -> Result<(), StoreError> {
    run_on(&|| open(disk), promises)
}

/// The same on any disk and index.
pub(crate) fn run_on(
    open: &dyn Fn() -> Result<Store, StoreError>,
    promises: &mut Promises,
) -> Result<(), StoreError> {
    let store = open()?;
    let mut bytes = pages(1, 300);
    let mut step = |as_name: &str, bytes: &[u8], base: Option<&ImageRef>, changed| {
        promises.open = Some(Change::Commit(as_name.to_owned(), bytes.to_vec()));
        let image = commit(&store, as_name, bytes, base, changed)?;
        promises.kept.insert(as_name.to_owned(), bytes.to_vec());
        promises.open = None;
        Ok::<_, StoreError>(image)
    };
    let base = step("base", &bytes, None, 0..300)?;
    bytes[10 * PAGE_LEN..100 * PAGE_LEN].copy_from_slice(&pages(2, 90));
    let child = step("child", &bytes, Some(&base), 10..100)?;
    bytes[290 * PAGE_LEN..].fill(0);
    step("grandchild", &bytes, Some(&child), 290..300)?;
    step("twin", &bytes, None, 0..300)?;
    promises.open = Some(Change::Commit("tag".to_owned(), promises.kept["base"].clone()));
    store.tag("base", name("tag"))?;
    promises.kept.insert("tag".to_owned(), promises.kept["base"].clone());
    promises.open = Some(Change::Remove("base".to_owned()));
    store.remove("base")?;
    promises.kept.remove("base");
    promises.open = None;
    // What was left by earlier runs is reopened in the middle of this one.
    drop(store);
    let store = open()?;
    let last = pages(9, 20);
    promises.open = Some(Change::Commit("last".to_owned(), last.clone()));
    commit(&store, "last", &last, None, 0..20)?;
    promises.kept.insert("last".to_owned(), last);
    promises.open = None;
    Ok(())
}

/// Everything promised is there, and nothing else but what was under way.
pub(crate) fn verify(store: &Store, promises: &Promises) {
    let mut found = BTreeMap::new();
    for entry in store.snapshots() {
        let image = entry.record.image(Role::Memory).expect("memory");
        let mut bytes = vec![0xee; usize::try_from(image.len).expect("small")];
        let mut reader = store.reader(image).expect("a reader");
        reader.read_at(0, &mut bytes).expect("all bytes");
        let state = entry.record.image(Role::State).expect("state");
        let mut state_bytes = [0; 5];
        store.reader(state).expect("a reader").read_at(0, &mut state_bytes).expect("the state");
        assert_eq!(&state_bytes, b"state");
        let stream = entry.record.image(Role::Stream).expect("a stream");
        let mut stream_bytes = vec![0; usize::try_from(stream.len).expect("small")];
        store.reader(stream).expect("a reader").read_at(0, &mut stream_bytes).expect("the stream");
        assert!(stream_bytes == stream_of(&bytes));
        for name in &entry.names {
            found.insert(name.to_string(), bytes.clone());
        }
    }
    let mut with_open = promises.kept.clone();
    match &promises.open {
        Some(Change::Commit(name, bytes)) => {
            with_open.insert(name.clone(), bytes.clone());
        }
        Some(Change::Remove(name)) => {
            with_open.remove(name);
        }
        None => {}
    }
    assert!(
        found == promises.kept || found == with_open,
        "found {:?}, promised {:?}, under way {:?}",
        found.keys(),
        promises.kept.keys(),
        with_open.keys()
    );
    let report = store.check(&mut |_| {}).expect("a check");
    assert!(report.is_clean() && !report.recounted, "{report:?}");
}
