//! The power goes and writes fail while garbage is collected.

use coppice_engine::{ErrorKind, Faults, GcOptions, SimDisk, Store, StoreError};

use crate::tried;
use crate::workload::{Change, Promises, commit, open, pages, run, run_on, verify};

/// Repacks whatever has anything dead in it.
pub(crate) const ALL: GcOptions = GcOptions { dead_percent_min: 0, frames_percent_max: 100 };

/// Ways in which unflushed data may have survived.
const SEEDS: u64 = 4;

/// A run after which much is dead, with collections and life between them.
fn run_and_collect(disk: &SimDisk, promises: &mut Promises) -> Result<(), StoreError> {
    run_and_collect_on(&|| open(disk), promises)
}

/// The same on any disk and index.
pub(crate) fn run_and_collect_on(
    open: &dyn Fn() -> Result<Store, StoreError>,
    promises: &mut Promises,
) -> Result<(), StoreError> {
    run_on(open, promises)?;
    let store = open()?;
    let remove = |promises: &mut Promises, name: &str| {
        promises.open = Some(Change::Remove(name.to_owned()));
        store.remove(name)?;
        promises.kept.remove(name);
        promises.open = None;
        Ok::<_, StoreError>(())
    };
    remove(promises, "grandchild")?;
    remove(promises, "twin")?;
    store.gc(GcOptions { dead_percent_min: 50, ..GcOptions::default() })?;
    promises.straightened += store.gc(ALL)?.straightened_images;
    // The same bytes as some that were collected, and a child of what moved.
    let mut bytes = promises.kept["child"].clone();
    bytes[200 * 4096..240 * 4096].copy_from_slice(&pages(7, 40));
    let base = store.lookup("child")?.record.image(coppice_engine::Role::Memory).copied();
    promises.open = Some(Change::Commit("next".to_owned(), bytes.clone()));
    commit(&store, "next", &bytes, base.as_ref(), 200..240)?;
    promises.kept.insert("next".to_owned(), bytes);
    promises.open = None;
    remove(promises, "child")?;
    remove(promises, "last")?;
    promises.straightened += store.gc(ALL)?.straightened_images;
    Ok(())
}

fn goes_on(disk: &SimDisk) {
    let store = open(disk).expect("it opens");
    commit(&store, "after", &pages(7, 30), None, 0..30).expect("a commit");
    store.gc(ALL).expect("a collection");
    drop(store);
    let store = open(disk).expect("it opens again");
    assert!(store.lookup("after").is_ok());
    assert!(store.check(&mut |_| {}).expect("a check").is_clean());
    let dead: u64 =
        store.gc_plan(ALL).expect("a plan").packs.iter().map(|pack| pack.dead_objects).sum();
    assert_eq!(dead, 0, "a collection that ended leaves nothing dead");
}

#[test]
fn nothing_promised_is_lost_whenever_the_power_goes_in_a_collection() {
    let whole = SimDisk::new();
    let mut promises = Promises::default();
    run(&whole, &mut Promises::default()).expect("a run without faults");
    let before = whole.counts().syncs;
    let whole = SimDisk::new();
    run_and_collect(&whole, &mut promises).expect("a run without faults");
    assert!(promises.straightened > 0, "images are straightened too");
    let syncs = whole.counts().syncs;
    verify(&open(&whole).expect("it opens"), &promises);
    let mut cases = 0;
    for stop in before..syncs {
        let disk = SimDisk::new();
        disk.set_faults(Faults { stop_at_sync: Some(stop), ..Faults::default() });
        let mut promises = Promises::default();
        run_and_collect(&disk, &mut promises).expect_err("the power went");
        for seed in 0..SEEDS {
            let left = disk.after_power_cut(stop * SEEDS + seed);
            let store = open(&left).unwrap_or_else(|e| panic!("stop {stop} seed {seed}: {e}"));
            verify(&store, &promises);
            drop(store);
            goes_on(&left);
            cases += 1;
        }
    }
    tried(cases, "power cuts in a collection");
    assert!(cases > 20, "{cases}");
}

#[test]
fn a_write_that_fails_in_a_collection_loses_nothing() {
    let whole = SimDisk::new();
    run(&whole, &mut Promises::default()).expect("a run without faults");
    let before = whole.counts().writes;
    let whole = SimDisk::new();
    run_and_collect(&whole, &mut Promises::default()).expect("a run without faults");
    let mut cases = 0;
    for failing in before..whole.counts().writes {
        for errno in [28, 5] {
            let disk = SimDisk::new();
            disk.set_faults(Faults { fail_write: Some((failing, errno)), ..Faults::default() });
            let mut promises = Promises::default();
            // A full disk only ends a repacking early; other failures are told.
            let outcome = run_and_collect(&disk, &mut promises);
            assert!(outcome.is_err() || errno == 28, "write {failing}");
            verify(&open(&disk).expect("it opens"), &promises);
            verify(&open(&disk.after_power_cut(failing)).expect("it opens"), &promises);
            goes_on(&disk);
            cases += 1;
        }
    }
    tried(cases, "failed writes in a collection");
    assert!(cases > 20, "{cases}");
}

#[test]
fn a_failed_flush_in_a_collection_fences_the_store() {
    let whole = SimDisk::new();
    run(&whole, &mut Promises::default()).expect("a run without faults");
    let before = whole.counts().syncs;
    let whole = SimDisk::new();
    run_and_collect(&whole, &mut Promises::default()).expect("a run without faults");
    let mut cases = 0;
    for failing in before..whole.counts().syncs {
        let disk = SimDisk::new();
        disk.set_faults(Faults { fail_sync: Some(failing), ..Faults::default() });
        let mut promises = Promises::default();
        run_and_collect(&disk, &mut promises).expect_err("a flush failed");
        let left = disk.after_power_cut(failing);
        verify(&open(&left).expect("it opens"), &promises);
        goes_on(&left);
        cases += 1;
    }
    tried(cases, "failed flushes in a collection");
}

#[test]
fn a_read_that_fails_in_a_collection_loses_nothing() {
    let whole = SimDisk::new();
    run_and_collect(&whole, &mut Promises::default()).expect("a run without faults");
    let mut cases = 0;
    let step = if std::env::var_os("COPPICE_LONG").is_some() { 1 } else { 3 };
    for failing in (0..whole.counts().reads).step_by(step) {
        let disk = SimDisk::new();
        disk.set_faults(Faults { fail_read: Some((failing, 5)), ..Faults::default() });
        let mut promises = Promises::default();
        if let Err(error) = run_and_collect(&disk, &mut promises) {
            let told = [ErrorKind::Unavailable, ErrorKind::Corrupt];
            assert!(told.contains(&error.kind()), "read {failing}: {error}");
        }
        disk.set_faults(Faults::default());
        verify(&open(&disk).expect("it opens"), &promises);
        goes_on(&disk);
        cases += 1;
    }
    tried(cases, "failed reads");
}
