//! Byte streams: cut by content, shared whatever moved, and the same image
//! whoever computes it.

use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use coppice_engine::{
    GcOptions, ImageRef, IndexKind, PAGE_LEN, Role, Settings, SimDisk, SnapshotRecord, Splitter,
    Store, stream_root_of,
};
use proptest::prelude::*;

use crate::common::{commit_bytes, named, noise, open, read_all, settings, soft_pages};

const ALL: GcOptions = GcOptions { dead_percent_min: 0, frames_percent_max: 100 };

pub(crate) fn record_of(image: ImageRef) -> SnapshotRecord {
    SnapshotRecord { images: vec![(Role::Stream, image)], config: Vec::new(), parent: None }
}

/// Commits a stream that comes in parts of this length. Returns what the store
/// took for it, as plaintext and in packs.
fn commit(store: &Store, bytes: &[u8], part: usize, as_name: &str) -> (ImageRef, u64, u64) {
    let mut session = store.begin().expect("a session");
    let mut writer = session.stream();
    for part in bytes.chunks(part.max(1)) {
        writer.append(part).expect("a part");
    }
    let image = writer.finish().expect("a stream");
    let done = session.commit(&record_of(image), named(as_name)).expect("a commit");
    (image, done.new_bytes, done.stored_bytes)
}

fn in_memory() -> Store {
    Store::open_on(Arc::new(SimDisk::new()), &settings(IndexKind::Memory)).expect("it opens")
}

fn check(store: &Store) {
    let report = store.check(&mut |_| {}).expect("a check");
    assert!(report.is_clean(), "{report:?}");
}

#[test]
fn what_comes_again_after_its_pack_ended_is_stored_once() {
    let disk = Arc::new(SimDisk::new());
    let settings = Settings { pack_objects_max: 20, ..settings(IndexKind::Memory) };
    let store = Store::open_on(disk, &settings).expect("it opens");
    // All of it is looked up at once, and packs end in between.
    let bytes = noise(1, 100 * PAGE_LEN).repeat(3);
    let (_, new_bytes, _) = commit(&store, &bytes, bytes.len(), "stream");
    // Cuts need some bytes to find each other again.
    assert!(new_bytes < 150 * PAGE_LEN as u64, "{new_bytes}");
    let pages = store.stats().chunks;
    commit_bytes(&store, &noise(2, 100 * PAGE_LEN).repeat(3), "pages");
    assert_eq!(store.stats().chunks, pages + 100);
    store.gc(ALL).expect("a collection");
    check(&store);
}

#[test]
fn streams_of_every_length_come_back() {
    let dir = tempfile::tempdir().expect("a folder");
    let store = open(dir.path());
    let mut zeros = noise(3, 400_000);
    zeros[100_000..350_000].fill(0);
    let inputs = [
        Vec::new(),
        vec![7],
        vec![0],
        noise(1, PAGE_LEN),
        vec![0; 300_000],
        vec![9; 200_001],
        zeros,
        soft_pages(2, 2500),
    ];
    for (bytes, number) in inputs.iter().zip(0..) {
        let (image, ..) = commit(&store, bytes, 77_777, &format!("s{number}"));
        assert_eq!((image.len, image.splitter), (bytes.len() as u64, Splitter::FastCdc16K));
        assert_eq!(image, stream_root_of(&bytes[..]).expect("a root"));
    }
    drop(store);
    let store = open(dir.path());
    check(&store);
    for (bytes, number) in inputs.iter().zip(0..) {
        let entry = store.lookup(&format!("s{number}")).expect("the snapshot");
        let image = *entry.record.image(Role::Stream).expect("a stream");
        assert!(read_all(&store, &image) == *bytes, "s{number}");
        let mut poured = Vec::new();
        store.export_to(&image, &mut poured, &mut |_| {}).expect("an export");
        assert!(poured == *bytes, "s{number}");
        let out = tempfile::tempfile().expect("a file");
        store.export(&image, &out, &mut |_| {}).expect("an export");
        let mut file = vec![1; bytes.len()];
        std::os::unix::fs::FileExt::read_exact_at(&out, &mut file, 0).expect("all bytes");
        assert!(file == *bytes && out.metadata().expect("its length").len() == image.len);
        let data = store.data_bytes(&image).expect("a sum");
        assert!(data <= image.len && (data == 0) == bytes.iter().all(|byte| *byte == 0));
    }
    assert!(store.page_map(&stream_root_of(&inputs[7][..]).expect("a root")).is_err());
}

