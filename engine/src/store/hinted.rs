//! Reading by hints: without the index, and in spite of wrong ones.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use super::Store;
use crate::catalog::{Role, SnapshotRecord};
use crate::depot::Spot;
use crate::depot::hint::Hint;
use crate::gc::GcOptions;
use crate::id::{NodeId, ObjectKey, PackId, SnapshotId};
use crate::ingest::CommitOptions;
use crate::io::SimDisk;
use crate::settings::{IndexKind, Settings};
use crate::tree::{ImageRef, NodeSource};
use crate::units::{PAGE_LEN, to_u64};

/// So many that there are nodes of two levels and leaves of every kind.
const PAGES: usize = 300;

fn noise(seed: u8, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
    bytes
}

fn in_memory() -> Settings {
    Settings { index: IndexKind::Memory, ..Settings::default() }
}

fn simulated() -> Store {
    Store::open_on(Arc::new(SimDisk::new()), &in_memory()).expect("a store")
}

/// Commits an image, or one with these pages changed.
fn commit(
    store: &Store,
    bytes: &[u8],
    base: Option<(ImageRef, SnapshotId)>,
    pages: &[usize],
) -> (ImageRef, SnapshotId) {
    let mut session = store.begin().expect("a session");
    let base_image = base.map(|(image, _)| image);
    let mut writer = session.image(to_u64(bytes.len()), base_image.as_ref()).expect("an image");
    for page in pages {
        let at = page * PAGE_LEN;
        writer.write(to_u64(*page), &bytes[at..at + PAGE_LEN]).expect("a write");
    }
    let image = writer.finish().expect("an image");
    let images = vec![(Role::Memory, image)];
    let parent = base.map(|(_, id)| id);
    let record = SnapshotRecord { images, config: Vec::new(), parent };
    (image, session.commit(&record, CommitOptions::default()).expect("a commit").id)
}

/// An image, and what it looks like after some changes here and there.
fn lineage(store: &Store, depth: u8) -> Vec<(ImageRef, Vec<u8>)> {
    let mut bytes = noise(0, PAGES * PAGE_LEN);
    bytes[5 * PAGE_LEN..9 * PAGE_LEN].fill(0);
    let all: Vec<usize> = (0..PAGES).collect();
    let mut last = commit(store, &bytes, None, &all);
    let mut made = vec![(last.0, bytes.clone())];
    for step in 1..=depth {
        let pages = [usize::from(step) * 3 % 128, 130, 200 + usize::from(step)];
        for page in pages {
            let new = noise(step, (page + 1) * PAGE_LEN);
            bytes[page * PAGE_LEN..][..PAGE_LEN].copy_from_slice(&new[page * PAGE_LEN..]);
        }
        last = commit(store, &bytes, Some(last), &pages);
        made.push((last.0, bytes.clone()));
    }
    made
}

fn read(store: &Store, image: &ImageRef) -> Vec<u8> {
    let mut bytes = vec![0; PAGES * PAGE_LEN];
    store.reader(image).expect("a reader").read_at(0, &mut bytes).expect("a read");
    bytes
}

fn exported(store: &Store, image: &ImageRef) -> Vec<u8> {
    let out = tempfile::tempfile().expect("a file");
    store.export(image, &out, &mut |_| {}).expect("an export");
    let mut bytes = vec![0; PAGES * PAGE_LEN];
    out.read_exact_at(&mut bytes, 0).expect("a read");
    bytes
}

fn index_gets(store: &Store) -> u64 {
    store.lookups().expect("lookups").index_gets
}

/// Reads all images in every way; returns what the index was asked for.
fn read_all(store: &Store, made: &[(ImageRef, Vec<u8>)]) -> u64 {
    let before = index_gets(store);
    for (image, bytes) in made {
        store.depot.forget_cached();
        assert!(read(store, image) == *bytes);
        store.depot.forget_cached();
        assert!(exported(store, image) == *bytes);
        store.depot.forget_cached();
        let map = store.page_map(image).expect("a map");
        let zeros = bytes.chunks(PAGE_LEN).filter(|page| page.iter().all(|it| *it == 0)).count();
        assert_eq!(map.stored_pages(), to_u64(PAGES - zeros));
        for (_, at) in map.stored(0..u64::MAX) {
            let frame = crate::read::read_frame(&store.depot, &at.frame).expect("a frame");
            assert!(crate::read::verified(&frame, at.slot, &at.chunk).is_ok());
        }
    }
    index_gets(store) - before
}

/// The keys of all nodes and roots.
fn keys(store: &Store, made: &[(ImageRef, Vec<u8>)]) -> Vec<ObjectKey> {
    let mut keys = Vec::new();
    for (image, _) in made {
        let top = store.depot.root(image).expect("a root").top.expect("a top node");
        let node = store.depot.load_node(&top).expect("a node");
        keys.extend([image.root.key(), top.key()]);
        keys.extend(node.children().iter().flatten().map(|id| NodeId::from_bytes(*id).key()));
    }
    keys.sort_unstable();
    keys.dedup();
    keys
}

/// Changes the hints of all nodes and roots.
fn forge(store: &Store, keys: &[ObjectKey], change: impl Fn(&ObjectKey, Vec<u8>) -> Vec<u8>) {
    let records = store.depot.index().hints(keys).expect("hints");
    let forged: Vec<_> = keys
        .iter()
        .zip(records)
        .map(|(key, record)| (*key, record.map(|bytes| change(key, bytes))))
        .collect();
    store.depot.index().write_hints(&forged).expect("a write");
    store.depot.forget_cached();
}

