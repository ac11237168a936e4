//! Faults answered from a real store.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use coppice_engine::{ImageRef, IndexKind, PageMap, Settings, Store};

use super::super::EngineLibrary;
use super::fork::{Host, can_fault, shuffled};
use crate::protocol::{PagerEvent, PagerReply, PagerRequest, PoolId};
use crate::sys::userfault::Userfault;

pub(super) const PAGES: u64 = 512;

/// Pages with a hole in every ninth place; others do not compress to nothing.
pub(super) fn page(number: u64) -> [u8; 4096] {
    let mut bytes = [0; 4096];
    if !number.is_multiple_of(9) {
        let mut state = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        for chunk in bytes.chunks_exact_mut(8).take(200) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            chunk.copy_from_slice(&state.to_le_bytes());
        }
    }
    bytes
}

/// A store with one image, committed, and the image's page map.
pub(super) fn store_in(dir: &Path) -> (Store, PageMap) {
    let settings = Settings { index: IndexKind::Memory, ..Settings::default() };
    let store = Store::open(dir, &settings).unwrap();
    let input = dir.join("image");
    let mut file = File::create(&input).unwrap();
    (0..PAGES).for_each(|number| file.write_all(&page(number)).unwrap());
    let report = store
        .import(
            &File::open(&input).unwrap(),
            "image".parse().unwrap(),
            coppice_engine::ImportOptions::default(),
            &mut |_| {},
        )
        .unwrap();
    let entry = store.lookup(&report.name.to_string()).unwrap();
    let image: &ImageRef = &entry.record.images[0].1;
    let map = store.page_map(image).unwrap();
    (store, map)
}

pub(super) fn host_of(store: &Store, map: &PageMap) -> Host {
    let host = Host::with(Arc::new(EngineLibrary::default()));
    for pack in map.packs() {
        let file = store.pack_file(*pack).unwrap();
        let (reply, _) = host.call(&PagerRequest::AddPack { pack: pack.0 }, &[file.as_fd()]);
        assert_eq!(reply, Ok(PagerReply::Done));
    }
    host
}

#[test]
fn forks_read_the_bytes_that_were_stored() {
    if !can_fault() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (store, map) = store_in(dir.path());
    let host = host_of(&store, &map);
    let memory = host.open_pool_of(1, &map.to_bytes());
    let forks: Vec<_> = (0..4).map(|n| host.fork(n, 1, &memory)).collect();
    std::thread::scope(|scope| {
        for (number, fork) in (0..).zip(&forks) {
            scope.spawn(move || {
                for index in shuffled(PAGES, number) {
                    assert_eq!(fork.read(index), page(index), "page {index}");
                }
            });
        }
    });
    let stats = host.pool_with(|stats| stats.resident_pages == PAGES && stats.frames_read > 0);
    assert_eq!(stats.zero_pages, PAGES.div_ceil(9));
    assert!(stats.frames_read <= PAGES / 8, "{stats:?}");
}

#[test]
fn a_flipped_byte_loses_its_pages_and_names_chunk_and_pack() {
    if !can_fault() || !Userfault::can_poison() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (store, map) = store_in(dir.path());
    let frame = map.frames()[0];
    let path = dir.path().join(format!("packs/{}.pack", frame.pack));
    let pack = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let at = frame.offset + u64::from(frame.len) / 2;
    let mut byte = [0];
    pack.read_exact_at(&mut byte, at).unwrap();
    pack.write_all_at(&[byte[0] ^ 1], at).unwrap();

    let host = host_of(&store, &map);
    let memory = host.open_pool_of(1, &map.to_bytes());
    let fork = host.fork(1, 1, &memory);
    let (hit, location) =
        map.stored(0..PAGES).find(|(_, location)| location.frame == frame).unwrap();
    fork.read_by_system_call(hit).unwrap_err();
    let PagerEvent::PageLost { page: lost, error, .. } = host.event() else { panic!("no loss") };
    assert_eq!(lost, hit);
    assert!(error.contains(&location.chunk.to_string()), "{error}");
    assert!(error.contains(&frame.pack.to_string()), "{error}");
    let (other, _) = map.stored(0..PAGES).find(|(_, location)| location.frame != frame).unwrap();
    assert_eq!(fork.read(other), page(other));
}

