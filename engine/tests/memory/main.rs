//! An ingest takes a bounded amount of memory whatever the input, RocksDB
//! included: 2 GiB by default, with `COPPICE_LONG` 100 GiB.
//!
//! A program of its own, because what is measured is the peak of a process;
//! with as many heaps as the program that owns a store has.

#![cfg(feature = "rocksdb")]

use std::path::Path;
use std::process::Command;

use coppice_engine::{
    CommitOptions, ImageRef, PAGE_LEN, Role, Settings, SnapshotRecord, Store, StoreError,
};

const FOLDER: &str = "COPPICE_TEST_MEMORY_FOLDER";
const MIB: &str = "COPPICE_TEST_MEMORY_MIB";
/// What an ingest may take, in KiB.
const PEAK_KIB_MAX: u64 = 512 << 10;
/// Bytes written at once.
const PART_LEN: usize = 4 << 20;
/// Of so many bytes of pages one is ingested once more as a stream.
const STREAM_SHARE: u64 = 16;

/// The page with this number. Nearly all compress to almost nothing, so that
/// as many objects as possible lie in a pack and the disk suffices.
fn fill(number: u64, page: &mut [u8]) {
    let mut word = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    page.fill(0);
    match number % 64 {
        // Zeros.
        0..6 => {}
        // Something from long ago, or from just before.
        6..14 => page[..8].copy_from_slice(&(number / 7).to_le_bytes()),
        14..18 => page[..8].copy_from_slice(&(number - 5).to_le_bytes()),
        // Nothing that compresses.
        18 => page.as_chunks_mut::<8>().0.iter_mut().for_each(|part| {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            *part = word.to_le_bytes();
        }),
        _ => page[..8].copy_from_slice(&number.to_le_bytes()),
    }
}

/// All parts of the input, one after the other.
fn generate(
    len: u64,
    take: &mut dyn FnMut(u64, Vec<u8>) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let pages_in_part = PART_LEN / PAGE_LEN;
    for first in (0..len / PAGE_LEN as u64).step_by(pages_in_part) {
        let mut part = vec![0; PART_LEN];
        for (number, page) in (first..).zip(part.chunks_mut(PAGE_LEN)) {
            fill(number, page);
        }
        take(first, part)?;
    }
    Ok(())
}

fn ingest(store: &Store, len: u64) -> Result<Vec<(Role, ImageRef)>, StoreError> {
    let mut session = store.begin()?;
    let mut writer = session.image(len, None)?;
    generate(len, &mut |first, part| writer.write_owned(first, part))?;
    let pages = writer.finish()?;
    let mut writer = session.stream();
    generate(len / STREAM_SHARE, &mut |_, part| writer.append(&part))?;
    let images = vec![(Role::Memory, pages), (Role::Stream, writer.finish()?)];
    let record = SnapshotRecord { images: images.clone(), config: Vec::new(), parent: None };
    session.commit(&record, CommitOptions::default())?;
    Ok(images)
}

/// The most memory that this process has had at once, in KiB.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("the status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[test]
#[ignore = "run by `an_ingest_takes_bounded_memory`"]
fn the_ingest() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    let mib: u64 = std::env::var(MIB).expect("a length").parse().expect("a number");
    let store = Store::open(Path::new(&folder), &Settings::default()).expect("a store");
    ingest(&store, mib << 20).expect("an ingest");
    let stats = store.stats();
    println!(
        "{mib} MiB ingested: {} chunks in {} packs, {} bytes stored, peak of {} KiB",
        stats.chunks,
        stats.packs,
        stats.stored_bytes,
        peak_kib()
    );
    assert!(stats.chunks > mib * 100, "the input has many chunks");
    assert!(peak_kib() <= PEAK_KIB_MAX, "{} KiB are too much", peak_kib());
}

#[test]
fn an_ingest_takes_bounded_memory() {
    let folder = tempfile::tempdir().expect("a folder");
    let mib = if std::env::var_os("COPPICE_LONG").is_some() { 100 << 10 } else { 2 << 10 };
    let output = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "the_ingest", "--ignored", "--nocapture"])
        .env(FOLDER, folder.path())
        .env(MIB, mib.to_string())
        // As the supervisor has it.
        .env("MALLOC_ARENA_MAX", "2")
        .output()
        .expect("the ingest begins");
    let said = String::from_utf8_lossy(&output.stdout);
    let line = said.lines().find(|line| line.contains("ingested"));
    println!("{}", line.unwrap_or("nothing was ingested"));
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
}