fn moved(change: impl Fn(&mut Spot)) -> impl Fn(&ObjectKey, Vec<u8>) -> Vec<u8> {
    move |key, bytes| {
        let mut hint = Hint::decode(key, &bytes).expect("a sound hint");
        hint.own.iter_mut().for_each(&change);
        hint.chunks.iter_mut().for_each(|(_, spot)| change(spot));
        hint.encode(key)
    }
}

#[test]
fn what_was_committed_is_read_without_the_index() {
    let store = simulated();
    let made = lineage(&store, 40);
    assert_eq!(read_all(&store, &made), 0);
}

#[test]
fn readers_of_one_frame_at_once_have_it_decoded_once() {
    let store = simulated();
    let made = lineage(&store, 0);
    let (image, bytes) = &made[0];
    let decoded = |store: &Store| store.lookups().expect("lookups").frames_decoded;
    let before = decoded(&store);
    std::thread::scope(|scope| {
        for page in 0..4 {
            let store = &store;
            scope.spawn(move || {
                let mut out = [0; PAGE_LEN];
                let mut reader = store.reader(image).expect("a reader");
                reader.read_at(to_u64(page * PAGE_LEN), &mut out).expect("a read");
                assert!(out == bytes[page * PAGE_LEN..][..PAGE_LEN]);
            });
        }
    });
    assert_eq!(decoded(&store) - before, 1);
    let frames = to_u64(store.page_map(image).expect("a map").frames().len());
    for _ in 0..3 {
        assert!(exported(&store, image) == *bytes);
        assert!(read(&store, image) == *bytes);
    }
    assert_eq!(decoded(&store) - before, frames);
}

#[test]
fn a_store_opened_again_is_read_without_the_index() {
    let folder = tempfile::tempdir().expect("a folder");
    let open = |path: &Path| Store::open(path, &Settings::default()).expect("a store");
    let made = lineage(&open(folder.path()), 20);
    let store = open(folder.path());
    assert_eq!(read_all(&store, &made), 0);
    let lookups = store.lookups().expect("lookups");
    assert!(lookups.hints > 20, "{lookups:?}");
}

#[test]
fn hints_that_are_gone_are_made_again_by_reading() {
    let store = simulated();
    let made = lineage(&store, 20);
    let before = store.lookups().expect("lookups");
    store.depot.index().clear_hints().expect("a write");
    store.depot.forget_cached();
    assert!(read_all(&store, &made) > 0);
    assert_eq!(read_all(&store, &made), 0);
    let after = store.lookups().expect("lookups");
    assert!(after.hint_bytes < before.hint_bytes * 3 / 2, "{before:?} {after:?}");
}

#[test]
fn damaged_hints_are_as_good_as_none() {
    let store = simulated();
    let made = lineage(&store, 8);
    let keys = keys(&store, &made);
    for cut in [false, true] {
        forge(&store, &keys, |_, mut bytes| {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            bytes.truncate(if cut { middle } else { bytes.len() });
            bytes
        });
        assert!(read_all(&store, &made) > 0);
        assert_eq!(read_all(&store, &made), 0);
    }
}

#[test]
fn wrong_and_stale_hints_fall_back_to_the_index() {
    let store = simulated();
    let made = lineage(&store, 8);
    let keys = keys(&store, &made);
    let changes: [fn(&mut Spot); 4] = [
        |spot| spot.slot = (spot.slot + 1) % spot.count,
        |spot| spot.pack = PackId(spot.pack.0 + 1000),
        |spot| spot.offset += 8,
        |spot| spot.offset += 1 << 30,
    ];
    for change in changes {
        forge(&store, &keys, moved(change));
        for (image, bytes) in &made {
            assert!(read(&store, image) == *bytes);
            assert!(exported(&store, image) == *bytes);
        }
    }
}

#[test]
fn collections_leave_hints_that_are_renewed() {
    let store = simulated();
    let made = lineage(&store, 60);
    let listed: Vec<_> = store.snapshots().into_iter().map(|entry| entry.id).collect();
    for id in &listed[..50] {
        store.remove(&id.to_string()).expect("it is removed");
    }
    let options = GcOptions { dead_percent_min: 0, frames_percent_max: 100 };
    let before = store.lookups().expect("lookups");
    let report = store.gc(options).expect("a collection");
    assert!(report.repacked_packs + report.dropped_packs > 0, "{report:?}");
    let left = &made[50..];
    read_all(&store, left);
    assert_eq!(read_all(&store, left), 0);
    let after = store.lookups().expect("lookups");
    assert!(after.hints < before.hints, "{before:?} {after:?}");
}

#[test]
fn a_straightened_image_is_read_from_its_copies() {
    let store = simulated();
    let made = lineage(&store, 60);
    let (last, _) = made.last().expect("an image");
    let before = store.page_map(last).expect("a map").frames().len();
    let report = store.gc(GcOptions::default()).expect("a collection");
    assert!(report.straightened_images > 1, "{report:?}");
    assert!(store.page_map(last).expect("a map").frames().len() < before);
    read_all(&store, &made);
    assert_eq!(read_all(&store, &made), 0);
}
