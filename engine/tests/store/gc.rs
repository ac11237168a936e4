//! Garbage collection: exact, invisible to whoever works beside it, and not
//! undone by the loss of the root log.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use coppice_engine::{
    ErrorKind, GcOptions, ImageRef, IndexKind, PAGE_LEN, Settings, SimDisk, SnapshotRecord, Store,
};
use proptest::prelude::*;

use crate::common::{
    commit_bytes, name, named, noise, open, read_all, record_of, settings, soft_pages,
};

const ALL: GcOptions = GcOptions { dead_percent_min: 0, frames_percent_max: 100 };

#[derive(Debug, Clone)]
enum Act {
    /// A snapshot on a base, or none, with these pages set to these contents.
    Make(Option<prop::sample::Index>, Vec<(u16, u8)>),
    Remove(prop::sample::Index),
    Collect(u8),
    Reopen,
}

fn act() -> impl Strategy<Value = Act> {
    let pages = prop::collection::vec((0..700_u16, 0..12_u8), 1..60);
    prop_oneof![
        4 => (any::<Option<prop::sample::Index>>(), pages).prop_map(|(base, pages)| Act::Make(base, pages)),
        2 => any::<prop::sample::Index>().prop_map(Act::Remove),
        2 => prop_oneof![Just(0_u8), Just(30), Just(100)].prop_map(Act::Collect),
        1 => Just(Act::Reopen),
    ]
}

/// A snapshot as the model has it.
#[derive(Debug, Clone)]
struct Made {
    name: String,
    image: ImageRef,
    bytes: Vec<u8>,
}

const PAGES: usize = 700;

/// What a page of this content looks like; 0 is zeros.
fn content(kind: u8, page: u16) -> Vec<u8> {
    let mut bytes = vec![kind; PAGE_LEN];
    if kind > 5 {
        bytes[..2].copy_from_slice(&page.to_le_bytes());
    }
    bytes
}

fn make(
    store: &Store,
    made: &mut Vec<Made>,
    number: usize,
    base: Option<&Made>,
    pages: &[(u16, u8)],
) {
    let mut bytes = base.map_or(vec![0; PAGES * PAGE_LEN], |base| base.bytes.clone());
    let changed: std::collections::BTreeMap<u16, u8> = pages.iter().copied().collect();
    let mut session = store.begin().expect("a session");
    let base = base.map(|base| base.image);
    let mut writer = session.image(bytes.len() as u64, base.as_ref()).expect("an image");
    for (page, kind) in changed {
        let new = content(kind, page);
        let at = usize::from(page) * PAGE_LEN;
        bytes[at..at + PAGE_LEN].copy_from_slice(&new);
        writer.write(u64::from(page), &new).expect("a write");
    }
    let image = writer.finish().expect("an image");
    let as_name = format!("s{number}");
    match session.commit(&record_of(image), named(&as_name)) {
        Ok(_) => made.push(Made { name: as_name, image, bytes }),
        Err(error) => panic!("a commit: {error}"),
    }
}

/// Pages that anybody needs, counted without the engine.
fn distinct_pages(made: &[Made]) -> u64 {
    let pages: HashSet<&[u8]> = made
        .iter()
        .flat_map(|one| one.bytes.chunks(PAGE_LEN))
        .filter(|page| page.iter().any(|byte| *byte != 0))
        .collect();
    pages.len() as u64
}

fn verify(store: &Store, made: &[Made]) {
    for one in made {
        assert!(read_all(store, &one.image) == one.bytes, "{}", one.name);
    }
    let report = store.check(&mut |_| {}).expect("a check");
    assert!(report.is_clean() && !report.recounted, "{report:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_history_with_collections_reads_back(acts in prop::collection::vec(act(), 1..25)) {
        let disk = SimDisk::new();
        let settings = Settings { pack_objects_max: 60, ..settings(IndexKind::Memory) };
        let open = || Store::open_on(Arc::new(disk.clone()), &settings).expect("it opens");
        let mut store = open();
        let mut made: Vec<Made> = Vec::new();
        for (number, act) in acts.iter().enumerate() {
            match act {
                Act::Make(base, pages) => {
                    let base = base.filter(|_| !made.is_empty());
                    let base = base.map(|at| made[at.index(made.len())].clone());
                    make(&store, &mut made, number, base.as_ref(), pages);
                }
                Act::Remove(at) if !made.is_empty() => {
                    let gone = made.swap_remove(at.index(made.len()));
                    store.remove(&gone.name).expect("it is removed");
                }
                Act::Remove(_) => {}
                Act::Collect(dead_percent_min) => {
                    let options = GcOptions { dead_percent_min: *dead_percent_min, frames_percent_max: 120 };
                    store.gc(options).expect("a collection");
                    if *dead_percent_min == 0 {
                        prop_assert_eq!(store.stats().chunks, distinct_pages(&made));
                    }
                    verify(&store, &made);
                }
                Act::Reopen => {
                    drop(store);
                    store = open();
                }
            }
        }
        store.gc(ALL).expect("a collection");
        prop_assert_eq!(store.stats().chunks, distinct_pages(&made));
        drop(store);
        verify(&open(), &made);
    }
}