/// Before streams were cut by content they were images of pages.
#[test]
fn streams_of_pages_stay_readable() {
    let dir = tempfile::tempdir().expect("a folder");
    let store = open(dir.path());
    let bytes = noise(1, 1 << 20);
    let mut session = store.begin().expect("a session");
    let mut writer = session.growing_image();
    writer.append(&bytes).expect("all bytes");
    let old = writer.finish().expect("an image");
    assert_eq!(old.splitter, Splitter::Fixed4K);
    session.commit(&record_of(old), named("old")).expect("a commit");
    let (new, ..) = commit(&store, &bytes, 1 << 20, "new");
    assert_ne!(old.root, new.root);
    store.gc(ALL).expect("a collection");
    drop(store);
    let store = open(dir.path());
    assert!(read_all(&store, &old) == bytes && read_all(&store, &new) == bytes);
    assert_eq!(store.data_bytes(&old).expect("a sum"), 1 << 20);
    check(&store);
}

#[test]
fn holes_stay_holes() {
    let store = in_memory();
    let mut bytes = noise(1, 16 << 20);
    bytes[1 << 20..15 << 20].fill(0);
    let (image, new, _) = commit(&store, &bytes, 1 << 20, "holes");
    assert!(new < 3 << 20, "{new}");
    let out = tempfile::tempfile().expect("a file");
    store.export(&image, &out, &mut |_| {}).expect("an export");
    let blocks = out.metadata().expect("its blocks").blocks();
    assert!(blocks * 512 < 4 << 20, "{blocks} blocks");
}

#[test]
fn an_insertion_at_the_front_stores_little() {
    let store = in_memory();
    let len = 64 << 20;
    let mut bytes = noise(1, len);
    let (_, new, _) = commit(&store, &bytes, 1 << 20, "before");
    assert_eq!(new, len as u64);
    let before = store.accounts().expect("accounts").store().expect("totals");
    bytes.insert(0, 42);
    let (image, new, stored) = commit(&store, &bytes, 1 << 20, "after");
    assert!(new < len as u64 / 50, "{new} new bytes");
    assert!(stored < len as u64 / 50, "{stored} stored bytes");
    assert!(read_all(&store, &image) == bytes);
    // One path of nodes, the root, the record and the event.
    let after = store.accounts().expect("accounts").store().expect("totals");
    let metadata = after.metadata_bytes - before.metadata_bytes;
    assert!(metadata < 64 << 10, "{metadata} bytes of nodes");
    println!("a byte before 64 MiB: {new} new bytes, {stored} stored, {metadata} of nodes");
}

#[test]
fn a_chunk_that_is_a_page_is_stored_once() {
    let store = in_memory();
    let page = noise(1, PAGE_LEN);
    let image = commit_bytes(&store, &page, "page");
    let (stream, new, _) = commit(&store, &page, PAGE_LEN, "stream");
    assert_eq!(new, 0);
    store.remove("page").expect("removed");
    store.gc(ALL).expect("a collection");
    assert!(read_all(&store, &stream) == page);
    check(&store);
    // The other way about, and through what the page server reads.
    let store = in_memory();
    let (_, new, _) = commit(&store, &page, PAGE_LEN, "stream");
    assert_eq!(new, PAGE_LEN as u64);
    let before = store.stats();
    assert_eq!(commit_bytes(&store, &page, "page"), image);
    assert_eq!(store.stats().unique_bytes, before.unique_bytes);
    assert!(read_all(&store, &image) == page);
    check(&store);
}

#[test]
fn diffs_name_the_bytes() {
    let store = in_memory();
    let mut bytes = noise(1, 8 << 20);
    let (one, ..) = commit(&store, &bytes, 1 << 20, "one");
    let at = 5 << 20;
    bytes[at] ^= 1;
    let (other, ..) = commit(&store, &bytes, 1 << 20, "other");
    let found = store.diff(&one, &other).expect("a diff");
    assert_eq!((found.unit_len, found.runs.len()), (1, 1), "{found:?}");
    assert!(found.runs[0].contains(&(at as u64)) && found.bytes() <= 256 << 10, "{found:?}");
    assert!(found.nodes_walked < 10, "{found:?}");
    assert_eq!(store.diff(&other, &one).expect("a diff").runs, found.runs);
    assert_eq!(store.diff(&one, &one).expect("a diff").nodes_walked, 0);
    bytes.truncate(6 << 20);
    let (short, ..) = commit(&store, &bytes, 1 << 20, "short");
    let found = store.diff(&other, &short).expect("a diff");
    assert_eq!(found.runs.len(), 1);
    assert_eq!(found.runs[0].end, 8 << 20);
    assert!(((6 << 20) - (64 << 10)..=6 << 20).contains(&found.runs[0].start), "{found:?}");
    let pages = commit_bytes(&store, &bytes, "pages");
    assert!(store.diff(&short, &pages).is_err());
}

/// What a step of a history does to the bytes before it.
#[derive(Debug, Clone)]
enum Edit {
    Insert(prop::sample::Index, Vec<u8>),
    Remove(prop::sample::Index, usize),
    Repeat(prop::sample::Index, usize),
    Zeros(prop::sample::Index, usize),
    Grow(u8, usize),
}

