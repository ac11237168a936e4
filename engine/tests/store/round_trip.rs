//! Bytes go in and come out again, by every way out.

use std::os::unix::fs::FileExt;

use coppice_engine::{Extent, PAGE_LEN, PageMap, PageReader, Role, SnapshotRecord, tree_root_of};

use crate::common::{commit_bytes, named, noise, open, read_all, record_of, soft_pages};

#[test]
fn an_image_survives_reopening() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut bytes = soft_pages(1, 300);
    bytes[10 * PAGE_LEN..50 * PAGE_LEN].fill(0);
    bytes.extend_from_slice(b"a partial tail");
    let image = commit_bytes(&open(dir.path()), &bytes, "one");

    let store = open(dir.path());
    let entry = store.lookup("one").expect("the snapshot");
    assert_eq!(entry.record.image(Role::Memory), Some(&image));
    assert_eq!(read_all(&store, &image), bytes);
    assert_eq!(tree_root_of(&bytes[..]).expect("a root"), image);
    assert_eq!(store.lookup(&entry.id.to_string()[..8]).expect("by id"), entry);
}

#[test]
fn the_page_server_sees_the_same_bytes() {
    let dir = tempfile::tempdir().expect("a folder");
    let store = open(dir.path());
    let mut bytes = soft_pages(2, 99);
    bytes[3 * PAGE_LEN..5 * PAGE_LEN].fill(0);
    // The same chunk on two pages.
    bytes.copy_within(7 * PAGE_LEN..8 * PAGE_LEN, 9 * PAGE_LEN);
    let image = commit_bytes(&store, &bytes, "one");

    let map = store.page_map(&image).expect("a map");
    let map = PageMap::from_bytes(&map.to_bytes()).expect("the same map");
    assert_eq!(map.extent(3), Extent::Zero);
    let reader = PageReader::new();
    let mut bytes_read = 0;
    for pack in map.packs() {
        reader.add_pack(*pack, store.pack_file(*pack).expect("a pack"));
    }
    for page in 0..map.pages() {
        let mut seen = Vec::new();
        let mut sink = |at: u64, found: &[u8; PAGE_LEN]| {
            let start = usize::try_from(at).expect("small") * PAGE_LEN;
            assert_eq!(found[..], bytes[start..start + PAGE_LEN], "page {at}");
            seen.push(at);
        };
        let fetched = reader.fetch(&map, page, &mut sink).expect("a fetch");
        assert_eq!(seen.first(), Some(&page));
        assert_eq!(fetched.pages, seen.len() as u64);
        let stored = map.extent(page) != Extent::Zero;
        // One who came first had the frame read for all.
        bytes_read += fetched.bytes_read;
        assert_eq!(seen.len() > 1, stored, "neighbours come along");
    }
    assert_eq!(bytes_read, map.frames().iter().map(|frame| u64::from(frame.len)).sum());
}

#[test]
fn a_child_shares_what_it_did_not_change() {
    let dir = tempfile::tempdir().expect("a folder");
    let store = open(dir.path());
    let mut bytes = soft_pages(3, 20_000);
    let base = commit_bytes(&store, &bytes, "base");
    let before = store.stats();

    let mut session = store.begin().expect("a session");
    let mut writer = session.image(base.len, Some(&base)).expect("an image");
    for page in [5, 700, 19_999] {
        let new = noise(page as u64, PAGE_LEN);
        bytes[page * PAGE_LEN..(page + 1) * PAGE_LEN].copy_from_slice(&new);
        writer.write(page as u64, &new).expect("a write");
    }
    let child = writer.finish().expect("an image");
    assert_eq!(child, tree_root_of(&bytes[..]).expect("a root"));
    let record = SnapshotRecord {
        parent: Some(store.lookup("base").expect("the base").id),
        ..record_of(child)
    };
    let committed = session.commit(&record, named("child")).expect("a commit");
    assert_eq!(committed.new_bytes, 3 * PAGE_LEN as u64);
    assert!(committed.stored_bytes < 20_000, "stored {}", committed.stored_bytes);
    assert_eq!(store.stats().chunks, before.chunks + 3);
    assert_eq!(read_all(&store, &child), bytes);

    // Zeros over a base are zeros, and the root says so.
    let mut session = store.begin().expect("a session");
    let mut writer = session.image(base.len, Some(&child)).expect("an image");
    writer.write(0, &vec![0; 1000 * PAGE_LEN]).expect("a write");
    let third = writer.finish().expect("an image");
    session.commit(&record_of(third), named("third")).expect("a commit");
    bytes[..1000 * PAGE_LEN].fill(0);
    assert_eq!(third, tree_root_of(&bytes[..]).expect("a root"));
    assert_eq!(read_all(&store, &third), bytes);
}