/// Frames in which an image lies, and the least that could hold it.
fn frames(store: &Store, image: &ImageRef) -> (u64, u64) {
    let map = store.page_map(image).expect("a map");
    (map.frames().len() as u64, map.stored_pages().div_ceil(16))
}

#[test]
fn a_long_lineage_stays_within_its_budget_of_frames() {
    let dir = tempfile::tempdir().expect("a folder");
    let store = open(dir.path());
    let mut made: Vec<Made> = Vec::new();
    let mut bytes = soft_pages(1, 1600);
    let mut image = commit_bytes(&store, &bytes, "s0");
    let mut parent = None;
    made.push(Made { name: "s0".to_owned(), image, bytes: bytes.clone() });
    for number in 1..60_u64 {
        let mut pages: Vec<usize> = noise(number, 60)
            .as_chunks::<2>()
            .0
            .iter()
            .map(|two| usize::from(u16::from_le_bytes(*two)) % 1600)
            .collect();
        pages.sort_unstable();
        pages.dedup();
        let mut session = store.begin().expect("a session");
        let mut writer = session.image(image.len, Some(&image)).expect("an image");
        for page in pages {
            let new = soft_pages(number * 2000 + page as u64, 1);
            bytes[page * PAGE_LEN..(page + 1) * PAGE_LEN].copy_from_slice(&new);
            writer.write(page as u64, &new).expect("a write");
        }
        image = writer.finish().expect("an image");
        let as_name = format!("s{number}");
        let record = SnapshotRecord { parent, ..record_of(image) };
        parent = Some(session.commit(&record, named(&as_name)).expect("a commit").id);
        made.push(Made { name: as_name, image, bytes: bytes.clone() });
        if number % 10 == 0 {
            store.gc(GcOptions::default()).expect("a collection");
            // Not the last one only.
            for one in &made {
                let (now, fresh) = frames(&store, &one.image);
                assert!(now * 2 <= fresh * 3, "{}: {now} frames, {fresh} when fresh", one.name);
            }
            // What was found straight is not looked at again.
            let again = store.gc(GcOptions::default()).expect("a collection");
            assert_eq!(again.straightened_images, 0);
        }
    }
    let plan = store.gc_plan(GcOptions::default()).expect("a plan");
    let done = store.gc(GcOptions::default()).expect("a collection");
    assert_eq!(plan.fragmented.len() as u64, done.straightened_images);
    verify(&store, &made);
    let live: u64 =
        store.gc_plan(ALL).expect("a plan").packs.iter().map(|p| p.live_chunk_bytes).sum();
    assert_eq!(live, distinct_pages(&made) * PAGE_LEN as u64);
}

#[test]
fn a_plan_changes_nothing_and_says_what_a_collection_does() {
    let dir = tempfile::tempdir().expect("a folder");
    let store = open(dir.path());
    commit_bytes(&store, &soft_pages(1, 300), "kept");
    commit_bytes(&store, &soft_pages(2, 300), "gone");
    let before = store.stats();
    assert_eq!(store.gc_plan(ALL).expect("a plan").freed_now_bytes, 0);
    store.remove("gone").expect("it is removed");
    let plan = store.gc_plan(ALL).expect("a plan");
    assert_eq!((store.stats().packs, store.stats().chunks), (before.packs, before.chunks));
    let report = store.gc(ALL).expect("a collection");
    assert_eq!((report.freed_bytes, report.rewritten_bytes), (plan.freed_now_bytes, 0));
    assert_eq!(store.stats().chunks, 300);
    assert_eq!(std::fs::read_dir(dir.path().join("packs")).expect("packs").count(), 1);
}

#[test]
fn leased_images_stay_and_can_be_built_upon() {
    let dir = tempfile::tempdir().expect("a folder");
    let store = open(dir.path());
    let bytes = soft_pages(3, 200);
    let image = commit_bytes(&store, &bytes, "base");
    let lease = store.lease(&[image]).expect("a lease");
    store.remove("base").expect("it is removed");
    store.gc(ALL).expect("a collection");
    assert!(read_all(&store, &image) == bytes);
    let mut session = store.begin().expect("a session");
    let writer = session.image(image.len, Some(&image)).expect("a leased base");
    let same = writer.finish().expect("an image");
    session.commit(&record_of(same), named("again")).expect("a commit");
    store.remove("again").expect("it is removed");
    drop(lease);
    store.gc(ALL).expect("a collection");
    assert_eq!(store.stats().packs, 0);
    let error = store.lease(&[image]).expect_err("it is gone");
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
}

#[test]
fn what_was_collected_does_not_come_back_with_a_lost_root_log() {
    let dir = tempfile::tempdir().expect("a folder");
    let store = open(dir.path());
    commit_bytes(&store, &soft_pages(4, 100), "kept");
    commit_bytes(&store, &soft_pages(5, 100), "gone");
    store.tag("kept", name("also")).expect("a tag");
    store.remove("gone").expect("it is removed");
    store.gc(GcOptions::default()).expect("a collection");
    drop(store);
    std::fs::remove_file(dir.path().join("roots.log")).expect("the log is removed");
    let store = open(dir.path());
    let names: Vec<String> =
        store.snapshots().iter().flat_map(|e| &e.names).map(ToString::to_string).collect();
    assert_eq!(names, ["also", "kept"]);
    verify(&store, &[]);
}

