//! What is written down about where pages lie survives a store that is closed
//! and opened again, whatever pack the pages of a leaf ended up in.

use coppice_engine::{ImageRef, PAGE_LEN, Settings, Store};

use crate::common::{named, open_as, record_of, settings};

/// Pages of the image: several packs; with `COPPICE_LONG` several of full
/// length.
fn pages() -> u64 {
    if std::env::var_os("COPPICE_LONG").is_some() { 2_500_000 } else { 6_000 }
}

fn short_packs() -> Settings {
    let objects = if std::env::var_os("COPPICE_LONG").is_some() { 1 << 20 } else { 1100 };
    Settings { pack_objects_max: objects, ..settings(Settings::default().index) }
}

/// An image of pages that all differ and compress to almost nothing.
fn commit_pages(store: &Store) -> ImageRef {
    let mut session = store.begin().expect("a session");
    let mut writer = session.image(pages() * PAGE_LEN as u64, None).expect("an image");
    for first in (0..pages()).step_by(100) {
        let mut bytes = vec![0; 100 * PAGE_LEN];
        for (number, page) in (first + 1..).zip(bytes.chunks_mut(PAGE_LEN)) {
            page[..8].copy_from_slice(&number.to_le_bytes());
        }
        writer.write_owned(first, bytes).expect("a write");
    }
    let image = writer.finish().expect("an image");
    session.commit(&record_of(image), named("it")).expect("a commit");
    image
}

#[test]
fn an_image_is_mapped_without_the_index_after_reopening() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = open_as(folder.path(), &short_packs()).expect("a store");
    let image = commit_pages(&store);
    assert!(store.stats().packs > 2, "leaves whose pages lie in two packs");
    drop(store);
    let store = open_as(folder.path(), &short_packs()).expect("a store");
    let before = store.lookups().expect("counts");
    let map = store.page_map(&image).expect("a map");
    assert_eq!(map.stored_pages(), pages());
    let asked = store.lookups().expect("counts").index_gets - before.index_gets;
    assert_eq!(asked, 0, "the index was asked for {asked} of {} hints", before.hints);
}
