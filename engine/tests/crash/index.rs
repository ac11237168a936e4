//! The index loses a suffix of what was done to it, and changes of it fail, at
//! every moment of a life with collections: what it knows of packs, of what is
//! needed and of where things lie is right or rebuilt.

use std::sync::Arc;

use coppice_engine::{ErrorKind, Faults, GcOptions, SimDisk, SimIndex, Store, StoreError};

use crate::gc::{ALL, run_and_collect_on};
use crate::tried;
use crate::workload::{Promises, commit, pages, settings, verify};

/// Ways in which the index and the disk may have survived.
const SEEDS: u64 = 4;

fn open(disk: &SimDisk, index: &SimIndex) -> Result<Store, StoreError> {
    Store::open_with_index(Arc::new(disk.clone()), index, &settings())
}

fn run(disk: &SimDisk, index: &SimIndex, promises: &mut Promises) -> Result<(), StoreError> {
    run_and_collect_on(&|| open(disk, index), promises)
}

/// A life goes on with what is left.
fn goes_on(disk: &SimDisk, index: &SimIndex) {
    let store = open(disk, index).expect("it opens");
    commit(&store, "after", &pages(7, 30), None, 0..30).expect("a commit");
    store.gc(ALL).expect("a collection");
    assert!(store.check(&mut |_| {}).expect("a check").is_clean());
    let plan = store.gc_plan(GcOptions { dead_percent_min: 0, ..ALL }).expect("a plan");
    let dead: u64 = plan.packs.iter().map(|pack| pack.dead_objects).sum();
    assert_eq!(dead, 0, "a collection that ended leaves nothing dead");
}

#[test]
fn nothing_promised_is_lost_whatever_the_index_forgets() {
    let (whole, index) = (SimDisk::new(), SimIndex::new());
    run(&whole, &index, &mut Promises::default()).expect("a run without faults");
    assert!(index.steps() > 40, "{}", index.steps());
    let mut cases = 0;
    for stop in 0..whole.counts().syncs {
        let (disk, index) = (SimDisk::new(), SimIndex::new());
        disk.set_faults(Faults { stop_at_sync: Some(stop), ..Faults::default() });
        let mut promises = Promises::default();
        run(&disk, &index, &mut promises).expect_err("the power went");
        for seed in 0..SEEDS {
            let disk = disk.after_power_cut(stop * SEEDS + seed);
            let index = index.after_power_cut(stop * SEEDS + seed);
            let store =
                open(&disk, &index).unwrap_or_else(|e| panic!("stop {stop} seed {seed}: {e}"));
            verify(&store, &promises);
            drop(store);
            goes_on(&disk, &index);
            cases += 1;
        }
    }
    tried(cases, "power cuts with an index that forgot something");
}

#[test]
fn a_change_of_the_index_that_fails_loses_nothing() {
    let index = SimIndex::new();
    run(&SimDisk::new(), &index, &mut Promises::default()).expect("a run without faults");
    let mut cases = 0;
    for failing in 0..index.steps() {
        for errno in [28, 5] {
            let (disk, index) = (SimDisk::new(), SimIndex::new());
            index.fail_step(Some((failing, errno)));
            let mut promises = Promises::default();
            if let Err(error) = run(&disk, &index, &mut promises) {
                let told = [ErrorKind::NoSpace, ErrorKind::Unavailable, ErrorKind::Internal];
                assert!(told.contains(&error.kind()), "step {failing}: {error}");
            }
            // In the same process, after a power cut, and from the packs alone.
            verify(&open(&disk, &index).expect("it opens"), &promises);
            let (left, index_left) =
                (disk.after_power_cut(failing), index.after_power_cut(failing));
            verify(&open(&left, &index_left).expect("it opens"), &promises);
            verify(&open(&disk, &SimIndex::new()).expect("it opens"), &promises);
            goes_on(&disk, &index);
            cases += 1;
        }
    }
    tried(cases, "failed changes of the index");
}