/// A session relies on what it found in an older pack while the youngest one
/// that has the same bytes dies: the older one inherits.
#[test]
fn what_a_session_found_stays_when_a_younger_copy_dies() {
    let dir = tempfile::tempdir().expect("a folder");
    let store = open(dir.path());
    let pages = soft_pages(3, 64);
    let mut young = store.begin().expect("a session");
    let image = young.blob(&pages).expect("an image");
    // Stored once more by a session that did not see the first one's.
    let old = commit_bytes(&store, &pages, "old");
    let mut relying = store.begin().expect("a session");
    let relied = relying.blob(&pages).expect("an image");
    assert_eq!((old, old), (image, relied));
    young.commit(&record_of(image), named("young")).expect("a commit");
    store.remove("young").expect("it is removed");
    store.remove("old").expect("it is removed");
    let done = store.gc(ALL).expect("a collection");
    assert_eq!((done.dropped_packs, done.busy_packs), (1, 1));
    relying.commit(&record_of(relied), named("relied")).expect("a commit");
    assert!(read_all(&store, &relied) == pages);
    verify(&store, &[]);
}

#[test]
fn collections_run_beside_ingest_and_reading() {
    let dir = tempfile::tempdir().expect("a folder");
    let settings = Settings { pack_objects_max: 100, ..settings(Settings::default().index) };
    let store = crate::common::open_as(dir.path(), &settings).expect("a store");
    let kept_bytes = soft_pages(9, 500);
    let kept = commit_bytes(&store, &kept_bytes, "kept");
    let done = AtomicBool::new(false);
    let (reads, collections) = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut count = 0;
            while !done.load(Ordering::Acquire) {
                assert!(read_all(&store, &kept) == kept_bytes);
                count += 1;
            }
            count
        });
        let collector = scope.spawn(|| {
            let mut count = 0;
            while !done.load(Ordering::Acquire) {
                store.gc(ALL).expect("a collection");
                count += 1;
            }
            count
        });
        for round in 0..60_u64 {
            // Half old bytes, which come and go, and half new ones.
            let mut bytes = soft_pages(100 + round % 3, 60);
            bytes.extend(noise(round + 1, 60 * PAGE_LEN));
            let as_name = format!("round{round}");
            let image = commit_bytes(&store, &bytes, &as_name);
            assert!(read_all(&store, &image) == bytes);
            if round >= 2 {
                store.remove(&format!("round{}", round - 2)).expect("it is removed");
            }
        }
        done.store(true, Ordering::Release);
        (reader.join().expect("the reader"), collector.join().expect("the collector"))
    });
    println!("60 commits beside {reads} readings and {collections} collections");
    assert!(reads > 0 && collections > 0);
    store.gc(ALL).expect("a collection");
    verify(&store, &[]);
    drop(store);
    let store = crate::common::open_as(dir.path(), &settings).expect("it opens again");
    verify(&store, &[]);
    assert!(read_all(&store, &kept) == kept_bytes);
}

/// The ids of the packs that are there.
fn pack_names(dir: &std::path::Path) -> Vec<String> {
    let files = std::fs::read_dir(dir.join("packs")).expect("packs");
    let mut names: Vec<String> = files
        .map(|file| file.expect("a file").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn no_pack_id_is_used_twice() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut highest = String::new();
    let mut newer = |dir: &std::path::Path| {
        let last = pack_names(dir).pop().expect("a pack");
        assert!(last > highest, "{last} after {highest}");
        highest = last;
    };
    let store = open(dir.path());
    commit_bytes(&store, &soft_pages(4, 100), "kept");
    // A session that seals a pack and is never committed: no entry of the
    // root log carries the id of its pack.
    let small = Settings { pack_objects_max: 20, ..settings(Settings::default().index) };
    drop(store);
    let store = crate::common::open_as(dir.path(), &small).expect("a store");
    let mut session = store.begin().expect("a session");
    session.blob(&soft_pages(5, 100)).expect("an image");
    drop(session);
    newer(dir.path());
    store.gc(ALL).expect("a collection");
    assert_eq!(pack_names(dir.path()).len(), 1, "only what is kept");
    drop(store);
    std::fs::remove_dir_all(dir.path().join("index")).expect("the index is lost");
    let store = crate::common::open_as(dir.path(), &small).expect("a store");
    commit_bytes(&store, &soft_pages(6, 10), "next");
    newer(dir.path());
    store.remove("next").expect("it is removed");
    store.gc(ALL).expect("a collection");
    drop(store);
    // Without the root log nothing is known of collected packs.
    std::fs::remove_file(dir.path().join("roots.log")).expect("the log is removed");
    let store = crate::common::open_as(dir.path(), &small).expect("a store");
    commit_bytes(&store, &soft_pages(7, 10), "last");
    newer(dir.path());
}