fn edit() -> impl Strategy<Value = Edit> {
    let at = any::<prop::sample::Index>;
    prop_oneof![
        (at(), prop::collection::vec(any::<u8>(), 1..50))
            .prop_map(|(at, new)| Edit::Insert(at, new)),
        (at(), 1..100_000_usize).prop_map(|(at, len)| Edit::Remove(at, len)),
        (at(), 1..200_000_usize).prop_map(|(at, len)| Edit::Repeat(at, len)),
        (at(), 1..200_000_usize).prop_map(|(at, len)| Edit::Zeros(at, len)),
        (any::<u8>(), 1..400_000_usize).prop_map(|(seed, len)| Edit::Grow(seed, len)),
    ]
}

fn apply(bytes: &mut Vec<u8>, edit: &Edit) {
    let range = |at: &prop::sample::Index, len: usize, bytes: &[u8]| {
        let start = at.index(bytes.len() + 1);
        start..(start + len).min(bytes.len())
    };
    match edit {
        Edit::Insert(at, new) => {
            let at = at.index(bytes.len() + 1);
            bytes.splice(at..at, new.iter().copied());
        }
        Edit::Remove(at, len) => drop(bytes.drain(range(at, *len, bytes))),
        Edit::Repeat(at, len) => bytes.extend_from_within(range(at, *len, bytes)),
        Edit::Zeros(at, len) => {
            let range = range(at, *len, bytes);
            bytes[range].fill(0);
        }
        Edit::Grow(seed, len) => bytes.extend_from_slice(&noise(u64::from(*seed), *len)),
    }
}

fn verify(store: &Store, made: &[(String, ImageRef, Vec<u8>)]) {
    for (name, image, bytes) in made {
        assert!(read_all(store, image) == *bytes, "{name}");
    }
    check(store);
}

/// Bytes that are not told to differ are equal; what is told has a difference
/// within a chunk's length.
fn verify_diff(store: &Store, one: &(ImageRef, &[u8]), other: &(ImageRef, &[u8])) {
    let found = store.diff(&one.0, &other.0).expect("a diff");
    let mut at = 0;
    let both = one.1.len().min(other.1.len());
    for run in found.runs.iter().cloned().chain(std::iter::once(u64::MAX..u64::MAX)) {
        let start = usize::try_from(run.start).unwrap_or(usize::MAX).min(both);
        assert!(one.1[at..start] == other.1[at..start], "equal before {start}");
        at = usize::try_from(run.end).unwrap_or(usize::MAX).min(both);
    }
    assert!(found.runs.windows(2).all(|pair| pair[0].end < pair[1].start));
    let longer = one.1.len().max(other.1.len()) as u64;
    assert!(one.1.len() == other.1.len() || found.runs.last().is_some_and(|run| run.end == longer));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_history_of_streams_reads_back(
        steps in prop::collection::vec((edit(), 1..150_000_usize, 0..10_u8), 1..12),
        at in any::<prop::sample::Index>(),
    ) {
        let disk = SimDisk::new();
        let settings = Settings { pack_objects_max: 20, ..settings(IndexKind::Memory) };
        let open = || Store::open_on(Arc::new(disk.clone()), &settings).expect("it opens");
        let mut store = open();
        let mut bytes = noise(1, 200_000);
        let mut made: Vec<(String, ImageRef, Vec<u8>)> = Vec::new();
        for ((edit, part, then), number) in steps.iter().zip(0..) {
            apply(&mut bytes, edit);
            let name = format!("s{number}");
            let (image, ..) = commit(&store, &bytes, *part, &name);
            prop_assert_eq!(image, stream_root_of(&bytes[..]).expect("a root"));
            made.push((name, image, bytes.clone()));
            match then {
                0 => {
                    drop(store);
                    store = open();
                }
                1 | 2 => {
                    let (name, ..) = made.swap_remove(at.index(made.len()));
                    store.remove(&name).expect("it is removed");
                    store.gc(ALL).expect("a collection");
                    verify(&store, &made);
                }
                _ => {}
            }
        }
        verify(&store, &made);
        for pair in made.windows(2) {
            let side = |at: usize| (pair[at].1, &pair[at].2[..]);
            verify_diff(&store, &side(0), &side(1));
        }
        // Any part of the last one, by a reader of its own.
        if let Some((_, image, bytes)) = made.last() {
            let from = at.index(bytes.len() + 1);
            let mut out = vec![1; 100_000.min(bytes.len() - from)];
            let mut reader = store.reader(image).expect("a reader");
            prop_assert_eq!(reader.read_at(from as u64, &mut out).expect("a read"), out.len());
            prop_assert!(out == bytes[from..from + out.len()]);
        }
        // Everything that is left after a collection is needed.
        store.gc(ALL).expect("a collection");
        let total = store.accounts().expect("accounts").store().expect("totals");
        prop_assert_eq!(total.dead_bytes, 0);
        prop_assert_eq!(total.referenced_bytes, store.stats().unique_bytes);
        drop(store);
        verify(&open(), &made);
    }
}
