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
use crate::protocol::{PagerEvent, PagerReply, PagerRequest};
use crate::sys::userfault::Userfault;

const PAGES: u64 = 512;

/// Pages with a hole in every ninth place; others do not compress to nothing.
fn page(number: u64) -> [u8; 4096] {
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
fn store_in(dir: &Path) -> (Store, PageMap) {
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

fn host_of(store: &Store, map: &PageMap) -> Host {
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

#[test]
fn a_page_map_that_is_not_one_is_refused() {
    if !can_fault() {
        return;
    }
    let host = Host::with(Arc::new(EngineLibrary::default()));
    let garbage = rustix::fs::memfd_create("map", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut file = File::from(garbage);
    file.write_all(&[7; 500]).unwrap();
    let request = PagerRequest::OpenPool { pool: crate::protocol::PoolId(1) };
    let (reply, _) = host.call(&request, &[file.as_fd()]);
    assert!(reply.unwrap_err().contains("page map"));
}
