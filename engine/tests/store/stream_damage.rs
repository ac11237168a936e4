//! Damage to streams is found, named, contained and healed.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use coppice_engine::{CheckReport, CheckScope, ErrorKind, ImageRef, IndexKind, Store};

use crate::common::{named, noise, open, open_as, read_all, settings};
use crate::stream::record_of;

fn flip(path: &Path, offset: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).expect("the file");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("a read");
    file.write_all_at(&[byte[0] ^ 1], offset).expect("a write");
}

fn commit(store: &Store, bytes: &[u8], as_name: &str) -> ImageRef {
    let mut session = store.begin().expect("a session");
    let mut writer = session.stream();
    writer.append(bytes).expect("all bytes");
    let image = writer.finish().expect("a stream");
    session.commit(&record_of(image), named(as_name)).expect("a commit");
    image
}

fn check(store: &Store) -> CheckReport {
    store.check(&mut |_| {}).expect("a check")
}

/// A stream in a pack of its own, and another one that it shares nothing with.
fn two_streams(dir: &Path) -> (Vec<u8>, ImageRef, PathBuf) {
    let store = open(dir);
    let mut bytes = noise(1, 600_000);
    bytes.iter_mut().step_by(3).for_each(|byte| *byte = 0);
    let image = commit(&store, &bytes, "hit");
    commit(&store, &noise(2, 50_000), "spared");
    assert!(check(&store).is_clean());
    (bytes, image, dir.join("packs/000000000001.pack"))
}

#[test]
fn a_flip_anywhere_is_found_and_no_wrong_byte_read() {
    let dir = tempfile::tempdir().expect("a folder");
    let (bytes, image, pack) = two_streams(dir.path());
    let len = std::fs::metadata(&pack).expect("the pack").len();
    let settings = settings(IndexKind::Memory);
    // A few in every block, and every byte of the tables and the footer.
    let all = (0..len).step_by(1711).chain(len - 1500..len);
    let mut cases = 0;
    for at in all.filter(|at| at % 7 == 0 || *at < len - 1500) {
        flip(&pack, at);
        let store = open_as(dir.path(), &settings).expect("it opens");
        let report = check(&store);
        assert!(!report.is_clean(), "at {at} of {len}");
        assert!(report.damages.iter().all(|damage| !damage.snapshots.contains("spared")));
        let mut out = vec![0; bytes.len()];
        let read = store.reader(&image).and_then(|mut reader| reader.read_at(0, &mut out));
        assert!(read.is_err() || out == bytes, "at {at}");
        let mut poured = Vec::new();
        let exported = store.export_to(&image, &mut poured, &mut |_| {});
        assert!(bytes.starts_with(&poured), "at {at}");
        assert_eq!(exported.is_ok(), read.is_ok(), "at {at}");
        drop(store);
        flip(&pack, at);
        cases += 1;
    }
    crate::tried(cases, "flipped bits in streams");
    assert!(cases > 300, "{cases}");
}

#[test]
fn a_bad_chunk_is_named_and_the_same_bytes_heal_it() {
    let dir = tempfile::tempdir().expect("a folder");
    let (bytes, image, pack) = two_streams(dir.path());
    flip(&pack, 16 + 80 + 100);
    let store = open(dir.path());
    let error = store.reader(&image).and_then(|mut reader| reader.read_at(0, &mut [0; 10]));
    assert_eq!(error.expect_err("damage").kind(), ErrorKind::Corrupt);
    let mut part = vec![0; 100_000];
    store.reader(&image).expect("a reader").read_at(400_000, &mut part).expect("other frames");
    assert!(part == bytes[400_000..500_000]);
    let structure = store.check_some(CheckScope::Structure, &mut |_| {}).expect("a check");
    assert!(structure.is_clean() && structure.chunks == 0 && structure.skipped_frames > 0);
    let report = check(&store);
    let [damage] = &report.damages[..] else { panic!("one damage: {report:?}") };
    assert_eq!(damage.offset, Some(16));
    assert!(damage.objects.iter().all(|chunk| chunk.len() == 64), "{damage:?}");
    assert!(damage.snapshots.iter().eq(["hit"]));
    commit(&store, &bytes, "again");
    assert!(read_all(&store, &image) == bytes);
    let report = check(&store);
    assert!(report.is_clean() && report.healed_frames == 1, "{report:?}");
}

#[test]
fn a_repair_keeps_what_is_sound() {
    let dir = tempfile::tempdir().expect("a folder");
    let (bytes, image, pack) = two_streams(dir.path());
    flip(&pack, 16 + 80 + 100);
    let store = open(dir.path());
    let (repaired, left) = store.repair(&mut |_| {}).expect("a repair");
    assert_eq!((repaired.quarantined.len(), repaired.lost_frames), (1, 1));
    assert!(left.damages.iter().all(|damage| damage.snapshots.iter().eq(["hit"])), "{left:?}");
    let mut part = vec![0; 100_000];
    store.reader(&image).expect("a reader").read_at(400_000, &mut part).expect("it was kept");
    assert!(part == bytes[400_000..500_000]);
    commit(&store, &bytes, "again");
    assert!(read_all(&store, &image) == bytes && check(&store).is_clean());
}

#[test]
fn a_pack_without_its_tables_keeps_its_chunks() {
    let dir = tempfile::tempdir().expect("a folder");
    let (bytes, image, pack) = two_streams(dir.path());
    let before = open(dir.path()).stats();
    let len = std::fs::metadata(&pack).expect("the pack").len();
    OpenOptions::new().write(true).open(&pack).expect("it").set_len(len - 50).expect("a cut");
    let store = open(dir.path());
    assert!(read_all(&store, &image) == bytes);
    assert_eq!(store.stats().unique_bytes, before.unique_bytes);
    let report = check(&store);
    assert!(!report.is_clean() && report.damages.iter().all(|damage| damage.snapshots.is_empty()));
    store.repair(&mut |_| {}).expect("a repair");
    assert!(read_all(&store, &image) == bytes && check(&store).is_clean());
    drop(store);
    if dir.path().join("index").exists() {
        std::fs::remove_dir_all(dir.path().join("index")).expect("the index");
    }
    let store = open(dir.path());
    assert_eq!(store.stats().unique_bytes, before.unique_bytes);
}
