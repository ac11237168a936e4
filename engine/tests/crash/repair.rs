//! The power goes while a store is repaired.

use coppice_engine::{Disk, Faults, PAGE_LEN, Role, SimDisk};

use crate::workload::{Promises, open, run};

/// A disk with a store in which one page frame of the second pack is damaged,
/// and what it should hold.
fn damaged() -> (SimDisk, Promises) {
    let disk = SimDisk::new();
    let mut promises = Promises::default();
    run(&disk, &mut promises).expect("a run without faults");
    let disk = disk.after_power_cut(0);
    let file = disk.open("packs/000000000002.pack", coppice_engine::Access::Write).expect("a pack");
    let byte = file.read_at(16 + 90, 1).expect("a byte");
    file.write_all_at(16 + 90, &[byte[0] ^ 4]).expect("a write");
    file.sync().expect("a flush");
    (disk, promises)
}

/// What is readable is right, and only what the lost frame held is not.
fn pages_lost(disk: &SimDisk, promises: &Promises) -> usize {
    let store = open(disk).expect("it opens");
    let mut lost = 0;
    for entry in store.snapshots() {
        let Some(bytes) = entry.names.iter().find_map(|name| promises.kept.get(name.as_str()))
        else {
            continue;
        };
        let mut reader =
            store.reader(entry.record.image(Role::Memory).expect("memory")).expect("a reader");
        for (page, expected) in bytes.chunks(PAGE_LEN).enumerate() {
            let mut out = vec![0; expected.len()];
            match reader.read_at((page * PAGE_LEN) as u64, &mut out) {
                Ok(_) => assert!(out == expected, "page {page}"),
                Err(_) => lost += 1,
            }
        }
    }
    lost
}

#[test]
fn a_repair_that_is_cut_short_loses_nothing_more() {
    let (disk, promises) = damaged();
    let before = disk.counts().syncs;
    let least = pages_lost(&disk, &promises);
    let opened = disk.counts().syncs - before;
    assert!(least > 0);
    let store = open(&disk).expect("it opens");
    let (repaired, left) = store.repair(&mut |_| {}).expect("a repair");
    assert_eq!(repaired.quarantined.len(), 1);
    assert!(!left.is_clean());
    drop(store);
    assert_eq!(pages_lost(&disk, &promises), least);
    let syncs = disk.counts().syncs;
    let mut cases = 0;
    for stop in opened..syncs {
        let (disk, promises) = damaged();
        let begin = disk.counts().syncs;
        disk.set_faults(Faults { stop_at_sync: Some(begin + stop), ..Faults::default() });
        let Ok(store) = open(&disk) else { continue };
        let done = store.repair(&mut |_| {});
        drop(store);
        for seed in 0..3 {
            let left = disk.after_power_cut(stop * 3 + seed);
            assert_eq!(pages_lost(&left, &promises), least, "stop {stop} seed {seed}");
            let store = open(&left).expect("it opens");
            store.repair(&mut |_| {}).expect("another repair");
            drop(store);
            assert_eq!(pages_lost(&left, &promises), least, "stop {stop} seed {seed}");
            cases += 1;
        }
        if done.is_ok() {
            break;
        }
    }
    crate::tried(cases, "power cuts in a repair");
    assert!(cases >= 12, "{cases}");
}
