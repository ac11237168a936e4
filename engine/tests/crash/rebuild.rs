//! Everything derived is lost, perhaps the root log too, and the disk fails
//! while it is built again: what the packs tell is told by the next opening.

use std::sync::Arc;

use coppice_engine::{Disk, Faults, Role, SimDisk, SimIndex, Store, StoreError};

use crate::gc::run_and_collect_on;
use crate::tried;
use crate::workload::{Promises, open, settings};

/// A disk with a store of some history, and what it promised.
fn lived() -> (SimDisk, Promises) {
    let (disk, mut promises) = (SimDisk::new(), Promises::default());
    run_and_collect_on(&|| open(&disk), &mut promises).expect("a run without faults");
    (disk, promises)
}

/// The same disk again, with or without its root log.
fn copy(disk: &SimDisk, has_log: bool) -> SimDisk {
    let copy = disk.after_power_cut(0);
    if !has_log {
        copy.remove("roots.log").expect("the log");
        copy.sync_dir("").expect("a flush");
    }
    copy
}

fn rebuilt(disk: &SimDisk) -> Result<Store, StoreError> {
    Store::open_with_index(Arc::new(disk.clone()), &SimIndex::new(), &settings())
}

/// What was promised is there. Without the root log also some that was removed.
fn holds(disk: &SimDisk, promises: &Promises) {
    let store = rebuilt(disk).expect("it opens");
    for (name, bytes) in &promises.kept {
        let entry = store.lookup(name).expect("it is there");
        let image = entry.record.image(Role::Memory).expect("memory");
        let mut out = vec![0; bytes.len()];
        store.reader(image).expect("a reader").read_at(0, &mut out).expect("a read");
        assert!(out == *bytes, "{name}");
    }
    assert!(store.check(&mut |_| {}).expect("a check").is_clean());
}

#[test]
fn a_rebuild_that_is_cut_short_or_fails_loses_nothing() {
    let (lived, promises) = lived();
    let mut cases = 0;
    for has_log in [true, false] {
        let whole = copy(&lived, has_log);
        drop(rebuilt(&whole).expect("it opens"));
        holds(&whole, &promises);
        let whole = copy(&lived, has_log);
        drop(rebuilt(&whole).expect("it opens"));
        let counts = whole.counts();
        let syncs = (0..counts.syncs).flat_map(|at| {
            let stop = Faults { stop_at_sync: Some(at), ..Faults::default() };
            [stop, Faults { fail_sync: Some(at), ..Faults::default() }]
        });
        let writes = (0..counts.writes).flat_map(|at| {
            [28, 5].map(|errno| Faults { fail_write: Some((at, errno)), ..Faults::default() })
        });
        let reads =
            (0..counts.reads).map(|at| Faults { fail_read: Some((at, 5)), ..Faults::default() });
        for (number, faults) in syncs.chain(writes).chain(reads).enumerate() {
            let disk = copy(&lived, has_log);
            let before = disk.counts();
            let later = |at: Option<u64>, before: u64| at.map(|at| before + at);
            disk.set_faults(Faults {
                stop_at_sync: later(faults.stop_at_sync, before.syncs),
                fail_sync: later(faults.fail_sync, before.syncs),
                fail_write: faults.fail_write.map(|(at, errno)| (before.writes + at, errno)),
                fail_read: faults.fail_read.map(|(at, errno)| (before.reads + at, errno)),
            });
            drop(rebuilt(&disk));
            holds(&disk.after_power_cut(number as u64), &promises);
            cases += 1;
        }
    }
    tried(cases, "faults while everything derived is built again");
}
