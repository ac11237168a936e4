//! A collection after a run keeps every promise.

use coppice_engine::{GcOptions, SimDisk};

use crate::workload::{Promises, open, run, verify};

#[test]
fn a_collection_keeps_what_was_promised() {
    let disk = SimDisk::new();
    let mut promises = Promises::default();
    run(&disk, &mut promises).expect("a run without faults");
    let store = open(&disk).expect("it opens");
    for name in ["child", "grandchild"] {
        store.remove(name).expect("it is removed");
        promises.kept.remove(name);
    }
    let report = store.gc(GcOptions { dead_percent_min: 1 }).expect("a collection");
    assert!(report.dropped_packs + report.repacked_packs > 0, "{report:?}");
    verify(&store, &promises);
    drop(store);
    verify(&open(&disk).expect("it opens again"), &promises);
}
