//! A disk becomes full at every possible fill, and is cleared again.

use std::sync::Arc;

use coppice_engine::{Disk, ErrorKind, GcOptions, SimDisk, SimIndex, Store};

use crate::tried;
use crate::workload::{Promises, commit, pages, settings, verify};

/// So much the disk holds, with what it has set aside.
const CAPACITY: u64 = 24 << 20;

/// Bytes that do not compress.
fn noise(seed: u64, count: usize) -> Vec<u8> {
    let mut bytes = pages(1, count);
    let mut state = seed + 1;
    for byte in &mut bytes {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *byte = state.to_be_bytes()[0];
    }
    bytes
}

#[test]
fn a_full_disk_is_cleared_whatever_fills_it() {
    let mut cases = 0;
    for free in (0..40_u64).map(|step| step * step * 64) {
        let (disk, index) = (SimDisk::new(), SimIndex::new());
        disk.set_capacity(Some(CAPACITY));
        let open = || Store::open_with_index(Arc::new(disk.clone()), &index, &settings());
        let store = open().expect("a store");
        let mut promises = Promises::default();
        for (name, seed) in [("kept", 1), ("gone", 2)] {
            let bytes = noise(seed, 120);
            commit(&store, name, &bytes, None, 0..120).expect("a commit");
            promises.kept.insert(name.to_owned(), bytes);
        }
        let room = disk.room().expect("a disk").expect("its room").available;
        let ballast = disk.create("ballast").expect("a file");
        let len = usize::try_from(room.saturating_sub(free)).expect("small");
        ballast.write_all_at(0, &vec![1; len]).expect("it fits");
        // It may still fit; if not, nothing is lost by trying.
        let bytes = noise(3, 9);
        match commit(&store, "more", &bytes, None, 0..9) {
            Ok(_) => drop(promises.kept.insert("more".to_owned(), bytes)),
            Err(error) => assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}"),
        }
        drop(store);
        let store = open().expect("a full disk is no reason not to open");
        store.remove("gone").expect("it is removed");
        promises.kept.remove("gone");
        let done = store.gc(GcOptions { dead_percent_min: 0, ..GcOptions::default() });
        assert!(done.expect("a collection").dropped_packs > 0);
        verify(&store, &promises);
        commit(&store, "next", &noise(4, 60), None, 0..60).expect("there is room");
        promises.kept.insert("next".to_owned(), noise(4, 60));
        drop(store);
        disk.remove("ballast").expect("it goes");
        let store = open().expect("it opens");
        verify(&store, &promises);
        drop(store.begin().expect("a session"));
        let files = disk.list("").expect("a list");
        assert!(files.iter().any(|file| file.name == "reserve"), "it is set aside again");
        cases += 1;
    }
    tried(cases, "full disks cleared");
}
