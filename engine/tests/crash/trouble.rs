//! Writes fail because the disk is full or broken; flushes fail.

use coppice_engine::{ErrorKind, Faults, SimDisk};

use crate::tried;
use crate::workload::{Promises, commit, open, pages, run, verify};

const ENOSPC: i32 = 28;
const EIO: i32 = 5;

fn every_write_fails_once(errno: i32, expected: ErrorKind) {
    let whole = SimDisk::new();
    run(&whole, &mut Promises::default()).expect("a run without faults");
    let mut cases = 0;
    for failing in 0..whole.counts().writes {
        let disk = SimDisk::new();
        disk.set_faults(Faults { fail_write: Some((failing, errno)), ..Faults::default() });
        let mut promises = Promises::default();
        let error = run(&disk, &mut promises).expect_err("a write failed");
        assert_eq!(error.kind(), expected, "write {failing}: {error}");
        promises.open = None;
        verify(&open(&disk).expect("it opens"), &promises);
        verify(&open(&disk.after_power_cut(failing)).expect("it opens"), &promises);
        cases += 1;
    }
    tried(cases, &format!("failed writes with error number {errno}"));
}

#[test]
fn a_full_disk_loses_nothing() {
    every_write_fails_once(ENOSPC, ErrorKind::NoSpace);
}

#[test]
fn a_broken_write_loses_nothing() {
    every_write_fails_once(EIO, ErrorKind::Unavailable);
}

#[test]
fn the_store_stays_usable_after_a_failed_write() {
    let disk = SimDisk::new();
    let store = open(&disk).expect("a store");
    let bytes = pages(3, 100);
    for later in 0.. {
        let failing = disk.counts().writes + later;
        disk.set_faults(Faults { fail_write: Some((failing, ENOSPC)), ..Faults::default() });
        match commit(&store, "it", &bytes, None, 0..100) {
            Ok(_) => break,
            Err(error) => assert_eq!(error.kind(), ErrorKind::NoSpace),
        }
        assert!(store.lookup("it").is_err());
    }
    assert!(store.lookup("it").is_ok());
    assert!(store.check(&mut |_| {}).expect("a check").is_clean());
}

#[test]
fn a_failed_flush_fences_the_store() {
    let whole = SimDisk::new();
    let store = open(&whole).expect("a store");
    let begin = whole.counts().syncs;
    commit(&store, "base", &pages(1, 100), None, 0..100).expect("a commit");
    let syncs = whole.counts().syncs;
    assert!(syncs >= begin + 3);

    for failing in begin..syncs {
        let disk = SimDisk::new();
        let store = open(&disk).expect("a store");
        disk.set_faults(Faults { fail_sync: Some(failing), ..Faults::default() });
        let bytes = pages(1, 100);
        commit(&store, "base", &bytes, None, 0..100).expect_err("a flush failed");
        let error = commit(&store, "next", &bytes, None, 0..100).expect_err("fenced");
        assert_eq!(error.kind(), ErrorKind::Fenced);
        assert_eq!(store.remove("base").map_err(|e| e.kind()).err(), Some(ErrorKind::NotFound));
        let store = open(&disk.after_power_cut(failing)).expect("it opens");
        assert!(store.check(&mut |_| {}).expect("a check").is_clean());
        if store.lookup("base").is_err() {
            commit(&store, "base", &bytes, None, 0..100).expect("a commit");
        }
    }
}