/// Pages that differ, here and there in an image with nodes of three levels.
fn scattered(seed: u64) -> Vec<(u64, Vec<u8>)> {
    let at = noise(seed, 8 * 400);
    let mut pages: Vec<u64> = at
        .as_chunks::<8>()
        .0
        .iter()
        .map(|bytes| u64::from_le_bytes(*bytes) % ERASED_PAGES)
        .collect();
    pages.sort_unstable();
    pages.dedup();
    pages.into_iter().map(|page| (page, noise(page ^ seed, PAGE_LEN))).collect()
}

const ERASED_PAGES: u64 = 128 * 128 * 2 + 77;

/// Ranges of all lengths, ascending.
fn ranges(seed: u64) -> Vec<(u64, u64)> {
    let random = noise(seed, 16 * 40);
    let mut ranges = Vec::new();
    let mut at = 0;
    for bytes in random.as_chunks::<16>().0 {
        let [gap, len] = [&bytes[..8], &bytes[8..]]
            .map(|part| u64::from_le_bytes(*part.first_chunk().expect("eight")));
        let first = at + gap % 300;
        let count = len % [3, 130, 2_000, 20_000][usize::from(bytes[0] % 4)];
        if first + count > ERASED_PAGES {
            break;
        }
        ranges.push((first, count));
        at = first + count;
    }
    ranges
}

#[test]
fn erased_pages_are_as_if_zeros_had_been_written() {
    let dir = tempfile::tempdir().expect("a folder");
    let store = open(dir.path());
    let len = ERASED_PAGES * PAGE_LEN as u64;
    for seed in 1..6 {
        let mut session = store.begin().expect("a session");
        let mut writer = session.image(len, None).expect("an image");
        for (page, bytes) in scattered(seed) {
            writer.write(page, &bytes).expect("a write");
        }
        let base = writer.finish().expect("an image");
        session.commit(&record_of(base), named(&format!("base-{seed}"))).expect("a commit");

        // A sparse file: data for every third range, holes for the others.
        let overlay = tempfile::tempfile().expect("a file");
        overlay.set_len(len).expect("a length");
        let mut session = store.begin().expect("a session");
        let mut writer = session.image(len, Some(&base)).expect("an image");
        for (number, (first, count)) in ranges(seed).into_iter().enumerate() {
            if number % 3 == 0 && count > 0 {
                let at = (first + count / 2) * PAGE_LEN as u64;
                overlay.write_all_at(&noise(at, PAGE_LEN), at).expect("a write");
            }
            writer.write_overlay(&overlay, first, count).expect("an overlay");
        }
        let erased = writer.finish().expect("an image");
        let mut writer = session.image(len, Some(&base)).expect("an image");
        for (first, count) in ranges(seed) {
            let mut bytes = vec![0; usize::try_from(count).expect("small") * PAGE_LEN];
            overlay.read_exact_at(&mut bytes, first * PAGE_LEN as u64).expect("a read");
            writer.write(first, &bytes).expect("a write");
        }
        assert_eq!(writer.finish().expect("an image"), erased);
        assert_ne!(erased, base);
    }
}

#[test]
fn pages_are_erased_in_order_and_within_the_image() {
    let dir = tempfile::tempdir().expect("a folder");
    let store = open(dir.path());
    let base = commit_bytes(&store, &soft_pages(1, 300), "one");
    let mut session = store.begin().expect("a session");
    let mut writer = session.image(base.len, Some(&base)).expect("an image");
    writer.erase(100, 50).expect("in order");
    assert!(writer.erase(149, 1).is_err());
    assert!(writer.write(149, &[0; PAGE_LEN]).is_err());
    assert!(writer.erase(299, 2).is_err());
    assert!(writer.erase(299, u64::MAX).is_err());
    writer.erase(150, 150).expect("to the end");
    let left = writer.finish().expect("an image");
    let mut bytes = soft_pages(1, 300);
    bytes[100 * PAGE_LEN..].fill(0);
    assert_eq!(left, tree_root_of(&bytes[..]).expect("a root"));
}
