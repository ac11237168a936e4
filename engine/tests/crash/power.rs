//! The power goes at every flush of a run.

use coppice_engine::{Faults, SimDisk};

use crate::tried;
use crate::workload::{Promises, commit, open, pages, run, verify};

/// Ways in which unflushed data may have survived.
const SEEDS: u64 = 4;

#[test]
fn nothing_promised_is_lost_whenever_the_power_goes() {
    let whole = SimDisk::new();
    let mut promises = Promises::default();
    run(&whole, &mut promises).expect("a run without faults");
    let syncs = whole.counts().syncs;
    verify(&open(&whole).expect("it opens"), &promises);
    assert!(syncs >= 25, "the run flushes often: {syncs}");

    let mut cases = 0;
    for stop in 0..syncs {
        let disk = SimDisk::new();
        disk.set_faults(Faults { stop_at_sync: Some(stop), ..Faults::default() });
        let mut promises = Promises::default();
        run(&disk, &mut promises).expect_err("the power went");
        for seed in 0..SEEDS {
            let left = disk.after_power_cut(stop * SEEDS + seed);
            let store = open(&left).unwrap_or_else(|e| panic!("stop {stop} seed {seed}: {e}"));
            verify(&store, &promises);
            // Life goes on, also after another opening.
            let bytes = pages(7, 30);
            commit(&store, "after", &bytes, None, 0..30).expect("a commit");
            drop(store);
            let store = open(&left).expect("it opens again");
            assert!(store.lookup("after").is_ok());
            assert!(store.check(&mut |_| {}).expect("a check").is_clean());
            cases += 1;
        }
    }
    tried(cases, "power cuts");
}

#[test]
fn the_power_may_go_again_during_recovery() {
    let whole = SimDisk::new();
    run(&whole, &mut Promises::default()).expect("a run without faults");
    let mut cases = 0;
    for stop in (0..whole.counts().syncs).step_by(3) {
        let disk = SimDisk::new();
        disk.set_faults(Faults { stop_at_sync: Some(stop), ..Faults::default() });
        let mut promises = Promises::default();
        run(&disk, &mut promises).expect_err("the power went");
        let left = disk.after_power_cut(stop);
        for again in 0..4 {
            left.set_faults(Faults { stop_at_sync: Some(again), ..Faults::default() });
            let opened = open(&left);
            let next = left.after_power_cut(again);
            drop(opened);
            verify(&open(&next).expect("it opens"), &promises);
            cases += 1;
        }
    }
    tried(cases, "power cuts in a recovery");
}