/// Imports an image of these pages.
pub(super) fn import(
    store: &Store,
    dir: &Path,
    name: &str,
    pages: impl Iterator<Item = u64>,
) -> ImageRef {
    let path = dir.join(name);
    let mut file = File::create(&path).unwrap();
    pages.for_each(|number| file.write_all(&page(number)).unwrap());
    let input = File::open(&path).unwrap();
    let options = coppice_engine::ImportOptions::default();
    store.import(&input, name.parse().unwrap(), options, &mut |_| {}).unwrap();
    store.lookup(name).unwrap().record.images[0].1
}

#[test]
fn a_collection_moves_pages_under_machines_that_use_them() {
    if !can_fault() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let settings = Settings { index: IndexKind::Memory, ..Settings::default() };
    let store = Store::open(&dir.path().join("store"), &settings).unwrap();
    // Both in one pack, of which a half dies.
    import(&store, dir.path(), "large", 0..2 * PAGES);
    let image = import(&store, dir.path(), "small", 0..PAGES);
    let before = store.page_map(&image).unwrap();
    let host = host_of(&store, &before);
    let memory = host.open_pool_of(1, &before.to_bytes());
    let fork = host.fork(1, 1, &memory);
    assert_eq!(fork.read(1), page(1));

    store.remove("large").unwrap();
    store.gc(coppice_engine::GcOptions { dead_percent_min: 0, ..Default::default() }).unwrap();
    let after = store.page_map(&image).unwrap();
    let gone: Vec<u64> = before.packs().iter().map(|pack| pack.0).collect();
    let live = store.packs().unwrap();
    assert!(before.packs().iter().all(|pack| !live.contains(pack)), "the pack was not rewritten");
    assert!(after.packs().iter().all(|pack| live.contains(pack)));
    for pack in after.packs() {
        let file = store.pack_file(*pack).unwrap();
        let (reply, _) = host.call(&PagerRequest::AddPack { pack: pack.0 }, &[file.as_fd()]);
        assert_eq!(reply, Ok(PagerReply::Done));
    }
    // While a machine reads, as it does in life.
    std::thread::scope(|scope| {
        let fork = &fork;
        scope.spawn(move || {
            for index in shuffled(PAGES, 7) {
                assert_eq!(fork.read(index), page(index), "page {index}");
            }
        });
        let renew = PagerRequest::RenewPool { pool: PoolId(1) };
        let (reply, _) = host.call(&renew, &[table(&after.to_bytes()).as_fd()]);
        assert_eq!(reply, Ok(PagerReply::Done));
        let (reply, _) = host.call(&PagerRequest::ForgetPacks { packs: gone }, &[]);
        assert_eq!(reply, Ok(PagerReply::Done));
    });
    // One of another image would show its machines other bytes.
    let other = import(&store, dir.path(), "other", 1..=PAGES);
    let other = store.page_map(&other).unwrap().to_bytes();
    let renew = PagerRequest::RenewPool { pool: PoolId(1) };
    let (reply, _) = host.call(&renew, &[table(&other).as_fd()]);
    assert!(reply.unwrap_err().contains("another image"));
}

pub(super) fn table(bytes: &[u8]) -> File {
    let file = rustix::fs::memfd_create("map", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut file = File::from(file);
    file.write_all(bytes).unwrap();
    file
}

#[test]
fn a_page_map_that_is_not_one_is_refused() {
    if !can_fault() {
        return;
    }
    let host = Host::with(Arc::new(EngineLibrary::default()));
    let request = PagerRequest::OpenPool { pool: PoolId(1) };
    let (reply, _) = host.call(&request, &[table(&[7; 500]).as_fd()]);
    assert!(reply.unwrap_err().contains("page map"));
}
