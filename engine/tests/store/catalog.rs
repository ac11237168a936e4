//! Names, removal, statistics, import and export.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};

use coppice_engine::{ErrorKind, ImportKind, ImportOptions, PAGE_LEN, Store};

use crate::common::{commit_bytes, name, named, noise, open, record_of, settings, soft_pages};

fn import(
    store: &Store,
    file: &File,
    as_name: &str,
    kind: ImportKind,
) -> coppice_engine::ImportReport {
    let options = ImportOptions { kind, ..ImportOptions::default() };
    store.import(file, name(as_name), options, &mut |_| {}).expect("an import")
}

/// A sparse file: data, a hole, data that ends in the middle of a page.
fn sparse_file() -> File {
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(&soft_pages(1, 100)).expect("a write");
    file.set_len(1 << 30).expect("a hole");
    file.seek(SeekFrom::End(-5000)).expect("a seek");
    file.write_all(&noise(2, 4321)).expect("a write");
    file
}

#[test]
fn a_sparse_file_comes_back_sparse_and_is_stored_once() {
    let dir = tempfile::tempdir().expect("a folder");
    let store = open(dir.path());
    let file = sparse_file();
    let first = import(&store, &file, "first", ImportKind::Disk);
    assert_eq!(first.logical_bytes, 1 << 30);
    assert_eq!(first.new_bytes, 102 * PAGE_LEN as u64);
    let before = store.stats();

    let second = import(&store, &file, "second", ImportKind::Disk);
    assert_eq!((second.new_bytes, second.root, second.id), (0, first.root, first.id));
    assert!(second.stored_bytes < 1024, "only the record: {}", second.stored_bytes);
    assert_eq!(store.stats().chunks, before.chunks);
    let entry = store.lookup("second").expect("the snapshot");
    assert_eq!(entry.names.len(), 2);

    let out = tempfile::tempfile().expect("a file");
    store.export(&entry.record.images[0].1, &out, &mut |_| {}).expect("an export");
    let metadata = out.metadata().expect("metadata");
    assert_eq!(metadata.len(), 1 << 30);
    assert!(metadata.blocks() * 512 < 4 << 20, "holes stay holes");
    for (offset, len) in [(0, 101 * PAGE_LEN), ((1 << 30) - 8192, 8192), (500 << 20, 8192)] {
        let (mut one, mut other) = (vec![1; len], vec![2; len]);
        file.read_exact_at(&mut one, offset).expect("a read");
        out.read_exact_at(&mut other, offset).expect("a read");
        assert!(one == other, "at {offset}");
    }
}

#[test]
fn a_pipe_can_be_imported() {
    let dir = tempfile::tempdir().expect("a folder");
    let store = open(dir.path());
    let bytes = noise(3, 3 * 1024 * 1024 + 77);
    for (kind, name) in [(ImportKind::Stream, "stream"), (ImportKind::Disk, "disk")] {
        let (reader, mut writer) = std::io::pipe().expect("a pipe");
        let copy = bytes.clone();
        let feeder = std::thread::spawn(move || writer.write_all(&copy));
        let input = File::from(std::os::fd::OwnedFd::from(reader));
        let report = import(&store, &input, name, kind);
        feeder.join().expect("no panic").expect("all written");
        assert_eq!(report.logical_bytes, bytes.len() as u64);
        let image = store.lookup(name).expect("the snapshot").record.images[0].1;
        let expected = match kind {
            ImportKind::Stream => coppice_engine::stream_root_of(&bytes[..]),
            ImportKind::Disk => coppice_engine::tree_root_of(&bytes[..]),
        };
        assert_eq!(image, expected.expect("a root"));
    }
}

#[test]
fn names_are_taken_once_and_given_back() {
    let dir = tempfile::tempdir().expect("a folder");
    let store = open(dir.path());
    let image = commit_bytes(&store, b"hello", "a");
    let session = store.begin().expect("a session");
    let error = session.commit(&record_of(image), named("a")).expect_err("the name exists");
    assert_eq!(error.kind(), ErrorKind::Exists);

    store.tag("a", name("b")).expect("a tag");
    let error = store.tag("a", name("b")).expect_err("the name exists");
    assert_eq!(error.kind(), ErrorKind::Exists);
    store.remove("a").expect("a removal");
    assert_eq!(store.lookup("a").expect_err("gone").kind(), ErrorKind::NotFound);
    assert_eq!(store.snapshots().len(), 1);
    store.remove("b").expect("a removal");
    assert_eq!(store.snapshots().len(), 0);
    drop(store);
    let store = open(dir.path());
    assert_eq!(store.snapshots().len(), 0);
    assert_eq!(store.stats().snapshots, 0);
    // The same bytes come back without storing them again.
    let again = commit_bytes(&store, b"hello", "a");
    assert_eq!(again, image);
    assert_eq!(store.stats().chunks, 1);
    assert!(store.check(&mut |_| {}).expect("a check").is_clean());
}

#[test]
fn a_store_has_one_owner_and_a_known_format() {
    let dir = tempfile::tempdir().expect("a folder");
    let store = open(dir.path());
    let again = Store::open(dir.path(), &settings(coppice_engine::IndexKind::Memory));
    assert_eq!(again.expect_err("locked").kind(), ErrorKind::Unavailable);
    drop(store);
    std::fs::write(dir.path().join("FORMAT"), "coppice store format 9\n").expect("a write");
    let newer = crate::common::open_as(dir.path(), &settings(coppice_engine::IndexKind::Memory));
    let error = newer.expect_err("a newer format");
    assert!(error.to_string().contains("format 9"), "{error}");

    let foreign = tempfile::tempdir().expect("a folder");
    std::fs::write(foreign.path().join("letter.txt"), "dear").expect("a write");
    let error = Store::open(foreign.path(), &settings(coppice_engine::IndexKind::Memory));
    assert_eq!(error.expect_err("foreign").kind(), ErrorKind::Invalid);
    assert!(!foreign.path().join("packs").exists());
}

#[test]
fn sessions_run_side_by_side() {
    let dir = tempfile::tempdir().expect("a folder");
    let store = open(dir.path());
    std::thread::scope(|scope| {
        for worker in 0..4_u64 {
            let store = &store;
            scope.spawn(move || {
                for round in 0..5 {
                    let bytes = soft_pages(worker % 2 + round, 200);
                    commit_bytes(store, &bytes, &format!("w{worker}-{round}"));
                }
            });
        }
    });
    let names: usize = store.snapshots().iter().map(|entry| entry.names.len()).sum();
    assert_eq!(names, 20);
    assert!(store.check(&mut |_| {}).expect("a check").is_clean());
}
