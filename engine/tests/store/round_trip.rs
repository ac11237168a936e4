//! Bytes go in and come out again, by every way out.

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
